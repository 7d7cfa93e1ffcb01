"""What do longer texts cost? Time and memory from 1,024 to 131,072 tokens.

Run:     python -m experiments.cost_scaling  (a part: --rows=hope)
Smoke:   add --scale=smoke --out=DIR.
Expect:  experiments/README.md has the table and the picture.
Cost:    two to four minutes a row, twelve in all, on one CPU core; 3 GB. Other work ran
         beside what was measured last; CPU seconds were counted.

Language models of one layer and width 64 on bytes, one row, read once (forward) and
with the gradient of its loss (training). The programs of a model are timed in
interleaved rounds (`experiments.benchmarks.timing`) in CPU seconds of all threads, so
that what else the machine did counts little. A length is tried while a call should stay
below 13 seconds, by the one before it, and its temporaries, as XLA says of the compiled
program, below 6 GiB.

  hope, hope_matrix   MLP and matrix memories, CMS levels of 128 and 1,024 tokens
  titans              its MLP memory and one MLP
  attention           to the whole row, and one MLP

The exponent is the slope of log time on log length from 4,096 tokens on (of attention,
which does not go far, 2,048), fitted to each round, and its 95 % interval over rounds,
by Student's t. An article gives Hope n log n: over the same lengths that has a slope of
its own, about 1.1, and so is told apart from n, or not.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments import lab
from experiments.benchmarks import timing
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.models.mixers.memory import NamedConfig
from hope_jax.models.mixers.self_modifying import MATRIX, MLP, SelfModifyingConfig
from hope_jax.plot import Figure
from launch import command

NAME = "cost_scaling"
TASKS = ("forward", "training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model and how far it is asked.

    Attributes:
      model: whose attention, if it has any, looks back over the whole row.
      lengths: tokens of a row, short to long.
      fitted: the shortest of which the slope is.
      rounds: interleaved ones.
      seconds: most of a call.
      bytes: most of the temporaries of a program.
    """

    model: ModelConfig
    lengths: tuple[int, ...] = (1024, 4096, 16_384, 65_536, 131_072)
    fitted: int = 4096
    rounds: int = 4
    seconds: float = 13.0
    bytes: int = 6 * 2**30


def models(width: int = 64) -> dict[str, ModelConfig]:
    shared = ModelConfig(d_model=width, layers=1, heads=2, cms=CMSConfig(hidden=width))
    levels = tuple(CMSLevel(period=period) for period in (128, 1024))
    chain = CMSConfig(levels=levels, hidden=width, rates="generated")

    def hope(memory):
        mixer = SelfModifyingConfig(memory=dataclasses.replace(memory, chunk=64))
        return dataclasses.replace(shared, mixer=mixer, cms=chain)

    return {
        "hope": hope(dataclasses.replace(MLP, expansion=2)),
        "hope_matrix": hope(MATRIX),
        "titans": dataclasses.replace(shared, mixer=NamedConfig(kind="titans")),
        "attention": dataclasses.replace(shared, mixer=AttentionConfig()),
    }


def rows(flags: Any) -> dict[str, Row]:
    if flags.scale == "full":
        made = {name: Row(model=model) for name, model in models().items()}
        doubled = tuple(1024 * 2**i for i in range(8))  # for it does not go far
        attention = {"lengths": doubled, "fitted": 2048}
        made["attention"] = dataclasses.replace(made["attention"], **attention)
        return made
    few = {"lengths": (128, 256), "fitted": 128, "rounds": 2}
    return {name: Row(model=model, **few) for name, model in models(8).items()}


class Program(NamedTuple):
    """A compiled program with its arguments, and the bytes of its temporaries."""

    call: Callable[[], Any]
    bytes: int


def program(model: ModelConfig, task: str, length: int) -> Program:
    """The program of one row of so many tokens."""
    model = with_context(model, length)
    graphdef, params = lm.build(model, jax.random.key(0))
    text = jax.random.randint(jax.random.key(1), (1, length + 1), 0, model.vocab)
    horizon = length if task == "training" else None

    def loss(params, text):
        read, after = text[:, :-1], text[:, -1]
        losses, _ = lm.apply(
            graphdef, params, read, after=after, aligned=True, horizon=horizon
        )
        return jnp.mean(losses)

    made = jax.value_and_grad(loss) if task == "training" else loss
    compiled = jax.jit(made).lower(params, text).compile()

    kept = compiled.memory_analysis()
    assert kept is not None
    return Program(lambda: compiled(params, text), kept.temp_size_in_bytes)


def measure(task: lab.Task) -> dict[str, float]:
    row: Row = task.config
    programs: dict[tuple[str, int], Callable[[], Any]] = {}
    made: dict[str, float] = {}
    for kind in TASKS:
        expected = 0.0
        for before, length in itertools.pairwise((1, *row.lengths)):
            if expected * length / before > row.seconds:
                break
            call, size = program(row.model, kind, length)
            if size > row.bytes:
                break
            _, expected = timing.measure(call, 1)
            print(f"{task.row}, {kind}, {length}: {expected:.2f} s", flush=True)
            if expected <= row.seconds:
                programs[kind, length] = call
                made[f"{kind}/temporary bytes/{length}"] = size
    for length in row.lengths:
        sizes = lm.state_bytes(with_context(row.model, length))
        made[f"state bytes/{length}"] = sizes["all"]
    times = timing.interleave(programs, row.rounds)
    for kind in TASKS:
        found = {n: times[k, n].cpu for k, n in programs if k == kind}
        for length, seconds in found.items():
            made[f"{kind}/seconds/{length}"] = float(np.median(seconds))
        at = [length for length in found if length >= row.fitted]
        if len(at) > 1:
            fit = exponent(at, np.array([found[length] for length in at]))
            made |= {f"{kind}/{name}": value for name, value in fit.items()}
    return made


