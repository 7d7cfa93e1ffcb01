"""A level: one optimisation problem, as a handful of pure functions."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from hope_jax.core import show
from hope_jax.core.clock import Clock

OuterGradient = Literal["exact", "first_order", "none"]
ReadTime = Literal["pre", "post", "anchor"]


class Level(NamedTuple):
    """One optimisation problem. Functions only; every array arrives as an argument.

    A level is Definition 4 of arXiv:2512.24695 in code: a function class and its
    objective (`read`, `objective`), the rule that solves it (`flow`), an update
    frequency (`clock`), and where it starts (`init`, unless the level above decides).

    Attributes:
      init: `key -> params`.
      read: `(params, context_t) -> output`, what it gives the level above. A
        non-parametric level (`clock.period == 0`) is given `Seen` for `params`.
      objective: `(params, context_t) -> scalar`, what it descends.
      flow: how its parameters move. Its `update` is also given `context`, the item at
        hand, and `inputs`, if the level has them.
      clock: when it moves.
      read_at: `pre` reads the state before item `i` moved it (the clock's contract),
        `post` the state after, `anchor` the state at the anchor.
      gradient: what the level above differentiates. `exact`: every update.
        `first_order`: updates are constants, so the initial state still learns with
        `d params_t / d params_0 = I`. `none`: the initial state gets no gradient.
      inputs: `(params, context_t) -> pytree` shaped like `params`, the vector that each
        weight matrix multiplies. Delta gradient descent needs it (equation 57).
      objective_name, flow_name: what tables and pictures call the two; "" is what the
        functions are called themselves (`said`).
    """

    init: Callable[[Array], PyTree]
    read: Callable[[PyTree, PyTree], PyTree]
    objective: Callable[[PyTree, PyTree], Array]
    flow: optax.GradientTransformation
    clock: Clock = Clock()
    read_at: ReadTime = "pre"
    gradient: OuterGradient = "exact"
    inputs: Callable[[PyTree, PyTree], PyTree] | None = None
    objective_name: str = ""
    flow_name: str = ""

    def _repr_html_(self) -> str:
        objective, rule = said(self)
        clock = self.clock
        lines = [
            ("starts at", show.named(self.init) or "init"),
            ("reads", f"{show.named(self.read) or 'read'} ({self.read_at})"),
            ("descends", objective or "objective"),
            ("by", rule or "flow"),
            ("moves", f"period {clock.period:g}, anchor {clock.anchor}"),
            ("gradient", self.gradient),
        ]
        return show.table("Level", ["", ""], lines)


def said(level: Level) -> tuple[str, str]:
    """What the objective and the rule of a level are called.

    >>> def error(w, x):
    ...     return (w - x) ** 2
    >>> said(Level(jnp.zeros, lambda w, x: w, error, optax.adagrad(0.1)))
    ('error', 'scale_by_rss, scale')
    >>> said(Level(jnp.zeros, lambda w, x: w, error, optax.sgd(1.0), flow_name="GD"))
    ('error', 'GD')
    """
    objective = level.objective_name or show.named(level.objective)
    return objective, level.flow_name or show.rule(level.flow)


class LevelState(NamedTuple):
    """Where a level stands.

    Attributes:
      params: the running parameters.
      opt: the state of `flow`.
      anchor: the parameters at which gradients are taken; None when these are `params`.
      gradient: the sum of gradients since the last move; None when every item moves.
      count: int32 scalar, items read so far.
    """

    params: PyTree
    opt: PyTree
    anchor: PyTree | None
    gradient: PyTree | None
    count: Int[Array, ""]

    _repr_html_ = show.state


class Collected(NamedTuple):
    """What a level has gathered of its items since its last move: sums over them.

    Attributes:
      gradient: like its parameters.
      inputs: of what its matrices multiplied, in a form that adds up (Gram matrices);
        the vectors themselves for a level that moves at every item. None for flows that
        do not ask for them.
    """

    gradient: PyTree
    inputs: PyTree | None = None


class Seen(NamedTuple):
    """What a non-parametric level reads: its whole context, and which of it is past."""

    context: PyTree
    mask: Array


def nothing(tree: PyTree) -> PyTree:
    """Zeros like `tree`: what a level has gathered right after a move."""
    return jax.tree.map(jnp.zeros_like, tree)


def collect(gathered: PyTree, more: PyTree) -> PyTree:
    """The first half of a clock's tick: adds up, and keeps the type of `gathered`."""

    def add(a, b):
        wider = max(a.dtype, b.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
        return (a.astype(wider) + b.astype(wider)).astype(a.dtype)

    return jax.tree.map(add, gathered, more)


def move(
    flow: optax.GradientTransformation,
    gathered: Collected,
    opt: PyTree,
    params: PyTree,
    **extra,
) -> tuple[PyTree, PyTree, Collected]:
    """The second half, where the clock says so: one step by all that was gathered.

    Every clock ticks by these two: that of a level in `unroll`, those of a continuum
    memory inside a sequence, those of the optimizer's slow groups between sequences.

    Args:
      flow: the rule.
      gathered: sums over the items since the last move, or their means.
      opt: the state of `flow`.
      params: where the level stands.
      extra: further arguments of `flow`, besides `inputs`.

    Returns:
      The updates, to be added to `params`; the new state of `flow`; and what is
      gathered then, nothing.
    """
    if gathered.inputs is not None:
        extra = extra | {"inputs": gathered.inputs}
    rule = optax.with_extra_args_support(flow)
    updates, opt = rule.update(gathered.gradient, opt, params, **extra)
    return updates, opt, nothing(gathered)


def begin(level: Level, params: PyTree) -> LevelState:
    """The state of `level` before its first item, standing at `params`.

    Raises:
      ValueError: `params` is a state already.
    """
    if isinstance(params, LevelState):
        raise ValueError(
            "params is a LevelState, where a level stands already: give parameters, of "
            "level.init(key) or state.params."
        )
    accumulates = level.clock.parametric and 1 < level.clock.period < float("inf")
    return LevelState(
        params=params,
        opt=level.flow.init(params),
        anchor=params if level.clock.anchor > 1 else None,
        gradient=nothing(params) if accumulates else None,
        count=jnp.zeros((), jnp.int32),
    )


def tick(
    level: Level, state: LevelState, context_t: PyTree
) -> tuple[LevelState, PyTree]:
    """One item of context: the level reads it and, when its clock says so, moves.

    Raises:
      ValueError: `state` is none, or the level is non-parametric, or has inputs that do
        not add up over its period.
    """
    _check_state(state)
    clock = level.clock
    if not clock.parametric:
        raise ValueError(
            "period 0 is a non-parametric level, which has no state to move: use "
            "`unroll`, which gives its read all items up to each one."
        )
    if level.inputs is not None and state.gradient is not None:
        raise ValueError(
            f"period ({clock.period}) must be 1 for a level with inputs: gradients of "
            "several items add up, the inputs of their matrices do not."
        )
    point = state.params if state.anchor is None else state.anchor
    count = state.count + 1
    if clock.frozen:
        moved = state._replace(count=count)
        return moved, level.read(state.params, context_t)

    inputs = None if level.inputs is None else level.inputs(point, context_t)
    gradient: Any = jax.grad(level.objective)(point, context_t)
    gathered = Collected(gradient, inputs)
    if state.gradient is not None:
        gathered = collect(Collected(state.gradient), gathered)

    def due():
        updates, opt, fresh = move(
            level.flow, gathered, state.opt, state.params, context=context_t
        )
        if level.gradient == "first_order":
            updates, opt = jax.lax.stop_gradient((updates, opt))
        return optax.apply_updates(state.params, updates), opt, fresh

    def stay():
        return state.params, state.opt, gathered

    if clock.period == 1:
        params, opt, _ = due()
        gradient = None
    else:
        params, opt, fresh = jax.lax.cond(clock.moves(count), due, stay)
        gradient = fresh.gradient

    anchor = None
    if state.anchor is not None:
        refreshed = count % clock.anchor == 0
        anchor = jax.tree.map(
            lambda new, old: jnp.where(refreshed, new, old), params, state.anchor
        )
    read_from = {"pre": state.params, "post": params, "anchor": point}[level.read_at]
    moved = LevelState(params, opt, anchor, gradient, count)
    return moved, level.read(read_from, context_t)


def unroll(
    level: Level, state: LevelState, context: PyTree
) -> tuple[LevelState, PyTree]:
    """Lets `level` live through its context, one `tick` an item, and reads each item.

    This is the definition every fast path in this repository is held to. It is
    differentiable in `state` and in `context`, so the level above learns through it
    with an ordinary `jax.grad`; `level.gradient` says how much of it.

    Args:
      level: the level.
      state: where it stands; `begin(level, params)` for a fresh one.
      context: a pytree whose leaves lead with time, T.

    Returns:
      The state after the last item, and the T reads stacked.

    Raises:
      ValueError: `state` is none; an item of the context makes a number of it one of
        another type; as of `tick`.

    A scalar running mean of its context, read before each move:

    >>> mean = Level(
    ...     init=lambda key: jnp.zeros(()),
    ...     read=lambda m, x: m,
    ...     objective=lambda m, x: 0.5 * (m - x) ** 2,
    ...     flow=optax.sgd(0.5),
    ... )
    >>> state, reads = unroll(mean, begin(mean, jnp.zeros(())), jnp.array([4.0, 4.0]))
    >>> float(state.params), reads.tolist()
    (3.0, [0.0, 2.0])
    """
    _check_state(state)
    if not level.clock.parametric:
        length = jax.tree.leaves(context)[0].shape[0]
        past = jnp.tril(jnp.ones((length, length), bool))
        reads = jax.vmap(lambda mask, x_t: level.read(Seen(context, mask), x_t))(
            past, context
        )
        return state._replace(count=state.count + length), reads
    if level.gradient == "none":
        state = jax.lax.stop_gradient(state)

    def step(state, context_t):
        return tick(level, state, context_t)

    try:
        return jax.lax.scan(step, state, context)
    except TypeError:
        _check_types(step, state, context)
        raise


def _check_types(step, state: LevelState, context: PyTree) -> None:
    """Says which number of a state an item of the context makes one of another type."""
    first = jax.tree.map(lambda leaf: leaf[0], context)
    after, _ = jax.eval_shape(step, state, first)
    if jax.tree.structure(after) != jax.tree.structure(state):
        return
    given = sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(context)})
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(after), strict=True
    )
    for (path, was), now in pairs:
        if jnp.result_type(was) != now.dtype:
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} is {jnp.result_type(was)}, but an "
                f"item of this context, which is {', '.join(given)}, makes it "
                f"{now.dtype}: give both in one type."
            )


