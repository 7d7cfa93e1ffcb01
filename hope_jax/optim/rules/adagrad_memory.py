"""AdaGrad as a memory of gradients."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim import adaptive
from hope_jax.optim.rule import Rule, Settings, check_decays, stepping


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaGradMemory(Rule):
    """See `hope_jax.optim.adaptive.adagrad_memory`.

    Attributes:
      b1: what the sum of gradients keeps.
      form: each number by itself, or whole rows.
      ridge: of the regression, on the scale of squared gradients.
      max_width: of the last axis of a leaf, for `outer`.
    """

    kind: Literal["adagrad_memory"] = "adagrad_memory"
    b1: float = 0.9
    form: adaptive.Form = "element"
    ridge: float = 0.0
    max_width: int = 1024

    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    @property
    def lapack(self) -> bool:
        return self.form == "outer"

    def make(self, s: Settings) -> optax.GradientTransformation:
        rule = adaptive.adagrad_memory(
            s.rate,
            decay=self.b1,
            form=self.form,
            ridge=self.ridge,
            max_width=self.max_width,
        )
        return stepping(rule, s)
