"""Memories of gradients that are learned: a recurrence, or attention, for an optimizer.

An optimizer is a memory of gradients, and any architecture can be that memory (section
4 of arXiv:2512.24695). Here a level above learns it, by living through the training of
many small tasks (after arXiv:1606.04474): the weights of a task move with every item,
and so does the memory of their gradients; what the memory keeps, and how it is read,
are parameters of a slower level, which moves after many items.

Every coordinate of every leaf has a memory of its own, and all share one set of these
slow parameters, so that an optimizer learned on one tree will move any other.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.core.level import (
    Fast,
    Level,
    LevelState,
    Slow,
    begin,
    hope_update,
    unroll,
)
from hope_jax.core.transfer import attend, regress
from hope_jax.optim.leaves import (
    as_type,
    guarded,
    next_count,
    placed,
    rate_at,
    taken,
    wide,
)

MEMORIES = ("recurrent", "attention")
OBJECTIVES = ("log", "mean")
_DEPTH = 10.0  # gradients below e^-10 of their usual size all look alike


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedConfig:
    """What a learned memory of gradients looks like.

    Attributes:
      memory: `recurrent` or `attention`.
      width: M, numbers that a coordinate remembers, or heads of its attention.
      window: N, gradients that attention sees, the present one included; its keys and
        values are all it has. None for a recurrence, which has no window.
      hidden: H, width of the network that reads the memory.
      decay: of the mean square by which gradients are divided, in [0, 1).
      span: steps are at most e^span times as large, or small, as the read-out's
        weights alone would make them.
    """

    memory: Literal["recurrent", "attention"] = "recurrent"
    width: int = 4
    window: int | None = None
    hidden: int = 16
    decay: float = 0.95
    span: float = 6.0

    def __post_init__(self):
        if self.memory not in MEMORIES:
            raise ValueError(
                f"memory must be one of {', '.join(MEMORIES)}, got {self.memory!r}."
            )
        _check_counts(width=self.width, hidden=self.hidden)
        if self.memory == "recurrent" and self.window is not None:
            raise ValueError(
                f"a recurrent memory has no window, got window={self.window}: leave it "
                "out, or use memory='attention'."
            )
        if self.memory == "attention" and (self.window is None or self.window < 1):
            raise ValueError(
                "an attention memory needs a window of at least 1 gradient, got "
                f"window={self.window}."
            )
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}.")
        if not 0.0 < self.span < math.inf:
            raise ValueError(f"span must be positive and finite, got {self.span}.")


class Recurrent(NamedTuple):
    """A gated recurrence. `gate` [M, 3]: how much each number takes of an item."""

    gate: Float[Array, "M 3"]


class Attention(NamedTuple):
    """Attention over a window.

    Attributes:
      lag: [M, N], the score of a gradient by its age, newest first.
      agree: [M], its score by having the sign of the newest gradient.
      similar: [M, 3, 3], its score by the sizes of both.
    """

    lag: Float[Array, "M N"]
    agree: Float[Array, " M"]
    similar: Float[Array, "M 3 3"]


class Readout(NamedTuple):
    """The network that makes a step of what the memory gives; two layers, tanh."""

    w1: Float[Array, "H F"]
    b1: Float[Array, " H"]
    w2: Float[Array, "M+2 H"]
    b2: Float[Array, " M+2"]


class Meta(NamedTuple):
    """What the level above learns: how to remember gradients, and how to read that."""

    memory: Recurrent | Attention
    readout: Readout


class Item(NamedTuple):
    """What a memory sees of a gradient; nothing of it changes with the gradients' unit.

    Attributes:
      unit: ĝ, the gradient over its running root mean square.
      level: log of that root mean square over the largest it ever was; at most 0.
    """

    unit: Array
    level: Array


class LearnedState(NamedTuple):
    """Where a learned optimizer stands, in float32 or wider.

    Attributes:
      count: gradients seen.
      root: for each leaf, the root of the decayed sum of squares.
      peak: for each leaf, the largest root mean square so far.
      memory: for each leaf `[*shape, M]`, or an `Item` with `[*shape, N]`, newest
        first.
    """

    count: Int[Array, ""]
    root: PyTree
    peak: PyTree
    memory: PyTree


def init_learned(key: Array, config: LearnedConfig) -> Meta:
    """Slow parameters to start from: with them, `learned` is RMSProp.

    The memories already remember, over 2, 4, 8, ... gradients, but the read-out does
    not listen to them yet.
    """
    m, h = config.width, config.hidden
    horizon = 2.0 ** jnp.arange(1, m + 1, dtype=float)
    if config.memory == "recurrent":
        start = -jnp.log(horizon - 1.0)  # a gate of 1 / horizon
        memory = Recurrent(jnp.zeros((m, 3)).at[:, 0].set(start))
    else:
        age = jnp.arange(config.window, dtype=float)
        memory = Attention(
            lag=-age[None] / horizon[:, None],
            agree=jnp.zeros((m,)),
            similar=jnp.zeros((m, 3, 3)),
        )
    seen = 3 + 2 * m
    readout = Readout(
        w1=jax.random.normal(key, (h, seen)) * seen**-0.5,
        b1=jnp.zeros((h,)),
        w2=jnp.zeros((m + 2, h)),
        b2=jnp.zeros((m + 2,)),
    )
    return Meta(memory, readout)


def memory_level(memory: Recurrent | Attention, config: LearnedConfig) -> Level:
    """The memory of one coordinate as a level: its definition.

    Its context is the stream of gradients, as `Item`s; for attention as pairs `(Item,
    time)`. Its read, [M], is what `learned` makes a step of.

        recurrent:   ½ Σⱼ zⱼ (mⱼ − ĝ)²,  one step of gradient descent at rate 1:
                     mⱼ ← (1 − zⱼ) mⱼ + zⱼ ĝ,   zⱼ = σ(gateⱼ · (1, size, level))
        attention:   argmin_y Σᵢ sⱼ(i, t) (ĝᵢ − y)² over the last N gradients i, with
                     log sⱼ = lagⱼ[t − i] + agreeⱼ ĝᵢ ĝₜ + (1, ..)ₜ · similarⱼ (1, ..)ᵢ

    The first is a momentum whose forgetting depends on the gradients (arXiv:2410.01201
    has such gates in sequence models); the second is equation 63: a non-parametric
    level, which keeps its context instead of compressing it.
    """
    if config.memory == "recurrent":
        assert isinstance(memory, Recurrent)
        gates = memory.gate

        def objective(m, item):
            z = jax.nn.sigmoid(_linear(gates, _even(item)))
            return 0.5 * jnp.sum(z * (m - item.unit) ** 2)

        return Level(
            init=lambda key: jnp.zeros((config.width,)),
            read=lambda m, item: m,
            objective=objective,
            flow=optax.sgd(1.0),
            read_at="post",
        )

    window = config.window
    assert window is not None  # attention has one

    def head(lag, agree, similar):
        def score(key: Any, query: Any):
            (past, then), (present, now) = key, query
            age = jnp.clip(now - then, 0, window - 1)  # older ones are masked
            alike = _even(present) @ similar @ _even(past)
            return lag[age] + agree * past.unit * present.unit + alike

        return regress(score, window=window)

    def read(context, mask, item):
        # A loop, for `regress` maps over a context; there are few heads.
        heads = [head(*(leaf[j] for leaf in memory)) for j in range(config.width)]
        return jnp.stack([one(context, mask, item) for one in heads])

    return attend(read, through=lambda pair: (pair, pair[0].unit, pair))


@guarded
def learned(
    meta: Meta, config: LearnedConfig, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that is a learned memory of gradients.

        W ← W − η eˢ ((1 + w₀) ĝ + Σⱼ wⱼ yⱼ)

    y are the reads of the coordinate's memory (`memory_level`), ĝ its gradient over the
    root mean square of those so far, with its bias corrected; w and s ∈ (−span, span)
    are what the read-out network makes of |ĝ|, |y|, ĝ y and the sizes of the gradients.
    For `init_learned`'s parameters w = s = 0 and this is RMSProp.

    A gradient scaled by any number gives the same steps (degree 0), and with the other
    sign the opposite steps, whatever was learned. A step is at most η e^span / √(1 −
    decay) times the sum of 1 + |w|, and nothing overflows. Coordinates whose gradients
    were all zero do not move. Cost: M + 2 numbers of state a coordinate, or 2 N + 2,
    and some H (3 M + 5) multiplications a step, N M more for attention.

    Do not expect it to serve in lives much longer than those that it was trained in.

    It is differentiable in `meta`, which may be traced: that is how the level above
    learns (`meta_train`).

    Args:
      meta: the slow parameters, of `init_learned` or `meta_train`.
      config: what they were made for.
      learning_rate: η, a number or a schedule.

    Raises:
      ValueError: `meta` of other shapes than `config` says.
    """
    _check_meta(meta, config)
    recurrent = config.memory == "recurrent"
    correction = math.log(config.decay) if config.decay > 0 else -math.inf

    def start(leaf):
        zeros = jnp.zeros_like(wide(leaf))
        if recurrent:
            return _trailing(zeros, config.width)
        return Item(*(_trailing(zeros, config.window) for _ in Item._fields))

    def init(params):
        return LearnedState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(lambda leaf: jnp.zeros_like(wide(leaf)), params),
            jax.tree.map(lambda leaf: jnp.zeros_like(wide(leaf)), params),
            placed(params, [start(leaf) for leaf in jax.tree.leaves(params)]),
        )

    def move(gradient, root, peak, memory, count, rate):
        g = wide(gradient)
        own = jax.tree.map(lambda leaf: as_type(leaf, g), meta)
        part = math.sqrt(config.decay), math.sqrt(1.0 - config.decay)
        root = _hypot(part[0] * root, part[1] * g)
        seen = -jnp.expm1(count.astype(g.dtype) * correction)
        item, peak = _item(g, root / jnp.sqrt(seen), peak)
        if recurrent:
            z = jax.nn.sigmoid(_linear(own.memory.gate, _even(item)))
            memory = memory + z * (item.unit[..., None] - memory)
            reads = memory
        else:
            memory = jax.tree.map(_push, item, memory)
            reads = _attention(own.memory, memory, count)
        step = -as_type(rate, g) * _step(own.readout, item, reads, config.span)
        return step.astype(gradient.dtype), root, peak, memory

    def update(updates, state, params=None, **extra):
        del params, extra
        rate = rate_at(learning_rate, state.count)
        count = next_count(state.count)
        leaves, structure = jax.tree.flatten(updates)
        rest = [structure.flatten_up_to(tree) for tree in (state.root, state.peak)]
        rest.append(taken(updates, state.memory))
        moved = [
            move(*leaf, count=count, rate=rate)
            for leaf in zip(leaves, *rest, strict=True)
        ]
        steps, *roots, memory = zip(*moved, strict=True) if moved else ((),) * 4
        root, peak = map(structure.unflatten, roots)
        return structure.unflatten(steps), LearnedState(
            count, root, peak, placed(updates, memory)
        )

    return optax.GradientTransformationExtraArgs(init, update)


