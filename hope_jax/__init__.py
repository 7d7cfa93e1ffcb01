"""Nested learning in JAX: levels that learn, from optimizers to sequence memories."""

from hope_jax.core.clock import Clock
from hope_jax.core.level import (
    Fast,
    HopeUpdate,
    Level,
    LevelState,
    Seen,
    Slow,
    begin,
    hope_update,
    tick,
    unroll,
)

__all__ = [
    "Clock",
    "Fast",
    "HopeUpdate",
    "Level",
    "LevelState",
    "Seen",
    "Slow",
    "begin",
    "hope_update",
    "tick",
    "unroll",
]
