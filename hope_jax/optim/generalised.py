"""Generalised momentum and gradient descent: any memory of `hope_jax.memory` may learn.

In `from_memory` it learns gradients beside the weights (equations 35 to 37 of
arXiv:2512.24695); in `ggd` the weights themselves are the memory (Definition 5,
equations 58 to 60).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from hope_jax.core.clock import Clock
from hope_jax.core.level import Level
from hope_jax.memory import compose, features, retention
from hope_jax.memory.compose import MemoryConfig, Tokens
from hope_jax.optim.from_level import from_level
from hope_jax.optim.leaves import as_rows, as_type, check_fraction, rate_at, unit_rows


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
