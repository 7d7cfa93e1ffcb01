"""Inverse of unit lower-triangular matrices, in blocks.

Reference: `jnp.linalg.inv(I + a)`. Chunks need `(I + A) U = R` for several right-hand
sides of one A, so the inverse is formed once and applied as a product. It is merged
from blocks of 8: doubling (the Neumann series) loses all digits on correlated keys, and
LAPACK's solve can dead-lock virtual CPU devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_BASE = 8


@jax.custom_jvp
def unit_lower_inverse(a: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """`(I + a)⁻¹` for a strictly lower-triangular `a`; entries on or above the diagonal
    are taken to be zero and must be."""
    size = a.shape[-1]
    if size == 1:
        return 1.0 - a
    padded = _BASE
    while padded < size:
        padded *= 2
    widths = [(0, 0)] * (a.ndim - 2) + [(0, padded - size)] * 2
    return _inverse(jnp.pad(a, widths))[..., :size, :size]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    (a,), (da,) = primals, tangents
    x = unit_lower_inverse(a)
    return x, -(x @ jnp.tril(da, -1) @ x)


def _inverse(a):
    size = a.shape[-1]
    if size <= _BASE:
        return _substitute(a)
    half = size // 2
    diagonal = jnp.stack([a[..., :half, :half], a[..., half:, half:]], axis=-3)
    blocks = _inverse(diagonal)
    x11, x22 = blocks[..., 0, :, :], blocks[..., 1, :, :]
    x21 = -(x22 @ a[..., half:, :half] @ x11)
    above = jnp.concatenate([x11, jnp.zeros_like(x11)], axis=-1)
    below = jnp.concatenate([x21, x22], axis=-1)
    return jnp.concatenate([above, below], axis=-2)


def _substitute(a):
    """Forward substitution row by row, all blocks of the batch at once.

    A loop of slices compiles in a third of the time of its unrolled form and runs
    faster.
    """
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)

    def solve_row(i, x):
        rest = jax.lax.dynamic_slice_in_dim(a, i, 1, axis=-2) @ x
        row = jax.lax.dynamic_slice_in_dim(eye, i, 1, axis=-2) - rest
        return jax.lax.dynamic_update_slice_in_dim(x, row, i, axis=-2)

    return jax.lax.fori_loop(0, a.shape[-1], solve_row, jnp.zeros_like(a))
