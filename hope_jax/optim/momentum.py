"""Momentum as an associative memory of gradients: Hebbian, by the delta rule, or any.

Momentum and delta momentum are here twice: as a `Level` (what they are; `from_level`
makes it an optimizer) and as an optax transformation (the same, in closed form). Then
what equations 46 to 52 of arXiv:2512.24695 put into the same place, and last the two
that take any memory of `hope_jax.memory`: `from_memory`, whose memory learns gradients
beside the weights, and `ggd`, where the weights themselves are the memory.

Memories of gradients are float32 or wider, whatever type the parameters have. With
`optax.inject_hyperparams`, functions, configs and whole numbers are `static_args`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.core.clock import Clock
from hope_jax.core.level import Level
from hope_jax.kernels.newton_schulz import orthogonalise
from hope_jax.memory import compose, features, retention
from hope_jax.memory.compose import MemoryConfig, Tokens
from hope_jax.optim.from_level import from_level

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
    check_fraction("decay", decay)

    def step(memory, gradient, rate):
        return as_type(decay, memory) * memory - rate * gradient

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
    η g² > α + 1; `stability` says what is done about that. Large gradients therefore
    count less than in momentum: for η g² ≫ 1 the proximal memory is −1/g, whatever η.

    Args:
      learning_rate: η, a number or a schedule.
      decay: α, how much of the memory is kept at each step, in [0, 1].
      form: `element` for each number by itself, or `matrix` for the last two axes of a
        leaf. A leaf with one axis is a matrix of one row; leading axes are a batch.
      stability: `proximal` solves for mᵢ₊₁ exactly, from α mᵢ, instead of taking one
        step: element by element αm(1 − η'g²) − η'g with η' = η / (1 + η g²), which
        cannot blow up. `clip` forgets with η at most α/g² (matrix: α/‖g‖²).
        `literal` takes the step as it is. Only `literal` can overflow.
    """
    check_fraction("decay", decay)
    if form not in ("element", "matrix"):
        raise ValueError(f"form must be 'element' or 'matrix', got {form!r}.")
    if stability not in ("proximal", "clip", "literal"):
        raise ValueError(
            f"stability must be 'proximal', 'clip' or 'literal', got {stability!r}."
        )

    def element(memory, gradient, rate):
        alpha = as_type(decay, memory)
        if stability == "literal":
            return (alpha - rate * gradient**2) * memory - rate * gradient
        forgotten = (jnp.sqrt(rate) * gradient) ** 2  # 0 at rate 0, however large g
        if stability == "proximal":
            return (alpha * memory - rate * gradient) / (1 + forgotten)
        return (alpha - jnp.minimum(forgotten, alpha)) * memory - rate * gradient

    def matrix(memory, gradient, rate):
        alpha = as_type(decay, memory)
        g, m = as_matrix(gradient), as_matrix(memory)
        if stability == "proximal":
            m = _proximal(m, g, alpha, rate)
        elif stability == "clip":
            unit, size = _unit(g, (-2, -1))
            forgotten = jnp.minimum((jnp.sqrt(rate) * size) ** 2, alpha)
            m = alpha * m - forgotten * (m @ unit.mT) @ unit - rate * g
        else:
            m = alpha * m - rate * (m @ g.mT) @ g - rate * g
        return m.reshape(gradient.shape)

    return _with_memory(element if form == "element" else matrix, learning_rate)


