"""Softmax attention: the non-parametric level, over a sliding window of keys."""

import abc
import dataclasses
from typing import Annotated, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hope_jax.core.config import at_least
from hope_jax.models.layers import dense, rms_norm, rotary
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.base import MixerConfig, Part, softmax
from hope_jax.models.rotary import PLAIN, ROTARY, Rotary
from hope_jax.models.share import Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attention(MixerConfig):
    """What both configs say.

    Attributes:
      kv_heads: heads of keys and values, each of which serves as many queries' heads
        (arXiv:2305.13245); a divisor of the model's heads, None for all of these.
      head_dim: width of a head; None for d_model / heads.
      rotary: how keys and queries turn with positions, one of `models.rotary.ROTARY`.
      qk_norm: epsilon of a norm of every head's queries and keys before they turn
        (arXiv:2010.04245); None for no norm.
      qkv_bias, out_bias: whether these projections have a bias.
    """

    even: ClassVar[bool] = True
    kv_heads: int | None = None
    head_dim: int | None = None
    rotary: Annotated[Rotary, ROTARY] = PLAIN
    qk_norm: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self):
        object.__setattr__(self, "rotary", ROTARY.of(self.rotary, "rotary"))
        at_least(self, kv_heads=1, head_dim=1)
        if self.qk_norm is not None and not self.qk_norm > 0:
            raise ValueError(f"qk_norm must be positive, got {self.qk_norm}.")
        self._check_window()

    @abc.abstractmethod
    def _check_window(self) -> None:
        """Refuses how far a token looks back."""

    def check_heads(self, d_model: int, heads: int) -> None:
        if heads % (self.kv_heads or heads):
            raise ValueError(
                f"kv_heads ({self.kv_heads}) must divide heads ({heads}), as many "
                "queries' heads to each."
            )
        if self.head_dim is None:
            super().check_heads(d_model, heads)
        elif self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even for rotary positions, got {self.head_dim}."
            )

    @property
    def span(self) -> int:
        return 1

    def unshared(self, tokens: int, devices: int) -> str:
        del tokens, devices
        return ""

    @property
    def parts(self) -> tuple[Part, ...]:
        return (softmax(self.kind.replace("_", " ")),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(_Attention):
    """Attention to the whole row.

    Attributes:
      kind: `attention` (Transformer++, Hope-Attention), or `softmax_attention`, its
        name among the points of `memory.named`.
      context: tokens that a token looks back over, itself among them: those of a
        training row. No parameter has its shape, so it may be raised on a trained
        model.
    """

    kind: Literal["attention", "softmax_attention"] = "attention"
    context: int = 256

    def _check_window(self):
        at_least(self, context=1)

    def build(self, d_model, heads, dtype, *, rngs) -> "Attention":
        return Attention(self, d_model, heads, self.context, dtype, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(_Attention):
    """Attention to the last tokens only.

    Attributes:
      kind: its name.
      window: tokens that a token looks back over, itself among them.
    """

    kind: Literal["sliding_window"] = "sliding_window"
    window: int = 64

    def _check_window(self):
        at_least(self, window=1)

    def build(self, d_model, heads, dtype, *, rngs) -> "Attention":
        return Attention(self, d_model, heads, self.window, dtype, rngs=rngs)


class AttentionState(NamedTuple):
    """The last `window` keys (already rotated) and values, the newest at the end, of G
    heads."""

    k: Float[Array, "B W G K"]
    v: Float[Array, "B W G K"]
    position: Int[Array, " B"]


class Attention(nnx.Module):
    """Causal attention with rotary positions; a token sees the last `window` tokens.

    Its state is constant in the length read. Within one window this is full causal
    attention (equation 62 of arXiv:2512.24695), beyond it the sliding window of
    equation 63. The kernel `qkv` makes the queries' heads, then the keys', then the
    values'.
    """

    def __init__(
        self,
        config: _Attention,
        d_model: int,
        heads: int,
        window: int,
        dtype,
        *,
        rngs: nnx.Rngs,
    ):
        self.heads, self.window, self.dtype = heads, window, dtype
        self.kv_heads = config.kv_heads or heads
        self.width = width = config.head_dim or d_model // heads
        self.rotary = config.rotary
        made = (heads + 2 * self.kv_heads) * width
        self.qkv = dense(d_model, made, dtype, rngs, bias=config.qkv_bias)
        self.out = dense(
            heads * width, d_model, dtype, rngs, scale=0.5, bias=config.out_bias
        )
        self.normed = config.qk_norm is not None
        if config.qk_norm is not None:
            self.norm_q = rms_norm(width, dtype, rngs, config.qk_norm)
            self.norm_k = rms_norm(width, dtype, rngs, config.qk_norm)

    def initial_state(self, rows: int) -> AttentionState:
        empty = jnp.zeros((rows, self.window, self.kv_heads, self.width), self.dtype)
        return AttentionState(empty, empty, jnp.zeros((rows,), jnp.int32))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: AttentionState | None = None,
        *,
        aligned: bool = True,
        learn: bool | Learning = True,
        share: Share | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        del aligned, learn  # attention has no chunk, and no fast level to freeze
        rows, length, _ = x.shape
        fresh = state is None
        if fresh:
            state = self.initial_state(rows)
        offsets = jnp.arange(length, dtype=jnp.int32)
        position = state.position[:, None] + offsets[None]
        if share is not None:
            position = share.positions(length)

        made = self.qkv(x).reshape(rows, length, -1, self.width)
        q, k, v = jnp.split(made, (self.heads, self.heads + self.kv_heads), axis=2)
        if self.normed:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = (rotary(a, position, self.rotary) for a in (q, k))
        if share is not None:
            k, v = (
                jnp.concatenate([share.edge(a, self.window - 1), a], axis=1)
                for a in (k, v)
            )
            y = looking_back(q, k, v, position, self.window)
            return self.out(y.reshape(rows, length, -1)), state
        keys = jnp.concatenate([state.k, k], axis=1)
        values = jnp.concatenate([state.v, v], axis=1)

        if fresh and length <= self.window:
            y = causal(q, k, v)
        else:
            y = self._slide(q, keys, values, state.position)

        y = self.out(y.reshape(rows, length, -1))
        state = AttentionState(
            keys[:, length:], values[:, length:], state.position + length
        )
        return y, state

    def _slide(self, q, keys, values, position):
        """Blocks of at most a window of queries, each beside the window before it.

        `keys` and `values` begin a window before `q`.
        """
        rows, length = q.shape[:2]
        block = min(self.window, length)
        count = -(-length // block)

        def cut(a):  # [B, n, ...] -> [B, N, block, ...]
            padding = [(0, 0), (0, -a.shape[1] % block), (0, 0), (0, 0)]
            return jnp.pad(a, padding).reshape(rows, -1, block, *a.shape[2:])

        def near(a):  # [B, W + T, ...] -> [B, N, W + block, ...]
            if count == 1:
                return a[:, None]
            a = cut(a)
            return jnp.concatenate([a[:, :-1], a[:, 1:]], axis=2)

        slots = jnp.arange(-self.window, block, dtype=jnp.int32)
        age = jnp.arange(block, dtype=jnp.int32)[:, None] - slots[None]
        visible = (age >= 0) & (age < self.window)
        starts = block * jnp.arange(count, dtype=jnp.int32)[None] + position[:, None]
        filled = slots[None, None] + starts[:, :, None] >= 0
        mask = visible[None, None] & filled[:, :, None]
        blocks = (cut(q), near(keys), near(values), mask)
        q, keys, values, mask = (a.reshape(-1, *a.shape[2:]) for a in blocks)
        y = jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None])
        return y.reshape(rows, count * block, *y.shape[2:])[:, :length]


def causal(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], v: Float[Array, "B T G K"]
) -> Float[Array, "B T H K"]:
    """Causal softmax attention by the best kernel that the device has: cuDNN's flash
    attention, splash attention on a TPU, else blocks.

    `in_blocks` is their definition. Of the G heads of keys and values each serves H / G
    heads of queries.
    """
    if q.shape[1] <= _BLOCK:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    kernels, width = {}, q.shape[-1]
    if q.dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128:
        if jax.default_backend() == "gpu":  # elsewhere cuDNN cannot even be traced
            kernels["cuda"] = _flash
    if q.shape[1] % 128 == 0 and width % 64 == 0:
        kernels["tpu"] = _splash
    return jax.lax.platform_dependent(q, k, v, default=in_blocks, **kernels)


