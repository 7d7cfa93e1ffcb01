"""What every variant of the continuum memory promises, and every flag of it.

Each member is compiled twice, in float64: the reading of a whole text with its outer
gradient, and one of at most seven tokens from anywhere. All promises are asked of these
two programs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hope_jax
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.optim.leaves import path_names
from tests.models import small
from tests.models.test_clocks import moves
from tests.models.test_promises import assert_same_state

LENGTH, PERIODS, LONGEST = 16, (2, 4), 7
LEVELS = (*(CMSLevel(period=p, rate=0.5) for p in PERIODS), CMSLevel(period=math.inf))
INDEPENDENT = dict(order="independent")
MEMBERS = {
    "fast_to_slow": {},
    "slow_to_fast": dict(order="slow_to_fast", reduction="sum", pull=0.0),
    "mean": INDEPENDENT,
    "learned": INDEPENDENT | dict(mixing="learned"),
    "gated": INDEPENDENT | dict(mixing="gated"),
    "routed": INDEPENDENT | dict(mixing="routed", top_k=2),
    "nested": dict(variant="nested"),
    "generated": dict(rates="generated"),
    "bfloat16": dict(accumulator="bfloat16"),
}
ROUNDED = ("bfloat16",)  # sums that jump
PARTS = {  # what has an outer gradient, beside each level's start and the inner rates
    "learned": "mix.shares",
    "gated": "mix.gate",
    "routed": "mix.gate",
    "generated": "open",
}
each = pytest.mark.parametrize("member", MEMBERS)


def configured(member, dtype="float64"):
    fields = dict(levels=LEVELS, hidden=6, gradient="exact", pull=0.1)
    cms = CMSConfig(**fields | MEMBERS[member])
    attention = small.HOPE_ATTENTION
    return dataclasses.replace(attention, layers=1, cms=cms, dtype=dtype)


@pytest.fixture(autouse=True)
def wide():
    """Flax's norms mix their own float32 with float64, which strict promotion refuses."""
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
    counts = [(LENGTH - 1) // p for p in PERIODS]
    if configured(member).cms.variant == "nested":
        counts[0] = (LENGTH - 1) % PERIODS[1] // PERIODS[0]
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


@each
@pytest.mark.parametrize("part", ["levels.0.mlp", "levels.1.mlp", "rates", "own"])
def test_the_outer_gradient_is_that_of_finite_differences(member, part):
    """Through every move: in where the levels start, in their rates, and in what the
    member alone has."""
    if member in ROUNDED:
        pytest.skip("a rounded sum has no slope")
    part = PARTS.get(member) if part == "own" else part
    if part is None:
        pytest.skip("it has nothing of its own")
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
