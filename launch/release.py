"""A trained model as a folder to hand out: weights, config, tokenizer, card, sums.

    python -m launch.evaluate --checkpoint=runs/mine --output=runs/scores
    python -m launch.release --checkpoint=runs/mine --out=runs/released \
        --licence=Apache-2.0 --results=runs/scores
    python -m launch.release --verify=runs/released

The folder holds safetensors, config.json, tokenizer.json, README.md (a card, written
from the config, the log and the result files), metrics.jsonl, the result files and
SHA256SUMS; `hope_jax.restore("runs/released")` and every command's --checkpoint read
it, and refuse a file that is not as it was. --out must be new, empty, or an earlier
release that nobody has changed, which is replaced as a whole.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command

CARD = "README.md"
LOG = "metrics.jsonl"
RESULTS = "results"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .+()-]*")  # of SPDX
_MODES = ("reset", "carried", "frozen", "gzip", "xz")


def _define(define) -> None:
    define.string("checkpoint", None, "the workdir of a run, or a release")
    define.alias("workdir", "checkpoint")
    define.string("out", None, "the folder that is made")
    define.enum("dtype", "float32", ("float32", "float16"), "of the weights there")
    define.string(
        "licence",
        None,
        "of the weights, by its SPDX name, as Apache-2.0; that of the training text "
        "may bind you",
    )
    define.multi_string(
        "results",
        [],
        "a result file of this run, or a folder with some, for the card; repeatable",
    )
    define.string("verify", None, "a release: is every file as it was? Nothing is made")


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes a release, or verifies one."""
    given = command.parse(__doc__, _define, arguments, compiles=False)
    command.quiet_libraries()

    from hope_jax.train import checkpoint, release

    with command.fail_in_words(checkpoint.Damaged):
        if given.verify is not None:
            names = release.verify(given.verify)
            print(f"{given.verify}: all {len(names)} files are as they were released")
            return
        for flag in ("checkpoint", "out", "licence"):
            if given[flag].value is None:
                raise ValueError(f"Give --{flag}, or --verify=FOLDER.")
        out = make(
            given.checkpoint,
            given.out,
            licence=given.licence,
            dtype=given.dtype,
            results=given.results,
        )
    print(f"released {out}; anyone can check it: python -m launch.release --verify=DIR")


