"""Adam, with decoupled weight decay or without any."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim.rule import Rule, Settings, check_decays, decayed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Rule):
    """Adam (arXiv:1412.6980); as `adamw` with decoupled decay (arXiv:1711.05101).

    Attributes:
      kind: `adamw`, or `adam`, which no weight decay of a run acts on.
      b1: decay of the mean of gradients.
      b2: decay of the mean of their squares.
    """

    kind: Literal["adamw", "adam"] = "adamw"
    b1: float = 0.9
    b2: float = 0.95

    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        if self.kind == "adam":
            s = s._replace(weight_decay=0.0)
        direction = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps_root=s.eps_root)
        return decayed(direction, s)
