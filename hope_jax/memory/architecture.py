"""Memory architectures: the function class of an associative memory.

A parameter is a matrix that multiplies a vector, and `inputs` names that vector for
each of them, because delta gradient descent forgets along it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Weights = dict[str, Array]


class Architecture(NamedTuple):
    """A memory for one stream and one head; callers `vmap`.

    Attributes:
      init: `key -> weights`, float32.
      apply: `(weights, x: [K]) -> [V]`.
      inputs: `(weights, x: [K]) -> {name: vector}`, what each matrix multiplies.
    """

    init: Callable[[Array], Weights]
    apply: Callable[[Weights, Array], Array]
    inputs: Callable[[Weights, Array], dict[str, Array]]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def linear(width: int) -> Architecture:
    """`M x`: a matrix, zero at the start unless the level above learns its start."""

    def apply(weights: Weights, x: Float[Array, " K"]) -> Float[Array, " V"]:
        return weights["w"] @ x

    return Architecture(
        init=lambda key: {"w": jnp.zeros((width, width), jnp.float32)},
        apply=apply,
        inputs=lambda weights, x: {"w": x},
    )


def mlp(width: int, hidden: int, activation: str = "gelu") -> Architecture:
    """`x + W1 sigma(W2 x)`: the residual memory of equation 89 (arXiv:2512.24695)."""
    sigma = ACTIVATIONS[activation]

    def init(key: Array) -> Weights:
        key_1, key_2 = jax.random.split(key)
        return {
            "w1": jax.random.normal(key_1, (width, hidden)) * (0.5 * hidden**-0.5),
            "w2": jax.random.normal(key_2, (hidden, width)) * width**-0.5,
        }

    def apply(weights: Weights, x: Float[Array, " K"]) -> Float[Array, " K"]:
        return x + weights["w1"] @ sigma(weights["w2"] @ x)

    def inputs(weights: Weights, x: Float[Array, " K"]) -> dict[str, Array]:
        return {"w1": sigma(weights["w2"] @ x), "w2": x}

    return Architecture(init, apply, inputs)
