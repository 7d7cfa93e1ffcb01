"""Titans' three variants are their definitions and keep the promises of a layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.memory.compose import MemoryConfig, with_choices
from hope_jax.memory.gates import GateConfig
from hope_jax.models.layers import rotary
from hope_jax.models.mixers.titans import (
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    TitansContextConfig,
    TitansWindowConfig,
)
from tests import compare
from tests.models import small

close = compare.within_size(1e-5)

D, HEADS, ROWS = 8, 2, 2
VARIANTS = {"context": MemoryAsContext, "gate": MemoryAsGate, "layer": MemoryAsLayer}


def configured(variant, persistent=3, segment=4, window=3, conv=3, **memory):
    options = MemoryConfig(chunk=2, expansion=2, rule="momentum", dgd="none")
    memory = with_choices(options, **memory)
    shared = dict(memory=memory, persistent=persistent, conv=conv)
    if variant == "context":
        return TitansContextConfig(segment=segment, **shared)
    kind = {"gate": "titans_mag", "layer": "titans_mal"}[variant]
    return TitansWindowConfig(kind=kind, window=window, **shared)


@functools.cache
def build(variant, config, dtype=jnp.float32):
    """A layer none of whose parameters is at a special value, as pure functions."""
    layer = VARIANTS[variant](D, HEADS, config, dtype, rngs=nnx.Rngs(0))
    return small.shaken(layer)


def silenced(params):
    """A layer whose memory recalls zero, whatever it learns."""
    params = nnx.clone(params)
    params["memory"]["out"]["kernel"] = jax.tree.map(
        jnp.zeros_like, params["memory"]["out"]["kernel"]
    )
    return params


def tokens(length, seed=2):
    return small.drawn(ROWS, length, D, seed=seed)


def reader(graphdef, params):
    """`read(x, state)`, compiled once a length, whatever the parameters."""
    start = small.begun(graphdef, params, ROWS)

    def read(x, state=start, aligned=False, learn=True):
        y, state = run(graphdef, params, x, state, aligned, learn)
        return np.asarray(y), state

    return read


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def run(graphdef, params, x, state, aligned, learn):
    return nnx.merge(graphdef, params)(x, state, aligned=aligned, learn=learn)


@pytest.fixture(scope="module", params=VARIANTS)
def layer(request):
    return reader(*build(request.param, configured(request.param)))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def naive_attention(heads, x, position, sources, source_positions, visible, persistent):
    """One softmax over persistent vectors and visible sources, `[B, T, D]`."""
    split = lambda a: a.reshape(*a.shape[:2], HEADS, D // HEADS)  # noqa: E731
    q, k, v = split(heads.q(x)), split(heads.k(sources)), split(heads.v(sources))
    k_p, v_p = split(heads.k(persistent)), split(heads.v(persistent))
    near = jnp.einsum(
        "bthk,bshk->btsh", rotary(q, position), rotary(k, source_positions)
    )
    weight = jnp.exp(near * (D // HEADS) ** -0.5)
    weight = jnp.where(visible[None, :, :, None], weight, 0.0)
    far = jnp.exp(jnp.einsum("bthk,bshk->btsh", q, k_p) * (D // HEADS) ** -0.5)
    total = jnp.sum(weight, axis=2) + jnp.sum(far, axis=2)
    y = jnp.einsum("btsh,bshk->bthk", weight, v)
    y = (y + jnp.einsum("btsh,bshk->bthk", far, v_p)) / total[..., None]
    return y.reshape(x.shape)


def joined(layer, y, recalled):
    gate = jax.nn.sigmoid(layer.join.norm_recalled(recalled))
    return layer.join.out(layer.join.norm_y(y) * gate)


def everywhere(x):
    """Positions of x, as if counted from 5: only differences matter."""
    return 5 + jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])


def repeated(layer, rows):
    return jnp.broadcast_to(
        layer.persistent[...][None], (rows, *layer.persistent.shape)
    )


def context_reference(layer, x):
    """Token by token: h from the memory at the segment's start, attention over all that
    was read of the segment, then the memory learns what attention gave."""
    rows, length, _ = x.shape
    segment, persistent = layer.config.segment, repeated(layer, rows)
    position = everywhere(x)

    def step(carry, t):
        memory, start, tails, h = carry
        begins = t % segment == 0
        start = jax.tree.map(
            lambda a, b: jnp.where(begins, a, b), memory.memory.weights, start
        )
        x_t = jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)
        asked = memory._replace(
            memory=memory.memory._replace(weights=start), tails=tails
        )
        h_t, asked = layer.memory(x_t, asked, learn=False)
        h = jax.lax.dynamic_update_slice_in_dim(h, h_t, t, axis=1)
        s = jnp.arange(length)
        seen = (s <= t) & (s >= t - t % segment)
        y_t = naive_attention(
            layer.heads,
            x_t,
            jax.lax.dynamic_slice_in_dim(position, t, 1, axis=1),
            jnp.concatenate([h, x], axis=1),
            jnp.concatenate([position, position], axis=1),
            jnp.concatenate([seen, seen])[None],
            persistent,
        )
        recalled, memory = layer.memory(y_t, memory)
        y = joined(layer, y_t, recalled)
        return (memory, start, asked.tails, h), y[:, 0]

    memory = layer.memory.initial_state(rows)
    carry = memory, memory.memory.weights, memory.tails, jnp.zeros_like(x)
    (memory, *_), y = jax.lax.scan(step, carry, jnp.arange(length))
    return jnp.moveaxis(y, 0, 1), memory.memory.weights


def sliding(layer, x, persistent):
    window, t = layer.config.window, jnp.arange(x.shape[1])
    age = t[:, None] - t[None]
    visible, position = (age >= 0) & (age < window), everywhere(x)
    return naive_attention(layer.heads, x, position, x, position, visible, persistent)


def gate_reference(layer, x):
    persistent = repeated(layer, len(x))
    recalled, state = layer.memory(jnp.concatenate([persistent, x], axis=1))
    y = sliding(layer, x, persistent)
    y = joined(layer, y, recalled[:, persistent.shape[1] :])
    return y, state.memory.weights


def layer_reference(layer, x):
    persistent = repeated(layer, len(x))
    recalled, state = layer.memory(jnp.concatenate([persistent, x], axis=1))
    count = persistent.shape[1]
    y = sliding(layer, recalled[:, count:], recalled[:, :count])
    return layer.out(y), state.memory.weights


REFERENCES = {
    "context": context_reference,
    "gate": gate_reference,
    "layer": layer_reference,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_is_its_definition(variant):
    """Outputs, memory, and the pullback of both in every parameter and input.

    Two persistent vectors are a chunk of the memory, so the text before the text may
    be written as one with it.
    """
    config = configured(variant, persistent=2, architecture="linear", rule="gd")
    graphdef, params = build(variant, config)
    x = tokens(11)

    def fast(layer, x):
        y, state = layer(x)
        return y, state.memory.memory.weights

    @jax.jit
    def both(*args):
        def through(run):
            return lambda p, x: run(nnx.merge(graphdef, p), x)

        runs = [through(run) for run in (fast, REFERENCES[variant])]
        return [small.value_and_pullback(run, *args) for run in runs]

    ours, theirs = jax.device_get(both(params, x))
    close(ours, theirs)
    for path, gradient in nnx.to_flat_state(ours[1][0]):
        assert np.any(gradient[...] != 0), path
        assert np.all(np.isfinite(gradient[...])), path


def test_a_state_between_segments_goes_on_in_parallel(layer):
    x = tokens(13)
    expected, end = layer(x, aligned=True)
    y, state = layer(x[:, :8], aligned=True)
    rest, state = layer(x[:, 8:], state, aligned=True)
    close(np.concatenate([y, rest], axis=1), expected)
    close(state, end)


@pytest.mark.parametrize("aligned, length, read", [(True, 13, 8), (False, 12, 6)])
def test_without_learning_the_memory_stays(layer, aligned, length, read):
    x = tokens(length)
    _, state = layer(x[:, :read], aligned=aligned)
    y, after = layer(x[:, read:], state, aligned=aligned, learn=False)
    equal(after.memory.memory.weights, state.memory.memory.weights)
    assert int(after.memory.position[0]) == length
    learned, _ = layer(x[:, read:], state, aligned=aligned)
    assert np.any(y != learned)


def test_context_without_memory_is_attention_in_blocks():
    """Nothing passes from a segment to the next but what the memory recalls."""
    graphdef, params = build("context", configured("context"))
    x = tokens(8)
    for silent in (False, True):
        read = reader(graphdef, silenced(params) if silent else params)
        y, _ = read(x, aligned=True)
        alone, _ = read(x[:, 4:], aligned=True)
        gap = np.max(np.abs(y[:, 4:] - alone))
        assert (gap == 0.0) == silent


@pytest.mark.parametrize("window, length", [(3, 13), (4, 12), (16, 13)])
def test_a_gate_without_memory_looks_back_one_window(window, length):
    graphdef, params = build("gate", configured("gate", window=window))
    read = reader(graphdef, silenced(params))
    x = tokens(length)
    y, _ = read(x, aligned=True)
    other = x.copy()
    other[:, 2] += 1.0
    z, _ = read(other, aligned=True)
    changed = np.any(z != y, axis=(0, 2))
    expected = [2 <= t < 2 + window for t in range(length)]
    assert changed.tolist() == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_persistent_tokens_may_be_none(variant):
    graphdef, params = build(variant, configured(variant, persistent=0))
    read = reader(graphdef, params)
    x = tokens(5)
    y, _ = read(x, aligned=True)
    one, state = read(x[:, :1])
    close(one, y[:, :1])
    assert np.isfinite(y).all()


@pytest.mark.parametrize("variant", ["gate", "layer"])
def test_the_memory_reads_the_persistent_tokens_first(variant):
    graphdef, params = build(variant, configured(variant, persistent=3))

    @jax.jit
    def both(params):
        layer = nnx.merge(graphdef, params)
        _, read = layer.memory(repeated(layer, ROWS))
        return layer.initial_state(ROWS).memory, read

    start, read = both(params)
    close(start.memory.weights, read.memory.weights)
    close(start.tails, read.tails)
    equal(start.memory.anchor, start.memory.weights)  # the text begins a chunk
    assert start.position.tolist() == [0, 0]


def test_long_monotonous_texts_stay_bounded():
    """2,048 tokens of nearly one direction at the highest rate, nothing forgotten."""
    config = configured("gate", chunk=8, window=8)
    layer = MemoryAsGate(D, HEADS, config, jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer, nnx.Param)
    for gate in ("eta", "alpha"):
        bias = params["memory"][gate]["up"]["bias"]
        params["memory"][gate]["up"]["bias"] = jax.tree.map(lambda b: b + 20.0, bias)
    noise = tokens(2048, 0)
    x = np.float32(3.0) * noise[:, :1] + np.float32(0.3) * noise
    y, state = jax.jit(lambda x: nnx.merge(graphdef, params)(x))(x)
    assert np.isfinite(y).all()
    for weights in state.memory.memory.weights.values():
        assert np.abs(weights).max() < 10.0


@pytest.mark.parametrize(
    "variant, options, message",
    [
        ("context", dict(segment=0), "segment must be at least 1, got 0"),
        ("layer", dict(window=0), "window must be at least 1, got 0"),
        ("gate", dict(persistent=-1), "persistent must be at least 0, got -1"),
        (
            "context",
            dict(segment=3),
            r"segment \(3\) must be a multiple of memory.chunk \(2\)",
        ),
        ("layer", dict(conv=0), "conv must be at least 1, got 0"),
    ],
)
def test_configs_that_cannot_be(variant, options, message):
    with pytest.raises(ValueError, match=message):
        configured(variant, **options)


def test_gates_must_fit_the_memory():
    with pytest.raises(ValueError, match="gates.rate='step' has no bound"):
        TitansContextConfig(gates=GateConfig(rate="step"))


@pytest.mark.parametrize("heads", [3, 8])
def test_heads_must_be_even(heads):
    with pytest.raises(ValueError, match=rf"an even multiple of heads \({heads}\)"):
        MemoryAsGate(D, heads, configured("gate"), jnp.float32, rngs=nnx.Rngs(0))


def test_defaults_are_the_papers_memory():
    memory = TitansContextConfig().memory
    assert dataclasses.replace(memory, chunk=1) == MemoryConfig(
        architecture="mlp",
        bias="l2",
        retention="decay",
        rule="momentum",
        dgd="none",
        chunk=1,
    )
