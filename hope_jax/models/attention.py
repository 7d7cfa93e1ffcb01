"""Softmax attention: the non-parametric level, over a sliding window of keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hope_jax.models.layers import dense, rotary


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
        learn: bool = True,
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
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            slots = jnp.arange(-self.window, length, dtype=jnp.int32)
            age = offsets[:, None] - slots[None]
            visible = (age >= 0) & (age < self.window)
            filled = slots[None] + state.position[:, None] >= 0
            mask = visible[None, None] & filled[:, None, None]
            y = jax.nn.dot_product_attention(q, keys, values, mask=mask)

        y = self.out(y.reshape(rows, length, d_model))
        state = AttentionState(
            keys[:, length:], values[:, length:], state.position + length
        )
        return y, state
