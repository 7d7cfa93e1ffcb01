"""Families of small problems for optimizers, whose losses are about 1 at the start.

quadratics   sum of lambda_i e_i^2, e = Q w, of 16 weights, their condition between
             10 and 1000, the largest lambda 1 (which suits a rate for all), turned
             by a random Q so that no axis is special; exact
networks     a tanh network of 6 units learns another of random weights, on a fresh
             batch at every step, so that its gradients are noisy
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hope_jax.optim.meta import Family, Task

FLOOR = 1e-8  # of every loss: a problem solved to here is solved


def quadratic(key: Array) -> Task:
    """Sixteen weights whose axes say nothing."""
    keys, width = jax.random.split(key, 4), 16
    condition = 10.0 ** jax.random.uniform(keys[0], (), minval=1.0, maxval=3.0)
    curvature = condition ** -jax.random.uniform(keys[1], (width,))
    curvature = curvature / jnp.max(curvature)
    turned = jax.random.orthogonal(keys[2], width)
    start = jax.random.normal(keys[3], (width,))

    def loss(w, key):
        del key
        return jnp.sum(curvature * (turned @ w) ** 2) + FLOOR

    return Task(start / jnp.sqrt(loss(start, key)), loss)


def network(key: Array) -> Task:
    """A small network learns from one of its own size, steeper than itself."""
    keys, inputs, units, batch = jax.random.split(key, 3), 3, 6, 16

    def draw(key, steepness):
        keys = jax.random.split(key)
        return {
            "w1": steepness * jax.random.normal(keys[0], (units, inputs)) / inputs**0.5,
            "b1": jnp.zeros((units,)),
            "w2": jax.random.normal(keys[1], (units,)) / units**0.5,
            "b2": jnp.zeros(()),
        }

    def answer(p, x):
        return jnp.tanh(x @ p["w1"].T + p["b1"][None]) @ p["w2"] + p["b2"]

    teacher = draw(keys[0], 2.0)
    size = jnp.mean(answer(teacher, jax.random.normal(keys[2], (256, inputs))) ** 2)

    def loss(p, key):
        x = jax.random.normal(key, (batch, inputs))
        return jnp.mean((answer(p, x) - answer(teacher, x)) ** 2) / size + FLOOR

    return Task(draw(keys[1], 1.0), loss)


FAMILIES: dict[str, Family] = {"quadratics": quadratic, "networks": network}
