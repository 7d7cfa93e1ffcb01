"""Which CMS levels move is decided by the tokens that were read, however they come.

Periods of 4, 8 and 32 tokens and texts of 112 stand for 256 ... 1,048,576 and 10M.
Lengths of texts and pieces are of few kinds, as every kind is compiled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hope_jax
from hope_jax import optim
from hope_jax.core.level import Collected, collect
from hope_jax.data.text import Document
from hope_jax.data.tokenizer import ByteTokenizer
from hope_jax.evaluate import language_model
from hope_jax.models import cms, convert, lm, zoo
from hope_jax.models.capture import dense_kernels
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import with_context
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.models.mixers.memory import NamedConfig
from hope_jax.optim.capture import dgd_gradients
from hope_jax.optim.rules.m3 import M3
from hope_jax.stream import generate
from hope_jax.stream.reader import reader_of
from tests.models import small
from tests.models.test_promises import assert_same_state, mix

PERIODS = (4, 8, 32)
LENGTH = 112  # whole pieces of 7; a piece of 1 or 4 is left by the others
BYTES = ByteTokenizer()


def chain(*levels, **changes):
    """Attention over the whole text, one layer, and a chain of MLPs."""
    return dataclasses.replace(
        small.HOPE_ATTENTION,
        layers=1,
        mixer=AttentionConfig(context=128),
        vocab=BYTES.vocab_size,
        cms=CMSConfig(levels=levels, **{"hidden": 6, "pull": 0.1} | changes),
    )


THREE = chain(*(CMSLevel(period=p, rate=0.5) for p in PERIODS))


def some_tokens(seed=0, rows=2, length=LENGTH):
    rng = np.random.default_rng(seed)
    return np.int32(rng.integers(0, THREE.vocab, (rows, length)))


def pieces(config, tokens, cuts, aligned, state=None):
    """Reads `tokens` in pieces that end at `cuts`; logits and the state."""
    if state is None:
        state = small.start(config, tokens.shape[0])
    logits = []
    for part in np.split(np.asarray(tokens), cuts, axis=1):
        y, state = small.read(config, part, state, aligned=aligned)
        logits.append(np.asarray(y))
    return np.concatenate(logits, axis=1), state


def moves(state):
    """How often each level of each row has moved, as its rule has counted."""

    def count(opt):
        (count,) = {
            tuple(leaf.tolist())
            for leaf in jax.tree.leaves(opt)
            if jnp.issubdtype(leaf.dtype, jnp.integer)
        }
        return list(count)

    return [count(level.opt) for level in state.levels]


@pytest.mark.slow
def test_every_level_moves_when_its_tokens_have_come():
    """In one call, token by token, in pieces of 3 and 7, and in parallel pieces."""
    tokens = some_tokens()
    whole, end = small.read(THREE, tokens)
    assert moves(end) == [[111 // 4] * 2, [111 // 8] * 2, [111 // 32] * 2]
    ways = [(False, n) for n in (1, 3, 7)] + [(True, 4), (True, 36)]
    for aligned, size in ways:
        cuts = list(range(size, LENGTH, size))
        logits, state = pieces(THREE, tokens, cuts, aligned)
        np.testing.assert_allclose(logits, whole, atol=2e-5)
        assert_same_state(state, end)
        assert moves(state) == moves(end)


def test_levels_may_move_in_mid_chunk_of_the_memories():
    """Chunks of 4, moves after 6 and 9 tokens: in one call, in parallel pieces, token
    by token, and without looking ahead."""
    levels = CMSLevel(period=6, rate=0.5), CMSLevel(period=9, rate=0.5)
    config = dataclasses.replace(
        small.HOPE, layers=1, cms=CMSConfig(levels=levels, hidden=6)
    )
    assert (config.base_chunk, config.span, config.nests) == (3, 12, False)
    tokens = small.some_tokens(length=24)
    whole, end = small.read(config, tokens)
    assert moves(end) == [[3, 3], [2, 2]]
    for aligned, cuts in ((True, [12]), (False, range(1, 24)), (None, [7, 14, 21])):
        logits, state = pieces(config, tokens, cuts, aligned)
        np.testing.assert_allclose(logits, whole, atol=2e-5)
        assert_same_state(state, end)
    hope_jax.check_causality(
        lambda t: small.read(config, t)[0],
        jnp.asarray(tokens),
        vocab=config.vocab,
        positions=[0, 3, 4, 5, 6, 11, 12, 23],
    )


@pytest.mark.slow
def test_the_slowest_level_changes_what_is_read_after_its_move_and_only_that():
    tokens = some_tokens()
    _, params = small.built(THREE)
    levels = (*THREE.cms.levels[:2], CMSLevel(period=32, rate=0.0))
    still = dataclasses.replace(
        THREE, cms=dataclasses.replace(THREE.cms, levels=levels)
    )
    fewer = jax.tree_util.tree_map_with_path(
        lambda path, w: w[:2] if "rates" in str(path) else w, params
    )
    moving, _ = small.read(THREE, tokens)
    held, _ = small.reading(still)(fewer, tokens, None)
    change = np.abs(moving - held).max(axis=(0, 2))
    assert change[:32].max() < 1e-5 < 1e-3 < change[32:].max()


def of_a_chunk(model):
    """`(settled, before, tokens of a chunk and the next) -> gradients` of the sum of
    the chunk's losses in each level's weights, at those of `settled`."""

    @jax.jit
    def gradients(settled, before, tokens):
        inside, start = lm._layers_first(settled), lm._layers_first(before)

        def loss(fast):
            logits, *_ = lm._read(
                *(model, tokens[:, :-1], start.blocks.mixer, fast),
                aligned=True,
                learn=True,
            )
            return lm.next_token_loss(logits, tokens[:, 1:]).sum()

        return jax.grad(loss)(inside.blocks.fast)

    return lambda *given: jax.device_get(gradients(*given))


@pytest.mark.slow
def test_a_slow_level_moves_by_the_mean_of_its_own_tokens_gradients():
    """Summed up chunk by chunk by the definition, while the faster levels move."""
    tokens = some_tokens(length=72)
    model = nnx.merge(*small.built(THREE))
    slow, start = 2, None
    state = small.start(THREE)

    layers_first = jax.jit(lm._layers_first)

    gradients = of_a_chunk(model)
    total = None
    for begin in range(0, 68, 4):
        # The chunk before is settled by the first token of this one.
        _, settled = small.read(
            THREE, tokens[:, begin : begin + 1], state, aligned=False
        )
        if begin in (32, 64):  # the level has just moved
            before, after = (
                jax.device_get(layers_first(s).blocks.fast[slow])
                for s in (state, settled)
            )
            mean = jax.tree.map(lambda g: g / 32, total)
            rate = np.asarray(model.inner_rates())[slow]
            want = expected_move(before, mean, start or before, rate)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), after, want
            )
            start, total = start or before, None
        g = gradients(settled, state, tokens[:, begin : begin + 5])[slow]
        total = g if total is None else jax.tree.map(np.add, total, g)
        for t in range(begin, begin + 4):
            _, state = small.read(THREE, tokens[:, t : t + 1], state, aligned=False)
    assert moves(state)[slow] == [2, 2]


NESTED = chain(*(CMSLevel(period=p, rate=0.5) for p in (4, 16, 32)), variant="nested")


def test_a_nested_level_begins_again_where_the_slower_one_moved_its_start():
    """By hand: the start moves by the slower level's rule, on the mean of all gradients
    that came to the faster level since, wherever that stood (first-order MAML)."""
    tokens = some_tokens(length=38)
    model = nnx.merge(*small.built(NESTED))
    state, layers_first = small.start(NESTED), jax.jit(lm._layers_first)
    rates = np.asarray(model.inner_rates())
    learned = jax.device_get(layers_first(state).blocks.fast)

    gradients, sums = of_a_chunk(model), {}
    for begin in range(0, 37, 4):
        one = tokens[:, begin : begin + 1]
        _, settled = small.read(NESTED, one, state, aligned=False)
        before, after = (jax.device_get(layers_first(s)) for s in (state, settled))
        for i, period in ((0, 16), (1, 32)):
            if begin and begin % period == 0:
                mean = jax.tree.map(lambda g, p=period: g / p, sums.pop(i))
                start = before.levels[i].owned.start
                want = expected_move(start, mean, learned[i], rates[i + 1])
                for got in (after.levels[i].owned.start, after.blocks.fast[i]):
                    jax.tree.map(
                        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
                        *(got, want),
                    )
                assert not any(map(np.any, jax.tree.leaves(after.levels[i].learned)))
        if begin < 32:
            found = gradients(settled, state, tokens[:, begin : begin + 5])
            for i, g in enumerate(found):
                sums[i] = jax.tree.map(np.add, sums[i], g) if i in sums else g
        for t in range(begin, min(begin + 4, 37)):
            part = tokens[:, t : t + 1]
            _, state = small.read(NESTED, part, state, aligned=False)


def test_nested_levels_are_read_in_parallel_pieces_and_within_a_horizon():
    tokens = some_tokens(length=36)
    whole, end = small.read(NESTED, tokens)
    logits, state = pieces(NESTED, tokens, [12, 24], True)
    np.testing.assert_allclose(logits, whole, atol=2e-5)
    assert_same_state(state, end)
    sequential = dataclasses.replace(
        NESTED, cms=dataclasses.replace(NESTED.cms, variant="sequential")
    )
    other = np.abs(small.read(sequential, tokens)[0] - whole).max(axis=(0, 2))
    assert other[:16].max() < 1e-5 < 1e-4 < other[16:].max()
    graphdef, params = small.built(NESTED)
    short = jax.jit(functools.partial(lm.apply, graphdef, horizon=32))
    _, state = short(params, tokens[:, :24])
    assert state.levels[0].owned is not None and state.levels[1].owned is None
    rest, _ = small.read(NESTED, tokens[:, 24:32], state, aligned=True)
    np.testing.assert_allclose(rest, whole[:, 24:32], atol=2e-5)
    parts = lm.state_bytes(NESTED)
    assert parts["CMS 1 start"] == 2 * parts["CMS 1 weights"] + parts["CMS 2 rule"]
    assert "CMS 3 start" not in parts


def test_a_nested_start_moves_as_far_as_its_owner_is_opened():
    """Half as far where the mean of generated factors is a half; sums of all."""
    levels = CMSLevel(period=2, rate=0.5), CMSLevel(period=8, rate=0.5)
    config = CMSConfig(levels=levels, variant="nested", pull=0.0)
    level, owner = config.whole
    state = cms.begin_level(level, WEIGHTS, 1, owner)
    drawn = np.random.default_rng(0).normal
    sums = jax.tree.map(lambda w: np.float32(drawn(size=w.shape)), WEIGHTS)
    state = state._replace(owned=state.owned._replace(learned=sums))

    def moved(opened):
        at, after = cms.begin_again(
            config, level, owner, 0.5, START, state, opened, axis=1
        )
        jax.tree.map(np.testing.assert_array_equal, at, after.owned.start)
        return jax.tree.map(lambda a, w: np.asarray(a) - w, at, WEIGHTS)

    whole = moved(None)
    half = moved(jnp.full((2, 2), 8 * 0.5))  # layers, rows
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        *(jax.tree.map(lambda w: 0.5 * w, whole), half),
    )
    assert max(np.abs(w).max() for w in jax.tree.leaves(whole)) > 1e-2


def test_nested_levels_of_a_hybrid_read_as_one():
    """Memories in chunks, generated factors, two mixers a group; each window of the
    slower level is read once more at its end."""
    levels = tuple(CMSLevel(period=p, rate=0.5) for p in (4, 8))
    nested = dict(variant="nested", inner="exact", rates="generated")
    chain = CMSConfig(levels=levels, hidden=6, **nested)
    memory = NamedConfig(kind="gated_delta_net", chunk=2)
    mixers = (memory, AttentionConfig(context=32))
    config = dataclasses.replace(small.HOPE, mixer=mixers, cms=chain)
    tokens = small.some_tokens(length=19)
    whole, end = small.read(config, tokens)
    logits, state = pieces(config, tokens, range(1, 19), False)
    np.testing.assert_allclose(logits, whole, atol=2e-5)
    assert_same_state(state, end)


@pytest.mark.parametrize(
    ("levels", "changes", "message"),
    [
        ((CMSLevel(period=4), CMSLevel(period=8, rate=0.0)), {}, "1 such levels"),
        ((CMSLevel(period=4), CMSLevel(period=8)), {"order": "independent"}, "chain"),
        ((CMSLevel(period=4), CMSLevel(period=8)), {"rule": "dgd"}, "rule 'dgd' of"),
        ((CMSLevel(period=4), CMSLevel(period=6)), {"inner": "exact"}, r"got \[4, 6\]"),
    ],
)
def test_what_cannot_nest_is_refused(levels, changes, message):
    with pytest.raises(ValueError, match=message):
        CMSConfig(levels=levels, variant="nested", **changes)


def expected_move(weights, mean, start, rate):
    """w - rate clip(g) - pull (w - start), row by row; rows are axis 1."""
    norm = np.sqrt(
        sum(np.sum(g**2, axis=(0, 2, 3), keepdims=True) for g in jax.tree.leaves(mean))
    )
    scale = np.minimum(1.0, 1.0 / norm)
    return jax.tree.map(
        lambda w, g, s: w - rate * scale * g - 0.1 * (w - s), weights, mean, start
    )


def test_rows_at_different_multiples_of_the_span_are_read_in_parallel():
    """Row 0 has read 28 tokens more: its slow levels move when row 1's do not."""
    tokens = some_tokens()
    whole, _ = small.read(THREE, tokens)
    _, ahead = pieces(THREE, tokens[:, :28], range(4, 28, 4), True)
    fresh = small.start(THREE)
    state = mix(ahead, fresh)
    both = np.stack([tokens[0, 28:64], tokens[1, :36]])
    logits, state = pieces(THREE, both, [], True, state)
    np.testing.assert_allclose(logits[0], whole[0, 28:64], atol=2e-5)
    np.testing.assert_allclose(logits[1], whole[1, :36], atol=2e-5)
    assert moves(state) == [[63 // 4, 35 // 4], [63 // 8, 35 // 8], [63 // 32, 1]]


@pytest.mark.slow
def test_evaluation_and_generation_move_every_level():
    reader = reader_of(THREE)
    assert reader.span == 4
    _, params = small.built(THREE)
    text = b"the cat sat on the mat, and the rat sat on the cat, and the rest sat too."
    ids = jnp.asarray(np.concatenate([[BYTES.bos], BYTES.encode(text)]), jnp.int32)
    whole, end = small.read(THREE, ids[None, :-1])
    cost = lm.next_token_loss(whole, ids[None, 1:])
    for window in (4, 20):
        score = language_model.score(
            reader,
            params,
            BYTES,
            [Document("a", text)] * 2,
            mode="reset",
            window=window,
        )
        np.testing.assert_allclose(score.nats, cost.sum(), rtol=1e-5)
    frozen = language_model.score(
        reader, params, BYTES, [Document("a", text)], mode="frozen"
    )
    assert abs(frozen.nats[0] - score.nats[0]) > 1e-2

    state = reader.start(params, 1)
    given = ids[:-1]
    made, logits, state = generate.decode(
        reader,
        generate.Sampling(temperature=0),
        257,
        True,
        params,
        state,
        jnp.zeros((1, 257)),
        given[None],
        jax.random.split(jax.random.key(0), len(given)),
    )
    np.testing.assert_array_equal(made[0], given)
    np.testing.assert_allclose(logits[0], whole[0, -1], atol=2e-5)
    assert moves(state) == moves(end) == [[72 // 4], [72 // 8], [2]]


@pytest.mark.slow
def test_a_horizon_spares_slow_levels_and_changes_nothing():
    """Levels that cannot move inside the row are read as the parameters they are."""
    tokens = jnp.asarray(some_tokens(length=33))
    graphdef, params = small.built(THREE)

    def loss(params, horizon):
        logits, state = lm.apply(graphdef, params, tokens[:, :-1], horizon=horizon)
        return lm.next_token_loss(logits, tokens[:, 1:]).mean(), (logits, state)

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, (logits, state)), gradient = both(params, None)
    (_, (same, spared)), spared_gradient = both(params, 32)
    np.testing.assert_allclose(logits, same, atol=1e-5)
    assert (len(state.levels), len(spared.levels)) == (3, 2)
    assert len(spared.blocks.fast) == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        gradient,
        spared_gradient,
    )
    (first, second, third) = gradient["rates"][...]
    assert first and second and not third  # it has not moved, and learns nothing

    layers = dense_kernels(graphdef, params, horizon=32)
    chosen = [
        all(jax.tree.leaves(level["mlp"]))
        for level in layers["blocks"]["levels"].values()
    ]
    assert chosen == [False, False, True]
    short = jax.jit(functools.partial(lm.apply, graphdef, horizon=4))
    none, state = short(params, tokens[:, :4])
    assert state.levels == () and state.held is None
    np.testing.assert_allclose(none, logits[:, :4], atol=1e-5)
    with pytest.raises(ValueError, match=r"horizon \(32\) must be .* a row \(33\)"):
        lm.apply(graphdef, params, tokens, horizon=32)


def test_a_level_is_within_a_horizon_that_is_longer_than_its_period():
    expected = {4: 0, 5: 1, 8: 1, 9: 2, 32: 2, 33: 3, None: 3}
    assert {h: len(THREE.within(h)) for h in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["dgd", "m3"])
def test_fast_levels_stay_in_float32_in_a_bfloat16_model(rule):
    config = dataclasses.replace(chain(RULES["dgd"], RULES["m3"]), dtype="bfloat16")
    which = [level.rule for level in config.cms.levels].index(RULES[rule].rule)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix types
        state = _read_once(config)
    for level in (state.blocks.fast[which], state.levels[which].learned):
        for leaf in jax.tree.leaves(level):
            assert leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all()
    assert moves(state) == [[2, 2], [2, 2]]


@functools.cache
def _read_once(config):
    return small.read(config, some_tokens(length=9))[1]


def test_periods_of_the_outer_optimizer_follow_the_rows():
    _, params = small.built(THREE)
    for seq_len, expected in ((33, [1, 1, 1]), (16, [1, 1, 2]), (4, [1, 2, 8])):
        steps = lm.periods(THREE, params, seq_len)["blocks"]["levels"]
        assert [set(jax.tree.leaves(steps[i])) for i in range(3)] == [
            {n} for n in expected
        ]


def test_no_parameter_has_the_shape_of_the_context():
    """Every zoo family, and a reading at twice the context of training."""
    for name in ("hope_tiny", "hope_attention_tiny", "hope_100m"):
        config = zoo.get(name)
        raised = with_context(config, 2048)
        params = lm.abstract(config)
        shapes = jax.tree.map(lambda a: a.shape, params)
        assert shapes == jax.tree.map(lambda a: a.shape, lm.abstract(raised))
        assert params["rates"].shape == (len(config.cms.levels),)
    short = with_context(THREE, 16)
    _, params = small.built(short)
    tokens = some_tokens()
    seen, _ = small.reading(THREE)(params, tokens, None)
    blind, _ = small.reading(short)(params, tokens, None)
    np.testing.assert_allclose(seen[:, :16], blind[:, :16], atol=1e-5)
    assert np.abs(seen - blind)[:, 16:].max() > 1e-4


WEIGHTS = {
    "gate": {"kernel": np.arange(48.0).reshape(2, 2, 3, 4) / 48},
    "down": {"kernel": np.arange(48.0).reshape(2, 2, 4, 3) / 48 - 0.5},
}  # layers, rows, in, out
WEIGHTS = jax.tree.map(np.float32, WEIGHTS)
START = jax.tree.map(lambda w: w[:, 0], WEIGHTS)


def level_of(**changes):
    config = CMSConfig(levels=(CMSLevel(period=2, rate=0.5),), **changes)
    return config, config.whole[0]


def moved_by(config, level, gradients, rate=0.5):

    @jax.jit
    def move(gradients):
        weights, state = WEIGHTS, cms.begin_level(level, WEIGHTS, axis=1)
        seen = state.learned.inputs
        if seen is not None:
            seen = jax.tree.map(lambda a: a + jnp.eye(a.shape[-1])[None, None], seen)

        def step(carry, gradient):
            weights, state = carry
            state = state._replace(learned=Collected(gradient, seen))
            carry = cms.move(config, level, rate, START, weights, state, axis=1)
            return carry, None

        return jax.lax.scan(step, (weights, state), gradients)[0]

    return move(jax.tree.map(lambda *g: np.stack(g), *gradients))


@pytest.mark.parametrize("pull", [0.0, 0.05])
def test_a_pull_keeps_weights_near_their_start(pull):
    """A gradient that never turns: without a pull its moves add up for ever."""
    config, level = level_of(pull=pull, clip=1.0)
    ones = jax.tree.map(np.ones_like, WEIGHTS)

    def step(carry, _):
        weights, state = carry
        state = state._replace(learned=Collected(ones, None))
        moved = cms.move(config, level, 0.5, START, weights, state, axis=1)
        return moved, None

    @jax.jit
    def moved(weights):
        begin = weights, cms.begin_level(level, weights, axis=1)
        return jax.lax.scan(step, begin, length=1000)[0][0]

    away = jax.tree.map(lambda w, s: np.asarray(w)[:, 0] - s, moved(WEIGHTS), START)
    distance = np.sqrt(sum(np.sum(w**2) for w in jax.tree.leaves(away)))
    if pull:  # each step has norm 0.5
        np.testing.assert_allclose(distance, 0.5 / pull, rtol=1e-4)
    else:
        np.testing.assert_allclose(distance, 500.0, rtol=1e-4)


@pytest.mark.parametrize("name", list(optim.RULES))
def test_any_optimizer_moves_a_level_row_by_row(name):
    """As the rule itself does on one row; another row's gradient does not matter."""
    config, level = level_of(rule=name, pull=0.0, clip=1e9)
    rng = np.random.default_rng(0)
    draw = lambda w: np.float32(rng.normal(size=w.shape))  # noqa: E731
    gradients = [jax.tree.map(draw, WEIGHTS) for _ in range(2)]
    weights, state = moved_by(config, level, gradients)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state.opt))

    rule = cms.flow(level, 0.5)
    one = lambda tree: jax.tree.map(lambda a: a[:, 1], tree)  # noqa: E731
    alone, extra = one(WEIGHTS), {}
    if level.rule.inputs == "grams":
        squares = {k: np.eye(w["kernel"].shape[-2]) for k, w in WEIGHTS.items()}
        extra["inputs"] = {
            k: {"kernel": np.float32([e, e]) / 2} for k, e in squares.items()
        }

    @jax.jit
    def by_itself(alone, gradients, extra):
        def step(carry, gradient):
            alone, opt = carry
            mean = jax.tree.map(lambda g: g / 2, one(gradient))
            updates, opt = rule.update(mean, opt, alone, **extra)
            return (optax.apply_updates(alone, updates), opt), None

        return jax.lax.scan(step, (alone, rule.init(alone)), gradients)[0][0]

    stacked = jax.tree.map(lambda *g: np.stack(g), *gradients)
    alone = by_itself(alone, stacked, extra)
    for got, want, old in zip(
        *map(jax.tree.leaves, (one(weights), alone, one(WEIGHTS))), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)
        assert np.isfinite(got).all() and np.abs(got - old).max() > 1e-4