def _proximal(
    m: Float[Array, "*batch R C"], g: Float[Array, "*batch R C"], alpha, rate
) -> Float[Array, "*batch R C"]:
    """(α m − η g) (I + η gᵀ g)⁻¹, solved in the smaller of the two widths.

    With h = √η g this is α m − (α m) hᵀ S − √η S for S = (I + h hᵀ)⁻¹ h, and h is
    scaled down first, so that no product overflows.
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
    return alpha * (m - (m @ h.mT) @ solved) - jnp.sqrt(rate) / scale * solved


def _plus_identity(square, amount):
    eye = jnp.eye(square.shape[-1], dtype=square.dtype)
    return square + amount * jnp.broadcast_to(eye, square.shape)


class AfterState(NamedTuple):
    """The states of what a momentum stores and of the momentum."""

    signal: PyTree
    momentum: PyTree


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


def gradient_level(
    learning_rate: float,
    config: MemoryConfig,
    *,
    inner_rate: float | None = None,
    retention: float = 0.9,
    inertia: float = 0.9,
    target: Callable[[Array], Array] | None = None,
) -> Level:
    """Any memory of `hope_jax.memory` as a level whose items are gradients.

    The memory m maps a direction of the row space of a leaf to another. At each
    gradient g, with rows gᵣ = ‖gᵣ‖ kᵣ, it takes one step of its own rule on

        mean over r of ℓ(m(kᵣ), vᵣ),   vᵣ = the direction of the r-th row of target(g)

    for the bias ℓ of `config`, and the weights move by `−η ‖gᵣ‖ m(kᵣ)`, row by row
    (equations 36, 40, 41 and 60 of arXiv:2512.24695: keys and values are given by the
    level below). The paper's values are −g; here the sign is outside, so that a
    residual memory, x + f(x), begins as gradient descent. Rows that are zero teach
    nothing and do not move. The memory sees directions alone: it is the same for
    gradients of any size, and the update is as large as they are.

    One item is one gradient, however many rows it has: `config.chunk` counts gradients.
    `from_level(gradient_level(0.1, config), gradient_start(config))` is an optimizer,
    the one that `from_memory` makes.

    Args:
      learning_rate: η.
      config: the four choices, with `window=1` and `steps=1`; all rules and retentions
        but those that solve for one key at a time (`implicit`, `newton`, `oja`) and
        `channel`.
      inner_rate: of the memory's rule; None is half the bound that `GateConfig` keeps:
        `½ / chunk` where gradients are anchored, else ½, times `1 − inertia`.
      retention: how much of the memory is kept at each gradient, where `config` has a
        retention.
      inertia: momentum of the memory's rule, where it has one.
      target: `g -> ĝ`, what a gradient should be mapped to: the coordinates of equation
        40, such as `jnp.sign`; None is g itself.

    Raises:
      ValueError: a config that solves for one key at a time, or fractions out of range.
    """
    refused = {
        "rule": ("implicit", "newton"),
        "retention": ("oja", "channel"),
    }
    for name, values in refused.items():
        if getattr(config, name) in values:
            raise ValueError(
                f"{name}={getattr(config, name)!r} solves for one key at a time, and a "
                f"gradient has a key for each of its rows; other than {values} will do."
            )
    for name in ("window", "steps"):
        if getattr(config, name) != 1:
            raise ValueError(
                f"{name} must be 1 for a memory of gradients, got "
                f"{getattr(config, name)}: an item is one gradient, with all its rows."
            )
    check_fraction("retention", retention)
    check_fraction("inertia", inertia)
    kept = 1.0 if config.retention == "none" else retention
    carried = inertia if config.inertia else 0.0
    if inner_rate is None:
        anchored = config.chunk if config.gradient == "anchored" else 1
        inner_rate = 0.5 / anchored * (1.0 - carried)

    def memory(gradient):
        return compose.memory_level(config, as_rows(gradient).shape[-1])

    def keys(gradient):
        unit, norm, weight = unit_rows(gradient.astype(jnp.float32))
        coefficients = features.coefficients(config.features, config.degree)
        mapped = features.features(config.features, config.degree, unit, coefficients)
        return mapped, norm, weight

    def rates(shape=()):
        return {
            "eta": jnp.full(shape, inner_rate, jnp.float32),
            "alpha": jnp.full(shape, kept, jnp.float32),
            "theta": jnp.full(shape, carried, jnp.float32),
        }

    def tokens(gradient):
        k, _, weight = keys(gradient)
        image = gradient if target is None else target(gradient)
        if image.shape != gradient.shape:
            raise ValueError(
                f"target made shape {image.shape} of a gradient of shape "
                f"{gradient.shape}: it must keep the shape."
            )
        v = unit_rows(image.astype(jnp.float32))[0]
        return Tokens(k=k, v=v, q=k, **rates(weight.shape)), weight

    def objective(weights, gradient):
        items, weight = tokens(gradient)
        one = memory(gradient).objective
        return jnp.vdot(weight, jax.vmap(one, (None, 0))(weights, items))

    def read(weights, gradient):
        k, norm, _ = keys(gradient)
        function = compose.build_architecture(config, as_rows(gradient).shape[-1])
        moved = -learning_rate * norm * function.apply(weights, k)
        return moved.reshape(gradient.shape)

    def inputs(weights, gradient):
        function = compose.build_architecture(config, as_rows(gradient).shape[-1])
        return function.inputs(weights, keys(gradient)[0])

    anchor = config.chunk if config.gradient == "anchored" else 1
    return Level(
        init=_widthless,
        read=read,
        objective=objective,
        flow=_flow_of_rows(config, tokens, Tokens((), (), (), **rates())),
        clock=Clock(anchor=anchor),
        read_at=config.read,
        inputs=None if config.dgd == "none" else inputs,
    )


def gradient_start(config: MemoryConfig, seed: int = 0) -> Callable[[Array], PyTree]:
    """Where the memory of a leaf starts, for `from_level(gradient_level(...), start)`.

    Leaves of the same width start at the same weights.
    """

    def start(leaf):
        width = as_rows(leaf).shape[-1]
        return compose.memory_level(config, width).init(jax.random.key(seed))

    return start


def _widthless(key):
    raise ValueError(
        "A memory of gradients is as wide as the leaf it serves: start it with "
        "from_level(level, gradient_start(config))."
    )


def from_memory(
    learning_rate: optax.ScalarOrSchedule,
    config: MemoryConfig,
    *,
    inner_rate: float | None = None,
    retention: float = 0.9,
    inertia: float = 0.9,
    target: Callable[[Array], Array] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Generalised momentum: an optimizer from any memory of `hope_jax.memory`.

    Each leaf has a memory of its own, over its last axis; `gradient_level` says what
    that learns and how it moves the weights, and what its arguments are. The update is
    of degree 1 in the gradients.

    Args:
      learning_rate: η, a number or a schedule.
      config: the memory.
      inner_rate: see `gradient_level`, as for the next three.
      retention: kept at each gradient.
      inertia: of the memory's own rule.
      target: what a gradient should be mapped to.
      seed: of where memories start; the same for leaves of the same width.
    """
    level = gradient_level(
        1.0,
        config,
        inner_rate=inner_rate,
        retention=retention,
        inertia=inertia,
        target=target,
    )

    rate = optax.scale_by_learning_rate(learning_rate, flip_sign=False)
    return optax.chain(from_level(level, gradient_start(config, seed)), rate)


