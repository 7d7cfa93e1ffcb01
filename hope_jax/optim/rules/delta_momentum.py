"""Momentum by the delta rule."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim import momenta
from hope_jax.optim.rule import Rule, Settings, check_decays, stepping


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaMomentum(Rule):
    """See `hope_jax.optim.momenta.delta_momentum`.

    Attributes:
      b1: what the memory of gradients keeps.
      form: each number by itself, or matrices.
      stability: what keeps the memory from blowing up.
    """

    kind: Literal["delta_momentum"] = "delta_momentum"
    b1: float = 0.9
    form: momenta.Form = "element"
    stability: momenta.Stability = "proximal"

    degree: ClassVar[None] = None

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        rule = momenta.delta_momentum(
            s.rate, decay=self.b1, form=self.form, stability=self.stability
        )
        return stepping(rule, s)
