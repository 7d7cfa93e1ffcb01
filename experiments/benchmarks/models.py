"""Whole models: compiling, training, reading and writing, beside an older commit.

Run:     git worktree add ../before COMMIT
         python -m experiments.benchmarks.models --before=../before
         (some cases: --only="decode; 1 row", to a file of their own, models_part)
Smoke:   add --quick (small sizes, minutes to compile); a test times one case.
Goal:    of the commit before, compiling at most 0.6, a decoded token at most a third;
         a Hope training step at most 3.8 times its twin's, a token twice.
Expect:  experiments/results/benchmarks/models-1-x-cpu.json, beside 1c85765: training
         1.75 times as fast in turns of two rows, a decoded token in 0.32; 3.9 of the
         twin's training step (2.7 of its step with all rows at once), 1.15 of its
         token; in models_part-1-x-cpu.json compiling takes 0.95 and 0.87 of its time,
         and the layer alone is 1.19 and, training, 1.02 times as fast.
Cost:    half an hour of one CPU core, most of it to compile.

Each checkout has a worker of its own, with the same packages, and all are timed in
interleaved rounds. What comes out of each is printed, for a checkout that has changed a
default says otherwise. Seconds are CPU seconds of all threads; in the file they are per
second, so that more is better.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import lab
from experiments.benchmarks import timing
from experiments.benchmarks.worker import Worker, WorkerError
from hope_jax.train.metrics import write_benchmark
from launch import command

_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program, asked of every checkout that is said.

    Attributes:
      name: in the table.
      spec: as `model_programs` has it.
      rounds: interleaved rounds.
      twin: a model of the same size without levels, timed in this checkout; or None. It
        trains with all rows at once and in turns, each against the model.
    """

    name: str
    spec: dict[str, Any]
    rounds: int
    twin: str | None = None

    @property
    def tokens(self) -> int:
        """Of one call; 1 for a compilation."""
        if self.spec["task"] == "compile":
            return 1
        return self.spec["rows"] * self.spec["T"]

    @property
    def metric(self) -> str:
        what = "compilations" if self.spec["task"] == "compile" else "tokens"
        return f"{what} per CPU second"


def cases(quick: bool) -> list[Case]:
    """What is timed."""

    def case(name, model, task, rows, length, rounds, twin=None, turns=1, **changes):
        spec = {"model": model, "task": task, "rows": rows, "T": length, "turns": turns}
        return Case(name=name, spec=spec | {"set": changes}, rounds=rounds, twin=twin)

    hope, twin, slim = "hope_tiny", "transformer_tiny", {"d_model": 64}
    wide = {"d_model": 256}
    if quick:
        small = {"d_model": 32, "heads": 1, "vocab": 64, "layers": 1}
        return [
            case("decode", hope, "decode", 1, 4, 2, twin, **small),
            case("training", hope, "training", 2, 8, 2, twin, turns=2, **small),
            case("layer", hope, "layer training", 1, 4, 2, **small),
        ]
    return [
        case("compile, T 256", hope, "compile", 2, 256, 3),
        case("compile, T 1024, two fast clocks", hope, "compile", 2, 1024, 3),
        case("training, 8 rows of 256", hope, "training", 8, 256, 5, twin, turns=4),
        case("training, 8 rows of 256 at once", hope, "training", 8, 256, 5),
        case("width 64, 64 rows of 64", hope, "training", 64, 64, 5, turns=16, **slim),
        case("width 64, 64 rows of 64 at once", hope, "training", 64, 64, 5, **slim),
        case("forward, 2 rows of 512", hope, "forward", 2, 512, 5, twin),
        case("decode, 1 row", hope, "decode", 1, 256, 5, twin),
        case("decode, 64 rows", hope, "decode", 64, 64, 3, twin),
        case("layer, forward, T 512", hope, "layer", 1, 512, 7, **wide),
        case("layer, training, T 512", hope, "layer training", 1, 512, 7, **wide),
    ]


def run(
    wanted: Sequence[Case], before: str | None, report: Callable[[str], Any] = print
) -> list[dict[str, Any]]:
    """Times everything and returns the workloads of a benchmark file."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case in wanted:
            workers = {"now": _worker(Path(__file__).parents[2])}
            try:
                if before is not None:
                    workers["before"] = _worker(Path(before).resolve())
                if case.twin is not None:
                    workers["twin"] = _worker(Path(__file__).parents[2])
                    if case.spec["turns"] > 1:  # whichever is faster is its speed
                        workers["twin at once"] = _worker(Path(__file__).parents[2])
                found += _timed(case, workers, Path(folder), report)
            except WorkerError as error:
                report(f"{case.name}: not timed: {error}")
            finally:
                for worker in workers.values():
                    worker.close()
    return found


def _worker(checkout: Path) -> Worker:
    """A worker that imports `hope_jax` from a checkout, and its programs from here."""
    path = os.pathsep.join([str(checkout), str(_HERE)])
    return Worker(
        "model_programs",
        cores=sorted(os.sched_getaffinity(0)),
        environment={"PYTHONPATH": path},
    )


def _timed(case, workers, folder, report):
    outputs = {}
    for name, worker in workers.items():
        spec = case.spec | ({"model": case.twin} if "twin" in name else {})
        if name == "twin at once":
            spec = spec | {"turns": 1}
        file = folder / f"{name}.npz"
        worker.ask("build", name="program", spec=spec, outputs=str(file))
        with np.load(file) as arrays:
            outputs[name] = dict(arrays)
        report(f"{case.name}, {name}: {_said(outputs[name])}")
    times = timing.interleave(
        workers,
        case.rounds,
        lambda worker, calls: worker.measure("program", calls),
    )
    per = {name: [case.tokens / t for t in of.cpu] for name, of in times.items()}
    found = [
        timing.workload(
            f"{case.name}, against {name}", case.metric, per["now"], per[name]
        )
        for name in per
        if name != "now"
    ]
    for name in outputs:
        for what in ("lines", "products"):
            if name != "now" and what in outputs[name]:
                ours, theirs = (1.0 / outputs[n][what] for n in ("now", name))
                found.append(
                    timing.workload(
                        f"{case.name}, {what} of its program, against {name}",
                        "one over their number",
                        [float(ours)],
                        [float(theirs)],
                    )
                )
    return found


def _said(outputs: dict[str, np.ndarray]) -> str:
    """What came out, in a few numbers."""
    return ", ".join(
        f"{name} {np.asarray(a, np.float64).mean():.6g}" for name, a in outputs.items()
    )


def _define(define) -> None:
    define.string("before", None, "another checkout, whose programs are timed too")
    define.bool("quick", False, "small sizes")
    define.list("only", [], "cases by name, with semicolons for commas; all by default")
    define.string("out", str(lab.RESULTS), "folder of the results")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the ratios and writes the file."""
    flags = command.parse(__doc__, _define, arguments)
    wanted = cases(flags.quick)
    with command.fail_in_words():
        if flags.before is not None and not Path(flags.before, "hope_jax").is_dir():
            raise ValueError(f"before ({flags.before}) is no checkout of this project.")
        names = {case.name.replace(",", ";"): case for case in wanted}
        wanted = [names[n] for n in lab.chosen(list(names), flags.only, "only", "case")]
    workloads = run(wanted, flags.before)
    print(timing.table(workloads))
    name = "models_part" if flags.only else "models"
    print(write_benchmark(flags.out, name=name, workloads=workloads))


if __name__ == "__main__":
    command.run(main)
