"""What an optimizer's config is: how it makes the transformation, and what is so of it.

Each rule is a file of `hope_jax.optim.rules` and a line of its registry, `RULES`.
"""

import abc
from typing import Any, ClassVar, Literal, NamedTuple

import optax
from jax.sharding import Mesh

from hope_jax.optim import groups


class Settings(NamedTuple):
    """What a rule is told by the run, beside its own config.

    Attributes:
      rate: `rate(count)`, the schedule.
      weight_decay: decoupled, times the rate.
      mesh: of the devices, over which a rule may spread its work; None for one.
      eps_root: under the root of Adam's second moment, whose derivative is infinite
        where all gradients were zero.
    """

    rate: optax.Schedule
    weight_decay: float
    mesh: Mesh | None = None
    eps_root: float = 0.0


class Rule(abc.ABC):
    """The base of the configs of optimizers: frozen dataclasses that build themselves.

    Attributes:
      kind: which member of `hope_jax.optim.rules.RULES` it is.
      matrices: whether it moves matrices alone; all else then moves by adamw.
      inputs: what it needs to know of what matrices were multiplied with, if anything:
        the `grams` of inputs, as `update`'s argument `inputs`, or `slopes` in place of
        gradients (`hope_jax.optim.capture`). It then moves the matrices for which there
        are any; see `hope_jax.optim.differentiation`. Rules that take slopes have a
        field `memory`, whose bias is their objective.
      degree: of the defaults: the power of c by which an update grows when gradients
        are c times as large; None where it is no power.
      lapack: whether it calls LAPACK, for which a pool of few threads can dead-lock.
    """

    kind: str
    matrices: ClassVar[bool] = False
    inputs: ClassVar[Literal["grams", "slopes"] | None] = None
    degree: ClassVar[int | None] = 1

    @property
    def lapack(self) -> bool:
        return False

    @abc.abstractmethod
    def make(self, s: Settings) -> optax.GradientTransformation:
        """The transformation, with the rate and decoupled decay."""


def decayed(direction: optax.GradientTransformation, s: Settings):
    """A direction with decoupled decay (Loshchilov and Hutter, arXiv:1711.05101)."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(s.weight_decay, mask=groups.decays),
        optax.scale_by_learning_rate(s.rate),
    )


def stepping(rule: optax.GradientTransformation, s: Settings):
    """A rule that has the rate inside, as ours that store steps do; decoupled decay."""
    return optax.chain(
        rule,
        optax.add_decayed_weights(
            lambda count: -s.weight_decay * s.rate(count), mask=groups.decays
        ),
    )


def check_decays(config: Any) -> None:
    """Refuses a config whose `b1` or `b2` is no part of what is kept.

    Raises:
      ValueError: names the field and its value.
    """
    for name in ("b1", "b2"):
        value = getattr(config, name, 0.0)
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")
