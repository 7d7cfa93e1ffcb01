"""Does the quickstart's Hope train at three rates and three seeds, without a NaN?

Run:     python -m experiments.stability --workdir=DIR  (some rows: --rows=rate_0.004)
Smoke:   add --scale=smoke --out=DIR (two steps on bytes, a minute a row).
Expect:  experiments/README.md has the table.
Cost:    five to ten minutes a training, nine in all, on one CPU core. What has a result
         file is not run again, and a training that was stopped goes on.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import quickstart
from hope_jax.train import loop, metrics
from hope_jax.train.config import RunConfig
from launch.evaluate import quiet_libraries

RESULTS = Path(__file__).parent / "results"
NAME = "stability"
RATES = (2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
LAST = 50  # steps whose loss is the training loss


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


def measure(config: RunConfig, folder: Path) -> dict[str, float]:
    """Trains what is not trained yet; a training that diverged has `finite` 0."""
    try:
        outcome = loop.train(config, folder, resume=True)
    except loop.NonFinite as error:
        print(error)
        return {"finite": 0.0}
    if not outcome.finished:
        raise SystemExit(128 + outcome.stopped_by)
    log = metrics.read_log(folder / "metrics.jsonl")
    last = [line for line in log if line["step"] > config.train.steps - LAST]
    return {
        "finite": 1.0,
        "training bits per byte": float(np.mean([v["bits_per_byte"] for v in last])),
        "largest gradient": max(line["grad_norm"] for line in log),
    }


def table(results: Path) -> str:
    """What there is, as Markdown."""
    lines = ["| rate | bits per byte of training rows, by seed | largest gradient |"]
    lines.append("|---|---|---:|")
    for rate in RATES:
        files = sorted((results / NAME).glob(f"rate_{rate:g}-s*.json"))
        found = [metrics.read_result(file)["metrics"] for file in files]
        each = [
            f"{f['training bits per byte']:.3f}" if f["finite"] else "not finite"
            for f in found
        ]
        largest = max((f.get("largest gradient", 0.0) for f in found), default=0.0)
        if found:
            lines.append(f"| {rate:g} | {', '.join(each)} | {largest:.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> str:
    """Trains what has no result yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="folder of the trainings")
    parser.add_argument("--rows", default="", help="some rows, separated by commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--scale", choices=tuple(quickstart.TRAIN), default="full")
    parser.add_argument("--out", help="folder of the results; of a smoke run: needed")
    flags = parser.parse_args(arguments)
    if flags.scale == "smoke" and not flags.out:
        parser.error("--scale=smoke needs --out: its numbers are no results.")
    configs, wanted = rows(flags.scale), [r for r in flags.rows.split(",") if r]
    for name in wanted:
        if name not in configs:
            parser.error(f"--rows: no row {name!r}; there are {', '.join(configs)}.")
    quiet_libraries()
    results = Path(flags.out or RESULTS)
    for seed in map(int, flags.seeds.split(",")):
        for name in wanted or configs:
            if (results / NAME / f"{name}-s{seed}.json").exists():
                continue
            config = dataclasses.replace(configs[name], seed=seed)
            metrics.write_result(
                os.fspath(results),
                experiment=NAME,
                row=name,
                scale=flags.scale,
                seed=seed,
                config=config,
                metrics=measure(config, Path(flags.workdir) / f"{name}-s{seed}"),
            )
    made = table(results)
    print(made)
    return made


if __name__ == "__main__":
    main()
