"""Titans: a neural memory beside attention, as its context, its gate or its layer.

arXiv:2501.00663. The memory is the paper's LMM (equations 11 to 15), a `MemoryMixer`;
attention is the short-term memory, and `persistent` learned vectors P, read by both,
hold what does not depend on the text (equation 19).

    context (21-25)   h = M at the segment's start, read at x
                      y = attention([P ‖ h ‖ segment]),  M learns y,  o = y ⊗ M(y)
    gate (26-28)      o = sliding attention([P ‖ x]) ⊗ M([P ‖ x])
    layer (29-31)     o = sliding attention(M([P ‖ x]))

What the paper leaves open is chosen so. `y ⊗ M` is `norm(y) ⊙ σ(norm(M))` in both
variants that have it, and an output projection follows. Attention to P knows no
position: its scores take the query before its rotation. As attention is causal, token t
sees `h` of the tokens up to t, at the positions of these tokens. P reaches the memory
as a text before the text, in chunks of its own, so that chunks of the text begin with
its first token; where the variant's attention is between text and memory (context) the
memory learns only what attention gives out.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hope_jax.core.config import at_least
from hope_jax.core.system import Edge
from hope_jax.kernels.select import scan_chunks, scan_padded
from hope_jax.memory.architecture import Weights
from hope_jax.memory.compose import MemoryConfig, Tokens
from hope_jax.memory.consolidation import Consolidation
from hope_jax.memory.gates import GateConfig
from hope_jax.memory.state import commit
from hope_jax.models.layers import (
    Tails,
    dense,
    rotary,
    where_rows,
)
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.base import MixerConfig, Part, recalling, softmax
from hope_jax.models.mixers.memory import (
    MemoryMixer,
    MemoryMixerConfig,
    MemoryMixerState,
    watch,
)
from hope_jax.optim.leaves import wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansConfig(MixerConfig):
    """What all three variants share.

    Attributes:
      kind: which one.
      memory: the neural memory.
      gates: how the memory's keys and rates are made. Values have unit norm, which the
        equations leave free: else long monotonous texts drive the weights far out.
      persistent: learned vectors before the text; 0 is none.
      conv: width of the memory's causal convolutions.
      consolidate: slower levels to which the memory returns, as of the mixer `memory`.
    """

    kind: str
    memory: MemoryConfig = MemoryConfig(
        architecture="mlp", bias="l2", retention="decay", rule="momentum", dgd="none"
    )
    gates: GateConfig = GateConfig(unit_values=True)
    persistent: int = 4
    conv: int = 4
    consolidate: tuple[Consolidation, ...] = ()

    even: ClassVar[bool] = True

    def __post_init__(self):
        at_least(self, persistent=0)
        self.layer()  # refuses a memory, gates and conv that do not fit

    def layer(self) -> MemoryMixerConfig:
        """The neural memory as a layer."""
        return MemoryMixerConfig(
            memory=self.memory,
            gates=self.gates,
            conv=self.conv,
            consolidate=self.consolidate,
        )

    def bare(self, state: "_State") -> "_State":
        return state._replace(memory=self.layer().bare(state.memory))

    def full(self, state: "_State") -> "_State":
        return state._replace(memory=self.layer().full(state.memory))

    @property
    def _short(self) -> str:
        return self.kind.removeprefix("titans_").upper()

    @property
    def parts(self) -> tuple[Part, ...]:
        memory = recalling(f"{self._short} memory", self.memory, "memory.start")
        return (memory, softmax(f"{self._short} attention"))

    @property
    def starts(self) -> tuple[Part, ...]:
        return self.layer().starts

    @property
    def memories(self) -> tuple[MemoryConfig, ...]:
        return (self.memory,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansContextConfig(TitansConfig):
    """Memory as context.

    Attributes:
      kind: its name.
      segment: tokens that attention sees at once, a multiple of `memory.chunk`; the
        memory is read where the segment begins.
    """

    kind: Literal["titans_mac"] = "titans_mac"
    segment: int = 64

    def __post_init__(self):
        super().__post_init__()
        at_least(self, segment=1)
        if self.segment % self.memory.chunk:
            raise ValueError(
                f"segment ({self.segment}) must be a multiple of memory.chunk "
                f"({self.memory.chunk})."
            )

    def build(self, d_model, heads, dtype, *, rngs) -> "MemoryAsContext":
        return MemoryAsContext(d_model, heads, self, dtype, rngs=rngs)

    @property
    def span(self) -> int:
        return self.segment

    def bare(self, state: "ContextState") -> "ContextState":
        return super().bare(state)._replace(start=None)

    def full(self, state: "ContextState") -> "ContextState":
        return super().full(state)._replace(start=state.memory.memory.weights)

    @property
    def edges(self) -> tuple[Edge, ...]:
        memory, attention = self.ends
        return (
            Edge(memory, attention, "generate"),
            Edge(attention, memory, "attend"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansWindowConfig(TitansConfig):
    """Memory as gate of attention, or as the layer below it.

    Attributes:
      kind: which of the two.
      window: tokens that attention looks back over.
    """

    kind: Literal["titans_mag", "titans_mal"]
    window: int = 64

    def __post_init__(self):
        super().__post_init__()
        at_least(self, window=1)

    def build(self, d_model, heads, dtype, *, rngs) -> "MemoryAsGate | MemoryAsLayer":
        module = MemoryAsGate if self.kind == "titans_mag" else MemoryAsLayer
        return module(d_model, heads, self, dtype, rngs=rngs)

    @property
    def span(self) -> int:
        return self.layer().span

    @property
    def ends(self) -> tuple[str, ...]:
        names = super().ends
        return names if self.kind == "titans_mag" else names[1:]

    @property
    def edges(self) -> tuple[Edge, ...]:
        if self.kind == "titans_mag":
            return ()
        memory, attention = self.parts
        return (Edge(memory.name, attention.name, "generate"),)


class Pairs(NamedTuple):
    """Keys and values of attention."""

    k: Float[Array, "*B S H K"]
    v: Float[Array, "*B S H K"]


class Heads(nnx.Module):
    """The projections of attention: queries, keys and values `[B, T, H, K]`."""

    def __init__(self, d_model: int, heads: int, dtype, *, rngs: nnx.Rngs):
        if d_model % heads or (d_model // heads) % 2:
            raise ValueError(
                f"d_model ({d_model}) must be an even multiple of heads ({heads}), for "
                "rotary positions."
            )
        self.heads, self.width, self.dtype = heads, d_model // heads, dtype
        self.q = dense(d_model, d_model, dtype, rngs)
        self.k = dense(d_model, d_model, dtype, rngs)
        self.v = dense(d_model, d_model, dtype, rngs)

    def query(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H K"]:
        return self._split(self.q(x))

    def pairs(
        self, x: Float[Array, "B T D"], position: Int[Array, "B T"] | None = None
    ) -> Pairs:
        """Keys and values; keys are rotated where they have a position."""
        k, v = self._split(self.k(x)), self._split(self.v(x))
        return Pairs(k if position is None else rotary(k, position), v)

    def empty(self, *shape: int) -> Pairs:
        zeros = jnp.zeros((*shape, self.heads, self.width), self.dtype)
        return Pairs(zeros, zeros)

    def _split(self, x):
        return x.reshape(*x.shape[:2], self.heads, self.width)


def attend(
    q: Float[Array, "B T H K"],
    position: Int[Array, "B T"],
    near: Pairs,
    visible: Bool[Array, "B T S"],
    persistent: Pairs,
) -> Float[Array, "B T D"]:
    """Softmax attention over the visible ones of `near` and all persistent pairs.

    `q` is not yet rotated to its `position`, `near` is; persistent pairs have none.
    """

    def score(q, k):
        product = wide(jnp.einsum("bthk,bshk->bhts", q, k))
        return q.shape[-1] ** -0.5 * product

    close = jnp.where(visible[:, None], score(rotary(q, position), near.k), -jnp.inf)
    weight = jnp.concatenate([score(q, persistent.k), close], axis=-1)
    weight = jax.nn.softmax(weight, axis=-1).astype(q.dtype)
    values = jnp.concatenate([persistent.v, near.v], axis=1)
    y = jnp.einsum("bhts,bshk->bthk", weight, values)
    return y.reshape(*y.shape[:2], -1)


def slide(
    heads: Heads,
    x: Float[Array, "B T D"],
    last: Pairs,
    position: Int[Array, " B"],
    persistent: Float[Array, "B P D"],
) -> tuple[Float[Array, "B T D"], Pairs]:
    """Sliding-window attention with persistent tokens, in blocks of one window.

    Args:
      heads: the projections.
      x: T tokens.
      last: the `W` pairs before them, the newest at the end; a token sees itself and
        the `W - 1` tokens before it.
      position: tokens read before x.
      persistent: what every token sees.

    Returns:
      The reads, and the W pairs at the end of x.
    """
    rows, length, _ = x.shape
    window = last.k.shape[1]
    block = min(window, length)
    count = -(-length // block)
    at = position[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    pairs = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=1), last, heads.pairs(x, at)
    )

    def blocks(a):  # [B, n, ...] -> [B, N, block, ...]
        short = -a.shape[1] % block
        a = jnp.pad(a, [(0, 0), (0, short)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(rows, -1, block, *a.shape[2:])

    def reach(a):  # [B, W + T, ...] -> [B, N, W + block, ...]
        if count == 1:
            return a[:, None]
        a = blocks(a)
        return jnp.concatenate([a[:, :-1], a[:, 1:]], axis=2)

    slot = jnp.arange(window + block, dtype=jnp.int32) - window
    age = jnp.arange(block, dtype=jnp.int32)[:, None] - slot[None]
    first = position[:, None] + block * jnp.arange(count, dtype=jnp.int32)[None]
    real = first[:, :, None] + slot[None, None] >= 0
    visible = ((age >= 0) & (age < window))[None, None] & real[:, :, None]
    y = jax.vmap(attend, (1, 1, 1, 1, None), 1)(
        blocks(heads.query(x)),
        blocks(at),
        jax.tree.map(reach, pairs),
        visible,
        heads.pairs(persistent),
    )
    y = y.reshape(rows, count * block, -1)[:, :length]
    return y, jax.tree.map(lambda a: a[:, length:], pairs)


class ContextState(NamedTuple):
    """Where a context layer stands; its size does not depend on the tokens read.

    Attributes:
      memory: the memory, which has learned as many tokens as were read.
      start: its weights where the segment began, leaves `[B, H, ...]`; None where that
        is known to be here.
      tails: the last inputs of its convolutions when it reads x.
      pairs: keys and values of the segment so far, of h and of x; places not yet
        reached hold those of the segment before.
    """

    memory: MemoryMixerState
    start: Weights | None
    tails: Tails
    pairs: Pairs


class MemoryAsContext(nnx.Module):
    """MAC: `y, state = layer(x, state)`.

    Without `persistent` tokens and with a memory that recalls zero, attention inside
    blocks of `segment` tokens, gated by a constant.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        config: TitansContextConfig,
        dtype,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.heads = Heads(d_model, heads, dtype, rngs=rngs)
        self.memory = MemoryMixer(d_model, heads, config.layer(), dtype, rngs=rngs)
        self.persistent = _persistent(d_model, config, rngs)
        self.join = Gated(d_model, dtype, rngs=rngs)

    def initial_state(self, rows: int) -> ContextState:
        memory = self.memory.initial_state(rows)
        pairs = self.heads.empty(rows, 2, self.config.segment)
        return ContextState(memory, memory.memory.weights, memory.tails, pairs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: ContextState | None = None,
        *,
        aligned: bool | None = None,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], ContextState]:
        """Reads T >= 1 tokens a row.

        Args:
          x: the block's normalised input.
          state: where each row stands; None is `initial_state`.
          aligned: promises that every row stands at a multiple of `segment`, and reads
            segments in parallel; by default true for a fresh state only. Else the
            tokens are read one by one in a scan.
          learn: False keeps the memory at its state.
        """
        aligned = state is None if aligned is None else aligned
        if state is None:
            state = self.initial_state(x.shape[0])

        def read(state, tokens, count):
            x = jnp.moveaxis(tokens, 0, 1)
            y, state = self._read(x, state, aligned, learn, count)
            return state, jnp.moveaxis(y, 1, 0)

        chunk = self.config.segment if aligned else 1
        state, y = scan_padded(read, chunk, state, jnp.moveaxis(x, 1, 0), remat=aligned)
        return jnp.moveaxis(y, 0, 1), state

    def watch(
        self,
        x: Float[Array, "B T D"],
        state: ContextState,
        *,
        aligned: bool,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], ContextState, tuple[Tokens]]:
        """A call, and what the memory was given: what attention says."""

        def read(state, tokens):
            x = jnp.moveaxis(tokens, 0, 1)
            said, *_ = self._attend(x, state, aligned)
            y, state = self._read(x, state, aligned, learn)
            return state, (jnp.moveaxis(said, 1, 0), jnp.moveaxis(y, 1, 0))

        chunk, xs = self.config.segment if aligned else 1, jnp.moveaxis(x, 1, 0)
        after, made = scan_chunks(read, read, chunk, state, xs)
        said, y = (jnp.moveaxis(a, 0, 1) for a in made)
        return y, after, (self.memory.tokens(said, state.memory)[0],)

    def _read(self, x, state, aligned, learn, count=None):
        """Tokens from a segment's start on, `count` of them, or one token anywhere."""
        y, start, tails, pairs = self._attend(x, state, aligned, count)
        recalled, memory = self.memory(
            y, state.memory, aligned=aligned, learn=learn, count=count
        )
        return self.join(y, recalled), ContextState(memory, start, tails, pairs)

    def _attend(self, x, state, aligned, count=None):
        """What attention says of these tokens, and what the state is then but for the
        memory, which that is given."""
        rows, length, _ = x.shape
        segment, memory = self.config.segment, state.memory
        slot = memory.position % segment
        if aligned:
            start = memory.memory.weights
        else:
            start = where_rows(slot == 0, memory.memory.weights, state.start)

        anchor = None if memory.memory.anchor is None else start
        reader = memory._replace(
            memory=memory.memory._replace(weights=start, anchor=anchor),
            tails=state.tails,
        )
        h, reader = self.memory(x, reader, learn=False, count=count)

        at = slot[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        place = jnp.arange(segment, dtype=jnp.int32)

        def put(old, *new):
            new = jnp.stack(new, axis=1)
            if count is None and aligned:
                return jnp.concatenate([new, old[:, :, length:]], axis=2)
            if count is not None:
                there = (place < count)[None, None, :, None, None]
                return jnp.where(there, new, old)
            here = place[None] == slot[:, None]
            return jnp.where(here[:, None, :, None, None], new, old)

        pairs = jax.tree.map(
            put, state.pairs, self.heads.pairs(h, at), self.heads.pairs(x, at)
        )
        visible = place[None, None] <= at[:, :, None]
        y = attend(
            self.heads.query(x),
            at,
            jax.tree.map(lambda a: a.reshape(rows, -1, *a.shape[3:]), pairs),
            jnp.concatenate([visible, visible], axis=-1),
            self.heads.pairs(_rows(self.persistent[...], rows)),
        )
        return y, start, reader.tails, pairs


class GateState(NamedTuple):
    """Where a gate layer stands; its size does not depend on the tokens read.

    Attributes:
      memory: the memory after the persistent tokens and the text read.
      window: the last keys and values of attention.
    """

    memory: MemoryMixerState
    window: Pairs


class MemoryAsGate(nnx.Module):
    """MAG: `y, state = layer(x, state)`: sliding attention, gated by the memory."""

    def __init__(
        self,
        d_model: int,
        heads: int,
        config: TitansWindowConfig,
        dtype,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.heads = Heads(d_model, heads, dtype, rngs=rngs)
        self.memory = MemoryMixer(d_model, heads, config.layer(), dtype, rngs=rngs)
        self.persistent = _persistent(d_model, config, rngs)
        self.join = Gated(d_model, dtype, rngs=rngs)

    def initial_state(self, rows: int) -> GateState:
        _, memory = _after_persistent(self.memory, self.persistent[...], rows)
        return GateState(memory, self.heads.empty(rows, self.config.window))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: GateState | None = None,
        *,
        aligned: bool | None = None,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], GateState]:
        """Reads T >= 1 tokens a row; see the memory's mixer for `aligned` and `learn`,
        of which attention knows nothing."""
        aligned = state is None if aligned is None else aligned
        if state is None:
            state = self.initial_state(x.shape[0])
        persistent = _rows(self.persistent[...], x.shape[0])
        y, window = slide(
            self.heads, x, state.window, state.memory.position, persistent
        )
        recalled, memory = self.memory(x, state.memory, aligned=aligned, learn=learn)
        return self.join(y, recalled), GateState(memory, window)

    watch = watch


