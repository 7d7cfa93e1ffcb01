"""In-context recall of MAD, plain and noisy: pairs, some of whose keys come again.

Poli et al., "Mechanistic Design" (arXiv:2403.17844); github.com/athms/mad-lab. A row is
keys and values in turn; a key keeps its value for the whole row, and wherever it comes
again the value that follows is asked for:

    tokens   k1 v1 k2 v2 k1 v1  #  # k2 v2
    labels               v1          v2

Keys are the first half of the ordinary tokens, values the second half, and two keys may
have one value; noise, `#`, is drawn from tokens of its own, two at a time. The last
pair is of a key that has come before, any of them alike. In training every next token
is asked for, which for keys is a guess.

What differs from mad-lab: one pair at least of those before the last is none of noise
(there the last itself may be the one that is kept); a row keeps its last value, which
is read and after which nothing is asked; rows are drawn from JAX's keys.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hope_jax.core.config import at_least
from hope_jax.data.synthetic.task import Asked, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextConfig(Task):
    """One task; the defaults are mad-lab's.

    Attributes:
      kind: its name.
      vocab: tokens, the last `noise_vocab` of them for noise alone.
      noise_vocab: tokens of noise; 16 in the noisy task.
      noise: share of pairs that are noise; 0.2 in the noisy task.
      length: tokens of a row, even.
      every: whether all next tokens are asked for, as in training, or the values of
        keys that come again.
    """

    kind: Literal["in_context"] = "in_context"
    vocab: int = 16
    noise_vocab: int = 0
    noise: float = 0.0
    length: int = 128
    every: bool = True

    def __post_init__(self):
        at_least(self, noise_vocab=0)
        if self.vocab - self.noise_vocab < 2:
            raise ValueError(
                f"vocab must be at least noise_vocab ({self.noise_vocab}) and a key "
                f"and a value, got {self.vocab}."
            )
        if self.length < 4 or self.length % 2:
            raise ValueError(
                f"length must be even and at least 4, got {self.length}: pairs."
            )
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must lie in [0, 1), got {self.noise}.")
        if bool(self.noise) != bool(self.noise_vocab):
            raise ValueError(
                f"noise ({self.noise}) and noise_vocab ({self.noise_vocab}) go "
                "together: set both, or neither."
            )

    @property
    def asked(self) -> int:
        return self.length if self.every else self.length // 2

    @property
    def tested(self) -> "InContextConfig":
        return dataclasses.replace(self, every=False)

    def row(self, key: Array) -> Asked:
        of_keys, of_values, of_noise, of_last, of_tokens, of_kept = jax.random.split(
            key, 6
        )
        ordinary, before = self.vocab - self.noise_vocab, self.length // 2 - 1
        keys = jax.random.randint(of_keys, (before,), 0, ordinary // 2)
        values = jax.random.randint(
            of_values, (ordinary // 2,), ordinary // 2, ordinary
        )
        noisy = jax.random.bernoulli(of_noise, self.noise, (before,))
        noisy = noisy.at[jax.random.randint(of_kept, (), 0, before)].set(False)

        shown = (keys[:, None] == jnp.arange(ordinary // 2)[None]) & ~noisy[:, None]
        there = shown.any(axis=0).astype(jnp.float32)
        last = jax.random.choice(of_last, ordinary // 2, p=there / there.sum())
        again = (shown & (jnp.cumsum(shown, axis=0) > 1)).any(axis=1)

        keys, again = jnp.append(keys, last), jnp.append(again, True)
        pairs = jnp.stack([keys, values[keys]], axis=1)
        if self.noise:
            drawn = jax.random.randint(of_tokens, (before, 2), ordinary, self.vocab)
            pairs = pairs.at[:-1].set(jnp.where(noisy[:, None], drawn, pairs[:-1]))
        tokens = pairs.reshape(self.length)
        labels, place = jnp.roll(tokens, -1), jnp.arange(self.length)
        mask = (place % 2 == 0) & jnp.repeat(again, 2)
        if self.every:
            mask = place < self.length - 1
        return Asked(tokens, jnp.where(mask, labels, 0), mask)
