"""Which parameters move when, and which of them decay.

A level of a continuum memory that is slower than a sequence has no fast copy: it is an
ordinary parameter whose optimizer moves every P steps, on the gradients of all of them.
"""

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from hope_jax.core.clock import Clock
from hope_jax.core.level import Collected, collect, move, nothing
from hope_jax.core.system import human, markdown
from hope_jax.optim.leaves import like, path_names, wide_type, zeros

Kind = Literal["matrices", "embeddings", "convolutions", "others"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_MATRICES = frozenset({"kernel", "embedding"})


class OnClockState(NamedTuple):
    """Where a gated rule stands; a pytree, so it can be saved inside a period.

    Attributes:
      count: int32 scalar, gradients taken in since the last move.
      gradient: their sum, in float32 or wider.
      inner: the state of the rule.
      inputs: the sum of those of the matrices, if the rule is given any.
    """

    count: Int[Array, ""]
    gradient: PyTree
    inner: PyTree
    inputs: PyTree = ()


def on_clock(
    inner: optax.GradientTransformation,
    period: int,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    layers: PyTree[bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, moving on every `period`-th step only, by the gradients of all of them.

        g̅ = Σ_{i ≤ P} gᵢ  (divided by P for "mean"),   updates = 0 in between

    This is equation 71 of arXiv:2512.24695 on the clock of optimizer steps.
    `optax.MultiSteps` says the same, but runs `inner` on every step and masks what it
    gives: it costs P times as much, and a NaN it should have hidden comes through.

    Args:
      inner: the rule.
      period: steps between two moves, at least 1.
      reduce: what the rule is given, the mean or the sum of the gradients.
      layers: which leaves are matrices y = x W of whose inputs `update` is given the
        Gram matrices (`hope_jax.optim.capture`), as the argument `inputs`. These are
        then reduced like the gradients: with both, a rule moves as by one step on the
        batches of the whole period.

    Raises:
      ValueError: `period` below 1 or not whole, an unknown `reduce`, or no `inputs`
        for `layers`.

    >>> rule = on_clock(optax.sgd(1.0), period=2, reduce="sum")
    >>> state = rule.init(jnp.zeros(()))
    >>> for gradient in (1.0, 2.0):
    ...     updates, state = rule.update(jnp.array(gradient), state)
    ...     print(float(updates))
    0.0
    -3.0
    """
    if period != int(period) or period < 1:
        raise ValueError(f"period must be a whole number of steps >= 1, got {period}.")
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}.")
    inner = optax.with_extra_args_support(inner)
    if period == 1:
        return inner
    clock = Clock(period=period)
    scale = 1 / period if reduce == "mean" else 1.0

    def init(params):
        return OnClockState(
            count=jnp.zeros((), jnp.int32),
            gradient=zeros(params),
            inner=inner.init(params),
            inputs=() if layers is None else _no_inputs(params, layers),
        )

    def reduced(total):
        return jax.tree.map(lambda g: g * scale, total)

    def update(updates, state, params=None, **extra):
        if layers is not None and extra.get("inputs") is None:
            raise ValueError(
                "layers names matrices whose inputs are needed: update(grads, state, "
                "params, inputs=...), as capture.dgd_gradients gives them."
            )
        gradient = collect(state.gradient, updates)
        count = state.count + 1
        inputs = state.inputs
        if layers is not None:
            given = _where_not_masked(lambda _, x: x, updates, extra.pop("inputs"))
            inputs = collect(inputs, given)

        def due():
            given = None if layers is None else reduced(inputs)
            one = Collected(like(reduced(gradient), updates), given)
            moved, opt, _ = move(inner, one, state.inner, params, **extra)
            fresh = jnp.zeros_like(count), nothing(gradient), opt, nothing(inputs)
            return moved, OnClockState(*fresh)

        def stay():
            return nothing(updates), OnClockState(count, gradient, state.inner, inputs)

        return jax.lax.cond(clock.moves(count), due, stay)

    return optax.GradientTransformationExtraArgs(init, update)


def on_clocks(
    rule: Callable[[int], optax.GradientTransformation],
    periods: PyTree,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    layers: PyTree[bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One rule for each group of parameters of one period.

    Args:
      rule: `period -> transformation` of the group that moves every `period` steps.
      periods: ints, a tree like the parameters.
      reduce, layers: see `on_clock`.
    """
    distinct = sorted(set(jax.tree.leaves(periods)))
    gated = {p: on_clock(rule(p), p, reduce=reduce, layers=layers) for p in distinct}
    if len(distinct) == 1:
        return gated[distinct[0]]
    # Labels are text because they become names in a checkpoint.
    labels = jax.tree.map(lambda p: f"every_{p}", periods)
    return optax.partition({f"every_{p}": tx for p, tx in gated.items()}, labels)


def is_matrix(path: tuple, leaf: Any) -> bool:
    """Whether a parameter is a matrix in the sense of weight decay and Muon.

    A parameter is one if its name is `kernel` or `embedding` and it has two axes at
    least. Everything else is a scale, an offset, a rate or an initial state, for which
    0 means something: biases, the scales of norms, the read-outs of gates and inner
    rates, and where the memories start. A stack of layers `[L, D, F]` is a stack of
    matrices; stacked biases `[L, D]` are none.
    """
    names = path_names(path)
    return names[-1] in _MATRICES and jnp.ndim(leaf) >= 2


def decays(params: PyTree) -> PyTree:
    """Which leaves of `params` weight decay acts on: a tree of bools."""
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def kind(path: tuple, leaf: Any) -> Kind:
    """What a parameter is to an optimizer, by its name.

    Kernels are `matrices` over their last two axes, whatever is stacked before, but
    those of a layer `conv...` are `convolutions`, a few taps a channel; `embeddings`
    are tables of vectors; `others` is all that does not decay.
    """
    if not is_matrix(path, leaf):
        return "others"
    names = path_names(path)
    if names[-1] == "embedding":
        return "embeddings"
    convolves = "".join(names[-2:-1]).startswith("conv")
    return "convolutions" if convolves else "matrices"


def names_of(
    params: PyTree, names: Mapping[Kind, str], *, layers: PyTree[bool] | None = None
) -> PyTree[str]:
    """Which rule moves each leaf.

    Args:
      params: arrays or shapes; of what `optax.partition` masks, nothing is said.
      names: the rule of each kind.
      layers: if given, which matrices move by the rule of matrices; the rest of them
        move by the rule of `others`.
    """

    def name(path, leaf, chosen=True):
        if _is_masked(leaf):
            return leaf
        found = kind(path, leaf)
        return names["others" if found == "matrices" and not chosen else found]

    rest = () if layers is None else (layers,)
    return jax.tree_util.tree_map_with_path(name, params, *rest, is_leaf=_is_masked)


def by_name(
    rules: Mapping[str, optax.GradientTransformation],
    names: Callable[[PyTree], PyTree[str]],
) -> optax.GradientTransformationExtraArgs:
    """Several rules, each with one state for all that it moves.

    Args:
      rules: by name. Those that move nothing have no state.
      names: `params -> names`, which of them moves each leaf; `names_of`, for example.
    """
    if len(rules) == 1:
        return optax.with_extra_args_support(*rules.values())

    def partition(tree):
        labels = names(tree)
        present = sorted(set(jax.tree.leaves(labels)))
        return optax.partition({name: rules[name] for name in present}, labels)

    def update(updates, state, params=None, **extra):
        return partition(updates).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(
        lambda params: partition(params).init(params), update
    )


def last_two_axes(params: PyTree) -> PyTree[optax.contrib.MuonDimensionNumbers]:
    """What Optax's Muon must know of matrices stacked along their first axes."""
    return jax.tree.map(
        lambda leaf: optax.contrib.MuonDimensionNumbers(
            reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1
        ),
        params,
    )


class Group(NamedTuple):
    """Parameters of one kind that one rule moves on one clock.

    Attributes:
      kind: matrices, embeddings, convolutions or others.
      rule: the name of what moves them.
      period: steps between two moves.
      parameters: how many numbers they are.
    """

    kind: Kind
    rule: str
    period: int
    parameters: int


def summary(params: PyTree, names: PyTree[str], periods: PyTree) -> list[Group]:
    """Which parameters get which rule on which clock; fast clocks first.

    Args:
      params: arrays or shapes.
      names: the rule of each leaf (`names_of`).
      periods: after how many steps each moves.
    """
    sizes: collections.Counter[tuple] = collections.Counter()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), name, period in zip(
        leaves, jax.tree.leaves(names), jax.tree.leaves(periods), strict=True
    ):
        sizes[period, KINDS.index(kind(path, leaf)), name] += leaf.size
    return [
        Group(KINDS[index], name, period, sizes[period, index, name])
        for period, index, name in sorted(sizes)
    ]


def describe(groups: Iterable[Group]) -> str:
    """A Markdown table of `groups`.

    >>> print(describe([Group("matrices", "m3", 4, 65_536)]))
    | moves    | by | on            | parameters |
    |----------|----|---------------|------------|
    | matrices | m3 | every 4 steps | 65.5K      |
    """
    rows = [
        {
            "moves": group.kind,
            "by": group.rule,
            "on": "every step" if group.period == 1 else f"every {group.period} steps",
            "parameters": human(group.parameters),
        }
        for group in groups
    ]
    return markdown(("moves", "by", "on", "parameters"), rows)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _where_not_masked(function: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps leaves with those of `rest`, which `optax.partition` has not masked."""
    return jax.tree.map(
        lambda leaf, *more: leaf if _is_masked(leaf) else function(leaf, *more),
        tree,
        *rest,
        is_leaf=_is_masked,
    )


def _no_inputs(params: PyTree, layers: PyTree[bool]) -> PyTree:
    """Gram matrices of no inputs, and None for what multiplies nothing."""

    def zeros(leaf, chosen):
        if not chosen:
            return None
        shape = (*leaf.shape[:-1], leaf.shape[-2])
        return jnp.zeros(shape, wide_type(leaf.dtype))

    return _where_not_masked(zeros, params, layers)
