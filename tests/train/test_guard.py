"""The guard: harmful steps move nothing, are counted, and end in another start."""

import math
import signal
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.core import config as config_lib
from hope_jax.train import checkpoint, guard, loop, metrics
from hope_jax.train.kept import Kept, Moment, Unread
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


class Killed(BaseException):
    """As `kill -9`: no handler of errors saves anything."""


@pytest.fixture
def returning(monkeypatch):
    """A run that goes back once, and the batches that it takes; of 24 steps two in a
    row are a tenth."""
    seen: list[bytes] = []
    batch = loop._batch

    def taken(item):
        if len(seen) == taken.kill_at:
            raise Killed
        seen.append(item["tokens"].tobytes())
        return batch(item)

    taken.kill_at = None
    monkeypatch.setattr(loop, "_batch", taken)
    poison(monkeypatch, lambda s: (s.level.count >= 8) & (s.guard.returns == 0))
    settings = ["train.steps=24", "train.checkpoint_every=3", "guard.back=4"]
    return config_lib.override(RUN, [*settings, "train.keep=20"]), seen, taken


def test_a_run_goes_back_and_on_with_other_data(tmp_path, returning, monkeypatch):
    """Killed right after that, or asked to stop, it does not see again what it
    skipped."""
    run, seen, taken = returning
    outcome = loop.train(run, tmp_path / "whole")
    assert outcome.finished and outcome.step == 24
    log = metrics.read_log(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(1, 25))
    assert len(seen) == 11 + 18 and len(set(seen)) == len(seen)
    with checkpoint.Checkpoints(tmp_path / "whole/checkpoints", read_only=True) as kept:
        assert kept.steps() == [3, 6, 7, *range(9, 25, 3)]  # 7: the first after it
        whole = kept._meta(24)
        assert kept._meta(7)["lineage"] == whole["lineage"]
    assert whole["lineage"] == [{"event": "returned", "step": 11, "to": 6}]

    before, taken.kill_at = list(seen), 11 + 1
    seen.clear()
    with pytest.raises(Killed):
        loop.train(run, tmp_path / "killed")
    taken.kill_at = None
    assert loop.train(run, tmp_path / "killed", resume=True).finished
    assert seen == before
    with checkpoint.Checkpoints(
        tmp_path / "killed/checkpoints", read_only=True
    ) as kept:
        killed = kept._meta(24)
    for what in ("params", "state", "data", "lineage"):
        assert killed[what] == whole[what]

    back = Kept.go_back

    def asked(self, like):
        back(self, like)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Kept, "go_back", asked)
        outcome = loop.train(run, tmp_path / "asked")
    assert (outcome.step, outcome.stopped_by) == (7, signal.SIGTERM)  # not 6

    never = config_lib.override(run, ["guard.returns=0"])
    with pytest.raises(loop.NonFinite, match="as were 3 steps in a row.*--init_from"):
        loop.train(never, tmp_path / "never")


def moment(in_a_row, unread=()):
    """Where a run stands whose last steps were skipped, for `Kept`."""
    known = guard.begin(4)._replace(in_a_row=jnp.asarray(in_a_row, jnp.int32))
    level: Any = None
    return Moment(TrainState(level, jax.random.key(0), known), 9, None, unread)


def told(step, in_a_row):
    numbers = dict.fromkeys((*guard.FINITE, guard.SKIPPED), 0.0)
    return Unread(step, numbers | {"loss": NAN, guard.IN_A_ROW: in_a_row})


@pytest.mark.parametrize(
    ("before", "unread", "expected"),
    [(1, [], False), (2, [], True), (1, [2, 3], True), (1, [2, 0], False)],
    ids=str,
)
def test_a_run_gives_up_by_what_its_last_steps_were(tmp_path, before, unread, expected):
    """A good one that was not read yet counts, and so do those before a restart."""
    run: Any = config_lib.override(RUN, ["train.steps=20"])
    steps = tuple(told(10 + i, n) for i, n in enumerate(unread))
    watch: Any = types.SimpleNamespace(ended=lambda step: None)
    saves: Any = None
    kept = Kept(run, tmp_path, saves, {}, 1.0, moment(before, steps), None, watch)
    with kept:
        kept.read(leave=1)
        assert kept.gave_up() == expected


def test_what_happened_before_a_run_goes_back_is_not_forgotten(tmp_path, monkeypatch):
    """Of a run that goes back twice, to a checkpoint that knows of neither."""
    lineage = [{"event": "returned", "step": 8, "to": 3}]
    state = moment(0).state
    made: Any = types.SimpleNamespace(
        lineage=lineage,
        steps=lambda: [3, 6],
        forget_after=lambda step: None,
        tell=lambda event, step, **more: made.lineage.append((event, step, more)),
    )

    def restore(*_, **__):
        made.lineage = []
        return state, 3

    made.restore = restore
    run = config_lib.override(RUN, ["guard.returns=2", "guard.back=6"])
    now = moment(2)
    known = now.state.guard._replace(returns=jnp.asarray(1, jnp.int32))
    now = now._replace(state=now.state._replace(guard=known))
    watch: Any = None
    with Kept(run, tmp_path, made, {}, 1.0, now, 6, watch) as kept:
        kept.go_back(state)
        assert int(kept.now.state.guard.returns) == 2
    assert made.lineage == [*lineage, ("returned", 9, {"to": 3})] and kept.returned
