"""The chunk-parallel memories equal their definition: values and pullbacks."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.chunk import piece
from hope_jax.kernels.select import memory_scan
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_architecture,
    with_choices,
)
from hope_jax.memory.state import MemoryState, begin_memory, commit

WIDTH = 6


def some_tokens(key, length, width=WIDTH, correlation=0.0):
    keys = jax.random.split(key, 6)
    k, v, q = (jax.random.normal(key, (length, width)) for key in keys[:3])
    k = (1 - correlation) * k + correlation * k[:1]
    k, q = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (k, q))
    eta, alpha, theta = (jax.random.uniform(key, (length,)) for key in keys[3:])
    return Tokens(k, v, q, 0.3 * eta, 0.6 + 0.4 * alpha, 0.8 * theta)


def some_state(key, config, width=WIDTH):
    weights = build_architecture(config, width).init(key)
    keys = jax.random.split(key, len(weights))
    weights = {
        name: w + 0.3 * jax.random.normal(k, w.shape)
        for k, (name, w) in zip(keys, weights.items(), strict=True)
    }
    state = begin_memory(config, weights)
    if state.momentum is None:
        return state
    return state._replace(momentum=jax.tree.map(lambda w: 0.1 * w, weights))


def value_and_pullback(fn, *args):
    out, pullback = jax.vjp(fn, *args)
    keys = jax.random.split(jax.random.key(7), len(jax.tree.leaves(out)))
    cotangent = jax.tree.unflatten(
        jax.tree.structure(out),
        [
            jax.random.normal(k, x.shape)
            for k, x in zip(keys, jax.tree.leaves(out), strict=True)
        ],
    )
    return out, pullback(cotangent)


def assert_same(fast, reference, *args, tolerance=1e-5):
    def close(a, b):
        scale = 1.0 + np.max(np.abs(b))
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0)

    jax.tree.map(
        close,
        jax.jit(lambda *a: value_and_pullback(fast, *a))(*args),
        jax.jit(lambda *a: value_and_pullback(reference, *a))(*args),
    )


def assert_is_the_level(config, state, tokens):
    """From a committed state: its anchor is its weights, in the pullback too."""

    def run(impl):
        def scan(weights, momentum, tokens):
            start = begin_memory(config, weights)._replace(momentum=momentum)
            return memory_scan(config, start, tokens, impl=impl)

        return scan

    args = (state.weights, state.momentum, tokens)
    assert_same(run("chunk"), run("reference"), *args)


def memories():
    rules = [(False, "none"), (True, "none"), (False, "both"), (True, "both")]
    for bias, (momentum, dgd) in itertools.product(["l2", "dot"], rules):
        for architecture, gradient in [
            ("linear", "anchored"),
            ("linear", "exact"),
            ("mlp", "anchored"),
        ]:
            yield with_choices(
                MemoryConfig(expansion=2),
                architecture=architecture,
                bias=bias,
                rule="momentum" if momentum else "gd",
                dgd=dgd,
                gradient=gradient,
            )


def name(config):
    parts = [config.architecture, config.gradient, config.bias]
    return "-".join(parts + ["momentum"] * config.inertia + ["dgd " + config.dgd])


@pytest.mark.parametrize("length, chunk", [(6, 1), (12, 4), (16, 16), (19, 8)])
@pytest.mark.parametrize("config", list(memories()), ids=name)
def test_chunked_is_the_level(key, config, length, chunk):
    config = dataclasses.replace(config, chunk=chunk)
    state, tokens = some_state(key, config), some_tokens(key, length)
    assert_is_the_level(
        config,
        state,
        tokens,
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(read="pre"),
        dict(read="anchor"),
        dict(read="pre", architecture="linear", rule="gd"),
        dict(read="anchor", architecture="linear"),
        dict(dgd="input"),
        dict(retention="none"),
        dict(activation="silu"),
    ],
    ids=str,
)
def test_every_flag_is_the_level(key, changes):
    config = with_choices(MemoryConfig(chunk=4, expansion=2), **changes)
    assert_is_the_level(
        config,
        some_state(key, config),
        some_tokens(key, 10),
    )


@pytest.mark.parametrize("config", list(memories()), ids=name)
def test_a_chunk_cut_anywhere_is_the_same_chunk(key, config):
    config = dataclasses.replace(config, chunk=8)
    state, tokens = some_state(key, config), some_tokens(key, 8)
    whole, y = piece(config, state, tokens)
    reads = []
    for start, stop in [(0, 1), (1, 4), (4, 8)]:
        part = jax.tree.map(lambda x, a=start, b=stop: x[a:b], tokens)
        state, y_part = piece(config, state, part)
        reads.append(y_part)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(close, (state, jnp.concatenate(reads)), (whole, y))
    assert commit(state).anchor is (
        None if config.gradient == "exact" else state.weights
    )


@pytest.mark.parametrize("gradient", ["anchored", "exact"])
def test_exact_linear_memories_do_not_feel_their_chunk(key, gradient):
    base = MemoryConfig(architecture="linear", bias="l2", gradient=gradient)
    tokens = some_tokens(key, 24)
    ends = []
    for chunk in (1, 6, 24):
        config = dataclasses.replace(base, chunk=chunk)
        state, _ = memory_scan(config, some_state(key, config), tokens)
        ends.append(state.weights["w"])
    same = [bool(jnp.allclose(ends[0], end, atol=1e-5)) for end in ends[1:]]
    assert same == ([True, True] if gradient == "exact" else [False, False])


@pytest.mark.parametrize("correlation", [0.9, 1.0])
@pytest.mark.parametrize("chunk", [16, 64])
def test_correlated_and_identical_keys(key, correlation, chunk):
    config = MemoryConfig(architecture="linear", gradient="exact", chunk=chunk)
    tokens = some_tokens(key, 128, correlation=correlation)
    state = some_state(key, config)
    fast, y = memory_scan(config, state, tokens, impl="chunk")
    slow, y_slow = memory_scan(config, state, tokens, impl="reference")
    np.testing.assert_allclose(y, y_slow, atol=1e-4)
    np.testing.assert_allclose(fast.weights["w"], slow.weights["w"], atol=1e-4)


def test_vanishing_retention_is_not_divided_by(key):
    config = MemoryConfig(architecture="linear", gradient="exact", chunk=8)
    tokens = some_tokens(key, 16)
    tokens = tokens._replace(alpha=tokens.alpha.at[5].set(1e-8).at[9].set(0.0))
    assert_is_the_level(
        config,
        some_state(key, config),
        tokens._replace(theta=tokens.theta.at[3].set(0.0)),
    )


def test_two_writes_by_hand():
    config = MemoryConfig(
        architecture="linear", rule="gd", dgd="none", gradient="exact", chunk=2
    )
    k = jnp.eye(2)
    tokens = Tokens(
        k=k,
        v=jnp.array([[2.0, 0.0], [4.0, 0.0]]),
        q=jnp.ones((2, 2)),
        eta=jnp.array([0.5, 1.0]),
        alpha=jnp.array([1.0, 0.5]),
        theta=jnp.zeros(2),
    )
    start = begin_memory(config, {"w": jnp.zeros((2, 2))})
    state, y = memory_scan(config, start, tokens)
    np.testing.assert_allclose(state.weights["w"], [[0.5, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(y, [[1.0, 0.0], [4.5, 0.0]])


def test_memory_is_not_linear_in_what_it_reads(key):
    """update(AB) != update(A) + update(B): the second reading starts from the first."""
    config = MemoryConfig(chunk=4, expansion=2)
    state, tokens = some_state(key, config), some_tokens(key, 8)
    cut = lambda a, b: jax.tree.map(lambda x: x[a:b], tokens)  # noqa: E731

    def change(tokens):
        after, _ = memory_scan(config, state, tokens)
        return after.weights["w1"] - state.weights["w1"]

    both, apart = change(tokens), change(cut(0, 4)) + change(cut(4, 8))
    assert jnp.max(jnp.abs(both - apart)) > 1e-3


def test_compiles_once(key):
    config = MemoryConfig(chunk=4)
    run = jax.jit(lambda s, t: memory_scan(config, s, t))
    for seed in (0, 1):
        run(some_state(key, config), some_tokens(jax.random.key(seed), 8))
    assert run._cache_size() == 1


def test_unknown_implementation(key):
    config = MemoryConfig()
    with pytest.raises(ValueError, match="impl must be .* got 'fast'"):
        memory_scan(config, some_state(key, config), some_tokens(key, 4), impl="fast")


def test_state_is_a_plain_tuple(key):
    config = MemoryConfig()
    assert isinstance(some_state(key, config), MemoryState)
