"""Trains a small Hope and its Transformer++ twin, scores both, draws what came of it.

    bash launch/quickstart.sh      or, in an environment that has hope_jax:
    python -m launch.quickstart

Everything is kept under --workdir (default: runs/quickstart):

    <row>/          a run of launch.train: config, tokenizer, metrics, checkpoints
    <row>/evaluation.json
    loss.png        bits per byte while training, against gzip and xz
    levels.png      the levels of Hope, their clocks and what passes between them
    results.json    the numbers of the table

A second start reuses all of it: what is finished is not done again, and a training that
was stopped goes on where it stood.
"""

import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments import quickstart as experiment
from hope_jax import plot
from hope_jax.core import config as config_lib
from hope_jax.data import prepared, text
from hope_jax.evaluate import language_model
from hope_jax.models import lm, systems
from hope_jax.stream.reader import open_checkpoint
from hope_jax.train import checkpoint, lock, loop, metrics
from hope_jax.train.config import RunConfig
from hope_jax.train.folder import check_folder
from launch import command

NAMES = {"hope": "Hope", "transformer": "Transformer++"}
EVALUATION = "evaluation.json"
RESULTS = "results.json"
SECONDS = "seconds.json"
ROWS = 2  # documents read side by side: few, so that a carried memory reads far


class Stopped(Exception):
    """A training was ended by a signal, and saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def _define(define) -> None:
    define.string("workdir", "runs/quickstart", "where all is kept")
    define.string(
        "data", None, "a file, a folder or a glob; else the Python standard library"
    )
    define.enum("scale", "full", list(experiment.TRAIN), "how much")


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what is not done yet, and prints the table."""
    options = command.parse(__doc__, _define, arguments)
    console = Console(highlight=False)
    command.quiet_libraries()
    try:
        run(options.workdir, scale=options.scale, data=options.data, console=console)
    except Stopped as stopped:
        console.print(f"{stopped}; start the same command again to go on.")
        sys.exit(128 + stopped.number)
    except checkpoint.ConfigMismatch as error:
        command.fail(
            f"{error}\n{options.workdir} holds a quickstart of other settings or"
            " data. Remove that folder, or give another --workdir."
        )
    except Exception as error:
        said = command.in_words(error)
        if said is None:
            raise
        command.fail(said, command.status_of(error))


def run(
    workdir: str, *, scale: str, data: str | None, console: Console
) -> dict[str, Any]:
    """Does what is not done yet; returns what `results.json` holds.

    Raises:
      Stopped: a signal ended a training.
      hope_jax.train.lock.InUse: another quickstart writes there.
      hope_jax.train.checkpoint.ConfigMismatch: `workdir` is of other settings or data.
      hope_jax.train.folder.ForeignFolder: `workdir` is not of this program.
    """
    rows = experiment.rows(scale)
    folder = check(workdir, rows)
    if data is not None:
        rows = {
            row: config_lib.override(config, [f"data.path={data}"])
            for row, config in rows.items()
        }
    corpus = rows["hope"].data.load()
    folder.mkdir(parents=True, exist_ok=True)
    with lock.hold(folder):
        return _run(folder, rows, scale, corpus, console)


