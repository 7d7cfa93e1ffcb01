"""The blocked inverse against the dense one, on easy and on hard systems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.triangular import unit_lower_inverse


def strictly_lower(key, size, batch=()):
    return jnp.tril(jax.random.normal(key, (*batch, size, size)), -1) * 0.5


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 33, 64])
def test_is_the_inverse(key, size):
    a = strictly_lower(key, size, (3,)) / size**0.5
    x = unit_lower_inverse(a)
    eye = jnp.broadcast_to(jnp.eye(size), x.shape)
    np.testing.assert_allclose(x @ (eye + a), eye, atol=2e-5)
    assert jnp.all(jnp.triu(x, 1) == 0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_identical_keys(rate):
    """A chunk that repeats one key: the doubling series loses every digit here."""
    size = 64
    a = rate * jnp.tril(jnp.ones((size, size)), -1)
    x = unit_lower_inverse(a)
    exact = np.linalg.inv(np.eye(size) + np.asarray(a, np.float64))
    np.testing.assert_allclose(x, exact, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_derivatives(float64, size):
    a = strictly_lower(jax.random.key(1), size).astype(jnp.float64)
    exact = lambda a: jnp.linalg.inv(jnp.eye(size) + jnp.tril(a, -1))  # noqa: E731
    loss = lambda f: lambda a: jnp.sum(jnp.sin(f(a)))  # noqa: E731
    np.testing.assert_allclose(
        jax.grad(loss(unit_lower_inverse))(a), jax.grad(loss(exact))(a), atol=1e-10
    )
    second = lambda f: jax.grad(lambda a: jnp.sum(jax.grad(loss(f))(a) ** 2))(a)  # noqa: E731
    np.testing.assert_allclose(second(unit_lower_inverse), second(exact), atol=1e-9)
