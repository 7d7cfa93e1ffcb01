"""Retentions: what a memory keeps of itself, as optax transformations.

`decay` and `oja` add a term to the update. `mirror` moves a dual image of the weights
instead, and `project` bends the weights where they land; both see the whole update, so
they come last in a chain.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.core.config import Kinds
from hope_jax.memory.choice import Choice, Make
from hope_jax.memory.flow import transformation

if TYPE_CHECKING:
    from hope_jax.memory.compose import MemoryConfig


def spread(alpha: Array, weights: Array) -> Array:
    """`alpha`, a scalar or a vector [K], in a shape that multiplies `weights` [.., K].

    Raises:
      ValueError: a vector that is not as wide as the last axis of the weights.
    """
    if jnp.ndim(alpha) == 0:
        return alpha
    if alpha.shape != weights.shape[-1:]:
        raise ValueError(
            f"alpha {alpha.shape} must be a scalar or have the width of the keys of "
            f"the weights {weights.shape}, their last axis."
        )
    return alpha.reshape((1,) * (weights.ndim - 1) + alpha.shape)


def decay(toward_start: bool = False) -> optax.GradientTransformationExtraArgs:
    """Decay: adds `(αₜ − 1) M`, so that the memory keeps the fraction αₜ.

    With `toward_start` it adds `(αₜ − 1) (M − M₀)`: what has been written decays, and
    M₀, where `init` saw the parameters, stays. It is the step of the retention
    `½‖M − M₀‖²`.

    αₜ is `context.alpha`, the *retained* fraction (Titans writes the forgotten one): a
    scalar, or a vector [K] with a fraction for each channel of the keys, `M Diag(αₜ)`
    (GLA, arXiv:2312.06635; KDA).
    """

    def init(params):
        return params if toward_start else ()

    def update(updates, state, params, *, context, **extra):
        del extra
        fading = params
        if toward_start:
            fading = jax.tree.map(jnp.subtract, params, state)
        kept = jax.tree.map(
            lambda u, m: u + (spread(context.alpha, m) - 1.0) * m, updates, fading
        )
        return kept, state

    return transformation(init, update)


def oja_term(
    eta: Float[Array, ""], v: Float[Array, " V"], weights: Float[Array, "V K"]
) -> Float[Array, "V K"]:
    """`−η v (vᵀ M)`, what Oja's rule forgets."""
    return -eta * jnp.outer(v, v @ weights)


def oja() -> optax.GradientTransformationExtraArgs:
    """Oja's forgetting, along the value: adds `−ηₜ vₜ (vₜᵀ M)`.

    With the dot-product bias `Mₜ = αₜ M + ηₜ vₜ (kₜᵀ − vₜᵀ M)`, equations 66 and 67 of
    arXiv:2512.24695. Every leaf is a matrix whose rows are channels of the value.
    """

    def update(updates, state, params, *, context, **extra):
        del extra
        return jax.tree.map(
            lambda u, m: u + oja_term(context.eta, context.v, m), updates, params
        ), state

    return transformation(lambda params: (), update)


class Link(NamedTuple):
    """A mirror map between dual weights A and the weights W that they mean, per leaf.

    Attributes:
      primal: `A -> W`.
      dual: `W -> A`, its inverse, or the nearest there is to one.
    """

    primal: Callable[[Array], Array]
    dual: Callable[[Array], Array]


def mirror(link: Link) -> optax.GradientTransformationExtraArgs:
    """Dual averaging: the update moves dual weights, the memory is their image.

        Aₜ = αₜ Aₜ₋₁ + update,   Wₜ = link.primal(Aₜ)

    The state is A, and starts at `link.dual(W)`. Retention is inside: αₜ decays A
    (`context.alpha`, as in `decay`), so no `decay` goes with it.
    """

    def init(params):
        return jax.tree.map(link.dual, params)

    def update(updates, state, params, *, context, **extra):
        del extra
        state = jax.tree.map(
            lambda a, u: spread(context.alpha, a) * a + u, state, updates
        )
        moved = jax.tree.map(lambda a, m: link.primal(a) - m, state, params)
        return moved, state

    return transformation(init, update)


def lq(power: float, epsilon: float = 0.03) -> Link:
    """`W = A / ‖A‖_q^(q−2)`, the norm over a whole matrix (MIRAS 24-25, Moneta).

    `‖W‖ = ‖A‖^(3−q)`: at q = 2 nothing happens, at q = 3 the norm of W is 1 whatever
    that of A, and beyond 3 a larger A is a smaller W. Going back, `A = W ‖W‖^((q−2) /
    (3−q))`; at q = 3, which has no inverse, W itself. A norm is no less than `epsilon`,
    smoothly, which carries W through zero: at q = 4 it stays below `0.71 / epsilon`.
    """
    if not power >= 2:
        raise ValueError(f"power (q of lq) must be at least 2, got {power}.")

    def norm(x):
        return (jnp.sum(jnp.abs(x) ** power) + epsilon**power) ** (1.0 / power)

    def primal(a):
        return a * norm(a) ** (2.0 - power)

    def dual(w):
        return w if power == 3 else w * norm(w) ** ((power - 2.0) / (3.0 - power))

    return Link(primal, dual)


