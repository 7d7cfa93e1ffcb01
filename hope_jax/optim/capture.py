"""What the matrices of a network are multiplied with, found in its backward pass.

Delta gradient descent forgets along the inputs of each matrix, W Σ xₜ xₜᵀ over all the
tokens of a batch, which `jax.grad` does not give. Here each matrix is handed to the
network as a `Captured` one. A product with it is the product with the matrix; in the
backward pass it has one more "gradient", the sum of its inputs' outer products. So a
network is run once, forward and backward, whatever it is made of: layers in a `scan`,
`vmap` over tokens, `checkpoint`, gradients inside. What it costs is one product
[in, N] [N, in] a matrix, beside the three [N, in] [in, out] of its training.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hope_jax.optim.leaves import wide_type

Layers = PyTree[bool] | Callable[[PyTree], PyTree[bool]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "gram", "count", "rate", "slope"),
    meta_fields=("input_axis", "objective", "tokens"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Captured:
    """A matrix whose inputs are noted; `x @ w` and `w @ x` work as with an array.

    It goes through `scan`, `vmap` and `jit` like the array: leading axes are taken off
    all of its fields. The "gradients" of `gram` and `count` are what was noted.

    Attributes:
      weight: the matrix, `[..., I, O]`, or `[..., O, I]` where `input_axis` is -1.
      gram: zeros `[..., I, I]`, of float32 at least. Its gradient is Σ wₜ xₜ xₜᵀ.
      count: zeros `[...]`. Its gradient is the number of inputs.
      rate: `[...]` or None; η of the weights wₜ = 1 / (1 + η ‖xₜ‖²), else wₜ = 1.
      input_axis: the axis along which the matrix multiplies its inputs.
      slope: zeros like the matrix, in place of the two above. Its gradient is that of
        the objective's mean.
      objective: `(y, u) -> scalar`, of each product and what it should have been.
      tokens: how many the loss is a mean over.
    """

    weight: Array
    gram: Array | None = None
    count: Array | None = None
    rate: Array | None = None
    input_axis: int
    slope: Array | None = None
    objective: Callable | None = None
    tokens: int = 1

    __array_ufunc__ = None  # so that NumPy leaves `array @ captured` to us

    def __rmatmul__(self, x):
        if self.input_axis != -2:
            raise TypeError(
                "x @ w multiplies along axis -2 of w, but inputs were asked for of "
                f"axis {self.input_axis}; give dgd_gradients input_axis=-2."
            )
        return dot(x, self)

    def __matmul__(self, x):
        if self.input_axis != -1:
            raise TypeError(
                "w @ x multiplies along axis -1 of w, but inputs were asked for of "
                f"axis {self.input_axis}; give dgd_gradients input_axis=-1."
            )
        x = jnp.asarray(x)
        if x.ndim > 2:
            raise TypeError(
                f"w @ x of a captured w takes a vector or columns, got shape {x.shape};"
                " use jax.vmap, or hope_jax.optim.capture.dot."
            )
        return dot(x.T, self).T

    def __getitem__(self, index):
        if index is not Ellipsis:  # which is how Flax reads a parameter
            raise TypeError(f"{_ONLY_PRODUCTS} It was indexed with {index!r}.")
        return self

    def __array__(self, dtype=None, copy=None):
        raise TypeError(f"{_ONLY_PRODUCTS} It was made an array.")

    def __getattr__(self, name):
        raise AttributeError(f"{_ONLY_PRODUCTS} Its attribute {name!r} was asked for.")


_ONLY_PRODUCTS = (
    "A matrix whose inputs are captured can only be multiplied: x @ w, w @ x or "
    "hope_jax.optim.capture.dot(x, w), as hope_jax.models.layers.Dense does; the dense "
    "and embedding layers of Flax do otherwise. Leave it out with `layers`, or take "
    "the plain arrays of hope_jax.optim.capture.plain(params) for other uses."
)


def dot(x: Float[Array, "*B I"], kernel: Array | Captured) -> Float[Array, "*B O"]:
    """`x @ kernel` of a captured kernel or an array; the product for layers to call.

    Raises:
      TypeError: a kernel that has more than the two axes of a matrix.
    """
    if not isinstance(kernel, Captured):
        return x @ kernel
    if kernel.weight.ndim != 2:
        raise TypeError(
            "a captured matrix must have 2 axes where it is multiplied, got shape "
            f"{kernel.weight.shape}; leading axes belong to jax.lax.scan or jax.vmap."
        )
    x = jnp.asarray(x)
    weight, slope = kernel.weight, kernel.slope
    if kernel.input_axis == -1:
        weight, slope = weight.mT, None if slope is None else slope.mT
    probe = kernel.gram if slope is None else slope
    assert probe is not None  # a captured matrix has one of the two
    static = (probe.dtype.name, kernel.objective, kernel.tokens)
    return _dot(static, x, weight, (kernel.gram, kernel.count, kernel.rate, slope))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(static, x, weight, probes):
    del static, probes
    return x @ weight


def _forward(static, x, weight, probes):
    # Itself, not `x @ weight`: where a gradient is taken inside of the loss, this is
    # what the gradient of the loss sees.
    return _dot(static, x, weight, probes), (x, weight, probes[2])


def _backward(static, residuals, cotangent):
    dtype, objective, tokens = static
    x, weight, rate = residuals
    x_bar = (cotangent @ weight.mT).astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    cotangent = cotangent.reshape(-1, cotangent.shape[-1])
    if objective is not None:
        weight_bar = (rows.T @ cotangent).astype(weight.dtype)
        said = (rows @ weight).astype(dtype)
        wanted = -cotangent.astype(dtype) * jnp.asarray(tokens, dtype)
        error = jax.vmap(jax.grad(objective))(said, wanted) / tokens
        slope = rows.T.astype(dtype) @ error
        return x_bar, weight_bar, (None, None, None, slope)
    scaled = rows
    if rate is not None:
        wide = rows.astype(dtype)
        norm = jnp.sum(wide**2, axis=-1, keepdims=True)
        scaled = (wide / (1.0 + rate.astype(dtype) * norm)).astype(rows.dtype)
    exact = wide_type(rows.dtype)
    gram = jnp.matmul(scaled.T, rows, preferred_element_type=exact).astype(dtype)
    # A constant 1 would be one count for all of a vmap; this is one for each input.
    ones = jnp.where(jnp.isnan(rows[:, 0]), 1.0, 1.0).astype(dtype)
    weight_bar = (scaled.T @ cotangent).astype(weight.dtype)
    no_rate = None if rate is None else jnp.zeros_like(rate)
    return x_bar, weight_bar, (gram, jnp.sum(ones), no_rate, None)


_dot.defvjp(_forward, _backward)


def capture(
    params: PyTree,
    layers: Layers | None = None,
    *,
    input_axis: int = -2,
    token_rate: float | Array | None = None,
    objective: Callable | None = None,
    tokens: int = 1,
) -> PyTree:
    """`params` with matrices as `Captured` ones; see `dgd_gradients` and, for the last
    two, `value_and_slopes`."""
    if input_axis not in (-1, -2):
        raise ValueError(
            f"input_axis must be -1 (y = W x) or -2 (y = x W), got {input_axis}."
        )
    if layers is None:
        layers = jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)
    elif callable(layers):
        layers = layers(params)

    def take(chosen, leaf):
        if not chosen:
            return leaf
        if jnp.ndim(leaf) < 2:
            raise ValueError(
                f"layers names a leaf of shape {jnp.shape(leaf)}, which is no matrix."
            )
        dtype = wide_type(leaf.dtype)
        if objective is not None:
            return Captured(
                weight=leaf,
                slope=jnp.zeros(leaf.shape, dtype),
                input_axis=input_axis,
                objective=objective,
                tokens=tokens,
            )
        lead, width = leaf.shape[:-2], leaf.shape[input_axis]
        rate = token_rate
        if rate is not None:
            rate = jnp.broadcast_to(jnp.asarray(rate, dtype), lead)
        return Captured(
            weight=leaf,
            gram=jnp.zeros((*lead, width, width), dtype),
            count=jnp.zeros(lead, dtype),
            rate=rate,
            input_axis=input_axis,
        )

    return jax.tree.map(take, layers, params)


def plain(params: PyTree) -> PyTree:
    """The arrays of parameters of which some may be captured."""
    return _of_captured(lambda w: w.weight, lambda leaf: leaf, params)


def grams(noted: PyTree, reduce: Literal["mean", "sum"] = "sum") -> PyTree:
    """The `inputs` in the gradient of captured parameters; None for other leaves."""

    def inputs_of(matrix: Captured) -> Array:
        assert matrix.gram is not None and matrix.count is not None
        if reduce == "sum":
            return matrix.gram
        return matrix.gram / jnp.maximum(matrix.count, 1.0)[..., None, None]

    return _of_captured(inputs_of, lambda leaf: None, noted)


def slopes(noted: PyTree) -> PyTree:
    """The slopes in the gradient of captured parameters; of other leaves, that."""
    return _of_captured(
        lambda w: w.slope.astype(w.weight.dtype), lambda leaf: leaf, noted
    )


def value_and_dgd_gradients(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    layers: Layers | None = None,
    input_axis: int = -2,
    reduce: Literal["mean", "sum"] = "mean",
    token_rate: float | Array | None = None,
    has_aux: bool = False,
) -> tuple[Any, PyTree, PyTree]:
    """Value, gradients, and what `hope_jax.optim.rules.dgd.dgd` takes as `inputs`.

    The inputs of a matrix are its Gram matrix Σ xₜ xₜᵀ over everything that it
    multiplied: all tokens of all rows, and all calls of a shared layer.

    A layer of one's own needs nothing but to multiply by its matrix in one of the ways
    `x @ w`, `w @ x` (`input_axis=-1`) or `dot(x, w)`. Those of this repository's models
    are found by `hope_jax.models.capture.dense_kernels`.

    Args:
      loss_fn: `(params, *args) -> loss`, or `(loss, aux)` with `has_aux`.
      params: differentiated; nothing is done to them.
      *args: handed on.
      layers: which leaves are matrices to capture: a tree of bools like the parameters,
        or a function that makes it; by default all that have two axes or more. Leading
        axes are those of layers in a scan.
      input_axis: -2 for y = x W, -1 for y = W x; the same as of `dgd`.
      reduce: `mean` divides the sum by the number of inputs, as a loss does that is a
        mean over tokens: with ∇W = 1/N Σ δₜ xₜᵀ the objective is then the mean over
        tokens of ½‖W xₜ + δₜ‖². `sum` is for a loss that is a sum. Tokens that the loss
        masks are inputs like the others.
      token_rate: η; weighs every token by 1 / (1 + η ‖xₜ‖²), in the inputs and in the
        gradients of the captured matrices. One step of `dgd(η, explicit=True)` is then
        the mean (sum) over tokens of each token's own step of equation 57. By default
        no weights: `dgd` solves for all tokens together, at a rate of its own.
      has_aux: see `loss_fn`.

    Returns:
      `(loss, gradients, inputs)`, the first `(loss, aux)` with `has_aux`. Inputs are
      None for leaves that were not captured.

    >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros((1,))}
    >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    >>> def loss(params, x):
    ...     return jnp.mean(x @ params["w"] + params["b"][None])
    >>> _, _, inputs = value_and_dgd_gradients(loss, params, x, reduce="sum")
    >>> inputs["w"].tolist(), inputs["b"]  # xᵀ x
    ([[10.0, 2.0], [2.0, 4.0]], None)
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}.")

    captured = capture(params, layers, input_axis=input_axis, token_rate=token_rate)
    value, noted = jax.value_and_grad(loss_fn, has_aux=has_aux)(captured, *args)
    return value, plain(noted), grams(noted, reduce)


