"""Fuzzy in-context recall of MAD: keys and values of one to three tokens each.

Poli et al. (arXiv:2403.17844); github.com/athms/mad-lab. As in-context recall, but
nothing tells where a key ends. A motif is of different tokens in any order, keys of the
first half of the ordinary tokens, values of the second; a key keeps its value for the
whole row, and when it comes again every token of its value is asked for:

    tokens   .  .  a b  x   c  y z  a b  x   c  y z
    labels                            x     y  z

`.` is the last token of the vocabulary and fills rows from the left, for what is drawn
differs in length. The last pair has come before. Keys have one to three tokens in
training, where all next tokens are asked for, filler among them, and always three when
it counts; values have one to three.

What differs from mad-lab: there the pair of the end may find no place before it, and
is then no question of recall (a row of 128 has room up to token 122 or so, and its
place is drawn up to 124); here it has the last place that there is. Rows are drawn from
JAX's keys.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from hope_jax.core.config import at_least
from hope_jax.data.synthetic.task import Asked, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuzzyConfig(Task):
    """One task; the defaults are mad-lab's.

    Attributes:
      kind: its name.
      vocab: tokens, the last of which is filler.
      motif: most tokens of a key, and of a value.
      length: tokens of a row.
      every: whether keys are of any length and all next tokens are asked for, as in
        training; or keys are of full length, and what is asked for is the values of
        those that come again.
    """

    kind: Literal["fuzzy"] = "fuzzy"
    vocab: int = 16
    motif: int = 3
    length: int = 128
    every: bool = True

    def __post_init__(self):
        at_least(self, motif=1)
        if self.vocab < 2 * self.motif + 1:
            raise ValueError(
                f"vocab must be at least 2 motif + 1 = {2 * self.motif + 1}, so that "
                "half of it makes a motif of different tokens and one is filler; got "
                f"{self.vocab}."
            )
        if self.length < 6 * self.motif:
            raise ValueError(
                f"length must be at least 6 motif = {6 * self.motif}, room for a pair, "
                f"the same again and one between; got {self.length}."
            )

    @property
    def asked(self) -> int:
        return self.length if self.every else self.length // 2  # keys are as long

    @property
    def tested(self) -> "FuzzyConfig":
        return dataclasses.replace(self, every=False)

    def row(self, key: Array) -> Asked:
        of_keys, of_values, of_place = jax.random.split(key, 3)
        half, motif = (self.vocab - 1) // 2, self.motif
        fewest = 2 if self.every else motif + 1  # tokens of a pair
        most = -(-(self.length - 2 * motif) // fewest)  # pairs before the last
        keys = _motifs(of_keys, most + 1, half, motif, 1 if self.every else motif)
        values = _motifs(of_values, most + 1, self.vocab - 1 - half, motif, 1, half)

        # Each pair by the number of its draw; the last draw is the probe.
        same = _equal(keys)
        order = jnp.arange(most)
        probe = keys.size[most] + values.size[most]
        room = self.length - probe - 2 * motif
        starts, _ = _starts(order, same, keys.size, values.size)
        pairs = jnp.sum(starts < room)
        earliest = jax.random.randint(of_place, (), 0, self.length - 2 * probe)
        place = jnp.minimum(jnp.sum(starts < earliest), pairs - 1)
        by_chance = (same[most, :most] & (order < place)).any()
        order = jnp.where((order == place) & ~by_chance, most, order)
        starts, value = _starts(order, same, keys.size, values.size)
        there = starts < room

        # The probe once more behind them, and all of it behind filler.
        end = jnp.max(jnp.where(there, starts + _sizes(order, value, keys, values), 0))
        order, there = jnp.append(order, most), jnp.append(there, True)
        starts, value = jnp.append(starts, end), jnp.append(value, most)
        before = self.length + 1 - (end + probe)
        # That the same key stands in an earlier place; the n-th pair sees those before.
        alike = same[order][:, order] & there[None]
        again = (jnp.tril(alike, -1)).any(axis=1)

        text = jnp.full((self.length + 1,), self.vocab - 1, jnp.int32)
        asked = jnp.zeros((self.length + 1,), bool)
        token = jnp.arange(motif)[None]
        for tokens, size, first, value_of in (
            (keys.tokens[order], keys.size[order], starts, False),
            (values.tokens[value], values.size[value], starts + keys.size[order], True),
        ):
            real = (token < size[:, None]) & there[:, None]
            at = jnp.where(real, before + first[:, None] + token, self.length + 1)
            text = text.at[at].set(tokens, mode="drop")
            if value_of:
                shown = jnp.broadcast_to(again[:, None], at.shape)
                asked = asked.at[at].set(shown, mode="drop")
        mask = jnp.ones((self.length,), bool) if self.every else asked[1:]
        return Asked(text[:-1], jnp.where(mask, text[1:], 0), mask)


class _Motifs(NamedTuple):
    """Some motifs: their tokens, of which the first `size` are there."""

    tokens: Int[Array, "N M"]
    size: Int[Array, " N"]


def _motifs(key, count, among, most, least, first=0) -> _Motifs:
    """Different tokens of `among` in any order, each size as likely."""
    of_tokens, of_size = jax.random.split(key)
    mixed = jnp.argsort(jax.random.uniform(of_tokens, (count, among)), axis=1)
    size = jax.random.randint(of_size, (count,), least, most + 1)
    return _Motifs(first + mixed[:, :most].astype(jnp.int32), size)


def _equal(motifs: _Motifs) -> Bool[Array, "N N"]:
    token = jnp.arange(motifs.tokens.shape[1])[None]
    known = jnp.where(token < motifs.size[:, None], motifs.tokens, -1)
    return (known[:, None] == known[None]).all(axis=-1)


def _starts(order, same, key_sizes, value_sizes):
    """Where each pair begins, and the draw of its value: the first of its key's, the
    probe's for its own."""
    probe = same.shape[0] - 1
    alike = same[order][:, order]
    first = order[jnp.argmax(alike, axis=1)]
    value = jnp.where(same[order, probe], probe, first)
    sizes = key_sizes[order] + value_sizes[value]
    return jnp.cumsum(sizes) - sizes, value


def _sizes(order, value, keys, values):
    return keys.size[order] + values.size[value]
