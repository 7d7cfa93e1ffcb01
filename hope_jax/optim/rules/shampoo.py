"""Shampoo: the inverse roots of two small matrices for each large one."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim import kronecker
from hope_jax.optim.rule import Rule, Settings, check_decays, decayed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shampoo(Rule):
    """See `hope_jax.optim.kronecker.scale_by_shampoo`.

    Attributes:
      b1: what the mean of gradients keeps.
      b2: what the matrices of the two sides keep.
      frequency: steps between two takings of the inverse roots.
      root: of the two sides' matrices.
      grafting: where the size of a step comes from.
      max_size: of a side with a matrix of its own.
    """

    kind: Literal["shampoo"] = "shampoo"
    b1: float = 0.9
    b2: float = 0.95
    frequency: int = 10
    root: Literal[2, 4] = 4
    grafting: kronecker.Grafting = "adam"
    max_size: int = 2048

    matrices: ClassVar[bool] = True
    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        direction = kronecker.scale_by_shampoo(
            b1=self.b1,
            b2=self.b2,
            frequency=self.frequency,
            root=self.root,
            grafting=self.grafting,
            max_size=self.max_size,
            mesh=s.mesh,
        )
        return decayed(direction, s)
