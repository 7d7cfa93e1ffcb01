"""Any memory of `hope_jax.memory`, of gradients."""

import dataclasses
from typing import Literal

import optax

from hope_jax.memory.compose import MemoryConfig
from hope_jax.optim import generalised
from hope_jax.optim.rule import Rule, Settings, check_decays, stepping


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientMemory(Rule):
    """See `hope_jax.optim.generalised.from_memory`.

    Attributes:
      b1: what the memory's retention keeps.
      memory: which memory learns the gradients.
      rows: whether the rows of a gradient teach it at once or one after another; none
        for at once where that is defined.
      inner_rate: of its rule; none for half of what is stable.
      inertia: momentum of its rule, where it has one.
    """

    kind: Literal["gradient_memory"] = "gradient_memory"
    b1: float = 0.9
    memory: MemoryConfig = MemoryConfig(
        architecture="linear", bias="l2", rule="gd", dgd="none", gradient="exact"
    )
    rows: generalised.Rows | None = None
    inner_rate: float | None = None
    inertia: float = 0.9

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        rule = generalised.from_memory(
            s.rate,
            self.memory,
            rows=self.rows,
            inner_rate=self.inner_rate,
            retention=self.b1,
            inertia=self.inertia,
        )
        return stepping(rule, s)