@pytest.mark.parametrize("name", ["sgd", "dgd", "m3", "adafactor"])
def test_a_first_order_move_is_a_constant_whose_rate_learns(name):
    """The start learns as if nothing had moved, pull or not; `exact` says otherwise."""

    def pullback(gradient):
        config, level = level_of(rule=name, pull=0.1, gradient=gradient)

        def twice(start, rate):
            learned = cms.begin_level(level, WEIGHTS, axis=1).learned
            learned = jax.tree.map(
                lambda a: a + np.eye(*a.shape[-2:], dtype=np.float32)[None, None],
                learned,
            )
            weights = jax.tree.map(lambda w: jnp.stack([w, w], axis=1), start)
            state = cms.begin_level(level, weights, axis=1)
            for _ in range(2):
                state = state._replace(learned=learned)
                weights, state = cms.move(
                    config, level, rate, start, weights, state, axis=1
                )
            return weights

        @jax.jit
        def pulled(start, rate):
            ones = jax.tree.map(jnp.ones_like, WEIGHTS)
            return jax.vjp(twice, start, rate)[1](ones)

        return pulled(START, np.float32(0.2))

    start, rate = pullback("first_order")
    for leaf in jax.tree.leaves(start):
        np.testing.assert_allclose(leaf, 2.0, rtol=1e-5)  # one for each of two rows
    assert abs(rate) > 1e-3
    if name in ("dgd", "adafactor"):  # whose moves depend on where the weights are
        through, _ = pullback("exact")
        assert max(np.abs(x - 2.0).max() for x in jax.tree.leaves(through)) > 1e-2


