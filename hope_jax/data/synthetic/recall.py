"""Multi-query associative recall (MQAR): keys and values once, then questions.

Arora et al., "Zoology" (arXiv:2312.04927). A row first shows pairs, then asks for some
of their keys again, among filler; at a question the model must say the key's value:

    tokens   k1 v1 k2 v2  .  . k2  .  .  . k1  .
    labels                     v2          v1

Answers are never shown, so a row is learned from its pairs alone. As in the paper's
code, places of questions are drawn without repetition with probability proportional to
`i^(gap_power - 1)` at slot i, a power law of the distance to the pairs. There the first
pair gets the first draw, hence often the first slot, and a place tells of its answer
(`ordered`); here any pair may get any draw by default.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hope_jax.data.synthetic.task import Asked, Task

FILLER = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig(Task):
    """One task. The defaults are the smallest of Zoology's figure 2.

    Attributes:
      kind: its name.
      vocab: tokens. 0 is filler; keys are the rest of the lower half, values the upper
        half.
      pairs: keys and values shown in a row, all different.
      queries: how many of them are asked, each once; None asks all.
      length: tokens of a row, even.
      gap_power: of the law of gaps; 1 is uniform, less puts questions nearer.
      ordered: asks the i-th pair at the i-th place drawn, as Zoology's code does; all
        pairs are asked then.
      random_filler: fills with any token instead of 0. A filler may be a key of the
        row; only the true questions have labels.
    """

    kind: Literal["recall"] = "recall"
    vocab: int = 8192
    pairs: int = 4
    queries: int | None = None
    length: int = 64
    gap_power: float = 0.01
    ordered: bool = False
    random_filler: bool = False

    def __post_init__(self):
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {self.pairs}.")
        if not 1 <= self.asked <= self.pairs:
            raise ValueError(
                f"queries must lie between 1 and pairs ({self.pairs}), got "
                f"{self.queries}: each key is asked at most once."
            )
        if self.vocab < 2 * (self.pairs + 1):
            raise ValueError(
                f"vocab must be at least 2 (pairs + 1) = {2 * (self.pairs + 1)}, so "
                f"that half of it holds filler and all keys; got {self.vocab}."
            )
        if self.length % 2 or self.slots < self.asked:
            raise ValueError(
                "length must be even and at least 2 (pairs + queries) = "
                f"{2 * (self.pairs + self.asked)}, got {self.length}."
            )
        if self.ordered and self.asked < self.pairs:
            raise ValueError(
                f"ordered asks every pair, got queries={self.queries} of {self.pairs} "
                "pairs: leave queries None, or ordered False."
            )
        if not self.gap_power > 0:
            raise ValueError(f"gap_power must be above 0, got {self.gap_power}.")

    @property
    def asked(self) -> int:
        """Questions of a row."""
        return self.pairs if self.queries is None else self.queries

    @property
    def slots(self) -> int:
        """Places where a question may stand."""
        return (self.length - 2 * self.pairs) // 2

    @property
    def chance(self) -> float:
        """Accuracy of one who knows the values of the row and not whose they are."""
        return 1.0 / self.pairs

    def row(self, key: Array) -> Asked:
        """As `Task.row` says; the rows of three, for example:

        >>> made = RecallConfig(vocab=16, pairs=2, length=8).batch(jax.random.key(0), 3)
        >>> made.tokens.shape, made.mask.sum(1).tolist()
        ((3, 8), [2, 2, 2])
        """
        of_keys, of_values, of_questions, of_gaps, of_filler = jax.random.split(key, 5)
        half, shown = self.vocab // 2, 2 * self.pairs

        def some(key, among, count):  # different ones; to sort them all is slow
            return jax.lax.top_k(jax.random.uniform(key, (among,)), count)[1]

        keys = 1 + some(of_keys, half - 1, self.pairs)
        values = half + some(of_values, self.vocab - half, self.pairs)
        asked = jnp.arange(self.pairs)
        if not self.ordered:
            asked = some(of_questions, self.pairs, self.asked)
        slot = jnp.arange(1, self.slots + 1, dtype=jnp.float32)
        law = slot ** (self.gap_power - 1.0)
        gaps = jax.random.choice(
            of_gaps, self.slots, (self.asked,), replace=False, p=law / law.sum()
        )
        at = shown + 2 * gaps

        tokens = jnp.full((self.length,), FILLER, jnp.int32)
        if self.random_filler:
            tokens = jax.random.randint(of_filler, (self.length,), 0, self.vocab)
        pairs = jnp.stack([keys, values], axis=1).reshape(shown)
        tokens = tokens.at[:shown].set(pairs).at[at].set(keys[asked])
        mask = jnp.zeros((self.length,), bool).at[at].set(True)
        labels = jnp.zeros_like(tokens).at[at].set(values[asked])
        return Asked(tokens, labels, mask)
