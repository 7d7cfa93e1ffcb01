"""Digits that must not be lost: of far positions, of logits, of forgetful gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.delta import cumulative_products
from hope_jax.models import lm
from hope_jax.models.config import ModelConfig
from hope_jax.models.layers import rotary
from hope_jax.models.mixers.attention import AttentionConfig


def score(query, key, at, back):
    """What a query at a position makes of a key so many tokens before it."""
    turned = lambda x, p: rotary(x, jnp.full((1, 1), p, jnp.int32))  # noqa: E731
    return jnp.sum(turned(query, at) * turned(key, at - back))


@pytest.mark.parametrize("at", [10_000_000, 2**31 - 1])
@pytest.mark.parametrize("back", [0, 1, 4_096])
def test_positions_are_relative_however_far(at, back):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 64))
    near, far = score(query, key, back, back), score(query, key, at, back)
    np.testing.assert_allclose(far, near, atol=2e-5)


def test_angles_are_the_papers(float64):
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8), jnp.float64)
    position = np.array([[0, 17, 100_000]])
    angle = position[:, :, None, None] * 10_000.0 ** (-np.arange(4) / 4)
    a, b = np.split(np.asarray(x), 2, axis=-1)
    made = [
        a * np.cos(angle) - b * np.sin(angle),
        a * np.sin(angle) + b * np.cos(angle),
    ]
    turned = rotary(x, jnp.asarray(position, jnp.int32))
    np.testing.assert_allclose(turned, np.concatenate(made, axis=-1), atol=1e-10)


def test_logits_of_bfloat16_models_are_float32():
    """And no float32 that holds the digits of a bfloat16."""
    config = ModelConfig(
        vocab=64, d_model=32, layers=1, mixer=AttentionConfig(), dtype="bfloat16"
    )
    with jax.numpy_dtype_promotion("standard"):  # Flax's norm mixes types
        graphdef, params = lm.build(config, jax.random.key(0))
        logits, _ = lm.apply(graphdef, params, jnp.arange(8, dtype=jnp.int32)[None])
    assert logits.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(rounded != logits)) > 0.9


@pytest.mark.parametrize("every", [3, 16, 1000])
@pytest.mark.parametrize("reset", [0.0, 1e-6])
def test_gates_keep_their_digits_behind_a_reset(every, reset):
    length = 512
    gate = np.asarray(jax.random.uniform(jax.random.key(0), (length,), minval=0.9))
    gate = np.where(np.arange(length) % every == 1, np.float32(reset), gate)
    made = np.asarray(cumulative_products(jnp.asarray(gate)), np.float64)
    exact = np.ones((length + 1, length + 1))
    for t in range(1, length + 1):
        exact[t, :t] = exact[t - 1, :t] * np.float64(gate[t - 1])
    exact = np.tril(exact)
    seen = exact > 1e-9
    assert np.max(np.abs(made[seen] / exact[seen] - 1.0)) < 5e-6
    assert np.max(made[~seen]) < 2e-9
