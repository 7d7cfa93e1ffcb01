"""What every variant of the continuum memory promises, and every flag of it.

Each member is compiled twice, in float64: the reading of a whole text with its outer
gradient, and one of at most seven tokens from anywhere. All promises are asked of these
two programs.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hope_jax
from hope_jax.models import cms, learning, lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.optim.leaves import path_names
from tests.models import small
from tests.models.test_clocks import moves
from tests.models.test_promises import assert_same_state

LENGTH, PERIODS, LONGEST = 16, (2, 4), 7
LEVELS = (*(CMSLevel(period=p, rate=0.5) for p in PERIODS), CMSLevel(period=math.inf))
TRUNCATED = tuple(
    dataclasses.replace(level, truncate=truncate)
    for level, truncate in zip(LEVELS, (3, 1, None), strict=True)
)
INDEPENDENT = dict(order="independent")
MEMBERS = {
    "fast_to_slow": {},
    "slow_to_fast": dict(
        order="slow_to_fast", reduction="sum", pull=0.0, rates="generated"
    ),
    "mean": INDEPENDENT,
    "learned": INDEPENDENT | dict(mixing="learned"),
    "gated": INDEPENDENT | dict(mixing="gated"),
    "routed": INDEPENDENT | dict(mixing="routed", top_k=2),
    "nested": dict(variant="nested"),
    "through moves": dict(variant="nested", inner="exact"),
    "bfloat16": dict(accumulator="bfloat16"),
    "truncated": dict(levels=TRUNCATED, rule="momentum", rates="generated"),
}
ROUNDED = ("bfloat16",)  # sums that jump
# Rounded sums jump, and a cut leaves a part of the slope out: that is held to its
# definition below.
NO_SLOPE = ("bfloat16", "truncated")
PARTS = {  # what has an outer gradient, beside each level's start and the inner rates
    "learned": "mix.shares",
    "gated": "mix.gate",
    "routed": "mix.gate",
    "slow_to_fast": "open",
}
each = pytest.mark.parametrize("member", MEMBERS)


def configured(member, dtype="float64"):
    fields = dict(levels=LEVELS, hidden=6, gradient="exact", pull=0.1)
    chain = CMSConfig(**fields | MEMBERS[member])
    # Attention is float32 inside: what it makes of levels below it has no fine slope.
    layers = 2 if member in NO_SLOPE else 1
    attention = small.HOPE_ATTENTION
    return dataclasses.replace(attention, layers=layers, cms=chain, dtype=dtype)


@pytest.fixture(autouse=True)
def wide():
    """Flax's norms mix float32 of their own in, which strict promotion refuses."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def started(member):
    """Parameters none of which is where it makes members alike."""
    with jax.enable_x64(False):
        _, params = lm.build(configured(member, "float32"), jax.random.key(1))
    rng = np.random.default_rng(3)

    def moved(path, w):
        shaken = {"mix", "open"} & set(path_names(path))
        return np.float64(w) + (0.3 * rng.normal(size=w.shape) if shaken else 0.0)

    return jax.tree_util.tree_map_with_path(moved, jax.device_get(params))


@functools.cache
def whole(member):
    """`(params, tokens) -> loss, logits, state, gradient` of the loss of the tokens
    after the first move."""
    graphdef, _ = lm.abstract_model(configured(member))

    def loss(params, tokens):
        logits, state = lm.apply(graphdef, params, tokens)
        losses = lm.next_token_loss(logits[:, :-1], tokens[:, 1:])
        return losses[:, PERIODS[0] :].mean(), (logits, state)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def unpacked(params, tokens):
        (loss, (logits, state)), gradient = run(params, jnp.asarray(tokens))
        return loss, logits, state, gradient

    return unpacked


@functools.cache
def piecewise(member):
    """`(params, tokens[B, 7], state, count) -> logits, state`, from anywhere."""
    graphdef, _ = lm.abstract_model(configured(member))
    run = lambda p, t, s, n: lm.apply(graphdef, p, t, s, count=n)  # noqa: E731
    begin = lambda p: lm.initial_state(graphdef, p, 2)  # noqa: E731
    return jax.jit(run), jax.jit(begin)


TOKENS = small.some_tokens(length=LENGTH)


