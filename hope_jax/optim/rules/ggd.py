"""Generalised gradient descent of whole networks, on slopes in place of gradients."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.memory.compose import MemoryConfig
from hope_jax.optim import slopes
from hope_jax.optim.rule import Rule, Settings, check_decays, stepping


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGD(Rule):
    """See `hope_jax.optim.slopes.descend_slopes`.

    Attributes:
      b1: momentum of the memory's rule, where it has one.
      memory: the bias, the rule and the retention; any of a matrix memory that need no
        single key. By default explicit DGD.
      retention: how much of a matrix is kept at each step, if there is a retention.
    """

    kind: Literal["ggd"] = "ggd"
    b1: float = 0.9
    memory: MemoryConfig = MemoryConfig(
        architecture="linear",
        bias="l2",
        rule="gd",
        retention="none",
        dgd="none",
        chunk=1,
    )
    retention: float = 1.0

    matrices: ClassVar[bool] = True
    inputs: ClassVar[Literal["slopes"]] = "slopes"
    degree: ClassVar[None] = None

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        rule = slopes.descend_slopes(
            s.rate,
            self.memory,
            retention=self.retention,
            inertia=self.b1,
            input_axis=-2,
        )
        return stepping(rule, s)
