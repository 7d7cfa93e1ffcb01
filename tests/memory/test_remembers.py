"""A memory remembers, lives and keeps: Hope's memories and those with a delta rule.

A write at an open gate is one token with η at its bound and α = 1. The strength of a
recall is how far the answer has moved from that of the start towards the value.
"""

import dataclasses

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


def start_of(config: MemoryConfig):
    """As `SelfModifyingTitans` has it; the named points start at zero."""
    start = build_architecture(config, WIDTH).init(jax.random.key(3))
    if "w1" in start:
        return start | {"w1": jnp.zeros_like(start["w1"])}
    if config.toward == "start":
        return {"w": jnp.eye(WIDTH)}
    return start


def units(seed, count):
    x = jax.random.normal(jax.random.key(seed), (count, WIDTH))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def orthogonal():
    return jnp.linalg.qr(jax.random.normal(jax.random.key(5), (WIDTH, WIDTH)))[0]


def writes(k, v, eta=1.0, alpha=1.0, dtype="float32"):
    """Tokens whose keys and values a model of that type has made."""
    k, v = (a.astype(dtype).astype(jnp.float32) for a in (k, v))
    full = lambda x: jnp.full(k.shape[:1], x, jnp.float32)  # noqa: E731
    return Tokens(k, v, k, full(eta), full(alpha), full(0.5))


def fitting(config, tokens):
    """With a retention a channel, for the memories that have that."""
    if config.retention != "channel":
        return tokens
    alpha = jnp.broadcast_to(tokens.alpha[:, None], tokens.k.shape)
    return tokens._replace(alpha=alpha)


def live(config, tokens, state=None):
    start, tokens = start_of(config), fitting(config, tokens)
    state = begin_memory(config, start) if state is None else commit(state)
    return memory_scan(config, state, tokens, start=start)[0]


def answer(config, state, k):
    return build_architecture(config, WIDTH).apply(state.weights, k)


def cosine(a, b):
    return float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


@TYPES
@MEMORY
@pytest.mark.parametrize("times", [1, 4])
def test_a_pair_is_recalled(config, times, dtype):
    k, v = units(0, 1), units(1, 1)
    tokens = writes(jnp.tile(k, (times, 1)), jnp.tile(v, (times, 1)), dtype=dtype)
    recalled = answer(config, live(config, tokens), k[0])
    assert cosine(recalled, v[0]) > 0.9
    assert 0.5 < float(jnp.linalg.norm(recalled)) < 1.5


ADDING = ("retnet", "gla", "mamba2")
SLOW = ("ttt_linear", "ttt_mlp", "titans", "moneta", "yaad", "memora", "dla", "swla")


@pytest.mark.parametrize("name", ADDING)
def test_what_only_adds_answers_longer_with_every_write(name):
    """The published memories without a delta term keep the direction alone."""
    config = named.get(name).memory
    k, v = units(0, 1), units(1, 1)
    tokens = writes(jnp.tile(k, (4, 1)), jnp.tile(v, (4, 1)))
    recalled = answer(config, live(config, tokens), k[0])
    assert cosine(recalled, v[0]) > 0.999
    np.testing.assert_allclose(jnp.linalg.norm(recalled), 4.0, rtol=1e-3)


@pytest.mark.parametrize("name", SLOW)
def test_a_bound_by_the_chunk_is_no_open_gate(name):
    """Why the published anchored memories need many writes: at the rate up to which a
    whole chunk of one key is stable, one write does not make a recall."""
    config = named.get(name).memory
    k, v = units(0, 1), units(1, 1)
    start = build_architecture(config, WIDTH).init(jax.random.key(3))
    state, _ = piece(
        config,
        begin_memory(config, start),
        writes(k, v, eta=1.0 / (config.chunk * config.window)),
    )
    recalled = answer(config, state, k[0])
    assert cosine(recalled, v[0]) < 0.9 or float(jnp.linalg.norm(recalled)) < 0.5


@MEMORY
def test_as_many_orthogonal_pairs_as_the_width(config):
    """In one reading; with half the features in two.

    The features of orthogonal keys are not orthogonal, so that later writes blur the
    earlier ones: of 32 features one reading keeps 11 to 15 of 16 pairs.
    """
    k, v = orthogonal(), units(1, WIDTH)
    if config.architecture == "mlp" and config.expansion < MLP.expansion:
        k, v = jnp.tile(k, (2, 1)), jnp.tile(v, (2, 1))
    recalled = answer(config, live(config, writes(k, v)), k)
    if config.architecture == "linear":
        np.testing.assert_allclose(recalled, v, atol=1e-3)
        return
    distance = jnp.linalg.norm(recalled[-WIDTH:, None] - v[None, :WIDTH], axis=-1)
    assert np.array_equal(np.argmin(distance, axis=1), np.arange(WIDTH))


@MEMORY
def test_a_pair_fades_by_its_half_life(config):
    """Read, while other tokens write nothing: 0.8 after a quarter, half after one."""
    if config.retention == "none":
        config = dataclasses.replace(config, retention="decay")
    half_life = 256.0
    alpha = float(half_life_to_retention(jnp.float32(half_life)))
    k, v = units(0, 1), units(1, 1)
    start = begin_memory(config, start_of(config))
    before = answer(config, start, k[0])
    state = live(config, writes(k, v))
    written = answer(config, state, k[0]) - before

    def strength(tokens):
        others = writes(units(2, tokens), units(4, tokens), eta=0.0, alpha=alpha)
        moved = answer(config, live(config, others, state), k[0]) - before
        return float(jnp.vdot(moved, written) / jnp.vdot(written, written))

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
    def long(state):
        def some(state, key):
            keys = jax.random.split(key, 4)
            k, v = (jax.random.normal(a, (6400, WIDTH)) for a in keys[:2])
            k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
            v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
            eta, u = (jax.random.uniform(a, (6400,)) for a in keys[2:])
            alpha = jnp.exp2(-1.0 / (10.0 + 990.0 * u))
            tokens = fitting(config, Tokens(k, v, k, eta, alpha, 0.0 * eta))
            return memory_scan(config, state, tokens, start=start)[0], None

        keys = jax.random.split(jax.random.key(0), -(-LONG // 6400))
        return jax.lax.scan(some, state, keys)[0]

    def moved(state):
        k, v = units(8, 1), units(9, 1)
        before = answer(config, state, k[0])
        tokens = fitting(config, writes(k, v))
        after, _ = piece(config, commit(state), tokens, start=start)
        change = answer(config, after, k[0]) - before
        return float(jnp.linalg.norm(change) / jnp.linalg.norm(v[0] - before))

    fresh = begin_memory(config, start)
    old = long(fresh)
    size = lambda tree: max(float(jnp.linalg.norm(w)) for w in tree.values())  # noqa: E731
    assert size(old.weights) < 3.0 * size(start) + 20.0
    assert moved(old) > 0.8 * moved(fresh)
