"""Formal languages: after every letter, which may come next?

The transduction of Bhattamishra et al. (arXiv:2009.11264), with which Irie et al.
(arXiv:2310.16076) and Table 5 of arXiv:2512.24695 tell models apart: a word is read
letter by letter, and at each the model says the set of letters that may follow, the
word's end among them. For parity it says instead whether the ones so far are even. A
word counts only if it is right throughout (`evaluate.answers`).

    parity     any bits                      even, odd
    aa_star    (aa)*                         regular, not star-free
    abab_star  (abab)*                       regular, not star-free
    anbn       aⁿbⁿ                          one counter
    anbncn     aⁿbⁿcⁿ                        two
    shuffle_2  two kinds of brackets, each   two
               balanced for itself

Words are as long as a length drawn evenly from those that the language has in a window,
for all languages alike; in the published data the window of aⁿbⁿ and aⁿbⁿcⁿ is n's.
Those draw 10,000 words and read them 300 times; here every row is new.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from hope_jax.core.config import one_of
from hope_jax.data.synthetic.task import Asked, Task

# A key, the word's length and most letters of a row -> letters and what may follow.
Write = Callable[
    [Array, Int[Array, ""], int], tuple[Int[Array, " T"], Bool[Array, "T N"]]
]


class Language(NamedTuple):
    """A language.

    Attributes:
      symbols: answers there are: its letters, then the end of a word if it has one.
      unit: of the lengths of its words.
      write: a word.
    """

    symbols: int
    unit: int
    write: Write


def _sets(*members: Bool[Array, " T"]) -> Bool[Array, "T N"]:
    return jnp.stack(members, axis=-1)


def _parity(key, length, most):
    del length
    bits = jax.random.randint(key, (most,), 0, 2)
    odd = jnp.cumsum(bits) % 2 == 1
    return bits, _sets(~odd, odd)


def _aa_star(key, length, most):
    del key, length
    read = jnp.arange(1, most + 1)
    a = jnp.ones(most, bool)
    return jnp.zeros(most, jnp.int32), _sets(a, read % 2 == 0)


def _abab_star(key, length, most):
    del key, length
    read = jnp.arange(1, most + 1)
    even = read % 2 == 0
    return (read - 1) % 2, _sets(even, ~even, read % 4 == 0)


def _counted(letters: int) -> Write:
    def write(key, length, most):
        del key
        read, n = jnp.arange(1, most + 1), length // letters
        sets = [read <= n]
        for letter in range(1, letters):  # its first may follow each of the one before
            first = 0 if letter == 1 else letter * n - 1
            sets.append((read > first) & (read < (letter + 1) * n))
        return jnp.minimum((read - 1) // n, letters - 1), _sets(*sets, read == length)

    return write


def _shuffle_2(key, length, most):
    """A walk of two heights which is back at zero at the end: at each letter one of the
    brackets that may stand there, all as likely."""

    def step(heights, at):
        i, key = at
        left = length - i
        opens = jnp.full(2, heights.sum() < left)
        may = jnp.stack([opens, heights > 0], axis=1).reshape(4)
        weight = jnp.where(may.any(), may, True).astype(jnp.float32)  # after the end
        letter = jax.random.choice(key, 4, p=weight / weight.sum())
        change = jnp.where(letter % 2 == 0, 1, -1)
        heights = heights.at[letter // 2].add(change)
        return heights, (letter, heights)

    at = (jnp.arange(most), jax.random.split(key, most))
    _, (letters, heights) = jax.lax.scan(step, jnp.zeros(2, jnp.int32), at)
    first, second = heights.T
    always, closed = jnp.ones(most, bool), heights.sum(1) == 0
    return letters, _sets(always, first > 0, always, second > 0, closed)


LANGUAGES = {
    "parity": Language(2, 1, _parity),
    "aa_star": Language(2, 2, _aa_star),
    "abab_star": Language(3, 4, _abab_star),
    "anbn": Language(3, 2, _counted(2)),
    "anbncn": Language(4, 3, _counted(3)),
    "shuffle_2": Language(5, 2, _shuffle_2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormalConfig(Task):
    """A language and how long its words are.

    Attributes:
      kind: its name.
      language: one of `LANGUAGES`.
      shortest, longest: letters of a word.
    """

    kind: Literal["formal"] = "formal"
    language: str = "parity"
    shortest: int = 2
    longest: int = 50

    def __post_init__(self):
        one_of(self, language=LANGUAGES)
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"shortest ({self.shortest}) must be at least 1 and at most longest "
                f"({self.longest})."
            )
        if self._fewest > self._most:
            raise ValueError(
                f"{self.language} has no word of {self.shortest} to {self.longest} "
                f"letters: its lengths are multiples of {self._language.unit}."
            )

    @property
    def _language(self) -> Language:
        return LANGUAGES[self.language]

    @property
    def _fewest(self) -> int:
        return -(-self.shortest // self._language.unit)

    @property
    def _most(self) -> int:
        return self.longest // self._language.unit

    @property
    def vocab(self) -> int:
        """Letters, and the end of a word, which is never read."""
        return self._language.symbols

    @property
    def length(self) -> int:
        """Letters of a row; what follows a shorter word is not asked for."""
        return self.longest

    def row(self, key: Array) -> Asked:
        of_length, of_word = jax.random.split(key)
        units = jax.random.randint(of_length, (), self._fewest, self._most + 1)
        length = units * self._language.unit
        letters, sets = self._language.write(of_word, length, self.longest)
        mask = jnp.arange(self.longest) < length
        tokens = jnp.where(mask, letters, 0)
        return Asked(tokens, sets & mask[:, None], mask)
