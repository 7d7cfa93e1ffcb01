"""A memory remembers, lives and keeps: Hope's memories and those with a delta rule.

A write at an open gate is one token with η at its bound and α = 1. The strength of a
recall is how far the answer has moved from that of the start towards the value.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.chunk import piece
from hope_jax.kernels.select import memory_scan
from hope_jax.memory import named
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_architecture,
    half_life_to_retention,
)
from hope_jax.memory.state import begin_memory, commit
from hope_jax.models.mixers.self_modifying import MATRIX, MLP

WIDTH = 16
MEMORIES = {
    "hope": MLP,
    "hope, momentum on the hidden layer": dataclasses.replace(MLP, rule="momentum"),
    "hope, half the features": dataclasses.replace(MLP, expansion=2),
    "hope, matrix": MATRIX,
    "gated delta rule": named.get("gated_delta_net").memory,
    "delta rule": named.get("delta_net").memory,
    "Kimi's delta rule": named.get("kda").memory,
    "RWKV-7": named.get("rwkv7").memory,
    "Comba": named.get("comba").memory,
    "Titans, by what a write does": dataclasses.replace(
        named.get("titans").memory, toward="start", rate_law="output"
    ),
}
MEMORY = pytest.mark.parametrize("config", MEMORIES.values(), ids=MEMORIES)
TYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@functools.cache
def start_of(config: MemoryConfig):
    """As `SelfModifyingTitans` has it; the named points start at zero."""
    init = build_architecture(config, WIDTH).init
    start = jax.jit(init)(jax.random.key(3))
    if "w1" in start:
        return start | {"w1": jnp.float32(np.zeros(start["w1"].shape))}
    if config.toward == "start":
        return {"w": jnp.float32(np.eye(WIDTH))}
    return start


@functools.cache
def drawn(seed, count):
    return np.asarray(jax.random.normal(jax.random.key(seed), (count, WIDTH)))


def units(seed, count):
    x = drawn(seed, count)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def orthogonal():
    return np.linalg.qr(drawn(5, WIDTH))[0]


def writes(k, v, eta=1.0, alpha=1.0, dtype="float32"):
    """Tokens whose keys and values a model of that type has made."""
    k, v = (a.astype(jnp.dtype(dtype)).astype(np.float32) for a in (k, v))
    full = lambda x: np.full(k.shape[:1], x, np.float32)  # noqa: E731
    return Tokens(k, v, k, full(eta), full(alpha), full(0.5))


def fitting(config, tokens):
    """With a retention a channel, for the memories that have that."""
    if config.retention != "channel":
        return tokens
    alpha = jnp.broadcast_to(tokens.alpha[:, None], tokens.k.shape)
    return tokens._replace(alpha=alpha)


@functools.cache
def begun(config):
    return jax.jit(functools.partial(begin_memory, config))(start_of(config))


@functools.cache
def program(config):
    """What reads tokens from a state, then answers queries, compiled once a length."""
    start = start_of(config)

    @jax.jit
    def run(tokens, state, k):
        tokens = fitting(config, tokens)
        state = memory_scan(config, commit(state), tokens, start=start)[0]
        return state, answer(config, state, k)

    return run


def live(config, tokens, k, state=None):
    """The state after `tokens`, and its answers to the queries `k`."""
    state = begun(config) if state is None else state
    state, recalled = program(config)(tokens, state, k)
    return state, np.asarray(recalled)


def answer(config, state, k):
    return build_architecture(config, WIDTH).apply(state.weights, jnp.asarray(k))


def cosine(a, b):
    return np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))


@TYPES
@MEMORY
@pytest.mark.parametrize("times", [1, 4])
def test_a_pair_is_recalled(config, times, dtype):
    k, v = units(0, 1), units(1, 1)
    tokens = writes(np.tile(k, (times, 1)), np.tile(v, (times, 1)), dtype=dtype)
    recalled = live(config, tokens, k)[1][0]
    assert cosine(recalled, v[0]) > 0.9
    assert 0.5 < np.linalg.norm(recalled) < 1.5


ADDING = ("retnet", "gla", "mamba2")
SLOW = ("ttt_linear", "ttt_mlp", "titans", "moneta", "yaad", "memora", "dla", "swla")


@pytest.mark.parametrize("name", ADDING)
def test_what_only_adds_answers_longer_with_every_write(name):
    """The published memories without a delta term keep the direction alone."""
    config = named.get(name).memory
    k, v = units(0, 1), units(1, 1)
    tokens = writes(np.tile(k, (4, 1)), np.tile(v, (4, 1)))
    recalled = live(config, tokens, k)[1][0]
    assert cosine(recalled, v[0]) > 0.999
    np.testing.assert_allclose(np.linalg.norm(recalled), 4.0, rtol=1e-3)


@pytest.mark.parametrize("name", SLOW)
def test_a_bound_by_the_chunk_is_no_open_gate(name):
    """Why the published anchored memories need many writes: at the rate up to which a
    whole chunk of one key is stable, one write does not make a recall."""
    config = named.get(name).memory
    k, v = units(0, 1), units(1, 1)

    @jax.jit
    def recall(tokens):
        start = build_architecture(config, WIDTH).init(jax.random.key(3))
        state, _ = piece(config, begin_memory(config, start), tokens)
        return answer(config, state, k[0])

    recalled = recall(writes(k, v, eta=1.0 / (config.chunk * config.window)))
    assert cosine(recalled, v[0]) < 0.9 or np.linalg.norm(recalled) < 0.5


@MEMORY
def test_as_many_orthogonal_pairs_as_the_width(config):
    """In one reading; with half the features in two.

    The features of orthogonal keys are not orthogonal, so that later writes blur the
    earlier ones: of 32 features one reading keeps 11 to 15 of 16 pairs.
    """
    k, v = orthogonal(), units(1, WIDTH)
    if config.architecture == "mlp" and config.expansion < MLP.expansion:
        k, v = np.tile(k, (2, 1)), np.tile(v, (2, 1))
    _, recalled = live(config, writes(k, v), k)
    if config.architecture == "linear":
        np.testing.assert_allclose(recalled, v, atol=1e-3)
        return
    distance = np.linalg.norm(recalled[-WIDTH:, None] - v[None, :WIDTH], axis=-1)
    assert np.array_equal(np.argmin(distance, axis=1), np.arange(WIDTH))


@MEMORY
def test_a_pair_fades_by_its_half_life(config):
    """Read, while other tokens write nothing: 0.8 after a quarter, half after one."""
    if config.retention == "none":
        config = dataclasses.replace(config, retention="decay")
    half_life = 256.0
    alpha = float(half_life_to_retention(jnp.float32(half_life)))
    k, v = units(0, 1), units(1, 1)
    before = np.asarray(jax.jit(functools.partial(answer, config))(begun(config), k))
    state, recalled = live(config, writes(k, v), k)
    written = recalled - before

    def strength(tokens):
        others = writes(units(2, tokens), units(4, tokens), eta=0.0, alpha=alpha)
        moved = live(config, others, k, state)[1] - before
        return np.vdot(moved, written) / np.vdot(written, written)

    assert strength(64) > 0.8
    assert 0.45 < strength(256) < 0.55


LONG = 1_000_000


@pytest.mark.parametrize(
    "name",
    [
        *("hope", "hope, matrix", "gated delta rule", "Kimi's delta rule"),
        "Titans, by what a write does",
    ],
)
def test_after_a_million_tokens_it_writes_as_at_the_start(name):
    """Random pairs at open and half-open gates and half-lives of up to 1,000 tokens."""
    config = dataclasses.replace(MEMORIES[name], chunk=64)
    start = start_of(config)

    @jax.jit
    def some(state, tokens):
        return memory_scan(config, state, fitting(config, tokens), start=start)[0]

    def long(state):
        rng, length = np.random.default_rng(0), 25_600
        for _ in range(-(-LONG // length)):
            k, v = rng.standard_normal((2, length, WIDTH), np.float32)
            k = k / np.linalg.norm(k, axis=-1, keepdims=True)
            v = v / np.linalg.norm(v, axis=-1, keepdims=True)
            eta, u = rng.random((2, length), np.float32)
            alpha = np.exp2(-1 / (10 + 990 * u))
            state = some(state, Tokens(k, v, k, eta, alpha, 0 * eta))
        return state

    pair = units(8, 1), units(9, 1)

    @jax.jit
    def moved(state):
        k, v = pair
        before = answer(config, state, k[0])
        tokens = fitting(config, jax.tree.map(jnp.asarray, writes(k, v)))
        after, _ = piece(config, commit(state), tokens, start=start)
        change = answer(config, after, k[0]) - before
        return jnp.linalg.norm(change) / jnp.linalg.norm(v[0] - before)

    fresh = begun(config)
    old = long(fresh)
    size = lambda tree: max(np.linalg.norm(w) for w in tree.values())  # noqa: E731
    assert size(old.weights) < 3.0 * size(start) + 20.0
    assert moved(old) > 0.8 * moved(fresh)
