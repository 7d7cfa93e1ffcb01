"""The definition of the self-modifying layer: token by token, each memory a level.

Section 8 of arXiv:2512.24695 as it is written, equations 83 to 93, and nothing of the
fast path in `self_modifying.py`, which is held to it in values and pullbacks. Every
memory is a `memory_level` that `core.level.tick`s on its own tokens, and its own clock
says when its anchor is refreshed.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hope_jax.core.level import LevelState, begin, tick
from hope_jax.memory.architecture import Weights
from hope_jax.memory.compose import Tokens, build_architecture, memory_level
from hope_jax.models.self_modifying import SelfModifyingConfig, SelfModifyingTitans


class Memories(NamedTuple):
    """Every memory of the layer, as the state of its level.

    Attributes:
      projection: in the order of the config's `projections`, `[B, H, P, ...]`.
      main: leaves `[B, H, ...]`.
    """

    projection: LevelState
    main: LevelState


class _Head(NamedTuple):
    """What the slow level gives one head: initial states and a few weights."""

    projection: Weights
    main: Weights
    conv: dict[str, Float[Array, "W K"]]
    gate: dict[str, tuple[Float[Array, " K"], Float[Array, ""]]]


def self_modifying_reference(
    layer: SelfModifyingTitans, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], Memories]:
    """What `layer(x)` means, in one scan over tokens.

        kₜ = M_k(xₜ), vₜ = M_v(xₜ), ηₜ and αₜ from M_η(xₜ), M_α(xₜ), qₜ = W_q xₜ   (83)
        v̂ₜ = M_□(vₜ)                                                         (84, 85)
        M_□,ₜ = M_□,ₜ₋₁ (αₜ I − ηₜ kₜ kₜᵀ) − ηₜ ∇ℓ(M_□; kₜ, v̂ₜ)               (86-88)

    where each M_□ without a time is read at its anchor, its state after its last whole
    chunk (equation 90), which for a chunk of one token is M_□,ₜ₋₁. Keys and queries
    have unit norm; with `unit_values` so have values and targets, which the equations
    leave free.

    Args:
      layer: the layer, whose memories start at its learned initial states.
      x: at least one token a row.

    Returns:
      What the layer returns, and the state of every memory after the last token.
    """
    rows, length, _ = x.shape

    def split(a):
        return a.astype(jnp.float32).reshape(rows, length, layer.heads, layer.width)

    projected = x if layer.config.adaptive_q else layer.q(x)
    live = functools.partial(_live, layer.config)
    live = jax.vmap(live, in_axes=(0, 1, 1), out_axes=(0, 1))  # heads
    live = jax.vmap(live, in_axes=(None, 0, 0))  # rows
    memories, y = live(_heads(layer), split(x), split(projected))

    y = layer.norm(y.astype(layer.dtype)).reshape(x.shape)
    return layer.out(y * jax.nn.silu(layer.gate(x))), memories


def _heads(layer: SelfModifyingTitans) -> _Head:
    """The layer's parameters, leaves that lead with heads."""

    def kernel(conv):
        width = conv.kernel.shape[0]
        split = conv.kernel[...].reshape(width, layer.heads, layer.width)
        return jnp.moveaxis(split, 1, 0)

    return _Head(
        projection={n: w[...] for n, w in layer.projection_start.items()},
        main={n: w[...] for n, w in layer.main_start.items()},
        conv={
            "k": kernel(layer.conv_k),
            "v": kernel(layer.conv_v),
            "q": kernel(layer.conv_q),
        },
        gate={
            "eta": (layer.read_eta[...], layer.bias_eta[...]),
            "alpha": (layer.read_alpha[...], layer.bias_alpha[...]),
            "theta": (layer.read_theta[...], layer.bias_theta[...]),
        },
    )


def _live(
    config: SelfModifyingConfig,
    head: _Head,
    x: Float[Array, "T K"],
    projected: Float[Array, "T K"],
) -> tuple[Memories, Float[Array, "T K"]]:
    """The memories of one head live through one stream; `projected` is W_q x."""
    width = x.shape[-1]
    recall = build_architecture(config.memory, width).apply
    each = jax.vmap(recall, (0, None))
    main_level = memory_level(config.memory, width)
    level = memory_level(
        dataclasses.replace(config.memory, chunk=config.projection_chunk), width
    )

    def bounded(value):
        return _unit(value) if config.unit_values else value

    def gate(name, of):
        weight, bias = head.gate[name]
        return jax.nn.sigmoid(jnp.vdot(weight, of) + bias)

    def step(state, inputs):
        memories, windows = state
        x_t, projected_t = inputs
        anchors, main_anchor = (_anchor(memory) for memory in memories)

        made = dict(zip(config.projections, each(anchors, x_t), strict=True))
        made.setdefault("q", projected_t)
        windows = {
            name: jnp.concatenate([window[1:], made[name][None]])
            for name, window in windows.items()
        }
        k, v, q = (jnp.sum(head.conv[n] * windows[n], axis=0) for n in "kvq")
        theta = gate("theta", x_t)
        eta = config.rate_bound * gate("eta", made["eta"])
        if config.memory.inertia:
            eta = eta * (1.0 - theta)
        v = bounded(v)
        token = Tokens(
            k=_unit(k),
            v=v,
            q=_unit(q),
            eta=eta,
            alpha=gate("alpha", made["alpha"]),
            theta=theta,
        )

        def learn(state, target):
            return tick(level, state, token._replace(v=bounded(target)))[0]

        projection = jax.vmap(learn)(memories.projection, each(anchors, v))
        own = token._replace(v=bounded(recall(main_anchor, v)))
        main, y = tick(main_level, memories.main, own)
        return (Memories(projection, main), windows), y

    start = Memories(
        projection=jax.vmap(lambda weights: begin(level, weights))(head.projection),
        main=begin(main_level, head.main),
    )
    windows = {name: jnp.zeros_like(kernel) for name, kernel in head.conv.items()}
    (memories, _), y = jax.lax.scan(step, (start, windows), (x, projected))
    return memories, y


def _anchor(state: LevelState) -> Weights:
    return state.params if state.anchor is None else state.anchor


def _unit(x: Float[Array, " K"]) -> Float[Array, " K"]:
    return x / jnp.sqrt(jnp.vdot(x, x) + 1e-6)