def _run(
    folder: Path,
    rows: Mapping[str, RunConfig],
    scale: str,
    corpus: text.Corpus | prepared.Corpus,
    console: Console,
) -> dict[str, Any]:
    if all((folder / row / EVALUATION).exists() for row in rows):
        # Training prints it.
        console.print(corpus.summary(), markup=False, soft_wrap=True)
    sizes = language_model.compression(corpus.validation)

    scores = {}
    for number, (row, config) in enumerate(rows.items(), start=1):
        console.rule(f"{number} of {len(rows)}: {NAMES[row]}", align="left")
        scores[row] = score_row(folder / row, config, corpus, console)

    results = {
        "hope_bpb": scores["hope"]["bits_per_byte_reset"],
        "hope_bpb_frozen": scores["hope"]["bits_per_byte_frozen"],
        "hope_bpb_carried": scores["hope"]["bits_per_byte_carried"],
        "transformer_bpb": scores["transformer"]["bits_per_byte_reset"],
        "gzip_bpb": sizes.gzip_bits_per_byte,
        "xz_bpb": sizes.xz_bits_per_byte,
        "seconds": sum(score["seconds"] for score in scores.values()),
        "info": {
            "scale": scale,
            "corpus": corpus.name,
            "corpus_sha256": corpus.sha256,
            "commit": metrics.commit(),
            "device": metrics.device(),
            "versions": metrics.versions(),
            "rows": {row: dict(score) for row, score in scores.items()},
        },
    }
    metrics.write_json(folder / RESULTS, results)
    draw(folder, rows, results, corpus)

    console.rule(align="left")
    console.print(table(rows, results))
    console.print(next_steps(folder, rows), markup=False, soft_wrap=True)
    return results


def check(workdir: str, rows: Mapping[str, RunConfig]) -> Path:
    """The folder of a quickstart: new, empty, or with a run that a row has left."""

    def is_ours(folder: Path) -> bool:
        names = {path.name for path in folder.iterdir()}
        runs = [folder / row for row in names & set(rows) if (folder / row).is_dir()]
        begun = any(any(run.iterdir()) and loop.is_run(run) for run in runs)
        return begun or names <= {*rows, lock.FILE}

    written = ("loss.png", "levels.png", RESULTS, f".{RESULTS}", lock.FILE, *rows)
    folder = check_folder("--workdir", workdir, written, is_ours)
    beside = (EVALUATION, SECONDS, f".{EVALUATION}", f".{SECONDS}")
    for row in rows:
        check_folder("--workdir", loop.check_workdir(folder / row), beside, loop.is_run)
    return folder


def score_row(
    folder: Path,
    config: RunConfig,
    corpus: text.Corpus | prepared.Corpus,
    console: Console,
) -> dict[str, float]:
    """Trains and evaluates one row, unless `folder` has both."""
    # What an evaluation belongs to; any difference makes it stale.
    belongs = {"config": config_lib.to_json(config), "corpus": corpus.sha256}
    kept = folder / EVALUATION
    if kept.exists():
        try:
            saved = json.loads(kept.read_bytes())
            metrics_ = saved.pop("metrics")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{kept} is no evaluation ({error!r}): remove it, and it is made again."
            ) from None
        differing = config_lib.differences(saved, belongs)
        if differing:
            raise checkpoint.ConfigMismatch(
                f"{kept} is of another run:\n  " + "\n  ".join(differing)
            )
        console.print(f"reusing {kept}", markup=False)
        return metrics_

    clock = folder / SECONDS
    before = _seconds(clock)
    start = time.perf_counter()
    try:
        outcome = loop.train(config, folder, resume=True)
    finally:
        trained = before + time.perf_counter() - start
        if (folder / loop.CONFIG).exists():  # the run was accepted
            metrics.write_json(clock, trained)
    if outcome.stopped_by is not None and not outcome.finished:
        raise Stopped(outcome.stopped_by)

    console.print(f"scoring {len(corpus.validation)} validation files")
    opened = open_checkpoint(folder)
    scores = language_model.evaluate(
        opened.reader, opened.params, opened.tokenizer, corpus.validation, rows=ROWS
    )
    scores |= {
        "parameters": lm.count_parameters(config.model),
        "tokens": config.train.steps * config.train.batch * config.train.seq_len,
        "seconds_train": trained,
        "seconds": before + time.perf_counter() - start,
    }
    metrics.write_json(kept, {**belongs, "metrics": scores})
    return scores


def _seconds(clock: Path) -> float:
    """What trainings before this one took; nothing where the file does not say it."""
    try:
        return float(json.loads(clock.read_bytes()))
    except (OSError, ValueError, TypeError):
        return 0.0