RULES = {
    "dgd": CMSLevel(period=4, rate=0.2, rule="dgd"),
    "ggd": CMSLevel(period=4, rate=0.2, rule="ggd"),
    "m3": CMSLevel(
        period=4,
        rate=0.2,
        rule=M3(periods=(1, 2)),
        hidden=4,
        clip=0.5,
        pull=0.02,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_level_has_a_rule_of_its_own_while_reading(name):
    config = chain(RULES[name], CMSLevel(period=8, rate=0.3, rule="adam"))
    tokens = some_tokens(length=19)
    whole, end = small.read(config, tokens)
    logits, state = pieces(config, tokens, [1, 8, 15, 16, 17, 18], False)
    np.testing.assert_allclose(logits, whole, atol=5e-5)
    assert_same_state(state, end)
    width = end.blocks.fast[0]["up"]["kernel"].shape[-1]
    assert width == (4 if name == "m3" else 6)
    frozen, _ = small.read(config, tokens, learn=False)
    assert np.abs(whole - frozen)[:, 5:].max() > 1e-4


@pytest.mark.slow
def test_dgd_inside_takes_the_inputs_of_its_own_tokens():
    """One move by equation 56 of what every matrix of the MLP was given."""
    config = chain(RULES["dgd"], pull=0.0, clip=1e9)
    tokens = some_tokens(length=5)
    _, params = small.built(config)
    _, end = small.read(config, tokens)

    static = small.without_rates(config)
    graphdef, _ = small.built(static)
    weights = small.drop_rates(params)
    layers = dense_kernels(graphdef, weights)

    def loss(params, row):
        logits, _ = lm.apply(graphdef, params, row[None, :-1])
        return lm.next_token_loss(logits, row[None, 1:]).mean()

    find = jax.jit(lambda p, row: dgd_gradients(loss, p, row, layers=layers))
    rate = nnx.merge(*small.built(config)).inner_rates()[0]
    for row in range(2):
        gradient, inputs = find(weights, tokens[row])
        part = lambda tree: tree["blocks"]["levels"][0]["mlp"]  # noqa: E731
        for name in ("gate", "up", "down"):
            w, g, a = (
                np.asarray(part(t)[name]["kernel"][...])[0]
                for t in (weights, gradient, inputs)
            )
            forgotten = np.eye(len(a)) + float(rate) * a
            want = np.linalg.solve(forgotten, w - float(rate) * g)
            got = end.blocks.fast[0][name]["kernel"][...][row, 0]
            np.testing.assert_allclose(got, want, atol=1e-5)
            assert np.abs(got - w).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["dgd", "delta_momentum"])
def test_the_outer_gradient_goes_through_any_rule(float64, rule):
    """`exact`, moves and pulls included, in where the level starts and its rate."""
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix types
        config = dataclasses.replace(
            chain(CMSLevel(period=2, rate=0.3, rule=rule), gradient="exact"),
            dtype="float64",
        )
        graphdef, params = small.built(config)
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), params)
        tokens = jnp.asarray(some_tokens(length=8))

        def loss(params):
            logits, _ = lm.apply(graphdef, params, tokens[:, :-1])
            return lm.next_token_loss(logits, tokens[:, 1:])[:, 4:].mean()

        def inner(path):  # attention is float32 inside
            return any(name in str(path) for name in ("mlp", "rates"))

        rng = np.random.default_rng(0)
        direction = jax.tree_util.tree_map_with_path(
            lambda path, w: rng.normal(size=w.shape) * inner(path), params
        )
        at = lambda h: jax.tree.map(lambda w, d: w + h * d, params, direction)  # noqa: E731
        both = jax.jit(jax.value_and_grad(loss))
        slope = both(params)[1]
        exact = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, direction)))
        numeric = (both(at(1e-5))[0] - both(at(-1e-5))[0]) / 2e-5
        np.testing.assert_allclose(exact, numeric, rtol=1e-5)


