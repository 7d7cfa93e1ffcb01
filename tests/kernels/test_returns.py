"""Memories that return to their start, and laws of rates: chunks equal the level."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.chunk import piece
from hope_jax.kernels.select import memory_scan
from hope_jax.memory.compose import MemoryConfig, Tokens, build_architecture
from hope_jax.memory.state import begin_memory
from tests.kernels.test_select import assert_same, some_tokens

WIDTH = 6
_MLP = dict(architecture="mlp", expansion=2, toward="start")
_MATRIX = dict(architecture="linear", toward="start")
_EXACT = dict(_MATRIX, gradient="exact")

MEMORIES = {
    "mlp": dict(_MLP),
    "mlp, what was written": dict(_MLP, erases="written"),
    "mlp, no delta, nesterov": dict(_MLP, dgd="none", rule="nesterov"),
    "matrix, anchored": dict(_MATRIX),
    "matrix, anchored, written": dict(_MATRIX, erases="written"),
    "matrix, exact": dict(_EXACT),
    "matrix, exact, momentum, written": dict(_EXACT, erases="written"),
    "matrix, dot": dict(_EXACT, bias="dot", rule="gd"),
    "gated delta rule": dict(
        _EXACT, bias="dot", rule="gd", recall="after", erases="written"
    ),
    "no retention, written": dict(_MATRIX, toward="zero", retention="none")
    | dict(erases="written", gradient="exact"),
    "channels": dict(_EXACT, retention="channel", rule="gd", bias="dot"),
    "channels, l2, no delta": dict(_EXACT, retention="channel", rule="gd", dgd="none"),
    "channels, l2, delta": dict(_EXACT, retention="channel", rule="gd"),
    "vector": dict(architecture="vector", gradient="exact", toward="start"),
    "vector, written": dict(
        architecture="vector", gradient="exact", toward="start", erases="written"
    ),
    "adam": dict(_MLP, rule="adam", dgd="none"),
    "adam, delta": dict(_MLP, rule="adam", erases="written"),
    "muon": dict(_MLP, rule="muon", dgd="none"),
    "norm clamp": dict(_MLP, retention="norm_clamp", dgd="none"),
    "energy": dict(_MLP, rate_law="energy", dgd="none", rule="gd"),
    "energy, momentum, delta": dict(_MLP, rate_law="energy"),
    "energy of a matrix": dict(_MATRIX, rate_law="energy", rule="gd"),
    "output": dict(_MLP, rate_law="output", rule="gd", dgd="none"),
    "output, delta": dict(_MLP, rate_law="output", rule="gd"),
    "output, written": dict(_MLP, rate_law="output", rule="gd", erases="written"),
    "output, momentum": dict(_MLP, rate_law="output", dgd="none"),
    "output, nesterov, input": dict(
        _MLP, rate_law="output", rule="nesterov", dgd="input"
    ),
    "output, dot": dict(_MLP, rate_law="output", bias="dot", rule="gd"),
    "output toward zero": dict(
        _MLP, rate_law="output", toward="zero", rule="gd", read="pre"
    ),
    "budget": dict(_MLP, rate_law="budget", rule="gd", dgd="none"),
    "budget, delta": dict(_MLP, rate_law="budget", rule="gd"),
    "budget of a matrix": dict(_MATRIX, rate_law="budget", rule="gd", toward="zero"),
    "non-expansive": dict(_MLP, rate_law="non_expansive", rule="gd"),
    "non-expansive matrix": dict(_MATRIX, rate_law="non_expansive", rule="gd"),
}


def life(config, impl):
    """From a start that has already been left: a first chunk, then the rest."""

    def run(start, tokens):
        state = begin_memory(config, start)
        state, y = memory_scan(config, state, tokens, impl=impl, start=start)
        return state._replace(rule=None), y

    return run


def some_start(key, config):
    weights = build_architecture(config, WIDTH).init(key)
    keys = jax.random.split(key, len(weights))
    return {
        name: w + 0.3 * jax.random.normal(k, w.shape)
        for k, (name, w) in zip(keys, weights.items(), strict=True)
    }


def tokens_for(config, key, length):
    tokens = some_tokens(key, length)
    if config.retention == "channel":
        alpha = jnp.broadcast_to(tokens.alpha[:, None], tokens.k.shape)
        tokens = tokens._replace(alpha=alpha * (0.5 + 0.5 * jnp.abs(tokens.k)))
    return tokens


@pytest.mark.parametrize("name", MEMORIES)
def test_chunk_is_the_level(key, name):
    """Outputs, states and pullbacks, the start's among them, over chunks and a rest."""
    config = MemoryConfig(chunk=4, **MEMORIES[name])
    start, tokens = some_start(key, config), tokens_for(config, key, 10)
    tolerance = 1e-4 if config.rule == "muon" else 1e-5  # Newton-Schulz doubles errors
    fast, slow = life(config, "chunk"), life(config, "reference")
    assert_same(fast, slow, start, tokens, tolerance=tolerance)


