"""Compression of MAD: a row of random tokens into what is made of its last.

Poli et al. (arXiv:2403.17844); github.com/athms/mad-lab. Random tokens, then one that
says compress. Every token of the row is asked for, and told from the vector of the last
alone (`hope_jax.models.autoencoder`), which so has to hold them all. The last, which is
always the same, is asked for too, as in mad-lab: of its answers one in `length` is
free. Chance is 1 in `vocab` - 1 for the others.

mad-lab can replace tokens by noise, and then asks for the noise too, against its own
comment; its benchmark never does. Here there is none: what is asked for is what was
read.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hope_jax.core.config import at_least
from hope_jax.data.synthetic.task import Asked, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionConfig(Task):
    """One task; the defaults are mad-lab's.

    Attributes:
      kind: its name.
      vocab: tokens, the last of which says compress.
      length: tokens of a row, that one among them.
    """

    kind: Literal["compression"] = "compression"
    vocab: int = 16
    length: int = 32
    pooled: ClassVar[bool] = True

    def __post_init__(self):
        at_least(self, vocab=2, length=2)

    def row(self, key: Array) -> Asked:
        """As `Task.row` says.

        >>> made = CompressionConfig(vocab=3, length=4).batch(jax.random.key(0), 2)
        >>> made.tokens[:, -1].tolist(), bool((made.labels == made.tokens).all())
        ([2, 2], True)
        """
        last = self.vocab - 1
        tokens = jax.random.randint(key, (self.length,), 0, last).at[-1].set(last)
        return Asked(tokens, tokens, jnp.ones((self.length,), bool))
