"""Selective copying of MAD: say again what was not blank.

Poli et al. (arXiv:2403.17844); github.com/athms/mad-lab. Tokens among blanks, a token
that says now, and as many blanks as there were tokens, at each of which the next of
them is asked for:

    tokens   a  _  _  b  _  c  !  _  _  _
    labels                        a  b  c

Every blank stands before one of the tokens, any of them alike, so none between the last
and `!`, as in mad-lab; there they are drawn from a generator that no seed reaches, here
from the row's key. In training and test the same is asked.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hope_jax.core.config import at_least
from hope_jax.data.synthetic.task import Asked, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyingConfig(Task):
    """One task; the defaults are mad-lab's.

    Attributes:
      kind: its name.
      vocab: tokens; the last is the one that says now, the last but one blank.
      copied: tokens to say again.
      length: tokens of a row.
    """

    kind: Literal["copying"] = "copying"
    vocab: int = 16
    copied: int = 16
    length: int = 256

    def __post_init__(self):
        at_least(self, vocab=3, copied=1)
        if self.length < 2 * self.copied + 1:
            raise ValueError(
                f"length must be at least 2 copied + 1 = {2 * self.copied + 1}, got "
                f"{self.length}."
            )

    @property
    def asked(self) -> int:
        return self.copied

    def row(self, key: Array) -> Asked:
        """As `Task.row` says.

        >>> made = CopyingConfig(copied=2, length=8).batch(jax.random.key(0), 1)
        >>> int(made.tokens[0, 5]), made.mask[0].tolist()[5:]
        (15, [False, True, True])
        """
        of_tokens, of_blanks = jax.random.split(key)
        now, blank, count = self.vocab - 1, self.vocab - 2, self.copied
        said = jax.random.randint(of_tokens, (count,), 0, blank)
        blanks = self.length - 2 * count - 1
        before = jax.random.randint(of_blanks, (blanks,), 0, count)  # which token
        place = jnp.arange(count)
        at = place + jnp.sum(before[None] <= place[:, None], axis=1)
        tokens = jnp.full((self.length,), blank, jnp.int32).at[at].set(said)
        end = self.length - count
        mask = jnp.arange(self.length) >= end
        labels = jnp.zeros_like(tokens).at[end:].set(said)
        return Asked(tokens.at[end - 1].set(now), labels, mask)
