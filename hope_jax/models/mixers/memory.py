"""Any memory of `memory.compose` as a sequence layer: keys, values and rates of a token
come from slow projections, and each head's memory lives through them.

For each head, with conv a depth-wise causal convolution and φ the memory's features,

    k, v, q = silu(conv(W x))      k, q to unit norm, rotated, mapped by φ
    η, α, θ, .. = gates of x       how: `memory.gates`
    y = norm(memory reads q) ⊙ silu(W x)

as the follow-up papers of Titans have it (arXiv:2504.13173, arXiv:2505.23735). What a
memory then does is `memory_level(config.memory, width)`, token by token.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hope_jax.core.config import at_least, one_of, refuse_unread
from hope_jax.kernels import summary
from hope_jax.kernels.chunk import piece
from hope_jax.kernels.select import Implementation, memory_scan, scan_padded
from hope_jax.memory import consolidation, features, named
from hope_jax.memory import rates as rates_lib
from hope_jax.memory.bias import BIASES
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_architecture,
    half_life_to_retention,
    key_width,
)
from hope_jax.memory.consolidation import Consolidation, with_starts
from hope_jax.memory.gates import GateConfig
from hope_jax.memory.retention import RETENTIONS
from hope_jax.memory.state import MemoryState, bare, begin_memory, full
from hope_jax.models import learning
from hope_jax.models.layers import (
    CausalConv,
    Tails,
    dense,
    first_half_lives,
    rotary,
    unit,
    where_rows,
)
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.base import (
    UNCUT,
    MixerConfig,
    Part,
    consolidating,
    recalling,
    scaled,
)
from hope_jax.models.share import Share
from hope_jax.optim.leaves import wide

_STEP_START = 0.1  # Mamba-2's Δ at the start, the upper end of its range


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryMixerConfig(MixerConfig):
    """A memory, and how a layer makes its tokens.

    Attributes:
      kind: its name.
      memory: the memory each head has.
      gates: where its keys, rates and retentions come from.
      conv: width of the causal convolutions after k, v and q; 1 sees no other token.
      rank: of the projections that make channel-wise gates.
      half_life_start: tokens after which the head that forgets most quickly has
        forgotten half, before training; the slowest takes 16 times as long. At least
        two chunks of an anchored memory; the chunk of an exact one, a matter of speed,
        changes nothing. `experiments.memory --group=forgetting` has what others do.
      impl: of `memory_scan`: `reference` reads token by token what `chunk` reads in
        parallel; `auto` chooses.
      truncate: tokens after which the outer gradient goes no further back through the
        memory, a multiple of its chunk; None goes back to the start.
      consolidate: slower levels, from fast to slow, to which every row's memories
        return, in place of the start of all rows; none by default. Each has a clock of
        its own, a multiple of `memory.chunk`.
    """

    kind: Literal["memory"] = "memory"
    memory: MemoryConfig = MemoryConfig()
    gates: GateConfig = GateConfig()
    conv: int = 4
    rank: int = 32
    half_life_start: float = 64.0
    impl: Implementation = "auto"
    truncate: int | None = None
    consolidate: tuple[Consolidation, ...] = ()

    def __post_init__(self):
        at_least(self, conv=1, rank=1)
        if not 1 <= self.half_life_start < math.inf:
            raise ValueError(
                "half_life_start must be a number of tokens, at least 1, got "
                f"{self.half_life_start}; memory.retention='none' forgets nothing."
            )
        consolidation.check(
            self.consolidate, self.memory, self.memory.chunk, "memory.chunk"
        )
        if self.consolidate and self.truncate is not None:
            raise ValueError(
                f"truncate ({self.truncate}) is about memories that go on from one "
                "start, and consolidate gives them others: leave truncate None."
            )
        one_of(self, impl=get_args(Implementation))
        if self.truncate is not None and (
            self.truncate < 1 or self.truncate % self.memory.chunk
        ):
            raise ValueError(
                f"truncate ({self.truncate}) must be a multiple of memory.chunk "
                f"({self.memory.chunk})."
            )
        for refused, reason in _conflicts(self.memory, self.gates):
            if refused:
                raise ValueError(reason)
        unread = functools.partial(refuse_unread, self, "half_life_start")
        decays = RETENTIONS.which(lambda kept: kept.decays)
        unread("memory.retention", self.memory.retention, decays)
        if self.gates.rate != "step":
            unread("gates.retention", self.gates.retention, ("token",))

    @property
    def rate_bound(self) -> float:
        """Of η, before the factor `1 − θ` of an inner momentum.

        A token of an Omega window descends several losses, and a delta term beside a
        gradient that recalls as well erases twice: then η + η must not exceed 1.
        """
        memory = self.memory
        if self.gates.rate_bound is not None:
            return self.gates.rate_bound
        if memory.rate_law != "token":
            return 1.0
        if memory.gradient == "anchored":
            return 1.0 / (memory.chunk * memory.window)
        return 1.0 / max(1, memory.erasures)

    def build(self, d_model, heads, dtype, *, rngs) -> "MemoryMixer":
        return MemoryMixer(d_model, heads, self, dtype, rngs=rngs)

    @property
    def even(self) -> bool:
        return self.gates.rotary

    @property
    def span(self) -> int:
        return self.memory.chunk if self.starts else self.parts[0].period

    @property
    def parts(self) -> tuple[Part, ...]:
        return (recalling("memory", self.memory, "start"),)

    @property
    def starts(self) -> tuple[Part, ...]:
        return consolidating(self.consolidate)

    @property
    def memories(self) -> tuple[MemoryConfig, ...]:
        return (self.memory,)

    def bare(self, state: "MemoryMixerState") -> "MemoryMixerState":
        return state._replace(memory=bare(state.memory))

    def full(self, state: "MemoryMixerState") -> "MemoryMixerState":
        anchored = self.memory.gradient == "anchored"
        return state._replace(memory=full(state.memory)) if anchored else state

    def unshared(self, tokens: int, devices: int) -> str:
        memory, own = self.memory, tokens // devices
        if not summary.affine(memory):
            words = ", ".join(named.choices(memory))
            return (
                f"has a memory ({words}) whose moves depend on where it stands, token "
                f"after token: {UNCUT}, or a memory that moves by an affine map"
            )
        if self.starts or self.truncate is not None:
            name = "consolidate" if self.starts else "truncate"
            return (
                f"has {name}, which counts tokens of a whole row: leave it, or {UNCUT}"
            )
        if memory.gradient == "anchored" and own % memory.chunk:
            return (
                f"has chunks of {memory.chunk} tokens, which must divide a device's "
                f"{own} tokens of a row: use fewer devices or longer rows"
            )
        return ""

    def rechunked(self, factor: float) -> "MemoryMixerConfig":
        if self.memory.gradient == "exact":
            raise ValueError("its chunk is a matter of speed, not of what it computes")
        chunk = scaled(self.memory.chunk, factor)
        memory = dataclasses.replace(self.memory, chunk=chunk)
        return dataclasses.replace(self, memory=memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedConfig(MixerConfig):
    """A published memory, by its name in `memory.named`.

    Attributes:
      kind: that name.
      chunk: tokens per chunk; None is the point's own. It is part of the function where
        the point is anchored.
    """

    kind: str
    chunk: int | None = None

    def __post_init__(self):
        if self.kind not in named.memories():
            named.get(self.kind)  # refuses an unknown one
            raise ValueError(f"kind {self.kind!r} has no memory; it is attention.")
        at_least(self, chunk=1)
        self.layer  # refuses a chunk that does not fit  # noqa: B018

    @property
    def layer(self) -> MemoryMixerConfig:
        """The same as four choices."""
        point = named.get(self.kind, self.chunk)
        assert point.memory is not None  # attention has been refused
        return MemoryMixerConfig(memory=point.memory, gates=point.gates)

    def build(self, d_model, heads, dtype, *, rngs) -> "MemoryMixer":
        return self.layer.build(d_model, heads, dtype, rngs=rngs)

    @property
    def even(self) -> bool:
        return self.layer.even

    @property
    def span(self) -> int:
        return self.layer.span

    @property
    def parts(self) -> tuple[Part, ...]:
        title = named.get(self.kind).title
        return (recalling(f"{title} memory", self.layer.memory, "start"),)

    @property
    def memories(self) -> tuple[MemoryConfig, ...]:
        return self.layer.memories

    def bare(self, state: "MemoryMixerState") -> "MemoryMixerState":
        return self.layer.bare(state)

    def full(self, state: "MemoryMixerState") -> "MemoryMixerState":
        return self.layer.full(state)

    def unshared(self, tokens: int, devices: int) -> str:
        return self.layer.unshared(tokens, devices)

    def rechunked(self, factor: float) -> "NamedConfig":
        chunk = self.layer.rechunked(factor).memory.chunk
        return dataclasses.replace(self, chunk=chunk)


def _conflicts(memory: MemoryConfig, gates: GateConfig):
    """Pairs of whether a combination is asked for and why it is refused."""
    shape, mapped, bias, kept, rule = memory.chosen
    recalls = bias.recalls or memory.dgd != "none"
    yield (
        gates.rate == "step" and recalls and not rule.bounded,
        "gates.rate='step' has no bound, so the memory must not descend what it "
        "recalls: it needs memory.bias='dot' and memory.dgd='none', or rule "
        f"'implicit' or 'newton', got {memory.bias!r}, {memory.dgd!r}, "
        f"{memory.rule!r}. Use gates.rate='token'.",
    )
    yield (
        gates.rate == "step" and memory.steps > 1,
        f"gates.rate='step' needs memory.steps=1, got {memory.steps}: α = exp(−aΔ) "
        "acts once a token.",
    )
    yield (
        gates.rate_bound is not None and gates.rate != "token",
        f"gates.rate_bound ({gates.rate_bound}) bounds gates.rate='token', got "
        f"{gates.rate!r}: leave it None.",
    )
    most = 2.0 / max(1, memory.erasures)
    yield (
        memory.gradient == "exact" and (gates.rate_bound or 0.0) > most,
        f"gates.rate_bound ({gates.rate_bound}) must be at most {most:g}: this memory "
        f"erases {memory.erasures} times its rate along a key, and more would write "
        "over it.",
    )
    yield (
        kept.channels and gates.rate != "step" and gates.retention != "token",
        "memory.retention='channel' needs gates.retention='token' or "
        f"gates.rate='step', got {gates.retention!r}: use memory.retention='decay'.",
    )
    yield (
        gates.erase != "key" and (memory.dgd == "none" or memory.steps > 1),
        f"gates.erase={gates.erase!r} is about the delta term of one write a token: it "
        f"needs memory.dgd 'both' or 'input' and steps=1, got {memory.dgd!r} and "
        f"{memory.steps}.",
    )
    single = shape.matrix and mapped.plain and not bias.recalls and rule.immediate
    erased = (memory.architecture, memory.gradient, memory.features, memory.bias)
    yield (
        gates.erase == "channel" and not (single and memory.gradient == "exact"),
        "gates.erase='channel' erases key channels of a matrix: it needs "
        "memory.architecture='linear', gradient='exact', features='none', bias='dot' "
        f"and rule 'gd' or 'implicit', got {', '.join(map(repr, erased))}, "
        f"{memory.rule!r}.",
    )
    robust = BIASES.which(lambda bias: bias.robust)
    yield (
        gates.threshold == "token" and (not bias.robust or memory.window > 1),
        f"gates.threshold='token' needs memory.bias {', '.join(robust)} and "
        f"window=1, got {memory.bias!r} and {memory.window}.",
    )


class MemoryMixerState(NamedTuple):
    """Where a layer stands; its size does not depend on the tokens read.

    Attributes:
      memory: each head's memory, leaves `[B, H, ...]`.
      tails: the convolutions' last inputs.
      position: tokens read, int32.
    """

    memory: MemoryState
    tails: Tails
    position: Int[Array, " B"]


class Gate(nnx.Module):
    """An array per head and token, `start` wherever the token says nothing.

    An affine map of `x: [B, T, D]`, through `rank` numbers where that is given, in the
    type of x: give it full precision.
    """

    def __init__(self, d_model: int, start: Array, rank: int | None, *, rngs: nnx.Rngs):
        self.shape = start.shape
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "normal")
        self.down = None if rank is None else dense(d_model, rank, None, rngs)
        self.up = nnx.Linear(
            rank or d_model,
            start.size,
            kernel_init=small,
            bias_init=lambda key, shape, dtype: start.reshape(shape).astype(dtype),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T *shape"]:
        with jax.default_matmul_precision("float32"):
            made = self.up(x if self.down is None else self.down(x))
        return made.reshape(*x.shape[:2], *self.shape)


T = TypeVar("T")


def _there(part: T | None) -> T:
    """A part that the config says there is."""
    assert part is not None
    return part


class MemoryMixer(nnx.Module):
    """The layer: `y, state = mixer(x, state)`.

    `start` are the initial memories that the outer level learns, leading with heads. A
    gate that the memory has no use for does not exist.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        config: MemoryMixerConfig,
        dtype,
        *,
        rngs: nnx.Rngs,
    ):
        if d_model % heads:
            raise ValueError(
                f"d_model ({d_model}) must be a multiple of heads ({heads})."
            )
        memory, gates = config.memory, config.gates
        kept = memory.chosen.retention
        self.config, self.heads, self.width = config, heads, d_model // heads
        self.d_model, self.dtype = d_model, dtype
        if gates.rotary and self.width % 2:
            raise ValueError(
                "d_model / heads must be even for gates.rotary=True, got "
                f"{d_model} / {heads} = {self.width}."
            )
        wide = key_width(memory, self.width)
        init = build_architecture(memory, self.width).init
        start = jax.vmap(init)(jax.random.split(rngs.params(), heads))
        self.start = nnx.data({n: nnx.Param(w) for n, w in start.items()})

        self.k = dense(d_model, memory.steps * d_model, dtype, rngs)
        self.v = dense(d_model, memory.steps * d_model, dtype, rngs)
        self.q = dense(d_model, d_model, dtype, rngs)
        self.conv_k = CausalConv(memory.steps * d_model, config.conv, rngs=rngs)
        self.conv_v = CausalConv(memory.steps * d_model, config.conv, rngs=rngs)
        self.conv_q = CausalConv(d_model, config.conv, rngs=rngs)

        def gate(needed, start, rank=None):
            return Gate(d_model, start, rank, rngs=rngs) if needed else None

        def param(needed, start):
            return nnx.Param(start) if needed else None

        def level(value, *shape):
            return jnp.full((heads, *shape), value, jnp.float32)

        taylor = features.coefficients(memory.features, memory.degree)
        learned = taylor is not None
        self.coefficients = param(learned, learned and jnp.tile(taylor, (heads, 1)))

        writes = () if memory.steps == 1 else (memory.steps,)
        channels = (wide,) if kept.channels else ()
        retains, steps = kept.decays, gates.rate == "step"
        rate = _softplus_inverse(_STEP_START) if steps else 0.0
        self.eta = gate(gates.rate != "one", level(rate, *writes))
        shortest = config.half_life_start
        if memory.gradient == "anchored":
            shortest = max(shortest, 2 * memory.chunk)
        half_life = first_half_lives(shortest, heads)
        decay = math.log(2.0) / (_STEP_START * half_life)
        self.log_decay = param(retains and steps, _spread(jnp.log(decay), channels))
        alpha = half_life_to_retention(half_life)
        self.alpha = gate(
            retains and not steps and gates.retention == "token",
            _spread(jnp.log(alpha) - jnp.log1p(-alpha), channels),
            config.rank if channels else None,
        )
        self.theta = gate(memory.inertia, level(0.0))
        self.threshold = gate(
            gates.threshold == "token", level(_softplus_inverse(memory.threshold))
        )
        self.weights = gate(memory.window > 1, level(0.0, memory.window))
        channel, feedback = gates.erase == "channel", gates.erase == "feedback"
        self.erase = gate(channel, level(0.0, self.width), config.rank)
        self.removal = param(channel, level(1.0, self.width))
        self.replacement = param(channel, level(1.0, self.width))
        self.feedback = param(feedback, level(1.0))
        self.correction = param(feedback, level(1.0))

        self.gate = dense(d_model, d_model, dtype, rngs)
        self.norm = nnx.RMSNorm(self.width, dtype=dtype, rngs=rngs)
        self.out = dense(d_model, d_model, dtype, rngs, scale=0.5)

    def initial_state(self, rows: int) -> MemoryMixerState:
        """Every row at the learned initial memories."""
        spread = {
            n: jnp.broadcast_to(w[...][None], (rows, *w.shape))
            for n, w in self.start.items()
        }
        memory = _every(lambda w: begin_memory(self.config.memory, w))(spread)
        return MemoryMixerState(
            memory=with_starts(self.config.consolidate, memory),
            tails=Tails(
                *(c.tail(rows) for c in (self.conv_k, self.conv_v, self.conv_q))
            ),
            position=jnp.zeros((rows,), jnp.int32),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MemoryMixerState | None = None,
        *,
        aligned: bool | None = None,
        learn: bool | Learning = True,
        count: Int[Array, ""] | None = None,
        share: Share | None = None,
    ) -> tuple[Float[Array, "B T D"], MemoryMixerState]:
        """Reads T >= 1 tokens a row and lets the memories live through them.

        Args:
          x: the block's normalised input.
          state: where each row stands; None is `initial_state`.
          aligned: promises that every row stands at a multiple of `memory.chunk`, and
            reads chunks in parallel; by default true for a fresh state only. Else the
            memories live token by token in a scan, unless their chunk is only a speed
            knob.
          learn: False keeps every memory at its state.
          count: how many of the tokens of every row there are, at least one; padding
            follows. None is all of them. For a layer that is a part of another.
          share: of which device x is (`MixerConfig.unshared`); every memory learns.
        """
        aligned = state is None if aligned is None else aligned
        if state is None:
            state = self.initial_state(x.shape[0])
        if share is not None:
            return self.said(x, self._shared(x, state, share)), state
        _, y, state = self.lives(x, state, aligned, learn, count)
        return self.said(x, y), state

    def lives(
        self,
        x: Float[Array, "B T D"],
        state: MemoryMixerState,
        aligned: bool,
        learn: bool | Learning,
        count: Int[Array, ""] | None = None,
    ) -> tuple[Tokens, Float[Array, "B H T V"], MemoryMixerState]:
        """What the memories were given, what they answer, and where they stand then."""
        learn = learning.of(learn)
        tokens, tails = self.tokens(x, state, count)
        tokens = learn.controls.on(tokens)
        position = state.position + (x.shape[1] if count is None else count)
        if not learn.main:
            memory, y = self._only_read(state.memory, tokens.q, state.position, count)
        elif aligned and state.memory.starts and learn.consolidation:
            memory, y = self._live_by_chunks(
                state.memory, tokens, state.position, count
            )
        elif aligned or self._chunk_is_free:
            memory, y = self._scan(state.memory, tokens, count)
        else:
            memory, y = self._live(
                state.memory, tokens, state.position, self._start(), learn.consolidation
            )
        return tokens, y, MemoryMixerState(memory, tails, position)

    def _scan(self, memory, tokens, count=None):
        """Whole chunks in parallel, from a boundary on."""
        run = lambda s, t, start: memory_scan(  # noqa: E731
            self.config.memory,
            s,
            t,
            impl=self.config.impl,
            truncate=self.config.truncate,
            start=start,
            count=count,
        )
        return _every(run, self._start())(memory, tokens)

    def _shared(self, x, state, share):
        """What the memories answer to this device's tokens, `[B, H, T, V]`: each
        stretch is summed up, and then read from where it begins."""
        here = state._replace(position=share.position.reshape(-1))
        tokens, _ = self.tokens(share.apart(x), here, share=share)
        fresh = jax.tree.map(
            lambda a: jnp.repeat(a, share.stretches, axis=0), state.memory
        )
        if fresh.recent is not None:
            pairs = (jnp.moveaxis(a, 2, 1) for a in (tokens.k, tokens.v))
            back = self.config.memory.window - 1
            pairs = (jnp.moveaxis(share.before(a, back), 1, 2) for a in pairs)
            fresh = fresh._replace(recent=type(fresh.recent)(*pairs))
        of = lambda run: functools.partial(run, self.config.memory)  # noqa: E731
        sums = _every(of(summary.summarise), self._start())(fresh, tokens)
        begins = share.enter(_every(of(summary.rows))(state.memory), sums)
        memory = _every(of(summary.with_rows))(fresh, begins)
        _, y = self._scan(memory, tokens)
        return jnp.moveaxis(share.together(jnp.moveaxis(y, 2, 1)), 1, 2)

    def said(
        self, x: Float[Array, "B T D"], y: Float[Array, "B H T V"]
    ) -> Float[Array, "B T D"]:
        """What the layer makes of the memories' answers."""
        y = jnp.moveaxis(y, 1, 2)
        y = self.norm(y.astype(self.dtype)).reshape(x.shape)
        return self.out(y * jax.nn.silu(self.gate(x)))

    def watch(
        self,
        x: Float[Array, "B T D"],
        state: MemoryMixerState,
        *,
        aligned: bool,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], MemoryMixerState, tuple[Tokens]]:
        """A call, and what the memories were given (`MixerConfig.memories`)."""
        y, after = self(x, state, aligned=aligned, learn=learn)
        return y, after, (self.tokens(x, state)[0],)

    def _start(self):
        """The learned memories, leaves `[H, ...]`."""
        return {n: w[...] for n, w in self.start.items()}

    @property
    def _chunk_is_free(self) -> bool:
        """Whether a chunk may begin anywhere: nothing happens at its end."""
        return self.config.memory.gradient == "exact" and not self.config.starts

    def tokens(
        self,
        x: Float[Array, "B T D"],
        state: MemoryMixerState,
        count: Int[Array, ""] | None = None,
        share: Share | None = None,
    ) -> tuple[Tokens, Tails]:
        """What the memories are given, leaves `[B, H, T, ...]`, and new tails; x of
        stretches that devices share follows what came before each."""
        config, gates = self.config.memory, self.config.gates
        rows, length, _ = x.shape
        position = jnp.arange(length, dtype=jnp.int32)[None] + state.position[:, None]

        def project(into, conv, tail):
            made = wide(into(x))
            if share is not None:
                tail = share.before(made, conv.width - 1)
            made, tail = conv(made, tail, count)
            return jax.nn.silu(made).reshape(rows, length, -1, self.width), tail

        k, tail_k = project(self.k, self.conv_k, state.tails.k)
        v, tail_v = project(self.v, self.conv_v, state.tails.v)
        q, tail_q = project(self.q, self.conv_q, state.tails.q)
        if gates.unit_keys:
            k, q = unit(k), unit(q)
        if gates.unit_values:
            v = unit(v)
        if gates.rotary:
            k, q = rotary(k, position), rotary(q, position)
        k, v = (a.reshape(rows, length, self.heads, -1, self.width) for a in (k, v))
        if config.steps == 1:
            k, v = k[:, :, :, 0], v[:, :, :, 0]
        k, q = self._features(k), self._features(q)

        rates = self._rates(wide(x), k, v)
        k, q, erase = self._erase(wide(x), k, q, rates["eta"])
        tokens = Tokens(k, v, q, **rates, **erase)
        time_inside = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 1), tokens)
        return time_inside, Tails(tail_k, tail_v, tail_q)

    def _features(self, x):
        """`[B, T, H, ..., K]` mapped, with each head's own coefficients."""
        config = self.config.memory
        if self.coefficients is None:
            return features.features(config.features, config.degree, x)
        each = lambda x, c: features.features(  # noqa: E731
            config.features, config.degree, x, c
        )
        return jax.vmap(each, (2, 0), 2)(x, self.coefficients[...])

    def _rates(self, x, k, v):
        """The rates of every token, `[B, T, H, ...]`, float32."""
        config, gates = self.config.memory, self.config.gates
        one = jnp.ones((*x.shape[:2], self.heads), x.dtype)

        def made(gate, bound, otherwise=None):
            return otherwise if gate is None else bound(gate(x))

        alpha = made(self.alpha, jax.nn.sigmoid, one)
        if gates.retention == "constant" and self.log_decay is None:
            head = jnp.arange(self.heads, dtype=jnp.float32)
            alpha = one * (1.0 - jnp.exp2(-5.0 - head))[None, None]
        theta = made(self.theta, jax.nn.sigmoid, jnp.zeros_like(one))
        if gates.rate == "one":
            eta = one
        elif gates.rate == "step":
            eta = jax.nn.softplus(_there(self.eta)(x))
            if self.log_decay is not None:
                decay = jnp.exp(self.log_decay[...])[None, None]
                step = eta.reshape(*eta.shape, *[1] * (decay.ndim - eta.ndim))
                alpha = jnp.exp(-decay * step)
        else:
            share = jax.nn.sigmoid(_there(self.eta)(x))
            eta = rates_lib.within(config, self.config.rate_bound, share, alpha)
            # An average, not a sum; a rate law sees to that itself.
            rule = config.chosen.rule
            if rule.explicit and rule.inertia and config.rate_law == "token":
                still = (1.0 - theta).reshape(
                    *theta.shape, *[1] * (eta.ndim - theta.ndim)
                )
                eta = eta * still
            met = self._met(k, v)
            if met is not None:
                eta = eta / jnp.maximum(1.0, jnp.sum(met * met, axis=-1))
        return {
            "eta": eta,
            "alpha": alpha,
            "theta": theta,
            "threshold": made(self.threshold, jax.nn.softplus),
            "weights": made(self.weights, jax.nn.sigmoid),
        }

    def _met(self, k, v):
        """What an explicit step erases along, where that can be longer than one: the
        rate then fits it. None where nothing is."""
        memory, gates = self.config.memory, self.config.gates
        found = memory.chosen
        if found.retention.along_values:
            return None if gates.unit_values else v
        delta = memory.dgd != "none" and gates.erase != "channel"
        any_norm = not (found.features.plain and gates.unit_keys)
        recalls = found.bias.recalls or delta
        return k if found.rule.explicit and any_norm and recalls else None

    def _erase(self, x, k, q, eta):
        """Write keys, queries, and what the delta term erases."""
        if self.config.gates.erase == "channel":
            rate = jax.nn.sigmoid(_there(self.erase)(x))
            gone = unit(k * _there(self.removal)[...][None, None])
            kept = 1.0 + (rate - 1.0) * _there(self.replacement)[...][None, None]
            return k * kept, q, {"erase_key": gone, "erase_rate": rate}
        if self.config.gates.erase == "feedback":
            rate = eta * jax.nn.sigmoid(_there(self.feedback)[...])[None, None]
            q = q - _there(self.correction)[...][None, None, :, None] * k
            return k, q, {"erase_rate": rate}
        return k, q, {}

    def _live_by_chunks(self, memory, tokens, position, count):
        """Chunk by chunk, at whose ends starts may move."""
        config, learned = self.config, self._start()
        size = config.memory.chunk

        def chunk(carry, tokens, here):
            memory, position = carry
            length = tokens.k.shape[0]
            tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2), tokens)
            live = _every(
                lambda s, t: memory_scan(
                    config.memory, s, t, impl=config.impl, count=here
                )
            )
            memory, y = live(memory, tokens)
            position = position + (length if here is None else here)
            if length == size:  # the chunk may be over
                moved = consolidation.consolidate(
                    config.consolidate, memory, learned, position
                )
                over = jnp.ones((), bool) if here is None else here == size
                memory = jax.tree.map(
                    lambda new, old: jnp.where(over, new, old), moved, memory
                )
            return (memory, position), jnp.moveaxis(y, 2, 0)

        time_first = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), tokens)
        (memory, _), y = scan_padded(
            chunk, size, (memory, position), time_first, True, count
        )
        return memory, jnp.moveaxis(y, 0, 2)

    def _live(self, memory, tokens, position, start, consolidates):
        """Token by token, wherever each row stands in its chunk."""
        config = self.config.memory
        live = _every(lambda s, t, start: piece(config, s, t, start=start), start)

        def step(carry, token):
            memory, position = carry
            token = jax.tree.map(lambda a: a[:, :, None], token)
            memory, y = live(memory, token)
            position = position + 1
            memory = commit_where(position % config.chunk == 0, memory)
            if memory.starts and consolidates:
                memory = consolidation.consolidate(
                    self.config.consolidate, memory, start, position
                )
            return (memory, position), y[:, :, 0]

        time_first = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), tokens)
        (memory, _), y = jax.lax.scan(step, (memory, position), time_first)
        return memory, jnp.moveaxis(y, 0, 2)

    def _only_read(self, memory, q, position, count=None):
        """Reads that teach nothing; only the anchor moves on, where a chunk ends."""
        config = self.config.memory
        with jax.default_matmul_precision("float32"):
            apply = _every(build_architecture(config, self.width).apply)
            y = apply(memory.weights, q)
            if memory.anchor is None:
                return memory, y
            length = jnp.arange(q.shape[2] + 1, dtype=jnp.int32)
            place = (position[:, None] + length[None]) // config.chunk
            moved = place > place[:, :1]
            if config.read == "anchor":
                old = apply(memory.anchor, q)
                y = jnp.where(moved[:, None, :-1, None], y, old)
        last = moved[:, -1] if count is None else jnp.take(moved, count, axis=1)
        return commit_where(last, memory), y


