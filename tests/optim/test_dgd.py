import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.core.level import Level, begin, unroll
from hope_jax.optim.rules.dgd import dgd


def problem(key, shape=(3, 4)):
    keys = jax.random.split(key, 3)
    w = jax.random.normal(keys[0], shape)
    x = jax.random.normal(keys[1], shape[-1:])
    return w, x, jax.random.normal(keys[2], shape[:-1])


@pytest.mark.parametrize("retention", [1.0, 0.7])
@pytest.mark.parametrize("eta", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("size", [0.1, 1.0, 2.5])
def test_the_closed_form_is_the_direct_solve(key, eta, size, retention):
    """W (x x^T + I / eta) = u x^T + alpha W_t / eta, by a linear solver."""
    w, x, delta = problem(key)
    x = size * x / jnp.linalg.norm(x)
    rule = dgd(eta, retention=retention)
    update, _ = rule.update(jnp.outer(delta, x), rule.init(w), w, inputs=x)
    left = np.outer(x, x) + np.eye(4) / eta
    right = np.outer(-delta, x) + retention * np.asarray(w) / eta
    expected = np.linalg.solve(left, right.T).T
    np.testing.assert_allclose(w + update, expected, rtol=2e-4, atol=1e-4)


def test_the_explicit_form_is_one_step(key):
    w, x, delta = problem(key)
    rule = dgd(0.1, explicit=True, retention=0.9)
    update, _ = rule.update(jnp.outer(delta, x), rule.init(w), w, inputs=x)
    expected = w @ (0.9 * jnp.eye(4) - 0.1 * jnp.outer(x, x)) - 0.1 * jnp.outer(
        delta, x
    )
    np.testing.assert_allclose(w + update, expected, rtol=1e-4, atol=1e-6)


def test_flax_kernels_and_leading_axes(key):
    w, x, delta = problem(key)
    g = jnp.outer(delta, x)
    for explicit in (False, True):
        column = dgd(0.5, explicit=explicit, retention=0.9)
        kernel = dgd(0.5, explicit=explicit, retention=0.9, input_axis=-2)
        expected, _ = column.update(g, column.init(w), w, inputs=x)
        update, _ = kernel.update(g.T, kernel.init(w.T), w.T, inputs=x)
        np.testing.assert_allclose(update.T, expected, rtol=1e-6)
        many = [jnp.stack([a, 2 * a]) for a in (g, w, x)]
        both, _ = column.update(many[0], column.init(many[1]), many[1], inputs=many[2])
        twice, _ = column.update(2 * g, column.init(w), 2 * w, inputs=2 * x)
        np.testing.assert_allclose(both[0], expected, rtol=1e-5)
        np.testing.assert_allclose(both[1], twice, rtol=1e-5)


def test_leaves_without_inputs_take_plain_steps_on_a_schedule(key):
    w, x, delta = problem(key)
    params = {"w": w, "b": delta}
    grads = {"w": jnp.outer(delta, x), "b": delta}
    rule = dgd(lambda count: jnp.array([0.1, 0.2])[count])
    state = rule.init(params)
    inputs = {"w": x, "b": None}
    first, state = rule.update(grads, state, params, inputs=inputs)
    second, state = rule.update(grads, state, params, inputs=inputs)
    np.testing.assert_allclose(first["b"], -0.1 * delta, rtol=1e-6)
    np.testing.assert_allclose(second["b"], -0.2 * delta, rtol=1e-6)
    assert float(jnp.abs(second["w"] - 2 * first["w"]).max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "fraction"), [("dot", 1.0), ("half_l2", 1 / 2), ("l2", 2 / 3)]
)
def test_what_a_memory_that_moves_by_dgd_comes_to_store(key, name, fraction):
    """Delta rule with the dot product; a fraction of the value with L2 (spec 1.2)."""

    def objective(m, item):
        k, v = item
        error = jnp.sum((m @ k - v) ** 2)
        return {"dot": -jnp.vdot(m @ k, v), "half_l2": error / 2, "l2": error}[name]

    level = Level(
        init=lambda key: jnp.zeros((2, 3)),
        read=lambda m, item: m @ item[0],
        objective=objective,
        flow=dgd(0.4),
        inputs=lambda m, item: item[0],
    )
    k, v = jnp.eye(3), jnp.array([[1.0, 2.0], [-1.0, 0.5], [3.0, 0.0]])
    context = jnp.tile(k, (40, 1)), jnp.tile(v, (40, 1))
    state, _ = unroll(level, begin(level, level.init(key)), context)
    np.testing.assert_allclose(state.params, fraction * v.T, rtol=1e-4, atol=1e-4)


def test_what_is_missing_or_does_not_fit_is_named(key):
    w, x, delta = problem(key)
    g, rule = jnp.outer(delta, x), dgd(0.1)
    state = rule.init(w)
    with pytest.raises(ValueError, match="dgd needs the parameters"):
        rule.update(g, state, inputs=x)
    with pytest.raises(ValueError, match="dgd needs `inputs`"):
        rule.update(g, state, w)
    with pytest.raises(ValueError, match=r"shape \(3,\) for a matrix of shape"):
        rule.update(g, state, w, inputs=delta)
    with pytest.raises(ValueError, match="retention .* got 1.2"):
        dgd(0.1, retention=1.2)
    with pytest.raises(ValueError, match="input_axis must be .* got 0"):
        dgd(0.1, input_axis=0)


def test_examples_in_docstrings():
    results = doctest.testmod(sys.modules[dgd.__module__])
    assert results.attempted > 0 and results.failed == 0
