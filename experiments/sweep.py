"""Trains memories of every kind on multi-query recall: one table and one heat map.

    python -m experiments.sweep --grid=miras
    python -m experiments.sweep --biases=l2,huber --rules=gd,optax.adam --steps=1000
    python -m experiments.sweep --grid=named --points=delta_net,titans --seeds=0,1,2

A grid is every product of the choices given, or the published models by name. A product
that has no meaning is refused with the reason, and stays in the table. Everything is
kept under --out (default: runs/sweep-miras, runs/sweep-named):

    sweep.json    the settings of all points, and a row for each point and seed
    sweep.png     accuracy, as colour and number

A second start reads what is finished and trains the rest.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import lab
from hope_jax import plot
from hope_jax.core import config as config_lib
from hope_jax.core.config import did_you_mean
from hope_jax.evaluate.points import (
    CHOICES,
    GridConfig,
    Point,
    miras,
    options,
    published,
)
from hope_jax.evaluate.probe import NOT_FINITE, train
from hope_jax.memory import rule as rule_lib
from hope_jax.train import lock, metrics
from hope_jax.train.config import read_config
from hope_jax.train.folder import check_folder
from launch import command

GRIDS = ("miras", "named")
DEFAULTS = {
    "architecture": "linear,mlp",
    "bias": "dot,l2",
    "retention": "none,decay",
    "rule": "gd,momentum",
}
COLUMNS = (
    *("point", *CHOICES, "chunk", "seed", "status"),
    *("accuracy", "loss", "steps", "tokens_per_second", "seconds"),
)
_TABLE, _PICTURE = "sweep.json", "sweep.png"
REFUSED = "refused"


def row_of(point: Point) -> dict[str, Any]:
    """Its row in the table before there are results."""
    known = {"point": point.name, **dict(zip(CHOICES, point.choices, strict=True))}
    return dict.fromkeys(COLUMNS) | known | {"chunk": point.chunk}


def run(
    out: str | Path, config: GridConfig, points: Sequence[Point], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Trains what `out` has no row of, and says so; returns the rows of `points`.

    The table is written after every row, so that nothing finished is ever lost.

    Raises:
      ValueError: `out` holds a sweep of other settings, or no table of this program.
      hope_jax.train.lock.InUse: another sweep writes there.
    """
    written = (_TABLE, f".{_TABLE}", _PICTURE, lock.FILE)
    path = check_folder("--out", out, written, _is_ours) / _TABLE
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock.hold(path.parent, "--out"):
        return _run(path, config, points, seeds)