def make(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    licence: str,
    dtype: str = "float32",
    results: Sequence[str | os.PathLike] = (),
) -> Path:
    """Makes a release of the newest checkpoint of a run, and returns where it is.

    Args:
      source: the workdir of a run, or a release.
      out: new, empty, or a release as it was made.
      licence: of the weights.
      dtype: of the weights in the folder, `float32` or `float16`.
      results: result files of this run, or folders with some.

    Raises:
      FileNotFoundError: no checkpoint, or no result of this run.
      ValueError: a licence that is no name, a result of another run, or weights that do
        not fit `dtype`.
      hope_jax.train.folder.ForeignFolder: `out` holds other files.
      hope_jax.train.checkpoint.Damaged: no checkpoint is intact.
    """
    from hope_jax.core import config as config_lib
    from hope_jax.stream.reader import open_checkpoint
    from hope_jax.train import checkpoint, folder, metrics, release

    if not _LICENCE.fullmatch(licence):
        raise ValueError(
            "licence must be a name of SPDX, as Apache-2.0 or CC-BY-4.0, got "
            f"{licence!r}."
        )
    out = folder.check_folder("--out", out, (), _ours)
    opened = open_checkpoint(source)
    found = _results(results, opened.config)
    if release.is_release(source):
        place, training = Path(source), release.read(source).about["training"]
    else:
        place, meta = checkpoint.find(source).parent, checkpoint.saved_meta(source)
        corpus = meta["fingerprint"]["corpus"]
        lineage = _lineage(meta.get("lineage", []))
        training = {"corpus_sha256": corpus, "versions": meta["versions"]}
        training |= {"lineage": lineage}

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        made = beside / "new"
        made.mkdir()
        about = release.write(
            made,
            opened.config,
            opened.params,
            opened.tokenizer,
            step=opened.step,
            dtype=dtype,
            about={"training": training, "licence": licence},
        )
        log = metrics.read_log(place / LOG, skip_damaged=True)
        if log:
            shutil.copyfile(place / LOG, made / LOG)
        config = release.read_config(made)  # without paths of this machine
        for name, result in found.items():
            said = {**result, "config": config_lib.to_json(config)}
            metrics.write_json(made / RESULTS / name, said)
        said = card(config, about, found, log)
        (made / CARD).write_text(said, encoding="utf-8")
        release.seal(made)
        _replace(out, made, beside / "old")
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def _lineage(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What happened to a run, and to that which it began from, without paths."""

    def said(event):
        if "origin" not in event:
            return dict(event)
        before = event["origin"]
        name = {"path": Path(before["path"]).name}
        return {
            **event,
            "origin": {**before, **name, "lineage": _lineage(before["lineage"])},
        }

    return [said(event) for event in events]


def _replace(out: Path, made: Path, old: Path) -> None:
    """Puts `made` where `out` is, or leaves that as it was."""
    if out.exists():
        out.rename(old)
    try:
        made.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def _ours(out: Path) -> bool:
    """Whether a folder is a release, every file as it was."""
    from hope_jax.train import checkpoint, release

    try:
        release.verify(out)
    except (FileNotFoundError, checkpoint.Damaged):
        return False
    return True


def _results(given: Sequence[str | os.PathLike], config: Any) -> dict[str, Any]:
    """Name -> the results that are of this run.

    Of a file that is given every one must be, of a folder one at least.
    """
    from hope_jax.train import metrics

    found: dict[str, Any] = {}
    for place in map(Path, given):
        if not place.exists():
            raise FileNotFoundError(f"--results={str(place)!r}: nothing is there.")
        here = {}
        for path in sorted(place.rglob("*.json")) if place.is_dir() else [place]:
            try:
                result = metrics.read_result(path)
                differing = _differing(result["config"], config)
            except ValueError:
                if place.is_dir():
                    continue  # some other JSON
                raise
            if not differing:
                here[f"{result['experiment']}-{path.name}"] = result
            elif not place.is_dir():
                raise ValueError(
                    f"--results={str(place)!r} is of another run:\n  "
                    + "\n  ".join(differing[:3])
                )
        if not here:
            raise FileNotFoundError(
                f"--results={str(place)!r} holds no result of this run; make one: "
                "python -m launch.evaluate --checkpoint=RUN --output=FOLDER"
            )
        found |= here
    return found


def _differing(saved: Any, config: Any) -> list[str]:
    from hope_jax.core import config as config_lib

    found = config_lib.differences(saved, config)
    return [line for line in found if not line.startswith("data.path:")]


def card(
    config: Any,
    about: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, Any]],
    log: Sequence[Mapping[str, Any]],
) -> str:
    """What a reader should know of a model, in Markdown.

    Args:
      config: of the run, without paths of a machine.
      about: of `release.json`.
      scores: result files, by name.
      log: the lines of its training.
    """
    from hope_jax.models import learning

    model, train, kept = config.model, config.train, config.data
    learns = bool(model.fast) or learning.has_memories(model)
    tokens = about["step"] * train.batch * train.seq_len
    text = kept.path or "the Python standard library's own sources"
    optimizer = config.optimizer
    levels = [f"{level.period:g}" for level in model.cms.levels]
    parts = [
        f"# {config.experiment}, {config.row}",
        f"A language model of {about['parameters']:,} parameters, made with hope_jax "
        f"{about['versions']['hope_jax']} (Nested Learning, arXiv:2512.24695); "
        f"weights in {about['dtype']}, licence {about['licence']}.",
        "## What it is",
        _table(
            ("", ""),
            [
                ("mixer", model.kinds),
                (
                    "layers, width, heads",
                    f"{model.layers}, {model.d_model}, {model.heads}",
                ),
                ("MLPs of a block move every", f"{', '.join(levels)} tokens"),
                ("learns while it reads", "yes" if learns else "no"),
                ("vocabulary", f"{model.vocab:,}, tokenizer {kept.tokenizer}"),
            ],
        ),
        "`config.json` has all of it.",
        "## What it was trained on",
        _table(
            ("", ""),
            [
                *_began(about),
                ("text", f"{text}, SHA-256 `{about['training']['corpus_sha256']}`"),
                (
                    "budget",
                    f"{about['step']:,} steps of {train.batch} rows of "
                    f"{train.seq_len} tokens: {tokens:,} tokens",
                ),
                (
                    "optimizer",
                    f"{optimizer.rule.kind}, rate {optimizer.learning_rate:g}",
                ),
                ("seed", config.seed),
                *_trained_to(log),
            ],
        ),
        "`metrics.jsonl` is the log." if log else "There is no log.",
        "## Scores",
        _scored(scores),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(config, about, tokens, learns)),
        "## To use it",
        '```python\nimport hope_jax\n\nopened = hope_jax.restore("FOLDER")  '
        "# config, reader, params, tokenizer\n```",
        "`python -m launch.generate --checkpoint=FOLDER` and other commands read it "
        "too. `sha256sum -c SHA256SUMS` or `python -m launch.release --verify=FOLDER` "
        "says whether it is as it was made; reading it checks that as well.",
    ]
    return "\n\n".join(parts) + "\n"


def _origin(about: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The model that the run began from, if it was not drawn from a seed."""
    events = about["training"].get("lineage", [])
    return next((event["origin"] for event in events if "origin" in event), None)


def _began(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    began = _origin(about)
    if began is None:
        return []
    said = f"step {began['step']:,} of `{began['path']}`, SHA-256 of its parameters"
    return [("began with", f"{said} `{began['sha256']}`")]


def _trained_to(log: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    last = [line for line in log if "bits_per_byte" in line][-1:]
    return [
        ("the last step logged", f"{line['bits_per_byte']:.3f} bits a byte of training")
        for line in last
    ]


def _scored(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Bits a byte in every mode of memory, a line a result; others by name alone."""
    if not scores:
        return "None were given when it was released: measure before you trust it."
    lines, others = [], []
    for name, result in scores.items():
        bits = [result["metrics"].get(f"bits_per_byte_{mode}") for mode in _MODES]
        if bits[0] is None:
            others.append(f"`{RESULTS}/{name}`")
            continue
        read = result["metrics"].get("bytes")
        cells = ["" if value is None else f"{value:.3f}" for value in bits]
        lines.append((f"`{RESULTS}/{name}`", f"{read:,}" if read else "", *cells))
    said = []
    if lines:
        columns = ("bits a byte", "bytes", "memory reset", "carried", "frozen")
        said.append(_table((*columns, "gzip -9", "xz -9"), lines))
        said.append(
            "*Reset*: each document starts at the learned memory; *carried*: memory "
            "goes on from one to the next; *frozen*: nothing is learned while reading."
        )
    if others:
        said.append(f"More: {', '.join(others)}.")
    return "\n\n".join(said)


def _limits(config: Any, about: Mapping[str, Any], tokens: int, learns: bool):
    """What should not be expected of it, as far as its config says."""
    before = " since it began with another model" if _origin(about) else ""
    yield (
        f"It has read {tokens / about['parameters']:.2g} tokens a parameter{before}, "
        f"in rows of {config.train.seq_len}. Scores are of the text that they were "
        "measured on."
    )
    yield "It continues text. It was not taught to follow, refuse or be right."
    if learns:
        yield (
            "What it reads changes what it says next: keep one state a reader, and "
            "treat a saved state as the text that it has read."
        )
    if config.model.most is not None:
        yield f"It looks back over {config.model.most:,} tokens at most."
    if about["dtype"] == "float16":
        yield (
            "Its weights were rounded to float16 and are read as float32: logits "
            "differ from the run's by about a thousandth of their size."
        )


def _table(columns: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


if __name__ == "__main__":
    command.run(main)
