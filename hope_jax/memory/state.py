"""Where a memory stands: what it carries from one chunk to the next."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hope_jax.core import show
from hope_jax.memory.architecture import Weights
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_flow,
    initial_weights,
    key_width,
)
from hope_jax.memory.flow import FlowState

Form = Literal["rank_one", "channel", "oja", "newton", "vector", "states"]


class Recent(NamedTuple):
    """The last `window - 1` pairs, oldest first; zeros before the first token."""

    k: Float[Array, "W K"]
    v: Float[Array, "W V"]


class MemoryState(NamedTuple):
    """Where a memory stands inside a chunk; float32.

    Attributes:
      weights: the running weights.
      momentum: the running momentum, shaped like `weights`; None without momentum.
      anchor: the weights at the chunk's start; None for exact gradients.
      rule: the state of any other flow; None where the fields above are all of it.
      recent: what an Omega window still sees; None without one.
      left: what the chunk's tokens left of its budget (`memory.rates.ration`), one at
        its start; None without one.
      starts: where it returns to, from fast to slow, before the start that all rows
        share (`memory.consolidation`); none without such levels.
    """

    weights: Weights
    momentum: Weights | None
    anchor: Weights | None
    rule: FlowState | None = None
    recent: Recent | None = None
    left: Float[Array, ""] | None = None
    starts: tuple[Weights, ...] = ()

    _repr_html_ = show.state


def form(config: MemoryConfig) -> Form:
    """Which chunk form computes this memory."""
    found = config.chosen
    if found.rule.solves:
        return "newton"
    if found.retention.channels:
        return "channel"
    if found.retention.along_values:
        return "oja"
    if not (found.retention.uniform and found.rule.linear):
        return "states"
    if not found.architecture.diagonal:
        return "rank_one"
    return "vector" if config.gradient == "exact" else "states"


def begin_memory(config: MemoryConfig, start: Weights) -> MemoryState:
    """Before the first token, from the weights that the level above learns."""
    weights = initial_weights(config, start)
    kind = form(config)
    momentum = recent = None
    rule: Any = None
    if kind in ("states", "newton"):
        rule = build_flow(config).init(weights)
    elif config.inertia:
        momentum = jax.tree.map(jnp.zeros_like, weights)
    if config.window > 1:
        width = weights["w1" if "w1" in weights else "w"].shape[0]
        past = lambda size: jnp.zeros((config.window - 1, size), jnp.float32)  # noqa: E731
        recent = Recent(past(key_width(config, width)), past(width))
    anchor = weights if config.gradient == "anchored" else None
    left = None
    if config.rate_law == "budget":
        one = next(iter(weights.values()))
        left = jnp.ones(one.shape[:-2], jnp.float32)
    return MemoryState(weights, momentum, anchor, rule, recent, left)


def next_recent(
    config: MemoryConfig,
    recent: Recent | None,
    tokens: Tokens,
    count: Int[Array, ""] | None = None,
) -> Recent | None:
    """What windows still see after `tokens`, or after the first `count` of them."""
    if recent is None:
        return None
    pairs = map(jnp.concatenate, zip(recent, (tokens.k, tokens.v), strict=True))
    if count is None:
        return Recent(*(pair[1 - config.window :] for pair in pairs))
    size = config.window - 1
    return Recent(*(jax.lax.dynamic_slice_in_dim(pair, count, size) for pair in pairs))


def commit(state: MemoryState) -> MemoryState:
    """Ends a chunk: the next one takes its gradients where the memory now stands.

    Of a committed state it says once more that anchor and weights are one, so that the
    compiler shares what is computed of both.
    """
    if state.left is not None:
        state = state._replace(left=jnp.ones_like(state.left))
    return state if state.anchor is None else state._replace(anchor=state.weights)


def commit_if(
    over: Bool[Array, ""], before: MemoryState, after: MemoryState
) -> MemoryState:
    """`after` a chunk that began at `before`, committed where the chunk is over."""
    left, anchor = after.left, after.anchor
    if left is not None:
        left = jnp.where(over, jnp.ones_like(left), left)
    if anchor is not None:
        assert before.anchor is not None  # states of one memory
        anchor = jax.tree.map(
            lambda new, old: jnp.where(over, new, old), after.weights, before.anchor
        )
    return after._replace(anchor=anchor, left=left)


def bare(state: MemoryState) -> MemoryState:
    """A committed state without its anchor, which is what its weights are."""
    return state._replace(anchor=None)


def full(state: MemoryState) -> MemoryState:
    """What `bare` was made of, for a memory that has an anchor."""
    return state._replace(anchor=state.weights)