def _run(
    path: Path, config: GridConfig, points: Sequence[Point], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    kept = _read(path, config)
    rows = []
    wanted = list(itertools.product(points, seeds))
    for number, (point, seed) in enumerate(wanted, start=1):
        key = (point.name, seed)
        told = f"{number} of {len(wanted)}: {point.name}, seed {seed}"
        if point.model is None:
            status = f"{REFUSED}: {point.reason}"
            kept[key] = row_of(point) | {"seed": seed, "status": status}
            print(f"{told}: {REFUSED}")
        elif key in kept:
            print(f"{told}: kept, {_told(kept[key])}")
        else:
            start = time.perf_counter()
            made = train(config, point.model, seed)
            spent = time.perf_counter() - start
            kept[key] = row_of(point) | {"seed": seed} | made
            kept[key] |= {"commit": metrics.commit(), "device": metrics.device()}
            jax.clear_caches()  # nothing compiled here is used again
            print(f"{told}: {_told(kept[key])}; {spent:.0f} s with its compilation")
        rows.append(kept[key])
        _write(path, config, kept.values())
    return rows


def _is_ours(folder: Path) -> bool:
    """`_read` says whether its table is one; a kill may leave half of the first."""
    names = {path.name for path in folder.iterdir()}
    return _TABLE in names or names <= {f".{_TABLE}", lock.FILE}


def _told(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return row["status"]
    return f"accuracy {row['accuracy']:.3f} after {row['steps']} steps"


def _read(path: Path, config: GridConfig) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows trained before, by point and seed."""
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        rows = {(row["point"], row["seed"]): row for row in saved["rows"]}
        differing = config_lib.differences(saved["config"], config)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of experiments.sweep ({error!r}): move it away, or "
            "give another --out."
        ) from None
    if differing:
        raise ValueError(
            f"{path} holds a sweep of other settings:\n  "
            + "\n  ".join(differing)
            + "\nGive another --out, or remove that folder."
        )
    return {k: row for k, row in rows.items() if not _refused(row)}


def _refused(row: Mapping[str, Any]) -> bool:
    return row["status"].startswith(REFUSED)


def _write(path: Path, config: GridConfig, rows: Iterable[dict[str, Any]]) -> None:
    table = {"versions": metrics.versions(), "rows": list(rows)}
    metrics.write_json(path, {"config": config_lib.to_json(config), **table})


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    formats = {
        "accuracy": "{:.3f}",
        "loss": "{:.3f}",
        "tokens_per_second": "{:,.0f}",
        "seconds": "{:.1f}",
    }
    lines = [
        ["" if row[c] is None else formats.get(c, "{}").format(row[c]) for c in COLUMNS]
        for row in rows
    ]
    columns = [column.replace("_per_", "/") for column in COLUMNS]
    return lab.table(columns, lines, words=COLUMNS.index("accuracy"))


def draw(
    config: GridConfig, points: Sequence[Point], rows: Sequence[Mapping[str, Any]]
) -> plot.Figure:
    """The heat map of `points`: the mean accuracy of their seeds."""
    down = list(dict.fromkeys(point.cell[0] for point in points))
    across = list(dict.fromkeys(point.cell[1] for point in points))
    shape = (len(down), len(across))
    values = np.full(shape, np.nan)
    hatched = {why: np.zeros(shape, bool) for why in (REFUSED, NOT_FINITE)}
    for point in points:
        cell = (down.index(point.cell[0]), across.index(point.cell[1]))
        own = [row for row in rows if row["point"] == point.name]
        scores = [row["accuracy"] for row in own]
        if None not in scores:
            values[cell] = np.mean(scores)
        else:
            why = REFUSED if any(map(_refused, own)) else NOT_FINITE
            hatched[why][cell] = True
    hatched = {
        f"{REFUSED}, the table says why": hatched[REFUSED],
        "did not stay finite": hatched[NOT_FINITE],
    }
    task, seeds = config.task, len({row["seed"] for row in rows})
    title = (
        f"Multi-query recall: {task.asked} of {task.pairs} pairs asked in "
        f"{task.length} tokens, {config.steps} steps"
        + (f", mean of {seeds} seeds" if seeds > 1 else "")
    )
    if len(across) > 1:
        title += "\nrows: architecture, bias; columns: retention, rule"
    return plot.heat_map(
        values,
        rows=down,
        columns=across,
        hatched={why: cells for why, cells in hatched.items() if cells.any()},
        marks={"chance": task.chance},
        title=title,
    )


def _define(define) -> None:
    define.enum("grid", "miras", GRIDS, "which points")
    for choice, default in DEFAULTS.items():
        others = ", optax.<name>" if choice == "rule" else ""
        known = f"of {', '.join(options(choice))}{others}"
        define.string(_plural(choice), None, f"{known} (default: {default})")
    define.string("points", None, "with --grid=named, only these of its points")
    define.string("seeds", "0", "each point is trained with each")
    define.integer("steps", None, "most steps of a point")
    define.float("seconds", None, "most seconds of a point")
    define.string("out", None, "where table and picture are kept")
    define.alias("workdir", "out")
    define.string("config", None, "a sweep.json, whose settings this sweep has")
    define.multi_string(
        "set", [], "a field of the sweep's config, for example task.pairs=4; repeatable"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what has no row yet, prints the table and draws the heat map."""
    given = command.parse(__doc__, _define, arguments)
    try:
        with command.fail_in_words():
            config = settings(given)
            points, seeds = _points(given, config), lab.seeds(given.seeds)
            out = f"runs/sweep-{given.grid}" if given.out is None else given.out
            rows = run(out, config, points, seeds)
    except KeyboardInterrupt:
        print("stopped; start the same command again to go on.")
        sys.exit(130)
    print(markdown(rows))
    picture = Path(out) / _PICTURE
    draw(config, points, rows).savefig(picture)
    print(f"wrote {Path(out) / _TABLE} and {picture}")


def settings(given: Any) -> GridConfig:
    """The config that the flags describe.

    Raises:
      ValueError: no such field or value, or one that is a choice of the grid.
    """
    changed = list(given.set)
    for flag in ("steps", "seconds"):
        if getattr(given, flag) is not None:
            changed.append(f"{flag}={getattr(given, flag)}")
    for setting in changed:
        field = setting.partition("=")[0].removeprefix("mixer.memory.")
        if setting.startswith("mixer.memory.") and field in (*CHOICES, "gradient"):
            flag = "--set gradients" if field == "gradient" else f"--{_plural(field)}"
            raise ValueError(f"--set {setting}: the grid sets it; use {flag}=...")
    config = GridConfig()
    if given.config is not None:
        config = read_config(GridConfig, given.config)
    return config_lib.override(config, changed)


def _points(given: Any, config: GridConfig) -> list[Point]:
    """The points that the flags ask for."""
    asked = {choice: getattr(given, _plural(choice)) for choice in CHOICES}
    if given.grid == "named":
        for choice, value in asked.items():
            if value is not None:
                raise ValueError(
                    f"--{_plural(choice)} is about --grid=miras; a named point has its "
                    "own. Select points with --points."
                )
        return published(config, lab.listed(given.points) if given.points else ())
    if given.points is not None:
        raise ValueError("--points needs --grid=named.")
    asked = {c: DEFAULTS[c] if text is None else text for c, text in asked.items()}
    asked = {choice: lab.listed(text) for choice, text in asked.items()}
    for choice, names in asked.items():
        _check(choice, names)
    return miras(config, asked)


def _plural(choice: str) -> str:
    return {"bias": "biases"}.get(choice, f"{choice}s")


def _check(choice: str, given: Sequence[str]) -> None:
    there, flag = options(choice), f"--{_plural(choice)}"
    if not given:
        raise ValueError(f"{flag} is empty; choose from {', '.join(there)}.")
    for name in given:
        if choice == "rule" and name.startswith("optax."):
            rule_lib.from_optax(name)  # refuses an unknown one
        elif name not in there:
            hint = did_you_mean(name, there)
            others = " and optax.<name>" if choice == "rule" else ""
            raise ValueError(
                f"{flag}: there is no {choice} {name!r}; there are "
                f"{', '.join(there)}{others}.{hint}"
            )


if __name__ == "__main__":
    command.run(main)
