"""Inverse of symmetric positive definite matrices, by products alone.

Reference: `jnp.linalg.inv`. LAPACK's decompositions can dead-lock JAX's CPU threads,
where several run at once; these products run wherever others do.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_BLOCK = 32


def inverse(a: Float[Array, "*B N N"]) -> Float[Array, "*B N N"]:
    """`a⁻¹` by Gauss and Jordan's elimination, in blocks of 32.

    Positive definite matrices need no pivoting. Errors are those of an inverse,
    proportional to the square of the condition number in its residual: `divide`, which
    refines, is for solving.
    """
    size = a.shape[-1]
    width = min(_BLOCK, size)
    padding = -size % width
    flat = a.reshape(-1, size, size)
    flat = jnp.pad(flat, ((0, 0), (0, padding), (0, padding)))
    ones = jnp.arange(size + padding) >= size
    flat = flat + jnp.diag(ones.astype(a.dtype))[None]
    flat = jax.vmap(functools.partial(_eliminate, width=width))(flat)
    return flat[:, :size, :size].reshape(a.shape)


def divide(
    right: Float[Array, "*B R N"], a: Float[Array, "*B N N"]
) -> Float[Array, "*B R N"]:
    """`right a⁻¹`, refined twice: as exact as a solver's."""
    inverted = inverse(a)
    found = _product(right, inverted)
    for _ in range(2):
        found = found + _product(right - _product(found, a), inverted)
    return found


def _eliminate(a: Float[Array, "N N"], width: int) -> Float[Array, "N N"]:
    """Exchanges one block of variables after another for their right-hand sides."""
    size = a.shape[-1]

    def exchange(k, a):
        at = k * width
        rows = jax.lax.dynamic_slice_in_dim(a, at, width, axis=0)
        columns = jax.lax.dynamic_slice_in_dim(a, at, width, axis=1)
        pivot = jax.lax.dynamic_slice_in_dim(rows, at, width, axis=1)
        pivot = 1 / pivot if width == 1 else _eliminate(pivot, 1)
        rows = _product(pivot, rows)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, pivot, at, axis=1)
        a = jax.lax.dynamic_update_slice_in_dim(
            a, jnp.zeros_like(columns), at, axis=1
        ) - _product(columns, rows)
        return jax.lax.dynamic_update_slice_in_dim(a, rows, at, axis=0)

    return jax.lax.fori_loop(0, size // width, exchange, a)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
