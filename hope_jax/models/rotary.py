"""How fast the coordinates of a head turn with positions (RoPE, arXiv:2104.09864)."""

import dataclasses
import math
from typing import Literal, Protocol

import numpy as np

from hope_jax.core.config import Kinds, at_least


class Rotary(Protocol):
    """A config of `ROTARY`: frozen, chosen by kind."""

    @property
    def kind(self) -> str: ...

    def frequencies(self, half: int) -> np.ndarray:
        """Radians a token of each of the `half` pairs of coordinates, float64."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """base^(-i / half) of pair i.

    Attributes:
      kind: its name.
      base: also called theta.
    """

    kind: Literal["plain"] = "plain"
    base: float = 10_000.0

    def __post_init__(self):
        _check_base(self)

    def frequencies(self, half: int) -> np.ndarray:
        return _powers(self.base, half)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Positions divided by a factor (arXiv:2306.15595).

    Attributes:
      kind: its name.
      base: as of `Plain`.
      factor: by which it is slower.
    """

    kind: Literal["linear"] = "linear"
    base: float = 10_000.0
    factor: float = 2.0

    def __post_init__(self):
        _check_base(self)
        at_least(self, factor=1)

    def frequencies(self, half: int) -> np.ndarray:
        return _powers(self.base, half) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1's: pairs that turn often in the first context stay, slow ones are
    divided by a factor, those between by something between (arXiv:2407.21783).

    Attributes:
      kind: its name.
      base: as of `Plain`.
      factor: by which slow pairs are slower.
      low, high: turns within `original` tokens, up to which a pair is slow and from
        which it stays.
      original: tokens of the context before it was lengthened.
    """

    kind: Literal["llama3"] = "llama3"
    base: float = 500_000.0
    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self):
        _check_base(self)
        at_least(self, factor=1, original=1)
        if not 0 < self.low < self.high:
            raise ValueError(
                f"low ({self.low}) must be above 0 and below high ({self.high})."
            )

    def frequencies(self, half: int) -> np.ndarray:
        plain = _powers(self.base, half)
        turns = plain * self.original / (2.0 * math.pi)
        stays = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return plain * (stays + (1.0 - stays) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPositions:
    """Nothing turns: what is far is as near, and order shows through the mask alone
    (arXiv:2305.19466).

    Attributes:
      kind: its name.
    """

    kind: Literal["none"] = "none"

    def frequencies(self, half: int) -> np.ndarray:
        return np.zeros(half)


def _powers(base, half):
    return base ** (-np.arange(half) / half)


def _check_base(config):
    if not config.base > 1:
        raise ValueError(f"base must be above 1, got {config.base}.")


PLAIN = Plain()
ROTARY: Kinds[Rotary] = Kinds.of_entries(
    "rotary", PLAIN, Linear(), Llama3(), NoPositions()
)
