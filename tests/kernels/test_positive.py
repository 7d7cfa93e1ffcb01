"""Inverses of positive definite matrices: those of a direct solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels import positive


def matrix(size, condition, seed=0):
    """Eigenvalues from 1 to `condition`, in no direction of an axis; float64."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return (q * np.logspace(0, np.log10(condition), size)) @ q.T


@pytest.mark.parametrize("size", [1, 5, 32, 33, 70])
def test_the_inverse_is_the_direct_one(size):
    a = matrix(size, 30.0)
    found = positive.inverse(jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.inv(a), atol=1e-5)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_quotients_are_as_exact_as_a_solvers(condition):
    """An error of a few times the condition number's share of the precision."""
    a = matrix(70, condition)
    right = np.random.default_rng(1).normal(size=(3, 70))
    found = positive.divide(*(jnp.asarray(x, jnp.float32) for x in (right, a)))
    expected = np.linalg.solve(a, right.T).T
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < 10 * condition * np.finfo(np.float32).eps + 1e-6


def test_leading_axes_are_a_batch():
    a = np.stack([matrix(6, 10.0, seed) for seed in range(4)]).reshape(2, 2, 6, 6)
    right = np.random.default_rng(1).normal(size=(2, 2, 3, 6))
    given = [jnp.asarray(x, jnp.float32) for x in (right, a)]
    found = jax.jit(positive.divide)(*given)
    np.testing.assert_allclose(found, right @ np.linalg.inv(a), atol=1e-5)


def test_refining_mends_what_the_inverse_lost():
    a = matrix(70, 1e5)
    right = np.ones((1, 70)) @ a
    given = [jnp.asarray(x, jnp.float32) for x in (right, a)]
    plain = np.abs(given[0] @ positive.inverse(given[1]) - 1).max()
    refined = np.abs(positive.divide(*given) - 1).max()
    assert refined < 0.3 * plain
