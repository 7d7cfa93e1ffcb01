"""Parameters of which each device holds a part, made whole where they are read."""

import dataclasses

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

from hope_jax.optim.leaves import path_names

_BLOCKS = "blocks"
_WHOLE = "whole weights"  # what a backward pass gathers again rather than keep
NOT_KEPT = jax.checkpoint_policies.save_anything_except_these_names(_WHOLE)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Which axis of each parameter is cut, inside `jax.shard_map` over an axis of the
    mesh. A layer's weights are gathered when the layer is read, and their gradient goes
    back as a sum of which each device keeps its part (ZeRO-3).

    Attributes:
      axis: of the mesh.
      dims: dotted name of a parameter and which axis of it is cut.
    """

    axis: str
    dims: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, axis: str, params: PyTree, dims: PyTree[int]) -> "Parts":
        """For `dims` like the parameters; -1 where none is cut."""
        named = jax.tree_util.tree_leaves_with_path(params)
        names = (".".join(path_names(path)) for path, _ in named)
        pairs = zip(names, jax.tree.leaves(dims), strict=True)
        return cls(axis, tuple((name, dim) for name, dim in pairs if dim >= 0))

    def outside(self, params: PyTree) -> PyTree:
        """Parameters whose layers alone are still cut."""
        whole = {
            name: part if name == _BLOCKS else self._gathered(part, f"{name}.", 0)
            for name, part in params.items()
        }
        return type(params)(whole)

    def blocks(self, params: PyTree) -> PyTree:
        """All layers, whole."""
        return self._gathered(params, f"{_BLOCKS}.", 0)

    def layer(self, params: PyTree) -> PyTree:
        """One layer, whole."""
        return self._gathered(params, f"{_BLOCKS}.", 1)

    def _gathered(self, params, above, dropped):
        dims = dict(self.dims)

        def gather(path, leaf):
            dim = dims.get(above + ".".join(path_names(path)))
            if dim is None:
                return leaf
            whole = jax.lax.all_gather(leaf, self.axis, axis=dim - dropped, tiled=True)
            return checkpoint_name(whole, _WHOLE)

        return jax.tree_util.tree_map_with_path(gather, params)