class Task(NamedTuple):
    """A problem to train on.

    Attributes:
      start: where its parameters start.
      loss: `(params, key) -> scalar`. Each step has a key of its own, for a batch or
        for noise; a loss without chance ignores it.
    """

    start: PyTree
    loss: Callable[[PyTree, Array], Array]


Family = Callable[[Array], Task]


def task_level(task: Task, flow: optax.GradientTransformation) -> Level:
    """The level whose weights solve `task` by `flow`.

    An item of its context is a key, its read the loss there, before it moves.
    """
    return Level(
        init=lambda key: task.start,
        read=task.loss,
        objective=task.loss,
        flow=flow,
    )


def solve(
    task: Task, flow: optax.GradientTransformation, steps: int, key: Array
) -> tuple[PyTree, Float[Array, " T"]]:
    """The parameters after `steps` steps of `flow` on `task`, and the loss before each.

    Pure and differentiable, through every step.
    """
    level = task_level(task, flow)
    state, losses = unroll(level, begin(level, task.start), _keys(key, 0, steps))
    return state.params, losses


class Trained(NamedTuple):
    """What `meta_train` returns: slow parameters, and the objective before each of
    their moves."""

    meta: Meta
    losses: Float[Array, " moves"]


def meta_train(
    family: Family,
    config: LearnedConfig,
    outer: optax.GradientTransformation,
    key: Array,
    *,
    learning_rate: float,
    rounds: int,
    horizon: int,
    truncation: int | None = None,
    batch: int = 16,
    objective: Literal["log", "mean"] = "log",
    second_order: bool = True,
    start: Meta | None = None,
) -> Trained:
    """Learns a memory of gradients, as the level above the tasks that it trains.

    One item of that level is `truncation` steps on each of a batch of tasks: it reads
    the losses, and moves once (`hope_update`) by the gradient of their mean, taken
    through all those steps, the gradients in them included. Tasks and memories then go
    on from where they are; after `horizon` steps new tasks are drawn. All of it is one
    compiled scan.

    Args:
      family: `key -> Task`, how tasks are drawn. Traced; it makes the same task of the
        same key.
      config: of the memory.
      outer: how the slow parameters move. Adam with clipped gradients does well: the
        gradient through a long life is now and then very large.
      key: of all chance.
      learning_rate: of `learned`.
      rounds: how often tasks are drawn.
      horizon: steps on each task.
      truncation: steps between two moves; divides `horizon`. None is all of it.
      batch: tasks at a time.
      objective: `log`, the mean logarithm of the losses, which weighs all tasks and
        all times alike and wants losses above 0, or `mean`.
      second_order: whether gradients of the tasks are differentiated too. False takes
        them as given (arXiv:1606.04474), which costs a third less; what is learned is a
        little worse (`experiments/learned_optimizers.py`).
      start: slow parameters to go on from; None starts anew.

    Raises:
      ValueError: numbers below 1, a truncation that does not divide the horizon, an
        unknown objective.
    """
    span = horizon if truncation is None else truncation
    _check_counts(rounds=rounds, horizon=horizon, truncation=span, batch=batch)
    if horizon % span:
        raise ValueError(
            f"truncation ({span}) must divide the horizon ({horizon}): tasks live for "
            "whole pieces."
        )
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}."
        )
    slow = Level(
        init=lambda key: init_learned(key, config),
        read=lambda meta, x: (),
        objective=lambda meta, x: _score(x[1], objective),
        flow=outer,
    )

    def flow(meta):
        signal = optax.identity() if second_order else _constant()
        return optax.chain(signal, learned(meta, config, learning_rate))

    def one_life(meta, state, key, first):
        level = task_level(family(key), flow(meta))
        state, losses = unroll(level, state, _keys(key, first, span))
        return losses, state

    def newborn(meta, key):
        task = family(key)
        return begin(task_level(task, flow(meta)), task.start)

    def live(meta, states, x):
        keys, first = x
        return jax.vmap(one_life, (None, 0, 0, None))(meta, states, keys, first)

    def piece(carry, first):
        standing, states, keys = carry
        after = hope_update((keys, first), Slow(slow, standing), Fast(live, states))
        return (after.slow.state, after.fast.state, keys), after.loss

    def draw(standing: LevelState, key):
        keys = jax.random.split(key, batch)
        states = jax.vmap(newborn, (None, 0))(standing.params, keys)
        firsts = jnp.arange(0, horizon, span, dtype=jnp.int32)
        (standing, _, _), losses = jax.lax.scan(piece, (standing, states, keys), firsts)
        return standing, losses

    @jax.jit
    def run(standing, key):
        return jax.lax.scan(draw, standing, jax.random.split(key, rounds))

    keys = jax.random.split(key)
    meta = slow.init(keys[0]) if start is None else start
    _check_meta(meta, config)
    standing, losses = run(begin(slow, meta), keys[1])
    return Trained(standing.params, losses.reshape(-1))


