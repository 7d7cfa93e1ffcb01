"""Noise for labels and for gradients, each kind in its own amount.

    labels    a share of the labels is replaced by another class
    gaussian  g + s z,  z ~ N(0, I) at every step
    student   g + s t,  t of Student's distribution with 2 degrees of freedom, number
              by number: its variance is infinite
    spikes    g + s z at one step of fifty, g at the others

where s is the amount times a unit that is the caller's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

SPIKES = 0.02  # the share of steps that have one


class Noise(NamedTuple):
    """How much of each kind: a share of the labels, and s in units of the others."""

    labels: Float[Array, "*C"] | float = 0.0
    gaussian: Float[Array, "*C"] | float = 0.0
    student: Float[Array, "*C"] | float = 0.0
    spikes: Float[Array, "*C"] | float = 0.0


def replace_labels(
    y: Int[Array, " N"], share, key: Array, classes: int = 10
) -> Int[Array, " N"]:
    """`y` with a share of it turned into any other class."""
    keys = jax.random.split(key)
    other = (y + jax.random.randint(keys[0], y.shape, 1, classes)) % classes
    return jnp.where(jax.random.uniform(keys[1], y.shape) < share, other, y)


def draw(noise: Noise, like: PyTree, key: Array) -> PyTree:
    """What is added to a gradient at one step, in the unit of the amounts."""
    flat, restore = ravel_pytree(like)
    keys = jax.random.split(key, 3)
    z = jax.random.normal(keys[0], flat.shape)
    # The inverse of the distribution function is known for 2 degrees of freedom.
    p = jax.random.uniform(keys[1], flat.shape, minval=1e-6, maxval=1.0 - 1e-6)
    t = (2.0 * p - 1.0) / jnp.sqrt(2.0 * p * (1.0 - p))
    spike = jnp.where(jax.random.uniform(keys[2]) < SPIKES, noise.spikes, 0.0)
    return restore((noise.gaussian + spike) * z + noise.student * t)
