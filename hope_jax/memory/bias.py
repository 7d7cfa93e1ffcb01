"""Attentional biases: the inner objective of an associative memory."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Bias = Callable[[Array, Array], Array]


def l2(output: Float[Array, " V"], value: Float[Array, " V"]) -> Float[Array, ""]:
    """`½‖M(k) − v‖²`, whose gradient in the output is `M(k) − v`.

    The paper writes `‖M(k) − v‖²` (§8.1, arXiv:2512.24695) and absorbs the factor 2 in
    its linear forms (equation 93). The half is kept here for every architecture, so
    that one bound on the inner rate serves them all; a rate of η here is η/2 there.
    """
    error = output - value
    return 0.5 * jnp.vdot(error, error)


def dot(output: Float[Array, " V"], value: Float[Array, " V"]) -> Float[Array, ""]:
    """`−⟨M(k), v⟩`, the Hebbian objective of equation 64 (factor 2 absorbed)."""
    return -jnp.vdot(output, value)


BIASES: dict[str, Bias] = {"dot": dot, "l2": l2}
