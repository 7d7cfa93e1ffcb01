"""AdaMuon: Muon whose factors are divided by the root of their mean square."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim import orthogonal
from hope_jax.optim.rule import Rule, Settings, check_decays, decayed


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaMuon(Rule):
    """See `hope_jax.optim.orthogonal.scale_by_adamuon`.

    Attributes:
      b1: what the memory of gradients keeps.
      b2: what the second moment of the factors keeps.
      sign: orthogonalise the signs of the memory, or the memory itself.
    """

    kind: Literal["adamuon"] = "adamuon"
    b1: float = 0.9
    b2: float = 0.95
    sign: bool = True

    matrices: ClassVar[bool] = True
    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        direction = orthogonal.scale_by_adamuon(
            decay=self.b1, beta2=self.b2, sign=self.sign, mesh=s.mesh
        )
        return decayed(direction, s)
