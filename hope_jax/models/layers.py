"""The parts that blocks share: convolution, gated MLP, rotary positions."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from hope_jax.models.rotary import PLAIN, Rotary
from hope_jax.optim import capture
from hope_jax.optim.leaves import wide_type

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float64": jnp.float64}
_SPREAD = 16  # of half-lives over the heads, at the start


def unit(x: Float[Array, "*B K"], epsilon: float = 1e-6) -> Float[Array, "*B K"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + epsilon)


def first_half_lives(
    shortest: float, heads: int, longest: float = 0.0
) -> Float[Array, " H"]:
    """Tokens after which a fresh head has forgotten half: from `shortest` to 16 times
    that, the last head's at least `longest`."""
    most = max(_SPREAD * shortest, longest)
    return jnp.geomspace(shortest, most, heads, dtype=jnp.float32)


class Dense(nnx.Linear):
    """`nnx.Linear` whose inputs can be captured (`hope_jax.optim.capture`)."""

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        kernel = self.kernel[...]
        if not isinstance(kernel, capture.Captured):
            return super().__call__(x)
        x, weight, bias = self.promote_dtype(
            (x, kernel.weight, None if self.bias is None else self.bias[...]),
            dtype=self.dtype,
        )
        y = capture.dot(x, dataclasses.replace(kernel, weight=weight))
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def dense(
    d_in: int,
    d_out: int,
    dtype,
    rngs: nnx.Rngs,
    scale: float = 1.0,
    bias: bool = False,
):
    """A projection, `scale / sqrt(d_in)` at the start; its bias starts at 0."""
    init = nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")
    return Dense(d_in, d_out, use_bias=bias, kernel_init=init, dtype=dtype, rngs=rngs)


def rms_norm(width: int, dtype, rngs: nnx.Rngs, epsilon: float) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)


class CausalConv(nnx.Module):
    """A depth-wise causal convolution over time, which starts as the identity.

    Written as shifted products: the compiler's own depth-wise convolution is slower by
    an order of magnitude on CPUs, its gradient by more.
    """

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        del rngs
        kernel = jnp.zeros((width, channels), jnp.float32).at[-1].set(1.0)
        self.kernel = nnx.Param(kernel)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tail: Float[Array, "B W D"],
        count: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B W D"]]:
        """`tail` is the last `width - 1` inputs before `x`; the new one, at the end of
        x or after `count` of its tokens, is returned."""
        kernel = self.kernel[...].astype(x.dtype)
        width, length = kernel.shape[0], x.shape[1]
        x = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
        taps = (x[:, i : i + length] * kernel[i][None, None] for i in range(width))
        if count is None:
            last = x[:, length:]
        else:
            last = jax.lax.dynamic_slice_in_dim(x, count, width - 1, axis=1)
        return functools.reduce(jnp.add, taps), last.astype(tail.dtype)

    @property
    def width(self) -> int:
        return self.kernel.shape[0]

    def tail(self, rows: int) -> Float[Array, "B W D"]:
        width, channels = self.kernel.shape
        return jnp.zeros((rows, width - 1, channels), self.kernel.dtype)


class Tails(NamedTuple):
    """The last inputs of the convolutions of keys, values and queries."""

    k: Float[Array, "B W D"]
    v: Float[Array, "B W D"]
    q: Float[Array, "B W D"]


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}


class GatedMLP(nnx.Module):
    """`W_down (f(W_gate x) * W_up x)`: with f of `ACTIVATIONS` SwiGLU or GeGLU
    (arXiv:2002.05202)."""

    def __init__(
        self,
        d_model: int,
        hidden: int,
        dtype,
        activation: str = "silu",
        bias: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.gate = dense(d_model, hidden, dtype, rngs, bias=bias)
        self.up = dense(d_model, hidden, dtype, rngs, bias=bias)
        self.down = dense(hidden, d_model, dtype, rngs, scale=0.5, bias=bias)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(self.hidden(x))

    def hidden(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """What the last projection reads."""
        return ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)


def where_rows(rows: Bool[Array, " B"], new: PyTree, old: PyTree) -> PyTree:
    """`new` in the rows that are chosen; rows lead every leaf, and a leaf of `new` may
    have one row for all."""

    def choose(a, b):
        return jnp.where(rows.reshape(-1, *[1] * (b.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def rotary(
    x: Float[Array, "B T H K"], position: Int[Array, "B T"], how: Rotary = PLAIN
) -> Float[Array, "B T H K"]:
    """Rotary position embedding (arXiv:2104.09864): relative under the dot product.

    Phases are counted in whole parts of a turn, 2^32 of them, which wrap round as the
    integers do: two tokens meet at the same angle however far into a text they are.
    """
    half = x.shape[-1] // 2
    whole = np.uint64 if x.dtype == jnp.float64 else np.uint32
    parts = 2.0 ** np.iinfo(whole).bits
    turns = how.frequencies(half) / (2.0 * np.pi)
    a_token = jnp.asarray(np.rint(turns * parts).astype(whole))
    phase = position[:, :, None, None].astype(whole) * a_token[None, None, None]
    signed = jax.lax.bitcast_convert_type(
        phase, np.int64 if whole is np.uint64 else np.int32
    )
    angle = signed.astype(wide_type(x.dtype)) * (2.0 * np.pi / parts)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
