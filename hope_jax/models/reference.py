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
from hope_jax.memory import rates
from hope_jax.memory.architecture import Weights
from hope_jax.memory.compose import Tokens, build_architecture, memory_level
from hope_jax.models.mixers.self_modifying import (
    SelfModifyingConfig,
    SelfModifyingTitans,
)


class Memories(NamedTuple):
    """Every memory of the layer, as the state of its level.

    Attributes:
      projection: in the order of the config's `projections`, `[B, H, P, ...]`.
      main: leaves `[B, H, ...]`.
      anchors: the weights of both at the start of their chunks, from which a chunk's
        keys, values and gates are generated.
    """

    projection: LevelState
    main: LevelState
    anchors: tuple[Weights, Weights]


class _Head(NamedTuple):
    """What the slow level gives one head: initial states and a few weights."""

    projection: Weights
    main: Weights
    conv: dict[str, Float[Array, "W *N K"]]
    gate: dict[str, tuple[Float[Array, "*N K"], Float[Array, "*N"]]]
    share: Float[Array, " P"]


def self_modifying_reference(
    layer: SelfModifyingTitans, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], Memories]:
    """What `layer(x)` means, in one scan over tokens.

        kₜ = M_k(xₜ), vₜ = M_v(xₜ), ηₜ and αₜ from M_η(xₜ), M_α(xₜ), qₜ = W_q xₜ   (83)
        v̂ₜ = M_□(vₜ)                                                         (84, 85)
        M_□,ₜ = M_□,ₜ₋₁ (αₜ I − ηₜ kₜ kₜᵀ) − ηₜ ∇ℓ(M_□; kₜ, v̂ₜ)               (86-88)

    where each M_□ without a time is read at its anchor, its state after its last whole
    chunk (equation 90), which for a chunk of one token is M_□,ₜ₋₁. What the equations
    leave free is as `SelfModifyingConfig` has it: keys and queries have unit norm,
    values and targets by `unit_values` and `scale_free`, xₜ is a slow map of the token
    for each of k, v and the gates with `inputs='dense'`, and a projection takes its
    learned share of ηₜ.

    With `memory.steps` of them a token's writes follow one another, each with a key, a
    value and a rate of its own: (86-88) once for each, the first alone with αₜ, others
    with 1, and what is read is read at the last. Anchors stay where they are meanwhile.

    Args:
      layer: the layer, whose memories start at its learned initial states.
      x: at least one token a row.

    Returns:
      What the layer returns, and the state of every memory after the last token.
    """
    rows, length, _ = x.shape

    def split(a, *writes):
        a = a.astype(jnp.float32)
        return a.reshape(rows, length, layer.heads, *writes, layer.width)

    dense = layer.config.inputs == "dense"
    writes = layer.config.memory.steps
    seen = {
        "k": split(layer.k(x) if dense or not layer.config.adaptive_k else x, writes),
        "v": split(layer.v(x) if dense or not layer.config.adaptive_v else x, writes),
        "gates": split(layer.gates(x) if dense else x),
        "q": split(layer.q(x) if dense or not layer.config.adaptive_q else x),
    }
    live = functools.partial(_live, layer.config)
    live = jax.vmap(live, in_axes=(0, 1), out_axes=(0, 1))  # heads
    live = jax.vmap(live, in_axes=(None, 0))  # rows
    memories, y = live(_heads(layer), seen)

    y = layer.norm(y.astype(layer.dtype)).reshape(x.shape)
    return layer.out(y * jax.nn.silu(layer.gate(x))), memories


def _heads(layer: SelfModifyingTitans) -> _Head:
    """The layer's parameters, leaves that lead with heads."""

    writes = layer.config.memory.steps

    def kernel(conv, *writes):
        width = conv.kernel.shape[0]
        split = conv.kernel[...].reshape(width, layer.heads, *writes, layer.width)
        return jnp.moveaxis(split, 1, 0)

    projection, main = layer.starts()
    return _Head(
        projection=projection,
        main=main,
        conv={
            "k": kernel(layer.conv_k, writes),
            "v": kernel(layer.conv_v, writes),
            "q": kernel(layer.conv_q),
        },
        gate={
            "eta": (
                layer.read_eta[...].reshape(layer.heads, writes, layer.width),
                layer.bias_eta[...].reshape(layer.heads, writes),
            ),
            "alpha": (layer.read_alpha[...], layer.bias_alpha[...]),
            "theta": (layer.read_theta[...], layer.bias_theta[...]),
        }
        | (
            {"erase": (layer.read_erase[...], layer.bias_erase[...])}
            if layer.config.erase == "gate"
            else {}
        ),
        share=jnp.ones((layer.heads, len(layer.config.projections)), jnp.float32)
        if layer.config.projection_rate is None
        else jax.nn.sigmoid(layer.shares[...]),
    )


