"""TNT is its definition, restarts where it must, and keeps the promises of a layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.core.level import begin, tick
from hope_jax.memory.compose import MemoryConfig, Tokens, memory_level, with_choices
from hope_jax.models.mixers.tnt import TNT, TNTConfig, stage2
from tests import compare
from tests.models import small

close = compare.within_size(1e-5)

D, HEADS, ROWS = 8, 2, 2


def configured(global_chunk=8, local_chunks=(2, 4), shard=4, conv=3, **options):
    memory = MemoryConfig(expansion=2, rule="gd", dgd="none", retention="none")
    memory = with_choices(memory, **options.pop("memory", {}))
    return TNTConfig(
        memory=memory,
        global_chunk=global_chunk,
        local_chunks=local_chunks,
        shard=shard,
        conv=conv,
        **options,
    )


def build(config, dtype=jnp.float32):
    """A layer none of whose parameters is at a special value, as pure functions."""
    layer = TNT(D, HEADS, config, dtype, rngs=nnx.Rngs(0))
    return small.shaken(layer)


def tokens(length, seed=2):
    return small.drawn(ROWS, length, D, seed=seed)


@functools.cache
def reader(config):
    """`read(x, state)`, compiled once a length."""
    graphdef, params = build(config)
    start = small.begun(graphdef, params, ROWS)

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(x, state, aligned, learn):
        return nnx.merge(graphdef, params)(x, state, aligned=aligned, learn=learn)

    def read(x, state=start, aligned=False, learn=True):
        y, state = run(x, state, aligned, learn)
        return np.asarray(y), state

    return read


@pytest.fixture(scope="module")
def layer():
    return reader(configured())


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def reference(layer, x):
    """What `layer(x)` means, in one scan over tokens, each memory a level.

    Returns the outputs, the memories' weights and Π.
    """
    config, rows, length = layer.config, x.shape[0], x.shape[1]
    levels = [memory_level(memory, layer.width) for memory in config.memories]

    def unit(a):
        return a / jnp.sqrt(jnp.sum(a * a, axis=-1, keepdims=True) + 1e-6)

    def made(project, conv):
        kernel, a = conv.kernel[...], project(x)
        a = jnp.pad(a, [(0, 0), (config.conv - 1, 0), (0, 0)])
        taps = (w[None, None] * a[:, i : i + length] for i, w in enumerate(kernel))
        return jax.nn.silu(sum(taps)).reshape(rows, length, HEADS, layer.width)

    k, v = unit(made(layer.k, layer.conv_k)), made(layer.v, layer.conv_v)
    q = unit(made(layer.q, layer.conv_q))
    v = unit(v) if config.unit_values else v
    gates = jax.nn.sigmoid(layer.rates(x))  # [B, T, G, M, H]

    def live(start, k, v, q, gates):
        def step(carry, token):
            states, seen = carry
            t, k, v, q, gates = token
            begins = t % config.shard == 0
            seen = jnp.where(begins, 0.0, seen) + jnp.outer(k, k) / jnp.vdot(k, k)
            asked = seen @ q
            if config.projection == "unit":
                asked = unit(asked)
            asked = q if config.projection == "none" else asked
            y, after = 0.0, []
            for i, level in enumerate(levels):
                gate = dict(zip(config.gates, gates[:, i], strict=True))
                theta = gate.get("theta", jnp.zeros(()))
                own = Tokens(
                    k=k,
                    v=v,
                    q=asked if i else q,
                    eta=config.rate_bounds[i] * gate["eta"] * (1.0 - theta),
                    alpha=gate.get("alpha", jnp.ones(())),
                    theta=theta,
                )
                state = states[i]
                if i:
                    fresh = begin(level, start[i])
                    state = jax.tree.map(
                        lambda a, b: jnp.where(begins, a, b), fresh, state
                    )
                state, read = tick(level, state, own)
                after.append(state)
                y = y + read
            return (after, seen), y

        states = [begin(level, w) for level, w in zip(levels, start, strict=True)]
        carry = states, jnp.zeros((layer.width, layer.width))
        times = jnp.arange(length)
        (states, seen), y = jax.lax.scan(step, carry, (times, k, v, q, gates))
        return y, ([state.params for state in states], seen)

    start = [{n: w[...] for n, w in weights.items()} for weights in layer.starts]
    live = jax.vmap(live, (0, 1, 1, 1, 3), (1, 0))  # heads
    live = jax.vmap(live, (None, 0, 0, 0, 0))  # rows
    y, end = live(start, k, v, q, gates)
    y = layer.norm(y).reshape(x.shape) * jax.nn.silu(layer.gate(x))
    return layer.out(y), end


def fast(layer, x):
    y, state = layer(x)
    return y, ([memory.weights for memory in state.memories], state.key_space)


LAYERS = {
    "a shard and more": (11, configured()),
    "whole shards, longer than the global chunk": (
        16,
        configured(
            global_chunk=4,
            shard=8,
            local_chunks=(1,),
            projection="unit",
            unit_values=False,
        ),
    ),
    "momentum, decay, linear, no projection": (
        9,
        configured(
            memory=dict(
                architecture="linear", rule="momentum", retention="decay", dgd="input"
            ),
            local_chunks=(4,),
            projection="none",
            rates=(0.3, 0.5),
        ),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_its_definition(name):
    """Outputs, memories, and the pullback of both in every parameter and input."""
    length, config = LAYERS[name]
    graphdef, params = build(config)
    x = tokens(length)

    @jax.jit
    def both(*args):
        def through(run):
            return lambda p, x: run(nnx.merge(graphdef, p), x)

        runs = [through(run) for run in (fast, reference)]
        return [small.value_and_pullback(run, *args) for run in runs]

    ours, theirs = jax.device_get(both(params, x))
    close(ours, theirs)
    for path, gradient in nnx.to_flat_state(ours[1][0]):
        assert np.any(gradient[...] != 0), path
        assert np.all(np.isfinite(gradient[...])), path


def test_a_state_between_spans_goes_on_in_parallel(layer):
    x = tokens(13)
    expected, end = layer(x, aligned=True)
    y, state = layer(x[:, :8], aligned=True)
    rest, state = layer(x[:, 8:], state, aligned=True)
    close(np.concatenate([y, rest], axis=1), expected)
    close(state, end)


@pytest.mark.parametrize("aligned", [True, False])
def test_only_the_global_memory_crosses_a_shard(aligned):
    """And nobody reads it before its own chunk of two shards is over."""
    read = reader(configured(conv=1))
    x = tokens(11)
    y, state = read(x, aligned=aligned)
    changed = x.copy()
    changed[:, 0] += 1.0
    z, other = read(changed, aligned=aligned)
    assert np.all(np.any(z[:, :4] != y[:, :4], axis=-1))
    equal(z[:, 4:8], y[:, 4:8])
    assert np.all(np.any(z[:, 8:] != y[:, 8:], axis=-1))
    equal(other.memories[1:], state.memories[1:])
    equal(other.key_space, state.key_space)


def test_a_finished_shard_stays_until_the_next_begins(layer):
    start = layer(tokens(1), learn=False)[1]
    _, finished = layer(tokens(8), aligned=True)
    for memory, learned in zip(finished.memories, start.memories, strict=True):
        after, before = (np.asarray(m.weights["w1"]) for m in (memory, learned))
        assert np.max(np.abs(after - before)) > 1e-3
    assert np.max(np.abs(finished.key_space)) > 0.5


def test_shards_are_parallel():
    """No loop runs over them: its only carries are those of the global memory."""
    graphdef, params = build(configured(local_chunks=(4,), conv=1))

    def loops(length):
        program = jax.make_jaxpr(lambda x: nnx.merge(graphdef, params)(x)[0])(
            np.zeros((1, length, D), np.float32)
        )
        return [int(n) for n in _scan_lengths(program.jaxpr)]

    assert loops(64) == [64 // 8]


def _scan_lengths(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["length"]
        for inner in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _scan_lengths(inner)


@pytest.mark.parametrize("aligned, read", [(True, 8), (False, 7)])
def test_without_learning_the_memories_stay(layer, aligned, read):
    x = tokens(13)
    _, state = layer(x[:, :read], aligned=aligned)
    y, after = layer(x[:, read:], state, aligned=aligned, learn=False)
    for new, old in zip(after.memories, state.memories, strict=True):
        equal(new.weights, old.weights)
    equal(after.key_space, state.key_space)
    assert int(after.position[0]) == 13

    one = state
    for t in range(read, 13):
        z, one = layer(x[:, t : t + 1], one, learn=False)
        close(z, y[:, t - read : t - read + 1])
    close(one, after)


def test_the_second_stage_keeps_parameters_and_rates():
    config = configured(local_chunks=(4, 4))
    finer = stage2(config, (1, 2))
    assert finer.local_chunks == (1, 2)
    assert finer.rate_bounds == config.rate_bounds == (1 / 8, 1 / 4, 1 / 4)
    graphdef, params = build(config)
    graphdef_2, params_2 = build(finer)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, params_2)

    @jax.jit
    def both(params, x):
        first, second = (nnx.merge(g, params) for g in (graphdef, graphdef_2))
        return first(x)[0], second(x)[0], reference(second, x)[0]

    coarse, fine, expected = both(params, tokens(6))
    close(fine, expected)
    assert np.max(np.abs(np.asarray(fine) - np.asarray(coarse))) > 1e-4


def test_long_monotonous_texts_stay_bounded():
    """2,048 tokens of nearly one direction at the highest rates."""
    graphdef, params = build(configured(global_chunk=16, shard=16))
    bias = params["rates"]["up"]["bias"]
    params["rates"]["up"]["bias"] = jax.tree.map(lambda b: b + 20.0, bias)
    noise = tokens(2048, 0)
    x = np.float32(3.0) * noise[:, :1] + np.float32(0.3) * noise
    y, state = jax.jit(lambda x: nnx.merge(graphdef, params)(x))(x)
    assert np.isfinite(y).all()
    for memory in state.memories:
        for weights in memory.weights.values():
            assert np.abs(weights).max() < 10.0


def test_at_the_start_a_memory_outlives_its_chunk():
    config = configured(memory=dict(retention="decay"))

    @jax.jit
    def half_lives(x):
        layer = TNT(D, HEADS, config, jnp.float32, rngs=nnx.Rngs(0))
        alpha = jax.nn.sigmoid(layer.rates(x))[:, :, config.gates.index("alpha")]
        return -1.0 / jnp.log2(alpha)

    half_life = np.asarray(half_lives(tokens(32)))
    assert np.min(half_life[:, :, 0]) >= config.global_chunk
    assert np.min(half_life[:, :, 1:]) >= config.shard


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(shard=0), "shard must be at least 1, got 0"),
        (dict(conv=0), "conv must be at least 1, got 0"),
        (dict(local_chunks=()), "local_chunks must name at least one chunk"),
        (
            dict(local_chunks=(2, 3)),
            r"shard \(4\) must be a multiple of .* local_chunks=\(2, 3\)",
        ),
        (dict(local_chunks=(0,)), r"shard \(4\) must be a multiple of"),
        (dict(global_chunk=6), r"global_chunk \(6\) and shard \(4\) must nest"),
        (
            dict(memory=dict(architecture="linear", gradient="exact")),
            "memory.gradient must be 'anchored', got 'exact'",
        ),
        (
            dict(memory=dict(features="elu")),
            "memory needs features='none' .* got 'elu' and 'none'",
        ),
        (
            dict(memory=dict(retention="norm_clamp")),
            "memory needs features='none' .* got 'none' and 'norm_clamp'",
        ),
        (dict(memory=dict(chunk=1)), "memory.chunk is set by the hierarchy, got 1"),
        (dict(memory=dict(read="pre")), "memory.read is set by .* got 'pre'"),
        (
            dict(projection="both"),
            "projection must be one of sum, unit, none, got 'both'",
        ),
        (dict(rates=(0.5, 0.5)), r"rates must hold 3 bounds in \(0, 1\].* got \(0.5"),
        (dict(rates=(0.5, 2.0, 0.5)), r"rates must hold 3 bounds in \(0, 1\]"),
    ],
)
def test_configs_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        configured(**options)


@pytest.mark.parametrize(
    "chunks, message",
    [
        ((1,), r"must keep the 2 local memories of the first stage, got \(1,\)"),
        ((4, 4), r"must not exceed the first stage's \(2, 4\), got \(4, 4\)"),
    ],
)
def test_second_stages_that_cannot_be(chunks, message):
    with pytest.raises(ValueError, match=message):
        stage2(configured(), chunks)


def test_heads_must_divide_the_width():
    with pytest.raises(
        ValueError, match=r"d_model \(8\) must be a multiple of .*\(3\)"
    ):
        TNT(D, 3, configured(), jnp.float32, rngs=nnx.Rngs(0))


def test_defaults_are_the_presented_rule():
    config = TNTConfig()
    first, *local = config.memories
    assert (first.read, first.chunk) == ("anchor", config.global_chunk)
    assert [(m.read, m.chunk) for m in local] == [("post", 8), ("post", 16)]
    assert {(m.rule, m.retention, m.dgd) for m in config.memories} == {
        ("gd", "none", "none")
    }
    assert config.span == 256
    assert dataclasses.replace(config, global_chunk=16).span == config.shard