def simplex(scale: float = 1.0, floor: float = 1e-6) -> Link:
    """`W = c softmax(A)`, row by row: entropic descent (MIRAS 27, Memora).

    `Wₜ = c softmax(α log Wₜ₋₁ − η ∇ℓ)` for any constant that a row of A may have beyond
    `log W`, since softmax does not see it; each row of W sums to c. Going back, `A =
    log(W / c)` with W / c no less than `floor`: a start off the simplex is moved onto
    it, and zeros become the uniform row.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}.")
    return Link(
        primal=lambda a: scale * jax.nn.softmax(a, axis=-1),
        dual=lambda w: jnp.log(jnp.maximum(w / scale, floor)),
    )


def hypentropy(beta: float = 1.0, limit: float = 16.0) -> Link:
    """`W = β sinh(A)`: entropic descent for weights of either sign.

    The Bregman retention whose potential is the hypentropy (Ghai, Hazan and Singer,
    arXiv:1902.01903): its steps are `√(W² + β²)` times those of gradient descent, so a
    large β is gradient descent at rate `β η` and a small one multiplies. Dual weights
    are read no further out than ±`limit`, so `|W| ≤ β sinh(limit)`, 4.4e6 β, and no
    float overflows.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")
    return Link(
        primal=lambda a: beta * jnp.sinh(jnp.clip(a, -limit, limit)),
        dual=lambda w: jnp.arcsinh(w / beta),
    )


def soft_threshold(amount: float) -> Callable[[Array], Array]:
    """`sign(w) max(|w| − amount, 0)`: the L1 half of the elastic net (MIRAS 22)."""
    if not amount >= 0:
        raise ValueError(f"amount must not be negative, got {amount}.")
    return lambda w: w - jnp.clip(w, -amount, amount)


def clamp_norm(bound: float) -> Callable[[Array], Array]:
    """The matrix itself, or where its Frobenius norm is above `bound`, scaled to it."""
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}.")

    def clamp(w):
        square = jnp.sum(w * w)
        outside = square > bound * bound
        shrink = bound * jax.lax.rsqrt(jnp.where(outside, square, 1.0))
        return w * jnp.where(outside, shrink, 1.0)

    return clamp


class ProjectState(NamedTuple):
    """How many updates `project` has seen since it last did anything."""

    count: Int[Array, ""]


def project(
    fn: Callable[[Array], Array], every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Every so many updates the weights land on `fn(W + update)`, leaf by leaf."""
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}.")

    def init(params: PyTree) -> ProjectState:
        del params
        return ProjectState(jnp.zeros((), jnp.int32))

    def update(updates, state, params, **extra):
        del extra
        count = (state.count + 1) % every
        due = count == 0

        def land(u, m):
            return jnp.where(due, fn(m + u) - m, u)

        return jax.tree.map(land, updates, params), ProjectState(count)

    return transformation(init, update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention(Choice):
    """A retention by name, and what is so of it.

    Attributes:
      make: `config -> transformation`; None for what keeps all.
      landing: `config -> (weights -> weights)`: what it does to each leaf at the end of
        a chunk, if anything.
      link: `config -> Link` of one that moves dual weights.
      linear: what is left is linear in the memory.
      uniform: what is left is the fraction α of every weight, or all of it.
      channels: α is a vector, a fraction for each channel of the keys.
      along_values: it forgets along the value of the token, and so one pair at a time.
      returns: its decay may pull to where the memory started.
      simplex: weights are positive, so that dual ones start as logits.
    """

    make: Make | None
    landing: Callable[["MemoryConfig"], Callable[[Array], Array]] | None = None
    link: Callable[["MemoryConfig"], Link] | None = None
    linear: bool = False
    uniform: bool = False
    channels: bool = False
    along_values: bool = False
    returns: bool = False
    simplex: bool = False

    @property
    def decays(self) -> bool:
        """Whether tokens bring an α."""
        return self.make is not None

    @property
    def mirrors(self) -> bool:
        """Whether it moves dual weights, of which the memory is an image."""
        return self.link is not None


def _decay(config):
    return decay(config.toward == "start")


def _mirror(kind, option, link, **said) -> Retention:
    return Retention(
        kind=kind,
        options=(option,),
        make=lambda config: mirror(link(config)),
        link=link,
        **said,
    )


def _landing(kind, landing) -> Retention:
    return Retention(
        kind=kind,
        options=("retention_scale",),
        make=_decay,
        landing=landing,
        returns=True,
    )


RETENTIONS: Kinds[Retention] = Kinds.of_entries(
    "retention",
    Retention(kind="none", make=None, linear=True, uniform=True),
    Retention(kind="decay", make=_decay, linear=True, uniform=True, returns=True),
    Retention(kind="channel", make=_decay, linear=True, channels=True, returns=True),
    Retention(
        kind="oja",
        make=lambda config: optax.chain(decay(), oja()),
        linear=True,
        along_values=True,
    ),
    _mirror(
        "lq",
        "retention_power",
        lambda config: lq(config.retention_power),
        words="l{retention_power:g}",
    ),
    _mirror(
        "kl",
        "retention_scale",
        lambda config: simplex(config.retention_scale),
        simplex=True,
    ),
    _mirror(
        "bregman",
        "retention_scale",
        lambda config: hypentropy(config.retention_scale),
    ),
    _landing(
        "elastic_net",
        lambda config: soft_threshold(config.retention_scale * config.chunk),
    ),
    _landing("norm_clamp", lambda config: clamp_norm(config.retention_scale)),
)