def test_stacked_levels_keep_the_width_of_the_trained_mlp():
    _, params = small.built(small.TRANSFORMER)
    levels = [CMSLevel(period=4, hidden=5), CMSLevel(period=8)]
    with pytest.raises(ValueError, match="width of the trained MLP, 24, got 5"):
        convert.stack_levels(small.TRANSFORMER, params, levels)


def test_matched_widths_are_those_of_levels_without_their_own():
    levels = CMSLevel(period=4, hidden=7), CMSLevel(period=8)
    config = chain(*levels)
    larger, _ = zoo.matched(config, lm.count_parameters(config) + 3 * 8 * 10)
    assert [v.hidden for v in larger.cms.whole] == [7, 16]
    with pytest.raises(ValueError, match="hidden widths of their own"):
        zoo.matched(chain(CMSLevel(period=4, hidden=7)), 10_000)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: CMSLevel(period=4, rule="m4"),
            "rule must be .* 'm4'. Did you mean 'm3'",
        ),
        (lambda: CMSLevel(period=4, pull=1.0), "pull must be .* got 1.0"),
        (lambda: CMSLevel(period=4, clip=0.0), "clip must be positive, got 0.0"),
        (lambda: CMSLevel(period=4, hidden=0), "hidden must be at least 1, got 0"),
    ],
)
def test_bad_levels(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", ["sgd", "dgd"])
def test_sums_of_gradients_may_be_bfloat16(rule):
    """Half as large, and 8 bits of each sum, rounded once for what each chunk adds."""
    narrow, whole = (
        level_of(rule=rule, accumulator=a) for a in ("bfloat16", "float32")
    )
    rng = np.random.default_rng(0)
    grams = jax.tree.map(
        lambda a: np.float32(rng.uniform(size=a.shape)),
        cms.begin_level(whole[1], WEIGHTS, axis=1).learned,
    )
    moved = []
    for config, level in (narrow, whole):
        state = cms.begin_level(level, WEIGHTS, axis=1)
        for _ in range(3):
            state = state._replace(learned=collect(state.learned, grams))
        moved.append(cms.move(config, level, 0.5, START, WEIGHTS, state, axis=1))
    (half, half_state), (weights, state) = moved
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert 2 * size(half_state.learned) == size(state.learned)
    largest = lambda a, b: max(  # noqa: E731
        jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b))
    )
    assert 0 < largest(half, weights) < 2**-7 * largest(weights, WEIGHTS)
