"""Tests of the two examples that arXiv:2512.24695 gives for optimizers' memories."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import fig4_toy
from hope_jax.data.synthetic import orthogonal
from hope_jax.optim.momenta import delta_momentum, momentum

SETTINGS = orthogonal.OrthogonalConfig(tasks=3, rank=2, width=7, outputs=3)


def inside(change, subspace):
    """The part of a change, in squared length, that lies in a subspace."""
    return jnp.sum((change @ subspace) ** 2) / jnp.sum(change**2)


def test_equation_45_momentum_loses_the_subspaces_of_earlier_tasks(key):
    """L_i = E (W x - y)^2: gradients of task i lie in its subspace, and so, once task
    i lasts, does all of the memory: what it knew of others goes like alpha^n.

    Implements: hope_jax.optim.momenta.momentum
    """
    of = orthogonal.tasks(SETTINGS, key)
    columns = jnp.concatenate(list(of.subspaces), axis=1)
    np.testing.assert_allclose(columns.T @ columns, np.eye(6), atol=1e-5)

    # The loss on a large batch is the error of every task, which is exact.
    w = jax.random.normal(jax.random.key(1), (3, 7))
    gradients = []
    for i in range(3):
        given = of.subspaces[i], of.targets[i]
        x, y = orthogonal.batch(*given, 0.0, 20_000, jax.random.key(2))
        loss, gradient = jax.value_and_grad(orthogonal.loss)(w, x, y)
        by_hand = np.mean(np.sum((np.asarray(x) @ np.asarray(w).T - y) ** 2, 1))
        np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
        exact = orthogonal.errors(w, of)[i] * jnp.sum(given[1] ** 2)
        np.testing.assert_allclose(loss, exact, rtol=0.05)
        gradients.append(gradient)
        for j in range(3):
            expected = 1.0 if i == j else 0.0
            part = inside(gradient, of.subspaces[j])
            np.testing.assert_allclose(part, expected, atol=1e-5)

    rule = momentum(0.1, decay=0.8)
    state = rule.init(w)
    for _ in range(30):
        _, state = rule.update(gradients[0], state)
    before = jnp.linalg.norm(state.memory @ of.subspaces[0])
    for _ in range(30):
        _, state = rule.update(gradients[1], state)
    kept = jnp.linalg.norm(state.memory @ of.subspaces[0])
    np.testing.assert_allclose(kept, 0.8**30 * before, rtol=1e-2)
    assert inside(state.memory, of.subspaces[1]) > 0.99999


def test_equation_53_delta_momentum_on_the_bending_valley():
    """psi = r^2 + k (r - theta + a sin(w r))^2, and a path on it by hand.

    Implements: hope_jax.optim.momenta.delta_momentum
    """
    k, a, w = constants = np.array([4.0, 1.0, 2.0])
    start, rate, decay = np.array([-3.5, 2.0]), 0.05, 0.9

    def psi(r, theta):
        return r**2 + k * (r - theta + a * np.sin(w * r)) ** 2

    given = jnp.array(constants, jnp.float32)
    value = fig4_toy.psi(jnp.array(start, jnp.float32), given)
    np.testing.assert_allclose(value, psi(*start), rtol=1e-5)
    assert fig4_toy.psi(jnp.zeros((2,)), given) == 0.0  # the optimum
    in_the_valley = jnp.array([1.3, 1.3 + np.sin(2.6)], jnp.float32)
    np.testing.assert_allclose(fig4_toy.psi(in_the_valley, given), 1.69, rtol=1e-4)

    path = fig4_toy.path(
        delta_momentum(rate, decay=decay), given, jnp.array(start, jnp.float32), 5
    )
    at, memory = start, np.zeros(2)
    for reached in path:
        r, theta = at
        bent = r - theta + a * np.sin(w * r)
        slope = 2 * k * bent * (1 + a * w * np.cos(w * r))
        gradient = np.array([2 * r + slope, -2 * k * bent])
        memory = (decay * memory - rate * gradient) / (1 + rate * gradient**2)
        at = at + memory
        np.testing.assert_allclose(reached, at, rtol=1e-3, atol=1e-4)
    plain = fig4_toy.path(optax.sgd(rate), given, jnp.array(start, jnp.float32), 1)
    assert abs(plain[0][0] - path[0][0]) > 0.1  # the first gradient is large
