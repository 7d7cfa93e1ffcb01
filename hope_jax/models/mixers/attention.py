"""Softmax attention: the non-parametric level, over a sliding window of keys."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hope_jax.core.config import at_least
from hope_jax.models.layers import dense, rotary
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.base import MixerConfig, Part, softmax


class _Attention(MixerConfig):
    """What both configs say."""

    even: ClassVar[bool] = True

    @property
    def span(self) -> int:
        return 1

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

    def __post_init__(self):
        at_least(self, context=1)

    def build(self, d_model, heads, dtype, *, rngs) -> "Attention":
        return Attention(d_model, heads, self.context, dtype, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(_Attention):
    """Attention to the last tokens only.

    Attributes:
      kind: its name.
      window: tokens that a token looks back over, itself among them.
    """

    kind: Literal["sliding_window"] = "sliding_window"
    window: int = 64

    def __post_init__(self):
        at_least(self, window=1)

    def build(self, d_model, heads, dtype, *, rngs) -> "Attention":
        return Attention(d_model, heads, self.window, dtype, rngs=rngs)


class AttentionState(NamedTuple):
    """The last `window` keys (already rotated) and values, the newest at the end."""

    k: Float[Array, "B W H K"]
    v: Float[Array, "B W H K"]
    position: Int[Array, " B"]


class Attention(nnx.Module):
    """Causal attention with rotary positions; a token sees the last `window` tokens.

    Its state is constant in the length read. Within one window this is full causal
    attention (equation 62 of arXiv:2512.24695), beyond it the sliding window of
    equation 63.
    """

    def __init__(self, d_model: int, heads: int, window: int, dtype, *, rngs: nnx.Rngs):
        self.heads, self.window, self.dtype = heads, window, dtype
        self.qkv = dense(d_model, 3 * d_model, dtype, rngs)
        self.out = dense(d_model, d_model, dtype, rngs, scale=0.5)

    def initial_state(self, rows: int) -> AttentionState:
        width = self.out.in_features // self.heads
        empty = jnp.zeros((rows, self.window, self.heads, width), self.dtype)
        return AttentionState(empty, empty, jnp.zeros((rows,), jnp.int32))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: AttentionState | None = None,
        *,
        aligned: bool = True,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        del aligned, learn  # attention has no chunk, and no fast level to freeze
        rows, length, d_model = x.shape
        fresh = state is None
        if fresh:
            state = self.initial_state(rows)
        offsets = jnp.arange(length, dtype=jnp.int32)
        position = state.position[:, None] + offsets[None]

        qkv = self.qkv(x).reshape(rows, length, 3, self.heads, d_model // self.heads)
        q, k = (rotary(qkv[:, :, i], position) for i in (0, 1))
        v = qkv[:, :, 2]
        keys = jnp.concatenate([state.k, k], axis=1)
        values = jnp.concatenate([state.v, v], axis=1)

        if fresh and length <= self.window:
            y = causal(q, k, v)
        else:
            y = self._slide(q, keys, values, state.position)

        y = self.out(y.reshape(rows, length, d_model))
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
    q: Float[Array, "B T H K"], k: Float[Array, "B T H K"], v: Float[Array, "B T H K"]
) -> Float[Array, "B T H K"]:
    """Causal softmax attention by the best kernel that the device has: cuDNN's flash
    attention, splash attention on a TPU, else blocks.

    `in_blocks` is their definition.
    """
    if q.shape[1] <= _BLOCK:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    kernels, width = {}, q.shape[-1]
    if q.dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128:
        kernels["cuda"] = _flash
    if q.shape[1] % 128 == 0 and width % 64 == 0:
        kernels["tpu"] = _splash
    return jax.lax.platform_dependent(q, k, v, default=in_blocks, **kernels)


_BLOCK = 256  # tokens, at least
_MOST = 8  # blocks, each of which is compiled


def in_blocks(
    q: Float[Array, "B T H K"], k: Float[Array, "B T H K"], v: Float[Array, "B T H K"]
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


def _flash(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _splash(q, k, v):
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, heads, width = q.shape[1:]
    one = splash_attention.CausalMask((length, length))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1
    )
    heads_first = lambda a: jnp.swapaxes(a, 1, 2)  # noqa: E731
    read = jax.vmap(kernel)(
        heads_first(q * jnp.asarray(width**-0.5, q.dtype)),
        heads_first(k),
        heads_first(v),
    )
    return heads_first(read)
