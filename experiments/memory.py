"""Does Hope's memory remember? Multi-query recall, one switch at a time.

Run:     python -m experiments.memory --group=bisection
         (also: recall, laws, static, forgetting)
Smoke:   add --scale=smoke --out=DIR (a few steps of every row of the group, minutes).
Expect:  experiments/README.md has the tables.
Cost:    half a minute (matrices) to three minutes (MLP memories) a row, seed, rate and
         400 steps on one CPU core. What has a result file is not run again.

The task is that of `experiments.sweep`: six keys and values in 32 tokens of a
vocabulary of 64, then the keys again; a model of width 32, two layers and two heads,
batches of 32, AdamW at its rate with 20 steps of warm-up and a fall to a tenth. Chance
is 1/6 for a model that has seen which values occur in the row.

Groups:
  bisection  from a static MLP memory to the self-modifying layer to the letter of the
             equations, each row with one more switch turned
  recall     Hope with MLP and with matrix memories beside the gated delta rule
  laws       rate law, retention, erasure, momentum and targets around Hope's
             defaults, which are `recall_400_hope` and `recall_400_hope_matrix`
  static     MLP memories with decay as static mixers (Titans), as published and with
             what was learned here
  forgetting  when a fresh memory has forgotten half, in tokens: published memories and
             products of the four choices (what `half_life_start` was chosen by)
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import lab
from hope_jax.evaluate import points, probe
from hope_jax.evaluate.points import GridConfig
from hope_jax.memory.compose import MemoryConfig
from hope_jax.memory.gates import GateConfig
from hope_jax.models.config import ModelConfig
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.memory import MemoryMixerConfig, NamedConfig
from hope_jax.models.mixers.self_modifying import MATRIX, MLP, SelfModifyingConfig
from launch import command

NAME = "memory"
CHUNK = 8
RATES = (1e-2, 3e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model of a table.

    Attributes:
      layer: the mixer: a self-modifying layer, any memory, or a name.
      projections: whether the projection memories learn while they read.
      steps: of training.
      rates: learning rates tried; a table shows the best.
    """

    layer: SelfModifyingConfig | MemoryMixerConfig | str
    projections: bool = True
    steps: int = 400
    rates: tuple[float, ...] = RATES


def _hope(memory: MemoryConfig = MLP, **layer) -> SelfModifyingConfig:
    memory = dataclasses.replace(memory, chunk=CHUNK)
    return SelfModifyingConfig(memory=memory, projection_chunk=CHUNK, **layer)


def _mixer(memory: MemoryConfig, **gates) -> MemoryMixerConfig:
    memory = dataclasses.replace(memory, chunk=CHUNK)
    return MemoryMixerConfig(memory=memory, gates=GateConfig(**gates))


_BEFORE = MemoryConfig(expansion=2, dgd="none", retention="none")  # rates up to 1/chunk
_PLAIN = dict(targets="none", projection_rate=None, scale_free=False)


def _bisection() -> dict[str, Row]:
    """Each row turns one more switch, and keeps those above it."""
    made = {"static": Row(layer=_mixer(_BEFORE), rates=RATES[:1])}
    memory, layer, still = {}, dict(_PLAIN), True
    switches = [
        ("projections_that_do_not_write", {}, {}),
        ("projections_write", {}, {}),
        ("values_read_through_memories", {}, dict(targets="all")),
        ("unit_values", {}, dict(unit_values=True)),
        ("no_silu", {}, dict(conv_activation="none")),
        ("slices_of_x", {}, dict(inputs="slice")),
        ("decay_to_zero", dict(retention="decay"), dict(half_life_start=16.0)),
        ("delta_term", dict(dgd="both"), {}),
    ]
    for name, changed, set_to in switches:
        memory, layer = memory | changed, layer | set_to
        still = name == "projections_that_do_not_write"
        made[name] = Row(
            layer=_hope(dataclasses.replace(_BEFORE, **memory), **layer),
            projections=not still,
            rates=RATES[:1],
        )
    return {f"bisection_{i}_{name}": row for i, (name, row) in enumerate(made.items())}


def _recall() -> dict[str, Row]:
    layers = {
        "gated_delta_net": "gated_delta_net",
        "hope_matrix": _hope(MATRIX),
        "hope": _hope(),
    }
    return {
        f"recall_{steps}_{name}": Row(layer=layer, steps=steps)
        for steps, (name, layer) in itertools.product((400, 1200), layers.items())
    }


def _laws() -> dict[str, Row]:
    """Hope's memories with one choice changed; Hope itself is in `recall`, at 1e-2."""

    def mlp(**changes):
        return _hope(dataclasses.replace(MLP, **changes))

    zero, free = dict(toward="zero"), dict(retention="none", toward="zero")
    rows = {
        "law_energy": mlp(rate_law="energy"),
        "law_budget": mlp(rate_law="budget"),
        "law_chunk": mlp(rate_law="token"),
        "law_non_expansive": mlp(rate_law="non_expansive"),
        "toward_zero": mlp(**zero),
        "no_retention": mlp(**free),
        "delta_erases_all": mlp(dgd="both"),
        "delta_erases_what_was_written": mlp(dgd="both", erases="written"),
        "momentum": mlp(rule="momentum"),
        "momentum_delta_energy": mlp(rule="momentum", dgd="both", rate_law="energy"),
        "half_lives_from_16_tokens": _hope(half_life_start=16.0),
        "half_lives_from_64_tokens": _hope(half_life_start=64.0),
        "matrix_half_lives_from_16_tokens": _hope(MATRIX, half_life_start=16.0),
        "matrix_half_lives_from_64_tokens": _hope(MATRIX, half_life_start=64.0),
        "matrix_toward_zero": _hope(dataclasses.replace(MATRIX, **zero)),
        "matrix_no_retention": _hope(dataclasses.replace(MATRIX, **free)),
        "matrix_without_delta": _hope(dataclasses.replace(MATRIX, dgd="none")),
        "matrix_targets_all": _hope(MATRIX, targets="all"),
        "matrix_projections_take_all": _hope(MATRIX, projection_rate=None),
        "matrix_slices": _hope(MATRIX, inputs="slice"),
        "tanh": mlp(activation="tanh"),
        "targets_all": _hope(targets="all"),
        "targets_none": _hope(targets="none"),
        "projections_take_all": _hope(projection_rate=None),
        "unit_values": _hope(unit_values=True),
        "slices": _hope(inputs="slice"),
        "no_silu": _hope(conv_activation="none"),
    }
    return {f"laws_{n}": Row(layer=v, rates=RATES[:1]) for n, v in rows.items()}


