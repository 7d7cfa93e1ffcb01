"""The guard: harmful steps move nothing, are counted, and end in another start."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.core import config as config_lib
from hope_jax.train import checkpoint, guard, loop, metrics
from hope_jax.train.state import TrainState
from tests.train import tiny

RUN = tiny.rows("smoke")["tiny"]
NAN = float("nan")


def known(values, window=8):
    """A guard that has seen losses and gradient norms alike."""
    state = guard.begin(window)
    for value in values:
        _, state = judged(state, value)
    return state


def judged(state, loss, gradient=None, finite=True, sigma=6.0):
    watched = jnp.array([loss, loss if gradient is None else gradient], jnp.float32)
    taken, after = guard.judge(state, watched, jnp.asarray(finite), sigma)
    return bool(taken), after


NOISE = 3 + 0.1 * np.sin(np.arange(8) * 2.4)


def test_a_spike_is_skipped_and_hides_no_other():
    state = known(np.tile(NOISE, 16), 128)
    mean, deviation = np.mean(NOISE), np.std(NOISE)
    taken, state = judged(state, NAN, finite=False)
    assert not taken and int(state.in_a_row) == 1
    assert np.isfinite(state.recent).all() and int(state.seen) == 128
    for far, expected in ((10, False), (1e6, False), (1, True), (10, False)):
        taken, state = judged(state, mean + far * deviation)
        assert taken == expected, far
    assert (int(state.skipped), int(state.in_a_row)) == (4, 1)
    assert not judged(state, mean, gradient=mean + 20 * deviation)[0]
    assert judged(state, mean + 10 * deviation, sigma=0.0)[0]


def test_a_change_that_lasts_is_taken_up():
    state, skipped = known(NOISE, 16), 0
    while not judged(state, 5.0)[0]:
        _, state = judged(state, 5.0)
        skipped += 1
    assert 1 <= skipped <= 20


def test_it_waits_for_half_a_window_and_for_more_than_rounding():
    assert judged(known(NOISE[:3]), 100.0)[0]
    assert not judged(known(NOISE[:4]), 100.0)[0]
    assert judged(known([2.0] * 8), 2.1)[0]
    assert not judged(known([2.0] * 8), 2.2)[0]


@pytest.mark.parametrize("bad", guard.FINITE)
def test_a_step_that_is_not_finite_moves_nothing(bad):
    def step(state, batch):
        numbers = {name: jnp.asarray(1.0) for name in guard.FINITE}
        moved = jax.tree.map(lambda leaf: leaf + 1, state.level)
        return state._replace(level=moved), numbers | {bad: batch}

    safe = jax.jit(guard.guarded(step, 6.0))
    level = {"w": jnp.arange(3.0), "count": jnp.asarray(7, jnp.int32)}
    state = TrainState(level, jax.random.key(0), guard.begin(4))  # pyright: ignore[reportArgumentType] any tree
    after, told = safe(state, jnp.asarray(NAN))
    jax.tree.map(np.testing.assert_array_equal, after.level, level)
    assert (int(told["skipped"]), int(told["skipped_in_a_row"])) == (1, 1)
    after, told = safe(after, jnp.asarray(1.0))
    np.testing.assert_array_equal(after.level["w"], level["w"] + 1)
    assert (int(told["skipped"]), int(told["skipped_in_a_row"])) == (1, 0)
    assert safe._cache_size() == 1


def poison(monkeypatch, when):
    """Makes the loss of steps NaN `when(state)` says so."""
    make = loop.step_lib.make_step

    def poisoned(*arguments, **named):
        step = make(*arguments, **named)

        def hurt(state, batch):
            after, found = step(state, batch)
            bad = jnp.where(when(state), jnp.float32(NAN), jnp.float32(0))
            level = jax.tree.map(lambda a: a + bad.astype(a.dtype), after.level)
            return after._replace(level=level), found | {"loss": found["loss"] + bad}

        return hurt

    monkeypatch.setattr(loop.step_lib, "make_step", poisoned)


def test_one_bad_batch_costs_one_step(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, lambda s: (s.level.count == 4) & (s.guard.skipped == 0))
    run = config_lib.override(RUN, ["train.steps=20", "guard.window=4"])
    outcome = loop.train(run, tmp_path)
    assert outcome.finished and outcome.metrics["skipped"] == 1
    log = metrics.read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in log] == [n for n in range(1, 21) if n != 5]
    assert [line["skipped"] for line in log] == [0] * 4 + [1] * 15
    assert "Step 5: loss is nan. Skipped" in capsys.readouterr().out
    assert math.isfinite(outcome.metrics["loss"])


def test_a_run_goes_back_and_on_with_other_data(tmp_path, monkeypatch):
    """Of 24 steps two in a row are a tenth; none that is due is left out after it."""
    seen = []
    batch = loop._batch
    monkeypatch.setattr(loop, "_batch", lambda i: seen.append(i["tokens"]) or batch(i))
    poison(monkeypatch, lambda s: (s.level.count >= 8) & (s.guard.returns == 0))
    settings = ["train.steps=24", "train.checkpoint_every=3", "guard.back=4"]
    run = config_lib.override(RUN, [*settings, "train.keep=9"])
    outcome = loop.train(run, tmp_path)
    assert outcome.finished and outcome.step == 24
    log = metrics.read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(1, 25))
    assert len({batch.tobytes() for batch in seen}) == len(
        seen
    )  # and none is seen twice
    with checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True) as saved:
        assert saved.steps() == list(range(3, 25, 3))
        (event,) = saved._meta(24)["lineage"]
    assert event["event"] == "returned" and event["step"] - event["to"] >= 4
    never = config_lib.override(run, ["guard.returns=0"])
    with pytest.raises(loop.NonFinite, match="as were 3 steps in a row.*--init_from"):
        loop.train(never, tmp_path / "never")
