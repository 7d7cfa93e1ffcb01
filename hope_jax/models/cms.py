"""Continuum memory: a chain of MLPs, each moved by the task loss on its own clock.

Section 7 of arXiv:2512.24695, sequential variant (equations 70, 71 and 73). A level
whose period is shorter than the model's context moves inside the sequence: every row
has its own fast copy, which starts at the learned parameters and descends the
next-token loss of the text read so far. A slower level holds no fast copy: it is an
ordinary parameter that the training loop's optimizer moves on a slower clock.
"""

import dataclasses
import itertools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

_RULES = {
    "sgd": optax.identity,
    "momentum": lambda: optax.trace(0.9),
    "adam": lambda: optax.scale_by_adam(b1=0.9, b2=0.99, eps_root=1e-8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMSLevel:
    """One MLP of the chain.

    Attributes:
      period: tokens of one stream between two moves. `math.inf` has no clock of its
        own: the MLP of an ordinary Transformer block, a parameter like any other.
      rate: inner rate at the start; it is learned, between 0 and
        `CMSConfig.rate_bound`. A level of rate 0 never moves inside a sequence.
    """

    period: float
    rate: float = 0.1

    def __post_init__(self):
        if self.period != math.inf and (
            self.period < 1 or not float(self.period).is_integer()
        ):
            raise ValueError(
                "period must be a whole number of tokens, at least 1, or math.inf, got "
                f"{self.period}."
            )
        if self.rate < 0:
            raise ValueError(f"rate must be at least 0, got {self.rate}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMSConfig:
    """The chain and how its fast levels learn.

    Attributes:
      levels: from fast to slow, the order in which the chain applies them.
      hidden: hidden width of each SwiGLU MLP.
      order: `fast_to_slow` (the paper's figures) or `slow_to_fast` (equation 70 as
        printed).
      rule: inner optimizer of the fast levels; `sgd` is equation 71.
      reduction: `mean` of the gradients over a level's period, so that its step does
        not grow with its period, or `sum` (equation 71 to the letter).
      gradient: what the outer level differentiates: `exact`, through every inner move;
        `first_order`, moves are constants; `none`, the initial state learns nothing.
      clip: bound on the norm of one row's inner gradient, over a level's whole stack.
      rate_bound: upper bound of the learned inner rates.
    """

    levels: tuple[CMSLevel, ...] = (CMSLevel(period=math.inf),)
    hidden: int = 256
    order: Literal["fast_to_slow", "slow_to_fast"] = "fast_to_slow"
    rule: str = "sgd"
    reduction: Literal["mean", "sum"] = "mean"
    gradient: Literal["exact", "first_order", "none"] = "first_order"
    clip: float = 1.0
    rate_bound: float = 1.0

    def __post_init__(self):
        if not self.levels:
            raise ValueError("levels must name at least one MLP, got none.")
        for a, b in itertools.pairwise(self.levels):
            if a.period > b.period:
                raise ValueError(
                    "levels must be listed from fast to slow, got periods "
                    f"{a.period} before {b.period}; `order` turns the chain round."
                )
        choices = {
            "order": ("fast_to_slow", "slow_to_fast"),
            "rule": tuple(_RULES),
            "reduction": ("mean", "sum"),
            "gradient": ("exact", "first_order", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got "
                    f"{getattr(self, name)!r}."
                )
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}.")
        for name in ("clip", "rate_bound"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for level in self.levels:
            if level.rate >= self.rate_bound:
                raise ValueError(
                    f"rate ({level.rate}) must be below rate_bound ({self.rate_bound})."
                )

    def fast(self, context: int) -> tuple[int, ...]:
        """Indices of the levels that move within `context` tokens, fast first."""
        moving = (v.rate > 0 and v.period < context for v in self.levels)
        return tuple(i for i, moves in enumerate(moving) if moves)


class FastLevel(NamedTuple):
    """Where a fast level of every row stands, apart from its weights.

    Attributes:
      gradient: the sum of its own tokens' gradients since its last move; rows on the
        axis on which the weights have them.
      opt: the state of its rule, whose leaves always lead with rows.
    """

    gradient: PyTree
    opt: PyTree


def flow(config: CMSConfig, rate: Array | float) -> optax.GradientTransformation:
    """The rule of a fast level, for one row."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        _RULES[config.rule](),
        optax.scale_by_learning_rate(rate),
    )


def begin_level(config: CMSConfig, weights: PyTree, axis: int) -> FastLevel:
    """The level before its first token; `weights` carry the rows on `axis`."""
    opt = jax.vmap(flow(config, 0.0).init, axis)(weights)
    return FastLevel(jax.tree.map(jnp.zeros_like, weights), opt)


def move(
    config: CMSConfig,
    period: float,
    rate: Float[Array, ""],
    weights: PyTree,
    level: FastLevel,
    axis: int,
) -> tuple[PyTree, FastLevel]:
    """Equation 71 at the end of a level's period, for every row on `axis` of leaves."""
    scale = 1.0 / period if config.reduction == "mean" else 1.0

    def move_row(weights, gradient, opt):
        gradient = jax.tree.map(lambda g: scale * g, gradient)
        updates, opt = flow(config, rate).update(gradient, opt, weights)
        return optax.apply_updates(weights, updates), opt

    over_rows = jax.vmap(move_row, (axis, axis, 0), (axis, 0))
    weights, opt = over_rows(weights, level.gradient, level.opt)
    return weights, FastLevel(jax.tree.map(jnp.zeros_like, level.gradient), opt)