def _constant() -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: jax.lax.stop_gradient(updates))


def _score(losses, objective):
    if objective == "log":
        losses = jnp.log(jnp.maximum(losses, jnp.finfo(losses.dtype).tiny))
    return jnp.mean(losses)


def _keys(key, first, steps):
    """The keys of steps `first` and on; a longer life has the same beginning."""
    times = first + jnp.arange(steps, dtype=jnp.int32)
    return jax.vmap(lambda t: jax.random.fold_in(key, t))(times)


def _item(g, rms, peak) -> tuple[Item, Array]:
    peak = jnp.maximum(peak, rms)
    there = rms > 0
    unit = _over(jnp.where(there, g, 0.0), jnp.where(there, rms, 1.0))
    ratio = _over(jnp.where(there, rms, 1.0), jnp.where(there, peak, 1.0))
    return Item(unit, _log(ratio)), peak


@jax.custom_jvp
def _over(a, b):
    """a / b, whose derivatives need no b²: that of 1e-20 is 0."""
    return a / b


@_over.defjvp
def _over_jvp(at, along):
    (a, b), (da, db) = at, along
    out = a / b
    return out, da / b - out * (db / b)


def _even(item: Item) -> Float[Array, "*shape 3"]:
    """(1, size, level), logarithms over their depth: the same for −ĝ as for ĝ."""
    size, level = _log(item.unit) / _DEPTH, item.level / _DEPTH
    return jnp.stack([jnp.ones_like(size), size, level], axis=-1)


