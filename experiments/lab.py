"""What the experiments share: rows and seeds, result files, tables, curves, a command.

An experiment says what its rows are, how one of them is measured with one seed, and how
results read as a table; see `Experiment`. Its command measures what has no result file
yet, then prints the table of what there is:

    python -m experiments.NAME [--rows=A,B] [--seeds=0,1] [--scale=smoke --out=DIR]

With `--out=DIR` results and pictures go there, and so all is measured anew; without,
results go to experiments/results and pictures to runs/NAME.

What of it belongs to the table of evidence on the first page its module says in a
function `evidence(found)`, from the results of the full scale that there are; see
`Evidence`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from hope_jax.core import config as config_lib
from hope_jax.core.config import did_you_mean
from hope_jax.plot import COLOURS, Figure
from hope_jax.train import loop, metrics
from hope_jax.train.config import RunConfig
from hope_jax.train.folder import check_place
from launch import command

_KEPT = Path(__file__).parent / "results"
RESULTS = _KEPT if _KEPT.is_dir() else Path("results")  # installed, it has none


class Task(NamedTuple):
    """What one result file is of.

    Attributes:
      row: its name.
      config: of the row, with this seed if it has a field `seed`.
      seed: of all that is drawn.
      flags: of the command; `flags.scale` is always there.
      picture: a file for a picture of it.
    """

    row: str
    config: Any
    seed: int
    flags: Any
    picture: Path


class Evidence(NamedTuple):
    """A line of the table of evidence, which `launch.table --table=evidence` makes.

    Attributes:
      what: of which table or claim, of which models, on what.
      result: ours.
      paper: the paper's number, and where it is found.
      distance: of ours from it; what it is where not ours less the paper's.
      command: after `python -m experiments.`, or one that begins with `bash`; empty is
        the name of the module.
    """

    what: str
    result: str
    paper: str = "none"
    distance: str = ""
    command: str = ""


NO_TEXT = ("", "none")  # of a number that the paper does not have


def _nothing(define) -> None:
    """No flags but those that all have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment, and its command when it is called.

    Attributes:
      name: of its folder of results.
      doc: the docstring of its module, which `--helpshort` shows.
      rows: the flags of the command -> name and config of every row.
      measure: a task -> its metrics, flat: name to finite number.
      table: results in the order of rows and seeds, as `metrics.read_result` has
        them -> Markdown.
      scales: of the command; "full" is the default and the only one whose numbers go
        to `RESULTS`.
      seeds: those that are run by default. None if all is of seed 0, without a flag.
      define: defines flags of its own, as `launch.command.parse` says.
      saved: a task -> what its result file has as its config.
      draw: results, as `table` gets them -> a picture, which is kept beside them, or
        None where there is nothing to draw of them.
    """

    name: str
    doc: str
    rows: Callable[[Any], Mapping[str, Any]]
    measure: Callable[[Task], Mapping[str, float]]
    table: Callable[[Sequence[Mapping[str, Any]]], str]
    scales: tuple[str, ...] = ("full", "smoke")
    seeds: tuple[int, ...] | None = None
    define: Callable[[Any], None] = _nothing
    saved: Callable[[Task], Any] = lambda task: task.config
    draw: Callable[[Sequence[Mapping[str, Any]]], Figure | None] | None = None

    def __call__(self, arguments: Sequence[str] | None = None) -> str:
        """Measures what has no result file yet, and prints the table.

        Args:
          arguments: those of the process by default.

        Returns:
          The table, which is printed too.

        Raises:
          SystemExit: a wrong flag; the message is one line.
        """
        given = command.parse(self.doc, self._define, arguments)
        with command.fail_in_words():
            if given.scale != "full" and not given.out:
                raise ValueError(
                    f"--scale={given.scale} needs --out: {RESULTS} has the full scale."
                )
            check_place("--out", given.out or RESULTS)
            rows = self.rows(given)
            wanted = chosen(rows, given.rows)
            of = (0,) if self.seeds is None else seeds(given.seeds)
        command.quiet_libraries()
        folder = Path(given.out or RESULTS)
        pictures = Path(given.out or Path("runs") / self.name)
        place = pictures / f"{self.name}.png"
        other = []
        for seed, row in itertools.product(of, wanted):
            task = Task(row, _seeded(rows[row], seed), seed, given, place)
            config = self.saved(task)
            file = folder / self.name / f"{row}-s{seed}.json"
            if file.exists():
                other += _differences(file, given.scale, config)
                continue
            metrics.write_result(
                folder,
                experiment=self.name,
                row=row,
                scale=given.scale,
                seed=seed,
                config=config,
                metrics=self.measure(task),
            )
            # Every program maps memory, and a process may map only so much: after a
            # dozen language models compiling crashes.
            jax.clear_caches()
            print(f"{row}, seed {seed}: {file}", flush=True)
        if other:
            print(
                f"{len(other)} results are kept that are of other settings; to measure "
                f"one again remove its file.\n  {other[0]}"
            )
        found = results(folder, self.name, rows)
        made = self.table(found)
        print(made)
        picture = self.draw(found) if self.draw is not None and found else None
        if picture is not None:
            save(picture, folder / self.name / f"{self.name}.png")
        return made

    def _define(self, define) -> None:
        define.list("rows", [], "some rows, separated by commas; all by default")
        if self.seeds is not None:
            default = ",".join(map(str, self.seeds))
            define.string("seeds", default, "every row is run with each of them")
        define.enum("scale", "full", self.scales, "how much")
        define.string("out", None, "folder of results and pictures; needed but by full")
        self.define(define)


def comparison(
    *,
    name: str,
    doc: str,
    settings: Mapping[str, Any],
    compare: Callable[[Any], Any],
    summary: Callable[[Any, Any], Mapping[str, float]],
    draw: Callable[[Any, Any], Figure],
    table: Callable[[Sequence[Mapping[str, Any]]], str],
    **more: Any,
) -> Experiment:
    """An experiment of one row, `all`: what is compared shares its programs.

    Args:
      name, doc, table: as of `Experiment`.
      settings: scale -> config.
      compare: config -> what came out.
      summary: what came out, config -> metrics.
      draw: what came out, config -> its picture, which is saved.
      **more: of `Experiment`, in place of these.
    """

    def measure(task: Task) -> Mapping[str, float]:
        found = compare(task.config)
        save(draw(found, task.config), task.picture)
        return summary(found, task.config)

    made = {
        "rows": lambda flags: {"all": settings[flags.scale]},
        "scales": tuple(settings),
        "measure": measure,
    }
    return Experiment(name=name, doc=doc, table=table, **(made | more))


def trained(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """The log of a run; trains what of it is not trained yet.

    Raises:
      SystemExit: a signal ended the training, which is saved.
      hope_jax.train.loop.NonFinite: it diverged.
    """
    outcome = loop.train(config, folder, resume=True)
    if not outcome.finished:
        raise SystemExit(128 + outcome.stopped_by)
    return metrics.read_log(folder / "metrics.jsonl")


def best_rate(
    config: RunConfig, folder: Path, rates: Sequence[float]
) -> tuple[dict[str, float], Path | None]:
    """Trains with each rate, as `trained` does.

    Returns:
      `training/<rate>`, bits per byte of the last training rows, for each that was
      finite, and `rate`, which had the fewest; and the folder of its run, None if all
      diverged.
    """
    found, folders = {}, {}
    for rate in rates:
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
        folders[rate] = folder.with_name(f"{folder.name}-{rate:g}")
        tried = dataclasses.replace(config, optimizer=optimizer)
        try:
            log = trained(tried, folders[rate])
        except loop.NonFinite as error:
            print(error)
            continue
        found[rate] = training_bits(log, config.train.steps)
    bits = {f"training/{rate:g}": value for rate, value in found.items()}
    if not found:
        return bits, None
    best = min(found, key=found.__getitem__)
    return bits | {"rate": best}, folders[best]


def training_bits(log: Sequence[Mapping[str, Any]], end: int, steps: int = 50) -> float:
    """Bits per byte of the rows of the last steps, up to the step `end`."""
    last = [line["bits_per_byte"] for line in log if line["step"] > end - steps]
    return float(np.mean(last))


def _seeded(config: Any, seed: int) -> Any:
    return dataclasses.replace(config, seed=seed) if hasattr(config, "seed") else config


def _differences(file: Path, scale: str, config: Any) -> list[str]:
    """The file and what differs first, if what is kept is not what was asked for.

    Fields that were not there yet, or are no more, say nothing of that.
    """
    kept = metrics.read_result(file)
    if scale == kept["scale"] and _says_the_same(kept["config"], config):
        return []
    found = config_lib.differences(
        {"scale": kept["scale"], "config": kept["config"]},
        {"scale": scale, "config": config_lib.to_json(config)},
    )
    found = [line for line in found if "saved nothing" not in line]
    found = [line for line in found if not line.endswith("now nothing")]
    return [f"{file}: {found[0]}"] if found else []


def _says_the_same(saved: Any, config: Any) -> bool:
    """Whether what an earlier version saved is this config, perhaps in other words."""
    if not dataclasses.is_dataclass(config):
        return False
    try:
        return config_lib.from_json(type(config), saved) == config
    except ValueError:
        return False


def results(folder: Path, name: str, rows: Iterable[str]) -> list[Mapping[str, Any]]:
    """All results that there are of some rows, in their order and that of seeds."""
    found = {row: [] for row in rows}
    for result in metrics.read_results(folder, name):
        if result["row"] in found:
            found[result["row"]].append(result)
    return [r for of in found.values() for r in sorted(of, key=lambda r: r["seed"])]


def values(
    found: Iterable[Mapping[str, Any]], row: str, metric: str
) -> dict[int, float]:
    """A metric of a row, by seed, as far as results have it.

    >>> result = {"row": "sgd", "seed": 0, "metrics": {"loss": 1.5}}
    >>> values([result], "sgd", "loss"), values([result], "adam", "loss")
    ({0: 1.5}, {})
    """
    return {
        result["seed"]: result["metrics"][metric]
        for result in found
        if result["row"] == row and metric in result["metrics"]
    }


def quotient(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    """`a / b` of the seeds that both have.

    >>> quotient({0: 1.0, 1: 3.0}, {1: 2.0})
    {1: 1.5}
    """
    return {seed: a[seed] / b[seed] for seed in a if seed in b}


def compared(
    what: str,
    ours: Mapping[int, float],
    paper: float | None = None,
    form: str = "{:.3f}",
    *,
    where: str = "",
    command: str = "",
) -> list[Evidence]:
    """A line of evidence: the mean of ours beside a number of the paper, or none.

    Args:
      what, command: as of `Evidence`.
      ours: by seed; where there are several their range is told too.
      paper: its number; None if it has none.
      form: how numbers are written, what they are counted in after it.
      where: it is found in the paper.

    Returns:
      No line where ours was not measured.

    >>> (line,) = compared("parity", {0: 98.0, 1: 99.0}, 100.0, "{:.1f} %", where="T 5")
    >>> line.result, line.paper, line.distance
    ('98.5 % (98.0 to 99.0)', '100.0 % (T 5)', '-1.5 %')
    """
    if not ours:
        return []
    mean, number = float(np.mean([*ours.values()])), form.partition("}")[0] + "}"
    said = form.format(mean)
    if len(ours) > 1:
        low, high = min(ours.values()), max(ours.values())
        said += f" ({number.format(low)} to {number.format(high)})"
    if paper is None:
        return [Evidence(what, said, command=command)]
    theirs = form.format(paper) + (f" ({where})" if where else "")
    away = form.replace("{:", "{:+z").format(mean - paper)
    return [Evidence(what, said, theirs, away, command)]


def claimed(
    what: str,
    ours: Mapping[int, float],
    claim: str,
    holds: Callable[[float], bool],
    form: str = "{:.3f}",
    *,
    command: str = "",
) -> list[Evidence]:
    """As `compared`, beside a claim that the paper makes without a number.

    Args:
      claim: in words.
      holds: of the mean of ours, whether it is so here.

    >>> lines = claimed("a over b", {0: 1.2}, "below 1", lambda ratio: ratio < 1)
    >>> lines[0].paper, lines[0].distance
    ('below 1', 'not so here')
    """
    so = bool(ours) and holds(float(np.mean([*ours.values()])))
    said = {"paper": claim, "distance": "so here" if so else "not so here"}
    lines = compared(what, ours, form=form, command=command)
    return [line._replace(**said) for line in lines]


def abreast(what: str, parts: Mapping[str, Sequence[Evidence]]) -> list[Evidence]:
    """One line of several: of each part that was measured, its name and its numbers.

    >>> parts = {"S3": compared("", {0: 0.5}, 1.0), "A5": compared("", {0: 0.25})}
    >>> (line,) = abreast("accuracy", parts | {"S5": []})
    >>> line.result, line.paper, line.distance
    ('S3: 0.500, A5: 0.250', 'S3: 1.000', 'S3: -0.500')
    """
    there = {name: line for name, lines in parts.items() for line in lines}
    if not there:
        return []

    def told(field: str) -> str:
        said = {name: getattr(line, field) for name, line in there.items()}
        return ", ".join(f"{name}: {t}" for name, t in said.items() if t not in NO_TEXT)

    first = next(iter(there.values()))
    paper = told("paper") or "none"
    return [Evidence(what, told("result"), paper, told("distance"), first.command)]


def chosen(
    rows: Iterable[str], wanted: Sequence[str], flag: str = "rows", what: str = "row"
) -> list[str]:
    """The rows that `--rows` names, or all.

    Raises:
      ValueError: there is no such row.
    """
    rows, wanted = list(rows), list(dict.fromkeys(filter(None, wanted)))
    for name in wanted:
        if name not in rows:
            raise ValueError(
                f"--{flag}: no {what} {name!r}; there are {', '.join(rows)}."
                + did_you_mean(name, rows)
            )
    return wanted or rows


def listed(text: str) -> list[str]:
    """The parts of a flag between its commas.

    >>> listed("a, b,,a")
    ['a', 'b', 'a']
    """
    return [part.strip() for part in text.split(",") if part.strip()]


def seeds(text: str) -> list[int]:
    """The numbers of `--seeds`, each once.

    Raises:
      ValueError: something that is no seed.
    """
    parts = list(dict.fromkeys(listed(text)))
    if not parts or not all(part.isdigit() and int(part) < 2**32 for part in parts):
        raise ValueError(
            f"--seeds must be whole numbers from 0 to 2**32 - 1, as in 0,1,2; got "
            f"{text!r}."
        )
    return [int(part) for part in parts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Learning rates that all that is compared tries: one budget.

    Attributes:
      low, high: the least and the largest.
      rates: how many, even in their logarithm.
    """

    low: float
    high: float
    rates: int

    def tried(self) -> np.ndarray:
        """The rates."""
        return np.geomspace(self.low, self.high, self.rates)

    def best(self, scores: np.ndarray, trials: int | None = None) -> np.ndarray:
        """The index of the least score along the first axis; NaN and inf never win.

        Args:
          scores: `[trials, ...]`, in the order in which all was tried.
          trials: how many there had to be, `rates` by default.

        Raises:
          ValueError: the budget was overdrawn, or not used up.
        """
        budget = self.rates if trials is None else trials
        if len(scores) != budget:
            raise ValueError(
                f"{len(scores)} trials were made, but everything has {budget}."
            )
        return np.where(np.isfinite(scores), scores, np.inf).argmin(axis=0)


