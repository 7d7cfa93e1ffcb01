"""Memories that return to their start, and laws of rates: chunks equal the level."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.chunk import piece
from hope_jax.kernels.select import memory_scan
from hope_jax.memory.compose import MemoryConfig, Tokens, build_architecture
from hope_jax.memory.state import begin_memory
from tests.kernels.test_select import (
    assert_cut_is_whole,
    assert_same,
    some_tokens,
    some_weights,
)

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


def tokens_for(config, length):
    tokens = some_tokens(0, length)
    if config.retention == "channel":
        alpha = np.asarray(tokens.alpha)[:, None]
        alpha = alpha * (0.5 + 0.5 * np.abs(tokens.k))
        tokens = tokens._replace(alpha=jnp.asarray(alpha))
    return tokens


@pytest.mark.parametrize("name", MEMORIES)
def test_chunk_is_the_level(name):
    """Outputs, states and pullbacks, the start's among them, over chunks and a rest."""
    config = MemoryConfig(chunk=4, **MEMORIES[name])
    start, tokens = some_weights(0, config), tokens_for(config, 10)
    tolerance = 1e-4 if config.rule == "muon" else 1e-5  # Newton-Schulz doubles errors
    fast, slow = life(config, "chunk"), life(config, "reference")
    assert_same(fast, slow, start, tokens, tolerance=tolerance)


@pytest.mark.parametrize(
    "name", ["output", "budget, delta", "matrix, exact", "energy, momentum, delta"]
)
def test_a_chunk_cut_anywhere_is_the_same_chunk(name):
    config = MemoryConfig(chunk=8, **MEMORIES[name])
    start, tokens = some_weights(0, config), tokens_for(config, 8)
    state = jax.jit(functools.partial(begin_memory, config))(start)
    assert_cut_is_whole(functools.partial(piece, config, start=start), state, tokens)


def test_decay_by_hand():
    """`½ W + ½ W₀` and half of a write; a second token forgets half of that."""
    config = MemoryConfig(**_EXACT | dict(rule="gd", dgd="none", bias="dot"), chunk=2)
    tokens = (
        np.eye(2),
        [[0.0, 4.0], [0.0, 0.0]],
        np.ones((2, 2)),
        [0.5, 0.0],
        [0.5, 0.5],
        [0.0, 0.0],
    )
    start = {"w": np.eye(2, dtype=np.float32)}
    state, y = jax.jit(life(config, "chunk"))(start, Tokens(*map(np.float32, tokens)))
    np.testing.assert_allclose(state.weights["w"], [[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(y, [[1.0, 3.0], [1.0, 2.0]])


@pytest.mark.parametrize("erases, kept", [("all", 0.0), ("written", 3.0)])
def test_what_the_delta_term_erases(erases, kept):
    """Of W = W₀ + D along the key, with nothing to write: all, or D alone."""
    config = MemoryConfig(
        **_EXACT | dict(rule="gd", bias="dot", erases=erases), chunk=1
    )
    start = np.float32([[3.0, 0.0], [0.0, 0.0]])
    one, zero = np.ones(1, np.float32), np.zeros((1, 2), np.float32)
    token = Tokens(np.float32([[1.0, 0.0]]), zero, zero, one, one, one)

    @jax.jit
    def written(start, token):
        state = begin_memory(config, {"w": start + 1.0})
        return piece(config, state, token, start={"w": start})

    state, _ = written(start, token)
    np.testing.assert_allclose(state.weights["w"][0], [kept, 1.0], atol=1e-6)


def test_a_start_is_asked_for():
    config = MemoryConfig(**_MLP)
    state = begin_memory(config, some_weights(0, config))
    with pytest.raises(ValueError, match="toward='start'.* need the start"):
        piece(config, state, some_tokens(0, 4))


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


def adversarial_keys(kind, length, width=16):
    if kind == "orthogonal":
        return np.tile(np.eye(width, dtype=np.float32), (length // width, 1))
    if kind == "turning":
        angle = 0.05 * np.arange(length)
        k = np.zeros((length, width), np.float32)
        k[:, 0], k[:, 1] = np.cos(angle), np.sin(angle)
        return k
    k = np.random.default_rng(0).normal(size=(length, width))
    k = k[:1] + {"equal": 0.0, "clustered": 0.2}[kind] * k
    return np.float32(k / np.linalg.norm(k, axis=-1, keepdims=True))


@functools.cache
def reading(**choices):
    """A memory of width 16 and what reads a stream from its start, compiled once."""
    config = MemoryConfig(
        **dict(architecture="mlp", toward="start", chunk=64) | choices
    )
    start = jax.jit(build_architecture(config, 16).init)(jax.random.key(0))
    return start, jax.jit(functools.partial(life(config, "chunk"), start))


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("name", LAWS)
def test_a_law_is_stable_at_its_highest_rate(name, kind):
    """Gates wide open for 64 chunks of 64 tokens: what the memory recalls stays within
    a few times the length of its values, and grows no more."""
    width, length = 16, 64 * 64
    k = adversarial_keys(kind, length, width)
    v = np.random.default_rng(1).normal(size=(length, width))
    v = np.float32(v / np.linalg.norm(v, axis=-1, keepdims=True))
    one = np.ones(length, np.float32)
    tokens = Tokens(k, v, k, one, np.float32(0.999) * one, 0 * one)
    start, read = reading(expansion=4, **LAWS[name])
    state, y = jax.device_get(read(tokens))
    reads = np.linalg.norm(y, axis=-1).reshape(2, -1).max(axis=-1)
    assert np.all(reads < 6.0), reads
    assert reads[1] < 1.5 * reads[0], reads  # no growth from one half to the next
    for n, w in state.weights.items():
        sizes = np.linalg.norm(w), np.linalg.norm(start[n])
        assert sizes[0] < 4.0 * sizes[1] + 20.0, (n, sizes)


def test_unstable_rates_are_caught_by_that_test():
    """The same stream with the token's own rate for both layers blows up."""
    k = adversarial_keys("equal", 64 * 16)
    one = np.ones(k.shape[0], np.float32)
    tokens = Tokens(k, -k, k, one, np.float32(0.999) * one, one)
    _, read = reading(rule="gd", dgd="none")
    _, y = read(tokens)
    assert not np.max(np.abs(y)) < 4.0


def test_start_is_the_same_at_any_time():
    """A memory that was begun elsewhere still decays to the start it is given."""
    config = dataclasses.replace(MemoryConfig(**MEMORIES["output"], chunk=4), rule="gd")
    start = some_weights(0, config)
    tokens = some_tokens(0, 400)
    still, kept = np.zeros(400, np.float32), np.full(400, 0.9, np.float32)
    tokens = tokens._replace(eta=still, alpha=kept)

    @jax.jit
    def read(start, tokens):
        begun = begin_memory(config, jax.tree.map(lambda w: w + 1.0, start))
        return memory_scan(config, begun, tokens, start=start)

    state, _ = read(start, tokens)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.weights, start
    )
