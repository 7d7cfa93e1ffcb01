"""Generalised momentum and gradient descent: any memory of `hope_jax.memory` may learn.

In `from_memory` it learns gradients beside the weights (equations 35 to 37 of
arXiv:2512.24695), and `attention_level` is the non-parametric end of that. In `ggd` the
weights themselves are the memory (Definition 5, equations 58 to 60).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from hope_jax.core.clock import Clock
from hope_jax.core.level import Level, LevelState, tick
from hope_jax.core.transfer import attend, dot_product, regress
from hope_jax.kernels.chunk import piece
from hope_jax.memory import compose, features
from hope_jax.memory.compose import MemoryConfig, Tokens
from hope_jax.memory.flow import chain, transformation
from hope_jax.memory.state import MemoryState, begin_memory
from hope_jax.optim.leaves import (
    as_rows,
    as_type,
    check_fraction,
    direction_of,
    guarded,
    like,
    next_count,
    placed,
    rate_at,
    taken,
    unit_rows,
    wide,
)
from hope_jax.optim.levels import from_level

Rows = Literal["mean", "sequence"]

_NONE: Any = ((), (), ())  # `Tokens` that are rates alone: no k, v and q


def gradient_level(
    learning_rate: float,
    config: MemoryConfig,
    *,
    rows: Rows | None = None,
    inner_rate: float | None = None,
    retention: float = 0.9,
    inertia: float = 0.9,
    target: Callable[[Array], Array] | None = None,
) -> Level:
    """Any memory of `hope_jax.memory` as a level whose items are gradients.

    The memory m maps a direction of the row space of a leaf to another. A gradient g
    has rows gᵣ = ‖gᵣ‖ kᵣ, from which m learns to say vᵣ, the direction of the r-th row
    of target(g). Then every row asks it, and the weights move by `−η ‖gᵣ‖ m(kᵣ)`
    (equations 36, 40, 41 and 60 of arXiv:2512.24695: keys and values are given by the
    level below). The paper's values are −g; here the sign is outside, so that a
    residual memory, x + f(x), begins as gradient descent. Rows that are zero teach
    nothing and do not move. The memory sees directions alone: it is the same for
    gradients of any size, and the update is as large as they are.

    How the rows of one gradient teach, for ℓ the bias of `config`:

    - `mean`: all at once. One gradient is one item, on which the memory takes one step
      of its rule, on the mean over r of ℓ(m(kᵣ), vᵣ); the order of rows is of no
      matter. `config.chunk` counts gradients.
    - `sequence`: one after another. Each row is a token, read as the memory is defined
      (`core.level.unroll` of `memory.compose.memory_level`, computed by
      `kernels.chunk`): any memory can. `config.chunk` counts rows, from one gradient to
      the next. Where gradients are anchored, as many rows are learned in parallel as
      divide both the chunk and the rows of the leaf; where they are exact, a chunk.

    A leaf of one row is the same in both. A Hebbian memory (`dot`, no delta term) adds
    up what it is given: in a sequence its updates grow with the number of rows.

    `from_level(gradient_level(0.1, config), gradient_start(config))` is an optimizer,
    the one that `from_memory` makes.

    Args:
      learning_rate: η.
      config: the four choices. `read` says which memory is asked: the one after the
        gradient (`post`), before it (`pre`) or before the last `chunk` of gradients
        began (`anchor`).
      rows: as above. None is `mean` where that is defined and else `sequence`: a memory
        that solves for one key at a time (`implicit`, `newton`, `oja`), looks back at
        tokens (`window > 1`) or takes several steps at each has no mean over rows.
      inner_rate: of the memory's rule; None is half the bound that `GateConfig` keeps:
        `½ / (chunk · window)` where gradients are anchored, else ½, times
        `1 − inertia`.
      retention: how much of the memory is kept at each gradient, where `config` has a
        retention; R rows in sequence keep its R-th root each.
      inertia: momentum of the memory's rule, where it has one; from item to item, that
        is from gradient to gradient, or from row to row.
      target: `g -> ĝ`, what a gradient should be mapped to: the coordinates of equation
        40, such as `jnp.sign`; None is g itself.

    Raises:
      ValueError: `mean` of a memory that has none, or fractions out of range.
    """
    if config is None:
        raise ValueError(
            "config is None: a non-parametric memory has no choices. Use "
            "from_level(attention_level(...), context=...)."
        )
    _check_published(config)
    rows = _mode(config, rows)
    check_fraction("retention", retention)
    check_fraction("inertia", inertia)
    kept = retention if config.chosen.retention.decays else 1.0
    carried = inertia if config.inertia else 0.0
    anchored = config.chunk if config.gradient == "anchored" else 1
    if inner_rate is None:
        inner_rate = 0.5 / (anchored * config.window) * (1.0 - carried)
    single = dataclasses.replace(config, window=1, steps=1)

    def memory(gradient):
        return compose.memory_level(single, as_rows(gradient).shape[-1])

    def keys(gradient):
        directions, norm, weight = unit_rows(gradient.astype(jnp.float32))
        coefficients = features.coefficients(config.features, config.degree)
        mapped = features.features(
            config.features, config.degree, directions, coefficients
        )
        return jnp.where(norm > 0, mapped, 0.0), norm, weight

    def rates(shape=(), span=1):
        return {
            "eta": jnp.full(shape, inner_rate, jnp.float32),
            "alpha": jnp.full(shape, jnp.float32(kept) ** (1.0 / span), jnp.float32),
            "theta": jnp.full(shape, carried, jnp.float32),
        }

    def tokens(gradient, span=1):
        k, _, weight = keys(gradient)
        v = _values(gradient, target)
        return Tokens(k=k, v=v, q=k, **rates(weight.shape, span)), weight

    def sequence(gradient):
        read, weight = tokens(gradient, span=max(1, as_rows(gradient).shape[0]))
        return read._replace(eta=jnp.where(weight > 0, read.eta, 0.0))

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

    if rows == "sequence":
        return Level(
            init=_widthless,
            read=read,
            objective=objective,
            flow=_in_turn(config, sequence),
            clock=Clock(anchor=anchored if config.read == "anchor" else 1),
            read_at=config.read,
        )
    return Level(
        init=_widthless,
        read=read,
        objective=objective,
        flow=_all_at_once(config, tokens, Tokens(*_NONE, **rates())),
        clock=Clock(anchor=anchored),
        read_at=config.read,
        inputs=None if config.dgd == "none" else inputs,
    )


def _mode(config: MemoryConfig, rows: Rows | None) -> Rows:
    if rows not in (None, "mean", "sequence"):
        raise ValueError(f"rows must be 'mean', 'sequence' or None, got {rows!r}.")
    without_mean = {
        "rule": config.chosen.rule.single_key,
        "retention": config.chosen.retention.along_values,
        "window": config.window > 1,
        "steps": config.steps > 1,
    }
    found = [
        f"{name}={getattr(config, name)!r}"
        for name, present in without_mean.items()
        if present
    ]
    if rows == "mean" and found:
        raise ValueError(
            f"rows='mean' has the memory take one step for all rows of a gradient, and "
            f"{', '.join(found)} reads one key after another: use rows='sequence'."
        )
    return rows or ("sequence" if found else "mean")


def _values(gradient, target):
    """The directions of the rows of target(g)."""
    image = gradient if target is None else target(gradient)
    if image.shape != gradient.shape:
        raise ValueError(
            f"target made shape {image.shape} of a gradient of shape "
            f"{gradient.shape}: it must keep the shape."
        )
    return unit_rows(image.astype(jnp.float32))[0]


def attention_level(
    learning_rate: float,
    *,
    score: Callable[[Array, Array], Array] = dot_product,
    target: Callable[[Array], Array] | None = None,
) -> Level:
    """The non-parametric end of `gradient_level`: softmax attention over past rows.

        m(q) = Σᵢ s(kᵢ, q) vᵢ / Σⱼ s(kⱼ, q),   W ← W − η ‖gᵣ‖ m(kᵣ)

    Equation 62 of arXiv:2512.24695, and 63 over a window. It has no state but its
    context, so `from_level(attention_level(0.1), context=8)` says how much of that is
    kept: all rows of the last 8 gradients, the one at hand included. A leaf of R rows
    compares R with 8 R of them at every step, which suits small matrices.

    Args:
      learning_rate: η.
      score: `(k_i, q) -> log s(k_i, q)`, of rows in unit mean square: without it,
        s = exp(√C cos) for rows of width C.
      target: what rows are mapped to, as in `gradient_level`.
    """
    solve = regress(score)

    def read(past, mask, gradient):
        directions, norm, _ = unit_rows(gradient.astype(jnp.float32))
        width = directions.shape[-1]
        keys = jax.vmap(lambda g: unit_rows(g.astype(jnp.float32))[0])(past)
        keys = keys.reshape(-1, width)
        values = jax.vmap(lambda g: _values(g, target))(past).reshape(-1, width)
        seen = jnp.repeat(mask, len(directions)) & jnp.any(keys != 0, axis=-1)
        context = (width**0.5 * keys, values, None)
        recalled = jax.vmap(lambda q: solve(context, seen, (None, None, q)))(
            width**0.5 * directions
        )
        moved = jnp.where(norm > 0, -learning_rate * norm * recalled, 0.0)
        return moved.reshape(gradient.shape)

    return attend(read)


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


@guarded
def from_memory(
    learning_rate: optax.ScalarOrSchedule,
    config: MemoryConfig,
    *,
    rows: Rows | None = None,
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
      config: the memory; `memory.named.get(name).memory` is a published one.
      rows: see `gradient_level`, as for the next four.
      inner_rate: of the memory's rule.
      retention: kept at each gradient.
      inertia: of the memory's own rule.
      target: what a gradient should be mapped to.
      seed: of where memories start; the same for leaves of the same width.
    """
    level = gradient_level(
        1.0,
        config,
        rows=rows,
        inner_rate=inner_rate,
        retention=retention,
        inertia=inertia,
        target=target,
    )
    rule = optax.chain(
        from_level(level, gradient_start(config, seed)),
        optax.scale_by_schedule(lambda count: rate_at(learning_rate, count)),
    )

    def init(params):
        return rule.init(jax.tree.map(wide, params))

    def update(updates, state, params=None, **extra):
        del params, extra
        moved, state = rule.update(jax.tree.map(wide, updates), state)
        return like(moved, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


class Reading(NamedTuple):
    """Where a memory that reads rows in turn stands between two gradients.

    Attributes:
      memory: all of it but the weights, which are the level's parameters.
      count: how many rows of the chunk at hand it has read.
    """

    memory: MemoryState
    count: Int[Array, ""]


def _check_published(config: MemoryConfig) -> None:
    if config.returns or config.rate_law != "token":
        raise ValueError(
            "config: a memory of gradients decays to zero at its own rates: it needs "
            "toward='zero', erases='all' and rate_law='token', got "
            f"{config.toward!r}, {config.erases!r}, {config.rate_law!r}."
        )


def _in_turn(config, sequence) -> optax.GradientTransformationExtraArgs:
    """Learns the rows of an item one after another; the gradient is not read."""

    def init(weights):
        memory = begin_memory(config, weights)
        # A mirror retention maps its start; these weights are mapped already.
        return Reading(
            memory._replace(
                weights=None,
                anchor=None if memory.anchor is None else weights,
                rule=memory.rule and compose.build_flow(config).init(weights),
            ),
            jnp.zeros((), jnp.int32),
        )

    def learn(state, tokens):
        memory, _ = piece(config, state.memory, tokens, reads=False)
        count = (state.count + len(tokens.eta)) % config.chunk
        if memory.anchor is not None:
            anchor = jax.tree.map(
                lambda new, old: jnp.where(count == 0, new, old),
                memory.weights,
                memory.anchor,
            )
            memory = memory._replace(anchor=anchor)
        return Reading(memory, count), None

    def update(updates, state, params, *, context, **extra):
        del updates, extra
        tokens = sequence(context)
        rows = len(tokens.eta)
        whole = math.gcd if config.gradient == "anchored" else min
        size = max(1, whole(rows, config.chunk))
        full = rows // size * size
        pieces = jax.tree.map(
            lambda x: x[:full].reshape(-1, size, *x.shape[1:]), tokens
        )
        state = Reading(state.memory._replace(weights=params), state.count)
        state, _ = jax.lax.scan(learn, state, pieces)
        if full < rows:
            state, _ = learn(state, jax.tree.map(lambda x: x[full:], tokens))
        moved = jax.tree.map(jnp.subtract, state.memory.weights, params)
        return moved, state._replace(memory=state.memory._replace(weights=None))

    return transformation(init, update)


def _all_at_once(config, tokens, rates) -> optax.GradientTransformationExtraArgs:
    """The rule, delta term and retention of `config` for an item of several keys."""
    flow = compose.flow_of(config)
    if flow.erase is not None:
        flow = flow._replace(erase=_erase_rows(config, tokens))
    whole = chain(flow)

    def update(updates, state, params=None, *, context, **extra):
        extra["gradient"] = context
        return whole.update(updates, state, params, context=rates, **extra)

    return transformation(whole.init, update)


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

    return transformation(lambda params: (), update)


class GGDState(NamedTuple):
    """Where the matrices stand, as memories.

    Attributes:
      count: how many steps were taken.
      flow: the state of each matrix's rule.
      recent: the pairs (x, u) that the next window of each matrix sees, oldest first.
    """

    count: Int[Array, ""]
    flow: PyTree
    recent: PyTree


_PROXIMAL = MemoryConfig(
    architecture="linear", bias="l2", rule="implicit", dgd="none", chunk=1
)


@guarded
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
      config: any bias, retention and rule of a matrix memory that is the layer itself:
        `architecture="linear"` with `features="none"` and `norm` off. The gradient is
        taken at the weights of now: `chunk=1` or `gradient="exact"`. With `steps` the
        argmin is approached in so many steps; a `window` is of the last tokens' pairs.
      retention: α, how much of the weights (or their dual image) is kept at each step,
        where `config` has a retention.
      inertia: momentum of the rule, where it has one.
      input_axis: the axis of a matrix along which it multiplies its input: -1 for
        y = W x, -2 for y = x W (Flax kernels).

    Raises:
      ValueError: another config, fractions out of range, or inputs that do not fit.
    """
    config = _PROXIMAL if config is None else config
    found = config.chosen
    wanted = {
        "architecture": ("'linear'", found.architecture.matrix),
        "features": ("'none'", found.features.plain),
        "norm": ("False", not config.norm),
        "chunk": ("1", config.chunk == 1 or config.gradient == "exact"),
    }
    for name, (value, so) in wanted.items():
        if not so:
            raise ValueError(
                f"{name} must be {value}: the weights of a layer are the memory; got "
                f"{getattr(config, name)!r}."
            )
    if input_axis not in (-1, -2):
        raise ValueError(
            f"input_axis must be -1 (y = W x) or -2 (y = x W), got {input_axis}."
        )
    check_fraction("retention", retention)
    check_fraction("inertia", inertia)
    kept = retention if found.retention.decays else 1.0
    carried = inertia if config.inertia else 0.0

    def turned(leaf):
        leaf = leaf.astype(jnp.float32)
        return leaf.mT if input_axis == -2 else leaf

    def level(weight):
        return compose.memory_level(config, weight.shape[-2])

    def is_masked(leaf):
        return isinstance(leaf, optax.MaskedNode)

    def begin(weight):
        if weight.ndim < 2:
            return (), ()
        w = turned(weight)
        rows, columns = w.shape[-2:]

        def one(w):
            return level(w).flow.init({"w": w}), (
                jnp.zeros((config.window - 1, columns), jnp.float32),
                jnp.zeros((config.window - 1, rows), jnp.float32),
            )

        for _ in range(w.ndim - 2):
            one = jax.vmap(one)
        flow, recent = one(w)
        return flow, recent if config.window > 1 else ()

    def init(params):
        leaves = jax.tree.leaves(params)
        flows, recent = zip(*map(begin, leaves), strict=True) if leaves else ((), ())
        count = jnp.zeros((), jnp.int32)
        return GGDState(count, placed(params, flows), placed(params, recent))

    def learn(gradient, weight, x, flow, recent, rate):
        along, size = direction_of(x, -1)
        u = -(gradient @ along) / jnp.where(size > 0, size, 1)
        token = Tokens(
            k=x,
            v=u,
            q=x,
            eta=as_type(rate, x),
            alpha=as_type(kept, x),
            theta=as_type(carried, x),
        )
        token = jax.tree.map(lambda leaf: leaf[None], token)
        items = compose.level_context(config, token, recent)
        if config.window > 1:
            newest = zip(recent, (token.k, token.v), strict=True)
            recent = tuple(jnp.concatenate(pair)[1:] for pair in newest)
        memory, count = level(weight), jnp.zeros((), jnp.int32)
        standing = LevelState({"w": weight}, flow, None, None, count)
        for i in range(config.steps):
            item = jax.tree.map(lambda leaf: leaf[i], items)  # noqa: B023
            standing, _ = tick(memory, standing, item)
        return standing.params["w"] - weight, standing.opt, recent

    def move(gradient, weight, x, flow, recent, rate):
        if x is None:
            return -as_type(rate, gradient) * gradient, flow, recent
        g, w = turned(gradient), turned(weight)
        if w.ndim < 2 or x.shape != w.shape[:-2] + w.shape[-1:]:
            raise ValueError(
                f"inputs has shape {x.shape} for a matrix of shape {weight.shape} with "
                f"input_axis {input_axis}: it must be one vector of that axis's "
                "length, with the matrix's leading axes if it has any."
            )
        one = lambda *leaf: learn(*leaf, rate=rate)  # noqa: E731
        for _ in range(w.ndim - 2):
            one = jax.vmap(one)
        step, flow, recent = one(g, w, x.astype(jnp.float32), flow, recent)
        return turned(step).astype(gradient.dtype), flow, recent

    def update(updates, state, params=None, *, inputs=None, **extra):
        del extra
        if params is None or inputs is None:
            raise ValueError(
                "ggd needs the parameters and `inputs`, the vector each matrix "
                "multiplied (None for leaves that multiply none): update(grads, state, "
                "params, inputs=...)."
            )
        rate = rate_at(learning_rate, state.count)
        # Inputs are not masked when `optax.masked` and `partition` mask the rest.
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_masked)
        given = structure.flatten_up_to(inputs)
        here = [not is_masked(leaf) for leaf in leaves]
        rest = [
            jax.tree.leaves(updates),
            jax.tree.structure(updates).flatten_up_to(params),
            [x for x, unmasked in zip(given, here, strict=True) if unmasked],
            *(taken(updates, tree) for tree in (state.flow, state.recent)),
        ]
        moved = [move(*leaf, rate=rate) for leaf in zip(*rest, strict=True)]
        steps, flow, recent = zip(*moved, strict=True) if moved else ((), (), ())
        count = next_count(state.count)
        return jax.tree.structure(updates).unflatten(steps), GGDState(
            count, placed(updates, flow), placed(updates, recent)
        )

    return optax.GradientTransformationExtraArgs(init, update)
