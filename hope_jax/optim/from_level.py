"""Any level is an optimizer: a memory whose context is the stream of gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from hope_jax.core.level import Level, begin, tick


def from_level(
    level: Level, start: Callable[[Array], PyTree] = jnp.zeros_like
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer of `level`, applied to every leaf by itself.

    Each leaf of the parameters gets a memory of its own. An item of its context is the
    leaf's gradient, and its read is the update that is added to the leaf (equations
    35-37 of arXiv:2512.24695): `read_at='post'` makes that `W + m_{t+1}`.

    Args:
      level: what to do with a stream of gradients. Items and reads have the shape of
        the leaf.
      start: `leaf -> params`, where the memory of a leaf starts: zeros like it. One of
        another shape starts, for example, at `lambda leaf: level.init(key)`.

    Returns:
      An optax transformation; its state has a `LevelState` for each leaf.

    Raises:
      ValueError: for a non-parametric level, or when a read has not the leaf's shape.

    A memory that adds gradients up, descending <m, g>, is gradient descent with
    momentum 1:

    >>> memory = Level(
    ...     init=lambda key: jnp.zeros(()),
    ...     read=lambda m, g: m,
    ...     objective=lambda m, g: jnp.vdot(m, g),
    ...     flow=optax.sgd(0.1),
    ...     read_at="post",
    ... )
    >>> optimizer = from_level(memory)
    >>> state = optimizer.init(jnp.zeros(()))
    >>> first, state = optimizer.update(jnp.ones(()), state)
    >>> second, state = optimizer.update(jnp.ones(()), state)
    >>> round(float(first), 2), round(float(second), 2)
    (-0.1, -0.2)
    """
    if not level.clock.parametric:
        raise ValueError(
            "level is non-parametric (period 0): it has no state to carry from one "
            "gradient to the next. Give its clock a period of at least 1."
        )

    def init(params):
        # astype: a weakly typed leaf would change type, and compile, at the first step.
        return jax.tree.map(
            lambda leaf: begin(level, start(leaf.astype(leaf.dtype))), params
        )

    def update(updates, state, params=None, **extra):
        del params, extra
        leaves, structure = jax.tree.flatten(updates)
        states = structure.flatten_up_to(state)
        moved, reads = [], []
        for gradient, standing in zip(leaves, states, strict=True):
            standing, read = tick(level, standing, gradient)
            if jnp.shape(read) != gradient.shape:
                raise ValueError(
                    f"level reads shape {jnp.shape(read)} for a gradient of shape "
                    f"{gradient.shape}; an optimizer's read is the update of its leaf."
                )
            moved.append(standing)
            reads.append(read.astype(gradient.dtype))
        return structure.unflatten(reads), structure.unflatten(moved)

    return optax.GradientTransformationExtraArgs(init, update)
