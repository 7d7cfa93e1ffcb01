"""Momentum as an associative memory of gradients: Hebbian, or by the delta rule.

Both are here twice: as a `Level` (what they are; `from_level` makes it an optimizer)
and as an optax transformation (the same, in closed form). Then what equations 46, 47,
51 and 52 of arXiv:2512.24695 put into the same place. `rules.deep_momentum` has the one
of equation 50, and `generalised` those that take any memory of `hope_jax.memory`.

Memories of gradients are float32 or wider, whatever type the parameters have. With
`optax.inject_hyperparams`, functions, configs and whole numbers are `static_args`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.core.level import Level
from hope_jax.kernels.newton_schulz import orthogonalise
from hope_jax.optim.leaves import (
    as_matrix,
    as_type,
    check_fraction,
    direction_of,
    guarded,
    like,
    next_count,
    rate_at,
    wide,
    zeros,
)

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
    check_fraction("decay", decay)
    return Level(
        init=lambda key: jnp.zeros(()),
        read=lambda m, g: m,
        objective=lambda m, g: jnp.vdot(m, g),
        flow=_forgetting(learning_rate, decay),
        objective_name="⟨m, g⟩",
        flow_name="GD that forgets",
        read_at="post",
    )


def delta_level(learning_rate: float, *, decay: float = 0.9) -> Level:
    """Delta momentum as a level: element by element, the delta rule over gradients.

    ½ (m g + 1)²,   mᵢ₊₁ = (α − η gᵢ²) mᵢ − η gᵢ   (equation 49, value-less)
    """
    check_fraction("decay", decay)
    return Level(
        init=lambda key: jnp.zeros(()),
        read=lambda m, g: m,
        objective=lambda m, g: 0.5 * jnp.sum((m * g + 1.0) ** 2),
        flow=_forgetting(learning_rate, decay),
        objective_name="½‖m g + 1‖²",
        flow_name="GD that forgets",
        read_at="post",
    )


@guarded(complex_too=True)
def momentum(
    learning_rate: optax.ScalarOrSchedule, *, decay: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with momentum, written as the memory that it is.

        mᵢ₊₁ = α mᵢ − η gᵢ,   Wᵢ₊₁ = Wᵢ + mᵢ₊₁   (equation 33)

    For a constant rate this is `optax.sgd(learning_rate, momentum=decay)`, whose trace
    is −m/η. With a schedule they differ: here each gradient keeps the rate at which it
    was stored. The update is of degree 1: gradients twice as large move twice as far.

    Args:
      learning_rate: η, a number or a schedule.
      decay: α, how much of the memory is kept at each step, in [0, 1].
    """
    check_fraction("decay", decay)

    def step(memory, gradient, rate):
        return as_type(decay, memory) * memory - rate * gradient

    return _with_memory(step, learning_rate)


