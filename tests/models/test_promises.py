"""The permanent promises of the models: no leak, no silence, one function however
cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hope_jax
from hope_jax.models import cms, convert, lm
from tests.models import small

MODELS = pytest.mark.parametrize("config", small.MODELS.values(), ids=small.MODELS)
LEARNERS = pytest.mark.parametrize(
    "config", [small.HOPE, small.HOPE_ATTENTION], ids=["hope", "hope_attention"]
)


@MODELS
def test_1_no_future_no_other_row_and_the_past_arrives(config):
    tokens = small.some_tokens()
    hope_jax.check_causality(
        lambda t: small.read(config, t)[0],
        jnp.asarray(tokens),
        vocab=small.VOCAB,
        positions=[0, 3, 4, 7, 8, 15, 20],
    )


@MODELS
def test_3_cut_anywhere_saved_and_restored(config):
    """One pass = token by token = pieces of 3 and 7, through bytes in mid-chunk."""
    tokens = small.some_tokens()
    whole, end = small.read(config, tokens)
    for piece in (1, 3, 7):
        state = small.start(config)
        logits = []
        for start in range(0, small.LENGTH, piece):
            part = tokens[:, start : start + piece]
            y, state = small.read(config, part, state, aligned=False)
            logits.append(y)
            leaves, structure = jax.tree.flatten(state)
            stored = [(np.asarray(x).tobytes(), x.dtype, x.shape) for x in leaves]
            state = jax.tree.unflatten(
                structure,
                [np.frombuffer(b, d).reshape(s) for b, d, s in stored],
            )
        np.testing.assert_allclose(np.concatenate(logits, 1), whole, atol=1e-5)
        assert_same_state(state, end)


def assert_same_state(a, b, tolerance=1e-5):
    """But for tokens held from before, which are never read again."""
    drop = lambda s: s._replace(held=None)  # noqa: E731
    for x, y in zip(jax.tree.leaves(drop(a)), jax.tree.leaves(drop(b)), strict=True):
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        np.testing.assert_allclose(x, y, atol=tolerance * (1.0 + np.max(np.abs(y))))


@LEARNERS
def test_3_parallel_pieces_at_the_span(config):
    tokens = small.some_tokens()
    whole, end = small.read(config, tokens)
    assert config.span == 4  # the fastest clock's; slower ones need not stand there
    logits, state = [], None
    for part in (tokens[:, :4], tokens[:, 4:8], tokens[:, 8:]):
        y, state = small.read(config, part, state, aligned=True)
        logits.append(y)
    np.testing.assert_allclose(np.concatenate(logits, 1), whole, atol=1e-5)
    assert_same_state(state, end)


@LEARNERS
def test_3_labels_complete_the_last_chunk_and_change_no_logit(config):
    tokens = small.some_tokens(length=17)
    graphdef, params = small.built(config)
    run = jax.jit(lambda p, t, y: lm.apply(graphdef, p, t, labels=y))
    known, settled = run(params, tokens[:, :16], tokens[:, 1:])
    held, waiting = small.read(config, tokens[:, :16])
    np.testing.assert_allclose(known, held, atol=1e-5)
    assert settled.held.count.tolist() == [0, 0]
    assert waiting.held.count.tolist() == [4, 4]
    after_known, _ = small.read(config, tokens[:, 16:], settled, aligned=False)
    after_held, _ = small.read(config, tokens[:, 16:], waiting, aligned=False)
    np.testing.assert_allclose(after_known, after_held, atol=1e-5)


def mix(first, second):
    """Row 0 of one state beside row 1 of another."""
    return jax.tree.map(
        lambda a, b: jnp.asarray(np.stack([np.asarray(a)[0], np.asarray(b)[1]])),
        first,
        second,
    )


@LEARNERS
def test_3_rows_need_not_stand_at_the_same_place(config):
    """Row 0 has read five tokens more; each row still reads as if it were alone."""
    tokens = small.some_tokens()
    whole = np.asarray(small.read(config, tokens)[0])
    fresh = small.start(config)
    ahead = fresh
    for t in range(5):
        _, ahead = small.read(config, tokens[:, t : t + 1], ahead, aligned=False)
    state = mix(ahead, fresh)
    for t in range(12):
        both = np.stack([tokens[0, t + 5], tokens[1, t]])[:, None]
        logits, state = small.read(config, both, state, aligned=False)
        logits = np.asarray(logits)
        np.testing.assert_allclose(logits[0, 0], whole[0, t + 5], atol=1e-5)
        np.testing.assert_allclose(logits[1, 0], whole[1, t], atol=1e-5)


def half_precision(config):
    """`config` with layers in bfloat16, and their memories, as ever, in float32."""
    return dataclasses.replace(config, layers=1, dtype="bfloat16")


@pytest.fixture
def promoting():
    """Flax's RMSNorm takes bfloat16 with float32, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


