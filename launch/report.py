"""One page of a run: what it was, how it went, where it stands.

    python -m launch.report --workdir=runs/hope --out=hope.html

The page is one file of HTML with its pictures inside. Nothing is fetched, and nothing
of the run is changed. Several runs are drawn together: --workdir=A --workdir=B.
"""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
       padding: 0 1em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } pre { overflow-x: auto; background: #f6f6f6; padding: 1em; }
"""
_SHOWN = ("loss", "bits_per_byte", "grad_norm", "update_norm")


def _define(define) -> None:
    define.multi_string("workdir", [], "folder of a run; may be repeated")
    define.string("out", None, "the page; by default report.html in the first folder")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page, and prints where it is."""
    options = command.parse(__doc__, _define, arguments, compiles=False)
    with command.fail_in_words(OSError):
        if not options.workdir:
            raise ValueError("Give --workdir, the folder of a run.")
        folders = [Path(folder) for folder in options.workdir]
        out = Path(options.out) if options.out else folders[0] / "report.html"
        out.write_text(page(folders), encoding="utf-8")
    print(f"wrote {out}")


def page(folders: Sequence[Path]) -> str:
    """The HTML of some runs.

    Raises:
      ValueError: a folder that is no run's, or has logged nothing.
    """
    runs = [_read(folder) for folder in folders]
    names = _names(folders)
    title = ", ".join(names)
    parts = [f"<h1>{html.escape(title)}</h1>", _summary(names, runs)]
    parts += [_curves(names, runs, what) for what in _drawn(runs)]
    for name, folder, (config, log) in zip(names, folders, runs, strict=True):
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts.append(_last(log[-1]))
        parts.append(_kept(folder))
        parts.append(_hosts(folder))
        said = html.escape(json.dumps(config, indent=2))
        parts.append(f"<details><summary>config</summary><pre>{said}</pre></details>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f"{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from hope_jax.train import metrics

    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{str(folder)!r} is no folder of a run: no config.json.")
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(config)!r} is no JSON: {error}.") from None
    log = metrics.read_log(folder / "metrics.jsonl")
    if not log:
        raise ValueError(f"{str(folder)!r} has logged no step yet.")
    return said, log


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of their paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def _summary(names, runs) -> str:
    """A line a run."""
    columns = ["run", "step", "of", "tokens", "loss, nats", "bits a byte", "validation"]
    lines = []
    for name, (config, log) in zip(names, runs, strict=True):
        last = log[-1]
        validated = [line for line in log if "validation_bits_per_byte" in line]
        lines.append(
            [
                name,
                last["step"],
                config.get("train", {}).get("steps", ""),
                last.get("tokens", ""),
                last.get("loss", ""),
                last.get("bits_per_byte", ""),
                validated[-1]["validation_bits_per_byte"] if validated else "",
            ]
        )
    return _table(columns, lines)


def _drawn(runs) -> list[str]:
    """What has a picture: what every run logs, in a fixed order."""
    known = set.intersection(*({*log[-1]} for _, log in runs))
    return [what for what in _SHOWN if what in known]


def _curves(names, runs, what: str) -> str:
    from hope_jax import plot

    curves, marks = {}, {}
    for name, (_, log) in zip(names, runs, strict=True):
        points = [line for line in log if what in line and "tokens" in line]
        curves[name] = (
            [line["tokens"] for line in points],
            [line[what] for line in points],
        )
        validated = [line for line in log if f"validation_{what}" in line]
        if validated:
            marks[name] = validated[-1][f"validation_{what}"]
    figure = plot.loss_curves(curves, marks=marks, ylabel=what.replace("_", " "))
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{encoded}">'


def _last(line: Mapping[str, Any]) -> str:
    """The numbers of the last step; those of levels stand together, by name."""
    numbers = [[name, value] for name, value in sorted(line.items())]
    return _table(["at the last step", ""], numbers)


def _kept(folder: Path) -> str:
    """Checkpoints, and what happened to them."""
    kept = folder / "checkpoints"
    steps = sorted(int(p.name) for p in kept.glob("*") if p.name.isdigit())
    said = ", ".join(f"{step:,}" for step in steps) or "none"
    return f"<p>Checkpoints: {said}.</p>"


def _hosts(folder: Path) -> str:
    """What each process last said of its time and memory."""
    from hope_jax.train import metrics

    lines = {}
    for path in sorted((folder / "hosts").glob("*.jsonl")):
        log = metrics.read_log(path, skip_damaged=True)
        if log:
            lines[path.stem] = log[-1]
    names = sorted({name for line in lines.values() for name in line} - {"at"})
    if not lines:
        return ""
    columns = ["process", *names]
    return _table(
        columns,
        [[host, *(line.get(n, "") for n in names)] for host, line in lines.items()],
    )


def _table(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in columns)
    rows = "".join(
        "<tr>" + "".join(_cell(value) for value in line) + "</tr>\n" for line in lines
    )
    return f"<table>\n<tr>{head}</tr>\n{rows}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{html.escape(str(value))}</td>"
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    digits = f"{value:.4g}" if math.isfinite(value) else str(value)
    return f'<td class="number">{digits}</td>'


if __name__ == "__main__":
    command.run(main)
