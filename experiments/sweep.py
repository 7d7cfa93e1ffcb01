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

import dataclasses
import functools
import itertools
import json
import math
import sys
import time
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

from experiments import lab
from hope_jax import optim, plot
from hope_jax.core import config as config_lib
from hope_jax.core.config import did_you_mean
from hope_jax.core.level import Fast, Slow, hope_update
from hope_jax.data.synthetic.recall import RecallConfig, batch
from hope_jax.evaluate import recall
from hope_jax.memory import compose, named
from hope_jax.memory import rule as rule_lib
from hope_jax.memory.compose import MemoryConfig
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.base import MixerConfig
from hope_jax.models.mixers.memory import MemoryMixerConfig
from hope_jax.stream.reader import reader_of
from hope_jax.train import metrics
from hope_jax.train import state as state_lib
from hope_jax.train.config import OptimizerConfig
from hope_jax.train.folder import check_folder
from launch import command

GRIDS = ("miras", "named")
DEFAULTS = {
    "architecture": "linear,mlp",
    "bias": "dot,l2",
    "retention": "none,decay",
    "rule": "gd,momentum",
}
CHOICES = tuple(DEFAULTS)
COLUMNS = (
    *("point", *CHOICES, "chunk", "seed", "status"),
    *("accuracy", "loss", "steps", "tokens_per_second", "seconds"),
)
_TABLE, _PICTURE = "sweep.json", "sweep.png"
DONE, REFUSED, NOT_FINITE = "done", "refused", "not finite"
_STRIDE = 20  # steps of one call of the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What all points of a sweep share; any field can be set with --set.

    Attributes:
      task: what is learned.
      mixer: the layer and the memory that the four choices of a grid are put into.
        Named points bring their own.
      gradients: tried in this order; a memory has the first that it accepts. Exact
        memories have the chunk as a speed knob, anchored ones as part of the function.
      d_model, layers, heads, hidden: sizes of the model and of its MLPs.
      optimizer: of the outermost level.
      batch: rows of a step.
      steps: most steps of a point, over which its learning rate falls.
      seconds: most seconds of a point, its compilation apart.
      evaluation: batches, never trained on, that a point is scored on.
    """

    task: RecallConfig = RecallConfig(vocab=64, pairs=6, length=32)
    mixer: MemoryMixerConfig = MemoryMixerConfig(
        memory=MemoryConfig(dgd="none", chunk=8, expansion=2)
    )
    gradients: tuple[Literal["exact", "anchored"], ...] = ("exact", "anchored")
    d_model: int = 32
    layers: int = 2
    heads: int = 2
    hidden: int = 32
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-2, warmup_steps=20, weight_decay=0.0
    )
    batch: int = 32
    steps: int = 400
    seconds: float = math.inf
    evaluation: int = 16

    def __post_init__(self):
        if not self.gradients:
            raise ValueError("gradients must name 'exact', 'anchored' or both.")
        for name in ("batch", "steps", "evaluation"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}.")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) exceeds steps "
                f"({self.steps}); --set a shorter warm-up."
            )


class Point(NamedTuple):
    """One cell of the heat map.

    Attributes:
      name: of its rows in the table.
      cell: row and column in the heat map, each a group and a name.
      choices: architecture, bias, retention and rule, in words.
      chunk: kind and length of its chunks.
      model: what is trained; None if refused.
      reason: why it is refused.
    """

    name: str
    cell: tuple[tuple[str, str], tuple[str, str]]
    choices: tuple[str, str, str, str]
    chunk: str
    model: ModelConfig | None
    reason: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """Its row in the table before there are results."""
        known = {"point": self.name, **dict(zip(CHOICES, self.choices, strict=True))}
        return dict.fromkeys(COLUMNS) | known | {"chunk": self.chunk}


def options(choice: str) -> tuple[str, ...]:
    """What there is of one of the four choices; rules also by `optax.<name>`."""
    if choice == "rule":
        return compose.RULES
    return typing.get_args(typing.get_type_hints(MemoryConfig)[choice])


def miras(config: SweepConfig, choices: Mapping[str, Sequence[str]]) -> list[Point]:
    """Every product of `choices`, those that are refused too.

    Raises:
      ValueError: no such choice; lists those that exist.
    """
    for choice in CHOICES:
        _known(choice, choices[choice], options(choice))
    products = itertools.product(*(dict.fromkeys(choices[c]) for c in CHOICES))
    return [_product(config, product) for product in products]


def _product(config: SweepConfig, choices: tuple[str, str, str, str]) -> Point:
    architecture, bias, retention, rule = choices
    cell = ((architecture, bias), (retention, rule))
    reasons = []
    for gradient in config.gradients:
        try:
            memory = dataclasses.replace(
                config.mixer.memory,
                **dict(zip(CHOICES, choices, strict=True)),
                gradient=gradient,
            )
            mixer = dataclasses.replace(config.mixer, memory=memory)
            model = model_for(config, mixer)
        except ValueError as error:
            reasons.append(str(error))
            continue
        chunk = f"{gradient} {memory.chunk}"
        return Point("/".join(choices), cell, choices, chunk, model)
    # Better what the choices lack than that the first gradient is not for them.
    about_choices = [r for r in reasons if not r.startswith("gradient=")]
    reason = (about_choices or reasons)[0]
    return Point("/".join(choices), cell, choices, "", None, reason)


def published(config: SweepConfig, names: Sequence[str] = ()) -> list[Point]:
    """The named points, or some of them; their chunks as in `config`.

    Raises:
      ValueError: no such point; lists those that exist.
    """
    names = list(dict.fromkeys(names)) or list(named.POINTS)
    for name in names:
        named.get(name)  # refuses an unknown one
    return [_published(config, name) for name in names]


def _published(config: SweepConfig, name: str) -> Point:
    point = named.get(name)
    column = ("", "accuracy")
    if point.memory is None:
        cell = (("non-parametric", name), column)
        return Point(name, cell, ("",) * 4, point.chunk, model_for(config, name))
    cell = ((point.memory.architecture, name), column)
    choices = named.choices(point.memory)
    memory = dataclasses.replace(point.memory, chunk=config.mixer.memory.chunk)
    chunk = f"{point.chunk} {memory.chunk}"
    try:
        mixer = dataclasses.replace(config.mixer, memory=memory, gates=point.gates)
        return Point(name, cell, choices, chunk, model_for(config, mixer))
    except ValueError as error:
        return Point(name, cell, choices, chunk, None, str(error))


def model_for(config: SweepConfig, mixer: MixerConfig | str) -> ModelConfig:
    """The language model that a point is trained as; `mixer` or its kind.

    Raises:
      ValueError: sizes or choices that do not go together.
    """
    made = ModelConfig(
        name="sweep",
        vocab=config.task.vocab,
        d_model=config.d_model,
        layers=config.layers,
        heads=config.heads,
        mixer=mixer,
        cms=CMSConfig(hidden=config.hidden),
    )
    return with_context(made, config.task.length)


def train(
    config: SweepConfig, model: ModelConfig, seed: int, learn: bool | Learning = True
) -> dict[str, Any]:
    """Trains and scores one point; the columns of its row from `status` on.

    With `learn` some parts do not learn while they read, in training and scoring.

    The parameters, the rows read and the rows scored depend on `seed` alone. Steps are
    compiled once and called several at a time; the rows are drawn in the step.
    """
    init_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
    params = jax.jit(lambda key: lm.build(model, key)[1])(init_key)
    reader = reader_of(model)
    tx = optim.build(
        config.optimizer, total_steps=config.steps, periods=optim.one_clock(params)
    )

    def live(params, fast, asked):
        return reader.apply(params, asked.tokens, fast, aligned=True, learn=learn)

    def objective(params, context):
        asked, logits = context
        return recall.score_batch(logits, asked).loss

    level = state_lib.outer_level(tx, objective)

    def step(i, carry):
        state, worst = carry
        key = jax.random.fold_in(state.key, state.step)
        asked = batch(config.task, key, config.batch)
        after = hope_update(asked, Slow(level, state.level), Fast(live))
        return state._replace(level=after.slow.state), jnp.maximum(worst, after.loss)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state, count):
        """`count` steps, and the largest of their losses."""
        return jax.lax.fori_loop(0, count, step, (state, jnp.float32(-jnp.inf)))

    @jax.jit
    def score(params):
        return recall.score(
            lambda p, tokens: reader.apply(p, tokens, None, True, learn)[0],
            params,
            config.task,
            test_key,
            rows=config.batch,
            batches=config.evaluation,
        )

    state = state_lib.create(params, tx, train_key)
    advance = advance.lower(state, 0).compile()
    steps, status, start = 0, DONE, time.perf_counter()
    seconds = 0.0
    while status == DONE and steps < config.steps and seconds < config.seconds:
        count = min(_STRIDE, config.steps - steps)
        state, worst = advance(state, count)
        steps += count
        if not math.isfinite(worst):
            status = f"{NOT_FINITE} by step {steps}"
        seconds = time.perf_counter() - start
    made = {"status": status, "accuracy": None, "loss": None, "steps": steps}
    made["tokens_per_second"] = steps * config.batch * config.task.length / seconds
    made["seconds"] = seconds
    if status == DONE:
        accuracy, loss = (float(value) for value in score(state.params))
        if math.isfinite(loss):
            made |= {"accuracy": accuracy, "loss": loss}
        else:
            made["status"] = f"{NOT_FINITE} by step {steps}"
    return made


def run(
    out: str | Path,
    config: SweepConfig,
    points: Sequence[Point],
    seeds: Sequence[int],
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Trains what `out` has no row of; returns the rows of `points`, in their order.

    The table is written after every row, so that nothing finished is ever lost.

    Raises:
      ValueError: `out` holds a sweep of other settings, or no table of this program.
    """
    written = (_TABLE, f".{_TABLE}", _PICTURE)
    path = check_folder("--out", out, written, _is_ours) / _TABLE
    kept = _read(path, config)
    rows = []
    wanted = list(itertools.product(points, seeds))
    for number, (point, seed) in enumerate(wanted, start=1):
        key = (point.name, seed)
        told = f"{number} of {len(wanted)}: {point.name}, seed {seed}"
        if point.model is None:
            status = f"{REFUSED}: {point.reason}"
            kept[key] = point.row | {"seed": seed, "status": status}
            say(f"{told}: {REFUSED}")
        elif key in kept:
            say(f"{told}: kept, {_told(kept[key])}")
        else:
            start = time.perf_counter()
            made = train(config, point.model, seed)
            spent = time.perf_counter() - start
            kept[key] = point.row | {"seed": seed} | made
            kept[key] |= {"commit": metrics.commit(), "device": metrics.device()}
            jax.clear_caches()  # nothing compiled here is used again
            say(f"{told}: {_told(kept[key])}; {spent:.0f} s with its compilation")
        rows.append(kept[key])
        _write(path, config, kept.values())
    return rows


