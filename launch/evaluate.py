"""Bits per byte of a trained model, in three modes of its memory, beside gzip and xz.

    python -m launch.evaluate --checkpoint=runs/quickstart/hope

    reset     each document starts at the learned initial memory
    carried   the memory goes on from document to document
    frozen    as reset, and no level moves while reading

What a model gains by learning while it reads is frozen minus reset.

With --ablate: which of its parts does the learning. Every part is switched off in turn,
texts are read twice, facts planted and asked for, and a sceptic's controls applied.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from hope_jax.data import text
from hope_jax.data.tokenizer import encode_documents
from hope_jax.evaluate import ablation, language_model
from hope_jax.stream.reader import Opened, open_checkpoint
from hope_jax.train import checkpoint, metrics, release
from hope_jax.train.config import RunConfig, read_config
from hope_jax.train.folder import check_place
from launch import command

SPLITS = ("validation", "all")


def _define(define) -> None:
    define_checkpoint(define)
    define.string(
        "data", None, "a file, a folder or a glob; else the text it was trained on"
    )
    define.enum(
        "split", "validation", SPLITS, "the files held out in training, or all files"
    )
    define.integer("rows", 2, "most documents read side by side")
    define.string(
        "output",
        None,
        "a folder: write a result file there, as experiments/results has them; with "
        "--ablate the default is the checkpoint's",
    )
    define.alias("out", "output")
    define.bool("ablate", False, "which part does the learning")
    define.integer("ablate_rows", 8, "with --ablate, texts that are read twice")
    define.integer(
        "ablate_tokens",
        1152,
        "with --ablate, least tokens of a text, up to a multiple of the model's "
        "fastest clock (in 1152 facts 1,000 tokens apart fit)",
    )
    define.integer("ablate_facts", 32, "with --ablate, facts planted at each distance")
    for name in ("rows", "tokens", "facts"):
        define.alias(f"ablate-{name}", f"ablate_{name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Scores a checkpoint in three modes, or each of its parts."""
    options = command.parse(__doc__, _define, arguments)
    console = Console(highlight=False)
    command.quiet_libraries()
    with fail_in_words():
        if options.rows < 1:
            raise ValueError(f"rows must be at least 1, got {options.rows}.")
        if options.output is not None:
            check_place("--output", options.output)
        elif options.ablate:
            place = beside(options.checkpoint, "--output")
            check_place("without --output, the folder of --checkpoint", place)
        opened = open_given(options)
        config = opened.config
        corpus = config.data.load(options.data)
    documents = corpus.validation
    if options.split == "all":
        documents = (*corpus.train, *corpus.validation)
    console.print(corpus.summary(), markup=False, soft_wrap=True)
    if options.ablate:
        with fail_in_words():
            ablate(opened, documents, options, console)
        return
    with fail_in_words():
        measured = measure(opened, documents, rows=options.rows)
    print_table(
        console,
        f"{config.model.name}, step {opened.step:,}: {len(documents):,} documents,"
        f" {sum(len(d.data) for d in documents):,} bytes",
        measured,
    )
    if options.output is not None:
        read = sum(len(document.data) for document in documents)
        more = {"step": opened.step, "documents": len(documents), "bytes": read}
        with fail_in_words():
            write(options.output, config, measured | more, console)


def ablate(
    opened: Opened,
    documents: Sequence[text.Document],
    options: Any,
    console: Console,
) -> None:
    """Prints and saves the table of `hope_jax.evaluate.ablation`."""
    config = opened.config
    count = options.ablate_rows
    length = opened.reader.window(options.ablate_tokens)
    measured = measure_parts(
        opened,
        documents,
        rows=ablation.rows(config.model),
        count=count,
        length=length,
        facts=options.ablate_facts,
        say=lambda line: console.print(line, markup=False, soft_wrap=True),
    )
    title = (
        f"{config.model.name}, step {opened.step:,}: nats a token of {count} texts of "
        f"{length:,} tokens, read first, again, and another after it; gain: other - "
        "again"
    )
    print_ablation(console, title, measured)
    folder = options.output or beside(options.checkpoint, "--output")
    more = {"step": opened.step, "texts": count, "tokens": length}
    more["facts"] = options.ablate_facts
    found = ablation.flat(measured) | more
    write(folder, config, found, console, experiment="ablation")


def write(
    folder: str | os.PathLike,
    config: RunConfig,
    found: Mapping[str, float],
    console: Console,
    experiment: str | None = None,
) -> None:
    """Writes a result file of a run, by default of its experiment, and says where."""
    path = metrics.write_result(
        folder,
        experiment=experiment or config.experiment,
        row=config.row,
        scale=config.scale,
        seed=config.seed,
        config=config,
        metrics=found,
    )
    console.print(f"wrote {path}", markup=False, soft_wrap=True)


