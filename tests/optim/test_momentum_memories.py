"""Momentum with preconditioners, feature maps and non-linear outputs."""

import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.kernels.newton_schulz import orthogonalise
from hope_jax.optim.momenta import (
    delta_momentum,
    feature_map_momentum,
    momentum,
    nonlinear_momentum,
    preconditioned_momentum,
)
from tests import compare

close = compare.within()

ETA, ALPHA = 0.3, 0.9


def params():
    return {
        "w": jnp.linspace(-1.0, 2.0, 6).reshape(2, 3),
        "b": jnp.array([0.5, -0.5]),
        "s": jnp.array(1.5, jnp.float32),
    }


def stream(key, shape, steps=5):
    return jax.random.normal(key, (steps, *shape))


def updates(rule, gradients, start=None):
    """Every update along a stream of gradients, at parameters that stand still."""
    at = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)
    at = at if start is None else start

    def step(state, gradient):
        update, state = rule.update(gradient, state, at)
        return state, update

    return jax.lax.scan(step, rule.init(at), gradients)[1]


# Preconditioned, mapped, and bent at the output.


def test_a_preconditioner_multiplies_from_the_left(key):
    g = {"w": stream(key, (2, 3)), "b": stream(key, (2,)), "s": stream(key, ())}
    matrix = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    rule = preconditioned_momentum(
        ETA, {"w": matrix, "b": matrix, "s": jnp.array(5.0)}, decay=ALPHA
    )
    mapped = {
        "w": jnp.einsum("rs,tsc->trc", matrix, g["w"]),
        "b": jnp.einsum("rs,ts->tr", matrix, g["b"]),
        "s": 5.0 * g["s"],
    }
    close(updates(rule, g), updates(momentum(ETA, decay=ALPHA), mapped))
    unlike = preconditioned_momentum(ETA, {"w": None, "b": matrix, "s": None})
    close(updates(unlike, g)["w"], updates(momentum(ETA), g)["w"])


def test_a_preconditioner_may_be_a_function_or_a_transformation(key):
    g = stream(key, (2, 3))
    rule = preconditioned_momentum(ETA, jnp.sign, decay=ALPHA)
    close(updates(rule, g), updates(momentum(ETA, decay=ALPHA), jnp.sign(g)))
    adaptive = preconditioned_momentum(ETA, optax.scale_by_rms(), decay=ALPHA)
    scaled = updates(optax.scale_by_rms(), g)
    close(updates(adaptive, g), updates(momentum(ETA, decay=ALPHA), scaled))


def test_a_preconditioner_sees_float32():
    """In bfloat16 the second moment of RMSProp would stand still."""
    w = jnp.ones((2,), jnp.bfloat16)
    rule = preconditioned_momentum(0.1, optax.scale_by_rms(decay=0.999))
    update, state = rule.update(w, rule.init(w), w)
    assert update.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32)


def test_a_feature_map_comes_before_the_preconditioner(key):
    g = stream(key, (2, 2))
    matrix = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    rule = feature_map_momentum(ETA, jnp.sign, decay=ALPHA, precondition=matrix)
    mapped = jnp.einsum("rs,tsc->trc", matrix, jnp.sign(g))
    close(updates(rule, g), updates(momentum(ETA, decay=ALPHA), mapped))
    sign = feature_map_momentum(ETA, jnp.sign, decay=0.0)
    close(updates(sign, g), -ETA * jnp.sign(g))


def test_the_identity_at_the_output_is_momentum(key):
    g = {"w": stream(key, (2, 3)), "s": stream(key, ())}
    for literal in (False, True):
        rule = nonlinear_momentum(ETA, lambda m: m, decay=ALPHA, literal=literal)
        close(updates(rule, g), updates(momentum(ETA, decay=ALPHA), g))


