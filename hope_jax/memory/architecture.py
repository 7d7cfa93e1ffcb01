"""Memory architectures: the function class of an associative memory.

An architecture is written once, as a function of its matrix products. What `multiply`
does then decides what is computed: the plain output, the vector that each matrix meets
(delta gradient descent forgets along it), the error of each product (a gradient is
their outer product), or, in `kernels.chunk`, a product with every token's own state.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hope_jax.core.config import Kinds
from hope_jax.memory.choice import Choice

if TYPE_CHECKING:
    from hope_jax.memory.compose import MemoryConfig

Weights = dict[str, Array]
Multiply = Callable[[str, Array], Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


Product = Callable[[Array, Array], Array]  # of a matrix, or a diagonal, with vectors


def product(w: Array, x: Float[Array, "*B K"]) -> Array:
    """`w x` for a matrix, or a diagonal, over leading axes of x."""
    if w.ndim == 1:
        return x * jnp.broadcast_to(w, x.shape)
    if x.ndim == 2 and x.shape[0] == 1:  # compilers would turn the matrix for `x @ w.T`
        return (w @ x[0])[None]
    return x @ w.T


@jax.custom_vjp
def narrow_product(w: Float[Array, "V K"], x: Float[Array, "*B K"]) -> Array:
    """`product` of factors rounded to bfloat16, summed in float32; its gradients, too.

    Fast matrix units take six passes for a float32 product and one for this.
    """
    narrow = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return jnp.einsum(
        "...k,vk->...v",
        *narrow,
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _narrow_forward(w, x):
    return narrow_product(w, x), (w, x)


def _narrow_backward(residuals, error):
    w, x = residuals
    rows = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    return narrow_product(rows(x).T, rows(error).T), narrow_product(w.T, error)


narrow_product.defvjp(_narrow_forward, _narrow_backward)

PRODUCTS: dict[str, Product] = {"float32": product, "bfloat16": narrow_product}


class Architecture(NamedTuple):
    """A memory for one stream and one head; callers `vmap`.

    Attributes:
      init: `key -> weights`, float32: matrices `[V, K]`, or diagonals `[K]`.
      forward: `(multiply, x: [*B, K]) -> [*B, V]`, where `multiply(name, x)` is the
        product with the matrix of that name, over any leading axes.
      product: how these products are taken.
    """

    init: Callable[[Array], Weights]
    forward: Callable[[Multiply, Array], Array]
    product: Product = product

    def apply(self, weights: Weights, x: Float[Array, "*B K"]) -> Float[Array, "*B V"]:
        return self.forward(lambda name, x: self.product(weights[name], x), x)

    def inputs(self, weights: Weights, x: Float[Array, "*B K"]) -> dict[str, Array]:
        """What each matrix multiplies."""
        met = {}

        def multiply(name, x):
            met[name] = x
            return self.product(weights[name], x)

        self.forward(multiply, x)
        return met

    def inputs_and_errors(
        self,
        weights: Weights,
        x: Float[Array, "B K"],
        blame: Callable[[Array], Array],
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """What each matrix multiplies and the loss's gradient in each product, for B
        keys; `blame` is the gradient of the loss in the outputs, `[B, V] -> [B, V]`."""
        met = {}

        def perturbed(shifts):
            def multiply(name, x):
                met[name] = x
                return _shifted(self.product(weights[name], x), shifts[name])

            return self.forward(multiply, x), dict(met)

        still = {
            name: jnp.zeros((x.shape[0], w.shape[0]), w.dtype)
            for name, w in weights.items()
        }
        output, pullback, inputs = jax.vjp(perturbed, still, has_aux=True)
        (errors,) = pullback(blame(output))
        return inputs, errors


@jax.custom_vjp
def _shifted(y, shift):
    """`y + shift` where the shift is zero, and there only for its derivative."""
    del shift
    return y


_shifted.defvjp(lambda y, shift: (y, None), lambda _, error: (error, error))


def vector(width: int) -> Architecture:
    """`w ⊙ x`: a diagonal, the memory of element-wise gated RNNs; zero at the start."""
    return Architecture(
        init=lambda key: {"w": jnp.zeros((width,), jnp.float32)},
        forward=lambda multiply, x: multiply("w", x),
    )


def linear(
    width: int, key_width: int | None = None, skip: Callable | None = None
) -> Architecture:
    """`M x`, or `skip(x) + LN(M x)`: a matrix, zero at the start unless the level above
    learns its start."""

    def forward(multiply, x):
        out = multiply("w", x)
        return out if skip is None else skip(x) + normalise(out)

    return Architecture(
        init=lambda key: {"w": jnp.zeros((width, key_width or width), jnp.float32)},
        forward=forward,
    )


def mlp(
    width: int,
    hidden: int,
    activation: str = "gelu",
    *,
    depth: int = 2,
    gated: bool = False,
    norm: bool = False,
    key_width: int | None = None,
    skip: Callable[[Array], Array] = lambda x: x,
) -> Architecture:
    """`x + W1 σ(W2 x)`: the residual memory of equation 89 (arXiv:2512.24695).

    Args:
      width: of values, and of keys unless `key_width` says otherwise.
      hidden: width of every hidden layer.
      activation: σ.
      depth: matrices in a row, `W1 σ(W2 σ(... W_depth x))`.
      gated: `x + W1 (σ(W2 x) ⊙ W3 x)` (ATLAS++, arXiv:2505.23735, equation 43).
      norm: `x + LN(...)`, as in TTT and MIRAS, with the LN of `normalise`.
      key_width: width of keys where a feature map has widened them.
      skip: the part of a key, `[V]`, that reaches the output unchanged.
    """
    sigma = ACTIVATIONS[activation]
    key_width = key_width or width
    if gated:
        shapes = {
            "w1": (width, hidden),
            "w2": (hidden, key_width),
            "w3": (hidden, key_width),
        }
    else:
        sizes = [width, *[hidden] * (depth - 1), key_width]
        shapes = {f"w{i + 1}": (sizes[i], sizes[i + 1]) for i in range(depth)}

    def init(key: Array) -> Weights:
        keys = jax.random.split(key, len(shapes))
        scale = {name: shape[1] ** -0.5 for name, shape in shapes.items()}
        scale["w1"] *= 0.5
        return {
            name: jax.random.normal(key, shape) * scale[name]
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def forward(multiply: Multiply, x: Array) -> Array:
        if gated:
            h = sigma(multiply("w2", x)) * multiply("w3", x)
        else:
            h = x
            for i in range(depth, 1, -1):
                h = sigma(multiply(f"w{i}", h))
        out = multiply("w1", h)
        return skip(x) + (normalise(out) if norm else out)

    return Architecture(init, forward)


def normalise(x: Float[Array, "*B V"], epsilon: float = 0.1) -> Float[Array, "*B V"]:
    """Layer normalisation to unit length, of what is not much shorter than that.

    TTT and MIRAS have a gain where this has `1 / √V`: keys and values of a memory have
    unit length, and an output √V times as long could never meet its value. Nor is an
    output shorter than `√epsilon` stretched: a memory that decay has made small would
    move by as much as it is long at every token, and small differences would grow until
    neither its reads nor their gradients mean anything.
    """
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionClass(Choice):
    """An architecture by name, and what is so of it.

    Attributes:
      make: `(config, width, key_width, skip) -> Architecture`; `skip` gives the part of
        a mapped key that a residual memory adds to what it recalls.
      first: the names of the matrices that a key meets.
      linear: its answer is linear in its parameters, unless it is normed; they are one
        leaf, `w`.
      diagonal: that leaf is a vector, whose numbers never mix.
      residual: it is `x + w1 h(x)`, and passes its input on where `w1` is zero.
      two_layers: it is `w1` over features that `w2` makes, and `memory.rates` knows how
        far a step of each moves the answer.
    """

    make: Callable[["MemoryConfig", int, int, Callable[[Array], Array]], Architecture]
    first: Callable[["MemoryConfig"], tuple[str, ...]]
    linear: bool = False
    diagonal: bool = False
    residual: bool = False
    two_layers: bool = False

    @property
    def matrix(self) -> bool:
        return self.linear and not self.diagonal


def _mlp(config, width, key_width, skip, **shape):
    return mlp(
        width,
        config.expansion * width,
        config.activation,
        norm=config.norm,
        key_width=key_width,
        skip=skip,
        **shape,
    )


_MLP_OPTIONS = ("norm", "expansion", "activation")

ARCHITECTURES: Kinds[FunctionClass] = Kinds.of_entries(
    "architecture",
    FunctionClass(
        kind="vector",
        make=lambda config, width, key_width, skip: vector(width),
        first=lambda config: ("w",),
        linear=True,
        diagonal=True,
    ),
    FunctionClass(
        kind="linear",
        words="matrix",
        options=("norm",),
        make=lambda config, width, key_width, skip: linear(
            width, key_width, skip if config.norm else None
        ),
        first=lambda config: ("w",),
        linear=True,
    ),
    FunctionClass(
        kind="mlp",
        words="MLP",
        options=_MLP_OPTIONS,
        make=_mlp,
        first=lambda config: ("w2",),
        residual=True,
        two_layers=True,
    ),
    FunctionClass(
        kind="gated_mlp",
        words="gated MLP",
        options=_MLP_OPTIONS,
        make=lambda *given: _mlp(*given, gated=True),
        first=lambda config: ("w2", "w3"),
        residual=True,
    ),
    FunctionClass(
        kind="deep_mlp",
        words="{depth}-layer MLP",
        options=(*_MLP_OPTIONS, "depth"),
        make=lambda config, *given: _mlp(config, *given, depth=config.depth),
        first=lambda config: (f"w{config.depth}",),
        residual=True,
    ),
)
