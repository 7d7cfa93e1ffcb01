"""Delta gradient descent: gradient descent that looks at what the weights say now."""

import dataclasses
import numbers
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hope_jax.kernels import positive
from hope_jax.optim.leaves import guarded, next_count, wide_type
from hope_jax.optim.rule import Rule, Settings, stepping


@dataclasses.dataclass(frozen=True, kw_only=True)
class DGD(Rule):
    """See `dgd`.

    Attributes:
      explicit: one gradient step on the objective instead of its minimum.
      retention: how much of a matrix is kept at each step.
    """

    kind: Literal["dgd"] = "dgd"
    explicit: bool = False
    retention: float = 1.0

    matrices: ClassVar[bool] = True
    inputs: ClassVar[Literal["grams"]] = "grams"
    degree: ClassVar[None] = None

    def make(self, s: Settings) -> optax.GradientTransformation:
        rule = dgd(
            s.rate,
            explicit=self.explicit,
            retention=self.retention,
            input_axis=-2,
        )
        return stepping(rule, s)


class DGDState(NamedTuple):
    """How many steps were taken."""

    count: Int[Array, ""]


@guarded
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

    A matrix that multiplied many inputs x₁ ... x_N, as one of a network does, has all
    of them in the objective, and their Gram matrix A = Σ xₜ xₜᵀ is all that is needed:

        Wₜ₊₁ = α Wₜ − ηₜ (α Wₜ A + ∇W) (I + ηₜ A)⁻¹,   ∇W = Σ ∇yₜL xₜᵀ

    For one input this is the rule above; for any number it cannot blow up.

    `update` takes, besides the gradients, the parameters and the argument `inputs`: a
    pytree like the parameters that holds, for each matrix, either the vector xₜ it was
    multiplied with or the matrix A; and None for leaves that multiply nothing, which
    take plain gradient steps. A matrix with leading (batch) axes needs inputs with the
    same ones. `hope_jax.optim.capture.dgd_gradients` gives gradients and inputs of a
    network; a `Level` gives its own when its `inputs` is set.

    Sums are taken in float32 at least; updates have the gradients' type. An update is
    linear in (weights, gradients): a larger loss alone moves further, proportionally,
    while what is forgotten depends on the inputs only.

    Args:
      learning_rate: η, a number or a schedule.
      explicit: take one gradient step on the objective instead of solving it,
        W (α I − η A) − η ∇W, the form used inside Hope (equation 88). It is stable only
        where |α − η λ| ≤ 1 for the eigenvalues λ of A (‖x‖² of one input).
      retention: α, how much of the weights is kept at each step, in [0, 1]. Leaves
        without inputs keep everything.
      input_axis: the axis of a matrix along which it multiplies its input: -1 for
        y = W x (this repository's memories), -2 for y = x W (Flax kernels). Under
        `optax.inject_hyperparams` it must be one of `static_args`.

    Raises:
      ValueError: when `params` or `inputs` is missing, or an input does not fit its
        matrix.

    >>> rule = dgd(1.0)
    >>> w, x, v = jnp.zeros((1, 2)), jnp.array([1.0, 0.0]), jnp.array([4.0])
    >>> step, _ = rule.update(jnp.outer(-v, x), rule.init(w), w, inputs=x)
    >>> (w + step).tolist()  # half the way to v, for η = 1 and |x| = 1
    [[2.0, 0.0]]
    """
    known = isinstance(retention, numbers.Real)  # not so where it is injected
    if known and not 0.0 <= retention <= 1.0:
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
        if isinstance(gradient, optax.MaskedNode):
            return gradient
        dtype = wide_type(gradient.dtype)
        rate = jnp.asarray(rate, dtype)
        g = gradient.astype(dtype)
        if x is None:
            return (-rate * g).astype(gradient.dtype)
        w, x, kept = (
            weight.astype(dtype),
            x.astype(dtype),
            jnp.asarray(retention, dtype),
        )
        if input_axis == -2:
            g, w = g.mT, w.mT
        vector = w.ndim >= 2 and x.shape == w.shape[:-2] + w.shape[-1:]
        if not vector and x.shape != w.shape[:-2] + w.shape[-1:] * 2:
            raise ValueError(
                f"inputs has shape {x.shape} for a matrix of shape {weight.shape} with "
                f"input_axis {input_axis}: it must be one vector of that axis's length "
                "or the square matrix of several, with the matrix's leading axes if it "
                "has any."
            )
        if vector:
            said = jnp.einsum("...oi,...i,...j->...oj", w, x, x)  # (W x) xᵀ
        else:
            said = w @ x
        if explicit:
            update = (kept - 1.0) * w - rate * (said + g)
        elif vector:
            norm = jnp.sum(x**2, axis=-1)[..., None, None]
            update = (kept - 1.0) * w - rate / (1.0 + rate * norm) * (kept * said + g)
        else:
            update = (kept - 1.0) * w - rate * _shrink(kept * said + g, rate * x)
        if input_axis == -2:
            update = update.mT
        return update.astype(gradient.dtype)

    def update(updates, state, params=None, *, inputs=None, **extra):
        del extra
        if params is None:
            raise ValueError("dgd needs the parameters: update(grads, state, params).")
        if inputs is None:
            raise ValueError(
                "dgd needs `inputs`, the vector each matrix multiplied (None for "
                "leaves that multiply none): update(grads, state, params, inputs=...). "
                "A Level gives them when its `inputs` is set; those of a network come "
                "from hope_jax.optim.capture.dgd_gradients."
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        # Inputs are not masked when `optax.masked` and `partition` mask the rest.
        leaves, structure = jax.tree.flatten(
            updates, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode)
        )
        weights = structure.flatten_up_to(params)
        vectors = structure.flatten_up_to(inputs)
        moved = [
            move(g, w, x, rate)
            for g, w, x in zip(leaves, weights, vectors, strict=True)
        ]
        return structure.unflatten(moved), DGDState(next_count(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _shrink(
    right: Float[Array, "*batch R C"], square: Float[Array, "*batch C C"]
) -> Float[Array, "*batch R C"]:
    """right (I + square)⁻¹, for a square that is positive up to rounding."""
    # Rounding may leave eigenvalues as low as -ε times the largest.
    rounding = jnp.finfo(square.dtype).eps * jnp.trace(square, axis1=-2, axis2=-1)
    eye = jnp.eye(square.shape[-1], dtype=square.dtype)
    eye = eye.reshape((1,) * (square.ndim - 2) + eye.shape)
    return positive.divide(right, square + (1.0 + rounding)[..., None, None] * eye)
