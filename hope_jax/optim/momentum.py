"""Momentum as an associative memory of gradients: Hebbian, and with the delta rule.

Each rule is here twice: as a `Level` (what it is; `from_level` makes it an optimizer)
and as an optax transformation (the same, in closed form).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.core.level import Level

Stability = Literal["proximal", "clip", "literal"]
Form = Literal["element", "matrix"]


class MomentumState(NamedTuple):
    """The memory of gradients, in float32 or wider, and how many it has seen."""

    memory: PyTree
    count: Int[Array, ""]


def hebbian_level(learning_rate: float, *, decay: float = 0.9) -> Level:
    """Momentum as a level: a linear memory that descends <m, g> and forgets.

        mᵢ₊₁ = α mᵢ − η gᵢ   (equation 33, arXiv:2512.24695)

    Without forgetting (α = 1) this is gradient descent on equation 34.
    """
    _check_decay(decay)
    return Level(
        init=lambda key: jnp.zeros(()),
        read=lambda m, g: m,
        objective=lambda m, g: jnp.vdot(m, g),
        flow=_forgetting(learning_rate, decay),
        read_at="post",
    )


def delta_level(learning_rate: float, *, decay: float = 0.9) -> Level:
    """Delta momentum as a level: element by element, the delta rule over gradients.

    ½ (m g + 1)²,   mᵢ₊₁ = (α − η gᵢ²) mᵢ − η gᵢ   (equation 49, value-less)
    """
    _check_decay(decay)
    return Level(
        init=lambda key: jnp.zeros(()),
        read=lambda m, g: m,
        objective=lambda m, g: 0.5 * jnp.sum((m * g + 1.0) ** 2),
        flow=_forgetting(learning_rate, decay),
        read_at="post",
    )


def momentum(
    learning_rate: optax.ScalarOrSchedule, *, decay: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with momentum, written as the memory that it is.

        mᵢ₊₁ = α mᵢ − η gᵢ,   Wᵢ₊₁ = Wᵢ + mᵢ₊₁   (equation 33)

    For a constant rate this is `optax.sgd(learning_rate, momentum=decay)`, whose trace
    is −m/η. With a schedule they differ: here each gradient keeps the rate at which it
    was stored.

    Args:
      learning_rate: η, a number or a schedule.
      decay: α, how much of the memory is kept at each step, in [0, 1].
    """
    _check_decay(decay)

    def step(memory, gradient, rate):
        return decay * memory - rate * gradient

    return _with_memory(step, learning_rate)


def delta_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.9,
    form: Form = "element",
    stability: Stability = "proximal",
) -> optax.GradientTransformationExtraArgs:
    """Momentum by the delta rule: what it forgets depends on the gradient.

        element:  mᵢ₊₁ = mᵢ (α − η gᵢ²) − η gᵢ         (descends ½ (m g + 1)²)
        matrix:   mᵢ₊₁ = mᵢ (α I − η gᵢᵀ gᵢ) − η gᵢ    (descends ½ ‖m gᵀ + I‖²)

    These are equations 48-49 with P = I, with the step size on the decay and the minus
    sign that the print lacks (arXiv:2512.24695). As printed the memory blows up where
    η g² > α + 1; `stability` says what is done about that.

    Args:
      learning_rate: η, a number or a schedule.
      decay: α, how much of the memory is kept at each step, in [0, 1].
      form: `element` for each number by itself, or `matrix` for the last two axes of a
        leaf. A leaf with one axis is a matrix of one row; leading axes are a batch.
      stability: `proximal` solves for mᵢ₊₁ exactly, from α mᵢ, instead of taking one
        step: element by element αm(1 − η'g²) − η'g with η' = η / (1 + η g²), which
        cannot blow up. `clip` forgets with η at most α/g² (matrix: α/‖g‖²).
        `literal` takes the step as it is.
    """
    _check_decay(decay)
    if form not in ("element", "matrix"):
        raise ValueError(f"form must be 'element' or 'matrix', got {form!r}.")
    if stability not in ("proximal", "clip", "literal"):
        raise ValueError(
            f"stability must be 'proximal', 'clip' or 'literal', got {stability!r}."
        )

    def element(memory, gradient, rate):
        square = gradient**2
        if stability == "proximal":
            return (decay * memory - rate * gradient) / (1 + rate * square)
        forgotten = rate * square
        if stability == "clip":
            forgotten = jnp.minimum(forgotten, decay)
        return (decay - forgotten) * memory - rate * gradient

    def matrix(memory, gradient, rate):
        shape = gradient.shape
        g = gradient.reshape((1,) * (2 - gradient.ndim) + shape)
        m = memory.reshape(g.shape)
        if stability == "proximal":
            m = _solve(decay * m - rate * g, g, rate)
        else:
            forgetting = rate
            if stability == "clip":
                norm = jnp.sum(g**2, axis=(-2, -1), keepdims=True)
                forgetting = jnp.minimum(
                    rate, decay / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
                )
            m = decay * m - forgetting * (m @ g.mT) @ g - rate * g
        return m.reshape(shape)

    return _with_memory(element if form == "element" else matrix, learning_rate)


def _solve(
    right: Float[Array, "*batch R C"], g: Float[Array, "*batch R C"], rate: Array
) -> Float[Array, "*batch R C"]:
    """right (I + η gᵀ g)⁻¹, solved in the smaller of the two widths (Woodbury)."""
    rows, columns = g.shape[-2:]
    if columns <= rows:
        inner = _plus_identity(rate * g.mT @ g)
        return jnp.linalg.solve(inner, right.mT).mT
    inner = _plus_identity(rate * g @ g.mT)
    return right - rate * (right @ g.mT) @ jnp.linalg.solve(inner, g)


def _plus_identity(square):
    eye = jnp.eye(square.shape[-1], dtype=square.dtype)
    return square + jnp.broadcast_to(eye, square.shape)


def _with_memory(step, learning_rate) -> optax.GradientTransformationExtraArgs:
    """Carries `step(memory, gradient, rate) -> memory` for each leaf."""

    def wide(leaf):  # in bfloat16 a decay of 0.999 is 1
        narrow = jnp.finfo(leaf.dtype).bits < 32
        return leaf.astype(jnp.float32 if narrow else leaf.dtype)

    def init(params):
        memory = jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)
        return MomentumState(memory, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        del params, extra
        rate = learning_rate
        if callable(learning_rate):
            rate = learning_rate(state.count)

        def move(gradient, memory):
            return step(memory, wide(gradient), jnp.asarray(rate, memory.dtype))

        memory = jax.tree.map(move, updates, state.memory)
        updates = jax.tree.map(lambda m, g: m.astype(g.dtype), memory, updates)
        return updates, MomentumState(memory, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _forgetting(learning_rate, decay) -> optax.GradientTransformation:
    """m ← α m − η ∇: gradient descent with retention α."""
    return optax.chain(
        optax.scale(learning_rate),
        optax.add_decayed_weights(1.0 - decay),
        optax.scale(-1.0),
    )


def _check_decay(decay):
    if not 0.0 <= decay <= 1.0:
        raise ValueError(
            f"decay is the part of the memory that is kept, in [0, 1]; got {decay}."
        )
