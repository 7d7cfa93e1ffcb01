"""Memorisation of MAD: what is the value of a key, which no row says?

Poli et al. (arXiv:2403.17844); github.com/athms/mad-lab. A fixed map gives each key its
value, one of the second half of the ordinary tokens and no two the same. A row asks for
some keys' and never says the answer, so the map is learned by the parameters or not at
all:

    tokens   k1  !  k2  !  k1  !
    labels      v1     v2     v1

The map is drawn from a seed that is no part of a row's key, so training and test share
it; by default it is mad-lab's own. There 256 rows of it are shown again and again; new
rows of the same map, as here, hold nothing else to learn.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hope_jax.core.config import at_least
from hope_jax.data.synthetic.task import Asked, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorisationConfig(Task):
    """One task; the defaults are mad-lab's.

    Attributes:
      kind: its name.
      vocab: tokens; the last asks for the value of the key before it.
      length: tokens of a row, even.
      seed: of the map.
    """

    kind: Literal["memorisation"] = "memorisation"
    vocab: int = 256
    length: int = 32
    seed: int = 12345

    def __post_init__(self):
        at_least(self, vocab=3, length=2, seed=0)
        if self.length % 2:
            raise ValueError(f"length must be even, got {self.length}: keys and asks.")

    @property
    def asked(self) -> int:
        return self.length // 2

    def row(self, key: Array) -> Asked:
        """As `Task.row` says.

        >>> made = MemorisationConfig(vocab=6, length=4).batch(jax.random.key(0), 2)
        >>> made.tokens[:, 1::2].tolist(), made.mask[0].tolist()
        ([[5, 5], [5, 5]], [False, True, False, True])
        """
        values = jnp.asarray(mapped(self.vocab, self.seed))
        keys = jax.random.randint(key, (self.length // 2,), 0, len(values))
        ask = jnp.full_like(keys, self.vocab - 1)
        tokens = jnp.stack([keys, ask], axis=1).reshape(self.length)
        mask = jnp.arange(self.length) % 2 == 1
        labels = jnp.where(mask, jnp.repeat(values[keys], 2), 0)
        return Asked(tokens, labels, mask)


@functools.cache
def mapped(vocab: int, seed: int) -> Int[np.ndarray, " K"]:
    """Of each key, its value; keys and values are shuffled and laid side by side."""
    generator, half = np.random.default_rng(seed), (vocab - 1) // 2
    keys, values = list(range(half)), list(range(half, vocab - 1))
    generator.shuffle(keys)  # lists, whose shuffles numpy draws otherwise than arrays'
    generator.shuffle(values)
    made = dict(zip(keys, values, strict=False))
    return np.array([made[key] for key in range(half)], np.int32)
