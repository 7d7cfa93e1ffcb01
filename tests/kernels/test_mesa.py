"""Mesa in chunks against a dense solve at every token: values and pullbacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.mesa import mesa_chunk, mesa_weights


def some_arguments(key, length, width=6, values=4, correlation=0.0, decay=True):
    ks = jax.random.split(key, 8)
    k, q = (jax.random.normal(a, (length, width)) for a in ks[:2])
    k = (1 - correlation) * k + correlation * k[:1]
    k, q = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (k, q))
    v = jax.random.normal(ks[2], (length, values))
    eta = jax.random.uniform(ks[3], (length,), minval=0.2)
    alpha = jax.random.uniform(ks[4], (length,), minval=0.3) if decay else None
    alpha = jnp.ones(length) if alpha is None else alpha
    root = jax.random.normal(ks[5], (width, width))
    g = jax.random.normal(ks[6], (values, width))
    return g, root @ root.T / width, k, v, q, eta, alpha, jnp.asarray(0.3)


def reference(g, h, k, v, q, eta, alpha, ridge):
    def step(carry, token):
        g, h = carry
        k_t, v_t, q_t, eta_t, alpha_t = token
        g = alpha_t * g + eta_t * jnp.outer(v_t, k_t)
        h = alpha_t * h + eta_t * jnp.outer(k_t, k_t)
        diagonal = jnp.diag(jnp.broadcast_to(ridge, k_t.shape))
        return (g, h), g @ jnp.linalg.solve(h + diagonal, q_t)

    (g, h), y = jax.lax.scan(step, (g, h), (k, v, q, eta, alpha))
    return g, h, y


def value_and_pullback(fn, *args):
    out, pullback = jax.vjp(fn, *args)
    wave = lambda x: jnp.cos(1.0 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)  # noqa: E731
    return out, pullback(jax.tree.map(wave, out))


def assert_same(fast, slow, *args, tolerance=1e-5):
    def close(a, b):
        scale = 1.0 + np.max(np.abs(b))
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0)

    run = lambda fn: jax.jit(functools.partial(value_and_pullback, fn))(*args)  # noqa: E731
    jax.tree.map(close, run(fast), run(slow))


@pytest.mark.parametrize(
    "length, correlation", [(1, 0.0), (3, 0.7), (16, 0.0), (16, 1.0)]
)
def test_is_the_dense_solve(key, length, correlation):
    args = some_arguments(key, length, correlation=correlation)
    assert_same(mesa_chunk, reference, *args)


def test_a_ridge_a_channel_and_vanishing_retention(key):
    args = list(some_arguments(key, 8))
    args[6] = args[6].at[3].set(0.0).at[5].set(1e-8)
    args[7] = jnp.linspace(0.1, 2.0, 6)
    assert_same(mesa_chunk, reference, *args)


def test_from_nothing_and_nothing_asked(key):
    """Zero sums and a zero query: no 0 / 0, and pullbacks as they should be."""
    args = list(some_arguments(key, 5))
    args[0], args[1] = jnp.zeros_like(args[0]), jnp.zeros_like(args[1])
    args[4] = args[4].at[2].set(0.0)
    assert_same(mesa_chunk, reference, *args)


def test_cut_anywhere_is_the_same(key):
    g, h, *tokens, ridge = some_arguments(key, 12)
    whole = mesa_chunk(g, h, *tokens, ridge)
    reads = []
    for start, stop in [(0, 1), (1, 5), (5, 12)]:
        g, h, y = mesa_chunk(g, h, *(x[start:stop] for x in tokens), ridge)
        reads.append(y)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(close, (g, h, jnp.concatenate(reads)), whole)


def test_weights_are_ridge_regression(key):
    """All rates 1, no decay: the closed form, and what the last token read."""
    _, _, k, v, q, *_ = some_arguments(key, 20)
    ones = jnp.ones(20)
    start = jnp.zeros((4, 6)), jnp.zeros((6, 6))
    g, h, y = mesa_chunk(*start, k, v, q, ones, ones, 0.5)
    closed = jnp.linalg.solve(k.T @ k + 0.5 * jnp.eye(6), k.T @ v).T
    weights = mesa_weights(g, h, 0.5)
    np.testing.assert_allclose(weights, closed, atol=1e-5)
    np.testing.assert_allclose(y[-1], weights @ q[-1], atol=1e-5)


def test_weights_pull_back_like_the_dense_solve(key):
    g, h, *_ = some_arguments(key, 1)

    def dense(g, h, ridge):
        return jnp.linalg.solve((h + ridge * jnp.eye(6)).T, g.T).T

    assert_same(mesa_weights, dense, g, h, jnp.asarray(0.3))


def test_one_token_by_hand():
    """g = 2 v k', h = 2 k k'; y = v 2 / (2 + 0.5)."""
    k, v = jnp.array([[1.0, 0.0]]), jnp.array([[5.0, -10.0]])
    zero, two, one = jnp.zeros((2, 2)), jnp.full(1, 2.0), jnp.ones(1)
    g, h, y = mesa_chunk(zero, zero, k, v, k, two, one, 0.5)
    np.testing.assert_allclose(y, [[4.0, -8.0]], rtol=1e-6)
    np.testing.assert_allclose(g, [[10.0, 0.0], [-20.0, 0.0]])
    np.testing.assert_allclose(h, [[2.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    "length, correlation, tolerance",
    [(32, 0.0, 1e-5), (256, 0.7, 2e-5), (4096, 0.7, 5e-5), (4096, 0.95, 5e-4)],
)
def test_default_iterations_are_enough(length, correlation, tolerance):
    """K = 64, ridge 0.1, no decay, every rate 1: the table of the file."""
    _, _, k, v, *_ = some_arguments(
        jax.random.key(2), length, width=64, correlation=correlation, decay=False
    )
    k64, v64 = (np.asarray(x, np.float64) for x in (k, v))
    g, h = v64.T @ k64, k64.T @ k64
    q = jax.random.normal(jax.random.key(3), (8, 64)) / 8
    exact = np.linalg.solve(h + 0.1 * np.eye(64), g.T).T @ np.asarray(q, np.float64).T

    def error(iterations):
        tokens = jnp.zeros_like(q), jnp.zeros((8, 4)), q, jnp.zeros(8), jnp.ones(8)
        sums = jnp.asarray(g, jnp.float32), jnp.asarray(h, jnp.float32)
        y = mesa_chunk(*sums, *tokens, 0.1, iterations)[2]
        return np.max(np.abs(y.T - exact)) / np.max(np.abs(exact))

    assert error(30) < tolerance
    assert error(3) > 30 * tolerance  # too few are silent and wrong


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(iterations=0), "iterations must be at least 1, got 0"),
        (dict(ridge=0.0), "ridge must be positive, got 0.0"),
        (dict(h=jnp.eye(4)), r"h must be \[K, K\] = \(6, 6\) .* got \(4, 4\)"),
    ],
    ids=str,
)
def test_bad_input(key, changes, message):
    names = "g h k v q eta alpha ridge".split()
    args = dict(zip(names, some_arguments(key, 3), strict=True))
    with pytest.raises(ValueError, match=message):
        mesa_chunk(**args | changes)
