"""Learning in context: what is asked where, and that outer training teaches it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.data.synthetic.episodes import EpisodeConfig
from hope_jax.evaluate import in_context
from hope_jax.evaluate.in_context import InContextConfig
from hope_jax.models import vectors
from hope_jax.train.config import OptimizerConfig

CONFIG = InContextConfig(
    episode=EpisodeConfig(ways=2, shots=2, queries=2),
    size=2,
    d_model=16,
    layers=1,
    heads=2,
    hidden=16,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.0),
    batch=16,
    steps=150,
    evaluation=100,
)


def some(classes=12):
    """Eight images of every class, all near its own point."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(classes, 1, 4)) * 2
    return (points + 0.1 * rng.normal(size=(classes, 8, 4))).astype(np.float32)


def test_answers_are_counted_at_their_places(monkeypatch, key):
    """A model that always says 1, with a logit of 2."""
    rows = CONFIG.episode.batch(key, jnp.asarray(some()), 5)
    given = []

    def apply(graphdef, params, x):
        given.append(x)
        return jnp.broadcast_to(jnp.array([0.0, 2.0]), (*x.shape[:2], 2)), None

    monkeypatch.setattr(vectors, "apply", apply)
    told = in_context.counted(in_context.read(None, 2, None, rows), rows)
    labels = np.asarray(rows.labels)
    for place, at in enumerate(([4, 5], [10, 11], [12, 13])):
        right = (labels[:, at] == 1).mean(1)
        np.testing.assert_allclose(told.accuracy[:, place], right)
        one, zero = np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0))
        cost = right * one + (1 - right) * zero
        np.testing.assert_allclose(told.loss[:, place], cost, rtol=1e-5)
    (x,) = given
    np.testing.assert_array_equal(x[..., :4], rows.x)
    np.testing.assert_array_equal(jnp.argmax(x[..., 4:], -1), rows.told)


def test_only_what_is_in_the_loss_is_learned_and_seeds_are_pure():
    """Attention answers new classes after training, and recalls task 1 if asked to."""
    model = in_context.model_for(CONFIG, "attention")
    images = some(40)
    params, made = in_context.train(CONFIG, model, 0, images[:30], backward=True)
    found = in_context.score(CONFIG, model, params, 0, {"new": images[30:]})["new"]
    assert found.accuracy.shape == (100, 3) and (found.accuracy.mean(0) > 0.8).all()
    assert made["task 1"] < 0.5 and made["task 1 after task 2"] < 0.5
    few = dataclasses.replace(CONFIG, steps=3)
    with_, without, again = (
        in_context.train(few, model, 0, images, backward=backward)[0]
        for backward in (True, False, False)
    )
    jax.tree.map(np.testing.assert_array_equal, without, again)
    differ = jax.tree.map(lambda a, b: bool((a != b).any()), with_, without)
    assert any(jax.tree.leaves(differ))


def test_every_step_reads_rows_of_its_own(monkeypatch):
    seen, batch = [], EpisodeConfig.batch

    def told(self, key, images, rows):
        jax.debug.callback(lambda k: seen.append(k.tobytes()), jax.random.key_data(key))
        return batch(self, key, images, rows)

    monkeypatch.setattr(EpisodeConfig, "batch", told)
    steps = in_context._STRIDE + 2  # of which two are of a second call
    config = dataclasses.replace(CONFIG, steps=steps, batch=2)
    model = in_context.model_for(config, "attention")
    in_context.train(config, model, 0, some(), backward=True)
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == steps


def test_the_nearest_shot_of_the_task_that_is_asked_answers(key):
    """Of images that name their class, and both tasks share the labels."""
    config = EpisodeConfig(ways=3, shots=2, queries=4)
    images = jnp.broadcast_to(jnp.eye(9)[:, None], (9, 10, 9))
    rows = config.batch(key, images, 20)
    said = in_context.nearest(3, None, rows)
    told = in_context.counted(said, rows)
    assert (told.accuracy == 1.0).all()
    # All of the other task stands nearer: it is not looked at.
    moved = rows._replace(x=rows.x.at[:, 10:16].set(rows.x[:, 6:7]))
    told = in_context.counted(in_context.nearest(3, None, moved), moved)
    assert (told.accuracy[:, [0, 2]] == 1.0).all()


def test_images_have_one_scale_and_may_be_turned():
    made = in_context.characters("digits", "test", 6, turned=True)
    assert made.shape[::2] == (40, 36) and made.dtype == np.float32
    np.testing.assert_allclose(made.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(made.std(-1), 1.0, atol=1e-4)
    upright, quarter = (a.reshape(10, -1, 6, 6) for a in (made[:10], made[10:20]))
    np.testing.assert_allclose(np.rot90(upright[3, 2]), quarter[3, 2], atol=1e-6)


def test_a_model_that_diverges_says_when():
    model = in_context.model_for(CONFIG, "attention")
    with pytest.raises(FloatingPointError, match="attention diverged by step 20"):
        in_context.train(CONFIG, model, 0, some() * np.nan, backward=True)
