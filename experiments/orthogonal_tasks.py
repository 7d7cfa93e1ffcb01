"""Equation 45: tasks whose gradients lie in orthogonal subspaces, one after another.

Run:     python -m experiments.orthogonal_tasks --out=DIR  (picture and result)
Smoke:   add --scale=smoke (few steps and rates, seconds); a test runs it so.
Expect:  no memory avoids old subspaces; momentum and delta momentum are ahead (final
         error 0.070 with a leak), M3 and Muon last; experiments/log.md has more.
Cost:    two minutes of one CPU core.

Each task of `hope_jax.data.synthetic.orthogonal` has its own subspace of the inputs; a
leak pulls W out of the ones before, which an optimizer that knew them would not follow.
Every rule sees the same tasks and batches. Its rate, from one grid for all, has the
least final error on tuning seeds; numbers are of other seeds. What they mean says
`hope_jax.evaluate.forgetting.measures`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments import lab
from hope_jax.data.synthetic.orthogonal import OrthogonalConfig
from hope_jax.evaluate.forgetting import live, measures
from hope_jax.optim.adaptive import adagrad_memory
from hope_jax.optim.momenta import delta_momentum, momentum
from hope_jax.optim.rules.dgd import dgd
from hope_jax.optim.rules.m3 import m3
from hope_jax.plot import Figure
from launch import command

NAME = "orthogonal_tasks"
DECAY = 0.9  # of every momentum

RULES: dict[str, Callable[[Array], optax.GradientTransformation]] = {
    "gradient_descent": optax.sgd,
    "momentum": partial(momentum, decay=DECAY),
    "delta_momentum": partial(delta_momentum, decay=DECAY),
    "delta_momentum_matrix": partial(delta_momentum, decay=DECAY, form="matrix"),
    "dgd": dgd,
    "adam": partial(optax.adam, b1=DECAY),
    "adagrad": adagrad_memory,
    "adagrad_outer": partial(adagrad_memory, form="outer"),
    "muon": partial(optax.contrib.muon, beta=DECAY),
    "m3": partial(m3, periods=(1, 10)),
}
MEASURES = ("final", "learned", "forgotten", "old", "gradient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OrthogonalConfig, lab.Grid):
    """What is run.

    Attributes:
      leaks: sizes of the inputs' part outside of their task's subspace.
      steps, batch: of each task.
      seeds: for tuning, and as many others for the numbers.
    """

    leaks: tuple[float, ...] = (0.0, 0.2)
    steps: int = 200
    batch: int = 16
    low: float = 1e-4
    high: float = 10.0
    rates: int = 26
    seeds: int = 5


SETTINGS = {
    "full": Settings(),
    "smoke": Settings(steps=10, rates=3, low=1e-3, high=0.1, seeds=2),
}


class Outcome(NamedTuple):
    """A rule on one leak: its rate, its measures and errors by seed."""

    rate: float
    measures: dict[str, np.ndarray]
    errors: np.ndarray


def compare(settings: Settings) -> dict[tuple[str, float], Outcome]:
    """Every rule at every leak, at the rate that tuning chose."""
    s = settings
    rates = s.tried().astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2 * s.seeds)
    outcomes = {}
    for name, rule in RULES.items():

        def run(rate, leak, key, rule=rule):
            more = {"leak": leak, "steps": s.steps, "batch": s.batch}
            return live(rule(rate), s, key, **more)

        by_seed = jax.jit(jax.vmap(run, (None, None, 0)))
        by_rate = jax.jit(jax.vmap(jax.vmap(run, (None, None, 0)), (0, None, None)))
        for leak in s.leaks:
            tried = by_rate(rates, jnp.float32(leak), keys[: s.seeds])
            final = measures(tried)["final"].mean(-1)
            rate = rates[s.best(final)]
            stream = by_seed(rate, jnp.float32(leak), keys[s.seeds :])
            outcomes[name, leak] = Outcome(
                float(rate), measures(stream), np.asarray(stream.errors)
            )
    return outcomes


def summary(
    outcomes: dict[tuple[str, float], Outcome], settings: Settings
) -> dict[str, float]:
    """The numbers of the result file: means over seeds, and the spread of `final`."""
    found = {}
    for (name, leak), outcome in outcomes.items():
        means = {key: values.mean() for key, values in outcome.measures.items()}
        final_sd = outcome.measures["final"].std()
        means = {"rate": outcome.rate, **means, "final_sd": final_sd}
        found[f"{name}_leak_{leak:g}"] = means
    return lab.flat(found)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The same numbers to read."""
    columns = {"rate": "{rate:.2g}", "final (sd)": "{final:.4f} ({final_sd:.4f})"}
    columns |= {measure: f"{{{measure}:.4f}}" for measure in MEASURES[1:]}
    return lab.ranked(
        found,
        RULES,
        columns,
        by="final",
        head="Means over {seeds} seeds that tuning has not seen.",
        places=lambda config: [f"leak_{leak:g}" for leak in config["leaks"]],
    )


def draw(outcomes: dict[tuple[str, float], Outcome], settings: Settings) -> Figure:
    """For each leak: the first task's error as others follow; learned and final."""
    rows = len(settings.leaks)
    figure = Figure(figsize=(11, 3.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    after = np.arange(1, settings.tasks + 1)
    for (left, right), leak in zip(panels, settings.leaks, strict=True):
        for i, name in enumerate(RULES):
            seeds = outcomes[name, leak].errors[:, :, 0]
            line = lab.style(i, name) | {"marker": "o", "ms": 3}
            lab.band(left, after, seeds, spread="deviation", **line)
        left.set(
            xlabel="tasks learned so far",
            ylabel="relative error of the first task",
            title=f"leak {leak:g}: forgetting the first task",
            xticks=after,
        )
        got = {name: outcomes[name, leak].measures for name in RULES}
        order = sorted(RULES, key=lambda name: got[name]["final"].mean())
        series = {
            f"{measure}, all tasks": [got[name][measure] for name in order]
            for measure in ("learned", "final")
        }
        lab.points(right, order, series)
        right.set(xlabel="relative error", title=f"leak {leak:g}: best rule on top")
        right.legend(fontsize=8)
    lab.legend(figure, left, columns=5)
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
