"""Optimizers by name, each an optax transformation on one clock or several."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree

from hope_jax.core.config import did_you_mean
from hope_jax.core.level import Differentiate
from hope_jax.optim import (
    adaptive,
    capture,
    deep,
    generalised,
    groups,
    leaves,
    m3,
    muon,
    shampoo,
    slopes,
)
from hope_jax.optim import dgd as dgd_lib
from hope_jax.optim import momentum as momentum_lib


class Settings(NamedTuple):
    """What a rule may use.

    Attributes:
      rate: `rate(count)`, the schedule.
      weight_decay: decoupled, times the rate.
      b1, b2: the decays.
      options: the rule's own (`hope_jax.optim.options`); None if it has none.
      mesh: of the devices, over which a rule may spread its work; None for one.
      eps_root: under the root of Adam's second moment, whose derivative is infinite
        where all gradients were zero.
    """

    rate: optax.Schedule
    weight_decay: float
    b1: float
    b2: float
    options: Any = None
    mesh: Mesh | None = None
    eps_root: float = 0.0


class Rule(NamedTuple):
    """An optimizer that has a name.

    Attributes:
      make: the transformation that settings describe.
      matrices: whether it moves matrices alone; all else then moves by adamw.
      inputs: what it needs to know of what matrices were multiplied with, if anything:
        the `grams` of inputs, as `update`'s argument `inputs`, or `slopes` in place of
        gradients (`hope_jax.optim.capture`). It then moves the matrices for which there
        are any; see `differentiation`.
    """

    make: Callable[[Settings], optax.GradientTransformation]
    matrices: bool = False
    inputs: Literal["grams", "slopes"] | None = None


def _decayed(direction: optax.GradientTransformation, s: Settings):
    """A direction with decoupled decay (Loshchilov and Hutter, arXiv:1711.05101)."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(s.weight_decay, mask=groups.decays),
        optax.scale_by_learning_rate(s.rate),
    )


def _stepping(rule: optax.GradientTransformation, s: Settings):
    """A rule that has the rate inside, as ours that store steps do; decoupled decay."""
    return optax.chain(
        rule,
        optax.add_decayed_weights(
            lambda count: -s.weight_decay * s.rate(count), mask=groups.decays
        ),
    )


def _adafactor(s: Settings) -> optax.GradientTransformation:
    direction = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return _decayed(direction, s)


def _muon(s: Settings) -> optax.GradientTransformation:
    factor = optax.contrib.scale_by_muon(
        beta=s.b1, weight_dimension_numbers=groups.last_two_axes
    )
    # As large as AdamW's update, so that rates carry over.
    scale = optax.stateless(lambda factors, params: muon.by_shape(factors))
    return _decayed(optax.chain(factor, scale), s)


def _adamuon(s: Settings) -> optax.GradientTransformation:
    direction = muon.scale_by_adamuon(
        decay=s.b1, beta2=s.b2, sign=s.options.sign, mesh=s.mesh
    )
    return _decayed(direction, s)


def _m3(s: Settings) -> optax.GradientTransformation:
    o = s.options
    direction = m3.scale_by_m3(
        periods=o.periods,
        alpha=o.alpha,
        decays=o.decays or (s.b1,) + (0.9,) * (len(o.periods) - 1),
        variant=o.variant,
        beta2=s.b2,
        spread=o.spread,
        mesh=s.mesh,
    )
    return _decayed(direction, s)


def _shampoo(s: Settings) -> optax.GradientTransformation:
    o = s.options
    direction = shampoo.scale_by_shampoo(
        b1=s.b1,
        b2=s.b2,
        frequency=o.frequency,
        root=o.root,
        grafting=o.grafting,
        max_size=o.max_size,
        mesh=s.mesh,
    )
    return _decayed(direction, s)