HALF = pytest.mark.parametrize(
    "config",
    [half_precision(small.HOPE), half_precision(small.HOPE_ATTENTION)],
    ids=["hope", "hope_attention"],
)


@HALF
@pytest.mark.usefixtures("promoting")
def test_1_in_bfloat16(config):
    """Bit for bit, as in float32."""
    test_1_no_future_no_other_row_and_the_past_arrives(config)


@HALF
@pytest.mark.usefixtures("promoting")
def test_3_cut_in_bfloat16(config):
    """A product's sums in another order may round to a neighbour, 2**-8 of it away.

    Some such roundings on the way to logits below 4 make 2**-5; what the memories and
    levels learn moves them ten times as far.
    """
    tokens = small.some_tokens()
    whole, end = small.read(config, tokens)
    still, _ = small.read(config, tokens, learn=False)
    assert np.abs(whole - still).max() > 10 * 2**-5
    for piece in (1, 7):
        state = small.start(config)
        logits = []
        for start in range(0, small.LENGTH, piece):
            part = tokens[:, start : start + piece]
            y, state = small.read(config, part, state, aligned=False)
            logits.append(y)
        np.testing.assert_allclose(np.concatenate(logits, 1), whole, atol=2**-5)
        assert_same_state(state, end, tolerance=2**-7)


@HALF
@pytest.mark.usefixtures("promoting")
def test_3_rows_in_bfloat16(config):
    """Row 0 stands five tokens on; bit for bit the same row as beside itself."""
    tokens = small.some_tokens()
    fresh = small.start(config)
    ahead = fresh
    for t in range(5):
        _, ahead = small.read(config, tokens[:, t : t + 1], ahead, aligned=False)
    mixed = mix(ahead, fresh)
    for t in range(8):
        row_0, row_1 = tokens[:1, t + 5], tokens[1:, t]
        both = np.concatenate([row_0, row_1])[:, None]
        logits, mixed = small.read(config, both, mixed, aligned=False)
        on, ahead = small.read(config, tokens[:, t + 5, None], ahead, aligned=False)
        back, fresh = small.read(config, tokens[:, t, None], fresh, aligned=False)
        np.testing.assert_array_equal(logits[0], on[0])
        np.testing.assert_array_equal(logits[1], back[1])


def test_4_reading_without_labels_changes_the_memory():
    tokens = small.some_tokens()
    before = small.start(small.HOPE)
    _, after = small.read(small.HOPE, tokens)
    moved = lambda s: (s.blocks.mixer, s.blocks.fast[:2], s.levels[2].learned)  # noqa: E731
    for a, b in zip(
        jax.tree.leaves(moved(before)), jax.tree.leaves(moved(after)), strict=True
    ):
        assert not np.array_equal(a, b)


def test_4_what_is_read_first_changes_what_is_learned_next():
    tokens = small.some_tokens()
    start = small.start(small.HOPE)

    def change(*parts):
        state = start
        for part in parts:
            _, state = small.read(small.HOPE, part, state, aligned=False)
        weights = lambda s: s.blocks.mixer.main.weights["w1"]  # noqa: E731
        return weights(state) - weights(start)

    first, second = tokens[:, :7], tokens[:, 7:14]
    both, apart = change(first, second), change(first) + change(second)
    assert np.max(np.abs(both - apart)) > 1e-4


