"""Rows whose tokens several devices share, each a stretch of them, in order.

For layers inside `jax.shard_map` over the axis that cuts the tokens. Of the stretches
before its own a device needs the last tokens (`Share.edge`, `Share.before`), where in
a document it stands (`Share.position`) and where memories stand then (`Share.enter`).
All of it is found layer by layer, from what every device makes of its own tokens.

A document may begin at any of S stretches of a device's tokens. There nothing is left
of what came before; a row itself is such a beginning.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from hope_jax.kernels.summary import Summary


class Share(NamedTuple):
    """This device's tokens of each row.

    Attributes:
      axis: of the mesh, over whose devices rows are cut.
      begins: the stretches where another document begins.
      position: tokens of its document before each stretch.
    """

    axis: str
    begins: Bool[Array, "B S"]
    position: Int[Array, "B S"]

    @classmethod
    def of(
        cls, axis: str, tokens: Int[Array, "B T"], begins: Bool[Array, "B S"] | None
    ) -> "Share":
        """That of rows of which every device of the axis has `T` tokens.

        Args:
          axis: that cuts them.
          tokens: this device's.
          begins: of its stretches, those where another document begins; None for none.
        """
        rows, length = tokens.shape
        if begins is None:
            begins = jnp.zeros((rows, 1), bool)
        stretches = begins.shape[1]
        everywhere = jax.lax.all_gather(begins, axis, axis=1, tiled=True)
        number = jnp.arange(everywhere.shape[1], dtype=jnp.int32)[None]
        last = jax.lax.cummax(jnp.where(everywhere, number, 0), axis=1)
        position = own((number - last) * (length // stretches), axis)
        return cls(axis, begins, position)

    @property
    def devices(self) -> int:
        return jax.lax.axis_size(self.axis)

    @property
    def stretches(self) -> int:
        return self.begins.shape[1]

    def apart(self, x: Float[Array, "B T *D"]) -> Float[Array, "BS U *D"]:
        """Stretches as rows, U = T / S tokens each."""
        return x.reshape(-1, x.shape[1] // self.stretches, *x.shape[2:])

    def together(self, x: Float[Array, "BS U *D"]) -> Float[Array, "B T *D"]:
        """Rows again, of their stretches."""
        return x.reshape(-1, self.stretches * x.shape[1], *x.shape[2:])

    def positions(self, length: int) -> Int[Array, "B T"]:
        """Tokens of its document before each of the T tokens of this device."""
        size = length // self.stretches
        inside = jnp.arange(size, dtype=jnp.int32)
        each = self.position[:, :, None] + inside[None, None]
        return each.reshape(-1, length)

    def edge(self, x: Float[Array, "B T *D"], count: int) -> Float[Array, "B N *D"]:
        """The N tokens before this device's first, of the `count` asked for those that
        any device has before it; zeros before the row."""
        length, parts = x.shape[1], []
        for hop in range(min(-(-count // length), self.devices - 1), 0, -1):
            size = min(length, count - (hop - 1) * length)
            ways = [(i, i + hop) for i in range(self.devices - hop)]
            parts.append(jax.lax.ppermute(x[:, length - size :], self.axis, ways))
        return jnp.concatenate(parts, axis=1) if parts else x[:, :0]

    def before(self, x: Float[Array, "BS U *D"], count: int) -> Array:
        """The `count` tokens of its document before each stretch, `[BS, count, *D]`;
        zeros before the document.

        Args:
          x: tokens of all stretches, as of `apart`.
          count: how many.
        """
        size, whole = x.shape[1], self.together(x)
        edge = self.edge(whole, count)
        missing = [(0, 0)] * x.ndim
        missing[1] = (count - edge.shape[1], 0)
        known = jnp.concatenate([jnp.pad(edge, missing), whole], axis=1)
        starts = range(0, self.stretches * size, size)
        near = jnp.stack([known[:, i : i + count] for i in starts], axis=1)
        age = jnp.arange(count, 0, -1, dtype=jnp.int32)
        there = age[None, None] <= self.position[:, :, None]
        there = there.reshape(*there.shape, *[1] * (x.ndim - 2))
        near = jnp.where(there, near, jnp.zeros_like(near))
        return near.reshape(-1, *near.shape[2:])

    def enter(
        self, first: Float[Array, "B *K R N"], summary: Summary
    ) -> Float[Array, "BS *K R N"]:
        """Where memories stand when each stretch begins.

        Args:
          first: where they stand when a document begins.
          summary: of every stretch; leaves lead with rows and stretches, BS.
        """
        with jax.default_matmul_precision("float32"):
            return self._enter(first, summary)

    def _enter(self, first, summary):
        stretches = jax.tree.map(self._by_stretch, summary)

        def through(x, new):
            """Every stretch after the other, from x, or anew; and where each began."""

            def step(x, stretch):
                begins, kept, added = stretch
                x = jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), new, x)
                more = [(0, 0)] * added.ndim
                more[-2] = (0, x.shape[-2] - added.shape[-2])
                return x @ kept + jnp.pad(added, more), x

            return jax.lax.scan(step, x, (self.begins.T, *stretches))

        # The rows of zero and of the identity, as in a summary.
        width, count = first.shape[-1], first.shape[-2]
        same = jnp.broadcast_to(
            jnp.eye(width, dtype=first.dtype), (*first.shape[:-2], width, width)
        )
        whole, _ = through(
            jnp.concatenate([jnp.zeros_like(first), same], axis=-2),
            jnp.concatenate([first, jnp.zeros_like(same)], axis=-2),
        )
        place, x = jax.lax.axis_index(self.axis), first
        for i, one in enumerate(jax.lax.all_gather(whole, self.axis)[:-1]):
            after = x @ one[..., count:, :] + one[..., :count, :]
            x = jnp.where(i < place, after, x)
        _, starts = through(x, first)
        return jnp.moveaxis(starts, 0, 1).reshape(-1, *starts.shape[2:])

    def _by_stretch(self, leaf):
        """`[BS, ...]` as `[S, B, ...]`."""
        return jnp.moveaxis(leaf.reshape(-1, self.stretches, *leaf.shape[1:]), 1, 0)


def own(tree: PyTree, axis: str, more: int = 0) -> PyTree:
    """This device's share of arrays whose second axis is time; with so many `more`
    items at its end, which its neighbour has too."""

    def cut(a):
        size = (a.shape[1] - more) // jax.lax.axis_size(axis)
        begin = jax.lax.axis_index(axis) * size
        return jax.lax.dynamic_slice_in_dim(a, begin, size + more, axis=1)

    return jax.tree.map(cut, tree)
