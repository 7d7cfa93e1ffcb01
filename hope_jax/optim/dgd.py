"""Delta gradient descent: gradient descent that looks at what the weights say now."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class DGDState(NamedTuple):
    """How many steps were taken."""

    count: Int[Array, ""]


def dgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    explicit: bool = False,
    retention: float = 1.0,
    input_axis: int = -1,
) -> optax.GradientTransformationExtraArgs:
    """Delta gradient descent (equations 56 and 57, arXiv:2512.24695).

        Wₜ₊₁ = argmin_W ½‖W xₜ + ∇yL‖² + ‖W − α Wₜ‖² / 2ηₜ
             = α Wₜ (I − η' xₜ xₜᵀ) − η' ∇yL xₜᵀ,   η' = ηₜ / (1 + ηₜ ‖xₜ‖²)

    The paper prints η' = η / (1 + η), which is this for inputs of norm 1. With an L2
    loss the rule stores a fraction of the value (half of it for ½‖Wx − v‖²); with the
    dot-product loss −⟨Wx, v⟩ it is the delta rule.

    `update` takes, besides the gradients, the parameters and the argument `inputs`: a
    pytree like the parameters that holds the vector xₜ each matrix was multiplied with,
    and None for leaves that multiply none; those take plain gradient steps. A matrix
    with leading (batch) axes needs an input with the same ones.

    Args:
      learning_rate: η, a number or a schedule.
      explicit: take one gradient step on the objective instead of solving it,
        W (α I − η x xᵀ) − η ∇yL xᵀ, the form used inside Hope (equation 88). It is
        stable only where |α − η‖x‖²| ≤ 1.
      retention: α, how much of the weights is kept at each step, in [0, 1]. Leaves
        without inputs keep everything.
      input_axis: the axis of a matrix along which it multiplies its input: -1 for
        y = W x (this repository's memories), -2 for y = x W (Flax kernels).

    Raises:
      ValueError: when `params` or `inputs` is missing, or an input does not fit its
        matrix.

    >>> rule = dgd(1.0)
    >>> w, x, v = jnp.zeros((1, 2)), jnp.array([1.0, 0.0]), jnp.array([4.0])
    >>> step, _ = rule.update(jnp.outer(-v, x), rule.init(w), w, inputs=x)
    >>> (w + step).tolist()  # half the way to v, for η = 1 and |x| = 1
    [[2.0, 0.0]]
    """
    if not 0.0 <= retention <= 1.0:
        raise ValueError(
            f"retention is the part of the weights that is kept, in [0, 1]; got "
            f"{retention}."
        )
    if input_axis not in (-1, -2):
        raise ValueError(
            f"input_axis must be -1 (y = W x) or -2 (y = x W), got {input_axis}."
        )

    def init(params):
        del params
        return DGDState(jnp.zeros((), jnp.int32))

    def move(gradient, weight, x, rate):
        rate = jnp.asarray(rate, gradient.dtype)
        if x is None:
            return -rate * gradient
        g, w = gradient, weight
        if input_axis == -2:
            g, w = g.mT, w.mT
        if w.ndim < 2 or x.shape != w.shape[:-2] + w.shape[-1:]:
            raise ValueError(
                f"inputs has shape {x.shape} for a matrix of shape {weight.shape} with "
                f"input_axis {input_axis}: it must be one vector of that axis's "
                "length, with the matrix's leading axes if it has any."
            )
        said = jnp.einsum("...oi,...i,...j->...oj", w, x, x)  # (W x) xᵀ
        if explicit:
            update = (retention - 1.0) * w - rate * (said + g)
        else:
            norm = jnp.sum(x**2, axis=-1)[..., None, None]
            step = rate / (1.0 + rate * norm)
            update = (retention - 1.0) * w - step * (retention * said + g)
        return update.mT if input_axis == -2 else update

    def update(updates, state, params=None, *, inputs=None, **extra):
        del extra
        if params is None:
            raise ValueError("dgd needs the parameters: update(grads, state, params).")
        if inputs is None:
            raise ValueError(
                "dgd needs `inputs`, the vector each matrix multiplied (None for "
                "leaves that multiply none): update(grads, state, params, inputs=...). "
                "A Level gives them when its `inputs` is set."
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        leaves, structure = jax.tree.flatten(updates)
        weights = structure.flatten_up_to(params)
        vectors = structure.flatten_up_to(inputs)
        moved = [
            move(g, w, x, rate)
            for g, w, x in zip(leaves, weights, vectors, strict=True)
        ]
        return structure.unflatten(moved), DGDState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
