"""Linear memories whose retention is a vector over key channels, in chunks.

Reference: the recurrence, token by token. For one stream and one head; callers `vmap`.
"Diagonal plus low rank" covers GLA (arXiv:2312.06635: no delta term), RWKV-7
(arXiv:2503.14456) and KDA (arXiv:2510.26692):

    Mₜ = Mₜ₋₁ (Diag(aₜ) − rₜ pₜᵀ) + wₜ kₜᵀ

With uₜ = −Mₜ₋₁ rₜ the state is a sum of known matrices and of rows u pᵀ and w kᵀ, each
decayed channel by channel since it was written; one unit lower-triangular inverse gives
all u of a chunk. What decayed between two tokens is always a *product of retentions*,
never a quotient, nor a difference of log-sums, which loses digits where much decayed:
so any value in [0, 1] is exact, in the pullback too. Chunks are cut into pieces: inside
a piece the products are formed for every pair of tokens; between pieces they split at
the later piece's start into two factors <= 1, and a matrix product does the work.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from hope_jax.kernels.triangular import unit_lower_inverse


def channel_chunk(
    m: Float[Array, "V K"],
    k: Float[Array, "C K"],
    w: Float[Array, "C V"],
    q: Float[Array, "C K"],
    alpha: Float[Array, "C K"],
    r: Float[Array, "C K"] | None = None,
    p: Float[Array, "C K"] | None = None,
    before_write: bool = False,
) -> tuple[Float[Array, "V K"], Float[Array, "C V"]]:
    """A chunk of C >= 1 tokens; C changes the speed and never the answer.

    Args:
      m: the memory at the chunk's start.
      k, w: keys, and what is written to them (the value times its rate).
      q: queries.
      alpha: what each token retains of every key channel, in [0, 1].
      r: what the delta term recalls, times its rate; None has no delta term.
      p: where the delta term erases; None erases at `k`, at about half the cost.
      before_write: read `Mₜ₋₁ qₜ` instead of `Mₜ qₜ`.

    Returns:
      The memory after the chunk, and the reads [C, V].
    """
    _check(m, k, w, q, alpha, r, p)
    decay = _decay(alpha)
    rows, keys = w, k
    if r is not None:
        recalled = _from_start(decay, r, before=True) @ m.T
        overlap = _match(decay, r, k, before=True)
        if p is None:
            rows = unit_lower_inverse(overlap) @ (w - recalled)
        else:
            inverse = unit_lower_inverse(_match(decay, r, p, before=True))
            u = -(inverse @ (recalled + overlap @ w))
    y = _from_start(decay, q, before_write) @ m.T
    y = y + _match(decay, q, keys, before_write) @ rows
    m_end = m * decay.whole[None, :] + rows.T @ _to_end(decay, keys)
    if r is not None and p is not None:
        y = y + _match(decay, q, p, before_write) @ u
        m_end = m_end + u.T @ _to_end(decay, p)
    return m_end, y


class _Decay(NamedTuple):
    """Products of retentions of a chunk of n pieces of c tokens.

    Attributes:
      pairs: from state i to state t of one piece, [n, c + 1, c + 1, K].
      start: from the chunk's start to a piece's, [n, K].
      between: from the end of piece j to the start of piece i > j, else 0, [n, n, K].
      end: from the end of a piece to the chunk's, [n, K].
      whole: from the chunk's start to its end, [K].
    """

    pairs: Array
    start: Array
    between: Array
    end: Array
    whole: Array


def _decay(alpha):
    size = 4 if alpha.shape[0] <= 32 else 8  # about the root of the chunk is fastest
    pairs = _products(_cut(alpha, min(size, alpha.shape[0]), 1.0))
    pieces = _products(pairs[:, -1, 0])
    return _Decay(pairs, pieces[:-1, 0], pieces[:-1, 1:], pieces[-1, 1:], pieces[-1, 0])


def _products(a: Float[Array, "*n c K"]) -> Float[Array, "*n c+1 c+1 K"]:
    """`P[t, i] = a[i] ... a[t − 1]` for i <= t, else 0."""
    size = a.shape[-2]
    one = jnp.ones_like(a[..., :1, :])
    row = jnp.concatenate([one, jnp.zeros_like(a)], axis=-2)
    rows = [row]
    for t in range(size):
        past = row[..., : t + 1, :] * a[..., t : t + 1, :]
        row = jnp.concatenate([past, one, row[..., t + 2 :, :]], axis=-2)
        rows.append(row)
    return jnp.stack(rows, axis=-3)


def _cut(x, size, fill=0.0):
    """Rows in pieces [n, size, K]; those added at the end hold `fill`."""
    missing = -x.shape[0] % size
    x = jnp.pad(x, ((0, missing), (0, 0)), constant_values=fill)
    return x.reshape(-1, size, x.shape[-1])


def _rows(x, length):
    return x.reshape(-1, x.shape[-1])[:length]


def _until(decay, before):
    """From the states of a piece to each token's own, or to the one before it."""
    return decay.pairs[:, :-1] if before else decay.pairs[:, 1:]


def _from_start(decay, x, before):
    """`xₜ` times what the chunk's start has kept when t reads it."""
    until = _until(decay, before)[:, :, 0]
    pieces = _cut(x, until.shape[1])
    return _rows(pieces * until * decay.start[:, None, :], x.shape[0])


def _to_end(decay, x):
    """`xᵢ` times what the chunk's end has kept of it."""
    tail = decay.pairs[:, -1, 1:]
    return _rows(_cut(x, tail.shape[1]) * tail * decay.end[:, None, :], x.shape[0])


def _match(decay, x, y, before):
    """`S[t, i] = Σ xₜ yᵢ` times what is kept of i when t reads, else 0, [C, C]."""
    length, until = x.shape[0], _until(decay, before)
    count, size = until.shape[:2]
    x, y = _cut(x, size), _cut(y, size)
    inside = jnp.einsum("ntk,ntik->nti", x, y[:, None] * until[:, :, 1:])
    tail = (y * decay.pairs[:, -1, 1:])[None] * decay.between[:, :, None, :]
    tail = tail.reshape(count, count * size, -1)
    across = ((x * until[:, :, 0]) @ tail.mT).reshape(count, size, count, size)
    own = jnp.eye(count, dtype=x.dtype)[:, None, :, None]
    full = across + own * inside[:, :, None, :]
    return full.reshape(count * size, count * size)[:length, :length]


def _check(m, k, w, q, alpha, r, p):
    if r is None and p is not None:
        raise ValueError("p is where the delta term erases: give r too, or neither.")
    length, width = k.shape
    if length < 1:
        raise ValueError("k has no tokens: a chunk needs at least one.")
    wanted = dict(m=(w.shape[-1], width), w=(length, m.shape[0]))
    wanted |= dict.fromkeys(("q", "alpha", "r", "p"), (length, width))
    given = dict(m=m, w=w, q=q, alpha=alpha, r=r, p=p)
    for name, x in given.items():
        if x is not None and x.shape != wanted[name]:
            raise ValueError(
                f"{name} must have shape {wanted[name]} beside k {k.shape}, got "
                f"{x.shape}."
            )
