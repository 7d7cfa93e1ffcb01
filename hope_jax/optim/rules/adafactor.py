"""Adafactor: a second moment of one number a row and one a column."""

import dataclasses
from typing import ClassVar, Literal

import optax

from hope_jax.optim.rule import Rule, Settings, decayed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Rule):
    """Adafactor (arXiv:1804.04235) as Optax has it, without momentum."""

    kind: Literal["adafactor"] = "adafactor"

    degree: ClassVar[int] = 0

    def make(self, s: Settings) -> optax.GradientTransformation:
        direction = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
        return decayed(direction, s)
