"""Pictures of runs. Each function writes one file and returns its path."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#555555"


def loss_curves(
    path: str | os.PathLike,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    lines: Mapping[str, float] | None = None,
    marks: Mapping[str, float] | None = None,
    title: str = "",
) -> Path:
    """Draws bits per byte against tokens read.

    Args:
      path: the picture; its suffix is its format (png, svg, pdf).
      curves: name -> (tokens read, bits per byte). Drawn faint as given and strong as
        a running mean, for a training loss is a noisy thing.
      lines: name -> bits per byte of something that does not train, a level line.
      marks: name of a curve -> bits per byte on validation text, at the curve's end.
      title: said above the picture.

    Raises:
      ValueError: no curves; a curve with no points or of unequal lengths; a mark
        without its curve.
    """
    lines, marks = dict(lines or {}), dict(marks or {})
    if not curves:
        raise ValueError("curves is empty; give at least one to draw.")
    for name, (tokens, bits) in curves.items():
        if len(tokens) != len(bits) or not len(tokens):
            raise ValueError(
                f"curve {name!r} has {len(tokens)} numbers of tokens and {len(bits)} of"
                " bits per byte; it needs as many of both, and at least one."
            )
    for name in marks:
        if name not in curves:
            raise ValueError(f"mark {name!r} has no curve; curves: {', '.join(curves)}")

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        labels = []  # (height, text, colour), to the right of the picture
        for colour, (name, (tokens, bits)) in zip(
            _cycled(len(curves)), curves.items(), strict=True
        ):
            tokens, bits = np.asarray(tokens, float), np.asarray(bits, float)
            smooth = _running_mean(bits)
            axes.plot(tokens, bits, color=colour, alpha=0.22, linewidth=0.8)
            axes.plot(tokens, smooth, color=colour, linewidth=2.0)
            text, height = f"{name}, training", smooth[-1]
            if name in marks:
                height = marks[name]
                axes.plot(
                    tokens[-1:],
                    [height],
                    marker="o",
                    markersize=7,
                    markeredgecolor="white",
                    color=colour,
                    clip_on=False,
                    zorder=5,
                )
                text = f"{name} {height:.2f}"
            labels.append((height, text, colour))
        for style, (name, height) in zip(
            _cycled(len(lines), ("--", ":", "-.")), lines.items(), strict=True
        ):
            axes.axhline(height, color=_GREY, linewidth=1.2, linestyle=style)
            labels.append((height, f"{name} {height:.2f}", _GREY))

        last = max(float(tokens[-1]) for tokens, _ in curves.values())
        axes.set_xlim(0, last)
        axes.set_ylim(*_limits(curves, [*lines.values(), *marks.values()]))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.set_xlabel("training tokens")
        axes.set_ylabel("bits per byte")
        axes.set_title(title, loc="left")
        _label(axes, labels)
        if marks:
            axes.text(
                0.995,
                0.98,
                "lines: training    dots: validation files",
                transform=axes.transAxes,
                ha="right",
                va="top",
                color=_GREY,
                fontsize=9,
            )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    return path


def heat_map(
    path: str | os.PathLike,
    values: Sequence[Sequence[float]] | np.ndarray,
    *,
    rows: Sequence[str | tuple[str, str]],
    columns: Sequence[str | tuple[str, str]],
    hatched: Mapping[str, Sequence[Sequence[bool]] | np.ndarray] | None = None,
    marks: Mapping[str, float] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    label: str = "accuracy",
    title: str = "",
) -> Path:
    """Draws a number a cell, as colour and as digits.

    Args:
      path: the picture; its suffix is its format (png, svg, pdf).
      values: [rows, columns]; a cell that is NaN stays empty.
      rows, columns: their names, or pairs (group, name): neighbours of one group stand
        under its name.
      hatched: why a cell has no number -> [rows, columns], the cells it is true of.
        Each reason has its own hatching, named below the picture.
      marks: name -> a number to compare with, marked on the scale.
      limits: the numbers at the ends of the scale.
      label: what the numbers are.
      title: said above the picture.

    Raises:
      ValueError: no rows or columns; another shape than theirs; a hatched cell that has
        a number.
    """
    numbers = np.asarray(values, float)
    shape = (len(rows), len(columns))
    if 0 in shape or numbers.shape != shape:
        raise ValueError(
            f"values must be [rows, columns] = {list(shape)}, at least one of each, got"
            f" {list(numbers.shape)}."
        )
    hatches = {why: np.asarray(cells, bool) for why, cells in (hatched or {}).items()}
    for why, cells in hatches.items():
        if cells.shape != shape:
            raise ValueError(
                f"hatched {why!r} must be [rows, columns] = {list(shape)}, got "
                f"{list(cells.shape)}."
            )
        if np.isfinite(numbers[cells]).any():
            raise ValueError(f"hatched {why!r} covers a cell that has a number.")

    rows, columns = _grouped(rows), _grouped(columns)
    margin = 0.2 + 0.095 * sum(max(map(len, part)) for part in zip(*rows, strict=True))
    cell = max(0.8, 0.15 + 0.088 * max(len(name) for _, name in columns))
    wide = [margin + cell * shape[1] + 1.4]
    wide += [0.3 + 0.1 * len(line) for line in title.split("\n")]
    wide += [0.3 + sum(0.7 + 0.09 * len(why) for why in hatches)]
    size = (max(wide), 1.7 + 0.46 * shape[0])
    style: dict[Any, Any] = {"axes.grid": False, "hatch.linewidth": 0.8}
    with matplotlib.rc_context(_STYLE | style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(
            numbers, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="auto"
        )
        middle = sum(limits) / 2
        for (row, column), value in np.ndenumerate(numbers):
            if np.isfinite(value):
                colour = "white" if value < middle else "black"
                text = f"{value:.2f}"
                axes.text(column, row, text, ha="center", va="center", color=colour)
        seen = []
        for hatch, (why, cells) in zip(
            _cycled(len(hatches), ("////", "....", "xxxx")),
            hatches.items(),
            strict=True,
        ):
            patch: dict[str, Any] = {"facecolor": "#F4F4F4", "edgecolor": "#9A9A9A"}
            patch["hatch"] = hatch
            for row, column in np.argwhere(cells):
                corner = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, linewidth=0, **patch))
            if cells.any():
                seen.append(Patch(label=why, linewidth=0, **patch))
        _name_cells(axes, rows, columns)

        scale = figure.colorbar(image, ax=axes, label=label, aspect=24, pad=0.02)
        scale.outline.set_visible(False)
        for name, height in (marks or {}).items():
            scale.ax.axhline(height, color="white", linewidth=1.5)
            across = scale.ax.get_yaxis_transform()
            scale.ax.text(
                -0.3, height, name, transform=across, ha="right", va="center", size=8
            )
        figure.suptitle(title, x=0.01, ha="left", size=12)
        if seen:
            figure.legend(
                handles=seen, loc="outside lower left", ncols=len(seen), frameon=False
            )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    return path


def _grouped(names: Sequence[str | tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        ("", name) if isinstance(name, str) else (name[0], name[1]) for name in names
    ]


def _spans(names: list[tuple[str, str]]) -> list[tuple[str, int, int]]:
    """Neighbours of one group as (group, first, last)."""
    spans = []
    for i, (group, _) in enumerate(names):
        if spans and spans[-1][0] == group:
            spans[-1] = (group, spans[-1][1], i)
        else:
            spans.append((group, i, i))
    return spans


def _name_cells(axes, rows: list[tuple[str, str]], columns: list[tuple[str, str]]):
    """Names at the left and above, their groups beyond; gaps between the groups."""
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(columns)), [name for _, name in columns])
    axes.set_yticks(range(len(rows)), [name for _, name in rows])
    axes.tick_params(
        length=0, top=False, labeltop=True, bottom=False, labelbottom=False
    )
    for i in range(1, len(columns)):
        wide = columns[i][0] != columns[i - 1][0]
        axes.axvline(i - 0.5, color="white", linewidth=5 if wide else 1.2)
    for i in range(1, len(rows)):
        wide = rows[i][0] != rows[i - 1][0]
        axes.axhline(i - 0.5, color="white", linewidth=5 if wide else 1.2)

    if any(group for group, _ in columns):
        beyond = axes.secondary_xaxis("top")
        spans = _spans(columns)
        beyond.set_xticks(
            [(first + last) / 2 for _, first, last in spans],
            [f"{group}\n" for group, _, _ in spans],
            weight="bold",
        )
        beyond.tick_params(length=0)
        beyond.spines[:].set_visible(False)
    if any(group for group, _ in rows):
        longest = max(len(name) for _, name in rows)
        for group, first, last in _spans(rows):
            axes.annotate(
                group,
                (0, (first + last) / 2),
                xycoords=("axes fraction", "data"),
                xytext=(-16 - 6.6 * longest, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                weight="bold",
            )


_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "svg.hashsalt": "hope_jax",  # the same picture, the same file
}


def _cycled(count: int, values: Sequence[str] = COLOURS) -> list[str]:
    return [values[i % len(values)] for i in range(count)]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of a centred window of a twentieth of the curve, cut off at its ends."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start = np.maximum(at - half, 0)
    stop = np.minimum(at + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def _limits(curves, heights: list[float]) -> tuple[float, float]:
    """Room for every line, and not for the cliff at the start of training."""
    ends, starts = [], []
    for _, bits in curves.values():
        bits = np.asarray(bits, float)
        settled = _running_mean(bits)[len(bits) // 8 :]
        ends.append(settled.min())
        starts.append(settled.max())
    low, high = min(ends + heights), max(starts + heights)
    room = 0.08 * (high - low) or 0.1
    return max(0.0, low - room), high + room


def _label(axes, labels: list[tuple[float, str, str]]) -> None:
    """Names each line at its right end, moved apart where two would overlap."""
    labels = sorted(labels)
    low, high = axes.get_ylim()
    heights = np.array([height for height, _, _ in labels])
    placed = _apart(heights, 0.06 * (high - low), low, high)
    for (height, text, colour), at in zip(labels, placed, strict=True):
        across = axes.get_yaxis_transform()  # x in widths of the picture, y in data
        axes.plot(
            [1.012, 1.03, 1.037],
            [height, at, at],
            transform=across,
            color=colour,
            linewidth=0.8,
            clip_on=False,
        )
        axes.text(1.045, at, text, transform=across, va="center", color=colour)


def _apart(heights: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Rising `heights` at least `gap` apart, moved as little as that takes."""
    groups = []  # (sum of wishes for the lowest place, members)
    for i, height in enumerate(heights):
        groups.append((height - i * gap, 1))
        # Two groups that overlap become one, in the middle of its members' wishes.
        while len(groups) > 1:
            (a, m), (b, n) = groups[-2:]
            if a / m <= b / n:
                break
            groups[-2:] = [(a + b, m + n)]
    starts = np.repeat([total / n for total, n in groups], [n for _, n in groups])
    last = (len(heights) - 1) * gap
    return np.clip(starts, low, max(low, high - last)) + np.arange(len(heights)) * gap


def _short(value: float, _) -> str:
    """3,000,000 as 3M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
