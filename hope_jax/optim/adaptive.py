"""Adam and AdaGrad as the associative memories of Appendix B (arXiv:2512.24695).

Both are the exact minimum of a ridge regression that maps each gradient to a statistic
P of all of them:

    element:  Σ (m gᵢ − P)² + λ m²       m* = P Σgᵢ / (Σgᵢ² + λ)
    matrix:   Σ ‖m gᵢ − P‖² + λ ‖m‖²     m* = (Σ P gᵢᵀ) (Σ gᵢ gᵢᵀ + λ I)⁻¹

With P = √(Σ g²) and λ → 0 they step by H^(−1/2) Σ g, H = Σ g². The paper prints the
steps with g = −∇L and a minus before them, which climbs, and the inverse of the matrix
form on the left, where it does not fit: here steps descend and the inverse is on the
right. The state holds √H rather than H, so that neither tiny nor huge gradients leave
the range of a float.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.optim.leaves import (
    as_rows,
    as_type,
    check_fraction,
    guarded,
    next_count,
    placed,
    rate_at,
    taken,
    wide,
)

Target = Literal["root", "square"]
Form = Literal["element", "outer"]


class AdamMemoryState(NamedTuple):
    """Steps taken, and for each leaf the mean (or sum) of gradients and the root of
    that of their squares."""

    count: Int[Array, ""]
    first: PyTree
    root: PyTree


@guarded
def adam_memory(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    ridge: float = 0.0,
    target: Target = "root",
    literal: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam, as the minimum of an element-wise regression on its own past gradients.

        W ← W − η m*,   m* = P M / (H + λ),   P = √H or H   (equations 101 to 105)

    For λ = 0 and P = √H, M / (√H + eps) is Adam itself (arXiv:1412.6980): the update
    does not change with the size of the gradients. For P = H it is momentum, of degree
    1. A ridge λ stops steps where gradients are below √λ, and breaks that scale.

    Args:
      learning_rate: η, a number or a schedule.
      b1: decay of M, the mean of gradients with its bias corrected; in [0, 1).
      b2: decay of H, that of their squares.
      eps: added to √H, Adam's; not part of the regression. `root` only.
      ridge: λ, on the scale of squared gradients.
      target: P, what gradients are mapped to: `root` of the second moment or `square`.
      literal: as printed, sums in place of means, M = Σ b1 g and H = Σ b2 g², with P of
        Σ g²: steps shrink like 1/√t (root) or grow like t (square), and b1, b2 are but
        factors, in (0, 1].

    Raises:
      ValueError: b1, b2, eps or ridge out of range, or an unknown target.
    """
    if target not in ("root", "square"):
        raise ValueError(f"target must be 'root' or 'square', got {target!r}.")
    _check_decays(literal, b1=b1, b2=b2)
    _check_amounts(eps=eps, ridge=ridge)

    def begin(leaf):
        return jnp.zeros_like(wide(leaf))

    def learn(g, first, root):
        a, b = as_type(b1, g), as_type(b2, g)
        if literal:
            return first + a * g, jnp.hypot(root, jnp.sqrt(b) * g)
        first = a * first + (1.0 - a) * g
        return first, jnp.hypot(jnp.sqrt(b) * root, jnp.sqrt(1.0 - b) * g)

    def recall(first, root, count, rate):
        a, b = as_type(b1, first), as_type(b2, first)
        if literal:
            scale = 1.0 / (jnp.sqrt(b) if target == "root" else b)
        else:
            first = first / _one_minus_power(a, count)
            root = root / jnp.sqrt(_one_minus_power(b, count))
            scale = as_type(1.0, first)
        safe = jnp.where(root > 0, root, 1.0)
        if target == "root":
            below = root + as_type(ridge, root) / safe + as_type(eps, root)
        else:  # the root of λ first: H itself may be no float
            below = 1.0 + jnp.square(jnp.sqrt(as_type(ridge, root)) / safe)
        return -rate * scale * _divide(first, below, root > 0)

    def init(params):
        return AdamMemoryState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(begin, params),
            jax.tree.map(begin, params),
        )

    def update(updates, state, params=None, **extra):
        del params, extra
        rate = rate_at(learning_rate, state.count)
        count = next_count(state.count)
        leaves, structure = jax.tree.flatten(updates)
        standing = zip(
            structure.flatten_up_to(state.first),
            structure.flatten_up_to(state.root),
            strict=True,
        )
        moments = [learn(wide(g), *s) for g, s in zip(leaves, standing, strict=True)]
        steps = [
            recall(*m, count, as_type(rate, m[0])).astype(g.dtype)
            for g, m in zip(leaves, moments, strict=True)
        ]
        first, root = ([m[i] for m in moments] for i in (0, 1))
        return structure.unflatten(steps), AdamMemoryState(
            count, structure.unflatten(first), structure.unflatten(root)
        )

    return optax.GradientTransformationExtraArgs(init, update)


class Outer(NamedTuple):
    """Σ g gᵀ of the rows of a leaf, as `size² gram`: its entries stay near one.

    Attributes:
      size: the largest entry of a gradient so far.
      gram: [C, C].
    """

    size: Float[Array, ""]
    gram: Float[Array, "C C"]


class AdaGradMemoryState(NamedTuple):
    """Steps taken, and for each leaf the decayed sum of gradients and H: its root, or
    an `Outer`."""

    count: Int[Array, ""]
    first: PyTree
    second: PyTree


