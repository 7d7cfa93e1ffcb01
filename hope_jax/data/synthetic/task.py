"""What a synthetic task is: rows drawn from a key, and what is asked in them."""

import abc
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from hope_jax.core import show


class Asked(NamedTuple):
    """Rows of a task.

    Attributes:
      tokens: int32, what is read.
      labels: the answer where `mask` says that one is asked for: a token, int32, or the
        set of those that are right, bool. Elsewhere 0.
      mask: where answers are asked for.
    """

    tokens: Int[Array, "B T"]
    labels: Int[Array, "B T"] | Bool[Array, "B T N"]
    mask: Bool[Array, "B T"]

    def only(self, most: int) -> tuple[Int[Array, "B Q"], "Asked"]:
        """The first `most` places of each row where something is asked, in order, and
        what is asked there. Where a row asks less, others follow, which ask nothing.

        >>> mask = jnp.array([[False, True, False, True]])
        >>> at, asked = Asked(jnp.arange(4)[None], jnp.arange(4)[None], mask).only(3)
        >>> at.tolist(), asked.labels.tolist(), asked.mask.tolist()
        ([[1, 3, 0]], [[1, 3, 0]], [[True, True, False]])
        """
        _, at = jax.lax.top_k(self.mask.astype(jnp.int32), most)  # of equals the first

        def there(a):
            places = at.reshape(*at.shape, *(1,) * (a.ndim - 2))
            return jnp.take_along_axis(a, places, axis=1)

        return at, jax.tree.map(there, self)


class Task(abc.ABC):
    """Base of the configs in `hope_jax.data.synthetic.TASKS`: frozen dataclasses.

    Attributes:
      kind: its name in the registry, a field.
      vocab: tokens there are, those of answers among them.
      length: tokens of a row, those after its end among them.
      asked: most answers that a row asks for, by default as many as it has tokens.
      tested: the task on which a model that was trained on this one is scored: this
        one, unless training asks for more than what counts.
      pooled: whether all answers are read off what a model makes of the last token
        (`hope_jax.models.autoencoder`).
    """

    kind: str
    vocab: int
    length: int
    pooled: ClassVar[bool] = False

    _repr_html_ = show.config

    @property
    def asked(self) -> int:
        return self.length

    @property
    def tested(self) -> "Task":
        return self

    @abc.abstractmethod
    def row(self, key: Array) -> Asked:
        """One row drawn from `key`, without the axis of rows."""

    def batch(self, key: Array, rows: int) -> Asked:
        """`rows` rows drawn from `key`; pure, and may be compiled with its step.

        Raises:
          ValueError: `rows` below 1.
        """
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}.")
        return jax.vmap(self.row)(jax.random.split(key, rows))

    def numbered(self, key: Array, numbers: Int[Array, " B"]) -> Asked:
        """Rows of the endless list that `key` stands for, by their numbers."""
        return jax.vmap(lambda n: self.row(jax.random.fold_in(key, n)))(numbers)