def table(
    columns: Sequence[str], lines: Iterable[Sequence[Any]], words: int = 1
) -> str:
    """A Markdown table; `words` columns are set to the left, the others to the right.

    >>> print(table(["rule", "steps"], [["momentum", 110]]))
    | rule | steps |
    |---|---:|
    | momentum | 110 |
    """
    rule = "|---" * words + "|---:" * (len(columns) - words) + "|"
    cells = ([*map(str, line)] for line in [columns, *lines])
    head, *rest = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([head, rule, *rest])


def cell(
    of: Mapping[int, float],
    form: str = "{:.3f}",
    best: Callable[[Iterable[float]], float] = max,
) -> str:
    """Of a number by seed its mean, and of seeds that differ their standard deviation
    and the best; nothing of none.

    >>> cell({0: 0.5}), cell({0: 0.5, 1: 1.0}, "{:.2f}", min), cell({})
    ('0.500', '0.75 ± 0.25 (0.50)', '')
    """
    numbers = np.array([*of.values()])
    if not len(numbers):
        return ""
    said = form.format(numbers.mean())
    if np.ptp(numbers) == 0:
        return said
    return f"{said} ± {form.format(numbers.std())} ({form.format(best(numbers))})"


def ranked(
    found: Iterable[Mapping[str, Any]],
    names: Iterable[str],
    columns: Mapping[str, str],
    *,
    by: str,
    head: str,
    places: Callable[[Mapping[str, Any]], Iterable[str]] = lambda config: [""],
    missing: str = "never",
) -> str:
    """Results of what was compared: a table a place, a line a name, the best first.

    Args:
      found: results with metrics `name_measure` or, with a place, `name_place_measure`.
      names: what was compared.
      columns: title -> format of its cells, whose fields are measures.
      by: the measure that orders the lines, the least first.
      head: a line above the tables, whose fields are of the config or metrics.
      places: config -> where all was compared.
      missing: stands in cells with a measure that there is not.

    >>> metrics = {"sgd_loss": 1.0, "adam_loss": 0.5, "adam_steps": 70}
    >>> result = {"row": "all", "config": {"seeds": 5}, "metrics": metrics}
    >>> columns = {"loss": "{loss:.2f}", "steps": "{steps}"}
    >>> more = {"by": "loss", "head": "{seeds} seeds"}
    >>> print(ranked([result], ["sgd", "adam"], columns, **more))
    5 seeds
    <BLANKLINE>
    | all | loss | steps |
    |---|---:|---:|
    | adam | 0.50 | 70 |
    | sgd | 1.00 | never |
    """
    parts = []
    for result in found:
        numbers = result["metrics"]
        parts.append(head.format_map({**result["config"], **numbers}))
        for place in places(result["config"]):
            lines = []
            for name in names:
                at = f"{name}_{place}_" if place else f"{name}_"
                own = {k[len(at) :]: v for k, v in numbers.items() if k.startswith(at)}
                cells = [_cell(form, own, missing) for form in columns.values()]
                lines.append((own.get(by, np.inf), [name, *cells]))
            lines = [line for _, line in sorted(lines, key=lambda line: line[0])]
            parts.append(table([place or result["row"], *columns], lines))
    return "\n\n".join(parts)