def exponent(lengths: Sequence[int], seconds: np.ndarray) -> dict[str, float]:
    """The slope of log time on log length with its 95 % interval, and those that n and
    n log n would have.

    Args:
      lengths: N of them, two at least.
      seconds: `[N, R]`, by round.

    >>> found = exponent([1024, 4096], np.array([[1.0, 1.0], [4.0, 4.0]]))
    >>> round(found["exponent"], 2), round(found["of n log n"], 2)
    (1.0, 1.13)
    """
    x = np.log(lengths)
    slopes = np.polyfit(x, np.log(seconds), 1)[0]
    mean, rounds = slopes.mean(), len(slopes)
    half = stats.t.ppf(0.975, rounds - 1) * slopes.std(ddof=1) / math.sqrt(rounds)
    return {
        "exponent": float(mean),
        "low": float(mean - half),
        "high": float(mean + half),
        "of n log n": float(np.polyfit(x, x + np.log(x), 1)[0]),
        "from": lengths[0],
        "to": lengths[-1],
    }


def grows_like(low: float, high: float, log: float) -> str:
    """What an interval of exponents leaves possible, of n and n log n.

    >>> [grows_like(*ends, log=1.1) for ends in ((0.9, 1.0), (0.9, 1.2), (1.8, 1.9))]
    ['n', 'n or n log n', 'neither: above n log n']
    """
    left = [name for name, at in (("n", 1.0), ("n log n", log)) if low <= at <= high]
    if left:
        return " or ".join(left)
    if high < 1:
        return "neither: below n"
    return "neither: between" if high < log else "neither: above n log n"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Exponents, and what the shortest and the longest row cost."""
    lines = []
    for row, m in ((result["row"], result["metrics"]) for result in found):
        for kind in TASKS:
            if f"{kind}/exponent" not in m:
                continue
            low, high, log = (m[f"{kind}/{k}"] for k in ("low", "high", "of n log n"))
            ends = m[f"{kind}/from"], m[f"{kind}/to"]
            line = [row, kind, f"{ends[0]:,} to {ends[1]:,}"]
            line += [f"{m[f'{kind}/exponent']:.3f} ({low:.3f} to {high:.3f})"]
            line += [f"{log:.3f}", grows_like(low, high, log)]
            line += [
                form.format(*(scale * m[f"{what}/{n}"] for n in ends))
                for form, scale, what in (
                    ("{:.2f} to {:.2f}", 1, f"{kind}/seconds"),
                    ("{:.1f} to {:.1f}", 2**-20, f"{kind}/temporary bytes"),
                    ("{:.0f} to {:.0f}", 2**-10, "state bytes"),
                )
            ]
            lines.append(line)
    columns = ["row", "task", "tokens", "exponent (95 %)", "of n log n", "grows like"]
    columns += ["CPU seconds", "temporaries, MiB", "state, KiB"]
    return lab.table(columns, lines, words=2)


def draw(found: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds, temporaries and state over length."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {"seconds": "CPU seconds", "temporary bytes": "temporaries, bytes"}
    for axes, (what, title) in zip(panels, titles.items(), strict=False):
        for number, result in enumerate(found):
            for kind, dashes in zip(TASKS, ("-", "--"), strict=True):
                line = _over_length(result, f"{kind}/{what}/")
                look = lab.style(number, result["row"]) | {"ls": dashes}
                look["label"] = look["label"] if kind == "forward" else None
                axes.loglog(*line, marker="o", ms=3, base=2, **look)
        axes.set(title=f"{title}: forward, training dashed", xlabel="tokens of a row")
    for number, result in enumerate(found):
        line = _over_length(result, "state bytes/")
        look = lab.style(number, result["row"])
        panels[2].loglog(*line, marker="o", ms=3, base=2, **look)
    panels[2].set(title="state of a row, bytes", xlabel="tokens of a row")
    lab.legend(figure, panels[2], len(found) or 1)
    return figure


def _over_length(result: Mapping[str, Any], at: str) -> tuple[list[int], list[float]]:
    of = {
        int(k[len(at) :]): v for k, v in result["metrics"].items() if k.startswith(at)
    }
    return [*of], [*of.values()]


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """Whether Hope is linear, as recurrent memories are."""
    lines = []
    for row, kind in (("hope", "forward"), ("hope", "training")):
        for line in lab.compared(
            f"Time over length, exponent, {row}, {kind}",
            lab.values(found, row, f"{kind}/exponent"),
            form="{:.3f}",
        ):
            (m,) = (result["metrics"] for result in found if result["row"] == row)
            ends = (m[f"{kind}/{k}"] for k in ("low", "high", "of n log n"))
            said = f"grows like {grows_like(*ends)}"
            log = f"n log n, {m[f'{kind}/of n log n']:.3f} (an article)"
            lines.append(line._replace(paper=log, distance=said))
    return lines


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=rows,
    measure=measure,
    table=table,
    draw=draw,
)

if __name__ == "__main__":
    command.run(main)
