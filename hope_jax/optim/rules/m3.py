"""M3, Multi-scale Momentum Muon: a continuum memory of gradients, orthogonalised.

Algorithm 1 and equation 75 of arXiv:2512.24695. Each scale remembers the gradients at a
pace of its own; what moves the weights is the sum of their orthogonal factors.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from hope_jax.optim import orthogonal
from hope_jax.optim.leaves import guarded, like, next_count, wide, zeros
from hope_jax.optim.rule import Rule, Settings, check_decays, decayed

Variant = Literal["adamuon", "two_scale", "literal"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class M3(Rule):
    """See `scale_by_m3`.

    Attributes:
      b1: what the first memory keeps when it moves; the others keep 0.9.
      b2: what the second moment keeps.
      periods: steps between two moves of each scale's memory, the first of them 1; on a
        slower clock, moves of the group.
      alpha: weights of all scales but the first, or one number for each.
      decays: what each memory keeps, all of them; in place of `b1`.
      variant: how their sum is scaled.
      spread: take the factors of slow memories at several steps.
    """

    kind: Literal["m3"] = "m3"
    b1: float = 0.9
    b2: float = 0.95
    periods: tuple[int, ...] = (1, 10)
    alpha: float | tuple[float, ...] = 0.3
    decays: tuple[float, ...] | None = None
    variant: Variant = "adamuon"
    spread: bool = False

    matrices: ClassVar[bool] = True
    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)
        if self.decays is not None and self.b1 != M3.b1:
            raise ValueError(
                f"b1 ({self.b1}) is not read where decays are given: put it first in "
                f"decays, which are {self.decays}."
            )

    def make(self, s: Settings) -> optax.GradientTransformation:
        direction = scale_by_m3(
            periods=self.periods,
            alpha=self.alpha,
            decays=self.decays or (self.b1,) + (0.9,) * (len(self.periods) - 1),
            variant=self.variant,
            beta2=self.b2,
            spread=self.spread,
            mesh=s.mesh,
        )
        return decayed(direction, s)


class Scale(NamedTuple):
    """One time scale, in float32 or wider; the last two are () for a period of 1.

    Attributes:
      memory: M, of the gradients.
      gathered: the sum of the gradients since the memory moved.
      factor: the orthogonal factor of the memory, of when it was last taken.
    """

    memory: PyTree
    gathered: PyTree = ()
    factor: PyTree = ()


class M3State(NamedTuple):
    """A pytree, so it can be saved in the middle of a period.

    Attributes:
      count: int32 scalar, gradients taken in.
      scales: one for each period.
      second: of each matrix, the second moment V ("adamuon") or its root ("literal",
        where V itself would leave float32); () for "two_scale".
    """

    count: Int[Array, ""]
    scales: tuple[Scale, ...]
    second: PyTree


@guarded
def scale_by_m3(
    *,
    periods: Sequence[int] = (1, 10),
    alpha: float | Sequence[float] = 0.3,
    decays: Sequence[float] | None = None,
    variant: Variant = "adamuon",
    beta2: float = 0.95,
    eps: float = 1e-8,
    ns_steps: int = 5,
    dtype: jnp.dtype | None = None,
    spread: bool = False,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of M3, for trees of matrices. It points uphill, like a gradient.

        M⁽¹⁾ ← μ₁ M⁽¹⁾ + (1 − μ₁) gₜ                       at every step
        M⁽ˢ⁾ ← μₛ M⁽ˢ⁾ + (1 − μₛ) mean of the last P g      where t ≡ 0 mod P = Pₛ
        O = NS(M⁽¹⁾) + Σₛ αₛ NS(M⁽ˢ⁾)

    The factor of a slow memory is taken when the memory moves, not at every step. Then

        adamuon    V ← μ₂ V + (1 − μ₂) O²,  Ô = O / (√V + ε),
                   update = 0.2 √(d_out d_in) Ô / ‖Ô‖
        two_scale  update = 0.2 √max(d_out, d_in) O
        literal    update = O / (√V + ε),  V ← V + μ₂ gₜ²

    `two_scale` with α = 0 is Muon, `optax.contrib.muon(nesterov=False,
    consistent_rms=0.2)`; `adamuon` with one scale is AdaMuon without the signs. Both
    are of degree 0: the update does not depend on the scale of the gradients.

    `literal` is Algorithm 1 as it is printed, kept for comparison. Its memories are
    sums, M ← M + μ g, so M⁽²⁾ is M⁽¹⁾ of some steps ago, and nothing is forgotten; the
    sums of two periods share a gradient; the factor that includes gₜ is used from step
    t + 1 on; and √V is of degree 1 in a gradient but O of degree 0, so the update is of
    degree -1: a loss ten times as large makes steps a tenth as long. An entry whose
    gradients were all zero is divided by ε alone, and moves by up to 1 / ε.

    In `adamuon` V is of all of O, not of the first factor alone: where gradients stop,
    the fast memory fades first, O would be divided by next to nothing, and a row of a
    matrix that gets no more gradients would be thousands of times all others.

    Args:
      periods: steps between two moves of each scale's memory, the first of them 1. One
        scale, two (the paper) or more.
      alpha: αₛ, the weights of all scales but the first, or one number for each.
      decays: μₛ, what each memory keeps when it moves, in [0, 1); 0.95 for the first,
        0.9 for the others. For `literal` the factors β₁, β₃ of what is added.
      variant: see above.
      beta2: μ₂, in [0, 1); `two_scale` has no second moment.
      eps: ε, likewise.
      ns_steps: of Newton-Schulz; `static_args` of `optax.inject_hyperparams`.
      dtype: see `hope_jax.optim.orthogonal.orthogonalise_tree`.
      spread: take the factors of slow memories not all when these move, but a few
        leaves at each step of the period that follows, so that no step is much longer
        than the others.
      mesh: see `hope_jax.optim.orthogonal.orthogonalise_tree`.

    Raises:
      ValueError: names the argument, or the leaf that is no matrix.
    """
    periods = _check_periods(periods)
    slower = len(periods) - 1
    if decays is None:
        decays = (0.95,) + (0.9,) * slower
    alphas = tuple(alpha) if isinstance(alpha, Sequence) else (alpha,) * slower
    for name, values, length in (
        ("decays", decays, len(periods)),
        ("alpha", alphas, slower),
    ):
        if len(values) != length:
            raise ValueError(
                f"{name} has {len(values)} values for periods {periods}: give {length}."
            )
    for value in decays:
        orthogonal.check_fraction("each of decays", value)
    for value in alphas:
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"alpha must be at least 0, got {value}.")
    if variant not in ("adamuon", "two_scale", "literal"):
        raise ValueError(
            f"variant must be 'adamuon', 'two_scale' or 'literal', got {variant!r}."
        )
    literal = variant == "literal"
    if literal and spread:
        raise ValueError("spread=True delays the factors; variant='literal' does not.")
    orthogonal.check_fraction("beta2", beta2)
    orthogonal.check_steps(ns_steps)

    def orthogonalise(tree):
        return orthogonal.orthogonalise_tree(tree, ns_steps, dtype, mesh=mesh)

    def learn(memory, gradient, decay):
        if literal:
            return jax.tree.map(lambda m, g: m + decay * g, memory, gradient)
        return jax.tree.map(
            lambda m, g: orthogonal.average(m, g, decay), memory, gradient
        )

    def gather(scale, gradient, count, period, decay):
        """The slow scale after one more gradient."""
        gathered = jax.tree.map(jnp.add, scale.gathered, gradient)
        since = count % period

        def move():
            if literal:  # the next sum begins with the last gradient of this one
                return learn(scale.memory, gathered, decay), gradient
            mean = jax.tree.map(lambda total: total / period, gathered)
            return learn(scale.memory, mean, decay), zeros(gathered)

        def stay():
            return scale.memory, gathered

        memory, gathered = jax.lax.cond(since == 0, move, stay)
        slots = period if spread else 1
        return Scale(memory, gathered, refresh(memory, scale.factor, since, slots))

    def refresh(memory, factor, since, slots):
        """`factor` with the leaves whose turn it is `since` the memory moved."""
        leaves, structure = jax.tree.flatten(memory)
        factors = structure.flatten_up_to(factor)
        for slot, places in enumerate(_deal(leaves, slots)):
            fresh = jax.lax.cond(
                since == slot,
                lambda memories, cached: orthogonalise(memories),
                lambda memories, cached: cached,
                [leaves[place] for place in places],
                [factors[place] for place in places],
            )
            for place, one in zip(places, fresh, strict=True):
                factors[place] = one
        return structure.unflatten(factors)

    def init(params):
        orthogonal.check_matrices(params)
        fresh = [1 if period == 1 else 3 for period in periods]
        return M3State(
            count=jnp.zeros((), jnp.int32),
            scales=tuple(Scale(*(zeros(params) for _ in range(n))) for n in fresh),
            second=() if variant == "two_scale" else zeros(params),
        )

    def update(updates, state, params=None, **extra):
        del params, extra
        gradient = jax.tree.map(wide, updates)
        count = next_count(state.count)
        scales, factors = [], []
        for old, period, decay in zip(state.scales, periods, decays, strict=True):
            if period == 1:
                new = Scale(learn(old.memory, gradient, decay))
                factors.append(orthogonalise(new.memory))
            else:
                new = gather(old, gradient, count, period, decay)
                factors.append((old if literal else new).factor)
            scales.append(new)
        total = factors[0]
        for weight, factor in zip(alphas, factors[1:], strict=True):
            total = _plus(total, weight, factor)

        second = state.second
        if variant == "adamuon":
            total, second = orthogonal.by_second_moment(total, second, beta2, eps)
        elif variant == "two_scale":
            total = orthogonal.by_shape(total)
        else:
            second = _root_of_sum(second, gradient, beta2)
            total = jax.tree.map(
                lambda o, root: o / (root + jnp.asarray(eps, o.dtype)), total, second
            )
        return like(total, updates), M3State(count, tuple(scales), second)

    return optax.GradientTransformationExtraArgs(init, update)


