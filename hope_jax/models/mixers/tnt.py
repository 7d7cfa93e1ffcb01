"""TNT: one global memory over long chunks, local memories that restart every shard.

arXiv:2511.07343. A memory trained over long chunks is fast and coarse, over short ones
slow and fine; TNT trains both kinds at once. For each head, with N local memories,

    V_{n+1} = V_n − Σ_{t in chunk n} ηₜ ∇ℓ(V_n; kₜ, vₜ)                    (equation 5)
    Wₜ = W_anchor − Σ_{τ ≤ t} ητ ∇ℓ(W_anchor; kτ, vτ),   W = W_init at a shard's start
                                                                         (equation 6)
    yₜ = f(V_n, qₜ) + Σᵢ f(W⁽ⁱ⁾ₜ, Πₜ qₜ),   Πₜ = Σ_τ kτ kτᵀ / ‖kτ‖²         (equation 7)

where the sum of Π runs over the tokens of the shard up to t. Only the global memory
ties one shard to the next and nobody reads it before its chunk ends, so all whole
shards of a text are read in parallel. Π is a linear attention whose values are its
keys: a matrix a stream, never one a token.

What the paper leaves open is chosen so: all memories share k, v and q and their shard;
rates are data dependent and bounded by one over the memory's chunk, as sums of anchored
gradients diverge beyond two; k, v and q pass a convolution and SiLU, and keys and
queries get unit norm; the sum of the reads is normalised and gated.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from hope_jax.core.config import at_least, one_of
from hope_jax.kernels.chunk import piece
from hope_jax.kernels.select import memory_scan
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_architecture,
    half_life_to_retention,
)
from hope_jax.memory.state import MemoryState, begin_memory, commit
from hope_jax.models import learning
from hope_jax.models.layers import (
    CausalConv,
    Tails,
    dense,
    first_half_lives,
    unit,
    where_rows,
)
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.base import UNCUT, MixerConfig, Part, recalling
from hope_jax.models.mixers.memory import Gate
from hope_jax.models.share import Share
from hope_jax.optim.leaves import wide

_KEY_SPACE = MemoryConfig(  # Π: a Hebbian matrix, for which the chunk is a speed knob
    architecture="linear",
    bias="dot",
    rule="gd",
    dgd="none",
    retention="none",
    gradient="exact",
    chunk=64,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TNTConfig(MixerConfig):
    """Sizes and switches of the layer.

    Attributes:
      kind: its name.
      memory: what all memories are, but for `chunk` and `read`: the hierarchy sets
        them.
      global_chunk: tokens per chunk of the global memory.
      local_chunks: tokens per chunk of each local memory, divisors of `shard`.
      shard: tokens after which local memories restart; it divides `global_chunk` or is
        a multiple of it.
      rates: bound on the inner rate of the global and of each local memory; None is one
        over each memory's chunk.
      projection: what a local memory is asked: Π q as printed, a `sum` over the shard
        which grows with it; its direction, of `unit` norm; or the query itself, `none`
        (21.04 becomes 22.01 in the paper's ablation).
      conv: width of the causal convolution after k, v and q.
      unit_values: gives values unit norm, as keys have. The equations leave them free;
        a memory without retention then overflows on long monotonous texts.
    """

    kind: Literal["tnt"] = "tnt"
    memory: MemoryConfig = MemoryConfig(
        architecture="mlp", bias="l2", rule="gd", dgd="none", retention="none"
    )
    global_chunk: int = 256
    local_chunks: tuple[int, ...] = (8, 16)
    shard: int = 64
    rates: tuple[float, ...] | None = None
    projection: Literal["sum", "unit", "none"] = "sum"
    conv: int = 4
    unit_values: bool = True

    def __post_init__(self):
        memory = self.memory
        if memory.returns or memory.rate_law != "token":
            raise ValueError(
                "memory: TNT resets its memories to their start and bounds their rates "
                "itself: use toward='zero', erases='all' and rate_law='token', got "
                f"{memory.toward!r}, {memory.erases!r}, {memory.rate_law!r}."
            )
        for name in ("chunk", "read"):
            value = getattr(memory, name)
            if value != getattr(MemoryConfig, name):
                raise ValueError(
                    f"memory.{name} is set by the hierarchy, got {value!r}: leave it, "
                    "and set global_chunk and local_chunks."
                )
        at_least(self, global_chunk=1, shard=1, conv=1)
        if not self.local_chunks:
            raise ValueError(
                "local_chunks must name at least one chunk; without a local memory, "
                "use the memory itself as the mixer."
            )
        for chunk in self.local_chunks:
            if chunk < 1 or self.shard % chunk:
                raise ValueError(
                    f"shard ({self.shard}) must be a multiple of every local chunk, "
                    f"got local_chunks={self.local_chunks}."
                )
        if max(self.shard, self.global_chunk) % min(self.shard, self.global_chunk):
            raise ValueError(
                f"global_chunk ({self.global_chunk}) and shard ({self.shard}) must "
                "nest: one a multiple of the other."
            )
        if memory.gradient != "anchored":
            raise ValueError(
                f"memory.gradient must be 'anchored', got {memory.gradient!r}: the "
                "global memory is read where its chunk began."
            )
        found = memory.chosen
        if not (found.features.plain and found.retention.uniform):
            raise ValueError(
                "memory needs features='none' and retention 'none' or 'decay', got "
                f"{memory.features!r} and {memory.retention!r}."
            )
        one_of(self, projection=("sum", "unit", "none"))
        if self.rates is not None:
            if len(self.rates) != self.count or not all(0 < r <= 1 for r in self.rates):
                raise ValueError(
                    f"rates must hold {self.count} bounds in (0, 1], the global "
                    f"memory's first, got {self.rates}."
                )

    controlled: ClassVar[bool] = False

    def build(self, d_model, heads, dtype, *, rngs) -> "TNT":
        return TNT(d_model, heads, self, dtype, rngs=rngs)

    @property
    def parts(self) -> tuple[Part, ...]:
        locals_ = (f"TNT local memory {i + 1}" for i in range(len(self.local_chunks)))
        names = ("TNT global memory", *locals_)
        return tuple(
            recalling(name, memory, f"starts.{i}")
            for i, (name, memory) in enumerate(zip(names, self.memories, strict=True))
        )

    @property
    def count(self) -> int:
        """Memories of a head."""
        return 1 + len(self.local_chunks)

    @property
    def span(self) -> int:
        """Tokens after which all clocks stand at a boundary."""
        return max(self.shard, self.global_chunk)

    def unshared(self, tokens: int, devices: int) -> str:
        if self.global_chunk < tokens:
            return (
                f"has a global memory, which moves inside a row of {tokens} tokens: "
                f"{UNCUT}, or a global_chunk of {tokens} or more, got "
                f"{self.global_chunk}"
            )
        own = tokens // devices
        if own % self.shard:
            return (
                f"has shards of {self.shard} tokens, which must divide a device's {own}"
                " tokens of a row: use fewer devices, longer rows or a shorter shard"
            )
        return ""

    @property
    def memories(self) -> tuple[MemoryConfig, ...]:
        """Each memory complete, the global one first."""
        set_up = functools.partial(dataclasses.replace, self.memory)
        local = (set_up(chunk=chunk, read="post") for chunk in self.local_chunks)
        return (set_up(chunk=self.global_chunk, read="anchor"), *local)

    @property
    def rate_bounds(self) -> tuple[float, ...]:
        if self.rates is not None:
            return self.rates
        return tuple(1.0 / chunk for chunk in (self.global_chunk, *self.local_chunks))

    @property
    def gates(self) -> tuple[str, ...]:
        """The data-dependent numbers that each memory takes from a token."""
        gates = ("eta",)
        gates += ("alpha",) * self.memory.chosen.retention.decays
        return gates + ("theta",) * self.memory.inertia


def stage2(config: TNTConfig, local_chunks: tuple[int, ...]) -> TNTConfig:
    """The second stage of training: finer local memories, the parameters of the first.

    The paper trains some 5 % longer with smaller local chunks, ideally one token. The
    bounds on the inner rates stay those of the first stage, so that only the chunks
    change what the layer computes.
    """
    local_chunks = tuple(local_chunks)
    if len(local_chunks) != len(config.local_chunks):
        raise ValueError(
            f"local_chunks must keep the {len(config.local_chunks)} local memories of "
            f"the first stage, got {local_chunks}."
        )
    for new, old in zip(local_chunks, config.local_chunks, strict=True):
        if new > old:
            raise ValueError(
                f"local_chunks must not exceed the first stage's {config.local_chunks},"
                f" got {local_chunks}."
            )
    return dataclasses.replace(
        config, local_chunks=local_chunks, rates=config.rate_bounds
    )


class TNTState(NamedTuple):
    """Where a layer stands; its size does not depend on the tokens read.

    Attributes:
      memories: the global memory and each local one, leaves `[B, H, ...]`.
      key_space: Π of the shard so far, float32.
      tails: the last inputs of the convolutions of k, v and q.
      position: tokens read, int32.
    """

    memories: tuple[MemoryState, ...]
    key_space: Float[Array, "B H K K"]
    tails: Tails
    position: Int[Array, " B"]


class TNT(nnx.Module):
    """The layer: `y, state = layer(x, state)`.

    A shard's memories stay in the state until the next shard's first token, which
    starts from `starts`, the learned weights of each memory, leaves `[H, ...]`.
    """

    def __init__(
        self, d_model: int, heads: int, config: TNTConfig, dtype, *, rngs: nnx.Rngs
    ):
        if d_model % heads:
            raise ValueError(
                f"d_model ({d_model}) must be a multiple of heads ({heads})."
            )
        self.config, self.heads, self.width = config, heads, d_model // heads
        self.d_model, self.dtype = d_model, dtype
        init = build_architecture(config.memory, self.width).init
        keys = jax.random.split(rngs.params(), (config.count, heads))
        self.starts = nnx.data(
            [{n: nnx.Param(w) for n, w in jax.vmap(init)(k).items()} for k in keys]
        )
        self.k = dense(d_model, d_model, dtype, rngs)
        self.v = dense(d_model, d_model, dtype, rngs)
        self.q = dense(d_model, d_model, dtype, rngs)
        self.conv_k = CausalConv(d_model, config.conv, rngs=rngs)
        self.conv_v = CausalConv(d_model, config.conv, rngs=rngs)
        self.conv_q = CausalConv(d_model, config.conv, rngs=rngs)
        start = _gate_start(config, heads)
        self.rates = Gate(d_model, start, None, rngs=rngs)
        self.gate = dense(d_model, d_model, dtype, rngs)
        self.norm = nnx.RMSNorm(self.width, dtype=dtype, rngs=rngs)
        self.out = dense(d_model, d_model, dtype, rngs, scale=0.5)

    def initial_state(self, rows: int) -> TNTState:
        """Every row at the learned starts."""
        convolutions = (self.conv_k, self.conv_v, self.conv_q)
        square = (rows, self.heads, self.width, self.width)
        return TNTState(
            memories=tuple(
                jax.tree.map(lambda w: jnp.broadcast_to(w[None], (rows, *w.shape)), m)
                for m in self._begin()
            ),
            key_space=jnp.zeros(square, self.conv_k.kernel.dtype),
            tails=Tails(*(conv.tail(rows) for conv in convolutions)),
            position=jnp.zeros((rows,), jnp.int32),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: TNTState | None = None,
        *,
        aligned: bool | None = None,
        learn: bool | Learning = True,
        share: Share | None = None,
    ) -> tuple[Float[Array, "B T D"], TNTState]:
        """Reads T >= 1 tokens a row and lets the memories live through them.

        Args:
          x: the block's normalised input.
          state: where each row stands; None is `initial_state`.
          aligned: promises that every row stands at a multiple of `config.span`, and
            reads shards in parallel; by default true for a fresh state only. Else the
            tokens are read one by one in a scan.
          learn: False keeps every memory at its state: local ones do not restart.
          share: of which device x is (`MixerConfig.unshared`); every memory learns.
        """
        aligned = state is None if aligned is None else aligned
        if state is None:
            state = self.initial_state(x.shape[0])
        length = x.shape[1]
        streams, tails = self._streams(x, state.tails, share)
        if share is not None:
            return self._said(x, self._shards(state, streams)[2]), state
        if not learning.of(learn).main:
            live = self._only_read
        else:
            live = self._shards if aligned else self._tokens
        memories, key_space, y = live(state, streams)
        state = TNTState(memories, key_space, tails, state.position + length)
        return self._said(x, y), state

    def _said(self, x, y):
        y = self.norm(jnp.moveaxis(y, 1, 2).astype(self.dtype)).reshape(x.shape)
        return self.out(y * jax.nn.silu(self.gate(x)))

    def watch(
        self,
        x: Float[Array, "B T D"],
        state: TNTState,
        *,
        aligned: bool,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], TNTState, tuple[Tokens, ...]]:
        """A call, and what each memory was given (`MixerConfig.memories`)."""
        y, after = self(x, state, aligned=aligned, learn=learn)
        return y, after, self._streams(x, state.tails)[0]

    def _streams(self, x, tails, share=None) -> tuple[tuple[Tokens, ...], Tails]:
        """The tokens of each memory, `[B, H, T, ...]`; they differ in their gates."""
        rows, length, _ = x.shape

        def made(project, conv, tail):
            a = wide(project(x))
            if share is not None:
                tail = share.before(a, conv.width - 1)
            a, tail = conv(a, tail)
            a = jax.nn.silu(a).reshape(rows, length, self.heads, self.width)
            return jnp.moveaxis(a, 2, 1), tail

        k, tail_k = made(self.k, self.conv_k, tails.k)
        v, tail_v = made(self.v, self.conv_v, tails.v)
        q, tail_q = made(self.q, self.conv_q, tails.q)
        k, q = unit(k), unit(q)
        v = unit(v) if self.config.unit_values else v

        rates = jnp.einsum("btgmh->gmbht", jax.nn.sigmoid(self.rates(wide(x))))
        gates = dict(zip(self.config.gates, rates, strict=True))
        one, zero = jnp.ones_like(gates["eta"]), jnp.zeros_like(gates["eta"])
        alpha, theta = gates.get("alpha", one), gates.get("theta", zero)
        bounds = jnp.array(self.config.rate_bounds, gates["eta"].dtype)
        # Momentum averages writes, it adds none.
        eta = bounds[:, None, None, None] * gates["eta"] * (1.0 - theta)
        streams = tuple(
            Tokens(k, v, q, eta[i], alpha[i], theta[i])
            for i in range(self.config.count)
        )
        return streams, Tails(tail_k, tail_v, tail_q)

    def _begin(self) -> tuple[MemoryState, ...]:
        """The memories at their learned starts, leaves `[H, ...]`."""
        return tuple(
            jax.vmap(functools.partial(begin_memory, config))(
                {n: w[...] for n, w in start.items()}
            )
            for config, start in zip(self.config.memories, self.starts, strict=True)
        )

    def _shards(self, state, streams):
        """Tokens from a boundary on, whole shards in parallel."""
        live = functools.partial(_live_shards, self.config)
        live = jax.vmap(live, in_axes=(0, 0, 0))  # heads
        live = jax.vmap(live, in_axes=(0, None, 0))  # rows
        return live(state.memories[0], self._begin()[1:], streams)

    def _tokens(self, state, streams):
        """Token by token, wherever each row stands in its shard and its chunks."""
        config = self.config
        starts = jax.tree.map(lambda a: a[None], self._begin()[1:])
        nothing = jnp.zeros_like(state.key_space)

        def step(carry, token):
            (first, *local), key_space, position = carry
            due = position % config.shard == 0
            local = where_rows(due, starts, tuple(local))
            key_space = where_rows(due, nothing, key_space)
            token = jax.tree.map(lambda a: a[:, :, None], token)
            live = _every(functools.partial(_live, config, scan=piece))
            memories, key_space, y = live((first, *local), key_space, token)
            position = position + 1
            memories = tuple(
                where_rows(
                    position % memory.chunk == 0,
                    _every(commit)(state),
                    state,
                )
                for memory, state in zip(config.memories, memories, strict=True)
            )
            return (memories, key_space, position), y[:, :, 0]

        carry = state.memories, state.key_space, state.position
        time_first = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), streams)
        (memories, key_space, _), y = jax.lax.scan(step, carry, time_first)
        return memories, key_space, jnp.moveaxis(y, 0, 2)

    def _only_read(self, state, streams):
        """Reads that teach nothing; only anchors move on, where a chunk ends."""
        q = streams[0].q
        place = (
            state.position[:, None] + jnp.arange(q.shape[2] + 1, dtype=jnp.int32)[None]
        )
        memories, reads = [], []
        with jax.default_matmul_precision("float32"):
            asked = _asked(self.config, q, q @ jnp.swapaxes(state.key_space, -1, -2))
            for config, memory in zip(
                self.config.memories, state.memories, strict=True
            ):
                apply = _every(build_architecture(config, self.width).apply)
                moved = place // config.chunk > place[:, :1] // config.chunk
                if config.read == "anchor":
                    old, new = apply(memory.anchor, q), apply(memory.weights, q)
                    reads.append(jnp.where(moved[:, None, :-1, None], new, old))
                else:
                    reads.append(apply(memory.weights, asked))
                anchor = where_rows(moved[:, -1], memory.weights, memory.anchor)
                memories.append(memory._replace(anchor=anchor))
        return tuple(memories), state.key_space, functools.reduce(jnp.add, reads)


def _live_shards(
    config: TNTConfig,
    first: MemoryState,
    starts: tuple[MemoryState, ...],
    streams: tuple[Tokens, ...],
) -> tuple[tuple[MemoryState, ...], Array, Float[Array, "T V"]]:
    """One head lives through T tokens of one row that begin at a boundary.

    Args:
      config: of the layer.
      first: the global memory.
      starts: the local memories as every shard begins.
      streams: the tokens of each memory.

    Returns:
      All memories after the last token, Π of its shard, and the reads.
    """
    first, y = memory_scan(config.memories[0], first, streams[0])
    length, width = y.shape
    size = min(length, config.shard)
    shards, rest = -(-length // size), -length % size
    counts = None
    if rest:  # the last shard is as long as the others, and ends in padding
        begins = size * np.arange(shards, dtype=np.int32)
        counts = jnp.clip(length - begins, 0, size)

    def cut(a):
        if rest:
            a = jnp.concatenate([a, jnp.repeat(a[-1:], rest, axis=0)])
        return a.reshape(shards, size, *a.shape[1:])

    def shard(tokens, count):
        nothing = jnp.zeros((width, width), tokens[0].k.dtype)
        scan = functools.partial(memory_scan, count=count)
        local, key_space, y = _live_local(config, starts, nothing, tokens, scan)
        return (local, key_space), y

    ends, read = jax.vmap(shard)(jax.tree.map(cut, streams[1:]), counts)
    local, key_space = jax.tree.map(lambda a: a[-1], ends)
    return (first, *local), key_space, y + read.reshape(-1, width)[:length]


def _live(config, memories, key_space, streams, *, scan):
    """All memories of one head live through tokens that no boundary divides."""
    first, y = scan(config.memories[0], memories[0], streams[0])
    local, key_space, reads = _live_local(
        config, memories[1:], key_space, streams[1:], scan
    )
    return (first, *local), key_space, y + reads


def _live_local(config, memories, key_space, streams, scan):
    """The local memories of one head live through tokens of one shard."""
    key_space, q = _project(config, key_space, streams[0], scan)
    ends, reads = [], []
    for memory, state, tokens in zip(
        config.memories[1:], memories, streams, strict=True
    ):
        end, y = scan(memory, state, tokens._replace(q=q))
        ends.append(end)
        reads.append(y)
    return tuple(ends), key_space, functools.reduce(jnp.add, reads)


def _project(config, key_space, tokens, scan):
    """Π after the last token, and what each token asks the local memories."""
    k, one = tokens.k, jnp.ones_like(tokens.eta)
    norm = jnp.sum(k * k, axis=-1, keepdims=True)
    pairs = tokens._replace(v=k / jnp.maximum(norm, 1e-6), eta=one, alpha=one)
    start = begin_memory(_KEY_SPACE, {"w": key_space})
    end, projected = scan(_KEY_SPACE, start, pairs)
    return end.weights["w"], _asked(config, tokens.q, projected)


def _asked(config, q, projected):
    """The query of local memories, of a query and its Q-K projection."""
    if config.projection == "none":
        return q
    return unit(projected) if config.projection == "unit" else projected


def _gate_start(config: TNTConfig, heads: int) -> Float[Array, "G M H"]:
    """Half the bound for η, half for θ, and half-lives of two to many spans."""
    spans = [config.global_chunk] + [config.shard] * len(config.local_chunks)
    alpha = jnp.stack([first_half_lives(2 * span, heads) for span in spans])
    alpha = half_life_to_retention(alpha)
    starts = {"alpha": jnp.log(alpha) - jnp.log1p(-alpha)}
    return jnp.stack([starts.get(g, jnp.zeros_like(alpha)) for g in config.gates])


def _every(run: Callable) -> Callable:
    """Over rows and heads."""
    return jax.vmap(jax.vmap(run))
