"""Four choices make a memory: architecture, attentional bias, retention and rule."""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hope_jax.core.clock import Clock
from hope_jax.core.level import Level
from hope_jax.memory import architecture, retention, rule
from hope_jax.memory.architecture import ACTIVATIONS, Architecture
from hope_jax.memory.bias import BIASES


class Tokens(NamedTuple):
    """The context of a memory, for one stream and one head; leaves lead with time, T.

    Attributes:
      k, v, q: key, value and query. Keys and queries of unit norm keep the
        rules stable.
      eta: inner rate, float32.
      alpha: retained fraction in (0, 1], float32.
      theta: inner momentum in [0, 1), float32; ignored without momentum.
    """

    k: Float[Array, "*T K"]
    v: Float[Array, "*T V"]
    q: Float[Array, "*T K"]
    eta: Float[Array, "*T"]
    alpha: Float[Array, "*T"]
    theta: Float[Array, "*T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """An associative memory as independent choices (`l2` with `dgd` is the paper's).

    Attributes:
      architecture: `linear` (a matrix) or `mlp` (residual, two layers).
      bias: `l2` or `dot`.
      momentum: inner momentum, as in Titans.
      dgd: the delta term: on `both` layers (the hidden layer's coefficient corrected
        for the norm of its input), on the `input` layer only, or `none`.
      retention: `decay` by the token's alpha, or `none`.
      gradient: `exact` takes it where the memory stands: then the chunk is a speed
        knob. `anchored` takes it at the chunk's start: then the chunk is part of the
        function, and 1 is the token recurrence. Only linear memories have a fast exact
        form.
      read: the state that answers a query: `post` (after the token's own write), `pre`
        (before it) or `anchor` (at the chunk's start, equation 90).
      chunk: tokens per chunk.
      expansion: hidden width of the mlp over its width.
      activation: of the mlp.
    """

    architecture: Literal["linear", "mlp"] = "mlp"
    bias: Literal["l2", "dot"] = "l2"
    momentum: bool = True
    dgd: Literal["both", "input", "none"] = "both"
    retention: Literal["decay", "none"] = "decay"
    gradient: Literal["anchored", "exact"] = "anchored"
    read: Literal["post", "pre", "anchor"] = "post"
    chunk: int = 16
    expansion: int = 4
    activation: str = "gelu"

    def __post_init__(self):
        choices = {
            "architecture": ("linear", "mlp"),
            "bias": tuple(BIASES),
            "dgd": ("both", "input", "none"),
            "retention": ("decay", "none"),
            "gradient": ("anchored", "exact"),
            "read": ("post", "pre", "anchor"),
            "activation": tuple(ACTIVATIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got "
                    f"{getattr(self, name)!r}."
                )
        for name in ("chunk", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.gradient == "exact" and self.architecture != "linear":
            raise ValueError(
                f"gradient='exact' needs architecture='linear', got "
                f"{self.architecture!r}: a non-linear memory has no chunk form for it. "
                "Use gradient='anchored' with chunk=1 for the token recurrence."
            )
        if self.gradient == "exact" and self.read == "anchor":
            raise ValueError(
                "read='anchor' needs gradient='anchored': an exact memory has no "
                "anchor."
            )


def build_architecture(config: MemoryConfig, width: int) -> Architecture:
    """The memory's function class for keys and values of `width`."""
    if config.architecture == "linear":
        return architecture.linear(width)
    return architecture.mlp(width, config.expansion * width, config.activation)


def delta_rates(config: MemoryConfig, eta: Array, inputs: dict[str, Array]) -> dict:
    """The coefficient b of the delta term for each matrix that has one.

    The key meets the first matrix with unit norm, where the explicit coefficient η is
    stable; the hidden vector has any norm, so the second matrix takes the proximal one.
    """
    if config.dgd == "none":
        return {}
    first = "w" if config.architecture == "linear" else "w2"
    rates = {first: eta}
    if config.dgd == "both" and "w1" in inputs:
        rates["w1"] = rule.corrected_rate(eta, inputs["w1"])
    return rates


def memory_level(config: MemoryConfig, width: int) -> Level:
    """The memory as a `Level` whose context is a stream of `Tokens`.

    `unroll(memory_level(config, width), ...)` is the definition that the chunk-parallel
    kernels are held to, values and pullbacks.
    """
    function = build_architecture(config, width)
    bias = BIASES[config.bias]

    steps = [rule.descend()]
    if config.momentum:
        steps.append(rule.inertia())
    if config.dgd != "none":
        steps.append(
            rule.delta_decay(lambda eta, inputs: delta_rates(config, eta, inputs))
        )
    if config.retention == "decay":
        steps.append(retention.decay())

    return Level(
        init=function.init,
        read=lambda weights, token: function.apply(weights, token.q),
        objective=lambda weights, token: bias(
            function.apply(weights, token.k), token.v
        ),
        flow=optax.chain(*steps),
        clock=Clock(anchor=config.chunk if config.gradient == "anchored" else 1),
        read_at=config.read,
        inputs=lambda weights, token: function.inputs(weights, token.k),
    )


def half_life_to_retention(half_life: Array) -> Array:
    """`α = 2^(−1/h)`: the retained fraction whose powers halve every h tokens."""
    return jnp.exp2(-1.0 / half_life)
