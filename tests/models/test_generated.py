"""CMS moves that the mixers rule over: how long, on what, and with what gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import convert, lm, systems
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.learning import Learning
from tests.models import small, test_promises


def generated(config, **changes):
    cms = dataclasses.replace(config.cms, rates="generated", **changes)
    return dataclasses.replace(config, name=f"{config.name}, generated", cms=cms)


def opened_by(params, name, value):
    """The parameters with `value` for what opens moves: the kernel, or the bias."""

    def choose(path, leaf):
        wanted = f"['open']['{name}']" in jax.tree_util.keystr(path)
        return jnp.float32(np.broadcast_to(value, leaf.shape)) if wanted else leaf

    return jax.tree_util.tree_map_with_path(choose, params)


MODELS = {
    "hope": dataclasses.replace(small.HOPE, layers=1),
    "hybrid": dataclasses.replace(small.HYBRID, layers=2),
}


@pytest.fixture(scope="module", params=MODELS)
def ruled(request):
    return generated(MODELS[request.param])


@pytest.mark.slow
def test_factors_are_those_of_a_moves_own_tokens(ruled):
    """Factors of 1 are the plain model; of 0, one whose levels stand still; of 2,
    neither; all alike before the first move."""
    params = opened_by(small.built(ruled)[1], "kernel", 0.0)
    cms = dataclasses.replace(ruled.cms, rates="learned", pull=0.0)
    plain = dataclasses.replace(ruled, cms=cms)
    ruled = dataclasses.replace(ruled, cms=dataclasses.replace(ruled.cms, pull=0.0))

    def without(state):
        return type(state)(
            {
                k: without(v) if hasattr(v, "items") else v
                for k, v in state.items()
                if k != "open"
            }
        )

    def read(bias):
        own = opened_by(params, "bias", bias)
        return small.reading(ruled)(own, small.some_tokens(), None)[0]

    one, none, two = read(0.0), read(-1e9), read(1e9)
    want, _ = small.reading(plain)(without(params), small.some_tokens(), None)
    np.testing.assert_allclose(one, want, atol=1e-5)
    frozen = small.reading(ruled, learn=_no_cms(ruled))
    still, _ = frozen(params, small.some_tokens(), None)
    np.testing.assert_allclose(none, still, atol=1e-5)
    first = ruled.base_chunk
    for other in (none, two):
        np.testing.assert_allclose(other[:, :first], one[:, :first], atol=1e-6)
        assert np.abs(other - one)[:, first:].max() > 1e-4


def _no_cms(config):
    levels = tuple(i not in config.fast for i in range(len(config.cms.levels)))
    return Learning(levels=levels)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["first_order", "exact"])
def test_what_opens_a_move_has_a_gradient(gradient):
    """Equal to finite differences of the bias, whether moves are constants or not: a
    first move depends on it in no other way. The kernel has one
    too: what the mixers read enters."""
    ruled = generated(small.HOPE, gradient=gradient)
    graphdef, params = small.built(ruled)
    tokens = jnp.asarray(small.some_tokens(length=2 * ruled.base_chunk + 1))

    def loss(params):
        logits, _ = lm.apply(graphdef, params, tokens[:, :-1], labels=tokens[:, 1:])
        return lm.next_token_loss(logits, tokens[:, 1:]).mean()

    run = jax.jit(jax.value_and_grad(loss))
    slope = run(params)[1]["blocks"]["open"]
    assert np.abs(slope["kernel"][...]).max() > 1e-6
    slope = np.asarray(slope["bias"][...])
    for layer in range(ruled.layers):
        at = (layer, 0)  # of the only level that moves so soon
        shift = np.zeros_like(slope)
        shift[at] = 0.1
        up, down = (run(opened_by(params, "bias", s * shift))[0] for s in (1, -1))
        numeric = (up - down) / 0.2
        assert abs(numeric) > 1e-5
        np.testing.assert_allclose(slope[at], numeric, rtol=0.05)


@pytest.mark.slow
def test_pieces_and_single_tokens_open_the_same_moves(ruled):
    tokens = small.some_tokens()
    whole, after = small.read(ruled, tokens)
    state, parts = None, []
    for part in np.split(tokens, np.arange(8, small.LENGTH), axis=1):
        part, state = small.read(ruled, part, state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-4)
    for a, b in zip(after.levels, state.levels, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3), a.opened, b.opened
        )


def test_factors_leak_neither_from_the_future_nor_between_rows(ruled):
    """The first promise, bit for bit; what opens moves depends on what was read."""
    test_promises.test_1_no_future_no_other_row_and_the_past_arrives(ruled)
    _, state = small.read(ruled, small.some_tokens())
    opened = np.concatenate(jax.tree.leaves([v.opened for v in state.levels]), axis=1)
    assert np.ptp(opened) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("promise", ["test_1_in_bfloat16", "test_3_rows_in_bfloat16"])
def test_promises_in_bfloat16(promise):
    config = test_promises.half_precision(generated(small.HOPE))
    with jax.numpy_dtype_promotion("standard"):
        getattr(test_promises, promise)(config)


@pytest.mark.slow
def test_stacked_levels_open_afresh():
    """Weights of one moving level into two: factors of 1 for both, and their count."""
    level = CMSLevel(period=4, rate=0.5)
    one = dataclasses.replace(MODELS["hope"].cms, levels=(level,), rates="generated")
    config = dataclasses.replace(MODELS["hope"], cms=one)
    two = (level, CMSLevel(period=8, rate=0.5))
    stacked, params = convert.stack_levels(config, small.built(config)[1], two)
    kernel = params["blocks"]["open"]["kernel"][...]
    assert kernel.shape == (1, config.d_model, 2) and not kernel.any()
    logits, _ = small.reading(stacked)(params, small.some_tokens(), None)
    assert np.isfinite(logits).all()


def test_the_picture_shows_who_rules():
    def generates(config):
        return [e for e in systems.system(config, 64).edges if e.kind == "generate"]

    made, plain = generates(generated(small.HOPE)), generates(small.HOPE)
    more = [(e.source, e.target) for e in made if e not in plain]
    assert more == [("main memory", "CMS 1"), ("main memory", "CMS 2")]


def test_rates_of_nothing_are_refused():
    with pytest.raises(ValueError, match="rates='generated' is about levels that move"):
        CMSConfig(rates="generated")
    with pytest.raises(ValueError, match="rates must be one of learned, generated"):
        CMSConfig(rates="made")
