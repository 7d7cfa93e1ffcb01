"""Nested learning in JAX: levels that learn, from optimizers to sequence memories."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

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
from hope_jax.core.system import Box, Edge, System, as_level, describe, live, start
from hope_jax.core.transfer import attend, backprop, condition, generate, initialise
from hope_jax.evaluate.causality import check_causality

if TYPE_CHECKING:
    from hope_jax import optim, plot
    from hope_jax.kernels.select import memory_scan
    from hope_jax.memory.compose import MemoryConfig, Tokens, memory_level
    from hope_jax.memory.state import begin_memory
    from hope_jax.models import zoo
    from hope_jax.models.config import ModelConfig
    from hope_jax.models.lm import apply, build, initial_state
    from hope_jax.plot import draw
    from hope_jax.stream.reader import open_checkpoint as restore

# Loaded when they are asked for: models need Flax, checkpoints Orbax, and pictures
# matplotlib.
_LATER = {
    "MemoryConfig": "hope_jax.memory.compose:MemoryConfig",
    "ModelConfig": "hope_jax.models.config:ModelConfig",
    "Tokens": "hope_jax.memory.compose:Tokens",
    "apply": "hope_jax.models.lm:apply",
    "begin_memory": "hope_jax.memory.state:begin_memory",
    "build": "hope_jax.models.lm:build",
    "draw": "hope_jax.plot:draw",
    "initial_state": "hope_jax.models.lm:initial_state",
    "memory_level": "hope_jax.memory.compose:memory_level",
    "memory_scan": "hope_jax.kernels.select:memory_scan",
    "optim": "hope_jax.optim",
    "plot": "hope_jax.plot",
    "restore": "hope_jax.stream.reader:open_checkpoint",
    "zoo": "hope_jax.models.zoo",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # one place says it, setup.py
        return importlib.metadata.version("hope_jax")
    if name not in _LATER:
        raise AttributeError(f"module 'hope_jax' has no attribute {name!r}")
    module, _, attribute = _LATER[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "Box",
    "Clock",
    "Edge",
    "Fast",
    "HopeUpdate",
    "Level",
    "LevelState",
    "MemoryConfig",
    "ModelConfig",
    "Seen",
    "Slow",
    "System",
    "Tokens",
    "apply",
    "as_level",
    "attend",
    "backprop",
    "begin",
    "begin_memory",
    "build",
    "check_causality",
    "condition",
    "describe",
    "draw",
    "generate",
    "hope_update",
    "initial_state",
    "initialise",
    "live",
    "memory_level",
    "memory_scan",
    "optim",
    "plot",
    "restore",
    "start",
    "tick",
    "unroll",
    "zoo",
]
