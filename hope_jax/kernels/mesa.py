"""Mesa (recursive least squares) in chunks: conjugate gradients on linear attention.

Reference: `jnp.linalg.solve`, token by token. For one stream and one head; callers
`vmap`. The memory that answers is the minimiser of the ridge regression of all values
on all keys so far, each token weighed by its rate and by what was retained since
(arXiv:2309.05858; in chunks with conjugate gradients, arXiv:2506.05233):

    Gₜ = αₜ Gₜ₋₁ + ηₜ vₜ kₜᵀ      Hₜ = αₜ Hₜ₋₁ + ηₜ kₜ kₜᵀ      yₜ = Gₜ (Hₜ + Λ)⁻¹ qₜ

No Hₜ of a chunk is ever built: a product `Hₜ xₜ` for all its tokens is one read of a
linear memory whose values are its keys.

**Too few iterations give a wrong answer without any other sign.** Conjugate gradients
start from zero, so what is missing looks like a smaller, smoother memory. Largest error
of y over its largest entry, K = 64, Λ = 0.1, no decay, unit keys, η = 1:

    iterations                                5     10     20     30     64
    32 random keys                          0.4   2e-2   3e-5   1e-6   1e-6
    256 keys, mean cosine 0.85             9e-2   2e-3   4e-6   4e-6   4e-6
    4096 keys, mean cosine 0.85            2e-3   6e-6   5e-6   5e-6   5e-6
    4096 keys, mean cosine 0.997           4e-3   1e-4   1e-4   1e-4   1e-4
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hope_jax.kernels import delta

ITERATIONS = 30


def mesa_chunk(
    g: Float[Array, "V K"],
    h: Float[Array, "K K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    q: Float[Array, "C K"],
    eta: Float[Array, " C"],
    alpha: Float[Array, " C"],
    ridge: float | Float[Array, ""] | Float[Array, " K"],
    iterations: int = ITERATIONS,
) -> tuple[Float[Array, "V K"], Float[Array, "K K"], Float[Array, "C V"]]:
    """A chunk of C >= 1 tokens: the statistics after it, and every `yₜ`.

    Args:
      g: sum of values times keys at the chunk's start.
      h: sum of keys times keys at the chunk's start, symmetric.
      k, v, q: the tokens.
      eta: how much each token weighs, >= 0.
      alpha: what each token retains of both sums, in [0, 1].
      ridge: the Λ > 0 that is added to H, one number or one a key channel; not decayed.
      iterations: of conjugate gradients, for all tokens at once. **Too few are silent
        and wrong**: see the table of this file. 30 are enough for K up to 64 and
        ridge >= 0.1 of η‖k‖²; test before lowering them or the ridge. The pullback is
        solved to the same accuracy by as many more.

    Returns:
      `(g_end, h_end, y [C, V])`.
    """
    _check(g, h, ridge, iterations)
    gates = delta.transitions(alpha, None)
    keys = delta.Rows(None, eta[:, None] * k)
    values = delta.Rows(None, eta[:, None] * v)
    diagonal = jnp.broadcast_to(ridge, k.shape[-1:])[None, :]

    def multiply(x):
        return delta.read(h, None, k, keys, gates, x) + diagonal * x

    x = _solve(multiply, q, iterations)
    y = delta.read(g, None, k, values, gates, x)
    g_end, _ = delta.finish(g, None, k, values, gates)
    h_end, _ = delta.finish(h, None, k, keys, gates)
    return g_end, h_end, y


def mesa_weights(
    g: Float[Array, "V K"],
    h: Float[Array, "K K"],
    ridge: float | Float[Array, ""] | Float[Array, " K"],
    iterations: int = ITERATIONS,
) -> Float[Array, "V K"]:
    """The memory itself, `M = G (H + Λ)⁻¹`; arguments as in `mesa_chunk`, and its
    warning about too few iterations holds."""
    _check(g, h, ridge, iterations)
    diagonal = jnp.broadcast_to(ridge, g.shape[-1:])[None, :]
    return _solve(lambda x: x @ h + diagonal * x, g, iterations)


def _check(g, h, ridge, iterations):
    width = g.shape[-1]
    if h.shape != (width, width):
        raise ValueError(
            f"h must be [K, K] = {(width, width)} as g is {g.shape}, got {h.shape}."
        )
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    if isinstance(ridge, int | float) and ridge <= 0:
        raise ValueError(f"ridge must be positive, got {ridge}: H alone is singular.")


def _solve(multiply, b, iterations):
    """Rows x of `multiply(x) = b`, each with its own symmetric positive matrix.

    The derivative solves with the same matrices instead of unrolling the iterations.
    """

    def conjugate_gradients(multiply, b):
        def iterate(_, carry):
            x, rest, along, square = carry
            product = multiply(along)
            step = _ratio(square, _dots(along, product))
            x, rest = x + step * along, rest - step * product
            next_square = _dots(rest, rest)
            along = rest + _ratio(next_square, square) * along
            return x, rest, along, next_square

        start = (jnp.zeros_like(b), b, b, _dots(b, b))
        return jax.lax.fori_loop(0, iterations, iterate, start)[0]

    return jax.lax.custom_linear_solve(multiply, b, conjugate_gradients, symmetric=True)


def _dots(a, b):
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _ratio(a, b):
    """a / b, and 0 where a row is solved to the last digit."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
