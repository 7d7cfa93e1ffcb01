"""Momentum."""

import dataclasses
from typing import Literal

import optax

from hope_jax.optim import momenta
from hope_jax.optim.rule import Rule, Settings, check_decays, stepping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(Rule):
    """See `hope_jax.optim.momenta.momentum`.

    Attributes:
      b1: what the memory of gradients keeps.
    """

    kind: Literal["momentum"] = "momentum"
    b1: float = 0.9

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        return stepping(momenta.momentum(s.rate, decay=self.b1), s)
