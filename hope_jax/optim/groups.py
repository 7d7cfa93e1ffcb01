"""Which parameters move when, and which of them decay.

A level of a continuum memory that is slower than a sequence has no fast copy: it is an
ordinary parameter whose optimizer moves every P steps, on the gradients of all of them.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

Kind = Literal["matrices", "embeddings", "convolutions", "others"]

_MATRICES = frozenset({"kernel", "embedding"})


class OnClockState(NamedTuple):
    """Where a gated rule stands; a pytree, so it can be saved inside a period.

    Attributes:
      count: int32 scalar, gradients taken in since the last move.
      gradient: their sum.
      inner: the state of the rule.
    """

    count: Int[Array, ""]
    gradient: PyTree
    inner: PyTree


def on_clock(
    inner: optax.GradientTransformation,
    period: int,
    *,
    reduce: Literal["mean", "sum"] = "mean",
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

    Raises:
      ValueError: `period` below 1 or not whole, or an unknown `reduce`.

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
    scale = 1 / period if reduce == "mean" else 1.0

    def init(params):
        return OnClockState(
            count=jnp.zeros((), jnp.int32),
            gradient=jax.tree.map(jnp.zeros_like, params),
            inner=inner.init(params),
        )

    def update(updates, state, params=None, **extra):
        gradient = jax.tree.map(jnp.add, state.gradient, updates)
        count = state.count + 1

        def move():
            reduced = jax.tree.map(lambda g: g * scale, gradient)
            moved, opt = inner.update(reduced, state.inner, params, **extra)
            return moved, OnClockState(jnp.zeros_like(count), _zeros(gradient), opt)

        def stay():
            return _zeros(updates), OnClockState(count, gradient, state.inner)

        return jax.lax.cond(count == period, move, stay)

    return optax.GradientTransformationExtraArgs(init, update)


def on_clocks(
    rule: Callable[[int], optax.GradientTransformation],
    periods: PyTree,
    *,
    reduce: Literal["mean", "sum"] = "mean",
) -> optax.GradientTransformationExtraArgs:
    """One rule for each group of parameters of one period.

    Args:
      rule: `period -> transformation` of the group that moves every `period` steps.
      periods: ints, a tree like the parameters.
      reduce: see `on_clock`.
    """
    distinct = sorted(set(jax.tree.leaves(periods)))
    gated = {p: on_clock(rule(p), p, reduce=reduce) for p in distinct}
    if len(distinct) == 1:
        return gated[distinct[0]]
    # Labels are text because they become names in a checkpoint.
    labels = jax.tree.map(lambda p: f"every_{p}", periods)
    return optax.partition({f"every_{p}": tx for p, tx in gated.items()}, labels)


def path_names(path: tuple) -> tuple[str, ...]:
    """A key path of `jax.tree_util` as plain names, without a Variable's `.value`.

    >>> path_names(jax.tree_util.tree_flatten_with_path({"a": [0]})[0][0][0])
    ('a', '0')
    """
    return tuple(
        jax.tree_util.keystr((key,), simple=True)
        for key in path
        if key != jax.tree_util.GetAttrKey("value")
    )


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


def kinds(params: PyTree) -> PyTree[Kind]:
    """The kind of every leaf of `params`."""
    return jax.tree_util.tree_map_with_path(kind, params)


def by_kind(
    rules: Mapping[str, optax.GradientTransformation], names: Mapping[Kind, str]
) -> optax.GradientTransformationExtraArgs:
    """A rule for each kind of parameters.

    Args:
      rules: by name; each has one state for all that it moves.
      names: which of them moves each kind.
    """
    if len(set(names.values())) == 1:
        return optax.with_extra_args_support(rules[names["matrices"]])

    def partition(tree):
        labels = jax.tree.map(lambda k: names[k], kinds(tree))
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


def muon_dimensions(params: PyTree) -> PyTree:
    """`optax.contrib.MuonDimensionNumbers` of every leaf, or None where Adam moves it.

    Optax's own default takes every array of two axes: it would give stacked kernels to
    Adam and stacked biases to Muon.
    """

    def dimensions(path, leaf):
        return last_two_axes(leaf) if kind(path, leaf) == "matrices" else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def summary(periods: PyTree, params: PyTree) -> dict[int, int]:
    """Parameters that move on each period, for a line of a log."""
    counts: collections.Counter[int] = collections.Counter()
    leaves = zip(jax.tree.leaves(periods), jax.tree.leaves(params), strict=True)
    for period, leaf in leaves:
        counts[period] += leaf.size
    return dict(sorted(counts.items()))


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)