def _live(
    config: SelfModifyingConfig, head: _Head, seen: dict[str, Float[Array, "T *N K"]]
) -> tuple[Memories, Float[Array, "T K"]]:
    """The memories of one head live through one stream; k and v of it, `[T, N, K]`, are
    of N writes a token."""
    memory = config.memory
    width = seen["q"].shape[-1]
    apply = build_architecture(memory, width).apply
    main_level = memory_level(memory, width)
    level = memory_level(
        dataclasses.replace(memory, chunk=config.projection_chunk), width
    )

    def recall(weights, x):
        if not config.scale_free or memory.chosen.architecture.linear:
            return apply(weights, x)
        return _norm(x) * apply(weights, x / _norm(x))

    def target(weights, v):
        if config.unit_values:
            return _unit(recall(weights, v))
        made = recall(weights, v)
        if config.scale_free:
            made = made * jnp.minimum(1.0, _norm(v) / _norm(made))
        return made

    def gate(name, of):
        weight, bias = head.gate[name]
        return jax.nn.sigmoid(weight @ of + bias)

    def each(run):
        """`run` of a vector, or of those of each write."""
        return lambda x: jax.vmap(run)(x) if x.ndim == 2 else run(x)

    def activate(x):
        return jax.nn.silu(x) if config.conv_activation == "silu" else x

    def ration(eta, left):
        if memory.rate_law != "budget":
            return eta, left
        return eta * left / (1.0 + left), left * (1.0 - eta)

    def step(state, seen):
        memories, windows, count, (left, main_left) = state
        anchors, main_anchor = memories.anchors
        source = {"eta": seen["gates"], "alpha": seen["gates"]} | seen

        made = dict(seen)
        for i, name in enumerate(config.projections):
            own = {n: w[i] for n, w in anchors.items()}
            made[name] = each(functools.partial(recall, own))(source[name])
        windows = {
            name: jnp.concatenate([window[1:], made[name][None]])
            for name, window in windows.items()
        }
        k, v, q = (activate(jnp.sum(head.conv[n] * windows[n], axis=0)) for n in "kvq")
        theta = gate("theta", seen["gates"])
        alpha = gate("alpha", made["alpha"])
        eta, erase = gate("eta", made["eta"]), None
        if config.erase == "gate":
            erase = rates.within(memory, 2.0, gate("erase", made["eta"]), alpha)
        eta = rates.within(memory, config.rate_bound, eta, alpha)
        if memory.inertia and memory.rate_law == "token":
            eta = eta * (1.0 - theta)
        k, q = each(_unit)(k), _unit(q)
        v = each(_unit)(v) if config.unit_values else v
        projection, main = memories[:2]
        for i in range(memory.steps):
            kept = alpha if i == 0 else jnp.ones_like(alpha)
            token = Tokens(k[i], v[i], q, eta[i], kept, theta, erase_rate=erase)

            def learn(state, anchor, share, left, token=token):
                rate, left = ration(share * token.eta, left)
                own = token.v if config.targets == "none" else target(anchor, token.v)
                own = own / _norm(token.v) if config.scale_free else own
                given = token._replace(v=own, eta=rate, erase_rate=None)
                return tick(level, state, given)[0], left

            projection, left = jax.vmap(learn)(projection, anchors, head.share, left)
            own = target(main_anchor, token.v) if config.targets == "all" else token.v
            rate, main_left = ration(token.eta, main_left)
            main, y = tick(main_level, main, token._replace(v=own, eta=rate))

        count = count + 1
        refresh = lambda every, new, old: jax.tree.map(  # noqa: E731
            lambda a, b: jnp.where(count % every == 0, a, b), new, old
        )
        left = (
            refresh(config.projection_chunk, jnp.ones_like(left), left),
            refresh(memory.chunk, jnp.ones_like(main_left), main_left),
        )
        after = (
            refresh(config.projection_chunk, projection.params, anchors),
            refresh(memory.chunk, main.params, main_anchor),
        )
        return (Memories(projection, main, after), windows, count, left), y

    start = Memories(
        projection=jax.vmap(lambda weights: begin(level, weights))(head.projection),
        main=begin(main_level, head.main),
        anchors=(head.projection, head.main),
    )
    windows = {name: jnp.zeros_like(kernel) for name, kernel in head.conv.items()}
    left = jnp.ones_like(head.share), jnp.ones((), jnp.float32)
    begun = start, windows, jnp.int32(0), left
    (memories, *_), y = jax.lax.scan(step, begun, seen)
    return memories, y


def _norm(x: Float[Array, " K"]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.vdot(x, x) + 1e-6)


def _unit(x: Float[Array, " K"]) -> Float[Array, " K"]:
    return x / jnp.sqrt(jnp.vdot(x, x) + 1e-6)
