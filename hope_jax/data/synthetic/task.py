"""What a synthetic task is: rows drawn from a key, and what is asked in them."""

import abc
from typing import NamedTuple

import jax
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


class Task(abc.ABC):
    """Base of the configs in `hope_jax.data.synthetic.TASKS`: frozen dataclasses.

    Attributes:
      kind: its name in the registry, a field.
      vocab: tokens there are, those of answers among them.
      length: tokens of a row, those after its end among them.
    """

    kind: str
    vocab: int
    length: int

    _repr_html_ = show.config

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