def measure_parts(
    opened: Opened,
    documents: Sequence[text.Document],
    *,
    rows: Sequence[ablation.Row],
    count: int,
    length: int,
    facts: int,
    say: Callable[[str], None],
) -> list[ablation.Measured]:
    """The lines of the table of `hope_jax.evaluate.ablation`.

    Args:
      rows: which lines.
      count: texts that are read twice.
      length: tokens of a text.
      facts: how many are planted at each distance that fits into a text.
      say: is told what is being read, and what is left out.
    """
    if facts < 2:
        raise ValueError(
            f"ablate-facts must be at least 2, got {facts}: one fact has no interval."
        )
    ids = encode_documents(opened.tokenizer, documents)
    read = ablation.texts(ids, count=count, length=length + 1)
    fitting = [d for d in ablation.DISTANCES if ablation.room(d) <= length + 1]
    for distance in ablation.DISTANCES:
        if distance not in fitting:
            say(
                f"facts at {distance} left out: they need {ablation.room(distance)} "
                f"tokens a text, and --ablate-tokens is {length}."
            )
    planted = None
    if fitting:
        # Rows of text may overlap: each has a fact of its own.
        stream = np.concatenate(ids)
        starts = np.linspace(0, len(stream) - length - 1, facts).astype(int)
        told = np.stack([stream[start : start + length + 1] for start in starts])
        known = np.unique(stream)
        planted = ablation.plant(told, fitting, opened.config.seed, known)
    measured = []
    for number, row in enumerate(rows, start=1):
        say(f"{number} of {len(rows)}: {row.name}")
        measured.append(ablation.measure(row, opened.params, read, planted))
        jax.clear_caches()  # a line's program serves no other
    return measured


def print_ablation(
    console: Console, title: str, measured: Sequence[ablation.Measured]
) -> None:
    """Readings of every row, the facts of those that were asked, what was left out."""

    def begin(title, *columns):
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        return table

    def written(value):
        return f"{value:.3f}" if math.isfinite(value) else "diverged"

    table = begin(title, "first", "again", "other", "gain")
    for row, readings, _ in measured:
        if readings is None:
            table.add_row(row.name, *("",) * 4, style="dim")
        else:
            table.add_row(row.name, *map(written, (*readings, readings.gain)))
        if row.name == "nothing learns":
            table.add_section()
    console.print(table)
    distances = [d for d in ablation.DISTANCES if d in measured[0].facts]
    if distances:
        table = begin(
            "Nats a token saved by a planted fact, and half its 95 % interval",
            *(f"{d} tokens on" for d in distances),
        )
        for row, _, facts in measured:
            gains = (facts[d] for d in distances if d in facts)
            cells = [f"{written(g.mean)} ± {written(g.high - g.mean)}" for g in gains]
            if cells:
                table.add_row(row.name, *cells)
        console.print(table)
    for row, readings, _ in measured:
        if readings is None:
            line = f"{row.name}: left out, {row.reason.rstrip('.')}."
            console.print(line, markup=False, soft_wrap=True)


def measure(
    opened: Opened, documents: Sequence[text.Document], *, rows: int
) -> dict[str, float]:
    """All metrics of `hope_jax.evaluate.language_model`, and those of gzip and xz."""
    sizes = language_model.compression(documents)
    return {
        **language_model.evaluate(
            opened.reader, opened.params, opened.tokenizer, documents, rows=rows
        ),
        "bits_per_byte_gzip": sizes.gzip_bits_per_byte,
        "bits_per_byte_xz": sizes.xz_bits_per_byte,
    }


def print_table(console: Console, title: str, measured: Mapping[str, float]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("of gzip -9", justify="right")
    gzip = measured["bits_per_byte_gzip"]
    for name, key in (
        ("memory reset per document", "reset"),
        ("memory carried over", "carried"),
        ("memory frozen", "frozen"),
        ("gzip -9, each file by itself", "gzip"),
        ("xz -9, each file by itself", "xz"),
    ):
        value = measured[f"bits_per_byte_{key}"]
        table.add_row(name, f"{value:.3f}", f"{value / gzip:.0%}")
        if key == "frozen":
            table.add_section()
    console.print(table)


def define_checkpoint(define) -> None:
    """The flags of a program that reads a checkpoint."""
    define.string(
        "checkpoint",
        None,
        "the workdir of a run, its folder of checkpoints, or a release",
        required=True,
    )
    define.alias("workdir", "checkpoint")
    define.string(
        "config",
        None,
        "a config.json that the checkpoint's config must equal, or it is refused",
    )
    define.multi_string(
        "set",
        [],
        "field=value that the checkpoint's config must have, or it is refused; "
        "repeatable",
    )
    define.float(
        "rechunk",
        1.0,
        "read with chunks of the memories so many times as long as in training; they "
        "then answer otherwise, and a warning says so",
    )


def beside(directory: str | os.PathLike, flag: str) -> Path:
    """The folder of a run, for what is given no other.

    Raises:
      ValueError: it is a release, whose files are all listed.
    """
    if release.is_release(directory):
        raise ValueError(
            f"Give {flag}, a folder: nothing is added to {str(directory)!r}, which is "
            "a release."
        )
    return checkpoint.find(directory).parent


def open_given(options: Any) -> Opened:
    """The checkpoint that those flags name; see `open_checkpoint`."""
    config = None
    if options.config is not None:
        config = read_config(RunConfig, options.config)
    return open_checkpoint(options.checkpoint, options.set, options.rechunk, config)


def fail_in_words():
    """Ends the program with the message of an error that its user can mend."""
    return command.fail_in_words(checkpoint.Damaged)


if __name__ == "__main__":
    command.run(main)