def dgd_gradients(
    loss_fn: Callable[..., Any], params: PyTree, *args: Any, **options: Any
) -> tuple[PyTree, PyTree]:
    """`value_and_dgd_gradients` without the value: `(gradients, inputs)`.

    gradients, inputs = dgd_gradients(loss_fn, params, batch)
    updates, state = rule.update(gradients, state, params, inputs=inputs)
    """
    _, gradients, inputs = value_and_dgd_gradients(loss_fn, params, *args, **options)
    return gradients, inputs


def value_and_slopes(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    objective: Callable[[Array, Array], Array],
    tokens: int,
    layers: Layers | None = None,
    input_axis: int = -2,
    has_aux: bool = False,
) -> tuple[Any, PyTree]:
    """Value, and what `hope_jax.optim.slopes.descend_slopes` takes as gradients.

    The slope of a matrix is the gradient of the mean over tokens of ℓ(yₜ, uₜ), where yₜ
    is a product with it and uₜ = −∇yLₜ what that should have been, a constant. It is
    summed up in the backward pass, where both are at hand: nothing is kept for a token.

    Args:
      objective: ℓ, of two vectors; a function that is made once, for programs are kept
        by it (`hope_jax.optim.slopes.objective`).
      tokens: N, for a loss that is a mean over N tokens, L = Σ Lₜ / N; 1 for a sum.
      loss_fn, params, args, layers, input_axis, has_aux: see `value_and_dgd_gradients`.

    Returns:
      `(loss, slopes)`, the first `(loss, aux)` with `has_aux`. Leaves that were not
      captured have their gradients.

    >>> params, x = jnp.ones((2, 1)), jnp.array([[1.0, 2.0], [3.0, 0.0]])
    >>> def loss(w, x):
    ...     return jnp.mean(x @ w)
    >>> def dot(y, u):
    ...     return -jnp.vdot(y, u)
    >>> value_and_slopes(loss, params, x, objective=dot, tokens=2)[1].ravel().tolist()
    [2.0, 1.0]
    """
    captured = capture(
        params, layers, input_axis=input_axis, objective=objective, tokens=tokens
    )
    value, noted = jax.value_and_grad(loss_fn, has_aux=has_aux)(captured, *args)
    return value, slopes(noted)


def _of_captured(captured: Callable, other: Callable, tree: PyTree) -> PyTree:
    def is_captured(leaf):
        return isinstance(leaf, Captured)

    return jax.tree.map(
        lambda leaf: captured(leaf) if is_captured(leaf) else other(leaf),
        tree,
        is_leaf=is_captured,
    )