def _flow_of_rows(config, tokens, rates) -> optax.GradientTransformationExtraArgs:
    """The rule, delta term and retention of `config` for an item of several keys."""
    plain = dataclasses.replace(config, retention="none", dgd="none", recall="before")
    steps = [compose.build_flow(plain)]
    if config.dgd != "none":
        steps.append(_erase_rows(config, tokens))
    if config.retention in compose.MIRRORS:
        steps.append(retention.mirror(compose.link(config)))
    elif config.retention != "none":
        steps.append(retention.decay())
    if config.retention in compose.PROJECTIONS:
        steps.append(retention.project(compose.projection(config), config.chunk))
    chain = optax.chain(*steps)

    def update(updates, state, params=None, *, context, **extra):
        extra["gradient"] = context
        return chain.update(updates, state, params, context=rates, **extra)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _erase_rows(config, tokens) -> optax.GradientTransformationExtraArgs:
    """The delta terms of all rows: the mean of `−(M r) pᵀ` (`memory.rule.erase`)."""

    def update(updates, state, params, *, gradient, inputs, **extra):
        del extra
        items, weight = tokens(gradient)
        terms = jax.vmap(lambda t, x: compose.erasures(config, t, x))(items, inputs)

        def forget(name, recall, along):
            m, along = params[name], along * weight[:, None]
            if m.ndim == 1:
                return updates[name] - m * jnp.sum(recall * along, axis=0)
            return updates[name] - (recall @ m.T).T @ along

        return updates | {name: forget(name, *t) for name, t in terms.items()}, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


class GGDState(NamedTuple):
    """How many steps were taken, and the state of each matrix's rule."""

    count: Int[Array, ""]
    flow: PyTree


_PROXIMAL = MemoryConfig(
    architecture="linear", bias="l2", rule="implicit", dgd="none", chunk=1
)