@LEARNERS
def test_5_a_slow_level_receives_the_sum_of_its_own_tokens_gradients(config):
    """Seen before it moves: 7 tokens of its 8, while the fast level has moved once."""
    tokens = small.some_tokens()
    state = small.start(config)
    for t in range(9):
        if t in (4, 8):  # a chunk is settled when the next token arrives
            held = state
        _, state = small.read(config, tokens[:, t : t + 1], state, aligned=False)
        if t == 4:
            first = gradient_of_chunk(config, held, tokens[:, 0:4], tokens[:, 1:5])
            got = state.levels[1].learned.gradient
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, first
            )
            moved = jax.tree.map(
                lambda a, b: np.abs(a - b).max(), state.blocks.fast, held.blocks.fast
            )
            assert min(jax.tree.leaves(moved[0])) > 0
            assert max(jax.tree.leaves(moved[1])) == 0
    second = gradient_of_chunk(config, held, tokens[:, 4:8], tokens[:, 5:9])
    total = jax.tree.map(jnp.add, first, second)
    assert_moved_by(config, held, state, total, level=1)


def gradient_of_chunk(config, state, tokens, labels):
    """By the definition: the loss of four tokens in the slower level's weights."""
    gradient = _slope(config)(small.built(config)[1], state, tokens, labels)
    return jax.tree.map(lambda g: jnp.swapaxes(g, 0, 1), gradient)


