"""Leaves of a gradient: their names, types, rows and directions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree


def path_names(path: tuple) -> tuple[str, ...]:
    """A key path of `jax.tree_util` as plain names, without a Variable's `.value`.

    >>> path_names(jax.tree_util.tree_flatten_with_path({"a": [0]})[0][0][0])
    ('a', '0')
    """
    return tuple(
        jax.tree_util.keystr((key,), simple=True)
        for key in path
        if key != jax.tree_util.GetAttrKey("value")
    )


def placed(tree: PyTree, values: Sequence[PyTree]) -> PyTree:
    """`values`, one for each leaf of `tree`, in nested dicts by the names of leaves.

    For a state of a leaf that is no array like it: containers that know what they hold,
    such as those of Flax, let nothing else stand in its place. In checkpoints, which
    go by names, nothing is changed by it.

    >>> placed([jnp.ones(2), {"a": jnp.ones(3)}], ["first", "second"])
    {'0': 'first', '1': {'a': 'second'}}
    """
    names, root = _names(tree), {}
    for name, value in zip(names, values, strict=True):
        if not name:
            return value
        node = root
        for part in name[:-1]:
            node = node.setdefault(part, {})
        node[name[-1]] = value
    return root


def taken(tree: PyTree, standing: PyTree) -> list[PyTree]:
    """The `values` of `placed`, in the order of the leaves of `tree`."""
    return [
        functools.reduce(lambda at, part: at[part], n, standing) for n in _names(tree)
    ]


def _names(tree: PyTree) -> list[tuple[str, ...]]:
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    names = [path_names(path) for path in paths]
    inner = {name[:i] for name in names for i in range(len(name))}
    if len(set(names)) < len(names) or inner & set(names):  # `.value` is a name there
        names = [tuple(jax.tree_util.keystr((key,)) for key in path) for path in paths]
    return names


def guarded(make: Callable | None = None, *, complex_too: bool = False) -> Callable:
    """For functions that make a rule: leaves that it cannot move are kept from it.

    Leaves of size 0 are not given to the rule, and come back as they are. Complex ones
    are refused by name, but where the rule is right for them (`complex_too`).
    """
    if make is None:
        return functools.partial(guarded, complex_too=complex_too)

    @functools.wraps(make)
    def guarding(*args, **kwargs):
        return without_empty(make(*args, **kwargs), make.__name__, complex_too)

    return guarding


def without_empty(
    tx: optax.GradientTransformation, name: str, complex_too: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`tx` as `guarded` says; `name` is that of the rule, for messages."""
    tx = optax.with_extra_args_support(tx)

    def masked(tree):
        return jax.tree.map(
            lambda leaf: optax.MaskedNode() if _is_empty(leaf) else leaf, tree
        )

    def init(params):
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            if not complex_too and jnp.iscomplexobj(leaf):
                where = ".".join(path_names(path)) or "the parameter"
                raise ValueError(
                    f"{name} moves real numbers, and {where} is {leaf.dtype}: keep its "
                    "real and imaginary parts as two leaves, or move it by momentum or "
                    "an optimizer of Optax."
                )
        return tx.init(masked(params) if _has_empty(params) else params)

    def update(updates, state, params=None, **extra):
        if not _has_empty(updates):
            return tx.update(updates, state, params, **extra)
        moved, state = tx.update(
            masked(updates), state, None if params is None else masked(params), **extra
        )
        given = jax.tree.map(lambda u, m: u if _is_empty(u) else m, updates, moved)
        return given, state

    return optax.GradientTransformationExtraArgs(init, update)


def _has_empty(tree: PyTree) -> bool:
    return any(map(_is_empty, jax.tree.leaves(tree)))


def _is_empty(leaf: Any) -> bool:
    return 0 in jnp.shape(leaf)


def wide_type(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or `dtype` where that is wider."""
    return jnp.dtype(jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)


def wide(leaf: Array | np.ndarray) -> Array:
    """`leaf` in float32 or wider: in bfloat16 a decay of 0.999 is 1."""
    return jnp.asarray(leaf.astype(wide_type(leaf.dtype)))


def zeros(params: PyTree) -> PyTree:
    """Zeros like the parameters, in float32 or wider."""
    return jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)


def like(tree: PyTree, updates: PyTree) -> PyTree:
    """`tree` in the types of `updates`."""
    return jax.tree.map(lambda x, u: x.astype(u.dtype), tree, updates)


def as_type(value, leaf: Array) -> Array:
    """A number, injected hyper-parameter or rate in the type of `leaf`."""
    return jnp.asarray(value, leaf.dtype)


def next_count(count: Int[Array, ""]) -> Int[Array, ""]:
    """One more, up to the largest there is: `optax.safe_increment`, of an array."""
    return jnp.asarray(optax.safe_increment(count))


def rate_at(learning_rate: optax.ScalarOrSchedule, count: ArrayLike):
    return learning_rate(count) if callable(learning_rate) else learning_rate


def as_matrix(leaf: Array) -> Float[Array, "*batch R C"]:
    """A leaf with one axis is a matrix of one row, and a number one of one entry."""
    return leaf.reshape((1,) * (2 - leaf.ndim) + leaf.shape)


def as_rows(leaf: Array) -> Float[Array, "R C"]:
    """The rows of a leaf, along its last axis; any axes before it number them."""
    return leaf.reshape(-1, leaf.shape[-1] if leaf.ndim else 1)


def direction_of(x: Array, axis) -> tuple[Array, Array]:
    """x in unit norm over `axis`, and that norm; zero stays zero, nothing overflows."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0)
    scaled = x / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(scaled**2, axis=axis, keepdims=True))
    return scaled / jnp.where(norm > 0, norm, 1.0), largest * norm


def unit_rows(
    leaf: Array,
) -> tuple[Float[Array, "R C"], Float[Array, "R 1"], Float[Array, " R"]]:
    """The rows of a leaf as directions, their norms, and the weight of each row in a
    mean over those that are not zero."""
    rows, norm = direction_of(as_rows(leaf), -1)
    present = (norm[:, 0] > 0).astype(rows.dtype)
    return rows, norm, present / jnp.maximum(jnp.sum(present), 1.0)


def check_fraction(name, value):
    """Refuses a retained fraction outside [0, 1]; a traced one cannot be looked at."""
    if not isinstance(value, Tracer) and not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name} is the part of the memory that is kept, in [0, 1]; got {value}."
        )
