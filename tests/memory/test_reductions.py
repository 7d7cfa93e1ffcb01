"""Named memories that are one another: what the papers say of them, as numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.select import memory_scan
from hope_jax.memory import named
from hope_jax.memory.compose import MemoryConfig, Tokens, build_architecture
from hope_jax.memory.features import coefficients, features
from hope_jax.memory.state import begin_memory

T, WIDTH = 7, 4


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def tokens(key):
    keys = jax.random.split(key, 5)
    k, v, q = (jax.random.normal(key, (T, WIDTH)) for key in keys[:3])
    eta, alpha = (jax.random.uniform(key, (T,)) for key in keys[3:])
    return Tokens(unit(k), v, unit(q), eta, 0.5 + 0.5 * alpha, 0.5 * jnp.ones(T))


@pytest.fixture
def start(key):
    return {"w": jax.random.normal(key, (WIDTH, WIDTH))}


def reads(config, start, tokens):
    state, y = memory_scan(config, begin_memory(config, start), tokens)
    return y, state.weights


def point(name, **changes):
    return dataclasses.replace(named.get(name).memory, **changes)


def same(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance),
        a,
        b,
    )


def linear_titans(**changes):
    """Without momentum and with a matrix, as section 5.2 of Titans reduces it."""
    return point("titans", architecture="linear", rule="gd", **changes)


def test_titans_without_momentum_is_a_gated_delta_net(tokens, start):
    anchored = reads(linear_titans(chunk=1), start, tokens)
    exact = reads(linear_titans(gradient="exact", chunk=3), start, tokens)
    same(anchored, exact)
    # Titans errs against Mₜ₋₁ where Gated DeltaNet errs against αₜ Mₜ₋₁.
    gated = tokens._replace(erase_rate=tokens.eta / tokens.alpha)
    same(exact, reads(point("gated_delta_net", chunk=3), start, gated))
    kept = tokens._replace(alpha=jnp.ones(T))
    for name in ("gated_delta_net", "delta_net"):
        same(
            reads(linear_titans(gradient="exact"), start, kept),
            reads(point(name), start, kept),
        )


def test_dgd_on_the_dot_product_is_the_gated_delta_rule(tokens, start):
    """Equation 92 of arXiv:2512.24695."""
    config = MemoryConfig(
        architecture="linear", bias="dot", rule="gd", dgd="both", gradient="exact"
    )
    m, out = np.asarray(start["w"]), []
    k, v, q, eta, alpha = map(np.asarray, tokens[:5])
    for t in range(T):
        m = m @ (alpha[t] * np.eye(WIDTH) - eta[t] * np.outer(k[t], k[t]))
        m = m + eta[t] * np.outer(v[t], k[t])
        out.append(m @ q[t])
    same(reads(config, start, tokens), (np.stack(out), {"w": m}))


def test_longhorn_is_the_proximal_delta_rule(tokens, start):
    """It lands where `½‖M k − v‖² + ‖M − Mₜ₋₁‖² / 2η` has no slope."""
    tokens = jax.tree.map(lambda x: x[:1], tokens._replace(k=2.0 * tokens.k))
    _, end = reads(point("longhorn"), start, tokens)
    k, v, eta = tokens.k[0], tokens.v[0], tokens.eta[0]

    def objective(m):
        error = m @ k - v
        moved = m - start["w"]
        return 0.5 * jnp.vdot(error, error) + 0.5 * jnp.vdot(moved, moved) / eta

    same(jax.grad(objective)(end["w"]), jnp.zeros((WIDTH, WIDTH)), 1e-4)


def test_ttt_linear_over_one_chunk_is_linear_attention(tokens):
    """From zero, all gradients at the start, without the norm around the matrix."""
    ttt = point("ttt_linear", chunk=T, norm=False)
    zero = {"w": jnp.zeros((WIDTH, WIDTH))}
    linear = point("linear_attention", features="none")
    same(reads(ttt, zero, tokens), reads(linear, zero, tokens))


def test_the_omega_rule_over_one_token_is_the_delta_rule(tokens, start):
    omega = point(
        "omega_net", architecture="linear", norm=False, features="none", window=1
    )
    omega = dataclasses.replace(omega, retention="none", chunk=1)
    same(reads(omega, start, tokens), reads(point("delta_net"), start, tokens))


def test_an_omega_window_that_weighs_one_token_is_that_token(key, tokens):
    window = point("omega_net", features="none")
    start = build_architecture(window, WIDTH).init(key)
    own = tokens._replace(weights=jnp.eye(4)[:1].repeat(T, 0))
    alone = dataclasses.replace(window, window=1)
    same(reads(window, start, own), reads(alone, start, tokens))
    last = tokens._replace(weights=jnp.eye(4)[1:2].repeat(T, 0))
    before = jax.tree.map(
        lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]),
        tokens._replace(q=tokens.q),
    )
    late = before._replace(q=tokens.q, alpha=tokens.alpha, eta=tokens.eta)
    same(reads(window, start, last), reads(alone, start, late))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_feature_map_of_atlas_is_the_exponential(tokens, order):
    """`φ(q)·φ(k)` is the Taylor series of exp(q·k), cut off after `order`."""
    start = coefficients("polynomial", order)
    q, k = (features("polynomial", order, x, start) for x in (tokens.q, tokens.k))
    product = jnp.sum(tokens.q * tokens.k, axis=-1)
    taylor = sum(product**i / math.factorial(i) for i in range(order + 1))
    same(jnp.sum(q * k, axis=-1), taylor)
    # Lagrange: the rest is at most e / (order + 1)! for |q·k| <= 1.
    rest = np.max(np.abs(taylor - jnp.exp(product)))
    assert rest < math.e / math.factorial(order + 1)


def test_memora_stays_on_its_simplex(key, tokens):
    config = point("memora", chunk=3, expansion=2)
    start = build_architecture(config, WIDTH).init(key)
    _, weights = reads(config, start, tokens)
    for name, w in weights.items():
        assert np.all(w > 0), name
        same(np.sum(w, axis=-1), np.ones(len(w)))


def test_retnet_is_a_constant_decay(tokens):
    """`yₜ = Σᵢ γ^(t−i) (qₜ·kᵢ) vᵢ`."""
    gamma = 0.9
    tokens = tokens._replace(alpha=gamma * jnp.ones(T), eta=jnp.ones(T))
    y, _ = reads(point("retnet", chunk=3), {"w": jnp.zeros((WIDTH, WIDTH))}, tokens)
    k, v, q = map(np.asarray, tokens[:3])
    age = np.subtract.outer(np.arange(T), np.arange(T))
    weights = np.where(age >= 0, gamma ** np.maximum(age, 0), 0.0)
    same(y, (weights * (q @ k.T)) @ v)


def test_mesa_is_ridge_regression(tokens):
    """Without decay: `argmin Σ ηᵢ ‖M kᵢ − vᵢ‖² + λ ‖M‖²`, solved anew at the end."""
    ridge = 0.3
    config = point("mesa", retention="none", ridge=ridge, chunk=3)
    y, weights = reads(config, {"w": jnp.zeros((WIDTH, WIDTH))}, tokens)
    k, v, q, eta = map(np.asarray, tokens[:4])
    lhs = (k.T * eta) @ k + ridge * np.eye(WIDTH)
    best = np.linalg.solve(lhs, (k.T * eta) @ v).T
    same(weights["w"], best, 1e-4)
    same(y[-1], best @ q[-1], 1e-4)


def test_delta_product_is_two_delta_steps(tokens, start):
    pair = lambda x: jnp.stack([x, jnp.roll(x, 1, 0)], axis=1)  # noqa: E731
    double = tokens._replace(k=pair(tokens.k), v=pair(tokens.v), eta=pair(tokens.eta))
    y, end = reads(point("delta_product"), start, double)
    flat = lambda x: x.reshape(2 * T, *x.shape[2:])  # noqa: E731
    alpha = jnp.stack([tokens.alpha, jnp.ones(T)], axis=1)
    single = Tokens(
        flat(double.k),
        flat(double.v),
        jnp.repeat(tokens.q, 2, 0),
        flat(double.eta),
        flat(alpha),
        jnp.zeros(2 * T),
    )
    expected, gated_end = reads(point("gated_delta_net"), start, single)
    same((y, end), (expected[1::2], gated_end))


def test_channel_decay_with_one_rate_is_scalar_decay(tokens, start):
    wide = tokens._replace(alpha=jnp.broadcast_to(tokens.alpha[:, None], (T, WIDTH)))
    for channel, scalar in (("kda", "gated_delta_net"), ("gla", "mamba2")):
        same(reads(point(channel), start, wide), reads(point(scalar), start, tokens))


def test_rwkv7_with_its_write_key_is_the_gated_delta_rule(tokens, start):
    """`a` one rate for all channels, the removal key the write key."""
    wide = tokens._replace(
        alpha=jnp.broadcast_to(tokens.alpha[:, None], (T, WIDTH)),
        erase_key=tokens.k,
        erase_rate=jnp.broadcast_to(tokens.eta[:, None], (T, WIDTH)),
    )
    gated = tokens._replace(erase_rate=tokens.eta)
    same(reads(point("rwkv7"), start, wide), reads(point("comba"), start, gated))


def test_swla_sums_hebbian_writes(tokens, start):
    """Each token writes its own pair and those of the three before it."""
    y, _ = reads(point("swla", chunk=3), start, tokens)
    k, v, q, eta, alpha = map(np.asarray, tokens[:5])
    m = np.asarray(start["w"])
    for t in range(T):
        m = alpha[t] * m
        for i in range(max(0, t - 3), t + 1):
            m = m + eta[t] * np.outer(v[i], k[i])
        same(y[t], m @ q[t])
