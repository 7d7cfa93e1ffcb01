"""Learned memories of gradients (section 4) against tuned rules, on tasks held out.

Run:     python -m experiments.learned_optimizers --out=DIR  (picture and result)
Smoke:   add --scale=smoke (few tasks, steps and rates, seconds); a test runs it so.
Expect:  over lives as long as in training, memories win at home: mean log10 of the
         loss -4.8 (attention) and -4.6 (recurrent) on quadratics, where the best tuned
         rule, gradient descent, has -3.2 and Adam -2.7; -1.5 on networks, Adam -1.3.
         Away, those taught on quadratics still beat Adam on networks (-1.4); those
         taught on networks beat Adam on quadratics, gradient descent not clearly (-3.3,
         -3.0). Gradients taken as constants cost some at home (-4.2), nothing away
         (-1.5). But after some 75 steps their loss on quadratics rises again: in the
         last tenth attention is no better than Adam (-4.6), and over five times as many
         steps all end between -3 and -4, where momentum and Adam reach the floor, -8.
         On networks those taught there stay level with Adam (-2.2; with a cosine -2.2)
         and end behind its cosine (-2.4, -2.6; -2.7); the others lose (-1.9, -1.7).
Cost:    four to five minutes of one CPU core.

Two families of tasks, both with losses that are about 1 at the start:

    quadratics   sum of lambda_i e_i^2, e = Q w, of 16 weights, their condition between
                 10 and 1000, the largest lambda 1 (which suits a rate for all), turned
                 by a random Q so that no axis is special; exact
    networks     a tanh network of 6 units learns another of random weights, on a fresh
                 batch at every step, so that its gradients are noisy

A memory is meta-trained on one family, by many short lives of `horizon` steps, and used
on both, for as many steps and for five times as many, always at the one rate that it
was trained with. The rules that people wrote get a rate for each family and length, the
best of one grid on tuning tasks. Adam with a cosine also knows how long it will run.
All numbers are of other tasks: log10 of the loss, at most 2 (diverged), its mean over
all steps (what the memories were trained for, and rates chosen by) and over the last
tenth of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments import lab
from hope_jax.optim.meta import (
    LearnedConfig,
    Meta,
    Task,
    learned,
    meta_train,
    solve,
)
from hope_jax.plot import Figure
from launch import command

NAME = "learned_optimizers"
FLOOR = 1e-8  # of every loss: a task solved to here is solved
CEILING = 100.0  # of every loss that is reported: a life that diverged
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


def quadratic(key: Array) -> Task:
    """Sixteen weights whose axes say nothing."""
    keys, width = jax.random.split(key, 4), 16
    condition = 10.0 ** jax.random.uniform(keys[0], (), minval=1.0, maxval=3.0)
    curvature = condition ** -jax.random.uniform(keys[1], (width,))
    curvature = curvature / jnp.max(curvature)
    turned = jax.random.orthogonal(keys[2], width)
    start = jax.random.normal(keys[3], (width,))

    def loss(w, key):
        del key
        return jnp.sum(curvature * (turned @ w) ** 2) + FLOOR

    return Task(start / jnp.sqrt(loss(start, key)), loss)


def network(key: Array) -> Task:
    """A small network learns from one of its own size, steeper than itself."""
    keys, inputs, units, batch = jax.random.split(key, 3), 3, 6, 16

    def draw(key, steepness):
        keys = jax.random.split(key)
        return {
            "w1": steepness * jax.random.normal(keys[0], (units, inputs)) / inputs**0.5,
            "b1": jnp.zeros((units,)),
            "w2": jax.random.normal(keys[1], (units,)) / units**0.5,
            "b2": jnp.zeros(()),
        }

    def answer(p, x):
        return jnp.tanh(x @ p["w1"].T + p["b1"][None]) @ p["w2"] + p["b2"]

    teacher = draw(keys[0], 2.0)
    size = jnp.mean(answer(teacher, jax.random.normal(keys[2], (256, inputs))) ** 2)

    def loss(p, key):
        x = jax.random.normal(key, (batch, inputs))
        return jnp.mean((answer(p, x) - answer(teacher, x)) ** 2) / size + FLOOR

    return Task(draw(keys[1], 1.0), loss)


FAMILIES: dict[str, Callable[[Array], Task]] = {
    "quadratics": quadratic,
    "networks": network,
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


MEASURES = ("rate", "mean", "mean_se", "mean_sd", "final")


class Cell(NamedTuple):
    """Where optimizers meet: a family and how many steps they have."""

    family: str
    steps: int

    def __str__(self):
        return f"{self.family}_{self.steps}"


class Outcome(NamedTuple):
    """Rate, and log10 of the loss: [memories, tasks, steps], one memory for a rule."""

    rate: float
    curves: np.ndarray


def lengths(settings: Settings) -> tuple[int, int]:
    return settings.horizon, settings.longer * settings.horizon


def cells(settings: Settings) -> list[Cell]:
    return [Cell(family, steps) for family in FAMILIES for steps in lengths(settings)]


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
            FAMILIES[lesson.family],
            MEMORIES[lesson.memory],
            outer,
            key,
            learning_rate=s.rate,
            rounds=s.rounds,
            horizon=s.horizon,
            truncation=s.truncation,
            batch=s.batch,
            second_order=not lesson.first_order,
        )

    trained = jax.vmap(one)(jax.random.split(jax.random.key(1), s.memories))
    return trained.meta, np.asarray(trained.losses) / np.log(10.0)


def curves(
    rule: optax.GradientTransformation, family: str, steps: int, keys: Array
) -> Array:
    """log10 of the loss before each step, `[tasks, steps]`."""

    def one(key):
        task = FAMILIES[family](key)
        return solve(task, rule, steps, jax.random.fold_in(key, 1))[1]

    losses = jax.vmap(one)(keys)
    return jnp.log10(jnp.where(losses < CEILING, losses, CEILING))  # NaN is above too


def tune(
    settings: Settings, name: str, family: str, keys: Array
) -> dict[Cell, Outcome]:
    """A rule at the rates of the grid that are best on the first `tuning` keys."""
    s = settings
    rates = s.tried().astype(np.float32)
    longest = max(lengths(s))  # a shorter life begins like a longer one

    def life(rate, steps, keys):
        return curves(RULES[name](rate, steps), family, longest, keys)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def score(rate, steps):
        tried = life(rate, steps, keys[: s.tuning])
        inside = jnp.arange(longest) < steps
        return jnp.mean(jnp.where(inside[None], tried, 0.0)) * longest / steps

    chosen = [
        rates[s.best(np.asarray(score(rates, float(steps))))] for steps in lengths(s)
    ]
    final = jax.jit(jax.vmap(life, (0, 0, None)))
    out = np.asarray(
        final(np.array(chosen), np.array(lengths(s), np.float32), keys[s.tuning :])
    )
    return {
        Cell(family, steps): Outcome(float(rate), curve[None, :, :steps])
        for steps, rate, curve in zip(lengths(s), chosen, out, strict=True)
    }


def use(
    settings: Settings, memory: str, metas: Meta, family: str, keys: Array
) -> dict[Cell, Outcome]:
    """Learned memories as they are."""
    s = settings

    @jax.jit
    @jax.vmap
    def by_memory(meta):
        rule = learned(meta, MEMORIES[memory], s.rate)
        return curves(rule, family, max(lengths(s)), keys[s.tuning :])

    out = np.asarray(by_memory(metas))
    return {
        Cell(family, steps): Outcome(s.rate, out[..., :steps]) for steps in lengths(s)
    }


Found = dict[str, dict[Cell, Outcome]]


def compare(settings: Settings) -> tuple[Found, dict[str, np.ndarray]]:
    """Every optimizer in every cell, and the slow level's losses in every lesson."""
    s = settings
    keys = jax.random.split(jax.random.key(0), s.tuning + s.tasks)
    found, losses = {}, {}
    for name in RULES:
        found[name] = {}
        for family in FAMILIES:
            found[name] |= tune(s, name, family, keys)
    for name, lesson in LESSONS.items():
        metas, losses[name] = teach(s, lesson)
        found[name] = {}
        for family in FAMILIES:
            found[name] |= use(s, lesson.memory, metas, family, keys)
    return found, losses