def draw(
    folder: Path,
    rows: Mapping[str, RunConfig],
    results: Mapping[str, Any],
    corpus: text.Corpus | prepared.Corpus,
) -> None:
    curves = {}
    for row in rows:
        log = metrics.read_log(folder / row / "metrics.jsonl")
        curves[NAMES[row]] = (
            [line["tokens"] for line in log],
            [line["bits_per_byte"] for line in log],
        )
    figure = plot.loss_curves(
        curves,
        lines={"gzip -9": results["gzip_bpb"], "xz -9": results["xz_bpb"]},
        marks={
            NAMES["hope"]: results["hope_bpb"],
            NAMES["transformer"]: results["transformer_bpb"],
        },
        ylabel="bits per byte",
        title=corpus.name,
        note="lines: training    dots: validation files",
    )
    figure.savefig(folder / "loss.png")
    hope = rows["hope"]
    levels = plot.draw(systems.system(hope.model, hope.train.seq_len))
    levels.savefig(folder / "levels.png")


def table(rows: Mapping[str, RunConfig], results: Mapping[str, Any]) -> Table:
    scores = results["info"]["rows"]
    made = Table(
        title="Validation files, each by itself (lower is better)",
        title_justify="left",
        title_style="bold",
        caption="Memory: reset before each file; carried from file to file; frozen, so"
        f" that nothing is learned while reading. {scores['hope']['tokens']:,} training"
        f" tokens a model, {results['seconds'] / 60:.1f} minutes in all.",
        caption_justify="left",
    )
    for name in ("", "bits per byte", "of gzip -9", "parameters", "training"):
        made.add_column(name, justify="right" if name else "left")

    def line(name, key, row=None, **style):
        value = results[key]
        made.add_row(
            name,
            f"{value:.3f}",
            f"{value / results['gzip_bpb']:.0%}",
            f"{scores[row]['parameters']:,}" if row else "",
            f"{scores[row]['seconds_train']:,.0f} s" if row else "",
            **style,
        )

    line("Hope, memory reset", "hope_bpb", "hope", style="bold")
    line("Hope, memory carried", "hope_bpb_carried")
    line("Hope, memory frozen", "hope_bpb_frozen")
    line("Transformer++", "transformer_bpb", "transformer")
    made.add_section()
    line("gzip -9", "gzip_bpb")
    line("xz -9", "xz_bpb")
    return made


def next_steps(folder: Path, rows: Mapping[str, RunConfig]) -> str:
    """Commands that work from here, as they are."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    hope = folder / "hope"
    data = rows["hope"].data.path
    scale = rows["hope"].scale
    train = ["-m", "launch.train", "--experiment=quickstart", "--row=hope"]
    train += [f"--scale={scale}"] if scale != "full" else []
    train += [f"--data={data}"] if data else []
    commands = {
        "text from it": [
            "-m",
            "launch.generate",
            f"--checkpoint={hope}",
            "--prompt",
            "def main(",
        ],
        "the same numbers on your own text": [
            "-m",
            "launch.evaluate",
            f"--checkpoint={hope}",
            "--data=README.md",
        ],
        "its levels, clocks and rules": [*train, "--describe"],
        "another model: any field can be set": [
            *train,
            f"--workdir={folder / 'mine'}",
            "--set",
            "optimizer.learning_rate=1e-3",
        ],
    }
    lines = [
        f"Pictures: {folder / 'loss.png'}, {folder / 'levels.png'}."
        f"  Numbers: {folder / RESULTS}.",
        "",
        "What to try next:",
    ]
    for what, arguments in commands.items():
        lines += ["", f"  # {what}", f"  {shlex.join([str(python), *arguments])}"]
    return "\n".join(lines)


def use_all_cores() -> None:
    """One virtual device a core, as many as share a batch equally.

    XLA runs the many small products of a memory on one core of a CPU device. No use of
    jax may come before this.
    """
    batch = experiment.TRAIN["full"].batch
    jax.config.update("jax_num_cpu_devices", math.gcd(batch, os.cpu_count() or 1))


if __name__ == "__main__":
    use_all_cores()
    command.run(main)
