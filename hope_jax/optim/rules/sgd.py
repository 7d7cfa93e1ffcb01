"""Gradient descent."""

import dataclasses
from typing import Literal

import optax

from hope_jax.optim.rule import Rule, Settings, decayed


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Gradient descent, without momentum; see `momentum` for that."""

    kind: Literal["sgd"] = "sgd"

    def make(self, s: Settings) -> optax.GradientTransformation:
        return decayed(optax.identity(), s)
