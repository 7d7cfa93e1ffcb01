"""Optimizers by name, each an optax transformation on one clock or several."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import PyTree

from hope_jax.optim import groups
from hope_jax.optim import momentum as momentum_lib


class Settings(NamedTuple):
    """What a rule may use: `rate(count)` is the schedule, `b1`, `b2` the decays."""

    rate: optax.Schedule
    weight_decay: float
    b1: float
    b2: float


def _decayed(direction: optax.GradientTransformation, s: Settings):
    """A direction with decoupled decay (Loshchilov and Hutter, arXiv:1711.05101)."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(s.weight_decay, mask=groups.decays),
        optax.scale_by_learning_rate(s.rate),
    )


def _muon(s: Settings) -> optax.GradientTransformation:
    # Optax's own decay would leave out embeddings, or take in every bias.
    direction = optax.contrib.muon(
        1.0,
        beta=s.b1,
        adam_b1=s.b1,
        adam_b2=s.b2,
        muon_weight_dimension_numbers=groups.muon_dimensions,
        consistent_rms=0.2,  # an update as large as AdamW's, so rates carry over
    )
    return _decayed(optax.chain(direction, optax.scale(-1.0)), s)


def _adafactor(s: Settings) -> optax.GradientTransformation:
    direction = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return _decayed(direction, s)


def _memory(rule: Callable, s: Settings) -> optax.GradientTransformation:
    """One of our own momenta, which store steps, not gradients; decoupled decay."""
    return optax.chain(
        rule(s.rate, decay=s.b1),
        optax.add_decayed_weights(
            lambda count: -s.weight_decay * s.rate(count), mask=groups.decays
        ),
    )


RULES: dict[str, Callable[[Settings], optax.GradientTransformation]] = {
    "adamw": lambda s: _decayed(optax.scale_by_adam(b1=s.b1, b2=s.b2), s),
    "adam": lambda s: _decayed(
        optax.scale_by_adam(b1=s.b1, b2=s.b2), s._replace(weight_decay=0.0)
    ),
    "sgd": lambda s: _decayed(optax.identity(), s),
    "momentum": lambda s: _memory(momentum_lib.momentum, s),
    "delta_momentum": lambda s: _memory(momentum_lib.delta_momentum, s),
    "lion": lambda s: _decayed(optax.scale_by_lion(b1=s.b1, b2=s.b2), s),
    "adafactor": _adafactor,
    "muon": _muon,
}


def schedule(
    learning_rate: float, warmup_steps: int, total_steps: int, final_fraction: float
) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine down to `final_fraction` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(total_steps, warmup_steps + 1),
        end_value=learning_rate * final_fraction,
    )


def build(
    config: Any, *, total_steps: int, periods: PyTree
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a config describes.

    Each group of parameters of one period has its own: clip to a global norm, the named
    rule, decoupled decay of matrices (`groups.is_matrix` says which), the schedule. The
    norm is the group's own, of the gradients it moves by, so that what a slow level
    receives does not depend on the gradients of the faster ones.

    Args:
      config: has `name, learning_rate, warmup_steps, final_fraction, weight_decay,
        clip_norm, b1, b2` (`hope_jax.train.config.OptimizerConfig`).
      total_steps: at which the schedule ends.
      periods: ints, a tree like the parameters: each moves every so many steps.

    Raises:
      ValueError: unknown name, or a weight decay for "adam".
    """
    if config.name not in RULES:
        near = difflib.get_close_matches(config.name, RULES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"There is no optimizer {config.name!r}; the names are {', '.join(RULES)}."
            + hint
        )
    if config.name == "adam" and config.weight_decay:
        raise ValueError(
            f"adam has no weight decay, got weight_decay={config.weight_decay}; set it "
            "to 0 or use adamw."
        )
    rate = schedule(
        config.learning_rate, config.warmup_steps, total_steps, config.final_fraction
    )

    def rule(period: int) -> optax.GradientTransformation:
        # The rule counts its own moves: move `count` comes with step `(count + 1) *
        # period`, counted from 1, so that the first step has a rate already.
        settings = Settings(
            rate=lambda count: rate((count + 1) * period),
            weight_decay=config.weight_decay,
            b1=config.b1,
            b2=config.b2,
        )
        clip = optax.identity()
        if config.clip_norm is not None:
            clip = optax.clip_by_global_norm(config.clip_norm)
        return optax.chain(clip, RULES[config.name](settings))

    return _promoting(groups.on_clocks(rule, periods))


def _promoting(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`tx` with JAX's standard type promotion inside, whatever is set outside.

    Optax raises floats to the power of its integer counts, so a program that asks for
    strict promotion, as our tests do, could not use it.
    """

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return tx.init(params)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def one_clock(params: PyTree) -> PyTree:
    """Periods by which every parameter moves at every step."""
    return jax.tree.map(lambda _: 1, params)
