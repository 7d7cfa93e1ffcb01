"""Attentional biases: their gradients against formulas, and where they bend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.memory import bias
from tests import compare

close = compare.within_both(1e-5)

VALUE = jnp.array([1.0, -2.0, 0.5])
NEAR, FAR = jnp.array([0.3, -0.2, 0.1]), jnp.array([3.0, -4.0, 0.2])
BETWEEN = jnp.array([0.5, -0.3, 0.1])  # its norm lies between delta and its root
DELTA = jnp.array(0.5)


def gradient(name, error, delta=DELTA, **options):
    return jax.grad(bias.build(name, **options))(VALUE + error, VALUE, delta)


@pytest.mark.parametrize("error", [NEAR, BETWEEN, FAR], ids=["near", "between", "far"])
@pytest.mark.parametrize(
    "name, formula",
    [
        ("dot", lambda r, far: -VALUE),
        ("l2", lambda r, far: r),
        ("lp", lambda r, far: 3 * jnp.sign(r) * r**2),
        ("huber", lambda r, far: jnp.clip(r, -DELTA, DELTA)),
        ("huber_norm", lambda r, far: DELTA * r / jnp.linalg.norm(r) if far else r),
        ("huber_switched", lambda r, far: DELTA * jnp.sign(r) if far else r),
        ("value_shift", lambda r, far: r + DELTA * r / jnp.linalg.norm(r)),
        ("kl", lambda r, far: jax.nn.softmax(VALUE + r) - jax.nn.softmax(VALUE)),
    ],
)
def test_gradients(name, formula, error):
    close(gradient(name, error), formula(error, error is not NEAR), 1e-4)


@pytest.mark.parametrize(
    "name, at_three_four, at_half",
    [
        ("dot", -1.0, -1.5),  # -<r + v, v> with v = (1, -1)
        ("l2", 12.5, 0.125),
        ("lp", 91.0, 0.125),  # 27 + 64
        ("huber", 6.0, 0.125),  # (3 - 1/2) + (4 - 1/2)
        ("huber_norm", 4.5, 0.125),  # 5 - 1/2
        ("huber_switched", 7.0, 0.125),  # 3 + 4
        ("value_shift", 18.0, 1.125),  # (5 + 1)^2 / 2, (1/2 + 1)^2 / 2
    ],
)
def test_values_by_hand(name, at_three_four, at_half):
    """Errors (3, 4) and (0, 1/2) with a threshold of 1."""
    value, one = jnp.array([1.0, -1.0]), jnp.array(1.0)
    loss = bias.build(name)
    close(loss(value + jnp.array([3.0, 4.0]), value, one), at_three_four)
    close(loss(value + jnp.array([0.0, 0.5]), value, one), at_half)


def test_kl_by_hand():
    """Softmaxes (1/4, 3/4) of the output and (1/2, 1/2) of the value."""
    output, value = jnp.log(jnp.array([1.0, 3.0])), jnp.zeros(2)
    close(bias.kl(output, value), 0.5 * np.log(2.0) + 0.5 * np.log(2.0 / 3.0))
    close(bias.kl(output, output), 0.0)


@pytest.mark.parametrize("name", [n for n in bias.BIASES if n != "dot"])
def test_no_error_no_step(name):
    close(gradient(name, jnp.zeros(3)), np.zeros(3), 1e-7)


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("name, power", [(n, 3.0) for n in bias.BIASES] + [("lp", 1.0)])
def test_the_level_above_can_differentiate_a_step_without_error(name, power, delta):
    loss = bias.build(name, power=power)
    step = jax.grad(loss)
    jacobians = jax.jacobian(step, argnums=(0, 1, 2))(VALUE, VALUE, jnp.array(delta))
    assert all(bool(jnp.isfinite(j).all()) for j in jacobians)


@pytest.mark.parametrize("name", ["huber", "huber_norm", "huber_switched"])
def test_a_threshold_no_error_reaches_is_l2(name):
    wide = jnp.array(100.0)
    close(gradient(name, FAR, wide), FAR)
    close(bias.build(name)(VALUE + FAR, VALUE, wide), bias.l2(VALUE + FAR, VALUE))


@pytest.mark.parametrize("name", ["huber", "huber_switched"])
def test_the_threshold_learns_from_far_errors_alone(name):
    """d (delta sign(r)) / d delta, in the one direction (1, 1, 1)."""

    def step(delta, error):
        return jnp.sum(gradient(name, error, delta))

    slope = jax.grad(step)
    close(slope(jnp.array(9.0), FAR), 0.0)
    close(slope(jnp.array(0.1), FAR), 1.0 - 1.0 + 1.0, 2e-5)


def test_lp_at_two_is_twice_l2():
    smoothing = 3 * 1e-6
    output = VALUE + FAR
    close(bias.build("lp", power=2.0)(output, VALUE, None), 2 * bias.l2(output, VALUE))
    close(bias.build("lp", power=2.0)(VALUE, VALUE, None), smoothing, 1e-9)
    close(gradient("lp", FAR, power=2.0), 2 * FAR)


def test_lp_at_one_takes_signs_alone():
    close(gradient("lp", FAR, power=1.0), jnp.sign(FAR), 2e-5)
    close(gradient("lp", 10.0 * FAR, power=1.0), jnp.sign(FAR), 2e-5)


def test_value_shift_is_the_worst_value_in_reach():
    """Values within delta of v: the worst lies opposite to the error."""
    error, angle = jnp.array([3.0, 4.0]), jnp.linspace(0.0, 2 * jnp.pi, 10_001)
    shifts = 2.0 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    losses = jax.vmap(lambda shift: bias.l2(error, shift))(shifts)
    worst = bias.value_shift(error, jnp.zeros(2), jnp.array(2.0))
    close(worst, losses.max(), 1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name="hubber"), "no bias 'hubber'; .*kl. Did you mean 'huber'?"),
        (dict(name="l7"), "no bias 'l7'; the names are dot, l2"),
        (dict(name="lp", power=0.5), "power must be at least 1 .* got 0.5"),
    ],
    ids=str,
)
def test_biases_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        bias.build(**arguments)