@each
def test_pieces_make_the_whole(member):
    """Of 1, 3 and 7 tokens, and every level has moved as often as its period says; one
    that is nested since it last began."""
    _, expected, end, _ = whole(member)(started(member), TOKENS)
    periods = configured(member).fast_periods
    counts = [(LENGTH - 1) // p for p in periods]
    if configured(member).cms.variant == "nested":
        for i, (fast, slow) in enumerate(itertools.pairwise(periods)):
            counts[i] = (LENGTH - 1) % slow // fast
    assert moves(end) == [[count] * 2 for count in counts]
    run, begin = piecewise(member)
    tolerance = 1e-2 if member in ROUNDED else 1e-5
    for size in (1, 3, 7):
        state, said = begin(started(member)), []
        for at in range(0, LENGTH, size):
            part = TOKENS[:, at : at + size]
            count = part.shape[1]
            padded = np.pad(part, ((0, 0), (0, LONGEST - count)))
            logits, state = run(started(member), padded, state, np.int32(count))
            said.append(logits[:, :count])
        np.testing.assert_allclose(np.concatenate(said, 1), expected, atol=tolerance)
        assert_same_state(state, end, tolerance)


@pytest.mark.parametrize(
    ("periods", "base", "length"), [((7, 50, 350), 1, 353), ((10, 1000), 10, 1013)]
)
def test_periods_need_not_nest(periods, base, length):
    levels = tuple(CMSLevel(period=p, rate=0.5) for p in periods)
    mixer = AttentionConfig(context=128)
    config = dataclasses.replace(
        small.HOPE_ATTENTION,
        layers=1,
        mixer=mixer,
        cms=CMSConfig(levels=levels, hidden=6),
    )
    assert config.base_chunk == base
    with jax.enable_x64(False):
        _, state = small.read(config, small.some_tokens(length=length))
    assert moves(state) == [[(length - 1) // p] * 2 for p in periods]


@each
def test_no_future_and_no_other_row(member):
    """Bit for bit."""
    hope_jax.check_causality(
        lambda t: whole(member)(started(member), t)[1],
        jnp.asarray(TOKENS),
        vocab=small.VOCAB,
        positions=[0, 1, 2, 3, 4, 7, 8, LENGTH - 1],
    )


@each
def test_at_rates_of_zero_no_level_moves(member):
    """And what it reads then is what the learned weights say."""
    still = jax.tree_util.tree_map_with_path(
        lambda path, w: w - 1e9 * ("rates" in path_names(path)), started(member)
    )
    _, logits, state, _ = whole(member)(still, TOKENS)
    moving = whole(member)(started(member), TOKENS)[1]
    assert np.abs(moving - logits)[:, : PERIODS[0]].max() < 1e-12
    assert np.abs(moving - logits)[:, PERIODS[0] :].max() > 1e-3
    starts = nnx.merge(lm.abstract_model(configured(member))[0], still).blocks.starts()
    for start, now in zip(starts, state.blocks.fast, strict=True):
        now = jax.tree.map(lambda a: np.swapaxes(a, 0, 1)[:, 0], now)
        jax.tree.map(np.testing.assert_array_equal, now, start)


@pytest.mark.parametrize(
    ("member", "part"),
    [
        (member, part)
        for member in MEMBERS
        if member not in NO_SLOPE
        for part in ("levels.0.mlp", "levels.1.mlp", "rates", PARTS.get(member))
        if part is not None
    ],
)
def test_the_outer_gradient_is_that_of_finite_differences(member, part):
    """Through every move: in where the levels start, in their rates, and in what the
    member alone has."""
    params, run = started(member), whole(member)
    rng = np.random.default_rng(0)
    mine = lambda path: part in ".".join(path_names(path))  # noqa: E731
    direction = jax.tree_util.tree_map_with_path(
        lambda path, w: mine(path) * rng.normal(size=w.shape), params
    )
    at = lambda e: jax.tree.map(lambda w, d: w + e * d, params, direction)  # noqa: E731
    numeric = (run(at(1e-5), TOKENS)[0] - run(at(-1e-5), TOKENS)[0]) / 2e-5
    gradient = run(params, TOKENS)[3]
    exact = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
    assert abs(exact) > 1e-6
    np.testing.assert_allclose(exact, numeric, rtol=1e-5, atol=2e-10)


def truncated_by_definition(member):
    """`truncates -> loss, gradient` of `whole` in a plain loop over base chunks. Of
    every stretch of so many moves the first is made from, and learned at, constants
    that move with where the level starts."""
    config, params = configured(member), started(member)
    graphdef, base = lm.abstract_model(config)[0], config.base_chunk

    @jax.jit
    def begin(params):
        return lm._begin(nnx.merge(graphdef, params), TOKENS.shape[0])

    @jax.jit
    def read(params, mixers, fast, tokens):
        model = nnx.merge(graphdef, params)
        return lm._read(model, tokens, mixers, fast, aligned=True, learn=True)

    @jax.jit
    def slopes(params, mixers, fast, tokens, labels):
        def objective(fast):
            made = read(params, mixers, fast, tokens)
            return lm.next_token_loss(made.said, labels).sum(), made.opened

        return jax.grad(objective, has_aux=True)(fast)

    @functools.partial(jax.jit, static_argnums=0)
    def move(i, params, weights, level):
        model = nnx.merge(graphdef, params)
        rate, start = model.inner_rates()[i], model.blocks.starts()[i]
        whole = config.cms.whole[i]
        return cms.move(config.cms, whole, rate, start, weights, level, axis=1)

    def loss(params, truncates):
        begun = begin(params)
        mixers, start, _ = begun.blocks
        fast, levels, said = list(start), list(begun.levels), []
        for n in range(LENGTH // base):
            tokens = TOKENS[:, n * base : (n + 1) * base]
            here = list(fast)
            for i, period in enumerate(PERIODS):
                if n * base // period % truncates[i] == 0:
                    here[i] = jax.tree.map(
                        lambda w, s: s + jax.lax.stop_gradient(w - s), fast[i], start[i]
                    )
            logits, after, _ = read(params, mixers, tuple(fast), tokens)
            said.append(logits)
            if n == LENGTH // base - 1:
                break  # the label of its last token is not there
            labels = TOKENS[:, n * base + 1 : (n + 1) * base + 1]
            gradient, opened = slopes(params, mixers, tuple(here), tokens, labels)
            for i, period in enumerate(PERIODS):
                more = jax.tree.map(jnp.add, levels[i].learned.gradient, gradient[i])
                open_ = levels[i].opened + opened[..., i].sum(axis=2)
                learned = levels[i].learned._replace(gradient=more)
                levels[i] = levels[i]._replace(learned=learned, opened=open_)
                if (n + 1) * base % period == 0:
                    if here[i] is not fast[i]:
                        constant = jax.lax.stop_gradient(levels[i].opt)
                        levels[i] = levels[i]._replace(opt=constant)
                    fast[i], levels[i] = move(i, params, here[i], levels[i])
            mixers = after
        logits = jnp.concatenate(said, axis=1)
        losses = lm.next_token_loss(logits[:, :-1], jnp.asarray(TOKENS[:, 1:]))
        return losses[:, PERIODS[0] :].mean()

    params = jax.tree.map(jnp.asarray, params)
    return functools.partial(jax.value_and_grad(loss), params)


def test_a_truncated_gradient_is_its_definition():
    loss, _, _, gradient = whole("truncated")(started("truncated"), TOKENS)
    definition = truncated_by_definition("truncated")
    wanted, want = definition((3, 1))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    size = jax.tree.map(lambda a: np.abs(a).max(), want)
    apart = lambda tree: far(  # noqa: E731
        *(jax.tree.map(lambda a, b: a / b, t, size) for t in (gradient, tree))
    )
    assert apart(want) < 1e-5
    assert apart(definition((3, 2))[1]) > 1e-3


def test_a_start_moves_by_the_gradient_through_its_levels_moves():
    """MAML of the second order, by hand: the loss of a window of two base chunks as a
    function of where the faster level began, one move in between."""
    config = dataclasses.replace(configured("through moves"), layers=2)
    with jax.enable_x64(False):
        params = jax.tree.map(np.float64, small.built(config)[1])
    model = nnx.merge(lm.abstract_model(config)[0], jax.tree.map(jnp.asarray, params))
    begun = lm._begin(model, 2)
    (start, slow), (rate, slow_rate) = begun.blocks.fast, model.inner_rates()

    @jax.jit
    def chunk(fast, mixers, tokens, labels):
        made = lm._read(model, tokens, mixers, (fast, slow), aligned=True, learn=True)
        return lm.next_token_loss(made.said, labels).sum(), made.mixers

    def step(rate, mean):
        """What a move adds, but for its pull."""
        squares = [(g**2).sum((0, 2, 3), keepdims=True) for g in jax.tree.leaves(mean)]
        by = rate * jnp.minimum(1.0, 1.0 / jnp.sqrt(sum(squares)))
        return jax.tree.map(lambda g: -by * g, mean)

    def window(start):
        slope = jax.grad(chunk, has_aux=True)
        first, second = (TOKENS[:, i : i + 3] for i in (0, 2))
        given = begun.blocks.mixer, first[:, :2], jnp.asarray(first[:, 1:])
        before, mixers = chunk(start, *given)
        mean = jax.tree.map(lambda g: g / 2, slope(start, *given)[0])
        learned = jax.lax.stop_gradient(start)
        moved = jax.tree.map(
            lambda w, s, d: w + d - 0.1 * (w - s), start, learned, step(rate, mean)
        )
        mixers = jax.lax.stop_gradient(mixers)
        after, _ = chunk(moved, mixers, second[:, :2], jnp.asarray(second[:, 1:]))
        return before + after

    mean = jax.tree.map(lambda g: g / 4, jax.grad(window)(start))
    want = jax.tree.map(jnp.add, start, step(slow_rate, mean))
    read = jax.jit(lambda p, t: lm.apply(small.graph(config), p, t)[1])
    got = lm._layers_first(read(params, TOKENS[:, :5])).levels[0].owned.start
    assert far(got, want) < 1e-6 < 1e-3 < far(got, start)


@pytest.mark.slow
def test_the_gradient_through_two_levels_moves_is_that_of_finite_differences():
    """The start of the second of three levels, moved by a third: by what the loss of
    its window says of it, through its own moves, those of the first level and those of
    the start of the first, themselves through moves."""
    levels = (*LEVELS[:2], CMSLevel(period=8, rate=0.5, clip=1e9, pull=0.0))
    fields = dict(MEMBERS["through moves"], gradient="first_order", hidden=4)
    chain = CMSConfig(levels=levels, pull=0.1, **fields)
    config = dataclasses.replace(configured("through moves"), cms=chain)
    with jax.enable_x64(False):
        params = jax.tree.map(np.float64, small.built(config)[1])
    graphdef, _ = lm.abstract_model(config)
    tokens, labels = TOKENS[:, :8], TOKENS[:, 1:9]
    begun = jax.jit(lambda p: lm.initial_state(graphdef, p, 2))(params)
    apply = functools.partial(lm.apply, graphdef, labels=labels, aligned=True)

    @jax.jit
    def window(start):
        """Its losses where the second level began there, and where that begins then."""
        first, second, third = begun.levels
        second = second._replace(owned=second.owned._replace(start=start))
        fast = begun.blocks.fast[0], start, begun.blocks.fast[2]
        blocks = begun.blocks._replace(fast=fast)
        state = begun._replace(blocks=blocks, levels=(first, second, third))
        logits, after = apply(params, tokens, state)
        losses = lm.next_token_loss(logits, jnp.asarray(labels))
        return losses.sum(), after.levels[1].owned.start

    start = begun.levels[1].owned.start
    rate = nnx.merge(graphdef, params).inner_rates()[2]
    slope = jax.tree.map(lambda a, b: (a - b) * 8 / rate, start, window(start)[1])
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda w: rng.normal(size=w.shape), start)
    at = lambda e: window(jax.tree.map(lambda w, d: w + e * d, start, direction))[0]  # noqa: E731
    numeric = (at(1e-5) - at(-1e-5)) / 2e-5
    exact = sum(jax.tree.leaves(jax.tree.map(np.vdot, slope, direction)))
    assert abs(exact) > 1e-3
    np.testing.assert_allclose(exact, numeric, rtol=1e-5)


def far(a, b):
    """The largest difference of two trees."""
    each = jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b)
    return max(jax.tree.leaves(each))


def test_a_spoiled_window_moves_its_start_in_the_first_order():
    def start(member, spoiled):
        """After three tokens, and two more."""
        run, begin = piecewise(member)
        padded = np.pad(TOKENS[:, :5], ((0, 0), (0, LONGEST - 5)))
        _, state = run(started(member), padded, begin(started(member)), np.int32(3))
        if spoiled:
            first = cms.spoiled(state.levels[0], jnp.ones((2,), bool))
            state = state._replace(levels=(first, *state.levels[1:]))
        padded = np.roll(padded, -3, axis=1)
        _, state = run(started(member), padded, state, np.int32(2))
        return state.levels[0].owned.start

    plain = start("nested", False)
    assert far(start("through moves", True), plain) < 1e-6
    assert far(start("through moves", False), plain) > 1e-4


def test_a_window_with_a_move_that_was_limited_is_spoiled():
    """Shortened in row 0, not made in row 1, as it would be in row 2."""
    with jax.enable_x64(False):
        config = configured("through moves", "float32")
        graphdef, params = small.built(config)
        state = lm._layers_first(small.start(config, 3))
        first = state.levels[0]
        ones = jax.tree.map(jnp.ones_like, first.learned)
        ledger = lm.Ledger(
            longest=np.float32([1e-3, np.inf, np.inf]),
            most=np.int32([9, 0, 9]),
            moves=np.zeros((3, 2), np.int32),
            shortened=np.zeros((3, 2), np.int32),
            way=np.zeros((3, 2), np.float32),
        )

        @jax.jit
        def move(params, ledger, weights, level, rows):
            model = nnx.merge(graphdef, params)
            model.learning = learning.resolve(config, True)
            return lm._move(model, 0, 0, (weights,), (level,), ledger, rows)[1][0]

        given = params, ledger, state.blocks.fast[0], first._replace(learned=ones)
        for rows in (np.ones(3, bool), np.zeros(3, bool)):
            chunks = move(*given, rows).owned.window.chunks
            assert ((np.asarray(chunks) < 0) == rows * [True, True, False]).all()
