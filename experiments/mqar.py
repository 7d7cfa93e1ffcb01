"""MQAR: how much state does recall need? Zoology's task, all memories of the registry.

Run:     python -m experiments.mqar  (some rows: --rows=64x4_hope,64x4_attention)
         python -m experiments.mqar --group=longer  (or named)
Smoke:   add --scale=smoke --out=DIR.
Expect:  experiments/README.md has the table and the picture.
Cost:    not known in full: a row says what its steps took (`seconds_at_`).

Keys and values, then questions among zeros (`data.synthetic.recall`, its draws as in
Zoology's code), of a vocabulary of 8,192: figure 2 of arXiv:2312.04927. Two layers of
width 64, two heads, an MLP of 64, AdamW, as many tokens a step at every point. The
learning rates are tried in turn, up to one with which the task is learned: 20 steps in
a row have a loss of at most 0.05 nats on rows that are new. Zoology reads 100,000 rows
64 times at each of four rates, or until 0.99 are right; `rows` of a result over
6,400,000 is the share of that budget. Bytes of state are those of one row at the end of
it; attention's grow with the row.

Groups:
  main    eight models at the first two points, in the order of what they tell
  longer  the same at the other two
  named   all other memories that have a name, at the first point
  all     the three together, in one table and picture
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from experiments import lab
from experiments.table5_formal_languages import Row
from hope_jax.data.synthetic.recall import RecallConfig
from hope_jax.evaluate import probe
from hope_jax.evaluate.probe import ProbeConfig
from hope_jax.memory import named
from hope_jax.models import lm
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.self_modifying import MATRIX, MLP, SelfModifyingConfig
from hope_jax.plot import COLOURS, Figure
from hope_jax.train.config import OptimizerConfig
from launch import command

NAME = "mqar"
POINTS = ((64, 4), (128, 8), (256, 16), (512, 64))  # tokens of a row, pairs
TOKENS = 4096  # of a step
RATES = (6e-3, 2e-3)
PROBE = ProbeConfig(
    d_model=64,
    layers=2,
    heads=2,
    hidden=64,
    optimizer=OptimizerConfig(warmup_steps=20, weight_decay=0.0),
    steps=3000,
    enough=0.05,
)
MODELS: dict[str, Any] = {
    "attention": MIXERS.get("attention"),
    "gated_delta_net": MIXERS.get("gated_delta_net"),
    "hope_matrix": SelfModifyingConfig(memory=MATRIX),
    "hope": SelfModifyingConfig(memory=dataclasses.replace(MLP, expansion=2)),
    "titans": MIXERS.get("titans"),
    "rwkv7": MIXERS.get("rwkv7"),
    "mamba2": MIXERS.get("mamba2"),
    "linear_attention": MIXERS.get("linear_attention"),
}
OTHERS = {n: MIXERS.get(n) for n in named.memories() if n not in MODELS}
SHOWN = ("hope", "hope_matrix", "gated_delta_net", "attention")  # on the first page
GROUPS = {
    "main": (POINTS[:2], MODELS),
    "longer": (POINTS[2:], MODELS),
    "named": (POINTS[:1], OTHERS),
}


def rows(flags: Any) -> dict[str, Row]:
    groups = GROUPS.values() if flags.group == "all" else [GROUPS[flags.group]]
    cells = (itertools.product(points, models.items()) for points, models in groups)
    made = {}
    for (length, pairs), (name, mixer) in itertools.chain(*cells):
        task = RecallConfig(pairs=pairs, length=length, ordered=True)
        config = dataclasses.replace(PROBE, task=task, batch=TOKENS // length)
        if flags.scale == "smoke":
            task = RecallConfig(vocab=32, pairs=2, length=8, ordered=True)
            few = {"steps": 2, "batch": 2, "evaluation": 1, "d_model": 8, "hidden": 8}
            optimizer = dataclasses.replace(PROBE.optimizer, warmup_steps=1)
            config = dataclasses.replace(PROBE, task=task, optimizer=optimizer, **few)
        rates = RATES[: 1 if flags.scale == "smoke" else None]
        made[f"{length}x{pairs}_{name}"] = Row(mixer=mixer, probe=config, rates=rates)
    return made


def measure(task: lab.Task) -> dict[str, float]:
    row = task.config
    model = probe.model_for(row.probe, row.mixer)
    return {
        "state_bytes": float(lm.state_bytes(model)["all"]),
        "parameters": float(lm.count_parameters(model)),
        **probe.tuned(row.probe, model, task.seed, row.rates),
    }


def _by_point(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list]]:
    """Point -> model -> metrics of its seeds."""
    made: dict[str, dict[str, list]] = {}
    for result in found:
        point, _, model = result["row"].partition("_")
        made.setdefault(point, {}).setdefault(model, []).append(result["metrics"])
    return dict(sorted(made.items(), key=lambda at: int(at[0].partition("x")[0])))


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A line a model, by bytes of state at the first point; of each point these, and of
    seeds accuracy, mean ± standard deviation (the best), and the mean of rows read."""
    points = _by_point(found)
    columns = ["model"]
    for point in points:
        columns += [f"{point}: state, bytes", "accuracy", "rows read"]
    lines = []
    size = {  # at the first point that has it
        model: of[model][0]["state_bytes"]
        for of in reversed(points.values())
        for model in of
    }
    for model in sorted(size, key=lambda model: (size[model], model)):
        cells = []
        for of in points.values():
            if model not in of:
                cells += ["", "", ""]
                continue
            state, read = (
                f"{np.mean([metrics[name] for metrics in of[model]]):,.0f}"
                for name in ("state_bytes", "rows")
            )
            right = dict(enumerate(metrics["accuracy"] for metrics in of[model]))
            cells += [state, lab.cell(right), read]
        lines.append([model, *cells])
    return lab.table(columns, lines)