@functools.cache
def _slope(config):
    def slope(params, state, tokens, labels):
        model = nnx.merge(small.graph(config), params)
        inside = lm._layers_first(state)

        def loss(slow):
            fast = (inside.blocks.fast[0], slow, inside.blocks.fast[2])
            mixers = config.full(inside.held.mixers)
            logits, *_ = lm._read(model, tokens, mixers, fast, aligned=True, learn=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.sum()

        return jax.grad(loss)(inside.blocks.fast[1])

    return jax.jit(slope)


def assert_moved_by(config, before, after, gradient, level):
    """Equation 71 for one row at a time: clipped mean gradient times the rate."""
    graphdef, params = small.built(config)
    rate = float(nnx.merge(graphdef, params).inner_rates()[level])
    mean = jax.tree.map(lambda g: g / config.cms.levels[level].period, gradient)
    leaves = [np.asarray(g) for g in jax.tree.leaves(mean)]
    norm = np.sqrt(sum((g**2).sum(axis=tuple(range(1, g.ndim))) for g in leaves))
    scale = rate * np.minimum(1.0, config.cms.clip / norm)
    got = zip(
        jax.tree.leaves(before.blocks.fast[level]),
        jax.tree.leaves(after.blocks.fast[level]),
        leaves,
        strict=True,
    )
    for a, b, g in got:
        step = scale.reshape(-1, *[1] * (g.ndim - 1)) * g
        np.testing.assert_allclose(a - b, step, atol=2e-5)


@LEARNERS
def test_6_no_inner_rate_is_the_static_model(config):
    """Read in chunks with learned rates of zero, against a model without fast levels;
    the mixers still learn."""
    tokens = small.some_tokens()
    _, params = small.built(config)
    zero = jax.tree_util.tree_map_with_path(
        lambda path, w: jnp.full_like(w, -1e9) if "rates" in str(path) else w, params
    )
    in_chunks, _ = small.reading(config)(zero, tokens, None)
    static = small.without_rates(config)
    assert not static.fast
    in_one, _ = small.reading(static)(small.drop_rates(params), tokens, None)
    np.testing.assert_allclose(in_chunks, in_one, atol=1e-5)
    moving, _ = small.read(config, tokens)
    assert np.abs(moving - in_one)[:, 5:].max() > 1e-3


def test_6_level_stacking_keeps_every_logit_bit_for_bit():
    """The Transformer's MLPs as levels of three clocks: at rate 0 nothing changes."""
    tokens = small.some_tokens()
    _, params = small.built(small.TRANSFORMER)
    trained, _ = small.read(small.TRANSFORMER, tokens)

    def stacked(rate):
        levels = [cms.CMSLevel(period=p, rate=rate) for p in (4, 8, 128)]
        config, weights = convert.stack_levels(
            small.TRANSFORMER, params, levels, assignment=[0, 1]
        )
        return small.reading(config)(weights, tokens, None)[0]

    np.testing.assert_array_equal(stacked(0.0), trained)
    learning = stacked(0.5)
    np.testing.assert_allclose(learning[:, :4], trained[:, :4], atol=1e-5)
    assert np.abs(learning - trained)[:, 4:].max() > 1e-3


def test_6_level_stacking_refuses_what_it_cannot_place():
    _, params = small.built(small.TRANSFORMER)
    levels = [cms.CMSLevel(period=4)]
    with pytest.raises(
        ValueError, match=r"in 0..0 for each of the 2 layers, got \[0\]"
    ):
        convert.stack_levels(small.TRANSFORMER, params, levels, assignment=[0])
    with pytest.raises(ValueError, match="one MLP a block .* got 3"):
        convert.stack_levels(small.HOPE_ATTENTION, params, levels)


@LEARNERS
def test_6_frozen_reads_as_the_initial_states(config):
    tokens = small.some_tokens()
    start = small.start(config)
    _, after = small.read(config, tokens, learn=False)
    kept = lambda s: (s.blocks.fast, getattr(s.blocks.mixer, "main", ()))  # noqa: E731
    for a, b in zip(
        jax.tree.leaves(kept(start)), jax.tree.leaves(kept(after)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


@LEARNERS
def test_6_a_chunk_read_in_part_without_learning_teaches_nothing(config):
    """Token 2 of the first chunk is read frozen; the second chunk teaches again."""
    tokens = small.some_tokens()
    state = small.start(config)
    moved = []
    for t in range(9):
        before = state.blocks.fast
        part = tokens[:, t : t + 1]
        _, state = small.read(config, part, state, aligned=False, learn=t != 2)
        same = jax.tree.map(np.array_equal, before, state.blocks.fast)
        moved.append(not all(jax.tree.leaves(same)))
    assert [t for t in range(9) if moved[t]] == [8]


def test_7_half_life_at_the_start_is_at_least_the_chunk():
    _, params = small.built(small.HOPE)
    bias = params["blocks"]["mixer"]["bias_alpha"][...]
    half_life = -np.log(2) / np.log(jax.nn.sigmoid(bias))
    assert half_life.min() >= small.HOPE.mixer.projection_chunk


@LEARNERS
def test_cms_moves_on_its_clock_and_only_then(config):
    """Level l moves floor((tokens - 1) / period) times; before that nothing changes."""
    tokens = small.some_tokens()
    state = small.start(config)
    moves = np.zeros(2, int)
    for t in range(small.LENGTH):
        before = state.blocks.fast
        _, state = small.read(config, tokens[:, t : t + 1], state, aligned=False)
        for level in range(2):
            same = jax.tree.map(np.array_equal, before[level], state.blocks.fast[level])
            moves[level] += not all(jax.tree.leaves(same))
            due = t > 0 and t % (4, 8)[level] == 0
            assert all(jax.tree.leaves(same)) != due
    assert moves.tolist() == [20 // 4, 20 // 8]


@MODELS
def test_reads_compile_once_and_state_size_is_constant(config):
    run = small.reading(config)
    _, params = small.built(config)
    _, state = run(params, small.some_tokens(0), None)
    compiled = run._cache_size()
    run(params, small.some_tokens(1), None)
    assert run._cache_size() == compiled
    graphdef = small.built(config)[0]
    longer = jax.eval_shape(
        lambda t: lm.apply(graphdef, params, t)[1], small.some_tokens(length=33)
    )
    same = jax.tree.map(lambda a, b: a.shape == b.shape, state, longer)
    assert all(jax.tree.leaves(same))
    assert all(x.shape[0] == 2 for x in jax.tree.leaves(state))
