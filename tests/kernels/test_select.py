"""The chunk-parallel memories equal their definition: values and pullbacks."""

import dataclasses
import functools
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


def some_tokens(seed, length, width=WIDTH, correlation=0.0):
    rng = np.random.default_rng(seed)
    k, v, q = rng.normal(size=(3, length, width))
    k = (1 - correlation) * k + correlation * k[:1]
    k, q = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (k, q))
    eta, alpha, theta = rng.uniform(size=(3, length))
    tokens = k, v, q, 0.3 * eta, 0.6 + 0.4 * alpha, 0.8 * theta
    return Tokens(*(jnp.float32(x) for x in tokens))


def some_weights(seed, config, width=WIDTH):
    """Away from zero, where every gradient has something to see."""
    rng = np.random.default_rng([seed, 1])
    shapes = jax.eval_shape(build_architecture(config, width).init, jax.random.key(0))
    return {
        name: jnp.float32(rng.normal(size=w.shape) * (0.3 + 0.5 * w.shape[-1] ** -0.5))
        for name, w in shapes.items()
    }


def some_state(seed, config, width=WIDTH):
    weights = some_weights(seed, config, width)
    state = begin_memory(config, weights)
    if state.momentum is None:
        return state
    return state._replace(momentum=jax.tree.map(lambda w: 0.1 * w, weights))


def value_and_pullback(fn, *args):
    out, pullback = jax.vjp(fn, *args)
    rng = np.random.default_rng(7)
    return out, pullback(
        jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), out)
    )


def assert_same(fast, reference, *args, tolerance=1e-5):
    def close(a, b):
        scale = 1.0 + np.max(np.abs(b))
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0)

    both = jax.jit(
        lambda *args: [value_and_pullback(fn, *args) for fn in (fast, reference)]
    )
    jax.tree.map(close, *jax.device_get(both(*args)))


def assert_is_the_level(config, state, tokens):
    """From a committed state: its anchor is its weights, in the pullback too."""

    def run(impl):
        def scan(weights, momentum, tokens):
            start = begin_memory(config, weights)._replace(momentum=momentum)
            return memory_scan(config, start, tokens, impl=impl)

        return scan

    args = (state.weights, state.momentum, tokens)
    assert_same(run("chunk"), run("reference"), *args)


def assert_cut_is_whole(read, state, tokens):
    """`read` of 8 tokens, or of 1, 3 and 4 of them; gives the state after these."""

    @jax.jit
    def both(state, tokens):
        whole = read(state, tokens)
        reads = []
        for start, stop in [(0, 1), (1, 4), (4, 8)]:
            part = jax.tree.map(lambda x, a=start, b=stop: x[a:b], tokens)
            state, y = read(state, part)
            reads.append(y)
        return (state, jnp.concatenate(reads)), whole

    cut, whole = both(state, tokens)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(close, cut, whole)
    return cut[0]


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
def test_chunked_is_the_level(config, length, chunk):
    config = dataclasses.replace(config, chunk=chunk)
    state, tokens = some_state(0, config), some_tokens(0, length)
    assert_is_the_level(config, state, tokens)


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
def test_every_flag_is_the_level(changes):
    config = with_choices(MemoryConfig(chunk=4, expansion=2), **changes)
    assert_is_the_level(config, some_state(0, config), some_tokens(0, 10))


@pytest.mark.parametrize("config", list(memories()), ids=name)
def test_a_chunk_cut_anywhere_is_the_same_chunk(config):
    config = dataclasses.replace(config, chunk=8)
    state, tokens = some_state(0, config), some_tokens(0, 8)
    state = assert_cut_is_whole(functools.partial(piece, config), state, tokens)
    assert commit(state).anchor is (
        None if config.gradient == "exact" else state.weights
    )


