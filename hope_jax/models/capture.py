"""Which parameters of a model are matrices whose inputs can be captured."""

import jax
from flax import nnx
from jaxtyping import PyTree

from hope_jax.models.block import Block
from hope_jax.models.layers import Dense
from hope_jax.optim.groups import path_names


def dense_kernels(
    graphdef: nnx.GraphDef, params: PyTree, horizon: int | None = None
) -> PyTree[bool]:
    """The kernels of all dense layers, for `layers` of `capture.dgd_gradients`.

    Left out are CMS levels that move within `horizon`: their parameters are initial
    states and multiply nothing themselves, the copies of the rows do. Layers of one's
    own join by being `hope_jax.models.layers.Dense`.

        layers = dense_kernels(graphdef, params)
        gradients, inputs = dgd_gradients(loss_fn, params, tokens, layers=layers)
        rule = dgd(0.1, input_axis=-2)

    Args:
      graphdef, params: of `nnx.split(model, nnx.Param)`; `params` may be shapes.
      horizon: of the `hope_jax.models.lm.apply` that the loss is of.

    Returns:
      A tree of bools like `params`.
    """
    kernels, starts = set(), set()
    for path, module in nnx.iter_modules(nnx.merge(graphdef, params)):
        names = tuple(map(str, path))
        if isinstance(module, Dense):
            kernels.add((*names, "kernel"))
        elif isinstance(module, Block):
            inside = module.config.within(horizon)
            starts |= {(*names, "levels", str(i)) for i in inside}

    def chosen(path, leaf):
        del leaf
        names = path_names(path)
        inside = any(names[:i] in starts for i in range(len(names)))
        return names in kernels and not inside

    return jax.tree_util.tree_map_with_path(chosen, params)