def _static() -> dict[str, Row]:
    titans = MemoryConfig(rule="momentum", dgd="none")
    learned = dict(toward="start", rate_law="output")
    rows = {
        "titans": _mixer(titans),
        "titans_start": _mixer(dataclasses.replace(titans, toward="start")),
        "titans_start_output": _mixer(dataclasses.replace(titans, **learned)),
        "gd_start_output": _mixer(dataclasses.replace(titans, rule="gd", **learned)),
    }
    return {f"static_{n}": Row(layer=v, rates=RATES[:1]) for n, v in rows.items()}


def _forgetting() -> dict[str, Row]:
    plain = dict(dgd="none", bias="l2", retention="decay")
    matrix = dict(architecture="linear", gradient="exact")
    published = ("gated_delta_net", "rwkv7", "titans")
    layers = {name: NamedConfig(kind=name, chunk=CHUNK).layer for name in published} | {
        "matrix_l2_momentum": _mixer(MemoryConfig(rule="momentum", **plain, **matrix)),
        "mlp_l2_gd": _mixer(MemoryConfig(rule="gd", expansion=2, **plain)),
    }
    return {
        f"forgetting_{name}_{tokens}": Row(
            layer=dataclasses.replace(layer, half_life_start=float(tokens)),
            rates=RATES[:1],
        )
        for (name, layer), tokens in itertools.product(
            layers.items(), (16, 64, 256, 1024)
        )
    }


GROUPS = {
    "bisection": _bisection,
    "recall": _recall,
    "laws": _laws,
    "static": _static,
    "forgetting": _forgetting,
}


def settings(row: Row, rate: float, smoke: bool) -> GridConfig:
    base = GridConfig(steps=row.steps)
    optimizer = dataclasses.replace(base.optimizer, learning_rate=rate)
    if not smoke:
        return dataclasses.replace(base, optimizer=optimizer)
    optimizer = dataclasses.replace(optimizer, warmup_steps=1)
    few = {"steps": 2, "batch": 2, "evaluation": 1}
    return dataclasses.replace(base, optimizer=optimizer, **few)


def model(row: Row, config: GridConfig) -> ModelConfig:
    if isinstance(row.layer, str):
        return points.published(config, [row.layer])[0].model
    return probe.model_for(config, row.layer)


def measure(task: lab.Task) -> dict[str, float]:
    """Accuracy and loss at every rate; a run that diverged has accuracy 0 and says at
    which step."""
    row, smoke = task.config, task.flags.scale == "smoke"
    made: dict[str, float] = {}
    for rate in row.rates[: 1 if smoke else None]:
        config = settings(row, rate, smoke)
        learn: Any = True
        if not row.projections:
            learn = Learning(projections=False)
        done = probe.train(config, model(row, config), task.seed, learn=learn)
        at = f"_at_{rate:g}"
        if done["accuracy"] is None:
            made |= {f"accuracy{at}": 0.0, f"diverged_by{at}": float(done["steps"])}
        else:
            made |= {f"accuracy{at}": done["accuracy"], f"loss{at}": done["loss"]}
        made[f"seconds{at}"] = round(done["seconds"], 1)
    best = max(v for k, v in made.items() if k.startswith("accuracy"))
    return {"accuracy": best} | made


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """What there is of each group, in the order of its rows."""
    parts = []
    for group, rows in GROUPS.items():
        lines = []
        for row in rows():
            of = lab.values(found, row, "accuracy")
            each = ", ".join(f"{share:.3f}" for share in of.values())
            if of:
                name = row.removeprefix(f"{group}_")
                lines.append([name, each, f"{np.mean([*of.values()]):.3f}"])
        if lines:
            parts.append(lab.table([group, "by seed", "mean"], lines, words=2))
    return "\n\n".join(parts)


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """Recall after 1,200 steps."""
    names = {"hope": "Hope", "gated_delta_net": "the gated delta rule"}
    return [
        line
        for row, said in names.items()
        for line in lab.compared(
            f"Recall of six pairs in 32 tokens, {said}",
            lab.values(found, f"recall_1200_{row}", "accuracy"),
            command=f"{NAME} --group=recall",
        )
    ]


def _define(define) -> None:
    define.enum("group", None, tuple(GROUPS), "whose rows", required=True)


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=lambda flags: GROUPS[flags.group](),
    measure=measure,
    table=table,
    seeds=(0, 1, 2),
    define=_define,
)

if __name__ == "__main__":
    command.run(main)
