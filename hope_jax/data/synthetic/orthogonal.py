"""Equation 45 of arXiv:2512.24695: tasks whose gradients lie in orthogonal subspaces.

    L_i(W) = E (W x - y)^2,   x = U_i a + leak z,   y = C_i a,   a, z ~ N(0, I)

The columns of the U_i are orthonormal over all tasks, so with leak 0 the gradients of
task i lie in the span of U_i and one W solves every task. A leak adds directions of all
other tasks to the inputs; as y does not depend on them, each task then pulls W out of
the subspaces of the ones before.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrthogonalConfig:
    """A stream of tasks.

    Attributes:
      tasks, rank: subspaces of so many dimensions.
      width, outputs: of W, `[outputs, width]`; tasks * rank <= width.

    Raises:
      ValueError: more dimensions than inputs.
    """

    tasks: int = 5
    rank: int = 4
    width: int = 24
    outputs: int = 4

    def __post_init__(self):
        if self.tasks * self.rank > self.width:
            raise ValueError(
                f"width ({self.width}) must be at least tasks ({self.tasks}) times "
                f"rank ({self.rank}): their subspaces are orthogonal."
            )


class Tasks(NamedTuple):
    """Orthonormal `subspaces` of the inputs, and what each task wants of its own."""

    subspaces: Float[Array, "N width rank"]
    targets: Float[Array, "N outputs rank"]


def tasks(config: OrthogonalConfig, key: Array) -> Tasks:
    """A stream of tasks, in directions that are along no axis."""
    s, keys = config, jax.random.split(key)
    turned = jax.random.orthogonal(keys[0], s.width)[:, : s.tasks * s.rank]
    subspaces = turned.reshape(s.width, s.tasks, s.rank).swapaxes(0, 1)
    targets = jax.random.normal(keys[1], (s.tasks, s.outputs, s.rank))
    return Tasks(subspaces, targets)


def batch(subspace, target, leak, count: int, key: Array) -> tuple[Array, Array]:
    """`(x [B, width], y [B, outputs])` of one task."""
    keys = jax.random.split(key)
    a = jax.random.normal(keys[0], (count, subspace.shape[1]))
    z = jax.random.normal(keys[1], (count, subspace.shape[0]))
    return a @ subspace.T + leak * z, a @ target.T


def loss(w, x: Array, y: Array) -> Float[Array, ""]:
    """Equation 45 on a batch, of a matrix `[outputs, width]`, captured or plain."""
    return jnp.mean(jnp.sum(((w @ x.T).T - y) ** 2, axis=-1))


def errors(w: Float[Array, "outputs width"], of: Tasks) -> Float[Array, " N"]:
    """Of every task without leak, exactly, relative to that of W = 0."""
    missed = jnp.einsum("ow,nwr->nor", w, of.subspaces) - of.targets
    return jnp.sum(missed**2, (1, 2)) / jnp.sum(of.targets**2, (1, 2))
