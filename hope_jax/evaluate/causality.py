"""Does a sequence model look ahead, forget its past, or mix its rows?"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int


class CausalityError(ValueError):
    """A model reads what it should not, or cannot read what it should."""


def check_causality(
    read: Callable[[Int[Array, "B T"]], Array],
    tokens: Int[Array, "B T"],
    *,
    vocab: int,
    positions: Sequence[int] | None = None,
) -> None:
    """Checks a language model by changing one token at a time.

    Args:
      read: `tokens -> outputs [B, T, ...]`; jit it, it is called once a position.
      tokens: ids in `[0, vocab)`, at least two rows of at least two tokens.
      vocab: a changed token is the next id, modulo this.
      positions: which tokens to change; default: first, last, and six between.

    Raises:
      CausalityError: an output before the changed token moved by a single bit (the
      model
        sees the future), an output of another row moved by a single bit (rows share
        state), or the first token does not reach the last output.

    >>> import jax.numpy as jnp
    >>> tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
    >>> check_causality(lambda t: jnp.cumsum(t, axis=1), tokens, vocab=10)
    >>> check_causality(lambda t: t + t.sum(axis=1, keepdims=True), tokens, vocab=10)
    Traceback (most recent call last):
    hope_jax.evaluate.causality.CausalityError: changing token 1 of row 0 changed its \
output at position 0: the model sees the future.
    """
    rows, length = tokens.shape
    if rows < 2 or length < 2:
        raise ValueError(f"tokens must be at least [2, 2], got {tokens.shape}.")
    if positions is None:
        positions = sorted(set(np.linspace(0, length - 1, 8).astype(int).tolist()))
    before = np.asarray(jax.device_get(read(tokens)))
    for row, position in ((r, p) for p in positions for r in (0, rows - 1)):
        other = (tokens[row, position] + 1) % vocab
        after = read(tokens.at[row, position].set(other))
        same = np.asarray(jax.device_get(after)) == before
        same = same.reshape(rows, length, -1).all(axis=-1)
        early = np.flatnonzero(~same[row, :position])
        if early.size:
            raise CausalityError(
                f"changing token {position} of row {row} changed its output at "
                f"position {early[0]}: the model sees the future."
            )
        leaked = np.flatnonzero(~np.delete(same, row, axis=0).all(axis=1))
        if leaked.size:
            raise CausalityError(
                f"changing token {position} of row {row} changed another row: rows "
                "share state."
            )
        if position == 0 and same[row, -1]:
            raise CausalityError(
                f"changing token 0 of row {row} left its last output as it was: the "
                "past does not reach the end."
            )
