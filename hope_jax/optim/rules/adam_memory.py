"""Adam as a memory of gradients."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim import adaptive
from hope_jax.optim.rule import Rule, Settings, check_decays, stepping


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamMemory(Rule):
    """See `hope_jax.optim.adaptive.adam_memory`.

    Attributes:
      b1: what the mean of gradients keeps.
      b2: what the mean of their squares keeps.
      ridge: of the regression, on the scale of squared gradients.
      target: what gradients are mapped to.
      literal: sums in place of means, as printed.
    """

    kind: Literal["adam_memory"] = "adam_memory"
    b1: float = 0.9
    b2: float = 0.95
    ridge: float = 0.0
    target: adaptive.Target = "root"
    literal: bool = False

    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        rule = adaptive.adam_memory(
            s.rate,
            b1=self.b1,
            b2=self.b2,
            ridge=self.ridge,
            target=self.target,
            literal=self.literal,
        )
        return stepping(rule, s)
