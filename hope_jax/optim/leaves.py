"""Leaves of a gradient: their types, rows and directions."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree


def wide(leaf: Array) -> Array:
    """`leaf` in float32 or wider: in bfloat16 a decay of 0.999 is 1."""
    narrow = jnp.finfo(leaf.dtype).bits < 32
    return leaf.astype(jnp.float32 if narrow else leaf.dtype)


def zeros(params: PyTree) -> PyTree:
    """Zeros like the parameters, in float32 or wider."""
    return jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)


def like(tree: PyTree, updates: PyTree) -> PyTree:
    """`tree` in the types of `updates`."""
    return jax.tree.map(lambda x, u: x.astype(u.dtype), tree, updates)


def as_type(value, leaf: Array) -> Array:
    """A number, injected hyper-parameter or rate in the type of `leaf`."""
    return jnp.asarray(value, leaf.dtype)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: Array):
    return learning_rate(count) if callable(learning_rate) else learning_rate


def as_matrix(leaf: Array) -> Float[Array, "*batch R C"]:
    """A leaf with one axis is a matrix of one row, and a number one of one entry."""
    return leaf.reshape((1,) * (2 - leaf.ndim) + leaf.shape)


def as_rows(leaf: Array) -> Float[Array, "R C"]:
    """The rows of a leaf, along its last axis; any axes before it number them."""
    return leaf.reshape(-1, leaf.shape[-1] if leaf.ndim else 1)


def unit(x: Array, axis) -> tuple[Array, Array]:
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
    rows, norm = unit(as_rows(leaf), -1)
    present = (norm[:, 0] > 0).astype(rows.dtype)
    return rows, norm, present / jnp.maximum(jnp.sum(present), 1.0)


def check_fraction(name, value):
    """Refuses a retained fraction outside [0, 1]; a traced one cannot be looked at."""
    if not isinstance(value, jax.core.Tracer) and not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name} is the part of the memory that is kept, in [0, 1]; got {value}."
        )
