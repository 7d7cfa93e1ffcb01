"""Learned memories of gradients (section 4) against tuned rules, on tasks held out.

Run:     python -m experiments.learned_optimizers --out=DIR  (picture and result)
Smoke:   add --scale=smoke (few tasks, steps and rates, seconds); a test runs it so.
Expect:  over lives as long as in training, memories win where they were taught (mean
         log10 of the loss on quadratics -4.8, Adam -2.7; on networks -1.5, -1.3), and
         over longer ones they do not; experiments/log.md has more.
Cost:    four to five minutes of one CPU core.

The tasks are the two families of `hope_jax.data.synthetic.problems`.

A memory is meta-trained on one family, by many short lives of `horizon` steps, and used
on both, for as many steps and for five times as many, always at the one rate that it
was trained with. The rules that people wrote get a rate for each family and length, the
best of one grid on tuning tasks. Adam with a cosine also knows how long it will run.
All numbers are of other tasks: log10 of the loss, at most 2 (diverged), its mean over
all steps (what the memories were trained for, and rates chosen by) and over the last
tenth of them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments import lab
from hope_jax.data.synthetic.problems import FAMILIES
from hope_jax.evaluate import lives
from hope_jax.evaluate.lives import Lives
from hope_jax.optim.meta import LearnedConfig, Meta, meta_train
from hope_jax.plot import Figure
from launch import command

NAME = "learned_optimizers"
MEMORIES = {
    "recurrent": LearnedConfig(),
    "attention": LearnedConfig(memory="attention", window=16),
}


class Lesson(NamedTuple):
    """Which memory learns from which family, and whether gradients in it count as
    constants (first order, arXiv:1606.04474)."""

    memory: str
    family: str
    first_order: bool = False


LESSONS = {
    "recurrent_on_quadratics": Lesson("recurrent", "quadratics"),
    "attention_on_quadratics": Lesson("attention", "quadratics"),
    "recurrent_on_networks": Lesson("recurrent", "networks"),
    "attention_on_networks": Lesson("attention", "networks"),
    "first_order_on_quadratics": Lesson("recurrent", "quadratics", True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(lab.Grid):
    """What is run; the grid is of the other rules.

    Attributes:
      horizon: steps of a life in meta-training.
      truncation: steps between two moves of the slow level.
      rounds, batch: lives, so many at a time.
      outer_rate: of the slow level's Adam, whose cosine ends at 0.
      rate: of the learned optimizers.
      memories: of each kind, from different seeds.
      longer: how many times the horizon is also run.
      tuning, tasks: to choose rates by, and to report.
    """

    horizon: int = 100
    truncation: int = 10
    rounds: int = 100
    batch: int = 16
    outer_rate: float = 0.01
    rate: float = 0.1
    memories: int = 3
    longer: int = 5
    low: float = 1e-3
    high: float = 10.0
    rates: int = 17
    tuning: int = 32
    tasks: int = 64


SETTINGS = {
    "full": Settings(),
    "smoke": Settings(
        horizon=10, rounds=2, batch=2, memories=2, longer=2, rates=3, tuning=2, tasks=3
    ),
}


# (rate, steps to come) -> rule; both may be traced.
RULES: dict[str, Callable[[Array, Array], optax.GradientTransformation]] = {
    "gradient_descent": lambda rate, steps: optax.sgd(rate),
    "momentum": lambda rate, steps: optax.sgd(rate, momentum=0.9),
    "rmsprop": lambda rate, steps: optax.rmsprop(
        rate, decay=LearnedConfig().decay, bias_correction=True
    ),
    "adam": lambda rate, steps: optax.adam(rate),
    "adam_cosine": lambda rate, steps: optax.adam(
        lambda count: rate * 0.5 * (1.0 + jnp.cos(jnp.pi * count / steps))
    ),
}


def lengths(settings: Settings) -> tuple[int, int]:
    return settings.horizon, settings.longer * settings.horizon


def cells(settings: Settings) -> list[tuple[str, int]]:
    """Where optimizers meet: a family, and how many steps they have."""
    return list(itertools.product(FAMILIES, lengths(settings)))


def teach(settings: Settings, lesson: Lesson) -> tuple[Meta, np.ndarray]:
    """Slow parameters of several memories, and the slow level's losses."""
    s = settings
    moves = s.rounds * s.horizon // s.truncation
    outer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(s.outer_rate, moves)),
    )

    def one(key):
        return meta_train(
            *(FAMILIES[lesson.family], MEMORIES[lesson.memory], outer, key),
            **{"learning_rate": s.rate, "rounds": s.rounds, "horizon": s.horizon},
            **{"truncation": s.truncation, "batch": s.batch},
            second_order=not lesson.first_order,
        )

    trained = jax.vmap(one)(jax.random.split(jax.random.key(1), s.memories))
    return trained.meta, np.asarray(trained.losses) / np.log(10.0)


