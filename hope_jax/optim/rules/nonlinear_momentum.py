"""Momentum that is orthogonalised where it is read."""

import dataclasses
import functools
from typing import ClassVar, Literal

import optax

from hope_jax.optim import momenta, orthogonal
from hope_jax.optim.rule import Rule, Settings, check_decays, stepping


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonlinearMomentum(Rule):
    """See `hope_jax.optim.momenta.nonlinear_momentum`.

    Attributes:
      b1: what the memory of gradients keeps.
      literal: the learning rate inside, as the paper prints it.
    """

    kind: Literal["nonlinear_momentum"] = "nonlinear_momentum"
    b1: float = 0.9
    literal: bool = False

    matrices: ClassVar[bool] = True
    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        rule = momenta.nonlinear_momentum(
            s.rate,
            functools.partial(orthogonal.orthogonalise_tree, mesh=s.mesh),
            decay=self.b1,
            literal=self.literal,
        )
        return stepping(rule, s)
