"""A chunk of any memory of `compose`, in parallel over its tokens.

Reference: `unroll(memory_level(config, width), ...)`. A two-layer memory with anchored
gradients is two matrix recurrences: every layer's inputs and output errors are known at
the chunk's start, so each follows `kernels.delta` by itself, and per-token reads nest
the two.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hope_jax.kernels import delta
from hope_jax.memory.architecture import ACTIVATIONS, Weights
from hope_jax.memory.compose import MemoryConfig, Tokens, delta_rates


class MemoryState(NamedTuple):
    """Where a memory stands inside a chunk; float32.

    Attributes:
      weights: the running weights.
      momentum: the running momentum, shaped like `weights`; None without momentum.
      anchor: the weights at the chunk's start; None for exact gradients.
    """

    weights: Weights
    momentum: Weights | None
    anchor: Weights | None


def begin_memory(config: MemoryConfig, weights: Weights) -> MemoryState:
    zeros = jax.tree.map(jnp.zeros_like, weights) if config.momentum else None
    return MemoryState(
        weights, zeros, weights if config.gradient == "anchored" else None
    )


def commit(state: MemoryState) -> MemoryState:
    """Ends a chunk: the next one takes its gradients where the memory now stands."""
    anchor = None if state.anchor is None else state.weights
    return state._replace(anchor=anchor)


def output_error(config: MemoryConfig, output: Array, value: Array) -> Array:
    """The gradient of the bias in the memory's output."""
    return output - value if config.bias == "l2" else -value


def gate_transitions(config: MemoryConfig, tokens: Tokens) -> delta.Transitions:
    keeps = config.retention == "none"
    return delta.transitions(
        jnp.ones_like(tokens.alpha) if keeps else tokens.alpha,
        tokens.theta if config.momentum else None,
    )


def piece(
    config: MemoryConfig, state: MemoryState, tokens: Tokens, reads: bool = True
) -> tuple[MemoryState, Float[Array, "C V"] | None]:
    """Reads and writes the C tokens of one chunk, or of a part of one, in parallel.

    The caller commits when the chunk is complete. With `reads` False only the state
    is computed and None stands for the reads.
    """
    run = _linear_piece if config.architecture == "linear" else _mlp_piece
    with jax.default_matmul_precision("float32"):
        return run(config, state, tokens, gate_transitions(config, tokens), reads)


def _linear_piece(config, state, tokens, gates, reads):
    m, s, anchor = _layer(state, "w")
    k, v, eta = tokens.k, tokens.v, tokens.eta
    b = delta_rates(config, eta, {}).get("w")
    if config.gradient == "exact" and config.bias == "l2":
        rows = delta.exact_rows(m, s, k, v, eta, b, gates)
    else:  # the gradient of the dot product is the same at any state
        output = None if config.bias == "dot" else k @ anchor.T
        e = -eta[:, None] * output_error(config, output, v)
        rows = delta.anchored_rows(m, s, k, e, b, gates)
    state = _with_layers(state, w=delta.finish(m, s, k, rows, gates))
    if not reads:
        return state, None
    if config.read == "anchor":
        return state, tokens.q @ anchor.T
    before = config.read == "pre"
    return state, delta.read(m, s, k, rows, gates, tokens.q, before)


def _mlp_piece(config, state, tokens, gates, reads):
    sigma = ACTIVATIONS[config.activation]
    m1, s1, anchor1 = _layer(state, "w1")
    m2, s2, anchor2 = _layer(state, "w2")
    k, q, eta = tokens.k, tokens.q, tokens.eta

    hidden, pullback = jax.vjp(sigma, k @ anchor2.T)
    error = output_error(config, k + hidden @ anchor1.T, tokens.v)
    (hidden_error,) = pullback(error @ anchor1)

    rates = jax.vmap(lambda eta, h: delta_rates(config, eta, {"w1": h}))(eta, hidden)
    rows1 = delta.anchored_rows(
        m1, s1, hidden, -eta[:, None] * error, rates.get("w1"), gates
    )
    rows2 = delta.anchored_rows(
        m2, s2, k, -eta[:, None] * hidden_error, rates.get("w2"), gates
    )
    state = _with_layers(
        state,
        w1=delta.finish(m1, s1, hidden, rows1, gates),
        w2=delta.finish(m2, s2, k, rows2, gates),
    )
    if not reads:
        return state, None
    if config.read == "anchor":
        return state, q + sigma(q @ anchor2.T) @ anchor1.T
    before = config.read == "pre"
    hidden_q = sigma(delta.read(m2, s2, k, rows2, gates, q, before))
    return state, q + delta.read(m1, s1, hidden, rows1, gates, hidden_q, before)


def _layer(state: MemoryState, name: str):
    momentum = None if state.momentum is None else state.momentum[name]
    anchor = None if state.anchor is None else state.anchor[name]
    return state.weights[name], momentum, anchor


def _with_layers(state: MemoryState, **ends: tuple[Array, Array | None]):
    weights = {name: end[0] for name, end in ends.items()}
    momentum = None if state.momentum is None else {n: e[1] for n, e in ends.items()}
    return state._replace(weights=weights, momentum=momentum)
