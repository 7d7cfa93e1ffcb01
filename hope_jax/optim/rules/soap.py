"""SOAP: Adam in the eigenvectors of Shampoo's two matrices."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim import kronecker
from hope_jax.optim.rule import Rule, Settings, check_decays, decayed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soap(Rule):
    """See `hope_jax.optim.kronecker.scale_by_soap`.

    Attributes:
      b1: what the mean of gradients keeps.
      b2: what the second moment in the eigenvectors keeps.
      frequency: steps between two turns of the bases.
      shampoo_beta: what the matrices of the two sides keep at each step.
      max_size: of a side with a basis of its own.
    """

    kind: Literal["soap"] = "soap"
    b1: float = 0.9
    b2: float = 0.95
    frequency: int = 10
    shampoo_beta: float = 0.95
    max_size: int = 2048

    matrices: ClassVar[bool] = True
    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        direction = kronecker.scale_by_soap(
            b1=self.b1,
            b2=self.b2,
            shampoo_beta=self.shampoo_beta,
            frequency=self.frequency,
            max_size=self.max_size,
            mesh=s.mesh,
        )
        return decayed(direction, s)
