"""Noise has the size that it is said to have, and a network learns in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.data.synthetic.noise import Noise, draw, replace_labels
from hope_jax.evaluate import noise


@pytest.fixture(autouse=True)
def _as_a_program():
    """Optax raises floats to whole powers, which our tests' strict types forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_replaced_labels_are_of_other_classes(key):
    y = jnp.arange(10_000, dtype=jnp.int32) % 10
    found = replace_labels(y, 0.2, key)
    changed = np.asarray(found != y)
    assert abs(changed.mean() - 0.2) < 0.012
    assert found.min() == 0 and found.max() == 9
    shift = np.bincount(np.asarray(found - y)[changed] % 10, minlength=10)
    assert shift[0] == 0 and shift[1:].min() > 0.8 * shift[1:].mean()


def test_noise_has_the_size_and_tails_it_is_said_to_have(key):
    keys = jax.random.split(key, 400)
    like = {"a": jnp.zeros((7, 3)), "b": jnp.zeros(4)}
    some = jax.jit(jax.vmap(draw, (None, None, 0)))

    def drawn(**amounts):
        found = some(
            Noise(**{k: jnp.float32(v) for k, v in amounts.items()}), like, keys
        )
        return np.concatenate([found["a"].reshape(400, -1), found["b"]], axis=1)

    none = dict(labels=0.0, gaussian=0.0, student=0.0, spikes=0.0)
    assert np.all(drawn(**none) == 0)
    np.testing.assert_allclose(drawn(**none | {"gaussian": 3.0}).std(), 3.0, rtol=0.05)
    student = np.abs(drawn(**none | {"student": 2.0}))
    np.testing.assert_allclose(np.median(student), 2 * 0.8165, rtol=0.05)
    np.testing.assert_allclose(np.quantile(student, 0.95), 2 * 4.303, rtol=0.1)
    spikes = drawn(**none | {"spikes": 50.0})
    struck = np.any(spikes != 0, axis=1)
    assert 1 <= struck.sum() <= 20  # of 400 steps 8, and then every number
    assert np.all(spikes[struck] != 0)
    np.testing.assert_allclose(spikes[struck].std(), 50.0, rtol=0.3)


def test_training_learns_and_what_diverges_counts_as_such(key):
    digits = noise.load()
    counts = {split: len(part.y) for split, part in digits.items()}
    assert sum(counts.values()) == 1797 and counts["train"] > 1000
    sizes = {"hidden": 16, "steps": 60, "batch": 32}

    @jax.jit
    def scores(rate, labels, spikes):
        given = Noise(labels=labels, spikes=spikes)
        return noise.train(optax.sgd(rate), digits, given, key, **sizes)

    clean = scores(0.3, 0.0, 0.0)
    assert clean.loss < 1.0 and clean.accuracy > 0.7
    assert abs(clean.validation - clean.loss) < 0.3
    assert scores(0.3, 0.5, 0.0).loss > clean.loss + 0.2
    assert scores(0.3, 0.0, 300.0).loss > clean.loss + 0.2
    for wild in (3e3, 1e30):
        assert scores(wild, 0.0, 300.0).loss == noise.DIVERGED
