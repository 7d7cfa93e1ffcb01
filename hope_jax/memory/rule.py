"""Learning rules of a memory, as optax transformations that chain.

Each reads its data-dependent rates from `context`, the token at hand, and adds its term
to the update, so that the terms are independent switches:

    Sₜ = θₜ Sₜ₋₁ − ηₜ ∇ℓ                      `descend`, `inertia`
    Mₜ = Mₜ₋₁ (αₜ I − bₜ xₜ xₜᵀ) + Sₜ          `erase`, `retention.decay`

(equations 88 and 90 of arXiv:2512.24695, with the momentum its Table 6 removes.)
"""

from collections.abc import Callable
from typing import Any

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


def erase(
    erasures: Callable[[Any, dict[str, Array]], dict[str, tuple[Array, Array]]],
) -> optax.GradientTransformationExtraArgs:
    """`−(M r) pᵀ`: the state-dependent forgetting of delta gradient descent.

    Args:
      erasures: `(context, inputs) -> {name: (r, p)}`, what each matrix recalls and
        erases; for equation 88 `r = xₜ` and `p = bₜ xₜ`. A matrix it does not name keeps
        all.
    """

    def update(updates, state, params, *, context, inputs, **extra):
        del extra

        def forget(name, recall, along):
            m = params[name]
            recalled = m * recall if m.ndim == 1 else m @ recall
            erased = recalled * along if m.ndim == 1 else jnp.outer(recalled, along)
            return updates[name] - erased

        terms = erasures(context, inputs)
        return updates | {name: forget(name, *term) for name, term in terms.items()}, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Float[Array, "V K"], steps: int = 5) -> Float[Array, "V K"]:
    """Muon's quintic iteration towards the orthogonal factor of one matrix, step by
    step; `kernels.newton_schulz` is the batched one."""
    a, b, c = NEWTON_SCHULZ
    x = x / (jnp.sqrt(jnp.sum(x * x) + 1e-14))
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
