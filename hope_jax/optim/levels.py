"""Any level is an optimizer: a memory whose context is the stream of gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.core.level import Level, Seen, begin, tick
from hope_jax.optim.leaves import guarded, next_count, placed, taken, wide


class Remembered(NamedTuple):
    """The context of a non-parametric level: the last gradients of a leaf, the newest
    at the end, and how many there have been."""

    gradients: Float[Array, "T *leaf"]
    count: Int[Array, ""]


@guarded
def from_level(
    level: Level,
    start: Callable[[Array], PyTree] = jnp.zeros_like,
    *,
    context: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer of `level`, applied to every leaf by itself.

    Each leaf of the parameters gets a memory of its own. An item of its context is the
    leaf's gradient, and its read is the update that is added to the leaf (equations
    35-37 of arXiv:2512.24695): `read_at='post'` makes that `W + m_{t+1}`.

    Args:
      level: what to do with a stream of gradients. Items and reads have the shape of
        the leaf.
      start: `leaf -> params`, where the memory of a leaf starts: zeros like it. One of
        another shape starts, for example, at `lambda leaf: level.init(key)`. Leaves and
        gradients come in float32 or wider, whatever the type of the parameters.
      context: of a non-parametric level, how many gradients back it sees, the one at
        hand included; other levels take none.

    Returns:
      An optax transformation; its state has a `LevelState` for each leaf, or for
      non-parametric levels a `Remembered`, in dicts by the names of leaves.

    Raises:
      ValueError: a context for a level that keeps its own state, or none for one that
        does not, or when a read has not the leaf's shape.

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

    Any level of one's own will do. Here a memory of one number learns how long
    gradients are, and each is divided by what it says:

    >>> ruler = Level(
    ...     init=lambda key: jnp.zeros(()),
    ...     read=lambda m, g: -0.1 * g / jnp.exp(m),
    ...     objective=lambda m, g: (m - jnp.log(jnp.linalg.norm(g))) ** 2,
    ...     flow=optax.sgd(0.25),
    ...     read_at="post",
    ... )
    >>> optimizer = from_level(ruler, start=lambda leaf: ruler.init(None))
    >>> g = jnp.array([30.0, 40.0])
    >>> state = optimizer.init(g)
    >>> for _ in range(20):
    ...     update, state = optimizer.update(g, state)
    >>> [round(float(u), 2) for u in update]
    [-0.06, -0.08]

    A non-parametric one has no state but its context; this is the median of the last
    three gradients, which no single outlier moves:

    >>> from hope_jax.core.transfer import attend
    >>> def median(gradients, mask, g):
    ...     return -0.1 * jnp.nanmedian(jnp.where(mask, gradients, jnp.nan), axis=0)
    >>> optimizer = from_level(attend(median), context=3)
    >>> state = optimizer.init(jnp.zeros(()))
    >>> for gradient in (1.0, 100.0, 2.0):
    ...     update, state = optimizer.update(jnp.array(gradient), state)
    >>> round(float(update), 2)
    -0.2
    """
    if level.clock.parametric and context is not None:
        raise ValueError(
            f"context ({context}) is for non-parametric levels (period 0): this level "
            "keeps a state of its own."
        )
    if not level.clock.parametric and (context is None or context < 1):
        raise ValueError(
            "level is non-parametric (period 0): it has no state to carry from one "
            f"gradient to the next. Give context, how many it sees, got {context}; or "
            "give its clock a period of at least 1."
        )

    def first(leaf):
        # astype: a weakly typed leaf would change type, and compile, at the first step.
        leaf = wide(leaf.astype(leaf.dtype))
        if level.clock.parametric:
            return begin(level, start(leaf))
        past = jnp.zeros((context, *leaf.shape), leaf.dtype)
        return Remembered(past, jnp.zeros((), jnp.int32))

    def init(params):
        return placed(params, [first(leaf) for leaf in jax.tree.leaves(params)])

    def move(gradient, standing):
        if level.clock.parametric:
            return tick(level, standing, gradient)
        past, count = standing
        count = next_count(count)
        past = jnp.concatenate([past[1:], gradient[None].astype(past.dtype)])
        seen = Seen(past, jnp.arange(len(past)) >= len(past) - count)
        return Remembered(past, count), level.read(seen, gradient)

    def update(updates, state, params=None, **extra):
        del params, extra
        leaves, structure = jax.tree.flatten(updates)
        states = taken(updates, state)
        moved, reads = [], []
        for gradient, standing in zip(leaves, states, strict=True):
            standing, read = move(wide(gradient), standing)
            if jnp.shape(read) != gradient.shape:
                raise ValueError(
                    f"level reads shape {jnp.shape(read)} for a gradient of shape "
                    f"{gradient.shape}; an optimizer's read is the update of its leaf."
                )
            moved.append(standing)
            reads.append(read.astype(gradient.dtype))
        return structure.unflatten(reads), placed(updates, moved)

    return optax.GradientTransformationExtraArgs(init, update)