def receive(
    level: Level, state: LevelState, gradient: PyTree, inputs: PyTree | None = None
) -> LevelState:
    """Gives `level` one item's gradient that was computed elsewhere.

    The level adds it up and moves when its clock says so, by its own flow: it solves
    the linearised problem of equation 9, whose gradient this is.

    Args:
      level: the level. Its `objective`, `read` and `inputs` are not used.
      state: where it stands.
      gradient: a pytree like its parameters.
      inputs: what each weight matrix multiplied, if its flow asks for that.
    """
    linearised = level._replace(
        objective=lambda params, g: _inner_product(params, g),
        read=lambda params, g: (),
        inputs=None if inputs is None else lambda params, g: inputs,
    )
    return tick(linearised, state, gradient)[0]


class Slow(NamedTuple):
    """The slow level of a system and where it stands. Its `objective` scores what the
    faster levels read: `(params, (x, read)) -> scalar`."""

    level: Level
    state: LevelState


class Fast(NamedTuple):
    """The faster levels of a system, as the slow one sees them.

    Attributes:
      live: `(params, state, x) -> (read, state)`. Reads the context `x` through the
        fast levels while they move; `params` are the slow level's, in which the initial
        states of the fast levels live.
      state: where the fast levels stand; None starts them where `params` say.
    """

    live: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    state: PyTree = None