@guarded
def adagrad_memory(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.0,
    form: Form = "element",
    eps: float = 1e-7,
    ridge: float = 0.0,
    max_width: int = 1024,
) -> optax.GradientTransformationExtraArgs:
    """AdaGrad, as the minimum of a regression on all past gradients.

        element:  W ← W − η M √H / (H + λ),        H = Σ g²
        outer:    W ← W − η M H^½ (H + λ I)⁻¹,     H = Σ gᵀ g   (equations 106 to 111)

    For λ = 0 this is M H^(−½): AdaGrad, diagonal or full (Duchi et al. 2011), where a
    direction that no gradient has ever had is not moved along. `outer` is over the last
    axis of a leaf, whose rows share one H: a vector has its full matrix, a matrix
    [R, C] the right half of Shampoo's. Updates do not change with the size of the
    gradients while λ = 0; a ridge breaks that.

    `outer` takes its root by LAPACK's `eigh`, which can dead-lock a CPU pool of few
    threads: set the environment's NPROC to 32 before JAX starts, as `launch.train`
    does for it. `hope_jax.optim.kronecker` has both sides, by products alone.

    Args:
      learning_rate: η, a number or a schedule.
      decay: of M = Σ decayᵗ⁻ⁱ gᵢ: 0 is AdaGrad, 0.9 AdaGrad with momentum, and 1 the
        literal reading, the sum of all gradients (the printed β₁, β₂ are factors of η).
      form: `element` for each number by itself, or `outer`.
      eps: added to √H (element) or, times its largest entry, to H^½ (outer).
      ridge: λ, on the scale of squared gradients.
      max_width: of the last axis, for `outer`: the work is its cube at every step.

    Raises:
      ValueError: arguments out of range; a leaf that is too wide for `outer`.
    """
    check_fraction("decay", decay)
    _check_amounts(eps=eps, ridge=ridge)
    if form not in ("element", "outer"):
        raise ValueError(f"form must be 'element' or 'outer', got {form!r}.")

    def begin(leaf):
        if form == "element":
            return jnp.zeros_like(wide(leaf))
        width = as_rows(leaf).shape[-1]
        if width > max_width:
            raise ValueError(
                f"form='outer' of a leaf of shape {leaf.shape} needs a matrix of "
                f"{width} x {width}, above max_width={max_width}: use form='element' "
                "for it (`optax.partition`), or allow more."
            )
        dtype = wide(leaf).dtype
        return Outer(jnp.zeros((), dtype), jnp.zeros((width, width), dtype))

    def element(g, first, root, rate):
        root = jnp.hypot(root, g)
        pull = as_type(ridge, g) / jnp.where(root > 0, root, 1.0)
        below = root + pull + as_type(eps, g)
        return -rate * _divide(first, below, root > 0), root

    def outer(g, first, second, rate):
        rows = as_rows(g)
        size = jnp.maximum(second.size, jnp.max(jnp.abs(rows), initial=0.0))
        scale = jnp.where(size > 0, size, 1.0)
        rows = rows / scale
        gram = second.gram * (second.size / scale) ** 2 + rows.T @ rows
        values, vectors = jnp.linalg.eigh(gram)
        # What is left of a direction that no gradient had is rounding error.
        least = len(values) * jnp.finfo(values.dtype).eps * values[-1]
        seen = values > least
        root = jnp.sqrt(jnp.where(seen, values, 1.0))
        pull = jnp.square(jnp.sqrt(as_type(ridge, root)) / scale) / root
        inverse = jnp.where(seen, 1.0 / (root + pull + as_type(eps, root)), 0.0)
        moved = (as_rows(first) / scale) @ (vectors * inverse[None, :]) @ vectors.T
        return -rate * moved.reshape(g.shape), Outer(size, gram)

    def init(params):
        first = jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)
        return AdaGradMemoryState(
            jnp.zeros((), jnp.int32),
            first,
            placed(params, [begin(leaf) for leaf in jax.tree.leaves(params)]),
        )

    def move(gradient, first, second, rate):
        g = wide(gradient)
        first = as_type(decay, g) * first + g
        rule = element if form == "element" else outer
        step, second = rule(g, first, second, as_type(rate, g))
        return step.astype(gradient.dtype), first, second

    def update(updates, state, params=None, **extra):
        del params, extra
        rate = rate_at(learning_rate, state.count)
        leaves, structure = jax.tree.flatten(updates)
        standing = zip(
            structure.flatten_up_to(state.first),
            taken(updates, state.second),
            strict=True,
        )
        moved = [move(g, *s, rate) for g, s in zip(leaves, standing, strict=True)]
        steps, first, second = ([m[i] for m in moved] for i in (0, 1, 2))
        return structure.unflatten(steps), AdaGradMemoryState(
            next_count(state.count),
            structure.unflatten(first),
            placed(updates, second),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _one_minus_power(decay: Array, count: Array) -> Array:
    """1 − decayᵗ, without the cancellation that costs float32 half its digits."""
    steps = count.astype(decay.dtype)
    return -jnp.expm1(steps * jnp.log(decay))


def _divide(above: Array, below: Array, seen: Array) -> Array:
    """above / below, and 0 where no gradient has been seen."""
    return jnp.where(seen, above / jnp.where(seen, below, 1.0), 0.0)


def _check_decays(literal: bool, **decays):
    for name, value in decays.items():
        if isinstance(value, Tracer):
            continue
        if literal and not 0.0 < value <= 1.0:
            raise ValueError(
                f"{name} is a factor in (0, 1] with literal=True, got {value}."
            )
        if not literal and not 0.0 <= value < 1.0:
            raise ValueError(f"{name} is a decay in [0, 1), got {value}.")


def _check_amounts(**amounts):
    for name, value in amounts.items():
        if not isinstance(value, Tracer) and not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")
