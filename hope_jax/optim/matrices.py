"""Which leaves of a tree of parameters are matrices, and over which axes.

Rules such as Muon, M3 and Shampoo move matrices alone, and a model seldom says which of
its parameters those are. They are told apart here by shape and role, in trees of any
library.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from hope_jax.optim import groups
from hope_jax.optim.leaves import path_names

Axes = optax.contrib.MuonDimensionNumbers

# What never is a matrix, though a stack of it has two axes.
_OFFSETS = ("bias", "scale", "offset", "gamma", "beta", "norm")
_TABLES = ("embed", "pos", "wte", "wpe")
_WEIGHTS = {"w", "weight", "weights", "proj"}
_ATTENTION = ("query", "key", "value")


def find(params: PyTree) -> list[tuple[groups.Kind, Axes | None]]:
    """For each leaf of `params` what it is and, of a matrix, which axes are what.

    - A leaf of one axis, of size 0, or that is called an offset or a scale is none;
      nor are tables of embeddings and positions, nor convolutions of single channels.
    - Where the tree has leaves called `kernel` or `embedding`, as those of Flax have,
      these are the weights, beside leaves of two axes whose names say that they are
      (`w`, `w_out`, `weight`, `out_proj`). Otherwise every other leaf is a weight.
    - A weight of two axes is a matrix. One of more is the matrix of the map that it is:
      the bias beside it, if there is one, has the axes of the map's outputs, and all
      others are inputs. So is a convolution's kernel `[H, W, I, O]` one of
      `[H W I, O]`, and those of an attention, `[I, heads, width]` and
      `[heads, width, O]`, are of `[I, heads width]` and `[heads width, O]`. A bias
      `[L, O]` of a kernel `[L, I, O]` says that L layers are stacked.
    - Without a bias, kernels `query`, `key` and `value` that fit the `out` beside them
      are an attention's, those of four axes are convolutions (`weight`s, as in
      PyTorch and Equinox, with the outputs first), and all else of three is a stack
      of matrices over the last two.

    Returns:
      One pair for each leaf: the kind, and for `matrices` the axes.
    """
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {path_names(path): leaf for path, leaf in paths}
    flax = any(
        name and name[-1] in ("kernel", "embedding") and jnp.ndim(leaf) > 1
        for name, leaf in named.items()
    )
    return [_role(path_names(path), leaf, named, flax) for path, leaf in paths]


def for_matrices(
    rule: optax.GradientTransformation,
    others: optax.GradientTransformation,
    *,
    axes: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`rule` for the matrices of a model, `others` for all else.

    Args:
      rule: is given each matrix as `[*stack, R, C]`, whatever axes it had.
      others: is given all else: offsets, scales, tables of embeddings.
      axes: which axes of a leaf are a matrix's: a tree like the parameters, or a
        function that makes it of them, of `optax.contrib.MuonDimensionNumbers` (the
        rest is stacked), and None for what `others` moves. By default what `find` says.

    Raises:
      ValueError: no leaf is a matrix, and `axes` does not say so.
    """

    def layout(tree):
        leaves, structure = jax.tree.flatten(tree)
        if axes is None:
            known = [one for _, one in find(tree)]
        else:
            known = structure.flatten_up_to(axes(tree) if callable(axes) else axes)
        if axes is None and not any(one is not None for one in known):
            shapes = {
                ".".join(path_names(path)) or "the parameter": jnp.shape(leaf)
                for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
            }
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(
                f"No matrix was found among the parameters, which are {listed}. Say "
                "which axes are a matrix's with axes=, or use a rule for all leaves."
            )
        return known, structure

    def parts(known, structure):
        labels = ["others" if one is None else "matrices" for one in known]
        rules = {"matrices": rule, "others": others}
        labels = structure.unflatten(labels)
        return groups.by_name(rules, lambda tree: labels)

    def cut(tree, known, structure):
        leaves = structure.flatten_up_to(tree)
        cuts = [_cut(*pair) for pair in zip(leaves, known, strict=True)]
        return structure.unflatten(cuts)

    def init(params):
        known, structure = layout(params)
        return parts(known, structure).init(cut(params, known, structure))

    def update(updates, state, params=None, **extra):
        known, structure = layout(updates if params is None else params)
        moved, state = parts(known, structure).update(
            cut(updates, known, structure),
            state,
            None if params is None else cut(params, known, structure),
            **extra,
        )
        leaves = zip(
            structure.flatten_up_to(moved),
            known,
            structure.flatten_up_to(updates),
            strict=True,
        )
        return structure.unflatten([_back(*leaf) for leaf in leaves]), state

    return optax.GradientTransformationExtraArgs(init, update)