def m3(
    learning_rate: optax.ScalarOrSchedule,
    *,
    periods: Sequence[int] = (1, 10),
    alpha: float | Sequence[float] = 0.3,
    decays: Sequence[float] | None = None,
    variant: Variant = "adamuon",
    beta2: float = 0.95,
    eps: float = 1e-8,
    ns_steps: int = 5,
    dtype: jnp.dtype | None = None,
    spread: bool = False,
    mesh: Mesh | None = None,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """M3 with decoupled weight decay, for trees of matrices.

    `hope_jax.optim.with_adamw(scale_by_m3(), learning_rate)` is the one for a
    whole model. See `scale_by_m3` for the other arguments.

    >>> rule = m3(0.1, periods=(1, 2))
    >>> w = jnp.ones((4, 4))
    >>> state = rule.init(w)
    >>> for _ in range(3):
    ...     update, state = rule.update(jnp.eye(4), state, w)
    >>> slow = state[0].scales[1]
    >>> round(float(slow.memory[0, 0]), 3), float(slow.gathered[0, 0])
    (0.1, 1.0)
    """
    direction = scale_by_m3(
        periods=periods,
        alpha=alpha,
        decays=decays,
        variant=variant,
        beta2=beta2,
        eps=eps,
        ns_steps=ns_steps,
        dtype=dtype,
        spread=spread,
        mesh=mesh,
    )
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _plus(total: PyTree, weight, factor: PyTree) -> PyTree:
    return jax.tree.map(
        lambda t, f: t + jnp.asarray(weight, f.dtype) * f, total, factor
    )


def _root_of_sum(root: PyTree, gradient: PyTree, beta2) -> PyTree:
    """√(V + β₂ g²) from √V: the squares of gradients of 1e20 would overflow."""
    return jax.tree.map(
        lambda r, g: jnp.hypot(r, jnp.sqrt(jnp.asarray(beta2, g.dtype)) * g),
        root,
        gradient,
    )


def _deal(leaves: Sequence[Array], slots: int) -> list[list[int]]:
    """The places of `leaves`, dealt to at most `slots` hands of about equal work."""
    work = [leaf.size * min(leaf.shape[-2:]) for leaf in leaves]
    hands = [[] for _ in range(min(slots, len(leaves)))]
    loads = [0] * len(hands)
    for place in sorted(range(len(leaves)), key=lambda place: -work[place]):
        lightest = loads.index(min(loads))
        hands[lightest].append(place)
        loads[lightest] += work[place]
    return hands


def _check_periods(periods: Sequence[int]) -> tuple[int, ...]:
    given = tuple(periods)
    if any(period != int(period) or period < 1 for period in given):
        raise ValueError(f"periods must be whole numbers of steps >= 1, got {given}.")
    if not given or given[0] != 1:
        raise ValueError(
            f"periods must begin with 1, the memory that moves at every step, got "
            f"{given}; groups.on_clock makes all of a rule slower."
        )
    return tuple(int(period) for period in given)