@pytest.mark.parametrize(
    "name", ["output", "budget, delta", "matrix, exact", "energy, momentum, delta"]
)
def test_a_chunk_cut_anywhere_is_the_same_chunk(key, name):
    config = MemoryConfig(chunk=8, **MEMORIES[name])
    start, tokens = some_start(key, config), tokens_for(config, key, 8)
    state = begin_memory(config, start)
    whole, y = piece(config, state, tokens, start=start)
    reads = []
    for a, b in [(0, 1), (1, 4), (4, 8)]:
        part = jax.tree.map(lambda x, a=a, b=b: x[a:b], tokens)
        state, y_part = piece(config, state, part, start=start)
        reads.append(y_part)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(close, (state, jnp.concatenate(reads)), (whole, y))


def test_decay_by_hand():
    """`½ W + ½ W₀` and half of a write; a second token forgets half of that."""
    config = MemoryConfig(**_EXACT | dict(rule="gd", dgd="none", bias="dot"), chunk=2)
    start = {"w": jnp.eye(2)}
    tokens = Tokens(
        k=jnp.eye(2),
        v=jnp.array([[0.0, 4.0], [0.0, 0.0]]),
        q=jnp.ones((2, 2)),
        eta=jnp.array([0.5, 0.0]),
        alpha=jnp.array([0.5, 0.5]),
        theta=jnp.zeros(2),
    )
    state, y = memory_scan(config, begin_memory(config, start), tokens, start=start)
    np.testing.assert_allclose(state.weights["w"], [[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(y, [[1.0, 3.0], [1.0, 2.0]])


@pytest.mark.parametrize("erases, kept", [("all", 0.0), ("written", 3.0)])
def test_what_the_delta_term_erases(erases, kept):
    """Of W = W₀ + D along the key, with nothing to write: all, or D alone."""
    config = MemoryConfig(
        **_EXACT | dict(rule="gd", bias="dot", erases=erases), chunk=1
    )
    start = {"w": jnp.array([[3.0, 0.0], [0.0, 0.0]])}
    state = begin_memory(config, {"w": start["w"] + 1.0})
    one, zero = jnp.ones((1,)), jnp.zeros((1, 2))
    token = Tokens(jnp.array([[1.0, 0.0]]), zero, zero, one, one, one)
    state, _ = piece(config, state, token, start=start)
    np.testing.assert_allclose(state.weights["w"][0], [kept, 1.0], atol=1e-6)


def test_a_start_is_asked_for(key):
    config = MemoryConfig(**_MLP)
    state = begin_memory(config, some_start(key, config))
    with pytest.raises(ValueError, match="toward='start'.* need the start"):
        piece(config, state, some_tokens(key, 4))


REFUSED = [
    (dict(toward="start", retention="none"), "toward='start' is about a decay"),
    (dict(toward="start", retention="oja"), "toward='start'|retention='oja'"),
    (dict(erases="written"), "erases='written' .* needs"),
    (dict(erases="written", toward="start", dgd="none"), "erases='written' .* needs"),
    (dict(toward="start", recall="after"), "recall='after' beside toward='start'"),
    (dict(rate_law="energy", architecture="deep_mlp"), "rate_law='energy' knows"),
    (dict(rate_law="energy", window=2, dgd="none"), "rate_law='energy' knows"),
    (dict(rate_law="output", architecture="linear"), "rate_law='output' solves"),
    (dict(rate_law="output", bias="huber"), "rate_law='output' solves"),
    (dict(rate_law="budget"), "rate_law='budget' counts the writes"),
    (dict(rate_law="non_expansive"), "rate_law='non_expansive' bounds"),
    (
        dict(rate_law="energy", architecture="linear", gradient="exact"),
        "rate_law='energy' is about anchored",
    ),
    (dict(rate_law="fast"), "rate_law must be one of token, energy"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=str)
def test_choices_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**changes)


ADVERSARIAL = ("equal", "clustered", "turning", "orthogonal")
LAWS = {
    "energy": dict(rate_law="energy", rule="gd", dgd="none"),
    "budget": dict(rate_law="budget", rule="gd", dgd="none"),
    "budget, delta": dict(rate_law="budget", rule="gd"),
    "output": dict(rate_law="output", rule="gd", dgd="none"),
    "output, written": dict(rate_law="output", rule="gd", erases="written"),
    "non-expansive": dict(rate_law="non_expansive", rule="gd", dgd="none"),
}


def adversarial_keys(kind, key, length, width=16):
    if kind == "orthogonal":
        return jnp.tile(jnp.eye(width), (length // width, 1))
    if kind == "turning":
        angle = 0.05 * jnp.arange(length, dtype=jnp.float32)
        return (
            jnp.zeros((length, width))
            .at[:, 0]
            .set(jnp.cos(angle))
            .at[:, 1]
            .set(jnp.sin(angle))
        )
    k = jax.random.normal(key, (length, width))
    k = k[:1] + {"equal": 0.0, "clustered": 0.2}[kind] * k
    return k / jnp.linalg.norm(k, axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("name", LAWS)
def test_a_law_is_stable_at_its_highest_rate(key, name, kind):
    """Gates wide open for 64 chunks of 64 tokens: what the memory recalls stays within
    a few times the length of its values, and grows no more."""
    config = MemoryConfig(
        **dict(architecture="mlp", expansion=4, toward="start", chunk=64) | LAWS[name]
    )
    width, length = 16, 64 * 64
    k = adversarial_keys(kind, key, length, width)
    v = jax.random.normal(jax.random.fold_in(key, 1), (length, width))
    v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
    one = jnp.ones((length,))
    tokens = Tokens(k, v, k, one, 0.999 * one, 0.0 * one)
    start = build_architecture(config, width).init(key)
    state, y = jax.jit(
        lambda t: memory_scan(config, begin_memory(config, start), t, start=start)
    )(tokens)
    reads = np.linalg.norm(y, axis=-1).reshape(2, -1).max(axis=-1)
    assert np.all(reads < 6.0), reads
    assert reads[1] < 1.5 * reads[0], reads  # no growth from one half to the next
    size = lambda w: float(jnp.linalg.norm(w))  # noqa: E731
    for n, w in state.weights.items():
        assert size(w) < 4.0 * size(start[n]) + 20.0, (n, size(w))


def test_unstable_rates_are_caught_by_that_test(key):
    """The same stream with the token's own rate for both layers blows up."""
    config = MemoryConfig(
        architecture="mlp", rule="gd", dgd="none", toward="start", chunk=64
    )
    k = adversarial_keys("equal", key, 64 * 16)
    one = jnp.ones((k.shape[0],))
    tokens = Tokens(k, -k, k, one, 0.999 * one, one)
    start = build_architecture(config, 16).init(key)
    _, y = memory_scan(config, begin_memory(config, start), tokens, start=start)
    assert not np.max(np.abs(y)) < 4.0


def test_start_is_the_same_at_any_time(key):
    """A memory that was begun elsewhere still decays to the start it is given."""
    config = dataclasses.replace(MemoryConfig(**MEMORIES["output"], chunk=4), rule="gd")
    start = some_start(key, config)
    tokens = some_tokens(key, 400)
    tokens = tokens._replace(eta=jnp.zeros((400,)), alpha=jnp.full((400,), 0.9))
    begun = begin_memory(config, jax.tree.map(lambda w: w + 1.0, start))
    state, _ = memory_scan(config, begun, tokens, start=start)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.weights, start
    )