def with_adamw(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    axes: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for a whole model: `direction` for its matrices, Adam for all else.

    Both at one rate, for which directions with the root mean square of Adam's are made:
    `scale_by_m3()`, `scale_by_adamuon()`. Decoupled decay of all that `find` does not
    call `others`.

    Args:
      axes: see `for_matrices`.

    Raises:
      ValueError: no leaf is a matrix, and `axes` does not say so.
    """
    return optax.chain(
        for_matrices(direction, optax.scale_by_adam(b1=b1, b2=b2, eps=eps), axes=axes),
        optax.add_decayed_weights(weight_decay, mask=_decays),
        optax.scale_by_learning_rate(learning_rate),
    )


def _decays(params: PyTree) -> PyTree:
    kinds = [kind != "others" for kind, _ in find(params)]
    return jax.tree.structure(params).unflatten(kinds)


def _role(
    name: tuple[str, ...], leaf: Any, named: Mapping[tuple, Any], flax: bool
) -> tuple[groups.Kind, Axes | None]:
    parent, last = (part.lower() for part in ("", "", *name)[-2:])
    shape, kernel = jnp.shape(leaf), last == "kernel"
    if len(shape) < 2 or 0 in shape or last == "b" or last.startswith(_OFFSETS):
        return "others", None
    if (
        last.startswith(_TABLES)
        or not kernel
        and (parent.startswith(_TABLES) or "embed" in parent)
    ):
        return "embeddings", None
    if flax and not kernel:
        words = last.split("_")
        if len(shape) != 2 or not {words[0], words[-1]} & _WEIGHTS:
            return "others", None
    convolves = parent.startswith("conv")
    if len(shape) == 2:
        return ("convolutions", None) if convolves else ("matrices", Axes(0, 1))
    outputs = _outputs(name, shape, named)
    if outputs is None and (convolves or len(shape) > 3):
        if len(shape) == 3 and last != "weight":
            return "convolutions", None
        outputs = (0,) if last == "weight" else (len(shape) - 1,)
    if not outputs:
        return "matrices", Axes(len(shape) - 2, len(shape) - 1)
    inputs = tuple(axis for axis in range(len(shape)) if axis not in outputs)
    channels = 1 if outputs == (0,) else len(shape) - 2
    if len(outputs) == 1 and shape[channels] == 1:
        return "convolutions", None
    return "matrices", Axes(inputs, outputs)


def _outputs(
    name: tuple[str, ...], shape: tuple[int, ...], named: Mapping[tuple, Any]
) -> tuple[int, ...] | None:
    """The axes of a weight's outputs, as its neighbours tell; () for a stack."""
    parent, axes = name[-2:-1], tuple(range(len(shape)))
    beside = (named.get((*name[:-1], bias)) for bias in ("bias", "b"))
    bias = next((jnp.shape(one) for one in beside if one is not None), None)
    attends = parent and parent[0] in _ATTENTION
    if bias is not None and len(bias) > 1 and bias[0] == shape[0]:
        if len(bias) == len(shape) - 1 and set(bias[1:]) == {1}:
            return (0,)  # [O, 1, 1], of Equinox
        if bias == shape[:-2] + shape[-1:] and not attends:
            return ()
    if bias is not None and bias == shape[-len(bias) :]:
        return axes[-len(bias) :]
    if bias is not None and bias == shape[:1]:
        return (0,)
    if len(shape) == 3 and (attends or parent == ("out",)):
        other = "out" if attends else "query"
        fits = named.get((*name[:-2], other, name[-1]))
        if fits is not None and jnp.ndim(fits) == 3:
            inner, outer = jnp.shape(fits), shape
            if attends and inner[:2] == shape[1:]:
                return (1, 2)
            if not attends and inner[1:] == outer[:2]:
                return (2,)
    return None


def _order(leaf: Any, axes: Axes) -> tuple[list[int], list[int], list[int]]:
    """The axes that are stacked, those of inputs and those of outputs."""

    def whole(given):
        given = (given,) if isinstance(given, int) else given
        return [axis % leaf.ndim for axis in given]

    rows, columns = whole(axes.reduction_axis), whole(axes.output_axis)
    stack = [axis for axis in range(leaf.ndim) if axis not in rows + columns]
    return stack, rows, columns


def _cut(leaf: Any, axes: Axes | None) -> Any:
    """A leaf as matrices `[*stack, R, C]`; what is no matrix as it is."""
    if axes is None:
        return leaf
    stack, rows, columns = _order(leaf, axes)
    turned = jnp.transpose(leaf, stack + rows + columns)
    sides = (math.prod(leaf.shape[axis] for axis in side) for side in (rows, columns))
    return turned.reshape(*turned.shape[: len(stack)], *sides)


def _back(moved: Any, axes: Axes | None, leaf: Any) -> Any:
    """`moved` in the shape of `leaf`, from which it was cut."""
    if axes is None:
        return moved
    order = sum(_order(leaf, axes), [])
    turned = moved.reshape([leaf.shape[axis] for axis in order])
    return jnp.transpose(turned, [order.index(axis) for axis in range(leaf.ndim)])
