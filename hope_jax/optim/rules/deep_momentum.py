"""Deep momentum: the memory of gradients is a network that learns while it is used."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.memory import bias
from hope_jax.optim.leaves import (
    as_rows,
    as_type,
    check_fraction,
    guarded,
    next_count,
    placed,
    rate_at,
    taken,
    unit_rows,
    wide,
)
from hope_jax.optim.momenta import preconditioner
from hope_jax.optim.rule import Rule, Settings, check_decays, stepping


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepMomentum(Rule):
    """See `deep_momentum`.

    Attributes:
      b1: what the memory keeps at each step.
      inner_rate: of the memory's own descent.
      objective: what it descends, an attentional bias of `hope_jax.memory.bias`.
      target: what gradients are mapped to: none for themselves, or the `ones` of the
        paper.
      hidden: width of the network.
    """

    kind: Literal["deep_momentum"] = "deep_momentum"
    b1: float = 0.9
    inner_rate: float = 0.1
    objective: str = "l2"
    target: Literal["ones"] | None = None
    hidden: int = 32

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        rule = deep_momentum(
            s.rate,
            decay=self.b1,
            inner_rate=self.inner_rate,
            objective=self.objective,
            target=self.target,
            hidden=self.hidden,
        )
        return stepping(rule, s)


class DeepMemory(NamedTuple):
    """The network of one leaf, `m(x) = skip x + w1 tanh(w2 x) / √H`.

    Attributes:
      skip: how much of x comes through; 1 at the start.
      w1: [C, H]; 0 at the start.
      w2: [H, C]; Gaussian at the start.
    """

    skip: Float[Array, ""]
    w1: Float[Array, "C H"]
    w2: Float[Array, "H C"]

    def __call__(self, x: Float[Array, "R C"]) -> Float[Array, "R C"]:
        hidden = jnp.tanh(x @ self.w2.T) * self.w2.shape[0] ** -0.5
        return self.skip * x + hidden @ self.w1.T


class DeepState(NamedTuple):
    """Where deep momentum stands.

    Attributes:
      count: steps taken.
      memory: a `DeepMemory` for each leaf.
      start: where its w2 started.
      target: the state of the target's transformation.
    """

    count: Int[Array, ""]
    memory: PyTree
    start: PyTree
    target: PyTree


@guarded
def deep_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.9,
    inner_rate: float = 0.1,
    objective: str = "l2",
    target: Any = None,
    hidden: int = 32,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Deep momentum gradient descent, DMGD (equation 50, arXiv:2512.24695).

        mᵢ₊₁ = α mᵢ − ζ ∇ₘ mean over r of ℓ(m(kᵣ), vᵣ),   Wᵢ₊₁ = Wᵢ − η ‖ĝᵣ‖ mᵢ₊₁(kᵣ)

    The paper leaves the shape of m open. Here each leaf has one small network on its
    last axis, shared by its rows (a vector is one row, an embedding one a token): kᵣ is
    the direction of row r of the gradient g, vᵣ that of ĝ, the target. The sign is
    outside, where the paper maps to −g. At the start m(x) = x: the first step is nearly
    gradient descent. As the memory sees directions alone, nothing overflows, and for
    ĝ = g the update is of degree 1 in the gradients. Rows that are zero teach nothing.

    Forgetting scales the function, α m: `skip` and `w1` shrink, and w2, the features,
    goes back to where it started, since from zero it could not learn. With `l2` the
    memory therefore gives whole steps, up to ζ' / (1 − α + ζ') of them for a rate in
    function space ζ' of about ζ, in directions that gradients keep having, and forgets
    those that they have no more; with α = 1 and ĝ = g it has nothing to learn and is
    gradient descent. `dot` adds up, as momentum does: to ζ' / (1 − α).

    Args:
      learning_rate: η, a number or a schedule.
      decay: α, how much of the memory is kept at each step, in [0, 1].
      inner_rate: ζ, of the memory's own descent.
      objective: ℓ, an attentional bias of `hope_jax.memory.bias`: `l2` or `dot`, or one
        that outliers cannot move, such as `huber`, with its threshold at 1.
      target: ĝ, what gradients should be mapped to. None is g; or a function, an optax
        transformation or a tree of matrices that gives P g, as in
        `preconditioned_momentum`; or "ones", the 1 of the print: ⟨m(u), 1⟩ with `dot`,
        which drifts along one direction whatever the gradients say.
      hidden: H, the width of the network's hidden layer.
      seed: of w2.

    Raises:
      ValueError: an unknown objective or target, or numbers out of range.
    """
    check_fraction("decay", decay)
    for name, value in (("inner_rate", inner_rate), ("hidden", hidden)):
        if not isinstance(value, Tracer) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    if isinstance(target, str) and target != "ones":
        raise ValueError(
            f"target must be 'ones', None, a function, an optax transformation or a "
            f"tree of matrices, got {target!r}."
        )
    loss = bias.build(objective)
    plain = target is None or isinstance(target, str)
    signal = optax.identity() if plain else preconditioner(target, "target")
    signal = optax.with_extra_args_support(signal)

    def begin(index, leaf):
        width, dtype = as_rows(leaf).shape[-1], wide(leaf).dtype
        key = jax.random.fold_in(jax.random.key(seed), index)
        return DeepMemory(
            skip=jnp.ones((), dtype),
            w1=jnp.zeros((width, int(hidden)), dtype),
            w2=jax.random.normal(key, (int(hidden), width), dtype),
        )

    def init(params):
        leaves = jax.tree.leaves(params)
        memories = [begin(i, leaf) for i, leaf in enumerate(leaves)]
        return DeepState(
            jnp.zeros((), jnp.int32),
            placed(params, memories),
            placed(params, [m.w2 for m in memories]),
            signal.init(jax.tree.map(wide, params)),
        )

    def learn(memory, w2, keys, values, weight):
        def inner(m):
            one = jnp.ones((), keys.dtype)
            losses = jax.vmap(lambda y, v: loss(y, v, one))(m(keys), values)
            return jnp.vdot(weight, losses)

        alpha, zeta = as_type(decay, keys), as_type(inner_rate, keys)
        base = DeepMemory(jnp.zeros_like(memory.skip), jnp.zeros_like(memory.w1), w2)
        return jax.tree.map(
            lambda m, b, slope: b + alpha * (m - b) - zeta * slope,
            memory,
            base,
            jax.grad(inner)(memory),
        )

    def move(gradient, image, memory, w2, rate):
        keys, _, weight = unit_rows(wide(gradient))
        values, size, _ = unit_rows(image)
        if isinstance(target, str):
            values = jnp.ones_like(values)
        memory = learn(memory, w2, keys, values, weight)
        step = -as_type(rate, keys) * size * memory(keys)
        return step.reshape(gradient.shape).astype(gradient.dtype), memory

    def update(updates, state, params=None, **extra):
        params = None if params is None else jax.tree.map(wide, params)
        images, inner = signal.update(
            jax.tree.map(wide, updates), state.target, params, **extra
        )
        rate = rate_at(learning_rate, state.count)
        leaves, structure = jax.tree.flatten(updates)
        rest = [structure.flatten_up_to(images)]
        rest += [taken(updates, tree) for tree in (state.memory, state.start)]
        moved = [move(*leaf, rate=rate) for leaf in zip(leaves, *rest, strict=True)]
        return structure.unflatten([step for step, _ in moved]), DeepState(
            next_count(state.count),
            placed(updates, [memory for _, memory in moved]),
            state.start,
            inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)
