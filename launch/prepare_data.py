"""Text to a folder of tokens, which --data of all commands takes.

    python -m launch.prepare_data --source='corpus/*.jsonl.gz' --out=prepared

A source is a file, a folder or a glob of text, JSON lines (also .gz and .zst) or
Parquet; hf:NAME, of Hugging Face's `datasets`; or tfds:NAME, of TensorFlow Datasets.
All cores work. A preparation that was stopped goes on when the same command is given
again, and makes the same bytes.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import command


def _define(define) -> None:
    define.multi_string("source", [], "where text is; may be repeated")
    define.string("out", None, "the folder that is made")
    define.string(
        "tokenizer",
        "bpe",
        "bytes, bpe (trained on a part of the text), or a tokenizer.json",
    )
    define.integer("vocab", 32768, "entries of the BPE")
    define.integer("learn_bytes", 100_000_000, "text that the BPE is trained on, about")
    define.string("field", "text", "of JSON lines, Parquet or a data set: the text")
    define.string(
        "separator", None, "what stands between the documents of a text file, if any"
    )
    define.enum(
        "undecodable",
        "raise",
        ("raise", "skip", "keep"),
        "what to do with what is no UTF-8 or no JSON; keep: the bytes of a text file",
    )
    define.string("split", "train", "of a data set by name")
    define.string("config", None, "of a data set by name: which of its parts")
    define.string("cache", None, "folder in which data sets by name are kept")
    define.float(
        "held_out",
        0.005,
        "share of documents for validation, by the hash of their text",
    )
    define.integer("shard_bytes", 64 << 20, "text of a shard, about")
    define.integer("processes", None, "that work at a time; all cores by default")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepares a folder, and prints what is in it."""
    options = command.parse(__doc__, _define, arguments, compiles=False)
    from hope_jax.data import prepare, prepared, sources
    from hope_jax.train.folder import check_place

    with command.fail_in_words(OSError, ImportError):
        if not options.out:
            raise ValueError("Give --out, the folder that is made.")
        if options.processes is not None and options.processes < 1:
            raise ValueError(
                f"--processes must be at least 1, got {options.processes}."
            )
        out = check_place("--out", os.path.expanduser(options.out))
        prepare.begun(out)
        how = sources.Reading(
            field=options.field,
            separator=options.separator or None,
            undecodable=options.undecodable,
            split=options.split,
            config=options.config,
            folder=options.cache,
        )
        plan = prepare.Plan(
            sources=tuple(options.source),
            how=how,
            held_out=options.held_out,
            shard_bytes=options.shard_bytes,
            tokenizer=_asked(options),
            fingerprint="",  # of a tokenizer that takes long to train
        )
        tokens = _tokenizer(options, how, out)
        plan = dataclasses.replace(plan, fingerprint=tokens.fingerprint)
        processes = options.processes or len(os.sched_getaffinity(0))
        with _Bar() as bar:
            made = prepare.prepare(
                out, plan, tokens, processes=processes, told=bar.told
            )
        print(command.printable(made.summary(), sys.stdout))
        for reason, (count, first) in prepare.skipped(made).items():
            said = f"  skipped    {count:,} {reason}: {', '.join(first[:3])}"
            print(command.printable(said, sys.stdout))
        path = made.folder / prepared.TOKENIZER
        print(f"--data={made.folder} --set data.tokenizer={path}")


def _asked(options: Any) -> str:
    if options.tokenizer == "bpe":
        return f"bpe of {options.vocab} entries, of {options.learn_bytes} bytes"
    return options.tokenizer


def _tokenizer(options: Any, how: Any, out: Path) -> Any:
    """The one that is asked for; that of the folder where it was trained before."""
    from hope_jax.data import prepare, prepared, tokenizer

    if options.tokenizer == "bytes":
        return tokenizer.ByteTokenizer()
    if options.tokenizer != "bpe":
        return tokenizer.load(options.tokenizer)
    if (out / prepare.PLAN).is_file():
        with contextlib.suppress(OSError, ValueError):  # killed while it was written
            return tokenizer.load(out / prepared.TOKENIZER)
    print("training the tokenizer", flush=True)
    return prepare.train_tokenizer(
        options.source, how, options.vocab, options.learn_bytes
    )


class _Bar:
    """A bar on a terminal, a line for every tenth elsewhere."""

    def __init__(self):
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
            disable=not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("preparing", total=None)
        self._tenth = 0

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def told(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        tenth = 10 * done // max(1, total)
        if self._bar.disable and tenth > self._tenth:
            self._tenth = tenth
            print(f"{10 * tenth} % prepared", flush=True)


if __name__ == "__main__":
    command.run(main)