def measures(outcome: Outcome) -> dict[str, float]:
    """The numbers of the table.

    `mean` over steps and `final` over the last tenth of them, with the standard error
    `mean_se` over tasks and the spread `mean_sd` between memories of one kind.
    """
    values = np.asarray(outcome.curves, np.float64)
    last = max(1, values.shape[-1] // 10)
    by_task = values.mean((0, 2))
    return {
        "rate": outcome.rate,
        "mean": values.mean(),
        "mean_se": by_task.std() / len(by_task) ** 0.5,
        "mean_sd": values.mean((1, 2)).std(),
        "final": values[..., -last:].mean(),
    }


def summary(found: Found) -> dict[str, float]:
    """The numbers of the result file."""
    return {
        f"{name}_{cell}_{measure}": float(value)
        for name, outcomes in found.items()
        for cell, outcome in outcomes.items()
        for measure, value in measures(outcome).items()
    }


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
        places=lambda config: map(str, cells(Settings(**config))),
    )


def draw(found: Found, settings: Settings) -> Figure:
    """For each cell the mean curve of every optimizer; bands are memories' extremes."""
    styles = {}
    for i, name in enumerate(found):
        dashes, number = (":", i) if name in RULES else ("-", i - len(RULES))
        styles[name] = lab.style(number, name) | {"ls": dashes, "lw": 1.4}
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    panels = figure.subplots(len(FAMILIES), 2, squeeze=False).flat
    for panel, cell in zip(panels, cells(settings), strict=True):
        for name in found:
            by_memory = found[name][cell].curves.mean(1)
            lab.band(panel, np.arange(cell.steps), by_memory, **styles[name])
        if cell.steps > settings.horizon:
            panel.axvline(settings.horizon, color="#555555", lw=0.8)
        panel.set(
            xlabel="steps",
            ylabel="log10 of the loss, mean over tasks",
            title=f"{cell.family}, {cell.steps} steps",
        )
    lines = panel.get_lines()[: len(found)]
    figure.legend(handles=lines, loc="outside lower center", ncols=5)
    return figure


def measure(task: lab.Task) -> dict[str, float]:
    """Runs all, says what the slow level has gained, and draws."""
    found, losses = compare(task.config)
    for name, values in losses.items():
        part = max(1, values.shape[1] // 10)
        first, last = values[:, :part].mean(), values[:, -part:].mean()
        print(f"{name}: the mean of its lives went from {first:.2f} to {last:.2f}")
    lab.save(draw(found, task.config), task.picture)
    return summary(found)


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=lambda flags: {"all": SETTINGS[flags.scale]},
    measure=measure,
    table=table,
)

if __name__ == "__main__":
    command.run(main)