def ggd(
    learning_rate: optax.ScalarOrSchedule,
    config: MemoryConfig | None = None,
    *,
    retention: float = 1.0,
    inertia: float = 0.9,
    input_axis: int = -1,
) -> optax.GradientTransformationExtraArgs:
    """Generalised gradient descent: weights as a memory of what they say themselves.

        Wₜ₊₁ = argmin_W ℓ(W xₜ, uₜ) + Ret(W, Wₜ),   uₜ = −∇yL(Wₜ; xₜ)

    Definition 5 (equations 59 and 60, arXiv:2512.24695), where ℓ, Ret and how the
    minimum is approached are the bias, the retention and the rule of any matrix memory:
    `dot` with `gd` is gradient descent, `l2` with `implicit` delta gradient descent
    (equation 57, the default), `l2` with `gd` its explicit form, as `dot` with
    `dgd="both"` is. Robust biases bound what one token can do. The step is of degree 1
    in the gradients for `dot` and, in ∇yL and W together, for `l2`.

    `update` takes, besides the gradients, the parameters and `inputs`, as `optim.dgd`
    does: the vector each matrix multiplied, and None for leaves that multiply none,
    which take plain gradient steps. A gradient is that of one token, δ xᵀ, from which
    u = −δ is read off.

    Args:
      learning_rate: η, a number or a schedule.
      config: a matrix memory: `architecture="linear"` with `features="none"`, `norm`
        off, `window=1`, `steps=1`, and `chunk=1` or `gradient="exact"`.
      retention: α, how much of the weights is kept at each step, where `config` has a
        retention.
      inertia: momentum of the rule, where it has one.
      input_axis: the axis of a matrix along which it multiplies its input: -1 for
        y = W x, -2 for y = x W (Flax kernels).

    Raises:
      ValueError: another config, fractions out of range, or inputs that do not fit.
    """
    config = _PROXIMAL if config is None else config
    wanted = {
        "architecture": "linear",
        "features": "none",
        "norm": False,
        "window": 1,
        "steps": 1,
    }
    if config.gradient == "anchored":
        wanted["chunk"] = 1
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} must be {value!r}: the weights of a layer are the memory; got "
                f"{getattr(config, name)!r}."
            )
    if input_axis not in (-1, -2):
        raise ValueError(
            f"input_axis must be -1 (y = W x) or -2 (y = x W), got {input_axis}."
        )
    check_fraction("retention", retention)
    check_fraction("inertia", inertia)
    kept = 1.0 if config.retention == "none" else retention
    carried = inertia if config.inertia else 0.0

    def turned(leaf):
        leaf = leaf.astype(jnp.float32)
        return leaf.mT if input_axis == -2 else leaf

    def level(weight):
        return compose.memory_level(config, weight.shape[-2])

    def begin(weight):
        if weight.ndim < 2:
            return ()
        w = turned(weight)
        one = lambda w: level(w).flow.init({"w": w})  # noqa: E731
        for _ in range(w.ndim - 2):
            one = jax.vmap(one)
        return one(w)

    def init(params):
        return GGDState(jnp.zeros((), jnp.int32), jax.tree.map(begin, params))

    def learn(gradient, weight, x, flow, rate):
        size = jnp.maximum(jnp.vdot(x, x), jnp.finfo(x.dtype).tiny)
        token = Tokens(
            k=x,
            v=-(gradient @ x) / size,
            q=x,
            eta=as_type(rate, x),
            alpha=as_type(kept, x),
            theta=as_type(carried, x),
        )
        memory, weights = level(weight), {"w": weight}
        slope = jax.grad(memory.objective)(weights, token)
        inputs = memory.inputs(weights, token)
        moved, flow = memory.flow.update(
            slope, flow, weights, context=token, inputs=inputs
        )
        return moved["w"], flow

    def move(gradient, weight, x, flow, rate):
        if x is None:
            return (-as_type(rate, gradient) * gradient), flow
        g, w = turned(gradient), turned(weight)
        if w.ndim < 2 or x.shape != w.shape[:-2] + w.shape[-1:]:
            raise ValueError(
                f"inputs has shape {x.shape} for a matrix of shape {weight.shape} with "
                f"input_axis {input_axis}: it must be one vector of that axis's "
                "length, with the matrix's leading axes if it has any."
            )
        one = lambda *leaf: learn(*leaf, rate)  # noqa: E731
        for _ in range(w.ndim - 2):
            one = jax.vmap(one)
        step, flow = one(g, w, x.astype(jnp.float32), flow)
        return turned(step).astype(gradient.dtype), flow

    def update(updates, state, params=None, *, inputs=None, **extra):
        del extra
        if params is None or inputs is None:
            raise ValueError(
                "ggd needs the parameters and `inputs`, the vector each matrix "
                "multiplied (None for leaves that multiply none): update(grads, state, "
                "params, inputs=...)."
            )
        rate = rate_at(learning_rate, state.count)
        leaves, structure = jax.tree.flatten(updates)
        trees = (params, inputs, state.flow)
        rest = [structure.flatten_up_to(tree) for tree in trees]
        moved = [move(*leaf, rate) for leaf in zip(leaves, *rest, strict=True)]
        steps, flows = zip(*moved, strict=True) if moved else ((), ())
        return structure.unflatten(steps), GGDState(
            optax.safe_increment(state.count), structure.unflatten(flows)
        )

    return optax.GradientTransformationExtraArgs(init, update)


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
            try:
                factors = structure.flatten_up_to(p)
            except ValueError as error:
                raise ValueError(
                    f"{name} must be a function, an optax transformation or a tree "
                    f"like the parameters: {error}"
                ) from error
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
        moved = jax.tree.map(lambda m, g: m.astype(g.dtype), moved, updates)
        return moved, AfterState(first, second)

    return optax.GradientTransformationExtraArgs(init, update)


