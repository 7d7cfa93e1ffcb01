"""Who learns while reading: each switch moves its part of the state, and no other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import learning, lm
from hope_jax.models.learning import Controls, Learning
from tests.models import small

ONE_LAYER = dict(layers=1)
# A rule with a state shows a move even where there is no gradient.
ADAM = dataclasses.replace(small.HOPE.cms, rule="adam")
HOPE = dataclasses.replace(small.HOPE, cms=ADAM, **ONE_LAYER)
ATTENTION = dataclasses.replace(small.HOPE_ATTENTION, **ONE_LAYER)
TRANSFORMER = dataclasses.replace(small.TRANSFORMER, **ONE_LAYER)
STILL = small.without_rates(HOPE)
DELTA = dataclasses.replace(TRANSFORMER, name="delta", mixer="gated_delta_net")
MODELS = (HOPE, ATTENTION, TRANSFORMER, DELTA)
TOKENS = small.some_tokens(3, length=13)


@functools.cache
def begin(config):
    return small.start(config, len(TOKENS))


@functools.cache
def read(config, learn, aligned=True):
    """Whole chunks whose labels are known, from the start, are the smallest program."""
    graphdef, params = small.built(config)

    @jax.jit
    def run(params, state):
        if not aligned:
            return lm.apply(graphdef, params, TOKENS[:, :9], state, learn=learn)
        labels = TOKENS[:, 1:]
        return lm.apply(graphdef, params, TOKENS[:, :-1], labels=labels, learn=learn)

    start = begin(config)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam counts in int32
        return start, *run(params, start)


def parts(state):
    """The parts of a Hope's state that learn; memories as their weights, momentum."""
    found = {
        "main": (state.blocks.mixer.main.weights, state.blocks.mixer.main.momentum),
        "projections": (
            state.blocks.mixer.projection.weights,
            state.blocks.mixer.projection.momentum,
        ),
    }
    for i, (weights, level) in enumerate(
        zip(state.blocks.fast, state.levels, strict=True)
    ):
        found[f"level {i}"] = (weights, level)
    return found


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
def test_with_everything_on_it_is_true(config):
    assert learning.resolve(config, Learning()) == learning.resolve(config, True)


@pytest.mark.slow
@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.name)
def test_with_everything_off_every_bit_is_that_of_false(config):
    off = read(config, learning.off(config))
    jax.tree.map(np.testing.assert_array_equal, off, read(config, False))
    if config is HOPE:
        before, after = parts(off[0]), parts(off[2])
        assert all(same(before[part], after[part]) for part in before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, learn, aligned",
    [
        ("main", Learning(main=False), True),
        ("main", Learning(main=False), False),
        ("projections", Learning(projections=False), True),
        ("level 0", Learning(levels=(False, True, True)), True),
        ("level 0", Learning(levels=(False, True, True)), False),
        ("level 1", Learning(levels=(True, False, True)), True),
    ],
)
def test_a_switch_stills_its_part_alone(name, learn, aligned):
    start, logits, after = read(HOPE, learn, aligned)
    before, now = parts(start), parts(after)
    assert {p for p in now if same(before[p], now[p])} == {name}
    if aligned:
        assert not same(logits, read(HOPE, True)[1])


@pytest.mark.parametrize(
    "config, learn, message",
    [
        (HOPE, Learning(levels=(True, False)), "each of the 3 CMS levels, got 2"),
        (STILL, Learning(levels=(True, True, False)), "CMS 3 of 'hope' never moves"),
        (ATTENTION, Learning(main=False), "learn.main is False.*no memory"),
        (DELTA, Learning(projections=False), "learn.projections is False.*no proj"),
        (ATTENTION, Learning(controls=Controls(flip=True)), "controls.flip is True"),
        (DELTA, Learning(controls=Controls(steps=2)), "controls.steps is 2.*one step"),
    ],
)
def test_refuses_what_a_model_has_not(config, learn, message):
    with pytest.raises(ValueError, match=message):
        learning.resolve(config, learn)


def test_refuses_other_numbers_of_steps():
    with pytest.raises(ValueError, match="steps must be 1, 2 or 4, got 3"):
        Controls(steps=3)


def test_controls_of_tokens_by_hand():
    from hope_jax.memory.compose import Tokens

    one = jnp.ones((2,))
    tokens = Tokens(2 * jnp.ones((2, 3)), one, jnp.ones((2, 3)), one, one, one)
    flipped = Controls(flip=True).on(tokens)
    assert same(flipped, tokens._replace(eta=-one))
    assert same(Controls(q_is_k=True).on(tokens), tokens._replace(q=tokens.k))
    assert Controls().on(tokens) is tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "controls", [Controls(flip=True), Controls(q_is_k=True), Controls(steps=2)], ids=str
)
def test_controls_change_what_hope_reads(controls):
    """With everything still, only what is read can differ."""
    logits = read(HOPE, True)[1]
    assert not same(logits, read(HOPE, Learning(controls=controls))[1])
    stopped = dataclasses.replace(learning.off(HOPE), controls=controls)
    still = same(read(HOPE, False)[1], read(HOPE, stopped)[1])
    assert still != controls.q_is_k


def test_controls_reach_named_memories():
    logits = read(DELTA, True)[1]
    for controls in (Controls(flip=True), Controls(q_is_k=True)):
        assert not same(logits, read(DELTA, Learning(controls=controls))[1])
