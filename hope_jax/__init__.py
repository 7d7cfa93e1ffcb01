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
from hope_jax.core.system import Box, Edge, System, as_level, describe, draw
from hope_jax.core.transfer import attend, backprop, condition, generate, initialise
from hope_jax.evaluate.causality import check_causality

__all__ = [
    "Box",
    "Clock",
    "Edge",
    "Fast",
    "HopeUpdate",
    "Level",
    "LevelState",
    "Seen",
    "Slow",
    "System",
    "as_level",
    "attend",
    "backprop",
    "begin",
    "check_causality",
    "condition",
    "describe",
    "draw",
    "generate",
    "hope_update",
    "initialise",
    "tick",
    "unroll",
]