def _with_memory(
    step, learning_rate, read=lambda memory, rate: memory
) -> optax.GradientTransformationExtraArgs:
    """Carries `step(memory, gradient, rate) -> memory` for each leaf, and `read`s the
    update from it."""

    def init(params):
        memory = jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)
        return MomentumState(memory, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        del params, extra
        rate = rate_at(learning_rate, state.count)

        def move(gradient, memory):
            return step(memory, wide(gradient), as_type(rate, memory))

        def give(memory, gradient):
            return read(memory, as_type(rate, memory)).astype(gradient.dtype)

        memory = jax.tree.map(move, updates, state.memory)
        updates = jax.tree.map(give, memory, updates)
        return updates, MomentumState(memory, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def wide(leaf: Array) -> Array:
    """`leaf` in float32 or wider: in bfloat16 a decay of 0.999 is 1."""
    narrow = jnp.finfo(leaf.dtype).bits < 32
    return leaf.astype(jnp.float32 if narrow else leaf.dtype)


def as_type(value, like: Array) -> Array:
    """A number, injected hyper-parameter or rate in the type of `like`."""
    return jnp.asarray(value, like.dtype)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: Array):
    return learning_rate(count) if callable(learning_rate) else learning_rate


def as_matrix(leaf: Array) -> Float[Array, "*batch R C"]:
    """A leaf with one axis is a matrix of one row, and a number one of one entry."""
    return leaf.reshape((1,) * (2 - leaf.ndim) + leaf.shape)


def as_rows(leaf: Array) -> Float[Array, "R C"]:
    """The rows of a leaf, along its last axis; any axes before it number them."""
    return leaf.reshape(-1, leaf.shape[-1] if leaf.ndim else 1)


def _unit(x: Array, axis) -> tuple[Array, Array]:
    """x in unit norm over `axis`, and that norm; zero stays zero, nothing overflows."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0)
    scaled = x / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(scaled**2, axis=axis, keepdims=True))
    return scaled / jnp.where(norm > 0, norm, 1.0), largest * norm


def unit_rows(
    leaf: Array,
) -> tuple[Float[Array, "R C"], Float[Array, "R 1"], Float[Array, " R"]]:
    """The rows of a leaf as directions, their norms, and the weight of each row in a
    mean over those that are not zero."""
    unit, norm = _unit(as_rows(leaf), -1)
    present = (norm[:, 0] > 0).astype(unit.dtype)
    return unit, norm, present / jnp.maximum(jnp.sum(present), 1.0)


def _forgetting(learning_rate, decay) -> optax.GradientTransformation:
    """m ← α m − η ∇: gradient descent with retention α."""
    return optax.chain(
        optax.scale(learning_rate),
        optax.add_decayed_weights(1.0 - decay),
        optax.scale(-1.0),
    )


def check_fraction(name, value):
    """Refuses a retained fraction outside [0, 1]; a traced one cannot be looked at."""
    if not isinstance(value, jax.core.Tracer) and not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name} is the part of the memory that is kept, in [0, 1]; got {value}."
        )