def _soap(s: Settings) -> optax.GradientTransformation:
    o = s.options
    direction = shampoo.scale_by_soap(
        b1=s.b1,
        b2=s.b2,
        shampoo_beta=o.shampoo_beta,
        frequency=o.frequency,
        max_size=o.max_size,
        mesh=s.mesh,
    )
    return _decayed(direction, s)


def _dgd(s: Settings) -> optax.GradientTransformation:
    rule = dgd_lib.dgd(
        s.rate,
        explicit=s.options.explicit,
        retention=s.options.retention,
        input_axis=-2,
    )
    return _stepping(rule, s)


def _ggd(s: Settings) -> optax.GradientTransformation:
    rule = slopes.descend_slopes(
        s.rate,
        s.options.memory,
        retention=s.options.retention,
        inertia=s.b1,
        input_axis=-2,
    )
    return _stepping(rule, s)


def _momentum(s: Settings) -> optax.GradientTransformation:
    return _stepping(momentum_lib.momentum(s.rate, decay=s.b1), s)


def _delta_momentum(s: Settings) -> optax.GradientTransformation:
    rule = momentum_lib.delta_momentum(
        s.rate, decay=s.b1, form=s.options.form, stability=s.options.stability
    )
    return _stepping(rule, s)


def _preconditioned_momentum(s: Settings) -> optax.GradientTransformation:
    rule = momentum_lib.preconditioned_momentum(
        s.rate, optax.scale_by_rms(decay=s.b2, bias_correction=True), decay=s.b1
    )
    return _stepping(rule, s)


def _feature_map_momentum(s: Settings) -> optax.GradientTransformation:
    feature_map = {"sign": jnp.sign, "tanh": jnp.tanh}[s.options.feature_map]
    rule = momentum_lib.feature_map_momentum(s.rate, feature_map, decay=s.b1)
    return _stepping(rule, s)


def _nonlinear_momentum(s: Settings) -> optax.GradientTransformation:
    rule = momentum_lib.nonlinear_momentum(
        s.rate,
        functools.partial(muon.orthogonalise_tree, mesh=s.mesh),
        decay=s.b1,
        literal=s.options.literal,
    )
    return _stepping(rule, s)


def _deep_momentum(s: Settings) -> optax.GradientTransformation:
    o = s.options
    rule = deep.deep_momentum(
        s.rate,
        decay=s.b1,
        inner_rate=o.inner_rate,
        objective=o.objective,
        target=o.target,
        hidden=o.hidden,
    )
    return _stepping(rule, s)


def _gradient_memory(s: Settings) -> optax.GradientTransformation:
    o = s.options
    rule = generalised.from_memory(
        s.rate,
        o.memory,
        rows=o.rows,
        inner_rate=o.inner_rate,
        retention=s.b1,
        inertia=o.inertia,
    )
    return _stepping(rule, s)


def _adam_memory(s: Settings) -> optax.GradientTransformation:
    o = s.options
    rule = adaptive.adam_memory(
        s.rate, b1=s.b1, b2=s.b2, ridge=o.ridge, target=o.target, literal=o.literal
    )
    return _stepping(rule, s)


def _adagrad_memory(s: Settings) -> optax.GradientTransformation:
    o = s.options
    rule = adaptive.adagrad_memory(
        s.rate, decay=s.b1, form=o.form, ridge=o.ridge, max_width=o.max_width
    )
    return _stepping(rule, s)


def _adam(s: Settings) -> optax.GradientTransformation:
    direction = optax.scale_by_adam(b1=s.b1, b2=s.b2, eps_root=s.eps_root)
    return _decayed(direction, s)


