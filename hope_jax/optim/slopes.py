"""Generalised gradient descent of whole networks: all tokens of a batch at once.

`hope_jax.optim.generalised.ggd` moves a matrix by one token. A network's matrix
multiplies many, and what it should say of each is that token's own descent direction:

    W ← argmin_W  mean over t of ℓ(W xₜ, uₜ) + Ret(W),   uₜ = −∇yLₜ

(equations 59 and 60, arXiv:2512.24695). The slope of the mean at W is all that a rule
of first order needs of it. `hope_jax.optim.capture.value_and_slopes` finds it for every
matrix in the backward pass, exactly, token by token; here is the rule.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from hope_jax.memory import compose
from hope_jax.memory.compose import MemoryConfig, Tokens
from hope_jax.optim.leaves import (
    as_type,
    check_fraction,
    guarded,
    next_count,
    placed,
    rate_at,
    taken,
    wide,
)

_NONE: Any = ((), (), ())  # `Tokens` that are rates alone: no k, v and q


class SlopesState(NamedTuple):
    """How many steps were taken, and the state of each matrix's rule and retention."""

    count: Int[Array, ""]
    flow: PyTree


@guarded
def descend_slopes(
    learning_rate: optax.ScalarOrSchedule,
    config: MemoryConfig,
    *,
    retention: float = 1.0,
    inertia: float = 0.9,
    input_axis: int = -1,
) -> optax.GradientTransformationExtraArgs:
    """The rule and the retention of a matrix memory, for slopes in place of gradients.

    For `dot` slopes are gradients and, with `gd`, this is gradient descent; for `l2`
    they are ∇W + W Σ xₜ xₜᵀ / N, and this is explicit DGD. An update has the scale
    behaviour of the rule; slopes of robust biases are bounded whatever the loss is.

    Args:
      learning_rate: η, a number or a schedule.
      config: a matrix memory: `architecture="linear"` without `features`, `norm` and
        delta term (which is that of `l2`), `window=1`, `steps=1`, and rules and
        retentions that need no single key. Its bias is that of the slopes; `chunk`
        counts steps, for the retentions that project, and is 1 otherwise.
      retention: α, how much of the weights (or their dual image) is kept at each step,
        where `config` has a retention.
      inertia: momentum of the rule, where it has one.
      input_axis: -1 for y = W x, -2 for y = x W (Flax kernels).

    Raises:
      ValueError: another config, or fractions out of range.
    """
    check_config(config)
    check_fraction("retention", retention)
    check_fraction("inertia", inertia)
    if input_axis not in (-1, -2):
        raise ValueError(
            f"input_axis must be -1 (y = W x) or -2 (y = x W), got {input_axis}."
        )
    flow: Any = compose.build_flow(config)

    def turned(leaf):
        return wide(leaf.mT if input_axis == -2 else leaf)

    def stacked(function, axes):
        for _ in range(axes):
            function = jax.vmap(function)
        return function

    def begin(weight):
        if weight.ndim < 2:
            return ()
        return stacked(lambda w: flow.init({"w": w}), weight.ndim - 2)(turned(weight))

    def init(params):
        flows = [begin(leaf) for leaf in jax.tree.leaves(params)]
        return SlopesState(jnp.zeros((), jnp.int32), placed(params, flows))

    def move(slope, weight, state, rate):
        if slope.ndim < 2:
            return -as_type(rate, slope) * slope, state
        given = (rate, retention, inertia)
        eta, alpha, theta = (as_type(value, wide(slope)) for value in given)
        rates = Tokens(*_NONE, eta=eta, alpha=alpha, theta=theta)

        def one(slope, weight, state):
            moved, state = flow.update(
                {"w": slope}, state, {"w": weight}, context=rates
            )
            return moved["w"], state

        moved, state = stacked(one, slope.ndim - 2)(
            turned(slope), turned(weight), state
        )
        moved = moved.mT if input_axis == -2 else moved
        return moved.astype(slope.dtype), state

    def update(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError(
                "descend_slopes needs the parameters: update(slopes, state, params)."
            )
        rate = rate_at(learning_rate, state.count)
        leaves, structure = jax.tree.flatten(updates)
        rest = [structure.flatten_up_to(params), taken(updates, state.flow)]
        moved = [move(*leaf, rate=rate) for leaf in zip(leaves, *rest, strict=True)]
        steps, flows = zip(*moved, strict=True) if moved else ((), ())
        return structure.unflatten(steps), SlopesState(
            next_count(state.count), placed(updates, flows)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def objective(config: MemoryConfig):
    """`(y, u) -> ℓ` of one token, the bias of `config`, for `value_and_slopes`."""
    check_config(config)
    loss = compose.build_bias(config)
    return lambda y, u: loss(y, u, jnp.asarray(config.threshold, y.dtype))


def check_config(config: MemoryConfig) -> None:
    """Refuses memories that are no matrix, or whose rule needs one key at a time."""
    wanted = {
        "architecture": ("'linear'", config.chosen.architecture.matrix),
        "features": ("'none'", config.chosen.features.plain),
        "norm": ("False", not config.norm),
        "window": ("1", config.window == 1),
        "steps": ("1", config.steps == 1),
        "dgd": ("'none'", config.dgd == "none"),
        "rate_law": ("'token'", config.rate_law == "token"),
    }
    for name, (value, so) in wanted.items():
        if not so:
            raise ValueError(
                f"{name} must be {value} for the weights of a layer as the "
                f"memory of a batch; got {getattr(config, name)!r}."
            )
    kept = config.chosen.retention
    single = {
        "rule": config.chosen.rule.single_key,
        "retention": kept.along_values or kept.channels,
    }
    for name, so in single.items():
        if so:
            raise ValueError(
                f"{name}={getattr(config, name)!r} solves for one key at a time, and a "
                "batch has many: optim.dgd is the implicit rule for l2."
            )
