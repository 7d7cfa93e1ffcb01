"""Momentum of mapped gradients."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
import optax

from hope_jax.optim import momenta
from hope_jax.optim.rule import Rule, Settings, check_decays, stepping

_MAPS = {"sign": jnp.sign, "tanh": jnp.tanh}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMapMomentum(Rule):
    """See `hope_jax.optim.momenta.feature_map_momentum`.

    Attributes:
      b1: what the memory of mapped gradients keeps.
      feature_map: `sign`, by which the size of gradients does not matter, or `tanh`,
        for which gradients far below 1 pass unchanged.
    """

    kind: Literal["feature_map_momentum"] = "feature_map_momentum"
    b1: float = 0.9
    feature_map: Literal["sign", "tanh"] = "sign"

    degree: ClassVar[int] = 0

    def __post_init__(self):
        check_decays(self)

    def make(self, s: Settings) -> optax.GradientTransformation:
        rule = momenta.feature_map_momentum(
            s.rate, _MAPS[self.feature_map], decay=self.b1
        )
        return stepping(rule, s)
