"""Attentional biases: the inner objective of an associative memory.

Each takes the memory's output, the value it should have been, and the token's threshold
δ, which only robust biases read. With r = M(k) − v their gradients in the output are

    dot            −v
    l2             r
    lp             p sign(r) |r|ᵖ⁻¹
    huber          r where |r| ≤ δ, else δ sign(r), coordinate by coordinate
    huber_norm     r if ‖r‖ ≤ δ, else δ r / ‖r‖
    huber_switched r if ‖r‖ ≤ δ, else δ sign(r)
    value_shift    r + δ r / ‖r‖
    kl             softmax(M(k)) − softmax(v)

(MIRAS, arXiv:2504.13173, whose ‖r‖² we halve throughout). Where r meets a kink, |x| is
√(x² + 1e-6) in the objective itself and sign(x) its slope x / √(x² + 1e-6): gradients
and their own derivatives, which the level above needs, are finite at r = 0.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hope_jax.core.config import Kinds, did_you_mean
from hope_jax.memory.choice import Choice

Loss = Callable[[Array, Array, Array], Array]

_SMOOTHING = 1e-6


def l2(
    output: Float[Array, " V"], value: Float[Array, " V"], threshold=None
) -> Float[Array, ""]:
    """`½‖M(k) − v‖²`, whose gradient in the output is `M(k) − v`.

    The paper writes `‖M(k) − v‖²` (§8.1, arXiv:2512.24695) and absorbs the factor 2 in
    its linear forms (equation 93). The half is kept here for every architecture, so
    that one bound on the inner rate serves them all; a rate of η here is η/2 there.
    """
    del threshold
    error = output - value
    return 0.5 * jnp.vdot(error, error)


def dot(
    output: Float[Array, " V"], value: Float[Array, " V"], threshold=None
) -> Float[Array, ""]:
    """`−⟨M(k), v⟩`, the Hebbian objective of equation 64 (factor 2 absorbed)."""
    del threshold
    return -jnp.vdot(output, value)


def lp(
    output: Float[Array, " V"],
    value: Float[Array, " V"],
    threshold=None,
    *,
    power: float = 3.0,
) -> Float[Array, ""]:
    """`Σ |M(k) − v|ᵖ` (MIRAS 10-11), which is `2 l2` at p = 2.

    At p = 1 the memory is *value-less* (MIRAS 12): a step depends on the value by its
    sign alone.
    """
    del threshold
    error = output - value
    return jnp.sum((error * error + _SMOOTHING) ** (0.5 * power))


def huber(
    output: Float[Array, " V"], value: Float[Array, " V"], threshold: Float[Array, ""]
) -> Float[Array, ""]:
    """Huber's loss of each coordinate (MIRAS 14)."""
    error = output - value
    size = jnp.abs(error)
    far = threshold * (size - 0.5 * threshold)
    return jnp.sum(jnp.where(size <= threshold, 0.5 * error * error, far))


def huber_norm(
    output: Float[Array, " V"], value: Float[Array, " V"], threshold: Float[Array, ""]
) -> Float[Array, ""]:
    """Huber's loss of the norm of the error (MIRAS 15): no step longer than δ."""
    error = output - value
    square = jnp.vdot(error, error)
    outside = square > threshold * threshold
    norm = jnp.sqrt(jnp.where(outside, square, 1.0))  # the root has no slope at 0
    return jnp.where(outside, threshold * (norm - 0.5 * threshold), 0.5 * square)


def huber_switched(
    output: Float[Array, " V"], value: Float[Array, " V"], threshold: Float[Array, ""]
) -> Float[Array, ""]:
    """`l2` near, `δ ‖r‖₁` far (MIRAS 16 and 26, Yaad).

    A switch of gradients, not a loss: the objective jumps at `‖r‖ = δ`, and only its
    gradient, `r` or `δ sign(r)`, is meant.
    """
    error = output - value
    square = error * error
    far = threshold * jnp.sum(jnp.sqrt(square + _SMOOTHING))
    total = jnp.sum(square)
    return jnp.where(total <= threshold * threshold, 0.5 * total, far)


def value_shift(
    output: Float[Array, " V"], value: Float[Array, " V"], threshold: Float[Array, ""]
) -> Float[Array, ""]:
    """`½ (‖r‖ + δ)²`: the worst `½‖·‖²` over values moved by at most δ (MIRAS 17)."""
    error = output - value
    square = jnp.vdot(error, error)
    norm = jnp.sqrt(square + _SMOOTHING)
    return 0.5 * square + threshold * norm + 0.5 * threshold * threshold


def kl(
    output: Float[Array, " V"], value: Float[Array, " V"], threshold=None
) -> Float[Array, ""]:
    """`KL(softmax(v) ‖ softmax(M(k)))`: output and value are logits."""
    del threshold
    log_p = jax.nn.log_softmax(value)
    return jnp.vdot(jnp.exp(log_p), log_p - jax.nn.log_softmax(output))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bias(Choice):
    """An attentional bias by name, and what is so of it.

    Attributes:
      loss: `(output, value, threshold) -> ℓ`; with the option `power` it takes that as
        a keyword, with the option `threshold` it reads its last argument.
      linear: its gradient in the output is `output − value`, or `−value` alone where it
        does not recall: linear in a memory that is linear in its parameters.
      recalls: its gradient depends on what the memory says.
    """

    loss: Loss
    linear: bool = False
    recalls: bool = True

    @property
    def robust(self) -> bool:
        """Whether it has a threshold."""
        return "threshold" in self.options

    @property
    def squares(self) -> bool:
        """Whether it is `l2` as far as its gradient goes."""
        return self.linear and self.recalls


def _robust(loss: Loss) -> Bias:
    return Bias(kind=loss.__name__, loss=loss, options=("threshold",))


BIASES: Kinds[Bias] = Kinds.of_entries(
    "bias",
    Bias(kind="dot", loss=dot, linear=True, recalls=False),
    Bias(kind="l2", loss=l2, linear=True),
    Bias(kind="lp", loss=lp, options=("power",), words="l{power:g}"),
    _robust(huber),
    _robust(huber_norm),
    _robust(huber_switched),
    _robust(value_shift),
    Bias(kind="kl", loss=kl),
)


def build(name: str, power: float = 3.0) -> Loss:
    """The bias called `name`; `power` is the p of `lp`, which others do not read.

    Raises:
      ValueError: unknown name, or `lp` with a power below 1, where it is not convex.
    """
    if name not in BIASES:
        raise ValueError(
            f"There is no bias {name!r}; the names are {', '.join(BIASES)}."
            f"{did_you_mean(name, BIASES)}"
        )
    found = BIASES.get(name)
    if "power" not in found.options:
        return found.loss
    if not power >= 1:
        raise ValueError(f"power must be at least 1 for bias={name!r}, got {power}.")
    powered: Any = found.loss
    return functools.partial(powered, power=power)
