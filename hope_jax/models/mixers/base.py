"""What the config of a mixer is, and what it says of the mixer."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from flax import nnx

from hope_jax.core import show
from hope_jax.core.system import Edge
from hope_jax.memory import named
from hope_jax.memory.compose import MemoryConfig
from hope_jax.memory.consolidation import Consolidation, moving

UNCUT = "use a mesh without sequence"  # what to do where rows cannot be cut


class Part(NamedTuple):
    """One level of a mixer, for the picture of the model it is in.

    Attributes:
      name: of its box.
      period: tokens between two moves; 0 is non-parametric.
      objective, rule: what it descends, and how, in words.
      start: path, inside the mixer, of the parameters that are its initial state; ""
        without any.
      share: how many parts start there.
    """

    name: str
    period: int
    objective: str
    rule: str
    start: str = ""
    share: int = 1


class MixerConfig(abc.ABC):
    """Base of the configs in `hope_jax.models.mixers.MIXERS`: frozen dataclasses, each
    of which builds its mixer.

    Attributes:
      kind: its name in the registry, a field.
      even: whether the width of a head must be even, for rotary positions.
      modifies_itself: whether the projections are memories too.
      controlled: whether `models.learning.Controls` reach its memories.
    """

    kind: str
    even: ClassVar[bool] = False
    modifies_itself: ClassVar[bool] = False
    controlled: ClassVar[bool] = True

    _repr_html_ = show.config

    def check_heads(self, d_model: int, heads: int) -> None:
        """Refuses a model whose heads it cannot have.

        Raises:
          ValueError: names the sizes.
        """
        if d_model % heads:
            raise ValueError(
                f"d_model ({d_model}) must be a multiple of heads ({heads})."
            )
        if self.even and (d_model // heads) % 2:
            raise ValueError(
                "d_model / heads must be even for the rotary positions of "
                f"{self.kind}, got {d_model // heads}."
            )

    @abc.abstractmethod
    def build(self, d_model: int, heads: int, dtype, *, rngs: nnx.Rngs) -> nnx.Module:
        """The module: `y, state = module(x, state, aligned=, learn=)` on
        `x: [B, T, d_model]`, and `initial_state(rows)`."""

    @property
    @abc.abstractmethod
    def span(self) -> int:
        """Tokens after which all its clocks stand at a boundary."""

    @property
    def stride(self) -> int:
        """Tokens between two places at which a chunk of its state may end. Its module
        then takes `ends=False`, which leaves that to `end(state, learn)`: a loop over
        tokens need not look for it at each, and asks `over(state)` for the rows it is
        due for. 0 where the module always sees to it itself."""
        return 0

    def unshared(self, tokens: int, devices: int) -> str:
        """Why so many devices cannot share the `tokens` of a row, and what to do, the
        end of a sentence about the mixer; "" if they can. Its module then takes
        `share`, a `hope_jax.models.share.Share`: it reads its device's tokens of rows
        which begin at the state it is given, and gives that back."""
        del tokens, devices
        return "reads a row's tokens one after another: " + UNCUT

    @property
    def most(self) -> int | None:
        """Most tokens that a row may have; None for any number."""
        return None

    def bare(self, state: Any) -> Any:
        """A state of the module at a multiple of `span`, without what `full` finds
        again in the rest. Leaves may lead with anything."""
        return state

    def full(self, state: Any) -> Any:
        """What `bare` was made of."""
        return state

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """Its levels."""

    @property
    def memories(self) -> tuple[MemoryConfig, ...]:
        """The memory of each of its parts that learns, in their order; none where what
        they are given is not keys and values of memories. With some its module has
        `watch(x, state, aligned=, learn=)`: a call of it, which also returns what each
        was given, `Tokens` of leaves `[B, H, T, ...]` whose values are what it stores.
        """
        return ()

    @property
    def learns(self) -> tuple[Part, ...]:
        """The parts whose weights a session finds in a state of the module: those of
        `memories`."""
        return tuple(p for p in self.parts if p.period > 0) if self.memories else ()

    @property
    def starts(self) -> tuple[Part, ...]:
        """The levels that own the starts of its memories (`memory.consolidation`), from
        fast to slow; a session finds them in the `starts` of a memory's state."""
        return ()

    @property
    def ends(self) -> tuple[str, ...]:
        """Names of the parts whose answers leave it."""
        return tuple(part.name for part in self.parts)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """What passes between its parts."""
        return ()

    def rechunked(self, factor: float) -> "MixerConfig":
        """The same with chunks `factor` times as long, and inner rates as they are.

        Raises:
          ValueError: it has no chunk that is part of its function, or none so long.
        """
        raise ValueError(f"{self.kind} has no chunk of a memory alone")


def softmax(name: str) -> Part:
    """Attention as a level."""
    return Part(name, 0, "regression on values", "softmax")


def recalling(name: str, memory: MemoryConfig, start: str) -> Part:
    """A memory of `memory.compose`; that of an exact one moves at every token."""
    _, bias, _, rule = named.choices(memory)
    period = 1 if memory.gradient == "exact" else memory.chunk
    return Part(name, period, f"{bias} with values", rule, start)


def consolidating(levels: Sequence[Consolidation]) -> tuple[Part, ...]:
    """Slower starts as levels."""
    there = moving(levels)
    return tuple(
        Part(
            "consolidated start" + (f" {i}" if len(there) > 1 else ""),
            level.period,
            "L2 to the faster level",
            "GD",
        )
        for i, level in enumerate(there, 1)
    )


def scaled(chunk: int, factor: float) -> int:
    """`factor` times a chunk.

    Raises:
      ValueError: that is no whole number of tokens.
    """
    if chunk * factor < 1 or not float(chunk * factor).is_integer():
        raise ValueError(f"a chunk of {chunk} has no part of {factor}")
    return int(chunk * factor)
