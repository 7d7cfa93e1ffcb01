"""Every published mixer by its name: one function in any pieces, causal, row by row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.memory import named
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.attention import Attention
from hope_jax.models.mixers.memory import MemoryMixer, MemoryMixerConfig

D, HEADS, ROWS, LENGTH, CHUNK = 8, 2, 2, 10, 4
SIZES = (1, 3, 7)


@functools.cache
def build(name, dtype=jnp.float32):
    """The mixer with every parameter moved from where it starts."""
    point = named.get(name)
    if point.memory is None:
        window = LENGTH if name == "softmax_attention" else 3
        layer = Attention(D, HEADS, window, dtype, rngs=nnx.Rngs(0))
    else:
        chunk = min(CHUNK, point.memory.chunk)
        memory = dataclasses.replace(point.memory, chunk=chunk, expansion=2)
        config = MemoryMixerConfig(memory=memory, gates=point.gates, conv=3, rank=2)
        layer = MemoryMixer(D, HEADS, config, dtype, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer, nnx.Param)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    shaken = jax.tree.map(
        lambda w: w + 0.2 * jax.random.normal(next(keys), w.shape, w.dtype), params
    )
    return graphdef, shaken


@functools.cache
def compiled(name, aligned):
    graphdef, _ = build(name)
    return jax.jit(
        lambda params, x, state: nnx.merge(graphdef, params)(x, state, aligned=aligned)
    )


def texts(seed=2):
    return jax.random.normal(jax.random.key(seed), (ROWS, LENGTH, D))


def read(name, x, state=None, aligned=False):
    graphdef, params = build(name)
    if state is None:
        state = nnx.merge(graphdef, params).initial_state(ROWS)
    return compiled(name, aligned)(params, x, state)


def close(a, b):
    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        scale = 1.0 + np.max(np.abs(b), initial=0.0)
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-5, rtol=0)

    jax.tree.map(compare, a, b)


def test_every_point_is_a_mixer():
    assert set(named.POINTS) <= set(MIXERS)


@pytest.mark.parametrize("name", named.POINTS)
def test_pieces_make_the_whole(name):
    """Pieces of 1, 3 and 7 tokens with a save after each, also in mid-chunk; reading
    again with new values compiles nothing."""
    x = texts()
    expected, end = read(name, x, aligned=True)
    assert np.isfinite(expected).all()
    for size in SIZES:
        state, reads = None, []
        for begin in range(0, LENGTH, size):
            y, state = read(name, x[:, begin : begin + size], state)
            state = jax.device_put(jax.device_get(state))
            reads.append(y)
        close(jnp.concatenate(reads, axis=1), expected)
        close(state, end)
    assert compiled(name, False)._cache_size() == len(SIZES)


@pytest.mark.parametrize("name", named.POINTS)
def test_no_output_sees_the_future_or_another_row(name):
    """Bit for bit; and the first token reaches the last output where nothing forgets
    it by design."""
    x = texts()
    y, _ = read(name, x, aligned=True)
    for place in (0, 5):
        other = x.at[0, place].add(1.0)
        changed, _ = read(name, other, aligned=True)
        np.testing.assert_array_equal(changed[0, :place], y[0, :place])
        np.testing.assert_array_equal(changed[1], y[1])
        assert np.any(changed[0, place] != y[0, place])
        if place == 0 and name != "sliding_window":
            assert np.any(changed[0, -1] != y[0, -1])
    assert compiled(name, True)._cache_size() == 1


@pytest.mark.parametrize("name", named.POINTS)
def test_state_stays_float32_in_bfloat16(name):
    graphdef, params = build(name, jnp.bfloat16)

    def run(params, x):
        layer = nnx.merge(graphdef, params)
        return layer(x, layer.initial_state(ROWS), aligned=True)

    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix the two
        y, state = jax.eval_shape(run, params, texts().astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    if named.get(name).memory is not None:  # attention keeps keys, which do not add up
        for leaf in jax.tree.leaves(state.memory):
            assert leaf.dtype in (jnp.float32, jnp.int32)
