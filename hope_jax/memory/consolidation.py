"""Consolidation: where a memory returns to is a level too, slower than the memory.

A memory whose decay pulls to its start (`MemoryConfig.toward="start"`) forgets what it
wrote. Here every row has starts of its own, S₁, .. Sₙ from fast to slow, before the
learned one, Sₙ₊₁ = W₀. The memory M = S₀ returns to S₁, and at the clock of each

    Sᵢ <- Sᵢ + rate (Sᵢ₋₁ - Sᵢ) - (1 - 2^(-period / half_life)) (Sᵢ - Sᵢ₊₁)

of what stood before: a step of gradient descent on ½‖Sᵢ − Sᵢ₋₁‖², whose context is the
faster level's state, and a retention that pulls to the slower one. It moves no memory:
what M holds beyond S₁ is from then on in part what it keeps.

The channel from short to long term that section 7 of arXiv:2512.24695 describes for
MLPs, given to memories; no published source has this form.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from hope_jax.core.clock import Clock
from hope_jax.memory.architecture import Weights
from hope_jax.memory.compose import MemoryConfig
from hope_jax.memory.state import MemoryState, form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consolidation:
    """One slower level.

    Attributes:
      period: tokens between two moves, a multiple of the memory's chunk.
      rate: share of the way to the faster level's state that a move takes it, in
        [0, 1]; a level of rate 0 is not there.
      half_life: tokens after which it has returned half of the way to the next slower
        start; `math.inf` keeps all. It bounds what adds up in a level over a long text.

    Of the periods measured 64 keeps a fact best. The rate stands between: 1 keeps more
    for 1 and 4 half-lives of the memory, 0.1 more for 16; new pairs are recalled as
    without (`experiments/consolidation.py`).
    """

    period: int = 64
    rate: float = 0.5
    half_life: float = 16384.0

    def __post_init__(self):
        if self.period < 1:
            raise ValueError(f"period must be at least 1 token, got {self.period}.")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must lie in [0, 1], got {self.rate}.")
        if not self.half_life > 0:
            raise ValueError(
                f"half_life must be a number of tokens above 0, got {self.half_life}."
            )
        if self.rate + self.returned > 1:
            raise ValueError(
                f"rate ({self.rate}) and what a move returns to the slower start, "
                f"1 - 2^(-period / half_life) = {self.returned:.3g}, must not exceed 1 "
                "together: use a lower rate or a longer half_life."
            )

    @property
    def returned(self) -> float:
        """Share of the way to the slower start that a move also takes it."""
        return -math.expm1(-math.log(2.0) * self.period / self.half_life)


def check(
    levels: Sequence[Consolidation], memory: MemoryConfig, chunk: int, name: str
) -> None:
    """Refuses levels that a memory has no use for.

    Args:
      levels: from fast to slow.
      memory: whose starts they are.
      chunk: tokens of a chunk of the layer.
      name: of the option that says `chunk`.
    """
    if not levels:
        return
    if memory.toward != "start" or form(memory) == "states":
        raise ValueError(
            "consolidate is about a memory that returns to its start, by a chunk form "
            f"that asks for it: it needs memory.toward='start', got {memory.toward!r} "
            f"with rule {memory.rule!r} and retention {memory.retention!r}."
        )
    for level in levels:
        if level.period % chunk:
            raise ValueError(
                f"consolidate's period ({level.period}) must be a multiple of {name} "
                f"({chunk})."
            )
    for a, b in itertools.pairwise(levels):
        if a.period > b.period:
            raise ValueError(
                "consolidate must be listed from fast to slow, got periods "
                f"{a.period} before {b.period}."
            )


def moving(levels: Sequence[Consolidation]) -> tuple[Consolidation, ...]:
    """Those that ever move, each of which has a start in the state."""
    return tuple(level for level in levels if level.rate > 0)


def with_starts(levels: Sequence[Consolidation], memory: MemoryState) -> MemoryState:
    """A memory at its start whose levels are all there too."""
    return memory._replace(starts=(memory.weights,) * len(moving(levels)))


def consolidate(
    levels: Sequence[Consolidation],
    memory: MemoryState,
    learned: Weights,
    position: Int[Array, " B"],
) -> MemoryState:
    """Moves the starts that are due.

    Args:
      levels: from fast to slow.
      memory: leaves lead with rows.
      learned: the start of all rows, leaves without them.
      position: tokens that each row has read.
    """
    chain = (memory.weights, *memory.starts)
    slower = [
        *memory.starts[1:],
        jax.tree.map(lambda w: w[None], learned),
    ]
    starts = []
    for i, level in enumerate(moving(levels)):
        due = Clock(period=level.period).moves(position)

        def move(start, fast, slow, level=level, due=due):
            moved = start + level.rate * (fast - start)
            moved = moved - level.returned * (start - slow)
            return jnp.where(due.reshape(-1, *[1] * (start.ndim - 1)), moved, start)

        starts.append(jax.tree.map(move, memory.starts[i], chain[i], slower[i]))
    return memory._replace(starts=tuple(starts))


def with_own_starts(tree: PyTree) -> tuple[MemoryState, ...]:
    """The memories in a state that have starts of their own."""
    nodes = jax.tree.leaves(tree, is_leaf=is_memory)
    return tuple(node for node in nodes if is_memory(node) and node.starts)


def starts_of(tree: PyTree) -> tuple[PyTree, ...]:
    """The starts of each of these."""
    return tuple(node.starts for node in with_own_starts(tree))


def is_memory(node: PyTree) -> bool:
    return isinstance(node, MemoryState)


def restarted(fresh: PyTree, old: PyTree, learned_again: bool) -> PyTree:
    """A state at the start of a text, `fresh`, whose memories begin at the starts that
    a reader has, those of `old`; or which has the memories of `old` and fresh starts.
    """

    def node(new, was):
        if not is_memory(new) or not new.starts:
            return was if learned_again else new
        if learned_again:
            return was._replace(starts=new.starts)
        # What a fresh memory is beyond its start, it was made before the text.
        weights = jax.tree.map(
            lambda start, w, first: start + (w - first),
            was.starts[0],
            new.weights,
            new.starts[0],
        )
        anchor = None if new.anchor is None else weights
        return new._replace(weights=weights, anchor=anchor, starts=was.starts)

    return jax.tree.map(node, fresh, old, is_leaf=is_memory)