class LayerState(NamedTuple):
    """Where a memory-before-attention layer stands; of constant size.

    Attributes:
      memory: the memory after the persistent tokens and the text read.
      persistent: what it gave for the persistent tokens.
      window: the last keys and values of attention.
    """

    memory: MemoryMixerState
    persistent: Float[Array, "B P D"]
    window: Pairs


class MemoryAsLayer(nnx.Module):
    """MAL: `y, state = layer(x, state)`: sliding attention over the memory's reads.

    Attention sees what the memory gave for the persistent tokens.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        config: TitansWindowConfig,
        dtype,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.heads = Heads(d_model, heads, dtype, rngs=rngs)
        self.memory = MemoryMixer(d_model, heads, config.layer(), dtype, rngs=rngs)
        self.persistent = _persistent(d_model, config, rngs)
        self.out = dense(d_model, d_model, dtype, rngs, scale=0.5)

    def initial_state(self, rows: int) -> LayerState:
        persistent, memory = _after_persistent(self.memory, self.persistent[...], rows)
        window = self.heads.empty(rows, self.config.window)
        return LayerState(memory, persistent, window)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LayerState | None = None,
        *,
        aligned: bool | None = None,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], LayerState]:
        """Reads T >= 1 tokens a row; see the memory's mixer for `aligned` and `learn`,
        of which attention knows nothing."""
        aligned = state is None if aligned is None else aligned
        if state is None:
            state = self.initial_state(x.shape[0])
        position = state.memory.position
        y, memory = self.memory(x, state.memory, aligned=aligned, learn=learn)
        y, window = slide(self.heads, y, state.window, position, state.persistent)
        return self.out(y), LayerState(memory, state.persistent, window)

    watch = watch


_State = TypeVar("_State", ContextState, GateState, LayerState)


class Gated(nnx.Module):
    """`W (norm(y) ⊙ σ(norm(recalled)))`, with a learned gain in each norm."""

    def __init__(self, d_model: int, dtype, *, rngs: nnx.Rngs):
        self.norm_y = nnx.RMSNorm(d_model, dtype=dtype, rngs=rngs)
        self.norm_recalled = nnx.RMSNorm(d_model, dtype=dtype, rngs=rngs)
        self.out = dense(d_model, d_model, dtype, rngs, scale=0.5)

    def __call__(self, y: Float[Array, "B T D"], recalled: Float[Array, "B T D"]):
        return self.out(self.norm_y(y) * jax.nn.sigmoid(self.norm_recalled(recalled)))


def _persistent(d_model: int, config: TitansConfig, rngs: nnx.Rngs) -> nnx.Param:
    """Vectors as long as the block's normalised tokens."""
    return nnx.Param(jax.random.normal(rngs.params(), (config.persistent, d_model)))


def _rows(x: Float[Array, "P D"], rows: int) -> Float[Array, "B P D"]:
    return jnp.broadcast_to(x[None], (rows, *x.shape))


def _after_persistent(
    mixer: MemoryMixer, persistent: Float[Array, "P D"], rows: int
) -> tuple[Float[Array, "B P D"], MemoryMixerState]:
    """What the memory gives for the persistent tokens and where it stands after them:
    at the start of a chunk, about to read token 0."""
    if not persistent.shape[0]:
        return _rows(persistent, rows), mixer.initial_state(rows)
    y, state = mixer(persistent[None])
    memory = jax.vmap(jax.vmap(commit))(state.memory)
    state = state._replace(memory=memory, position=jnp.zeros_like(state.position))
    return jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), (y, state))
