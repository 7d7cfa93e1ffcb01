"""Pictures of runs and of systems. Each function returns a `Figure`.

A notebook shows it where it is the last value of a cell; `figure.savefig(path)` writes
it, in the format of the suffix (png, svg, pdf).
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import FuncFormatter

from hope_jax.core.system import Edge, System, human, period

if TYPE_CHECKING:
    from hope_jax.evaluate.telemetry import Timeline

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#555555"
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
    "hatch.linewidth": 0.8,
    "savefig.dpi": 160,
    "svg.hashsalt": "hope_jax",  # the same picture, the same file
}


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that shows itself in a notebook.

    It is its caller's alone: pyplot does not know of it, so nothing has to be closed,
    and it needs no backend. Arguments are those of matplotlib's. It is saved in the
    style in which it was made.

    >>> figure = Figure(figsize=(4, 3))
    >>> line = figure.add_subplot().plot([3, 2, 1])
    >>> shown, size = figure._repr_png_()  # what a notebook asks for
    >>> shown[:4], size
    (b'\\x89PNG', {'width': 400, 'height': 300})
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._style = {key: matplotlib.rcParams[key] for key in _STYLE}

    def savefig(self, *args, **kwargs):
        with matplotlib.rc_context(self._style):
            super().savefig(*args, **kwargs)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        file = io.BytesIO()
        self.savefig(file, format="png")
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return file.getvalue(), {"width": width, "height": height}


@matplotlib.rc_context(_STYLE)
def loss_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    lines: Mapping[str, float] | None = None,
    marks: Mapping[str, float] | None = None,
    xlabel: str = "training tokens",
    ylabel: str = "loss",
    title: str = "",
    note: str = "",
) -> Figure:
    """Draws a loss against the tokens read.

    Args:
      curves: name -> (tokens read, losses). Drawn faint as given and strong as a
        running mean, for a training loss is a noisy thing.
      lines: name -> loss of something that does not train, a level line.
      marks: name of a curve -> loss of the same model elsewhere, as on validation text,
        a dot at the curve's end.
      xlabel, ylabel: what is read, and what the loss is.
      title: said above the picture.
      note: said in its upper right corner.

    Raises:
      ValueError: no curves; a curve with no points or of unequal lengths; a mark
        without its curve.

    >>> figure = loss_curves({"mine": ([10, 20, 30], [2.0, 1.5, 1.2])}, ylabel="nats")
    >>> figure.axes[0].get_ylabel()
    'nats'
    """
    lines, marks = dict(lines or {}), dict(marks or {})
    if not curves:
        raise ValueError("curves is empty; give at least one to draw.")
    for name, (tokens, losses) in curves.items():
        if len(tokens) != len(losses) or not len(tokens):
            raise ValueError(
                f"curve {name!r} has {len(tokens)} numbers of tokens and {len(losses)} "
                "losses; it needs as many of both, and at least one."
            )
    for name in marks:
        if name not in curves:
            raise ValueError(f"mark {name!r} has no curve; curves: {', '.join(curves)}")

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    labels = []  # (height, text, colour), to the right of the picture
    for colour, (name, (tokens, losses)) in zip(
        _cycled(len(curves)), curves.items(), strict=True
    ):
        tokens, losses = np.asarray(tokens, float), np.asarray(losses, float)
        smooth = _running_mean(losses)
        axes.plot(tokens, losses, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(tokens, smooth, color=colour, linewidth=2.0)
        text, height = f"{name}, training" if marks else name, smooth[-1]
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
    axes.set_xlim(0, last or 1.0)
    axes.set_ylim(*_limits(curves, [*lines.values(), *marks.values()]))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left")
    _label(axes, labels)
    if note:
        axes.text(
            0.995,
            0.98,
            note,
            transform=axes.transAxes,
            ha="right",
            va="top",
            color=_GREY,
            fontsize=9,
        )
    return figure


@matplotlib.rc_context(_STYLE)
def level_timeline(timeline: "Timeline", *, title: str = "") -> Figure:
    """Draws what levels and memories did along a text.

    Levels of the CMS, and starts of memories that are levels: how far each is from
    where it started, with a tick at every move; and on a log scale the norm of what it
    had learned since its last move (line) and the length of the moves (dots). Memories:
    how far they are from where they started; how well they recall the last pairs of
    each piece, and did before they had read it (dotted); and their half-lives. Numbers
    are of all layers and heads together (`Timeline.columns`).

    Args:
      timeline: of `hope_jax.evaluate.telemetry.follow`.
      title: said above the picture.

    Raises:
      ValueError: nothing in it learns while reading.
    """
    levels, memories = timeline.levels, timeline.memories
    panels = ["distance", "steps"] * bool(levels)
    panels += ["memories", "recall", "half-lives"] * bool(memories)
    if not panels:
        raise ValueError("timeline has neither CMS levels nor memories to draw.")
    figure = Figure(figsize=(8.4, 0.9 + 1.75 * len(panels)), layout="constrained")
    drawn = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    places = dict(zip(panels, drawn, strict=True))
    columns, at = timeline.columns(), timeline.position
    if levels:
        _draw_levels(places["distance"], places["steps"], levels, columns, at)
    if memories:
        _draw_memories(places, memories, columns, at)
    for axes in drawn:
        axes.set_xlim(0, 1.01 * at[-1])  # room for the last dots
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.yaxis.label.set_size(9.5)
        axes.tick_params(axis="y", labelsize=9.5)
    drawn[-1].set_xlabel("tokens read")
    drawn[0].set_title(title, loc="left")
    return figure


def _draw_levels(distances, steps, levels, columns, at):
    labels = []
    for colour, line in zip(_cycled(len(levels)), levels, strict=True):
        name, moved = line.name, line.moved
        far = columns[f"{name} distance"]
        distances.step(
            np.r_[0, at], np.r_[0.0, far], where="post", color=colour, linewidth=1.8
        )
        # Ticks stand on the line, so that levels that move together do not cover one
        # another.
        distances.plot(at[moved], far[moved], "|", color=colour, markersize=11)
        said = f"{name}, every {line.period:,}"
        labels.append((float(far[-1]), said, colour))
        steps.plot(at, columns[f"{name} gradient"], color=colour, linewidth=1.2)
        steps.plot(
            at[moved], columns[f"{name} move"][moved], "o", color=colour, markersize=4
        )
    distances.set_ylabel("levels: from\ntheir start")
    distances.set_ylim(bottom=0.0)
    if not any(line.moved.any() for line in levels):
        distances.set_ylim(0.0, 1.0)
    _label(distances, labels, gap=0.15)
    steps.set_yscale("log")
    steps.set_ylabel("levels: gradient\nand move")
    _legend(
        steps, ("learned since its last move", "-", ""), ("length of a move", "", "o")
    )


def _draw_memories(places, memories, columns, at):
    far, recall, lives = (places[p] for p in ("memories", "recall", "half-lives"))
    labels, finite = [], False
    # The other way round than levels, so that neighbours in a picture differ.
    colours = _cycled(len(memories), COLOURS[::-1])
    for colour, line in zip(colours, memories, strict=True):
        column = lambda what, name=line.name: columns[f"{name} {what}"]  # noqa: E731
        width: Any = {"color": colour, "linewidth": 1.8}
        far.plot(at, column("distance"), **width)
        labels.append((float(column("distance")[-1]), line.name, colour))
        recall.plot(at, column("recall"), **width)
        recall.plot(at, column("before"), color=colour, linewidth=1.2, linestyle=":")
        half_life = column("half_life")
        if np.isfinite(half_life).any():
            lives.plot(at, np.where(half_life < np.inf, half_life, np.nan), **width)
            finite = True
    far.set_ylabel("memories: from\ntheir start")
    far.set_ylim(bottom=0.0)
    _label(far, labels, gap=0.15)
    recall.set_ylabel("recall of the\nlast pairs, cosine")
    _legend(recall, ("after the piece", "-", ""), ("before it", ":", ""))
    lives.set_ylabel("half-life,\ntokens")
    lives.margins(y=0.15)
    lives.set_ylim(bottom=0.0)
    lives.yaxis.set_major_formatter(FuncFormatter(_short))
    if not finite:
        lives.text(
            *(0.5, 0.5, "nothing is forgotten"),
            transform=lives.transAxes,
            ha="center",
            color=_GREY,
        )


def _legend(axes, *said: tuple[str, Any, str]):
    """What line styles and markers mean, in grey, to the right of the picture."""
    lines = [
        Line2D([], [], color=_GREY, linestyle=style, marker=marker, ms=4, label=text)
        for text, style, marker in said
    ]
    axes.legend(
        handles=lines,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=9.5,
    )


@matplotlib.rc_context({**_STYLE, "axes.grid": False})
def heat_map(
    values: Sequence[Sequence[float]] | np.ndarray,
    *,
    rows: Sequence[str | tuple[str, str]],
    columns: Sequence[str | tuple[str, str]],
    hatched: Mapping[str, Sequence[Sequence[bool]] | np.ndarray] | None = None,
    marks: Mapping[str, float] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    label: str = "accuracy",
    title: str = "",
) -> Figure:
    """Draws a number a cell, as colour and as digits.

    Args:
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
        style: dict[str, Any] = {"facecolor": "#F4F4F4", "edgecolor": "#9A9A9A"}
        style["hatch"] = hatch
        for row, column in np.argwhere(cells):
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, linewidth=0, **style))
        if cells.any():
            seen.append(Patch(label=why, linewidth=0, **style))
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
    return figure


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
    for _, losses in curves.values():
        losses = np.asarray(losses, float)
        settled = _running_mean(losses)[len(losses) // 8 :]
        ends.append(settled.min())
        starts.append(settled.max())
    low, high = min(ends + heights), max(starts + heights)
    room = 0.08 * (high - low) or 0.1
    return (low - room if low < 0 else max(0.0, low - room)), high + room


def _label(axes, labels: list[tuple[float, str, str]], gap: float = 0.06) -> None:
    """Names each line at its right end, moved apart where two would overlap; `gap` is
    the height of a name, in heights of the picture."""
    labels = sorted(labels)
    low, high = axes.get_ylim()
    heights = np.array([height for height, _, _ in labels])
    placed = _apart(heights, gap * (high - low), low, high)
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


_STYLES = {  # colour (safe for the colour-blind), line style, what the legend says
    "condition": ("#0072B2", "-", "condition (parameters)"),
    "attend": ("#56B4E9", (0, (1, 1)), "attend (context)"),
    "backprop": ("#D55E00", "-", "backprop (one gradient flow)"),
    "initialise": ("#009E73", (0, (5, 2)), "initialise (where it starts)"),
    "generate": ("#CC79A7", (0, (4, 1, 1, 1)), "generate (weights or context)"),
}
_WIDTH, _HEIGHT, _PITCH = 1.5, 0.84, 1.8  # of a box, and between boxes; inches


@matplotlib.rc_context({**_STYLE, "font.size": 13})
def draw(
    system: System,
    *,
    ylabel: str = "update frequency (log scale, faster upwards)",
    title: str = "",
) -> Figure:
    """Draws `system`: levels by update frequency (upwards, log), edges by kind.

    Edges that gradients do not cross are pale.

    Args:
      system: boxes appear from left to right in its order.
      ylabel: what is upwards.
      title: said above the picture.
    """
    heights = _heights(system)
    places = {
        box.name: (i * _PITCH, heights[box.clock.frequency()])
        for i, box in enumerate(system.boxes)
    }
    width, top = max(len(places), 2) * _PITCH, max(heights.values())
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    axes.set_xlim(-0.6 * _PITCH, width - 0.4 * _PITCH)

    patches = {}
    for box in system.boxes:
        x, y = places[box.name]
        patches[box.name] = axes.add_patch(
            FancyBboxPatch(
                (x - _WIDTH / 2, y - _HEIGHT / 2),
                _WIDTH,
                _HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.08",
                facecolor="#F7F7F5",
                edgecolor="#333333",
                zorder=3,
            )
        )
        # text, height above the middle, size, most letters of that size, look
        for text, up, size, most, look in (
            (box.name, 0.2, 12.5, 11, {"weight": "bold"}),
            (human(box.parameters), -0.06, 10.0, 17, {"color": _GREY}),
            (box.rule, -0.26, 10.0, 17, {"color": _GREY}),
        ):
            size = min(size, size * most / max(len(text), 1))
            middle: Any = {"ha": "center", "va": "center", "zorder": 4} | look
            axes.text(x, y + up, text, size=size, **middle)

    taken = []
    for edge in system.edges:
        colour, line, _ = _STYLES[edge.kind]
        start_at, end_at = places[edge.source], places[edge.target]
        clip = {"patchA": patches[edge.source], "patchB": patches[edge.target]}
        if edge.source == edge.target:  # a loop on top of the box
            (x, y), clip, bend = start_at, {}, -1.2
            start_at = (x - _WIDTH / 4, y + _HEIGHT / 2)
            end_at = (x + _WIDTH / 4, y + _HEIGHT / 2)
        else:
            bend = _bend(edge, places, taken)
        axes.add_patch(
            FancyArrowPatch(
                start_at,
                end_at,
                **clip,
                connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-|>",
                mutation_scale=12,
                color=colour,
                linestyle=line,
                linewidth=1.6,
                alpha=1.0 if edge.differentiable else 0.5,
                shrinkA=1,
                shrinkB=2,
                zorder=2,
            )
        )

    reach = [y for curve in taken for _, y in curve]
    low, high = min([-0.4, *reach]) - 0.3, max([top + 0.5, *reach]) + 0.3
    axes.set_ylim(low, high)
    figure.set_size_inches(width + 1.9, high - low + 0.9)
    clocks = {box.clock.frequency(): period(box.clock) for box in system.boxes}
    axes.set_yticks([heights[f] for f in clocks], clocks.values())
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left")
    axes.set_xticks([])
    axes.grid(axis="y", color="#DDDDDD", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    kinds = [kind for kind in _STYLES if any(e.kind == kind for e in system.edges)]
    if kinds:
        figure.legend(
            handles=[
                Line2D([], [], color=c, linestyle=s, linewidth=1.6, label=label)
                for c, s, label in (_STYLES[kind] for kind in kinds)
            ],
            loc="outside lower center",
            ncols=min(len(kinds), 3),
            frameon=False,
        )
    return figure


def _heights(system: System) -> dict[float, float]:
    """Where each frequency stands, in inches: log scale, with room for the boxes."""
    frequencies = sorted({box.clock.frequency() for box in system.boxes})
    heights, y = {}, 0.0
    for before, frequency in zip([None, *frequencies], frequencies, strict=False):
        if before is not None:
            gap = 1.25
            if 0 < before and frequency < math.inf:
                gap = min(max(0.3 * math.log2(frequency / before), gap), 2.0)
            y += gap
        heights[frequency] = y
    return heights


def _bend(edge: Edge, places: dict, taken: list) -> float:
    """How far to bend an edge so that it keeps clear of boxes and of other edges."""
    (xa, ya), (xb, yb) = places[edge.source], places[edge.target]
    others = [p for n, p in places.items() if n not in (edge.source, edge.target)]
    times = [i / 40 for i in range(41)]

    def curve(bend):  # what matplotlib's arc3 draws
        xc = (xa + xb) / 2 + bend * (yb - ya)
        yc = (ya + yb) / 2 - bend * (xb - xa)
        return [
            (
                (1 - t) ** 2 * xa + 2 * t * (1 - t) * xc + t**2 * xb,
                (1 - t) ** 2 * ya + 2 * t * (1 - t) * yc + t**2 * yb,
            )
            for t in times
        ]

    def cost(bend):
        points = curve(bend)
        hidden = sum(
            abs(x - u) < _WIDTH / 2 + 0.06 and abs(y - v) < _HEIGHT / 2 + 0.06
            for x, y in points
            for u, v in others
        )
        crowded = sum(
            any(abs(x - u) < 0.09 and abs(y - v) < 0.09 for u, v in other)
            for x, y in points[5:-5]
            for other in taken
        )
        return 10 * hidden + crowded + 4 * abs(bend)

    bends = [sign * step / 20 for step in range(0, 17) for sign in (-1, 1)]
    between = [x for x, y in others if y == ya and min(xa, xb) < x < max(xa, xb)]
    if ya == yb and between:  # over the boxes of its own row, longer edges higher
        bends = [-2 * (0.4 + 0.2 * len(between)) / (xb - xa)]
    best = min(bends, key=cost)
    taken.append(curve(best))
    return best
