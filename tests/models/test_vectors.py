"""Blocks that read vectors: causal, alone in their row, the same in pieces."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import lm, vectors
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab=3,
    d_model=8,
    layers=2,
    heads=2,
    mixer="gated_delta_net",
    cms=CMSConfig(hidden=8),
)


@pytest.fixture(scope="module")
def model():
    return vectors.build(CONFIG, 5, jax.random.key(1))


def test_it_reads_in_pieces_what_it_reads_at_once(model, key):
    x = jax.random.normal(key, (2, 7, 5))
    whole, end = vectors.apply(*model, x)
    assert whole.shape == (2, 7, 3) and whole.dtype == jnp.float32
    state, said = None, []
    for piece in (x[:, :3], x[:, 3:4], x[:, 4:]):
        part, state = vectors.apply(*model, piece, state)
        said.append(part)
    np.testing.assert_allclose(jnp.concatenate(said, axis=1), whole, atol=1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(end), strict=True):
        assert a.shape == b.shape and a.shape[0] == 2


def test_nothing_comes_from_later_or_from_another_row(model, key):
    x = jax.random.normal(key, (2, 6, 5))
    said, _ = vectors.apply(*model, x)
    other, _ = vectors.apply(*model, x.at[0, 4].add(1.0))
    np.testing.assert_array_equal(other[1], said[1])
    np.testing.assert_allclose(other[0, :4], said[0, :4], atol=1e-6)
    assert jnp.abs(other[0, 4:] - said[0, 4:]).min() > 1e-6
    slope = jax.grad(lambda x: vectors.apply(*model, x)[0][0, -1, 0])(x)
    assert (jnp.abs(slope[0]).sum(-1) > 0).all() and (slope[1] == 0).all()


def test_its_parameters_are_those_of_the_blocks_and_two_projections():
    blocks = lm.count_parameters(CONFIG) - CONFIG.vocab * CONFIG.d_model
    own = (5 + 1) * CONFIG.d_model + (CONFIG.d_model + 1) * CONFIG.vocab
    assert vectors.count_parameters(CONFIG, 5) == blocks + own


def test_what_it_cannot_read_is_refused(model, key):
    with pytest.raises(ValueError, match=r"x must be \[B, T, 5\].* got \[1, 2, 4\]"):
        vectors.apply(*model, jnp.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match="inputs must be at least 1, got 0"):
        vectors.build(CONFIG, 0, key)
    levels = (CMSLevel(period=4), CMSLevel(period=math.inf))
    moving = dataclasses.replace(CONFIG, cms=CMSConfig(levels=levels, hidden=8))
    with pytest.raises(ValueError, match=r"periods \[4\] move by the loss of the next"):
        vectors.build(moving, 5, key)