def _log(x):
    """log |x|, at least −depth; with a gradient of 0, not NaN, where it is cut."""
    least = math.exp(-_DEPTH)
    above = jnp.abs(x) > least
    return jnp.where(above, jnp.log(jnp.where(above, jnp.abs(x), 1.0)), -_DEPTH)


def _push(new, window):
    return jnp.concatenate([new[..., None], window[..., :-1]], axis=-1)


def _attention(memory: Attention, window: Item, count) -> Float[Array, "*shape M"]:
    newest = jax.tree.map(lambda leaf: leaf[..., :1], window)
    even = _even(window)  # [*shape, N, 3]
    query = _einsum("...e,jef->...jf", even[..., 0, :], memory.similar)
    scores = _einsum("...jf,...nf->...jn", query, even)
    agree = (window.unit * newest.unit)[..., None, :]
    scores = scores + _like(memory.lag, scores)
    scores = scores + _like(memory.agree[:, None], scores) * agree
    there = jnp.arange(memory.lag.shape[1], dtype=jnp.int32) < count
    weights = jax.nn.softmax(jnp.where(_like(there, scores), scores, -jnp.inf))
    return _einsum("...jn,...n->...j", weights, window.unit)


def _step(readout: Readout, item: Item, reads, span):
    unit = item.unit[..., None]
    seen = [jnp.abs(unit), _even(item)[..., 1:], jnp.abs(reads), unit * reads]
    seen = jnp.concatenate(seen, axis=-1)
    bias = _like(readout.b1, seen)
    hidden = jnp.tanh(_linear(readout.w1, seen) + bias)
    out = _linear(readout.w2, hidden) + _like(readout.b2, seen)
    known = jnp.concatenate([unit, reads], axis=-1)
    direction = item.unit + jnp.sum(out[..., :-1] * known, axis=-1)
    return direction * jnp.exp(span * jnp.tanh(out[..., -1] / span))


