"""Muon: momentum, orthogonalised."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim import groups, orthogonal
from hope_jax.optim.leaves import without_empty
from hope_jax.optim.rule import Rule, Settings, check_decays, decayed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Rule):
    """`optax.contrib.scale_by_muon`, with updates as large as AdamW's.

    Attributes:
      b1: what the memory of gradients keeps.
    """

    kind: Literal["muon"] = "muon"
    b1: float = 0.9

    matrices: ClassVar[bool] = True
    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        factor = optax.contrib.scale_by_muon(
            beta=self.b1, weight_dimension_numbers=groups.last_two_axes
        )
        # As large as AdamW's update, so that rates carry over.
        scale = optax.stateless(lambda factors, params: orthogonal.by_shape(factors))
        direction = without_empty(optax.chain(factor, scale), "muon")
        return decayed(direction, s)