Found = dict[str, dict[tuple[str, int], Lives]]


def compare(settings: Settings) -> Found:
    """Every optimizer in every cell; says what the slow level has gained."""
    s = settings
    keys = jax.random.split(jax.random.key(0), s.tuning + s.tasks)
    tuning, tasks = keys[: s.tuning], keys[s.tuning :]
    rates = s.tried().astype(np.float32)
    found = {name: {} for name in (*RULES, *LESSONS)}
    for (name, rule), family in itertools.product(RULES.items(), FAMILIES):
        grid = FAMILIES[family], rates, s.best, lengths(s)
        for steps, each in lives.tuned(rule, *grid, tuning, tasks).items():
            found[name][family, steps] = each
    for name, lesson in LESSONS.items():
        metas, losses = teach(s, lesson)
        part = max(1, losses.shape[1] // 10)
        first, last = losses[:, :part].mean(), losses[:, -part:].mean()
        print(f"{name}: the mean of its lives went from {first:.2f} to {last:.2f}")
        memory = MEMORIES[lesson.memory], metas, s.rate
        for family, problems in FAMILIES.items():
            lived = lives.remembered(*memory, problems, lengths(s), tasks)
            for steps, each in lived.items():
                found[name][family, steps] = each
    return found


def summary(found: Found, settings: Settings) -> dict[str, float]:
    """The numbers of the result file."""
    numbers = {}
    for name, of in found.items():
        for (family, steps), each in of.items():
            numbers[f"{name}_{family}_{steps}"] = lives.measures(each)
    return lab.flat(numbers)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The same numbers to read, best first; a table a family and number of steps."""
    columns = {
        "rate": "{rate:.2g}",
        "mean (error)": "{mean:.2f} ({mean_se:.2f})",
        "between memories": "{mean_sd:.2f}",
        "last tenth": "{final:.2f}",
    }
    return lab.ranked(
        found,
        (*RULES, *LESSONS),
        columns,
        by="mean",
        head="log10 of the loss on {tasks} tasks held out, each kind of memory learned "
        "{memories} times, in lives of {horizon} steps.",
        places=lambda config: [f"{f}_{n}" for f, n in cells(Settings(**config))],
    )


def draw(found: Found, settings: Settings) -> Figure:
    """For each cell the mean curve of every optimizer; bands are memories' extremes."""
    styles = {}
    for i, name in enumerate(found):
        dashes, number = (":", i) if name in RULES else ("-", i - len(RULES))
        styles[name] = lab.style(number, name) | {"ls": dashes, "lw": 1.4}
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    panels = figure.subplots(len(FAMILIES), 2, squeeze=False).flat
    for panel, (family, steps) in zip(panels, cells(settings), strict=True):
        for name, of in found.items():
            by_memory = of[family, steps].curves.mean(1)
            lab.band(panel, np.arange(steps), by_memory, **styles[name])
        if steps > settings.horizon:
            panel.axvline(settings.horizon, color="#555555", lw=0.8)
        panel.set(
            xlabel="steps",
            ylabel="log10 of the loss, mean over tasks",
            title=f"{family}, {steps} steps",
        )
    lab.legend(figure, panel, columns=5)
    return figure


main = lab.comparison(
    name=NAME,
    doc=__doc__,
    settings=SETTINGS,
    compare=compare,
    summary=summary,
    draw=draw,
    table=table,
)

if __name__ == "__main__":
    command.run(main)
