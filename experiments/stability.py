"""Does the quickstart's Hope train at three rates and three seeds, without a NaN?

Run:     python -m experiments.stability --workdir=DIR  (some rows: --rows=rate_0.004)
Smoke:   add --scale=smoke --out=DIR (two steps on bytes, a minute a row).
Expect:  experiments/README.md has the table.
Cost:    five to ten minutes a training, nine in all, on one CPU core. What has a result
         file is not run again, and a training that was stopped goes on.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import lab, quickstart
from hope_jax.train import loop
from hope_jax.train.config import RunConfig
from launch import command

NAME = "stability"
RATES = (2e-3, 4e-3, 8e-3)


def rows(scale: str) -> dict[str, RunConfig]:
    """Hope's row of the quickstart at each rate, of seed 0."""
    hope = quickstart.rows(scale)["hope"]
    return {
        f"rate_{rate:g}": dataclasses.replace(
            hope,
            experiment=NAME,
            row=f"rate_{rate:g}",
            optimizer=dataclasses.replace(hope.optimizer, learning_rate=rate),
        )
        for rate in RATES
    }


def measure(task: lab.Task) -> dict[str, float]:
    """Trains what is not trained yet; a training that diverged has `finite` 0."""
    config, folder = task.config, Path(task.flags.workdir) / f"{task.row}-s{task.seed}"
    try:
        log = lab.trained(config, folder)
    except loop.NonFinite as error:
        print(error)
        return {"finite": 0.0}
    return {
        "finite": 1.0,
        "training bits per byte": lab.training_bits(log, config.train.steps),
        "largest gradient": max(line["grad_norm"] for line in log),
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """What there is, as Markdown."""
    lines = []
    for row, of in itertools.groupby(found, key=lambda result: result["row"]):
        all_ = [result["metrics"] for result in of]
        each = [
            f"{m['training bits per byte']:.3f}" if m["finite"] else "not finite"
            for m in all_
        ]
        largest = max(m.get("largest gradient", 0.0) for m in all_)
        lines.append([row.removeprefix("rate_"), ", ".join(each), f"{largest:.1f}"])
    columns = ["rate", "bits per byte of training rows, by seed", "largest gradient"]
    return lab.table(columns, lines, words=2)


def _define(define) -> None:
    define.string("workdir", None, "folder of the trainings", required=True)


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=lambda flags: rows(flags.scale),
    measure=measure,
    table=table,
    seeds=(0, 1, 2),
    define=_define,
)

if __name__ == "__main__":
    command.run(main)
