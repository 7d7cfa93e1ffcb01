"""Lion: the sign of an average of gradients."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim.rule import Rule, Settings, check_decays, decayed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Lion (arXiv:2302.06675).

    Attributes:
      b1: what the step keeps of the memory.
      b2: what the memory keeps.
    """

    kind: Literal["lion"] = "lion"
    b1: float = 0.9
    b2: float = 0.95

    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        return decayed(optax.scale_by_lion(b1=self.b1, b2=self.b2), s)
