"""Tasks that come one after another, all made of one set of labelled vectors.

    permuted   every task has all classes, and an order of the inputs of its own
               (Goodfellow et al., arXiv:1312.6211)
    split      every task has some of the classes (Zenke et al., arXiv:1703.04200)

Which orders, and which classes in which order, is drawn from a key.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Pool(NamedTuple):
    """Labelled vectors, found by their class.

    Attributes:
      x: all of them.
      y: what they are said to be.
      rows: those of each class; what follows its last is none of its own.
      counts: how many each class has.
    """

    x: Float[Array, "N F"]
    y: Int[Array, " N"]
    rows: Int[Array, "C M"]
    counts: Int[Array, " C"]


class Stream(NamedTuple):
    """T tasks, and what may be drawn in each.

    Attributes:
      inputs: where each input of a task stands in a vector of the pool.
      classes: K different ones a task.
      rows: of the pool, for each of them; what follows its last is none of its own.
      counts: how many of these there are.
    """

    inputs: Int[Array, "T F"]
    classes: Int[Array, "T K"]
    rows: Int[Array, "T K M"]
    counts: Int[Array, "T K"]


def pool(x: Float[Array, "N F"], y: Int[Array, " N"], classes: int) -> Pool:
    """A pool of vectors whose classes are `0 .. classes - 1`.

    Raises:
      ValueError: a class has none.
    """
    of = [np.flatnonzero(np.asarray(y) == c) for c in range(classes)]
    counts = np.array([len(rows) for rows in of], np.int32)
    if not counts.all():
        raise ValueError(f"class {counts.argmin()} of {classes} has no vector in y.")
    rows = np.stack([np.resize(rows, counts.max()) for rows in of]).astype(np.int32)
    return Pool(x, y, jnp.asarray(rows), jnp.asarray(counts))


def permuted(of: Pool, tasks: int, key: Array) -> Stream:
    """Tasks of all classes; pure in the key."""
    each = jax.random.split(key, tasks)
    width, count = of.x.shape[1], len(of.counts)
    inputs = jax.vmap(lambda key: jax.random.permutation(key, width))(each)
    classes = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (tasks, count))
    return Stream(inputs, classes, of.rows[classes], of.counts[classes])


def split(of: Pool, tasks: int, key: Array) -> Stream:
    """Tasks of as many classes each, no two of them of the same; pure in the key.

    Raises:
      ValueError: the tasks do not divide the classes.
    """
    width, count = of.x.shape[1], len(of.counts)
    if tasks < 1 or count % tasks:
        raise ValueError(f"tasks must divide the {count} classes, got {tasks}.")
    inputs = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (tasks, width))
    classes = jax.random.permutation(key, count).reshape(tasks, -1)
    return Stream(inputs, classes, of.rows[classes], of.counts[classes])


STREAMS = {"permuted": permuted, "split": split}


def seen(stream: Stream, classes: int) -> Bool[Array, "T C"]:
    """The classes of each task and of all before it."""
    own = jax.nn.one_hot(stream.classes, classes, dtype=jnp.int32).sum(1)
    return jnp.cumsum(own, axis=0) > 0


def keep(stream: Stream, each: int, key: Array) -> Stream:
    """The tasks with no more than `each` vectors of a class: what replay may draw.

    Every subset of that size is as likely as any other.
    """
    *shape, most = stream.rows.shape
    order = jax.random.uniform(key, stream.rows.shape)
    there = jnp.arange(most, dtype=jnp.int32)[None, None] < stream.counts[..., None]
    chosen = jnp.argsort(jnp.where(there, order, 2.0), axis=-1)[..., :each]
    rows = jnp.take_along_axis(stream.rows, chosen, axis=-1)
    return stream._replace(rows=rows, counts=jnp.minimum(stream.counts, each))


def draw(
    of: Pool, stream: Stream, tasks: Int[Array, " B"], key: Array
) -> tuple[Float[Array, "B F"], Int[Array, " B"]]:
    """A vector of each of `tasks`, with its label; classes are equally likely."""
    keys = jax.random.split(key)
    k = jax.random.randint(keys[0], tasks.shape, 0, stream.classes.shape[1])
    i = jax.random.randint(keys[1], tasks.shape, 0, stream.counts[tasks, k])
    rows = stream.rows[tasks, k, i]
    return turned(of.x[rows], stream.inputs[tasks]), of.y[rows]


def turned(x: Float[Array, "B F"], inputs: Int[Array, "*B F"]) -> Float[Array, "B F"]:
    """Vectors of a pool as a task, or each as a task of its own, gives them."""
    return jnp.take_along_axis(x, jnp.broadcast_to(inputs, x.shape), axis=1)