def test_newton_schulz_at_the_output_is_muon(key):
    g = stream(key, (3, 4))
    ours = updates(nonlinear_momentum(ETA, decay=ALPHA), g)
    trace = jnp.stack(
        [sum(ALPHA ** (t - i) * g[i] for i in range(t + 1)) for t in range(5)]
    )
    close(ours, -ETA * orthogonalise(trace), rtol=1e-3, atol=1e-4)
    with jax.numpy_dtype_promotion("standard"):
        muon = optax.contrib.scale_by_muon(beta=ALPHA, nesterov=False)
        theirs = updates(muon, g)
    close(ours, -ETA * theirs, rtol=5e-2, atol=2e-3)  # whose products are bfloat16
    s = np.linalg.svd(ours[-1] / ETA, compute_uv=False)
    assert 0.6 < s.min() and s.max() < 1.25


def test_the_printed_muon_throws_its_rate_away(key):
    g = stream(key, (3, 4))
    small, large = (
        updates(nonlinear_momentum(eta, decay=ALPHA, literal=True), g)
        for eta in (0.01, 10.0)
    )
    close(small, large, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_muon_is_blind_to_the_size_of_gradients(key, scale):
    g = stream(key, (3, 4))
    rule = nonlinear_momentum(ETA)
    close(updates(rule, scale * g), updates(rule, g), rtol=1e-3, atol=1e-4)


# Delta momentum at the ends of the range of a float.


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (4,), (3, 3)])
@pytest.mark.parametrize("scale", [1e-20, 1e3, 1e18])
def test_the_proximal_matrix_form_at_any_scale(key, shape, scale):
    """Against singular values: s goes to −η s / (1 + η s²), also for rank one."""
    for g in (jax.random.normal(key, shape), jnp.ones(shape)):
        rule = delta_momentum(ETA, form="matrix", decay=ALPHA)
        update, _ = rule.update(scale * g, rule.init(g))
        u, s, v = np.linalg.svd(
            np.asarray(g, np.float64).reshape(-1, shape[-1]), full_matrices=False
        )
        s = s * (s > 1e-6) * scale
        expected = (u * (-ETA * s / (1 + ETA * s**2))) @ v
        size = np.abs(expected).max()
        np.testing.assert_allclose(
            np.reshape(update, expected.shape) / size, expected / size, atol=1e-2
        )


def test_delta_momentum_element_wise_at_the_ends_of_the_range():
    for stability, expected in (("proximal", 0.0), ("clip", -ETA * 1e20)):
        rule = delta_momentum(ETA, stability=stability)
        update, _ = rule.update(jnp.array(1e20), rule.init(jnp.array(1.0)))
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-18)
    off = delta_momentum(lambda count: jnp.zeros(()), stability="clip")  # in a warm-up
    update, _ = off.update(jnp.array(1e20), off.init(jnp.array(1.0)))
    np.testing.assert_array_equal(update, 0.0)


def test_choices_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 3\) for a gradient .* \(2, 3\)"):
        rule = preconditioned_momentum(ETA, jnp.eye(3))
        rule.update(jnp.ones((2, 3)), rule.init(jnp.ones((2, 3))))
    with pytest.raises(ValueError, match="precondition must be a function"):
        rule = preconditioned_momentum(ETA, {"other": jnp.eye(2)})
        rule.update(params(), rule.init(params()))
    with pytest.raises(ValueError, match="feature_map must be a function, got 'elu'"):
        feature_map_momentum(ETA, "elu")
    with pytest.raises(ValueError, match=r"feature_map made shape \(4,\) .* \(2,\)"):
        rule = feature_map_momentum(ETA, lambda g: jnp.concatenate([g, g]))
        rule.update(jnp.ones(2), rule.init(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"sigma must keep the shape: .* \(1, 1\)"):
        rule = nonlinear_momentum(ETA, lambda m: m[:1, :1])
        rule.update(jnp.ones(2), rule.init(jnp.ones(2)))
    for make in (nonlinear_momentum, lambda e, decay: delta_momentum(e, decay=decay)):
        with pytest.raises(ValueError, match=r"in \[0, 1\]; got -0.1"):
            make(ETA, decay=-0.1)


def test_examples_in_docstrings():
    results = doctest.testmod(sys.modules[momentum.__module__])
    assert results.attempted > 0 and results.failed == 0
