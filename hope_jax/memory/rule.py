"""Learning rules of a memory, as optax transformations that chain.

Each reads its data-dependent rates from `context`, the token at hand, and adds its term
to the update, so that the terms are independent switches:

    Sₜ = θₜ Sₜ₋₁ − ηₜ ∇ℓ                      `descend`, `inertia`
    Mₜ = Mₜ₋₁ (αₜ I − bₜ xₜ xₜᵀ) + Sₜ          `delta_decay`, `retention.decay`

(equations 88 and 90 of arXiv:2512.24695, with the momentum its Table 6 removes.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def descend() -> optax.GradientTransformationExtraArgs:
    """`−ηₜ ∇ℓ`, gradient descent with the token's own rate `context.eta`."""

    def update(updates, state, params=None, *, context, **extra):
        del params, extra
        return jax.tree.map(lambda g: -context.eta * g, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def inertia() -> optax.GradientTransformationExtraArgs:
    """`Sₜ = θₜ Sₜ₋₁ + update`: inner momentum, decay `context.theta` (Titans 14)."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None, *, context, **extra):
        del params, extra
        state = jax.tree.map(lambda s, u: context.theta * s + u, state, updates)
        return state, state

    return optax.GradientTransformationExtraArgs(init, update)


def corrected_rate(eta: Float[Array, ""], x: Float[Array, " K"]) -> Float[Array, ""]:
    """`η / (1 + η‖x‖²)`: the proximal coefficient of delta gradient descent.

    Equation 57 prints `η / (1 + η)`, which is this for a unit-norm input.
    """
    return eta / (1.0 + eta * jnp.vdot(x, x))


def delta_decay(
    coefficients: Callable[[Array, dict[str, Array]], dict[str, Array]],
) -> optax.GradientTransformationExtraArgs:
    """`−bₜ (M xₜ) xₜᵀ`: the state-dependent forgetting of delta gradient descent.

    Args:
      coefficients: `(eta, inputs) -> {name: b}`; a matrix it does not name keeps all.
    """

    def update(updates, state, params, *, context, inputs, **extra):
        del extra
        rates = coefficients(context.eta, inputs)

        def forget(name):
            m, x = params[name], inputs[name]
            return updates[name] - rates[name] * jnp.outer(m @ x, x)

        return updates | {name: forget(name) for name in rates}, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)