@guarded
def delta_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.9,
    form: Form = "element",
    stability: Stability = "proximal",
    precondition: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum by the delta rule: what it forgets depends on the gradient.

        element:  mᵢ₊₁ = mᵢ (α − η gᵢ²) − η P gᵢ         (descends ½ (m g + P)²)
        matrix:   mᵢ₊₁ = mᵢ (α I − η gᵢᵀ gᵢ) − η P gᵢ    (descends ½ ‖m gᵀ + P‖²)

    These are equations 48-49, with the step size on the decay and the minus sign that
    the print lacks (arXiv:2512.24695). As printed the memory blows up where
    η g² > α + 1; `stability` says what is done about that. Large gradients therefore
    count less than in momentum: for η g² ≫ 1 the proximal memory is −P/g, whatever η.

    Args:
      learning_rate: η, a number or a schedule.
      decay: α, how much of the memory is kept at each step, in [0, 1].
      form: `element` for each number by itself, or `matrix` for the last two axes of a
        leaf. A leaf with one axis is a matrix of one row; leading axes are a batch.
      stability: `proximal` solves for mᵢ₊₁ exactly, from α mᵢ, instead of taking one
        step: element by element αm(1 − η'g²) − η'g with η' = η / (1 + η g²), which
        cannot blow up. `clip` forgets with η at most α/g² (matrix: α/‖g‖²).
        `literal` takes the step as it is. Only `literal` can overflow.
      precondition: P, a tree like the parameters of numbers, of arrays of a leaf's own
        shape (`element`), or of square matrices that multiply its rows from the left
        (`matrix`); None, for a leaf or for all, is 1.
    """
    check_fraction("decay", decay)
    if form not in ("element", "matrix"):
        raise ValueError(f"form must be 'element' or 'matrix', got {form!r}.")
    if stability not in ("proximal", "clip", "literal"):
        raise ValueError(
            f"stability must be 'proximal', 'clip' or 'literal', got {stability!r}."
        )

    def scaled(p, gradient):
        if p is None:
            return gradient
        p = as_type(p, gradient)
        if p.shape not in ((), gradient.shape):
            raise ValueError(
                f"precondition has shape {p.shape} for a gradient of shape "
                f"{gradient.shape}: with form='element' it must be a number or have "
                "that shape."
            )
        return p * gradient

    def element(memory, gradient, rate, p=None):
        alpha = as_type(decay, memory)
        if stability == "literal":
            written = rate * scaled(p, gradient)
            return (alpha - rate * gradient**2) * memory - written
        forgotten = (jnp.sqrt(rate) * gradient) ** 2  # 0 at rate 0, however large g
        if stability == "proximal":
            written = rate * scaled(p, gradient)
            return (alpha * memory - written) / (1 + forgotten)
        written = rate * scaled(p, gradient)
        return (alpha - jnp.minimum(forgotten, alpha)) * memory - written

    def matrix(memory, gradient, rate, p=None):
        alpha = as_type(decay, memory)
        g, m = as_matrix(gradient), as_matrix(memory)
        if stability == "proximal":
            kept, written = _proximal(m, g, rate)
            m = alpha * kept - _multiply(p, written)
        elif stability == "clip":
            direction, size = direction_of(g, (-2, -1))
            forgotten = jnp.minimum((jnp.sqrt(rate) * size) ** 2, alpha)
            m = alpha * m - forgotten * (m @ direction.mT) @ direction
            m = m - rate * _multiply(p, g)
        else:
            m = alpha * m - rate * (m @ g.mT) @ g - rate * _multiply(p, g)
        return m.reshape(gradient.shape)

    step = element if form == "element" else matrix
    return _with_memory(step, learning_rate, precondition=precondition)


def _proximal(
    m: Float[Array, "*batch R C"], g: Float[Array, "*batch R C"], rate
) -> tuple[Float[Array, "*batch R C"], Float[Array, "*batch R C"]]:
    """m (I + η gᵀ g)⁻¹ and η g (I + η gᵀ g)⁻¹, solved in the smaller of the two widths.

    With h = √η g they are m − m hᵀ S and √η S for S = (I + h hᵀ)⁻¹ h, and h is scaled
    down first, so that no product overflows.
    """
    h = jnp.sqrt(rate) * g
    scale = jnp.maximum(1.0, jnp.max(jnp.abs(h), axis=(-2, -1), keepdims=True))
    h = h / scale
    rows, columns = h.shape[-2:]
    gram = h.mT @ h if columns < rows else h @ h.mT
    # Below its rounding error no diagonal makes a singular matrix a regular one.
    trace = jnp.sum(h**2, axis=(-2, -1), keepdims=True)
    least = 16 * jnp.finfo(h.dtype).eps * trace
    inner = _plus_identity(gram, jnp.maximum(1 / scale**2, least))
    if columns < rows:
        solved = jnp.linalg.solve(inner, h.mT).mT
    else:
        solved = jnp.linalg.solve(inner, h)
    return m - (m @ h.mT) @ solved, jnp.sqrt(rate) / scale * solved


def _plus_identity(square, amount):
    eye = jnp.eye(square.shape[-1], dtype=square.dtype)
    return square + amount * jnp.broadcast_to(eye, square.shape)


class AfterState(NamedTuple):
    """The states of what a momentum stores and of the momentum."""

    signal: PyTree
    momentum: PyTree


@guarded
def preconditioned_momentum(
    learning_rate: optax.ScalarOrSchedule,
    precondition: Any,
    *,
    decay: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Momentum of preconditioned gradients.

        mᵢ₊₁ = α mᵢ − η P gᵢ   (equations 46 and 47, arXiv:2512.24695)

    It descends ⟨m gᵀ, −P⟩ with the sign that lowers the loss; the print forgets α. With
    `decay=0` it is preconditioned gradient descent, equations 38 and 39. The scale
    behaviour is that of P: for a matrix, a gradient twice as large moves twice as far.

    Args:
      learning_rate: η, a number or a schedule.
      precondition: P, as one of
        - a transformation whose output is P g, such as `optax.scale_by_rms()`: it keeps
          its own state and does not turn the sign;
        - a function `g -> P g` of one leaf, such as `jnp.sign`;
        - a tree like the parameters: numbers, square matrices that multiply a leaf's
          rows from the left (`P @ g`; a vector is a column), or None for P = I.
      decay: α, how much of the memory is kept at each step, in [0, 1].

    >>> rule = preconditioned_momentum(1.0, jnp.diag(jnp.array([2.0, 3.0])), decay=0.0)
    >>> w = jnp.zeros(2)
    >>> rule.update(jnp.ones(2), rule.init(w))[0].tolist()
    [-2.0, -3.0]
    """
    signal = preconditioner(precondition)
    return _after(signal, momentum(learning_rate, decay=decay))


@guarded
def feature_map_momentum(
    learning_rate: optax.ScalarOrSchedule,
    feature_map: Callable[[Array], Array],
    *,
    decay: float = 0.9,
    precondition: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum of mapped gradients.

        mᵢ₊₁ = α mᵢ − η P φ(gᵢ)   (equation 51, arXiv:2512.24695)

    With φ = sign and α = 0 this is SignSGD; its scale behaviour is that of φ.

    Args:
      learning_rate: η, a number or a schedule.
      feature_map: φ of one leaf, in float32 or wider, element by element (`jnp.sign`,
        `jnp.tanh`) or on rows. The memory is what moves the weights, so φ must keep the
        shape: maps that widen (`exponential`) belong to `from_memory`, which reads with
        mapped queries.
      decay: α, how much of the memory is kept at each step, in [0, 1].
      precondition: P, as in `preconditioned_momentum`; None is P = I.
    """
    if not callable(feature_map):
        raise ValueError(f"feature_map must be a function, got {feature_map!r}.")
    signal = preconditioner(feature_map, "feature_map")
    if precondition is not None:
        signal = optax.chain(signal, preconditioner(precondition))
    return _after(signal, momentum(learning_rate, decay=decay))


@guarded
def nonlinear_momentum(
    learning_rate: optax.ScalarOrSchedule,
    sigma: Callable[[Array], Array] | None = None,
    *,
    decay: float = 0.9,
    literal: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Momentum whose output passes through a non-linearity; with Newton-Schulz, Muon.

        mᵢ₊₁ = α mᵢ − gᵢ,   Wᵢ₊₁ = Wᵢ + η σ(mᵢ₊₁)   (equations 42 and 52)

    The paper has η inside, where a σ that does not see the size of its input, such as
    Newton-Schulz, throws it away: the step would have size 1 whatever η. For σ of
    degree 0 the update does not change with the size of the gradients; for the identity
    this is `momentum`.

    Args:
      learning_rate: η, a number or a schedule.
      sigma: `[*batch, R, C] -> [*batch, R, C]`, of the last two axes of a leaf; a
        leaf with one axis is a matrix of one row. None orthogonalises by Newton-Schulz
        (`kernels.newton_schulz`, Muon's five quintic steps), after a division by the
        largest entry that makes it blind to the size of m. Which leaves that suits is
        said by `optax.masked` or `optax.partition`.
      decay: α, how much of the memory is kept at each step, in [0, 1].
      literal: η inside, as printed: mᵢ₊₁ = α mᵢ − η gᵢ, Wᵢ₊₁ = Wᵢ + σ(mᵢ₊₁).
    """
    check_fraction("decay", decay)
    output = _orthogonal if sigma is None else sigma

    def step(memory, gradient, rate):
        eta = rate if literal else as_type(1.0, rate)
        return as_type(decay, memory) * memory - eta * gradient

    def read(memory, rate):
        out = output(as_matrix(memory))
        if out.shape != as_matrix(memory).shape:
            raise ValueError(
                f"sigma must keep the shape: it made {out.shape} of a memory of "
                f"shape {as_matrix(memory).shape}."
            )
        out = out.reshape(memory.shape)
        return out if literal else rate * out

    return _with_memory(step, learning_rate, read)


def _orthogonal(m: Float[Array, "*batch R C"]) -> Float[Array, "*batch R C"]:
    largest = jnp.max(jnp.abs(m), axis=(-2, -1), keepdims=True)
    return orthogonalise(m / jnp.where(largest > 0, largest, 1.0))


def preconditioner(p, name="precondition") -> optax.GradientTransformationExtraArgs:
    """What `preconditioned_momentum` takes for P, as a transformation."""
    if isinstance(p, optax.GradientTransformation):
        return optax.with_extra_args_support(p)

    def apply(updates, params):
        del params
        if callable(p):
            out = jax.tree.map(p, updates)
        else:
            leaves, structure = jax.tree.flatten(updates)
            kinds = f"{name} must be a function, an optax transformation or"
            factors = _factors(p, structure, kinds)
            out = structure.unflatten(map(_multiply, factors, leaves))
        for before, after in zip(*map(jax.tree.leaves, (updates, out)), strict=True):
            if before.shape != after.shape:
                raise ValueError(
                    f"{name} made shape {after.shape} of a gradient of shape "
                    f"{before.shape}: it must keep the shape."
                )
        return out

    return optax.with_extra_args_support(optax.stateless(apply))


def _multiply(p, g: Array) -> Array:
    if p is None:
        return g
    p = as_type(p, g)
    if p.ndim == 0:
        return p * g
    rows = g.shape[-2:-1] or g.shape
    if p.shape != rows * 2:
        raise ValueError(
            f"precondition has shape {p.shape} for a gradient of shape {g.shape}: it "
            f"must be a number or a square matrix {rows * 2} that multiplies its rows."
        )
    return p @ g if g.ndim == 1 else jnp.einsum("rs,...sc->...rc", p, g)


def _after(signal, rule) -> optax.GradientTransformationExtraArgs:
    """`rule` fed with the output of `signal`, both in float32 or wider."""

    def widened(tree):
        return jax.tree.map(wide, tree)

    def init(params):
        params = widened(params)
        return AfterState(signal.init(params), rule.init(params))

    def update(updates, state, params=None, **extra):
        params = None if params is None else widened(params)
        stored, first = signal.update(widened(updates), state.signal, params, **extra)
        moved, second = rule.update(stored, state.momentum, params, **extra)
        return like(moved, updates), AfterState(first, second)

    return optax.GradientTransformationExtraArgs(init, update)


def _with_memory(
    step, learning_rate, read=lambda memory, rate: memory, precondition=None
) -> optax.GradientTransformationExtraArgs:
    """Carries `step(memory, gradient, rate) -> memory` for each leaf, and `read`s the
    update from it; where there is a `precondition`, a leaf's own comes last."""

    def init(params):
        return MomentumState(zeros(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        del params, extra
        rate = rate_at(learning_rate, state.count)

        def move(gradient, memory, *factor):
            return step(memory, wide(gradient), as_type(rate, memory), *factor)

        def give(memory, gradient):
            return read(memory, as_type(rate, memory)).astype(gradient.dtype)

        factors = ()
        if precondition is not None:
            structure = jax.tree.structure(updates)
            leaves = _factors(precondition, structure, "precondition must be")
            factors = (structure.unflatten(leaves),)
        memory = jax.tree.map(move, updates, state.memory, *factors)
        updates = jax.tree.map(give, memory, updates)
        return updates, MomentumState(memory, next_count(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _factors(p, structure, must_be) -> list:
    try:
        return structure.flatten_up_to(p)
    except ValueError as error:
        raise ValueError(f"{must_be} a tree like the parameters: {error}") from error


def _forgetting(learning_rate, decay) -> optax.GradientTransformation:
    """m ← α m − η ∇: gradient descent with retention α."""
    return optax.chain(
        optax.scale(learning_rate),
        optax.add_decayed_weights(1.0 - decay),
        optax.scale(-1.0),
    )
