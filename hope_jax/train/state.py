"""Where a run stands between two steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from hope_jax.core.level import Level, LevelState, begin
from hope_jax.train.guard import Guard


class TrainState(NamedTuple):
    """The outermost level and the key of the run; a pytree of arrays.

    Attributes:
      level: parameters, optimizer state, and steps that moved them (`level.count`).
      key: of everything random after the first step. A step that needs randomness
        draws it from `fold_in(key, level.count)`, so a resumed run draws the same.
      guard: what a guarded step knows (`hope_jax.train.guard`); None without.
    """

    level: LevelState
    key: Array
    guard: Guard | None = None

    @property
    def params(self) -> PyTree:
        return self.level.params

    @property
    def step(self) -> Array:
        return self.level.count


def create(
    params: PyTree,
    tx: optax.GradientTransformation,
    key: Array,
    guard: Guard | None = None,
) -> TrainState:
    """The state before the first step."""
    level = begin(outer_level(tx), params)
    # A rule may start several parts of its state as one array, but a buffer can be
    # donated only once.
    level = level._replace(opt=jax.tree.map(jnp.copy, level.opt))
    return TrainState(level, key, guard)


def abstract(params: PyTree, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and types of `create(params, tx, key)`; `params` may be shapes alone."""
    return jax.eval_shape(lambda p: create(p, tx, jax.random.key(0)), params)


def outer_level(tx: optax.GradientTransformation, objective=None) -> Level:
    """The level that pre-training moves: once a batch, by `tx`."""
    return Level(None, None, objective, tx)  # pyright: ignore[reportArgumentType] the loop begins it and does not read it
