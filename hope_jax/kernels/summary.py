"""What a stretch of tokens does to a memory that moves by an affine map.

Where the gradient is linear in a matrix memory, and so is what it keeps, tokens take
the state X at their start to `X A + B` whatever it is, and A and B come of the tokens
alone. So stretches of a text are summed up apart, and each is then read from its own
true start, `X A₁ A₂ + B₁ A₂ + B₂` after two of them.

The chunk form itself makes both: rows of a matrix do not know of one another, so B is
what becomes of rows of zero and A what becomes of the identity's, with zero for their
values. Of a momentum S, X is `[M | S]`. For one stream and one head; callers `vmap`.

Reference: `memory_scan`, whose state after the tokens is `X A + B` of the one before.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hope_jax.kernels.mesa import mesa_weights
from hope_jax.kernels.select import memory_end
from hope_jax.memory.architecture import Weights
from hope_jax.memory.compose import MemoryConfig, Tokens, with_choices
from hope_jax.memory.rule import NewtonState
from hope_jax.memory.state import MemoryState, form


class Summary(NamedTuple):
    """`X -> X A + B`, where X has R rows of N numbers; of a diagonal memory one such
    map a channel.

    Attributes:
      kept: A.
      added: B.
    """

    kept: Float[Array, "*K N N"]
    added: Float[Array, "*K R N"]


def affine(config: MemoryConfig) -> bool:
    """Whether the memory moves by an affine map, from one chunk's end to another's."""
    found = config.chosen
    if form(config) == "rank_one":
        plain = found.architecture.matrix and not config.norm
        return plain and found.bias.linear and config.rate_law == "token"
    return form(config) != "states"


def rows(config: MemoryConfig, state: MemoryState) -> Float[Array, "*K R N"]:
    """X of a memory that is `affine`."""
    match form(config):
        case "newton":
            sums = state.rule.step  # pyright: ignore[reportOptionalMemberAccess]
            return jnp.concatenate([sums.values["w"], sums.keys["w"]])
        case "oja":
            return state.weights["w"].T
        case "vector":
            return jnp.stack([leaf["w"] for leaf in _both(state)], axis=-1)[:, None]
        case _:
            return jnp.concatenate([leaf["w"] for leaf in _both(state)], axis=-1)


def with_rows(
    config: MemoryConfig, state: MemoryState, x: Float[Array, "*K R N"]
) -> MemoryState:
    """`state`, committed, with another X."""
    width = state.weights["w"].shape[0]
    match form(config):
        case "newton":
            g, h = x[:width], x[width:]
            state = state._replace(
                rule=state.rule._replace(step=NewtonState({"w": g}, {"w": h}))  # pyright: ignore[reportOptionalMemberAccess]
            )
            made = (mesa_weights(g, h, config.ridge),)
        case "oja":
            made = (x.T,)
        case "vector":
            made = tuple(x[:, 0, i] for i in range(x.shape[-1]))
        case _:
            made = jnp.split(x, len(_both(state)), axis=-1)
    weights, *momentum = ({"w": leaf} for leaf in made)
    return state._replace(
        weights=weights,
        momentum=momentum[0] if momentum else None,
        anchor=None if state.anchor is None else weights,
    )


def summarise(
    config: MemoryConfig,
    state: MemoryState,
    tokens: Tokens,
    start: Weights | None = None,
) -> Summary:
    """What T >= 1 tokens do to the memory, from a chunk's start on.

    Args:
      config: a memory that is `affine`.
      state: where it stands, of which the pairs that a window still sees are read and
        nothing else.
      tokens: of one stream and one head, as of `memory_scan`.
      start: the weights of `begin_memory`, for a memory that `returns` to them.
    """
    if form(config) == "vector":
        return _of_channels(config, state, tokens, start)
    config, tokens = _as_delta_rule(config, tokens)
    values, keys = tokens.v.shape[-1], tokens.k.shape[-1]
    width = keys * len(_both(state))
    dtype = state.weights["w"].dtype
    basis = jnp.eye(values + width, width, -values, dtype)

    def more(a, axis):  # of the identity's rows
        padding = [(0, width if i == axis % a.ndim else 0) for i in range(a.ndim)]
        return jnp.pad(a, padding)

    begun = MemoryState(*_begun(state, jnp.split(basis, width // keys, axis=1)))
    if state.recent is not None:
        recent = state.recent._replace(v=more(state.recent.v, -1))
        begun = begun._replace(recent=recent)
    if config.returns and start is not None:
        start = {"w": more(start["w"], 0)}
    tokens = tokens._replace(v=more(tokens.v, -1))
    after = memory_end(config, begun, tokens, start=start)
    made = jnp.concatenate([leaf["w"] for leaf in _both(after)], axis=-1)
    return Summary(made[values:], made[:values])


def _both(state):
    """Weights, and momentum where there is one."""
    return [leaf for leaf in (state.weights, state.momentum) if leaf is not None]


def _begun(state, leaves):
    """Weights, momentum and anchor of a state like `state`."""
    weights, *momentum = ({"w": leaf} for leaf in leaves)
    anchor = None if state.anchor is None else weights
    return weights, momentum[0] if momentum else None, anchor


def _as_delta_rule(config, tokens):
    """The memory in the coordinates in which rows do not know of one another."""
    k, v = tokens.k, tokens.v
    match form(config):
        case "newton":  # two sums, of values and of keys
            config = with_choices(config, bias="dot", rule="gd")
            return config, tokens._replace(v=jnp.concatenate([v, k], axis=-1))
        case "oja":  # a delta rule of the transposed matrix
            config = with_choices(
                config, retention="decay", dgd="both", features="none"
            )
            return config, tokens._replace(k=v, v=k, q=v)
        case _:
            return config, tokens


def _of_channels(config, state, tokens, start):
    """Every channel by itself: from zero, and of each number of a state from one."""
    parts = len(_both(state))
    basis = jnp.eye(parts + 1, parts, -1, state.weights["w"].dtype)
    first = jnp.arange(parts + 1, dtype=jnp.int32) == 0

    def run(basis, first):
        ones = jnp.ones_like(state.weights["w"])
        begun = MemoryState(*_begun(state, [one * ones for one in basis]))
        only = lambda a: jnp.where(first, a, jnp.zeros_like(a))  # noqa: E731
        origin = None if start is None else jax.tree.map(only, start)
        own = tokens._replace(v=only(tokens.v))
        after = memory_end(config, begun, own, start=origin)
        return rows(config, after)

    made = jnp.moveaxis(jax.vmap(run)(basis, first)[:, :, 0], 0, 1)
    return Summary(made[:, 1:], made[:, :1])