def draw(found: Sequence[Mapping[str, Any]]) -> Figure:
    """Over bytes of state accuracy and, below, rows read: means of seeds, a column a
    point. Orange are the best of all with no more state."""
    points = _by_point(found)
    figure = Figure(figsize=(4.8 * len(points), 6.8), layout="constrained")
    panels = figure.subplots(2, len(points), squeeze=False, sharex="col")
    for (above, below), (point, models) in zip(panels.T, points.items(), strict=True):
        seen = []  # bytes, accuracy, rows and name
        for name, of in models.items():
            means = (
                np.mean([metrics[what] for metrics in of])
                for what in ("state_bytes", "accuracy", "rows")
            )
            seen.append((*map(float, means), name.replace("_", " ")))
        best = 0.0
        for size, right, read, _ in sorted(seen, key=lambda at: (at[0], -at[1])):
            colour = COLOURS[1] if right > best else COLOURS[0]
            best = max(best, right)
            above.scatter(size, right, color=colour, s=18)
            below.scatter(size, read, color=colour, s=18)
        above.set_ylim(-0.03, 1.4)  # room for names
        above.set_yticks(np.linspace(0.0, 1.0, 6))
        below.set_yscale("log")
        below.set_ylim(min(at[2] for at in seen) / 1.5, max(at[2] for at in seen) * 1.5)
        for size in sorted({at[0] for at in seen}):
            alike = [at for at in seen if at[0] == size]
            _name(above, size, [(right, name) for _, right, _, name in alike], 40)
            _name(below, size, [(read, name) for _, _, read, name in alike])
        length, pairs = point.split("x")
        above.set_title(f"{pairs} pairs in {length} tokens", loc="left")
        below.set_xscale("log")
        sizes = [at[0] for at in seen]
        below.set_xlim(min(sizes) / 1.3, max(sizes) * 2.6)  # names stand to the right
        below.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        below.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        for axis in (below.xaxis, below.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value / 1000:g}")
            axis.set_minor_formatter(NullFormatter())
        below.set_xlabel("thousand bytes of state a row")
    panels[0, 0].set_ylabel("accuracy")
    panels[1, 0].set_ylabel("thousand rows read")
    return figure


def _name(
    axes: Axes, size: float, dots: list[tuple[float, str]], rotation: float = 0.0
) -> None:
    """Names of dots above each other, apart enough to be read; more than three that lie
    on each other are counted."""
    low, high = axes.get_ylim()
    scale = np.log10 if axes.get_yscale() == "log" else np.asarray
    tall = 190.0  # points of a panel, about

    def height(value):
        return float((scale(value) - scale(low)) / (scale(high) - scale(low))) * tall

    near: list[list[tuple[float, str]]] = []
    for dot in sorted(dots):
        if near and height(dot[0]) - height(near[-1][-1][0]) < 4:
            near[-1].append(dot)
        else:
            near.append([dot])
    free = -np.inf
    for group in near:
        names = [name for _, name in group]
        lines = names if len(names) <= 3 else [f"{len(names)} memories"]
        for line in lines:
            at = max(height(group[0][0]), free)
            free = at + 8
            shift = (5, at - height(group[0][0]) - 2)
            where = (size, group[0][0])
            how = {"textcoords": "offset points", "size": 7, "rotation": rotation}
            axes.annotate(line, where, shift, **how)


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """Of Hope and two others, at the points that were run."""
    lines = []
    for model in SHOWN:
        points = {
            f"{pairs} in {length}": lab.compared(
                "", lab.values(found, f"{length}x{pairs}_{model}", "accuracy")
            )
            for length, pairs in POINTS
        }
        lines += lab.abreast(f"MQAR, accuracy by pairs and tokens, {model}", points)
    return lines


def _define(define) -> None:
    define.enum("group", "main", (*GROUPS, "all"), "whose rows")


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=rows,
    measure=measure,
    table=table,
    seeds=(0, 1, 2),
    define=_define,
    draw=draw,
)

if __name__ == "__main__":
    command.run(main)