def _cell(form: str, numbers: Mapping[str, float], missing: str) -> str:
    try:
        return form.format_map(numbers)
    except KeyError:
        return missing


def spread(name: str, values: np.ndarray, **how: Any) -> dict[str, float]:
    """The mean of runs under a name, and their standard deviation.

    >>> spread("loss", np.array([1.0, 3.0]))
    {'loss': 2.0, 'loss_sd': 1.0}
    """
    return {name: float(values.mean()), f"{name}_sd": float(values.std(**how))}


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean of independent numbers, and half of its 95 % interval (Student's).

    >>> mean, half = interval(np.array([1.0, 2.0, 3.0]))
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    count = len(values)
    wide = float(stats.t.ppf(0.975, count - 1)) if count > 1 else np.inf
    deviation = float(np.std(values, ddof=1)) if count > 1 else 1.0
    return float(np.mean(values)), wide * deviation / count**0.5


def below(values: np.ndarray, than: np.ndarray) -> tuple[float, float]:
    """By which share the mean of `values` is below that of `than`, run by run, and half
    of the 95 % interval of that share (of a ratio of means, to first order).

    >>> share, half = below(np.array([1.0, 3.0]), np.array([4.0, 12.0]))
    >>> round(share, 3), round(half, 3)
    (0.75, 0.0)
    """
    ratio = values.mean() / than.mean()
    _, half = interval(values - ratio * than)
    return float(1.0 - ratio), half / abs(float(than.mean()))


def flat(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Measures of what was compared, as `ranked` reads them; those that are finite.

    >>> flat({"sgd": {"loss": 1.0, "steps": np.inf}})
    {'sgd_loss': 1.0}
    """
    numbers = {f"{at}_{key}": v for at, of in found.items() for key, v in of.items()}
    return {key: v for key, v in numbers.items() if np.isfinite(v)}


def style(number: int, name: str) -> dict[str, str]:
    """Colour, dashes and label of a curve; 12 numbers are told apart."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "ls": ("-", "--")[number // len(COLOURS) % 2],
        "label": name.replace("_", " "),
    }


def band(axes: Axes, at: Any, runs: np.ndarray, *, spread: str = "range", **line):
    """The mean of `runs`, `[R, N]`, over `at`, and a band: their range or deviation."""
    mean, deviation = runs.mean(axis=0), runs.std(axis=0)
    low, high = runs.min(axis=0), runs.max(axis=0)
    if spread == "deviation":
        low, high = mean - deviation, mean + deviation
    (drawn,) = axes.plot(at, mean, **line)
    axes.fill_between(at, low, high, color=drawn.get_color(), alpha=0.12, lw=0)
    return drawn


def points(axes: Axes, names: Sequence[str], series: Mapping[str, Any]) -> None:
    """A line a name, the first on top; on it, for each of `series`, mean and range.

    Args:
      axes: where.
      names: of the lines.
      series: label -> `[R]` numbers of every name.
    """
    at = np.arange(len(names))
    for i, (label, runs) in enumerate(series.items()):
        runs = np.stack(list(runs))
        mean, shift = runs.mean(axis=1), 0.4 * (i + 0.5) / len(series) - 0.2
        ends = mean - runs.min(axis=1), runs.max(axis=1) - mean
        line = {"fmt": "o", "ms": 4, "lw": 1.2, "label": label, "color": COLOURS[i]}
        axes.errorbar(mean, at + shift, xerr=ends, **line)
    axes.set_yticks(at, [name.replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", lw=0.3)


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Names the lines of `axes` below the figure, once for all of its panels."""
    lines, names = axes.get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": columns}
    figure.legend(lines, names, handlelength=3, frameon=False, **place)


def save(figure: Figure, file: Path) -> None:
    """Writes a picture, and says where."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    print(f"picture: {file}")