class HopeUpdate(NamedTuple):
    """What `hope_update` returns: both levels moved, and what there is to look at."""

    slow: Slow
    fast: Fast
    loss: Array
    read: PyTree
    gradient: PyTree


Differentiate = Callable[..., tuple[tuple[Array, PyTree], PyTree, PyTree]]


def hope_update(
    x: PyTree, slow: Slow, fast: Fast, *, differentiate: Differentiate | None = None
) -> HopeUpdate:
    """The whole idea in one function: one item of context, seen by every clock.

    Read the context through the fast levels, which move as they read it; score the
    reads; hand the slow level the gradient of that score, taken through the life of the
    fast levels, and let its own clock decide whether it moves.

    Args:
      x: one item of the slow level's context, for example a batch of sequences.
      slow: the slow level and where it stands.
      fast: the faster levels, started from the slow parameters or carried on.
      differentiate: `(f, params, *given) -> (f(params, *given), gradient, inputs)` for
        an `f` that gives the loss and what else there is of parameters, the fast
        levels' state and `x`. By default `jax.value_and_grad` and the
        slow level's own `inputs`, if it has them; those of a whole network are found
        in one backward pass (`hope_jax.optim.capture.value_and_dgd_gradients`).

    Returns:
      Both levels after the item, the loss, the reads and the slow gradient.
    """

    def outer(params, state, x):
        read, moved = fast.live(params, state, x)
        return slow.level.objective(params, (x, read)), (read, moved)

    point = slow.state.params if slow.state.anchor is None else slow.state.anchor
    if differentiate is not None:
        (loss, (read, moved)), gradient, inputs = differentiate(
            outer, point, fast.state, x
        )
    else:
        of = jax.value_and_grad(outer, has_aux=True)
        (loss, (read, moved)), gradient = of(point, fast.state, x)
        inputs = None
        if slow.level.inputs is not None:
            inputs = slow.level.inputs(point, (x, read))
    state = receive(slow.level, slow.state, gradient, inputs)
    return HopeUpdate(
        slow=slow._replace(state=state),
        fast=fast._replace(state=moved),
        loss=loss,
        read=read,
        gradient=gradient,
    )


def _check_state(state):
    if not isinstance(state, LevelState):
        raise ValueError(
            f"state must be a LevelState, got {type(state).__name__}: where a level "
            "begins is begin(level, params)."
        )


def _inner_product(a: PyTree, b: PyTree) -> Array:
    # float32: leaves of different types add up only in one that is named.
    terms: Any = jax.tree.map(lambda u, v: jnp.vdot(u, v).astype(jnp.float32), a, b)
    return jax.tree.reduce(jnp.add, terms)
