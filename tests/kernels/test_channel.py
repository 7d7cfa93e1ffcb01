"""Chunks with a retention a key channel equal the token recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.channel import channel_chunk

K, V = 5, 4


def some_arguments(length, correlation=0.0, alpha="mixed"):
    """Arguments of `channel_chunk`; the delta term is r = 0.6 k beside another p."""
    rng = np.random.default_rng(0)
    k, q, p = rng.normal(size=(3, length, K))
    k = (1 - correlation) * k + correlation * k[:1]
    k, q, p = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (k, q, p))
    p = 0.7 * k + 0.3 * p
    w = rng.normal(size=(length, V))
    strength = rng.uniform(size=(length, K))
    strong = np.full((length, K), 1e-8)
    strong[1::3] = 1.0
    retained = {
        "mixed": 10.0 ** (-8 * strength**4),
        "strong": strong,
        "none": np.ones((length, K)),
        "zero": np.where(strength < 0.2, 0.0, strength),
    }
    m = rng.normal(size=(V, K))
    return tuple(map(jnp.float32, (m, k, w, q, retained[alpha], 0.6 * k, p)))


def recurrence(m, k, w, q, alpha, r=None, p=None, before_write=False):
    delta = r is not None
    r, p = (r if delta else jnp.zeros_like(k)), (k if p is None else p)

    def step(m, token):
        k_t, w_t, q_t, a_t, r_t, p_t = token
        after = m * a_t[None, :] - jnp.outer(m @ r_t, p_t) + jnp.outer(w_t, k_t)
        return after, (m if before_write else after) @ q_t

    return jax.lax.scan(step, m, (k, w, q, alpha, r, p))


def value_and_pullback(fn, *args):
    out, pullback = jax.vjp(fn, *args)
    wave = lambda x: np.cos(1 + np.arange(x.size, dtype=x.dtype)).reshape(x.shape)  # noqa: E731
    return out, pullback(jax.tree.map(wave, out))


def assert_same(*args, before_write=False, tolerance=1e-5):
    def close(a, b):
        scale = 1.0 + np.max(np.abs(b))
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0)

    @jax.jit
    def both(*args):
        forms = channel_chunk, recurrence
        forms = [functools.partial(fn, before_write=before_write) for fn in forms]
        return [value_and_pullback(fn, *args) for fn in forms]

    jax.tree.map(close, *jax.device_get(both(*args)))


@pytest.mark.parametrize(
    "length, before_write",
    [(1, False), (1, True), (3, True), (16, False), (16, True), (32, False)],
)
def test_is_the_recurrence(length, before_write):
    assert_same(*some_arguments(length), before_write=before_write)


def test_a_chunk_of_larger_pieces():
    assert_same(*some_arguments(41))


@pytest.mark.parametrize("alpha", ["strong", "none", "zero"])
def test_any_retention(alpha):
    assert_same(*some_arguments(19, alpha=alpha))


@pytest.mark.parametrize("correlation", [0.95, 1.0])
def test_correlated_and_identical_keys(correlation):
    assert_same(*some_arguments(16, correlation, alpha="none"))


@pytest.mark.parametrize("before_write", [False, True])
def test_no_delta_term(before_write):
    args = some_arguments(9)[:5]
    assert_same(*args, before_write=before_write)


def test_erasing_at_the_key():
    *args, _ = some_arguments(9)
    assert_same(*args)
    same, given = jax.jit(
        lambda *args: (channel_chunk(*args), channel_chunk(*args, args[1]))
    )(*args)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, same, given)


def test_long_decay_keeps_its_digits():
    """After much has decayed, log-sums would be large and their differences rough."""
    m, k, w, q, alpha, r, p = some_arguments(32, alpha="none")
    alpha = np.array(alpha)
    alpha[:24] = 1e-8
    both = jax.jit(lambda *args: (channel_chunk(*args)[1], recurrence(*args)[1]))
    found, expected = both(m, k, w, q, alpha, r, p)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_one_channel_a_retention_by_hand():
    """M2 = (M0 a1 + w1 k1') a2 + w2 k2', channel by channel."""
    m, k = jnp.array([[8.0, 8.0]]), jnp.eye(2)
    alpha = jnp.array([[0.5, 1.0], [0.5, 0.25]])
    w = jnp.array([[2.0], [3.0]])
    end, y = jax.jit(channel_chunk)(m, k, w, jnp.ones((2, 2)), alpha)
    np.testing.assert_allclose(end, [[3.0, 5.0]])
    np.testing.assert_allclose(y, [[14.0], [8.0]])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(r=None), "p is where the delta term erases: give r too"),
        (dict(alpha=jnp.ones((3, 2))), r"alpha must have shape \(3, 5\) .*\(3, 2\)"),
        (dict(w=jnp.ones((3, 2))), r"m must have shape \(2, 5\) .* got \(4, 5\)"),
        (dict(k=jnp.ones((0, 5))), "k has no tokens"),
    ],
    ids=str,
)
def test_bad_input(changes, message):
    names = "m k w q alpha r p".split()
    args = dict(zip(names, some_arguments(3), strict=True))
    with pytest.raises(ValueError, match=message):
        channel_chunk(**args | changes)
