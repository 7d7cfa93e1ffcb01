"""What every mixer of the registry promises; a new one is found unasked.

Each is compiled once for a whole text and once for pieces of 1, 3 and 7 tokens, and all
promises are asked of these four programs.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.kernels.select import memory_scan
from hope_jax.memory import named
from hope_jax.memory.compose import with_choices
from hope_jax.memory.consolidation import Consolidation
from hope_jax.memory.state import MemoryState
from hope_jax.models import lm
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.models.mixers.memory import NamedConfig
from hope_jax.models.mixers.self_modifying import MATRIX
from hope_jax.models.rotary import Llama3
from hope_jax.stream import saved, slots
from tests import compare

close = compare.within_size(2e-5)

D, HEADS, ROWS, LENGTH = 8, 2, 2, 13
ORDERS = ((1, 3, 7, 1, 1), (7, 3, 1, 1, 1))  # of pieces
FORGETS = ("sliding_window",)  # the first token by design
_MEMORY = dict(chunk=2, expansion=2)
_TITANS = dict(memory=_MEMORY, persistent=3, conv=3)
# Sizes at which clocks turn within the text. A mixer that is not here is asked as it
# is, at its default.
SMALL = {
    "self_modifying": dict(memory=_MEMORY, projection_chunk=4),
    "attention": dict(context=LENGTH),
    "softmax_attention": dict(
        context=LENGTH, kv_heads=1, head_dim=6, qk_norm=1e-6, rotary=Llama3(original=4)
    ),
    "sliding_window": dict(window=3, kv_heads=1, qkv_bias=True, out_bias=True),
    "memory": dict(memory=_MEMORY, conv=3, rank=2),
    "titans_mac": _TITANS | dict(segment=4),
    "titans_mag": _TITANS | dict(window=3),
    "titans_mal": _TITANS | dict(window=3),
    "tnt": dict(
        memory=dict(expansion=2), global_chunk=8, local_chunks=(2, 4), shard=4, conv=3
    ),
    "in_place_ttt": dict(chunk=4, expansion=1),
    "memory_caching": dict(
        memory=_MEMORY, conv=3, segment=4, context=16, aggregate="sparse", top=2
    ),
}
STARTS = (
    Consolidation(period=4, rate=0.5, half_life=16.0),
    Consolidation(period=8, rate=0.3, half_life=64.0),
)
_RETURNS = _MEMORY | dict(toward="start")
# The same with slower starts, under names of their own.
CONSOLIDATING = {
    "self_modifying, consolidated": SMALL["self_modifying"],
    "memory, consolidated": dict(
        memory=_RETURNS | dict(architecture="linear", rule="gd", gradient="exact")
    ),
    "titans_mac, consolidated": SMALL["titans_mac"] | dict(memory=_RETURNS),
}
VARIANTS = {
    "self_modifying, two writes": dict(
        memory=vars(MATRIX) | dict(chunk=2, steps=2),
        projection_chunk=4,
        rate=2.0,
    ),
    "self_modifying, a gate of erasure": dict(
        memory=vars(MATRIX) | dict(chunk=2), projection_chunk=4, erase="gate"
    ),
}
KINDS = (*MIXERS, *CONSOLIDATING, *VARIANTS)
each = pytest.mark.parametrize("kind", KINDS)


def configured(kind):
    config = MIXERS.get(kind.partition(",")[0])
    changes = dict(SMALL.get(kind, VARIANTS.get(kind, {})))
    if kind in CONSOLIDATING:
        changes = CONSOLIDATING[kind] | dict(consolidate=STARTS)
    if isinstance(config, NamedConfig):
        changes["chunk"] = min(4, config.layer.memory.chunk)
    if "memory" in changes:
        changes["memory"] = with_choices(config.memory, **changes["memory"])
    return dataclasses.replace(config, **changes)


def abstract(kind, dtype=jnp.float32):
    build = configured(kind).build
    layer = nnx.eval_shape(lambda: build(D, HEADS, dtype, rngs=nnx.Rngs(0)))
    return nnx.split(layer, nnx.Param)


@functools.cache
def built(kind):
    """The mixer with every parameter moved from where it starts."""
    layer = configured(kind).build(D, HEADS, jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer, nnx.Param)
    rng = np.random.default_rng(1)

    def moved(w):
        return jnp.asarray(w + np.float32(0.2 * rng.normal(size=w.shape)), w.dtype)

    return graphdef, jax.tree.map(moved, jax.device_get(params))


@functools.cache
def program(kind, aligned):
    graphdef, _ = built(kind)
    return jax.jit(
        lambda params, x, state: nnx.merge(graphdef, params)(x, state, aligned=aligned)
    )


@functools.cache
def start(kind):
    graphdef, params = built(kind)
    return jax.jit(lambda p: nnx.merge(graphdef, p).initial_state(ROWS))(params)


def read(kind, x, state=None, aligned=False):
    state = jax.tree.map(jnp.asarray, start(kind) if state is None else state)
    y, state = program(kind, aligned)(built(kind)[1], jnp.asarray(x), state)
    return np.asarray(y), state


def text(seed=2):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=(ROWS, LENGTH, D)))


def other(x, row=slice(None), place=slice(None)):
    """`x` with other values at some place."""
    x = x.copy()
    x[row, place] += np.linspace(0.5, 1.5, D, dtype=np.float32)
    return x


def test_every_published_memory_is_a_mixer():
    assert set(named.POINTS) <= set(MIXERS)


@each
def test_pieces_make_the_whole(kind):
    """Of 1, 3 and 7 tokens, saved after each, also in mid-chunk. A state is arrays that
    lead with rows, of one shape and type for ever."""
    x = text()
    expected, end = read(kind, x, aligned=True)
    chex.assert_tree_all_finite(expected)
    for order in ORDERS:
        state, reads, place = start(kind), [], 0
        first = state
        for size in order:
            y, state = read(kind, x[:, place : place + size], state)
            place += size
            reads.append(y)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
            state = jax.device_put(jax.device_get(state))
        close(np.concatenate(reads, axis=1), expected)
        close(state, end)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {ROWS}


@each
@pytest.mark.parametrize("aligned", [True, False])
def test_no_output_sees_the_future_or_another_row(kind, aligned):
    """Bit for bit."""
    x = text() if aligned else text()[:, :7]
    y, _ = read(kind, x, aligned=aligned)
    for place in (1, 5, x.shape[1] - 1):
        z, _ = read(kind, other(x, place=place), aligned=aligned)
        chex.assert_trees_all_equal(z[:, :place], y[:, :place])
        assert np.all(np.any(z[:, place] != y[:, place], axis=-1))
    before = read(kind, x, aligned=aligned)
    after = read(kind, other(x, row=1), aligned=aligned)
    first = lambda tree: jax.tree.map(lambda a: np.asarray(a)[0], tree)  # noqa: E731
    chex.assert_trees_all_equal(first(after), first(before))
    assert np.any(after[0][1] != y[1])


@each
def test_the_first_token_reaches_the_last_output(kind):
    x = text()
    y, _ = read(kind, x, aligned=True)
    z, _ = read(kind, other(x, place=0), aligned=True)
    assert (np.abs(z - y)[:, -1].max() > 1e-6) == (kind not in FORGETS)


@each
def test_rows_stand_where_they_stand(kind):
    """Rows at different places of their chunks go on as each would by itself."""
    x = text()
    expected, _ = read(kind, x, aligned=True)
    _, behind = read(kind, x[:, :3])
    _, ahead = read(kind, x[:, 3:6], behind)
    mixed = jax.tree.map(
        lambda a, b: np.stack([np.asarray(a)[0], np.asarray(b)[1]]), ahead, behind
    )
    y, _ = read(kind, np.stack([x[0, 6:], x[1, 3:10]]), mixed)
    close(y, np.stack([expected[0, 6:], expected[1, 3:10]]))


@each
def test_memories_stay_in_float32(kind):
    """In a layer of bfloat16, whose types are the same after reading as before."""
    graphdef, params = abstract(kind, jnp.bfloat16)

    def run(params, x):
        layer = nnx.merge(graphdef, params)
        before = layer.initial_state(ROWS)
        return before, *layer(x, before, aligned=True)

    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix the two
        before, y, after = jax.eval_shape(run, params, text().astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, before, after)
    assert jax.tree.all(same)
    memories = [
        leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(after)
        if any(f".{part}" in jax.tree_util.keystr(path) for part in KEPT)
    ]
    assert set(memories) <= {jnp.dtype("float32")}
    if any(part.period for part in configured(kind).parts):
        assert jnp.dtype("float32") in {leaf.dtype for leaf in jax.tree.leaves(after)}


KEPT = ("weights", "momentum", "anchor", "values", "keys", "starts")  # of a memory


@each
def test_new_values_do_not_compile_again(kind):
    """Runs last: by now each program has been called with many values."""
    if program(kind, True)._cache_size() == 0:  # asked alone
        test_pieces_make_the_whole(kind)
    read(kind, text(7), aligned=True)
    assert program(kind, True)._cache_size() == 1
    assert program(kind, False)._cache_size() <= len(set(sum(ORDERS, ())))


def test_memories_are_those_of_the_parts_that_learn():
    for kind in KINDS:
        config = configured(kind)
        if config.memories:
            assert len(config.memories) == len(config.learns), kind


@each
def test_a_session_finds_the_weights_of_every_part_that_learns(kind):
    model = ModelConfig(
        d_model=D, heads=HEADS, layers=2, mixer=(configured(kind), AttentionConfig())
    )
    graphdef, params = lm.abstract_model(model)

    def weights(params):
        state = lm.initial_state(graphdef, params, ROWS)
        return slots.memories(model, params, state)

    found = jax.eval_shape(weights, params)
    assert len(found) == len(slots.names(model))
    assert all(leaf.shape[:2] == (ROWS, 1) for leaf in jax.tree.leaves(found))


@each
def test_a_session_can_be_a_file(kind, tmp_path):
    leaves = jax.tree_util.tree_leaves_with_path(start(kind))
    arrays = {jax.tree_util.keystr(path): np.asarray(a) for path, a in leaves}
    saved.write(tmp_path / "one.safetensors", arrays, {})
    found, _ = saved.read(tmp_path / "one.safetensors", arrays)
    jax.tree.map(np.testing.assert_array_equal, found, arrays)


@pytest.mark.parametrize(
    "kind", [k for k in (*SMALL, *VARIANTS) if configured(k).memories]
)
def test_a_memory_is_where_what_it_was_given_takes_it(kind):
    """`watch` is a call, and its tokens, lived through by `memory_scan`, end there."""
    config, (graphdef, params) = configured(kind), built(kind)
    x, begun = jnp.asarray(text()[:, :4]), start(kind)

    @jax.jit
    def watch(params, state):
        layer = nnx.merge(graphdef, params)
        y, after, written = layer.watch(x, state, aligned=True)
        return y, after, written, layer(x, state, aligned=True)

    y, after, written, (expected, _) = watch(params, begun)
    close(y, expected)
    is_memory = lambda node: isinstance(node, MemoryState)  # noqa: E731
    memories = lambda state: [  # noqa: E731
        node for node in jax.tree.leaves(state, is_leaf=is_memory) if is_memory(node)
    ]
    before, ends = memories(begun), memories(after)
    if config.modifies_itself:  # those of the projections are of one batch

        def apart(batch, main):
            each = range(len(written) - 1)
            own = [jax.tree.map(lambda a, i=i: a[:, :, i], batch) for i in each]
            return [*(one._replace(anchor=one.weights) for one in own), main]

        before, ends = apart(*before), apart(*ends)
    for memory, tokens, old, new in zip(
        config.memories, written, before, ends, strict=True
    ):
        if memory.gradient == "exact":
            old = old._replace(anchor=None)

        def live(old, tokens, memory=memory):
            return memory_scan(memory, old, tokens, start=old.weights)[0].weights

        lived = jax.jit(jax.vmap(jax.vmap(live)))(old, tokens)
        jax.tree.map(close, lived, new.weights)
