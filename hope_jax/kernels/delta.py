"""Chunk-parallel delta rules for one matrix: the WY form with momentum and decay.

Reference: `unroll(memory_level(config, width), ...)` with a linear architecture. For
one stream and one head; callers `vmap`, and what does not depend on the mapped memory
(keys, gates, the triangular inverse) is then computed once.

    Sₜ = θₜ Sₜ₋₁ + eₜ kₜᵀ          Mₜ = Mₜ₋₁ (αₜ I − bₜ kₜ kₜᵀ) + Sₜ

is solved for all tokens of a chunk by one unit lower-triangular inverse, because with
uₜ = −bₜ Mₜ₋₁ kₜ the state is a sum of known matrices and of u and e rows. No retention
is divided by: ratios of cumulative products are exponentials of differences of sums.
Every function that meets M or S takes the `product` that does it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hope_jax.kernels.triangular import unit_lower_inverse
from hope_jax.memory.architecture import Product, product

_SMALLEST = 1e-12  # a gate below it is 0 in float32 arithmetic of these products
_EXACT = 256.0  # float32 sums of 2,048 such logarithms in parts of 1 / 256 are exact


class Transitions(NamedTuple):
    """What the gates of a chunk alone decide; index 0 of C + 1 is the chunk's start.

    Attributes:
      kept: `γ₀..γ_C`, cumulative retention, [C + 1].
      decay: `Γ[t, i] = γₜ / γᵢ` for i <= t, else 0, [C, C].
      spread: `D[t, i]`, how a momentum write of token i weighs in Mₜ, [C, C]; of
        the pairs of a window, [C, P].
      lag: `c₀..c_C`, how the momentum at the start weighs in Mₜ, [C + 1].
      coast: `B[C, 1..C]`, how write i weighs in S_C, [C] or [P].
      coast_start: `B[C, 0]`, scalar.
    """

    kept: Array
    decay: Array
    spread: Array
    lag: Array
    coast: Array
    coast_start: Array


class Rows(NamedTuple):
    """What a chunk solves for: delta rows `u`, None without a delta term; writes."""

    u: Array | None
    e: Array


def transitions(
    alpha: Float[Array, " C"],
    theta: Float[Array, " C"] | None,
    nesterov: bool = False,
    count: Int[Array, ""] | None = None,
) -> Transitions:
    """Of a chunk's gates; `theta` None has no momentum (`D = Γ`, `c = 0`).

    With `nesterov` the memory moves by `θₜ Sₜ + eₜ` rather than by Sₜ. With a `count`
    what follows so many tokens is padding, α = 1 and θ = 0, which moves no memory; what
    is left of a momentum is then that of the last token there is.
    """
    if alpha.shape[0] == 1 and count is None:
        return _one_token(alpha, theta, nesterov)
    products = cumulative_products(alpha)
    decay = products[1:, 1:]
    if theta is None:
        none = jnp.zeros_like(products[0])
        return Transitions(products[:, 0], decay, decay, none, none[1:], none[0])
    coasts = cumulative_products(theta)
    coast = coasts[1:, 1:]
    moves, lags = coast, coasts[1:, 0]
    if nesterov:
        moves = theta[:, None] * coast + jnp.eye(theta.shape[0], dtype=theta.dtype)
        lags = theta * lags
    lag = jnp.concatenate([jnp.zeros_like(alpha[:1]), decay @ lags])
    last = coasts[-1]
    if count is not None:
        last = jax.lax.dynamic_index_in_dim(coasts, count, keepdims=False)
    return Transitions(
        kept=products[:, 0],
        decay=decay,
        spread=decay @ moves,
        lag=lag,
        coast=last[1:],
        coast_start=last[0],
    )


def _one_token(alpha, theta, nesterov):
    """`transitions` where nothing is before the token: its gates themselves."""
    one, none = jnp.ones_like(alpha), jnp.zeros_like(alpha)
    kept, whole = jnp.concatenate([one, alpha]), one[:, None]
    if theta is None:
        lag = jnp.concatenate([none, none])
        return Transitions(kept, whole, whole, lag, none, none[0])
    moves, lag = (1.0 + theta, theta * theta) if nesterov else (one, theta)
    lag = jnp.concatenate([none, lag])
    return Transitions(kept, whole, moves[:, None], lag, one, theta[0])


@jax.custom_jvp
def cumulative_products(gate: Float[Array, " C"]) -> Float[Array, "C+1 C+1"]:
    """`P[t, i] = gate[i] ... gate[t − 1]` for i <= t, else 0; index 0 is the start.

    Differences of log-sums give the values. The sums are taken in two parts, one of
    which is exact, or a gate that is nearly 0 would cost the digits of all after it.
    Their derivative would cancel badly where a gate is small, so it is written as the
    sum over the factor that varies.
    """
    logs = jnp.log(jnp.maximum(gate, _SMALLEST))
    coarse = jnp.round(logs * _EXACT) / _EXACT
    parts = jnp.cumsum(jnp.stack([coarse, logs - coarse]), axis=1)
    parts = jnp.pad(parts, ((0, 0), (1, 0)))
    coarse, fine = parts[:, :, None] - parts[:, None, :]
    past = jnp.tril(jnp.ones(coarse.shape, bool))
    return jnp.exp(jnp.where(past, coarse + fine, -jnp.inf))


@cumulative_products.defjvp
def _cumulative_products_jvp(primals, tangents):
    (gate,), (dgate,) = primals, tangents
    products = cumulative_products(gate)
    factor = dgate[:, None] * products[:-1]
    return products, products[:, 1:] @ factor


def _earlier(
    matrix: Float[Array, "C P"],
    overlap: Float[Array, "C P"],
    writes: Float[Array, "P V"],
) -> Float[Array, "C V"] | float:
    """What the writes of earlier tokens answer: 0 to a chunk of one."""
    if matrix.shape == (1, 1):
        return 0.0
    return (_before(matrix) * overlap) @ writes


def _before(matrix: Float[Array, "C P"]) -> Float[Array, "C P"]:
    """Row t becomes row t − 1: what held before token t."""
    return jnp.concatenate([jnp.zeros_like(matrix[:1]), matrix[:-1]])


def anchored_rows(
    m: Float[Array, "V K"],
    s: Float[Array, "V K"] | None,
    k: Float[Array, "P K"],
    e: Float[Array, "P V"],
    b: Float[Array, " P"] | None,
    gates: Transitions,
    origin: Float[Array, "V K"] | None = None,
    product: Product = product,
) -> Rows:
    """Rows when the writes `e` are known at the chunk's start: anchored gradients.

    Of P pairs: the C of the chunk, and those before it that a window still sees.
    With an `origin` M₀, `m` is the way from it, which decays, and the delta term erases
    M₀ too.
    """
    if b is None:
        return Rows(None, e)
    overlap = k @ k.T
    recalled = _start_read(product, m, s, k, gates.kept[:-1], gates.lag[:-1])
    recalled = recalled + _earlier(gates.spread, overlap, e)
    if origin is not None:
        recalled = recalled + product(origin, k)
    u = -b[:, None] * recalled
    if gates.decay.shape == (1, 1) == overlap.shape:  # nothing to solve
        return Rows(u, e)
    inverse = unit_lower_inverse(b[:, None] * _before(gates.decay) * overlap)
    return Rows(inverse @ u, e)


def exact_rows(
    m: Float[Array, "V K"],
    s: Float[Array, "V K"] | None,
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    eta: Float[Array, " C"],
    b: Float[Array, " C"] | None,
    gates: Transitions,
    origin: Float[Array, "V K"] | None = None,
    erases_origin: bool = True,
    product: Product = product,
) -> Rows:
    """Rows when each L2 gradient is taken where the memory stands: `P` are the recalls
    `Mₜ₋₁ kₜ`, of which u and e are multiples.

    With an `origin` M₀, `m` is the way from it, which decays; the delta term erases M₀
    too where `erases_origin`.
    """
    overlap = k @ k.T
    base = _start_read(product, m, s, k, gates.kept[:-1], gates.lag[:-1])
    started = None
    if origin is not None:
        started = product(origin, k)
        v = v - started
    base = base + _earlier(gates.spread, overlap, eta[:, None] * v)
    if b is not None and started is not None and erases_origin:
        # Erasing M₀ as well is one more known write of the delta rows.
        base = base - _earlier(gates.decay, overlap, b[:, None] * started)
    recalled = base
    if overlap.shape != (1, 1):
        system = _before(gates.spread) * overlap * eta[None, :]
        if b is not None:
            system = system + _before(gates.decay) * overlap * b[None, :]
        recalled = unit_lower_inverse(system) @ base
    u = None
    if b is not None:
        u = -b[:, None] * recalled
        if started is not None and erases_origin:
            u = u - b[:, None] * started
    return Rows(u, -eta[:, None] * (recalled - v))


def read(
    m: Float[Array, "V K"],
    s: Float[Array, "V K"] | None,
    k: Float[Array, "P K"],
    rows: Rows,
    gates: Transitions,
    q: Float[Array, "C K"],
    before_write: bool = False,
    product: Product = product,
) -> Float[Array, "C V"]:
    """`Mₜ qₜ` for every token, or `Mₜ₋₁ qₜ` with `before_write`."""
    decay, spread = gates.decay, gates.spread
    kept, lag = gates.kept[1:], gates.lag[1:]
    if before_write:
        decay, spread = _before(decay), _before(spread)
        kept, lag = gates.kept[:-1], gates.lag[:-1]
    match = q @ k.T
    out = _start_read(product, m, s, q, kept, lag) + (spread * match) @ rows.e
    return out if rows.u is None else out + (decay * match) @ rows.u


def finish(
    m: Float[Array, "V K"],
    s: Float[Array, "V K"] | None,
    k: Float[Array, "P K"],
    rows: Rows,
    gates: Transitions,
    product: Product = product,
) -> tuple[Array, Array | None]:
    """The memory and its momentum after the last token."""
    writes = gates.spread[-1][:, None] * rows.e
    if rows.u is not None:
        writes = writes + gates.decay[-1][:, None] * rows.u
    m_end = gates.kept[-1] * m + product(k.T, writes.T)
    if s is None:
        return m_end, None
    m_end = m_end + gates.lag[-1] * s
    coasting = product(k.T, (gates.coast[:, None] * rows.e).T)
    return m_end, gates.coast_start * s + coasting


def _start_read(product, m, s, x, kept, lag):
    """What the state at the chunk's start answers to `x`, row by row."""
    out = kept[:, None] * product(m, x)
    return out if s is None else out + lag[:, None] * product(s, x)