@pytest.mark.parametrize("gradient", ["anchored", "exact"])
def test_exact_linear_memories_do_not_feel_their_chunk(gradient):
    base = MemoryConfig(architecture="linear", bias="l2", gradient=gradient)
    tokens = some_tokens(0, 24)
    ends = []
    for chunk in (1, 6, 24):
        config = dataclasses.replace(base, chunk=chunk)
        read = jax.jit(functools.partial(memory_scan, config))
        state, _ = read(some_state(0, config), tokens)
        ends.append(state.weights["w"])
    same = [bool(np.allclose(ends[0], end, atol=1e-5)) for end in ends[1:]]
    assert same == ([True, True] if gradient == "exact" else [False, False])


@pytest.mark.parametrize("correlation", [0.9, 1.0])
@pytest.mark.parametrize("chunk", [16, 64])
def test_correlated_and_identical_keys(correlation, chunk):
    config = MemoryConfig(architecture="linear", gradient="exact", chunk=chunk)
    tokens = some_tokens(0, 128, correlation=correlation)
    state = some_state(0, config)
    (fast, y), (slow, y_slow) = jax.jit(
        lambda *args: [
            memory_scan(config, *args, impl=impl) for impl in ("chunk", "reference")
        ]
    )(state, tokens)
    np.testing.assert_allclose(y, y_slow, atol=1e-4)
    np.testing.assert_allclose(fast.weights["w"], slow.weights["w"], atol=1e-4)


def test_vanishing_retention_is_not_divided_by():
    config = MemoryConfig(architecture="linear", gradient="exact", chunk=8)
    tokens = some_tokens(0, 16)
    alpha, theta = np.array(tokens.alpha), np.array(tokens.theta)
    alpha[5], alpha[9], theta[3] = 1e-8, 0.0, 0.0
    tokens = tokens._replace(alpha=jnp.asarray(alpha), theta=jnp.asarray(theta))
    assert_is_the_level(config, some_state(0, config), tokens)


def test_two_writes_by_hand():
    config = MemoryConfig(
        architecture="linear", rule="gd", dgd="none", gradient="exact", chunk=2
    )
    tokens = Tokens(
        k=np.eye(2),
        v=[[2.0, 0.0], [4.0, 0.0]],
        q=np.ones((2, 2)),
        eta=[0.5, 1.0],
        alpha=[1.0, 0.5],
        theta=[0.0, 0.0],
    )

    @jax.jit
    def read(w, tokens):
        return memory_scan(config, begin_memory(config, {"w": w}), tokens)

    state, y = read(np.zeros((2, 2), np.float32), Tokens(*map(np.float32, tokens[:6])))
    np.testing.assert_allclose(state.weights["w"], [[0.5, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(y, [[1.0, 0.0], [4.5, 0.0]])


def test_memory_is_not_linear_in_what_it_reads():
    """update(AB) != update(A) + update(B): the second reading starts from the first."""
    config = MemoryConfig(chunk=4, expansion=2)
    state, tokens = some_state(0, config), some_tokens(0, 8)

    @jax.jit
    def changes(tokens):
        def change(a, b):
            part = jax.tree.map(lambda x: x[a:b], tokens)
            after, _ = memory_scan(config, state, part)
            return after.weights["w1"] - state.weights["w1"]

        return change(0, 8), change(0, 4), change(4, 8)

    both, first, second = jax.device_get(changes(tokens))
    assert np.max(np.abs(both - (first + second))) > 1e-3


def test_compiles_once():
    config = MemoryConfig(chunk=4)
    run = jax.jit(lambda s, t: memory_scan(config, s, t))
    for seed in (0, 1):
        run(some_state(seed, config), some_tokens(seed, 8))
    assert run._cache_size() == 1


def test_unknown_implementation():
    config = MemoryConfig()
    with pytest.raises(ValueError, match="impl must be .* got 'fast'"):
        memory_scan(config, some_state(0, config), some_tokens(0, 4), impl="fast")


def test_state_is_a_plain_tuple():
    config = MemoryConfig()
    assert isinstance(some_state(0, config), MemoryState)