RULES: dict[str, Rule] = {
    "adamw": Rule(_adam),
    "adam": Rule(lambda s: _adam(s._replace(weight_decay=0.0))),
    "sgd": Rule(lambda s: _decayed(optax.identity(), s)),
    "lion": Rule(lambda s: _decayed(optax.scale_by_lion(b1=s.b1, b2=s.b2), s)),
    "adafactor": Rule(_adafactor),
    "muon": Rule(_muon, matrices=True),
    "adamuon": Rule(_adamuon, matrices=True),
    "m3": Rule(_m3, matrices=True),
    "shampoo": Rule(_shampoo, matrices=True),
    "soap": Rule(_soap, matrices=True),
    "dgd": Rule(_dgd, matrices=True, inputs="grams"),
    "ggd": Rule(_ggd, matrices=True, inputs="slopes"),
    "momentum": Rule(_momentum),
    "delta_momentum": Rule(_delta_momentum),
    "preconditioned_momentum": Rule(_preconditioned_momentum),
    "feature_map_momentum": Rule(_feature_map_momentum),
    "nonlinear_momentum": Rule(_nonlinear_momentum, matrices=True),
    "deep_momentum": Rule(_deep_momentum),
    "gradient_memory": Rule(_gradient_memory),
    "adam_memory": Rule(_adam_memory),
    "adagrad_memory": Rule(_adagrad_memory),
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


def rules_of(config: Any) -> dict[groups.Kind, str]:
    """The name of the rule that moves each kind of parameters.

    Args:
      config: see `build`.

    Raises:
      ValueError: names an unknown rule, one for matrices that was given vectors,
        options that no rule reads, or a weight decay for "adam".
    """
    check_name("name", config.name)
    if config.name == "adam" and config.weight_decay:
        raise ValueError(
            f"adam has no weight decay, got weight_decay={config.weight_decay}; set it "
            "to 0 or use adamw."
        )
    default = "adamw" if RULES[config.name].matrices else config.name
    names = {"matrices": config.name}
    for kind in ("embeddings", "convolutions", "others"):
        name = getattr(config, kind)
        if name is not None:
            check_name(kind, name)
        names[kind] = name = default if name is None else name
        if RULES[name].inputs:
            raise ValueError(
                f"{kind}={name!r}: {name} moves matrices whose inputs are known, so it "
                "can only be the name of the whole optimizer."
            )
        if RULES[name].matrices and kind == "others":
            raise ValueError(
                f"others={name!r}: {name} moves matrices, and biases, scales and rates "
                "are none."
            )
    check_options(config, names.values())
    return names


def check_options(config: Any, names: Iterable[str]) -> None:
    """Refuses options of `config` that no rule among `names` reads.

    Raises:
      ValueError: names the options, and the rules there are.
    """
    names = dict.fromkeys(names)
    for name in set(RULES) - set(names):
        options = getattr(config, name, None)
        if options is not None and options != type(options)():
            raise ValueError(
                f"{name} is set to {options}, but moves no parameters: these are moved "
                f"by {', '.join(names)}."
            )


def needs_inputs(config: Any) -> bool:
    """Whether the optimizer of a config needs to know what matrices multiply: `build`
    then needs `layers`, and the step `differentiation`."""
    return RULES[config.name].inputs is not None


def differentiation(
    config: Any, layers: PyTree[Bool] | None, tokens: int
) -> Differentiate | None:
    """How `hope_jax.core.level.hope_update` differentiates for a config's optimizer.

    Args:
      config, layers: of `build`.
      tokens: how many the loss is a mean over.

    Returns:
      What gives gradients, or slopes in their place, and inputs in one backward pass;
      None where the ordinary way will do.
    """
    if RULES[config.name].inputs is None:
        return None
    if RULES[config.name].inputs == "grams":
        return functools.partial(
            capture.value_and_dgd_gradients, layers=layers, has_aux=True
        )
    objective = slopes.objective(getattr(config, config.name).memory)

    def differentiate(loss, params):
        value, found = capture.value_and_slopes(
            loss,
            params,
            objective=objective,
            tokens=tokens,
            layers=layers,
            has_aux=True,
        )
        return value, found, None

    return differentiate


def describe(
    config: Any, params: PyTree, periods: PyTree, layers: PyTree[Bool] | None = None
) -> str:
    """Which parameters `build` gives which rule on which clock, as a Markdown table.

    Args:
      config, periods, layers: of `build`.
      params: arrays or shapes.
    """
    names = groups.names_of(params, rules_of(config), layers=layers)
    return groups.describe(groups.summary(params, names, periods))


def check_name(field: str, name: str) -> None:
    """Refuses a name that no optimizer has; `field` asks for it."""
    if name in RULES:
        return
    raise ValueError(
        f"There is no optimizer {name!r}, which {field} asks for; the names are "
        f"{', '.join(RULES)}.{did_you_mean(name, RULES)}"
    )


def build(
    config: Any,
    *,
    total_steps: int,
    periods: PyTree,
    layers: PyTree[Bool] | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a config describes.

    Parameters are grouped by when they move and by what. Those of one period share the
    clip to a global norm, of the gradients they move by, so that what a slow level
    receives does not depend on the gradients of the faster ones. In a period each kind
    (`groups.kind`) has its rule, with a state of its own, the schedule and decoupled
    decay of matrices (`groups.is_matrix`).

    Args:
      config: `hope_jax.train.config.OptimizerConfig`, or what has its fields.
      total_steps: at which the schedule ends.
      periods: ints, a tree like the parameters: each moves every so many steps.
      layers: bools, a tree like the parameters: the matrices y = x W whose inputs are
        captured. For rules that need them (`needs_inputs`), not read for any other; the
        rest of the matrices move by the rule of `others`.
      mesh: of the devices of a data-parallel program, so that each orthogonalises some
        of the matrices and not all of them.

    Raises:
      ValueError: a config that `rules_of` refuses, or no `layers` where they are
        needed.
    """
    names = rules_of(config)
    if needs_inputs(config) and layers is None:
        raise ValueError(
            f"{config.name} needs layers, the matrices whose inputs are captured: "
            "those of a model are hope_jax.models.capture.dense_kernels(graphdef, "
            "params)."
        )
    if not needs_inputs(config):
        layers = None
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
            mesh=mesh,
        )
        made = {
            name: RULES[name].make(
                settings._replace(options=getattr(config, name, None))
            )
            for name in dict.fromkeys(names.values())
        }
        clip = optax.identity()
        if config.clip_norm is not None:
            clip = optax.clip_by_global_norm(config.clip_norm)
        return optax.chain(clip, groups.by_name(made, choose))

    choose = functools.partial(groups.names_of, names=names, layers=layers)
    given = layers if RULES[config.name].inputs == "grams" else None
    return _promoting(groups.on_clocks(rule, periods, layers=given))


def inner(
    name: str, options: Any, rate: Array | float
) -> optax.GradientTransformationExtraArgs:
    """The rule of a level inside another one's context: no schedule, no decay.

    Args:
      name: of `RULES`.
      options: `hope_jax.optim.options.RuleOptions`, or what has its fields.
      rate: of every move; the level above may differentiate in it.
    """
    settings = Settings(
        rate=lambda count: rate,
        weight_decay=0.0,
        b1=options.b1,
        b2=options.b2,
        options=getattr(options, name, None),
        eps_root=1e-8,
    )
    return _promoting(RULES[name].make(settings))


def _promoting(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`tx` in float32 or wider, with JAX's standard type promotion inside.

    Optax keeps averages in the type of the parameters: in bfloat16 they stand still,
    and in float16 an epsilon of 1e-8 is 0. It also raises floats to the power of its
    integer counts, so a program that asks for strict promotion, as our tests do, could
    not use it.
    """

    def widened(tree):
        return jax.tree.map(leaves.wide, tree)

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return tx.init(widened(params))

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            moved, state = tx.update(widened(updates), state, widened(params), **extra)
        return leaves.like(moved, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def one_clock(params: PyTree) -> PyTree:
    """Periods by which every parameter moves at every step."""
    return jax.tree.map(lambda _: 1, params)