def _is_ours(folder: Path) -> bool:
    """`_read` says whether its table is one; a kill may leave half of the first."""
    names = {path.name for path in folder.iterdir()}
    return _TABLE in names or names <= {f".{_TABLE}"}


def _told(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return row["status"]
    return f"accuracy {row['accuracy']:.3f} after {row['steps']} steps"


def _read(path: Path, config: SweepConfig) -> dict[tuple[str, int], dict[str, Any]]:
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


def _write(path: Path, config: SweepConfig, rows: Iterable[dict[str, Any]]) -> None:
    """Beside, then renamed, so that no start ever finds half a table."""
    table = {
        "config": config_lib.to_json(config),
        "versions": metrics.versions(),
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(table, indent=2, allow_nan=False) + "\n", "utf-8")
    beside.replace(path)


def markdown(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a Markdown table."""
    formats = {
        "accuracy": "{:.3f}",
        "loss": "{:.3f}",
        "tokens_per_second": "{:,.0f}",
        "seconds": "{:.1f}",
    }
    table = Table(box=rich.box.MARKDOWN)
    for column in COLUMNS:
        number = column in formats or column in ("seed", "steps")
        justify = "right" if number else "left"
        table.add_column(column.replace("_per_", "/"), justify=justify, no_wrap=True)
    for row in rows:
        cells = (
            "" if row[c] is None else formats.get(c, "{}").format(row[c])
            for c in COLUMNS
        )
        table.add_row(*cells)
    return table


def draw(
    config: SweepConfig,
    points: Sequence[Point],
    rows: Sequence[Mapping[str, Any]],
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
    define.multi_string(
        "set", [], "a field of the sweep's config, for example task.pairs=4; repeatable"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what has no row yet, prints the table and draws the heat map."""
    given = command.parse(__doc__, _define, arguments)
    console = Console(highlight=False)
    try:
        config = settings(given)
        points, seeds = _points(given, config), lab.seeds(given.seeds)
        out = f"runs/sweep-{given.grid}" if given.out is None else given.out
        rows = run(
            out,
            config,
            points,
            seeds,
            lambda line: console.print(line, markup=False, soft_wrap=True),
        )
    except ValueError as error:
        command.fail(error)
    except KeyboardInterrupt:
        console.print("stopped; start the same command again to go on.")
        sys.exit(130)
    out = Path(out)
    draw(config, points, rows).savefig(out / _PICTURE)
    table = markdown(rows)
    console.width = 10_000  # a row is a line, or it is no Markdown
    console.print(table, markup=False)
    console.print(f"wrote {out / _TABLE} and {out / _PICTURE}", markup=False)


def settings(given: Any) -> SweepConfig:
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
    return config_lib.override(SweepConfig(), changed)


def _points(given: Any, config: SweepConfig) -> list[Point]:
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
    return miras(config, {choice: lab.listed(text) for choice, text in asked.items()})


def _plural(choice: str) -> str:
    return {"bias": "biases"}.get(choice, f"{choice}s")


def _known(choice: str, given: Sequence[str], there: Sequence[str]) -> None:
    flag = f"--{_plural(choice)}"
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
    main()
