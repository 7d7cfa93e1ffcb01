"""Learning task after task: numbers by hand, and what keeps what was learned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.data.synthetic import incremental as tasks
from hope_jax.evaluate import incremental, noise
from hope_jax.evaluate.incremental import Lesson, Life


@pytest.fixture(autouse=True)
def _as_a_program():
    """Optax raises floats to whole powers, which our tests' strict types forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_measures_by_hand():
    accuracy = np.array(
        [
            [[0.3, 0.0, 0.0], [0.8, 0.1, 0.0]],  # while task 1 is learned, and after it
            [[0.4, 0.6, 0.0], [0.9, 0.7, 0.2]],
            [[0.5, 0.2, 0.8], [0.6, 0.5, 1.0]],
        ]
    )
    found = incremental.measures(Life(accuracy[None], np.zeros((1, 3, 4))))
    expected = {
        "acc": (0.6 + 0.5 + 1.0) / 3,
        "aia": (0.8 + (0.9 + 0.7) / 2 + 0.7) / 3,
        "learned": (0.8 + 0.7 + 1.0) / 3,
        "bwt": ((0.6 - 0.8) + (0.5 - 0.7)) / 2,
        "forgotten": ((0.9 - 0.6) + (0.7 - 0.5)) / 2,  # its best came after its end
        "least": (0.4 + 0.2) / 2,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], [value], rtol=1e-9, err_msg=name)


def test_what_gets_better_later_is_forgotten_less_than_nothing():
    points = np.array([[[0.5, 0.0]], [[0.9, 0.7]]])  # two tasks, one point in each
    found = incremental.measures(Life(points, np.zeros((2, 4))))
    assert found["forgotten"] == pytest.approx(0.5 - 0.9) == -found["bwt"]


def test_arrival_by_hand():
    losses = np.array([[4.0, 1.0, 2.0, 0.0, 5.0], [3.0] * 5, [1.0, np.nan, 1, 1, 1]])
    steps = incremental.arrival(Life(np.zeros((3, 1, 3)), losses), 1.5, window=2)
    assert steps.tolist() == [3.0, 5.0, 4.0]


def test_the_importance_of_a_bias_by_hand(key):
    params = noise.begin(4, key)
    params["out"] = jax.tree.map(jnp.zeros_like, params["out"])  # all are as likely
    shown = jnp.arange(10) < 2
    found = incremental.importance(params, jnp.ones((5, 64)), shown, key)
    expected = [0.25, 0.25] + [0.0] * 8  # (1/2 - 1)² and (1/2)²
    np.testing.assert_allclose(found["out"]["bias"], expected, atol=1e-6)


def test_only_classes_that_were_shown_compete(key):
    params = noise.begin(4, key)
    params["out"]["kernel"] = jnp.zeros((4, 10))
    params["out"]["bias"] = jnp.arange(10.0)  # says 9, or the last that was shown
    y = jnp.array([0, 1, 2, 3, 3, -1], jnp.int32)
    held = noise.Digits(jnp.ones((6, 64)), y)
    stream = tasks.Stream(
        jnp.tile(jnp.arange(64, dtype=jnp.int32), (2, 1)),
        jnp.array([[0, 1], [2, 3]], jnp.int32),
        *(jnp.zeros(shape, jnp.int32) for shape in ((2, 2, 1), (2, 2))),
    )
    shown = tasks.seen(stream, 10)
    given = [incremental.accuracies(params, held, stream, row) for row in shown]
    np.testing.assert_allclose(given, [[0.5, 0.0], [0.0, 2 / 3]], rtol=1e-6)


LESSON = Lesson(hidden=16, steps=60, batch=16, points=2)


@pytest.fixture(scope="module")
def life():
    digits = noise.load()
    of = tasks.pool(*digits["train"], 10)

    def run(make=tasks.split, strength=0.0, **changes):
        lesson = dataclasses.replace(LESSON, **changes)

        @jax.jit
        def live(key, strength):
            stream = make(of, 2, key)
            rule, held = optax.adam(0.01), digits["valid"]
            return incremental.live(
                rule, of, held, stream, key, lesson, strength=strength
            )

        return live(jax.random.key(0), strength)

    return run


def test_tasks_are_forgotten_and_replay_and_joint_training_keep_them(life):
    lives = {"alone": life(), "replay": life(replay=20), "joint": life(joint=True)}
    found = {name: incremental.measures(one) for name, one in lives.items()}
    assert found["alone"]["learned"] > 0.85 and found["alone"]["forgotten"] > 0.4
    assert found["replay"]["forgotten"] < found["alone"]["forgotten"] - 0.2
    assert found["joint"]["acc"] > found["alone"]["acc"] + 0.2
    assert lives["alone"].accuracy.shape == (2, 2, 2)
    assert lives["alone"].losses.shape == (2, 60)


def test_what_is_replayed_is_of_the_past(monkeypatch):
    seen, draw = [], tasks.draw

    def told(of, stream, which, key):
        if stream.rows.shape[-1] == 3:  # of what is kept
            jax.debug.callback(lambda w: seen.append(int(w.max())), which)
        return draw(of, stream, which, key)

    monkeypatch.setattr(tasks, "draw", told)
    digits = noise.load()
    of = tasks.pool(*digits["train"], 10)
    stream = tasks.split(of, 5, jax.random.key(0))
    lesson = dataclasses.replace(LESSON, steps=4, replay=3)
    given = optax.sgd(0.1), of, digits["valid"], stream, jax.random.key(0), lesson
    jax.jit(lambda: incremental.live(*given))()
    jax.effects_barrier()
    assert len(seen) == 5 * 4 and max(seen) == 3  # never the last of five, or own


def test_weights_that_mattered_are_held(life):
    """Where classes are shared: those of later tasks mattered to no earlier one."""
    free = life(tasks.permuted)
    held = life(tasks.permuted, 100.0, consolidate=True)
    np.testing.assert_array_equal(held.losses[0], free.losses[0])  # nothing to hold yet
    free, held = map(incremental.measures, (free, held))
    assert held["forgotten"] < free["forgotten"] - 0.1, (held, free)


def test_lessons_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match=r"points \(7\) must divide steps \(60\)"):
        dataclasses.replace(LESSON, points=7)
