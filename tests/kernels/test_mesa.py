"""Mesa in chunks against a dense solve at every token: values and pullbacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.mesa import mesa_chunk, mesa_weights


def some_arguments(length, width=6, values=4, correlation=0.0, decay=True, seed=0):
    rng = np.random.default_rng(seed)
    k, q = rng.normal(size=(2, length, width))
    k = (1 - correlation) * k + correlation * k[:1]
    k, q = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (k, q))
    v = rng.normal(size=(length, values))
    eta = rng.uniform(0.2, 1.0, length)
    alpha = rng.uniform(0.3, 1.0, length) if decay else np.ones(length)
    root = rng.normal(size=(width, width))
    g = rng.normal(size=(values, width))
    arguments = g, root @ root.T / width, k, v, q, eta, alpha, 0.3
    return tuple(map(jnp.float32, arguments))


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
    wave = lambda x: np.cos(1 + np.arange(x.size, dtype=x.dtype)).reshape(x.shape)  # noqa: E731
    return out, pullback(jax.tree.map(wave, out))


def assert_same(fast, slow, *args, tolerance=1e-5):
    def close(a, b):
        scale = 1.0 + np.max(np.abs(b))
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0)

    both = jax.jit(lambda *args: [value_and_pullback(f, *args) for f in (fast, slow)])
    jax.tree.map(close, *jax.device_get(both(*args)))


@pytest.mark.parametrize(
    "length, correlation", [(1, 0.0), (3, 0.7), (16, 0.0), (16, 1.0)]
)
def test_is_the_dense_solve(length, correlation):
    args = some_arguments(length, correlation=correlation)
    assert_same(mesa_chunk, reference, *args)


def test_a_ridge_a_channel_and_vanishing_retention():
    args = list(some_arguments(8))
    args[6] = np.array(args[6])
    args[6][3], args[6][5] = 0.0, 1e-8
    args[7] = np.linspace(0.1, 2.0, 6, dtype=np.float32)
    assert_same(mesa_chunk, reference, *args)


def test_from_nothing_and_nothing_asked():
    """Zero sums and a zero query: no 0 / 0, and pullbacks as they should be."""
    args = list(some_arguments(5))
    args[0], args[1] = np.zeros_like(args[0]), np.zeros_like(args[1])
    args[4] = np.array(args[4])
    args[4][2] = 0.0
    assert_same(mesa_chunk, reference, *args)


def test_cut_anywhere_is_the_same():
    g, h, *tokens, ridge = some_arguments(12)

    @jax.jit
    def both(g, h, tokens):
        whole = mesa_chunk(g, h, *tokens, ridge)
        reads = []
        for start, stop in [(0, 1), (1, 5), (5, 12)]:
            g, h, y = mesa_chunk(g, h, *(x[start:stop] for x in tokens), ridge)
            reads.append(y)
        return (g, h, jnp.concatenate(reads)), whole

    close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(close, *both(g, h, tokens))


def test_weights_are_ridge_regression():
    """All rates 1, no decay: the closed form, and what the last token read."""
    _, _, k, v, q, *_ = some_arguments(20)
    ones = np.ones(20, np.float32)
    start = np.zeros((4, 6), np.float32), np.zeros((6, 6), np.float32)

    @jax.jit
    def lived(*args):
        g, h, y = mesa_chunk(*args, 0.5)
        return mesa_weights(g, h, 0.5), y

    weights, y = jax.device_get(lived(*start, k, v, q, ones, ones))
    k, v, q = (np.asarray(x) for x in (k, v, q))
    closed = np.linalg.solve(k.T @ k + 0.5 * np.eye(6), k.T @ v).T
    np.testing.assert_allclose(weights, closed, atol=1e-5)
    np.testing.assert_allclose(y[-1], weights @ q[-1], atol=1e-5)


def test_weights_pull_back_like_the_dense_solve():
    g, h, *_ = some_arguments(1)

    def dense(g, h, ridge):
        return jnp.linalg.solve((h + ridge * jnp.eye(6)).T, g.T).T

    assert_same(mesa_weights, dense, g, h, jnp.asarray(0.3))


def test_one_token_by_hand():
    """g = 2 v k', h = 2 k k'; y = v 2 / (2 + 0.5)."""
    k, v = jnp.array([[1.0, 0.0]]), jnp.array([[5.0, -10.0]])
    zero, two, one = jnp.zeros((2, 2)), jnp.full(1, 2.0), jnp.ones(1)
    chunk = jax.jit(functools.partial(mesa_chunk, ridge=0.5))
    g, h, y = chunk(zero, zero, k, v, k, two, one)
    np.testing.assert_allclose(y, [[4.0, -8.0]], rtol=1e-6)
    np.testing.assert_allclose(g, [[10.0, 0.0], [-20.0, 0.0]])
    np.testing.assert_allclose(h, [[2.0, 0.0], [0.0, 0.0]])


@functools.cache
def chunk_of_64(iterations):
    return jax.jit(lambda *args: mesa_chunk(*args, 0.1, iterations))


@pytest.mark.parametrize(
    "length, correlation, tolerance",
    [(32, 0.0, 1e-5), (256, 0.7, 2e-5), (4096, 0.7, 5e-5), (4096, 0.95, 5e-4)],
)
def test_default_iterations_are_enough(length, correlation, tolerance):
    """K = 64, ridge 0.1, no decay, every rate 1: the table of the file."""
    _, _, k, v, *_ = some_arguments(
        length, width=64, correlation=correlation, decay=False, seed=2
    )
    k64, v64 = (np.asarray(x, np.float64) for x in (k, v))
    g, h = v64.T @ k64, k64.T @ k64
    q = np.float32(np.random.default_rng(3).normal(size=(8, 64)) / 8)
    exact = np.linalg.solve(h + 0.1 * np.eye(64), g.T).T @ np.asarray(q, np.float64).T

    zeros, one = np.zeros((8, 4), np.float32), np.ones(8, np.float32)

    def error(iterations):
        tokens = np.zeros_like(q), zeros, q, zeros[:, 0], one
        sums = np.float32(g), np.float32(h)
        y = chunk_of_64(iterations)(*sums, *tokens)[2]
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
def test_bad_input(changes, message):
    names = "g h k v q eta alpha ridge".split()
    args = dict(zip(names, some_arguments(3), strict=True))
    with pytest.raises(ValueError, match=message):
        mesa_chunk(**args | changes)
