"""Adam and AdaGrad are the minima that Appendix B says they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.optim.adaptive import adagrad_memory, adam_memory
from tests import compare

close = compare.within(1e-6, 1e-9)

ETA = 0.3


def updates(rule, gradients):
    at = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)
    rule = optax.with_extra_args_support(rule)

    def step(state, gradient):
        update, state = rule.update(gradient, state, at)
        return state, update

    with jax.numpy_dtype_promotion("standard"):
        return jax.lax.scan(step, rule.init(at), gradients)[1]


def stream(shape=(2, 3), steps=12, dtype=None):
    g = np.random.default_rng(0).standard_normal((steps, *shape))
    return jnp.asarray(g, dtype)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-2])
@pytest.mark.parametrize("b1, b2", [(0.9, 0.999), (0.0, 0.9)])
def test_without_a_ridge_it_is_adam(float64, eps, b1, b2):
    g = stream()
    assert g.dtype == jnp.float64
    ours = updates(adam_memory(ETA, b1=b1, b2=b2, eps=eps), g)
    close(ours, updates(optax.adam(ETA, b1=b1, b2=b2, eps=eps), g))


def test_it_is_adam_in_float32_with_a_schedule():
    def rate(count):
        return 0.1 / (1.0 + count)

    g = stream()
    close(updates(adam_memory(rate), g), updates(optax.adam(rate), g), 2e-4, 1e-6)


def test_onto_squares_it_is_momentum(float64):
    """P = H: every step is the mean of past gradients (equation 104)."""
    g = stream()
    ours = updates(adam_memory(ETA, target="square"), g)
    close(ours, -ETA * updates(optax.ema(0.9), g))


@pytest.mark.parametrize("target", ["root", "square"])
@pytest.mark.parametrize("ridge", [0.0, 0.5, 40.0])
def test_the_literal_step_is_the_minimum(float64, target, ridge):
    g = stream(steps=6)
    rule = adam_memory(
        1.0, b1=1.0, b2=1.0, eps=0.0, ridge=ridge, target=target, literal=True
    )
    m = -updates(rule, g)[-1]
    h = jnp.sum(g**2, axis=0)
    p = jnp.sqrt(h) if target == "root" else h

    def objective(m):
        errors = m[None] * g - p[None]
        return jnp.sum(errors**2) + ridge * jnp.sum(m**2)

    close(jax.grad(objective)(m), jnp.zeros_like(m), atol=1e-8)


def test_the_printed_factors_scale_the_step(float64):
    g = stream()

    def last(target, b1, b2):
        rule = adam_memory(ETA, b1=b1, b2=b2, eps=0.0, target=target, literal=True)
        return updates(rule, g)[-1]

    for target in ("root", "square"):  # by b1 / b2, whatever P is
        close(last(target, 0.5, 0.25), 2.0 * last(target, 1.0, 1.0))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize(
    "rule",
    [
        adam_memory(ETA, eps=0.0),
        adagrad_memory(ETA, eps=0.0),
        adagrad_memory(ETA, form="outer"),
    ],
    ids=["adam", "adagrad", "outer"],
)
def test_the_step_does_not_know_the_size_of_gradients(rule, scale):
    """In float32, where their squares do not fit."""
    g = stream((4,), dtype=jnp.float32)
    close(updates(rule, scale * g), updates(rule, g), 1e-2, 1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda ridge: adam_memory(ETA, eps=0.0, ridge=ridge),
        lambda ridge: adagrad_memory(ETA, eps=0.0, ridge=ridge),
        lambda ridge: adagrad_memory(ETA, eps=0.0, ridge=ridge, form="outer"),
    ],
    ids=["adam", "adagrad", "outer"],
)
def test_the_limit_of_a_small_ridge(float64, make):
    """The distance to the step without a ridge falls with it, in proportion."""
    g = stream((3,))
    limit = updates(make(0.0), g)[-1]
    far, near = (
        float(jnp.abs(updates(make(ridge), g)[-1] - limit).max())
        for ridge in (1e-3, 1e-4)
    )
    assert 0 < near < 1e-2 * ETA
    np.testing.assert_allclose(far / near, 10.0, rtol=0.02)


def test_it_is_adagrad(float64):
    g = stream()
    theirs = optax.adagrad(ETA, initial_accumulator_value=0.0, eps=0.0)
    close(updates(adagrad_memory(ETA, eps=0.0), g), updates(theirs, g))


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_full_adagrad_against_a_direct_root(float64, decay, shape):
    g = stream(shape)
    ours = updates(adagrad_memory(ETA, form="outer", eps=0.0, decay=decay), g)
    h, m = 0.0, 0.0
    for t, one in enumerate(np.asarray(g).reshape(len(g), -1, shape[-1])):
        h, m = h + one.T @ one, decay * m + one
        values, vectors = np.linalg.eigh(h)
        kept = values > 1e-10 * values.max()  # the pseudo-inverse
        power = np.where(kept, np.where(kept, values, 1.0) ** -0.5, 0.0)
        expected = -ETA * m @ (vectors * power) @ vectors.T
        close(np.reshape(ours[t], expected.shape), expected, 1e-5, 1e-6)


def test_the_outer_form_is_the_minimum_with_the_inverse_on_the_right(float64):
    """Sum |m g - P|^2 + l |m|^2 for a vector P: m* = P M^T (H + l I)^-1."""
    g, p, ridge = stream((4,), steps=6), stream((2,), steps=1)[0], 0.7

    def objective(m):
        return jnp.sum((g @ m.T - p[None]) ** 2) + ridge * jnp.sum(m**2)

    h, first = g.T @ g, jnp.sum(g, axis=0)
    m = jnp.outer(p, first) @ jnp.linalg.inv(h + ridge * jnp.eye(4))
    close(jax.grad(objective)(m), jnp.zeros_like(m), atol=1e-10)
    values, vectors = jnp.linalg.eigh(h)
    root = (vectors * jnp.sqrt(values)[None]) @ vectors.T
    expected = -ETA * first @ root @ jnp.linalg.inv(h + ridge * jnp.eye(4))
    rule = adagrad_memory(ETA, form="outer", decay=1.0, eps=0.0, ridge=ridge)
    close(updates(rule, g)[-1], expected, 1e-6)


def test_along_axes_the_two_forms_agree(float64):
    g = jnp.eye(3)[jnp.array([0, 1, 0, 2, 1, 0])] * stream((1,), steps=6)
    element, outer = (
        updates(adagrad_memory(ETA, form=form, eps=0.0), g)
        for form in ("element", "outer")
    )
    close(outer, element)
    assert float(jnp.abs(outer[0, 1])) == 0.0  # no gradient has been there


def test_choices_that_are_none_are_refused():
    for changes, message in (
        ({"b1": 1.0}, r"b1 is a decay in \[0, 1\), got 1.0"),
        ({"b2": 0.0, "literal": True}, r"b2 is a factor in \(0, 1\] .* got 0.0"),
        ({"ridge": -1.0}, "ridge must not be negative, got -1.0"),
        ({"target": "cube"}, "target must be 'root' or 'square', got 'cube'"),
    ):
        with pytest.raises(ValueError, match=message):
            adam_memory(ETA, **changes)
    for changes, message in (
        ({"decay": 1.5}, r"decay is the part .* got 1.5"),
        ({"eps": -1.0}, "eps must not be negative, got -1.0"),
        ({"form": "row"}, "form must be 'element' or 'outer', got 'row'"),
    ):
        with pytest.raises(ValueError, match=message):
            adagrad_memory(ETA, **changes)
    with pytest.raises(ValueError, match=r"shape \(2, 9\) needs a matrix of 9 x 9"):
        adagrad_memory(ETA, form="outer", max_width=8).init(jnp.ones((2, 9)))