# Matrices of a few numbers, on which a device's short-cuts are lost precision.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _linear(w: Float[Array, "O I"], x: Float[Array, "*shape I"]):
    return _einsum("oi,...i->...o", w, x)


def _like(x, other):
    """`x` with leading axes of 1, as many as `other` has axes."""
    return x.reshape((1,) * (other.ndim - x.ndim) + x.shape)


def _trailing(zeros, width):
    return jnp.broadcast_to(zeros[..., None], (*zeros.shape, width))


def _hypot(a, b):
    """√(a² + b²) of numbers of any size; its gradient at 0 is 0, not NaN."""
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.abs(a), jnp.abs(b)))
    there = largest > 0
    safe = jnp.where(there, largest, 1.0)
    squares = jnp.where(there, (a / safe) ** 2 + (b / safe) ** 2, 1.0)
    return jnp.where(there, safe * jnp.sqrt(squares), 0.0)


def _check_counts(**counts):
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _check_meta(meta, config):
    wanted = jax.eval_shape(lambda: init_learned(jax.random.key(0), config))
    for tree in (meta, wanted):
        if jax.tree.structure(tree) != jax.tree.structure(wanted):
            raise ValueError(
                f"meta is of another kind than {config} makes: "
                f"{jax.tree.structure(tree)}; use init_learned or meta_train."
            )
    for have, want in zip(*map(jax.tree.leaves, (meta, wanted)), strict=True):
        if jnp.shape(have) != want.shape:
            raise ValueError(
                f"meta has a leaf of shape {jnp.shape(have)} where {config} makes "
                f"{want.shape}."
            )
