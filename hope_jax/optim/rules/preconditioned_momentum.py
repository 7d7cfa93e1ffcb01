"""Momentum of gradients over the root of their mean square."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim import momenta
from hope_jax.optim.rule import Rule, Settings, check_decays, stepping


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreconditionedMomentum(Rule):
    """See `hope_jax.optim.momenta.preconditioned_momentum`.

    Attributes:
      b1: what the memory of gradients keeps.
      b2: what the mean of their squares keeps.
    """

    kind: Literal["preconditioned_momentum"] = "preconditioned_momentum"
    b1: float = 0.9
    b2: float = 0.95

    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        rule = momenta.preconditioned_momentum(
            s.rate,
            optax.scale_by_rms(decay=self.b2, bias_correction=True),
            decay=self.b1,
        )
        return stepping(rule, s)
