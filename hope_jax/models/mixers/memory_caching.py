"""Memory Caching: a memory whose states at the ends of segments are kept and read.

arXiv:2602.24281. A row is cut into segments; when one ends, the weights of the memory
are put into a cache, and a query is answered by the live memory of segment s and by
those that are kept, M_1 .. M_{s-1}:

    residual   y = M(q) + Σᵢ Mᵢ(q)                                  (equation 7)
    gated      y = γˢ M(q) + Σᵢ γⁱ Mᵢ(q),   γ = softmaxᵢ ⟨u, mean(Sⁱ)⟩,  u = W_u x
                                                                     (equations 9, 10)
    sparse     the same over the live one and the `top` of largest ⟨u, mean(Sⁱ)⟩
                                                                     (equations 16, 17)

What the memory is, and what a layer is around it, is as in `models.mixers.memory`.

The cache grows with the text, and a state here does not: there is room for `context`
tokens, and a row that reads beyond them is refused. What the paper leaves open is
chosen so: S is what the block reads; the mean of the live segment is that of its tokens
so far, for a token sees no later one; the softmax of `sparse` is over what is read; the
outer gradient goes through the cache. All kept memories are read for all queries, and
those that `sparse` leaves out count zero: it is a choice of function here, not yet one
of speed. Memory soups (equation 15), which differ from `gated` for memories that are
not linear, need the weights at every token and are not built.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from hope_jax.core.config import at_least, one_of, refuse_unread
from hope_jax.core.system import Edge
from hope_jax.kernels.select import scan_chunks
from hope_jax.memory.architecture import Weights
from hope_jax.memory.compose import MemoryConfig, build_architecture
from hope_jax.memory.gates import GateConfig
from hope_jax.models import learning
from hope_jax.models.layers import dense, where_rows
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.base import MixerConfig, Part, recalling
from hope_jax.models.mixers.memory import (
    MemoryMixer,
    MemoryMixerConfig,
    MemoryMixerState,
    watch,
)
from hope_jax.optim.leaves import wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryCachingConfig(MixerConfig):
    """A memory and its cache.

    Attributes:
      kind: its name.
      memory: the memory; Titans', which the paper finds best, by default.
      gates: how its keys and rates are made.
      conv: width of its causal convolutions.
      segment: tokens after which its weights are kept, a multiple of `memory.chunk`.
      context: most tokens of a row, a multiple of `segment`, at least two of them. No
        parameter has its shape.
      aggregate: `residual`, `gated` or `sparse`.
      top: kept memories that `sparse` reads at each token.
      writes: `checkpoints`, one memory that goes on from segment to segment, or
        `independent`: each segment's begins anew at the learned start.
    """

    kind: Literal["memory_caching"] = "memory_caching"
    memory: MemoryConfig = MemoryConfig(
        architecture="mlp", bias="l2", retention="decay", rule="momentum", dgd="none"
    )
    gates: GateConfig = GateConfig(unit_values=True)
    conv: int = 4
    segment: int = 64
    context: int = 1024
    aggregate: Literal["residual", "gated", "sparse"] = "gated"
    top: int = 4
    writes: Literal["checkpoints", "independent"] = "checkpoints"

    def __post_init__(self):
        at_least(self, segment=1, context=1, top=1)
        one_of(
            self,
            aggregate=("residual", "gated", "sparse"),
            writes=("checkpoints", "independent"),
        )
        self.layer()  # refuses a memory, gates and conv that do not fit
        if self.segment % self.memory.chunk:
            raise ValueError(
                f"segment ({self.segment}) must be a multiple of memory.chunk "
                f"({self.memory.chunk})."
            )
        if self.context % self.segment or self.context < 2 * self.segment:
            raise ValueError(
                f"context ({self.context}) must be a multiple of segment "
                f"({self.segment}), at least two; a memory without a cache is the "
                "mixer `memory`."
            )
        refuse_unread(self, "top", "aggregate", self.aggregate, ("sparse",))
        if self.aggregate == "sparse" and self.top > self.kept:
            raise ValueError(
                f"top ({self.top}) must be at most the {self.kept} memories that are "
                "kept: use aggregate='gated', or a longer context."
            )

    @property
    def kept(self) -> int:
        """Most memories in the cache; nobody is left to read that of the last
        segment."""
        return self.context // self.segment - 1

    @property
    def most(self) -> int:
        return self.context

    def layer(self) -> MemoryMixerConfig:
        """The memory as a layer."""
        return MemoryMixerConfig(memory=self.memory, gates=self.gates, conv=self.conv)

    def build(self, d_model, heads, dtype, *, rngs) -> "MemoryCaching":
        return MemoryCaching(d_model, heads, self, dtype, rngs=rngs)

    @property
    def even(self) -> bool:
        return self.layer().even

    @property
    def span(self) -> int:
        return self.segment

    @property
    def parts(self) -> tuple[Part, ...]:
        objective = "gates of segments"
        if self.aggregate == "residual":
            objective = "sum over segments"
        cache = Part("cache of memories", 0, objective, self.aggregate)
        return (recalling("cached memory", self.memory, "memory.start"), cache)

    @property
    def memories(self) -> tuple[MemoryConfig, ...]:
        return (self.memory,)

    @property
    def edges(self) -> tuple[Edge, ...]:
        memory, cache = self.parts
        return (Edge(memory.name, cache.name, "generate"),)

    def bare(self, state: "MemoryCachingState") -> "MemoryCachingState":
        return state._replace(memory=self.layer().bare(state.memory))

    def full(self, state: "MemoryCachingState") -> "MemoryCachingState":
        return state._replace(memory=self.layer().full(state.memory))


class Context(NamedTuple):
    """What the gates know of segments: means of what the block read, float32.

    Attributes:
      means: of the segments that are kept.
      live: the sum over the tokens of the live one.
    """

    means: Float[Array, "B S D"]
    live: Float[Array, "B D"]


class MemoryCachingState(NamedTuple):
    """Where a layer stands; of constant size, with room for all segments of a row.

    Attributes:
      memory: the live memory.
      weights: those that are kept, leaves `[B, H, S, ...]`, float32.
      filled: whether a place of the cache is taken: not if its segment was read
        without learning.
      context: for the gates; None without them.
    """

    memory: MemoryMixerState
    weights: Weights
    filled: Bool[Array, "B S"]
    context: Context | None


class MemoryCaching(nnx.Module):
    """The layer: `y, state = layer(x, state)`."""

    def __init__(
        self,
        d_model: int,
        heads: int,
        config: MemoryCachingConfig,
        dtype,
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.d_model = config, d_model
        self.memory = MemoryMixer(d_model, heads, config.layer(), dtype, rngs=rngs)
        gated = config.aggregate != "residual"
        self.asks = dense(d_model, d_model, None, rngs) if gated else None

    def initial_state(self, rows: int) -> MemoryCachingState:
        """Every row at the learned memories, nothing kept."""
        memory, kept = self.memory.initial_state(rows), self.config.kept
        context = None
        if self.asks is not None:
            means = jnp.zeros((rows, kept, self.d_model), jnp.float32)
            context = Context(means, jnp.zeros((rows, self.d_model), jnp.float32))

        def room(w):
            return jnp.zeros((*w.shape[:2], kept, *w.shape[2:]), w.dtype)

        weights = jax.tree.map(room, memory.memory.weights)
        return MemoryCachingState(
            memory, weights, jnp.zeros((rows, kept), bool), context
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MemoryCachingState | None = None,
        *,
        aligned: bool | None = None,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], MemoryCachingState]:
        """Reads T >= 1 tokens a row.

        Args:
          x: the block's normalised input.
          state: where each row stands; None is `initial_state`.
          aligned: promises that every row stands at a multiple of `segment`, and reads
            segments in parallel; by default true for a fresh state only. Else the
            tokens are read one by one in a scan.
          learn: False keeps the memory at its state, and nothing more in the cache.

        Raises:
          ValueError: a row would read more than `context` tokens. Inside `jit`, where
            its place cannot be looked at, what it reads beyond them is NaN.
        """
        aligned = state is None if aligned is None else aligned
        if state is None:
            state = self.initial_state(x.shape[0])
        position, most = state.memory.position, x.shape[1]
        if not isinstance(position, Tracer):
            most += int(jnp.max(position))
        if most > self.config.context:
            raise ValueError(
                f"a row of {most} tokens is longer than context "
                f"({self.config.context}), for which the cache has room: raise "
                "model.mixer.context; no parameter has its shape."
            )

        def read(state, tokens):
            y, state = self._read(jnp.moveaxis(tokens, 0, 1), state, aligned, learn)
            return state, jnp.moveaxis(y, 1, 0)

        size = self.config.segment if aligned else 1
        state, y = scan_chunks(
            read, read, size, state, jnp.moveaxis(x, 1, 0), remat=aligned
        )
        y = jnp.moveaxis(y, 0, 1)
        place = position[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        inside = place < self.config.context
        return jnp.where(inside[:, :, None], y, jnp.nan).astype(y.dtype), state

    watch = watch

    def _read(self, x, state, aligned, learn):
        """Tokens of a segment from its start on, or one token anywhere."""
        config, memory, length = self.config, state.memory, x.shape[1]
        learns = learning.of(learn).main
        slot = memory.position % config.segment
        if config.writes == "independent" and learns:
            fresh = self.memory.initial_state(x.shape[0]).memory
            fresh = where_rows(slot == 0, fresh, memory.memory)
            memory = memory._replace(memory=fresh)
        tokens, y, after = self.memory.lives(x, memory, aligned, learn)

        gates, context = self._gates(x, state, slot)
        with jax.default_matmul_precision("float32"):
            ask = build_architecture(config.memory, self.memory.width).apply
            ask = jax.vmap(jax.vmap(jax.vmap(ask, (0, None))))  # rows, heads, cache
            recalled = ask(state.weights, tokens.q)
        y = y * gates[:, None, :, -1:]
        y = y + jnp.einsum("bhstv,bts->bhtv", recalled, gates[..., :-1])

        # A segment that ends here is kept, and known by its mean.
        ends = after.position % config.segment == 0
        if aligned and length < config.segment:
            ends = jnp.zeros_like(ends)
        places = jnp.arange(config.kept, dtype=jnp.int32)[None]
        here = ends[:, None] & (places == (memory.position // config.segment)[:, None])
        filled, weights = state.filled, state.weights
        if learns:
            filled = filled | here
            weights = jax.tree.map(
                lambda old, new: jnp.where(
                    here.reshape(here.shape[0], 1, -1, *[1] * (old.ndim - 3)),
                    new[:, :, None],
                    old,
                ),
                weights,
                after.memory.weights,
            )
        if context is not None:
            mean = context.live / config.segment
            means = jnp.where(here[:, :, None], mean[:, None], context.means)
            live = jnp.where(ends[:, None], 0.0, context.live)
            context = Context(means, live)
        y = self.memory.said(x, y)
        return y, MemoryCachingState(after, weights, filled, context)

    def _gates(self, x, state, slot):
        """Of each token the weights of all that is kept, and last of the live memory,
        `[B, T, S + 1]`; and the context with its tokens in the live segment."""
        x = wide(x)
        filled = state.filled[:, None]
        if self.asks is None:
            shape = (*x.shape[:2], self.config.kept)
            kept = jnp.broadcast_to(filled, shape).astype(x.dtype)
            return jnp.concatenate([kept, jnp.ones_like(kept[..., :1])], axis=-1), None
        so_far = state.context.live[:, None].astype(x.dtype) + jnp.cumsum(x, axis=1)
        count = slot[:, None] + jnp.arange(1, x.shape[1] + 1, dtype=jnp.int32)[None]
        live = so_far / count[:, :, None].astype(x.dtype)
        with jax.default_matmul_precision("float32"):
            u = self.asks(x)
            means = state.context.means.astype(x.dtype)
            scores = jnp.einsum("btd,bsd->bts", u, means)
            own = jnp.sum(u * live, axis=-1, keepdims=True)
        seen = jnp.broadcast_to(filled, scores.shape)
        if self.config.aggregate == "sparse":
            _, best = jax.lax.top_k(jnp.where(seen, scores, -jnp.inf), self.config.top)
            chosen = jax.nn.one_hot(best, scores.shape[-1], dtype=bool)
            seen = seen & jnp.any(chosen, axis=-2)
        scores = jnp.where(seen, scores, -jnp.inf)
        gates = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)
        live = so_far[:, -1].astype(jnp.float32)
        return gates, state.context._replace(live=live)
