"""Words of a group: read its elements one by one, and say at each their product.

The state tracking of Merrill et al. (arXiv:2404.08819) and DeltaProduct
(arXiv:2502.10297). The product of `t` elements is a state that no sum can hold unless
the group is abelian; for S5 and A5, which are not solvable, a model of constant depth
whose transitions commute or are diagonal cannot track it. Chance is 1 in the number of
elements.
"""

import dataclasses
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hope_jax.core.config import at_least, one_of
from hope_jax.data.synthetic.task import Asked, Task

GROUPS = ("z2", "s3", "a4", "a5", "s4", "s5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordsConfig(Task):
    """A group and the length of its words.

    Attributes:
      kind: its name.
      group: of `GROUPS`: cyclic `z2`, whose words are parity, symmetric `s` and
        alternating `a` of so many things.
      length: elements of a word.
    """

    kind: Literal["words"] = "words"
    group: str = "s3"
    length: int = 128

    def __post_init__(self):
        one_of(self, group=GROUPS)
        at_least(self, length=1)

    @property
    def vocab(self) -> int:
        """Elements of the group; 0 is the one that changes nothing."""
        return len(products(self.group))

    def row(self, key: Array) -> Asked:
        table = jnp.asarray(products(self.group))
        word = jax.random.randint(key, (self.length,), 0, self.vocab)
        # A product of products of neighbours, in the order in which they are read.
        told = jax.lax.associative_scan(lambda a, b: table[a, b], word)
        return Asked(word, told, jnp.ones(self.length, bool))


@functools.cache
def products(group: str) -> Int[np.ndarray, "N N"]:
    """The table of a group: at `[a, b]` what reading a and then b amounts to.

    >>> products("z2").tolist()
    [[0, 1], [1, 0]]
    """
    things = int(group[1:])
    orders = list(itertools.permutations(range(things)))
    if group[0] == "a":
        orders = [order for order in orders if _even(order)]
    number = {order: i for i, order in enumerate(orders)}
    table = [[number[tuple(b[x] for x in a)] for b in orders] for a in orders]
    return np.array(table, np.int32)


def _even(order: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(order, 2)) % 2 == 0