def watch(
    layer: Any, x: Float[Array, "B T D"], state: Any, **how: Any
) -> tuple[Float[Array, "B T D"], Any, tuple[Tokens]]:
    """A call of a layer, `how` as that is told, and what its `memory`, which reads what
    the layer reads, was given (`MixerConfig.memories`)."""
    y, after = layer(x, state, **how)
    return y, after, (layer.memory.tokens(x, state.memory)[0],)


def _every(run: Callable, shared=None) -> Callable:
    """Over rows and heads; `shared`, if given, is the last argument and has no rows."""
    if shared is None:
        return jax.vmap(jax.vmap(run))

    def over_heads(state, tokens):
        return jax.vmap(run)(state, tokens, shared)

    return jax.vmap(over_heads)


def _softplus_inverse(x: float) -> float:
    return math.log(math.expm1(x))


def _spread(x: Float[Array, " H"], shape: tuple[int, ...]) -> Array:
    """The same for all of `shape` in each head."""
    return jnp.broadcast_to(x.reshape(-1, *[1] * len(shape)), (x.shape[0], *shape))


def commit_where(due: Bool[Array, " B"], memory: MemoryState) -> MemoryState:
    """Ends the chunk of the rows that have read all of it; leaves lead with rows."""
    if memory.anchor is None:  # nothing happens at the end of an exact one's chunk
        return memory
    if memory.left is not None:
        fresh = jnp.ones_like(memory.left)
        memory = memory._replace(left=where_rows(due, fresh, memory.left))
    return memory._replace(anchor=where_rows(due, memory.weights, memory.anchor))
