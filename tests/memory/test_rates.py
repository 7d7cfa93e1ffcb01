"""The laws of rates by hand, in NumPy: kernels and levels share `memory.rates`."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.select import memory_scan
from hope_jax.memory import rates
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_architecture,
    with_choices,
)
from hope_jax.memory.state import begin_memory

WIDTH, CHUNK, ETA, ALPHA, THETA = 4, 8, 0.6, 0.9, 0.25


def met(config):
    weights = build_architecture(config, WIDTH).init(jax.random.key(0))
    weights = {n: 2.0 * w for n, w in weights.items()}
    k, v = jax.random.normal(jax.random.key(1), (2, WIDTH))
    function = build_architecture(config, WIDTH)
    found = rates.meet(function, weights, k, lambda output: output - v)
    token = types.SimpleNamespace(
        eta=jnp.float32(ETA), alpha=jnp.float32(ALPHA), theta=jnp.float32(THETA)
    )
    steps = rates.steps(config, token, found)
    as_numpy = {n: np.asarray(w, np.float64) for n, w in weights.items()}
    steps = {n: float(s) for n, s in steps.items()}
    return steps, found, as_numpy, np.asarray(k, np.float64), np.asarray(v, np.float64)


def by_hand(weights, k, v):
    """Energies, gains and errors of `k + W1 tanh(W2 k)`."""
    h = np.tanh(weights["w2"] @ k)
    way = weights["w1"] * (1.0 - h**2)
    error = k + weights["w1"] @ h - v
    gain = {"w1": 1.0, "w2": np.sum(way**2)}
    return {"w1": h @ h, "w2": k @ k}, gain, {"w1": error, "w2": way.T @ error}


def configured(**choices):
    plain = MemoryConfig(
        rule="gd", dgd="none", activation="tanh", expansion=2, chunk=CHUNK
    )
    return with_choices(plain, **choices)


def test_what_a_token_meets():
    _, found, weights, k, v = met(configured(rate_law="energy"))
    energy, gain, error = by_hand(weights, k, v)
    for name in energy:
        x = np.asarray(found.inputs[name])
        np.testing.assert_allclose(x @ x, energy[name], rtol=1e-5)
        np.testing.assert_allclose(found.gains[name], gain[name], rtol=1e-5)
        np.testing.assert_allclose(
            found.errors[name], error[name], rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(found.skip, k, rtol=1e-6)


@pytest.mark.parametrize("rule, still", [("gd", 1.0), ("momentum", 1.0 - THETA)])
def test_energy(rule, still):
    steps, _, weights, k, v = met(configured(rate_law="energy", rule=rule))
    energy, gain, _ = by_hand(weights, k, v)
    for name, step in steps.items():
        longest = max(1.0, 2.0 * energy[name] * gain[name])
        np.testing.assert_allclose(step, still * ETA / (CHUNK * longest), rtol=1e-5)


def test_budget():
    """The step of a share, and the shares of a chunk: what is left halves the rest."""
    steps, _, weights, k, v = met(configured(rate_law="budget"))
    energy, gain, _ = by_hand(weights, k, v)
    for name, step in steps.items():
        np.testing.assert_allclose(
            step, ETA / max(1.0, 2.0 * energy[name] * gain[name]), rtol=1e-5
        )
    eta = np.array([0.5, 0.9, 0.0, 1.0, 0.3, 0.2, 0.7])
    left, shares = 1.0, []
    for i, e in enumerate(eta):
        left = 1.0 if i == 5 else left
        shares.append(e * left / (1.0 + left))
        left *= 1.0 - e
    stream = rates.ration_stream(jnp.asarray(eta, jnp.float32), 5)
    np.testing.assert_allclose(stream, shares, rtol=1e-5)
    first, kept = rates.ration(jnp.asarray(eta[:5], jnp.float32), jnp.ones(()))
    np.testing.assert_allclose(first, shares[:5], rtol=1e-5)
    np.testing.assert_allclose(kept, 0.0, atol=1e-7)
    assert np.prod(1.0 - np.array(shares[:5])) >= 0.5 - 1e-6


def test_a_matrix_never_moves_away_from_what_it_learns_under_a_budget():
    """The map of a chunk on errors, where one bound per token is 2.35 times too long:
    keys that turn, gates wide open (0.4 of the specification)."""
    config = MemoryConfig(
        architecture="linear", rule="gd", rate_law="budget", retention="none", chunk=64
    )
    angle = 0.05 * jnp.arange(64, dtype=jnp.float32)
    k = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)

    def largest(config, eta):
        one = jnp.ones(64)
        tokens = Tokens(k, 0.0 * k, k, eta * one, one, 0.0 * one)
        carry = lambda w: memory_scan(  # noqa: E731
            config, begin_memory(config, {"w": w}), tokens
        )[0].weights["w"]
        flat = lambda w: carry(w.reshape(2, 2)).reshape(4)  # noqa: E731
        return np.linalg.norm(jax.jacobian(flat)(jnp.zeros(4)), 2)

    for eta in (0.1, 0.5, 1.0):
        assert largest(config, eta) <= 1.0 + 1e-5
    token = dataclasses.replace(config, rate_law="token")
    assert largest(token, 0.5) > 2.0


@pytest.mark.parametrize("rule, still", [("gd", 1.0), ("momentum", 1.0 - THETA)])
def test_output(rule, still):
    """Momentum shortens the hidden step alone."""
    steps, _, weights, k, v = met(configured(rate_law="output", rule=rule))
    energy, gain, _ = by_hand(weights, k, v)
    np.testing.assert_allclose(steps["w1"], ETA / (0.05 + energy["w1"]), rtol=1e-5)
    hidden = 0.1 * still * ETA / (CHUNK * max(1.0, energy["w2"] * gain["w2"]))
    np.testing.assert_allclose(steps["w2"], hidden, rtol=1e-5)


def test_non_expansive():
    """And no write is longer than what the token forgets."""
    steps, _, weights, k, v = met(configured(rate_law="non_expansive"))
    energy, _, error = by_hand(weights, k, v)
    for name, step in steps.items():
        write = np.sqrt(energy[name] * np.sum(error[name] ** 2))
        cap = (1.0 - ALPHA) / write
        np.testing.assert_allclose(step, cap * (1.0 - np.exp(-ETA / cap)), rtol=1e-4)
        assert step * write <= 1.0 - ALPHA + 1e-6


def test_non_expansive_never_reflects_further_than_it_keeps():
    """The second bound, where the error is small: a step of at most 2 α / ‖x‖²."""
    config = configured(rate_law="non_expansive")
    x = jnp.array([10.0, 0.0, 0.0, 0.0])
    small = rates.Met({"w": x}, {"w": jnp.float32(1.0)}, {"w": 1e-6 * x}, 0.0 * x)
    token = types.SimpleNamespace(
        eta=jnp.float32(ETA), alpha=jnp.float32(0.5), theta=jnp.float32(0.0)
    )
    step = rates.steps(config, token, small)["w"]
    np.testing.assert_allclose(step, 2.0 * 0.5 / 100.0, rtol=1e-4)


@pytest.mark.parametrize("bias, dgd", [("dot", "both"), ("l2", "none"), ("l2", "both")])
@pytest.mark.parametrize("recall", ["before", "after"])
def test_no_write_lengthens_what_is_stored_along_its_key(bias, dgd, recall):
    """By a token of any retention, up to the highest rate that an exact form takes: the
    factor is `α − n η`, or `α (1 − n η)`, and reaches −1."""
    config = MemoryConfig(
        architecture="linear",
        gradient="exact",
        rule="gd",
        **dict(bias=bias, dgd=dgd, recall=recall if dgd == "both" else "before"),
    )
    n = config.erasures
    alpha, share = (jnp.asarray(a) for a in np.mgrid[0:1:21j, 0:1:21j].astype("f4"))
    for bound in (0.5 / n, 1 / n, 1.5 / n, 2 / n):
        eta = n * rates.within(config, bound, share, alpha)
        after = config.recall == "after"
        factor = alpha * (1 - eta) if after else alpha - eta
        assert np.abs(factor).max() <= 1 + 1e-6
        assert eta.max() == pytest.approx(n * bound) and (np.diff(eta) >= 0).all()
    assert factor.min() == pytest.approx(-1.0)
