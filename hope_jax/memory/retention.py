"""Retentions: what a memory keeps of itself, as optax transformations."""

import jax
import optax


def decay() -> optax.GradientTransformationExtraArgs:
    """Scalar decay: adds `(αₜ − 1) M`, so that the memory keeps the fraction αₜ.

    αₜ is `context.alpha`, the *retained* fraction (Titans writes the forgotten one).
    """

    def update(updates, state, params, *, context, **extra):
        del extra
        kept = jax.tree.map(lambda u, m: u + (context.alpha - 1.0) * m, updates, params)
        return kept, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)
