"""Memories whose channels are one number each: associative scans over tokens.

Reference: `unroll(memory_level(config, width), ...)` with architecture `vector` and
exact gradients. Every channel follows an affine recurrence by itself, of one number, or
of two with inner momentum; affine maps compose, so all states come from one scan of
depth log C.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def scan_one(
    keep: Float[Array, "C K"], write: Float[Array, "C K"], start: Float[Array, " K"]
) -> Float[Array, "C K"]:
    """`mₜ = keepₜ ⊙ mₜ₋₁ + writeₜ` for every t."""

    def compose(first, second):
        (a1, w1), (a2, w2) = first, second
        return a2 * a1, a2 * w1 + w2

    kept, written = jax.lax.associative_scan(compose, (keep, write))
    return kept * start[None] + written


def scan_two(
    keep: tuple[tuple[Array, Array], tuple[Array, Array]],
    write: tuple[Array, Array],
    start: tuple[Array, Array],
) -> tuple[Float[Array, "C K"], Float[Array, "C K"]]:
    """The same for a pair, `(m, s)ₜ = keepₜ (m, s)ₜ₋₁ + writeₜ`, `keep` 2 by 2."""

    def apply(a, x):
        return tuple(row[0] * x[0] + row[1] * x[1] for row in a)

    def compose(first, second):
        (a1, w1), (a2, w2) = first, second
        columns = [apply(a2, (a1[0][j], a1[1][j])) for j in range(2)]
        joined = tuple((columns[0][i], columns[1][i]) for i in range(2))
        return joined, tuple(x + w for x, w in zip(apply(a2, w1), w2, strict=True))

    kept, written = jax.lax.associative_scan(compose, (keep, write))
    from_start = apply(
        kept, tuple(jnp.broadcast_to(x[None], keep[0][0].shape) for x in start)
    )
    return tuple(x + w for x, w in zip(from_start, written, strict=True))