_BLOCK = 256  # tokens, at least
_MOST = 8  # blocks, each of which is compiled


def in_blocks(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], v: Float[Array, "B T G K"]
) -> Float[Array, "B T H K"]:
    """Blocks of queries, each beside the keys up to its end: half of the scores, of
    which those of one block are held at once, in the backward pass too."""
    length = q.shape[1]
    block = max(_BLOCK, -(-length // _MOST))

    @jax.checkpoint
    def read(q, k, v):
        at = jnp.arange(k.shape[1] - q.shape[1], k.shape[1], dtype=jnp.int32)
        visible = at[:, None] >= jnp.arange(k.shape[1], dtype=jnp.int32)[None]
        return jax.nn.dot_product_attention(q, k, v, mask=visible[None, None])

    ends = [*range(block, length, block), length]
    starts = [0, *ends[:-1]]
    made = [
        read(q[:, start:end], k[:, :end], v[:, :end])
        for start, end in zip(starts, ends, strict=True)
    ]
    return jnp.concatenate(made, axis=1)


def looking_back(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B U G K"],
    v: Float[Array, "B U G K"],
    position: Int[Array, "B T"],
    window: int,
) -> Float[Array, "B T H K"]:
    """Softmax attention of the last T of U tokens to the last `window`, themselves
    among them, of their document; in blocks of queries, as `in_blocks`.

    Args:
      q, k, v: queries of T tokens; keys and values of these and of some before them.
      position: tokens of its document before each.
      window: how far back a token looks.
    """
    length, past = q.shape[1], k.shape[1] - q.shape[1]
    block = max(_BLOCK, -(-length // _MOST))

    @jax.checkpoint
    def read(q, k, v, position):
        last = jnp.arange(k.shape[1] - q.shape[1], k.shape[1], dtype=jnp.int32)
        age = last[:, None] - jnp.arange(k.shape[1], dtype=jnp.int32)[None]
        visible = ((age >= 0) & (age < window))[None] & (
            age[None] <= position[:, :, None]
        )
        return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])

    made = []
    for start in range(0, length, block):
        here = slice(start, min(start + block, length))
        there = slice(max(0, past + start - window + 1), past + here.stop)
        made.append(read(q[:, here], k[:, there], v[:, there], position[:, here]))
    return jnp.concatenate(made, axis=1)


def _flash(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _splash(q, k, v):
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, heads, width = q.shape[1:]
    one = splash_attention.CausalMask((length, length))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1
    )
    k, v = (jnp.repeat(a, heads // a.shape[2], axis=2) for a in (k, v))
    heads_first = lambda a: jnp.swapaxes(a, 1, 2)  # noqa: E731
    read = jax.vmap(kernel)(
        heads_first(q * jnp.asarray(width**-0.5, q.dtype)),
        heads_first(k),
        heads_first(v),
    )
    return heads_first(read)
