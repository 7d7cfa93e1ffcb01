"""The optimizer of a run: rules for kinds of parameters, on one clock or several."""

import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from hope_jax.core.level import Differentiate
from hope_jax.optim import capture, groups, leaves, slopes
from hope_jax.optim.rule import Rule, Settings
from hope_jax.optim.rules import RULES


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


def rules_of(config: Any) -> dict[groups.Kind, Rule]:
    """The rule that moves each kind of parameters.

    Args:
      config: see `build`.

    Raises:
      ValueError: names what is no rule, a rule for matrices that was given vectors, or
        a weight decay for "adam".
    """
    main = _known("rule", config.rule)
    if main.kind == "adam" and config.weight_decay:
        raise ValueError(
            f"adam has no weight decay, got weight_decay={config.weight_decay}; set it "
            "to 0 or use adamw."
        )
    default = RULES.get("adamw") if main.matrices else main
    rules: dict[groups.Kind, Rule] = {"matrices": main}
    for kind in ("embeddings", "convolutions", "others"):
        given = getattr(config, kind)
        rules[kind] = rule = default if given is None else _known(kind, given)
        if rule.inputs:
            raise ValueError(
                f"{kind}={rule.kind!r}: {rule.kind} moves matrices whose inputs are "
                "known, so it can only be the rule of the whole optimizer."
            )
        if rule.matrices and kind == "others":
            raise ValueError(
                f"others={rule.kind!r}: {rule.kind} moves matrices, and biases, scales "
                "and rates are none."
            )
    return rules


def _known(field: str, rule: Any) -> Rule:
    rule = RULES.of(rule, field)
    if not isinstance(rule, Rule):
        raise ValueError(
            f"{field} must be the name or the config of an optimizer, got {rule!r}."
        )
    return rule


def labelled(rules: dict[groups.Kind, Rule]) -> dict[groups.Kind, str]:
    """A name for the rule of each kind: the same for the same rule, and no other.

    They become names in a checkpoint.

    >>> labelled(dict(matrices=RULES.get("m3"), others=RULES.get("adamw")))
    {'matrices': 'm3', 'others': 'adamw'}
    """
    names: dict[groups.Kind, str] = {}
    for kind, rule in rules.items():
        same = (names[other] for other in names if rules[other] == rule)
        taken = rule.kind in names.values()
        names[kind] = next(same, f"{rule.kind}_{kind}" if taken else rule.kind)
    return names


def needs_inputs(config: Any) -> bool:
    """Whether the optimizer of a config needs to know what matrices multiply: `build`
    then needs `layers`, and the step `differentiation`."""
    return config.rule.inputs is not None


def differentiation(
    config: Any, layers: PyTree[bool] | None, tokens: int
) -> Differentiate | None:
    """How `hope_jax.core.level.hope_update` differentiates for a config's optimizer.

    Args:
      config, layers: of `build`.
      tokens: how many the loss is a mean over.

    Returns:
      What gives gradients, or slopes in their place, and inputs in one backward pass;
      None where the ordinary way will do.
    """
    if config.rule.inputs is None:
        return None
    if config.rule.inputs == "grams":
        return functools.partial(
            capture.value_and_dgd_gradients, layers=layers, has_aux=True
        )
    objective = slopes.objective(config.rule.memory)

    def differentiate(loss, params, *given):
        value, found = capture.value_and_slopes(
            loss,
            params,
            *given,
            objective=objective,
            tokens=tokens,
            layers=layers,
            has_aux=True,
        )
        return value, found, None

    return differentiate


def describe(
    config: Any, params: PyTree, periods: PyTree, layers: PyTree[bool] | None = None
) -> str:
    """Which parameters `build` gives which rule on which clock, as a Markdown table.

    Args:
      config, periods, layers: of `build`.
      params: arrays or shapes.
    """
    names = groups.names_of(params, labelled(rules_of(config)), layers=layers)
    return groups.describe(groups.summary(params, names, periods))


def build(
    config: Any,
    *,
    total_steps: int,
    periods: PyTree,
    layers: PyTree[bool] | None = None,
    mesh: Mesh | None = None,
    peak: Float[Array, ""] | None = None,
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
      peak: the highest learning rate, in place of the config's: it may be traced, so
        that one program serves all rates that are tried.

    Raises:
      ValueError: a config that `rules_of` refuses, no `layers` where they are needed,
        or (of the transformation's `init`) a rule for matrices and no matrix.
    """
    rules = rules_of(config)
    names = labelled(rules)
    if needs_inputs(config) and layers is None:
        raise ValueError(
            f"{config.rule.kind} needs layers, the matrices whose inputs are captured: "
            "those of a model are hope_jax.models.capture.dense_kernels(graphdef, "
            "params)."
        )
    if not needs_inputs(config):
        layers = None
    highest = config.learning_rate if peak is None else 1.0
    shape = schedule(highest, config.warmup_steps, total_steps, config.final_fraction)
    rate = shape if peak is None else lambda count: peak * shape(count)

    def rule(period: int) -> optax.GradientTransformation:
        # The rule counts its own moves: move `count` comes with step `(count + 1) *
        # period`, counted from 1, so that the first step has a rate already.
        settings = Settings(
            rate=lambda count: rate((count + 1) * period),
            weight_decay=config.weight_decay,
            mesh=mesh,
        )
        made = {names[kind]: rule.make(settings) for kind, rule in rules.items()}
        clip = optax.identity()
        if config.clip_norm is not None:
            clip = optax.clip_by_global_norm(config.clip_norm)
        return optax.chain(clip, groups.by_name(made, choose))

    choose = functools.partial(groups.names_of, names=names, layers=layers)
    given = layers if config.rule.inputs == "grams" else None
    tx = _promoting(groups.on_clocks(rule, periods, layers=given))

    def init(params):
        paths = jax.tree_util.tree_leaves_with_path(params)
        if config.rule.matrices and "matrices" not in (groups.kind(*p) for p in paths):
            found = ", ".join(".".join(groups.path_names(path)) for path, _ in paths)
            raise ValueError(
                f"No matrix was found for {config.rule.kind} among {found}: here a "
                "matrix is called `kernel`. For other trees there is "
                "hope_jax.optim.with_adamw."
            )
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def inner(rule: Rule, rate: Array | float) -> optax.GradientTransformationExtraArgs:
    """The rule of a level inside another one's context: no schedule, no decay.

    Args:
      rule: of `RULES`.
      rate: of every move; the level above may differentiate in it.
    """
    settings = Settings(rate=lambda count: rate, weight_decay=0.0, eps_root=1e-8)
    return _promoting(rule.make(settings))


def _promoting(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`tx` in float32 or wider, with JAX's standard type promotion inside.

    Optax keeps averages in the type of the parameters: in bfloat16 they stand still,
    and in float16 an epsilon of 1e-8 is 0. It also raises floats to the power of its
    integer counts, so a program that asks for strict promotion, as our tests do, could
    not use it.
    """

    tx = optax.with_extra_args_support(tx)

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
