"""Equation 45: tasks whose gradients lie in orthogonal subspaces, one after another.

Run:     python -m experiments.orthogonal_tasks --out=DIR  (picture and result)
Smoke:   add --scale=smoke (few steps and rates, seconds); a test runs it so.
Expect:  no memory avoids old subspaces. Without a leak, gradient descent, both momenta
         and outer-product AdaGrad have nothing to avoid and forget nothing: momentum
         does not fail there, as the paper fears. Element-wise AdaGrad and Adam do
         forget (0.04, 0.02 at the end), for their scales turn gradients out of their
         subspaces. With a leak all forget. Momentum and delta momentum are ahead (final
         0.070, both forms within 0.002), then gradient descent (0.079), AdaGrad by
         outer products (0.090), by element (0.109), Adam (0.123). DGD stores two thirds
         of a target under this loss, and so is at 1/9 at least (0.26). Muon and M3 at a
         constant rate are last (0.42, 0.38): they make weak directions strong, and two
         ninths to a quarter of their movement is in old subspaces (momentum 0.014).
Cost:    two minutes of one CPU core.

    L_i(W) = E (W x - y)^2,   x = U_i a + leak z,   y = C_i a,   a, z ~ N(0, I)

The columns of the U_i are orthonormal over all tasks, so with leak 0 the gradients of
task i lie in the span of U_i and one W solves every task. A leak adds directions of all
other tasks to the inputs; as y does not depend on them, each task then pulls W out of
the subspaces of the ones before, which an optimizer that knew them would not follow.

Every rule sees the same tasks and batches. Its rate, from one grid for all, has the
least final error on tuning seeds; numbers are of other seeds. Errors are relative,
||W U_i - C_i||^2 / ||C_i||^2, means over tasks: `learned` right after each, `final` at
the end of the stream, `forgotten` their difference over all but the last task. `old` is
the part of a rule's movement (of the sum of its squared updates), during the tasks
after the first, that lies in the subspaces of earlier tasks; `gradient` is the same of
the gradients that it received.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments import lab
from hope_jax.optim.adaptive import adagrad_memory
from hope_jax.optim.capture import dgd_gradients
from hope_jax.optim.momenta import delta_momentum, momentum
from hope_jax.optim.rules.dgd import dgd
from hope_jax.optim.rules.m3 import m3
from hope_jax.plot import Figure
from launch import command

NAME = "orthogonal_tasks"
DECAY = 0.9  # of every momentum

RULES: dict[str, Callable[[Array], optax.GradientTransformation]] = {
    "gradient_descent": optax.sgd,
    "momentum": lambda rate: momentum(rate, decay=DECAY),
    "delta_momentum": lambda rate: delta_momentum(rate, decay=DECAY),
    "delta_momentum_matrix": lambda rate: delta_momentum(
        rate, decay=DECAY, form="matrix"
    ),
    "dgd": dgd,
    "adam": lambda rate: optax.adam(rate, b1=DECAY),
    "adagrad": adagrad_memory,
    "adagrad_outer": lambda rate: adagrad_memory(rate, form="outer"),
    "muon": lambda rate: optax.contrib.muon(rate, beta=DECAY),
    "m3": lambda rate: m3(rate, periods=(1, 10)),
}
MEASURES = ("final", "learned", "forgotten", "old", "gradient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(lab.Grid):
    """What is run.

    Attributes:
      tasks, rank: subspaces of so many dimensions.
      width, outputs: of W, `[outputs, width]`; tasks * rank <= width.
      leaks: sizes of the inputs' part outside of their task's subspace.
      steps, batch: of each task.
      seeds: for tuning, and as many others for the numbers.
    """

    tasks: int = 5
    rank: int = 4
    width: int = 24
    outputs: int = 4
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


class Tasks(NamedTuple):
    """Orthonormal `subspaces` of the inputs, and what each task wants of its own."""

    subspaces: Float[Array, "N width rank"]
    targets: Float[Array, "N outputs rank"]


def tasks(settings: Settings, key: Array) -> Tasks:
    """A stream of tasks, in directions that are along no axis."""
    s, keys = settings, jax.random.split(key)
    turned = jax.random.orthogonal(keys[0], s.width)[:, : s.tasks * s.rank]
    subspaces = turned.reshape(s.width, s.tasks, s.rank).swapaxes(0, 1)
    targets = jax.random.normal(keys[1], (s.tasks, s.outputs, s.rank))
    return Tasks(subspaces, targets)


def draw_batch(subspace, target, leak, count, key):
    """`(x [B, width], y [B, outputs])` of one task."""
    keys = jax.random.split(key)
    a = jax.random.normal(keys[0], (count, subspace.shape[1]))
    z = jax.random.normal(keys[1], (count, subspace.shape[0]))
    return a @ subspace.T + leak * z, a @ target.T


def loss(w: Float[Array, "outputs width"], x: Array, y: Array) -> Float[Array, ""]:
    """Equation 45 on a batch."""
    return jnp.mean(jnp.sum(((w @ x.T).T - y) ** 2, axis=-1))


def errors(w: Float[Array, "outputs width"], of: Tasks) -> Float[Array, " N"]:
    """Of every task without leak, exactly, relative to that of W = 0."""
    missed = jnp.einsum("ow,nwr->nor", w, of.subspaces) - of.targets
    return jnp.sum(missed**2, (1, 2)) / jnp.sum(of.targets**2, (1, 2))


class Stream(NamedTuple):
    """What one rule does, on one stream of tasks.

    Attributes:
      errors: `[N, N]`, after each task (rows) of each task.
      old: squared length of the updates in earlier tasks' subspaces, and of all.
      gradient: the same of the gradients.
    """

    errors: Float[Array, "N N"]
    old: Float[Array, "2"]
    gradient: Float[Array, "2"]


def live(
    rule: optax.GradientTransformation, settings: Settings, leak: float, key: Array
) -> Stream:
    """Task after task, without a word to the rule that the task has changed."""
    s, rule = settings, optax.with_extra_args_support(rule)
    of = tasks(s, jax.random.fold_in(key, 0))
    w = jnp.zeros((s.outputs, s.width))

    def lengths(change, index):
        inside = jnp.sum(jnp.einsum("ow,nwr->nor", change, of.subspaces) ** 2, (1, 2))
        earlier = jnp.arange(s.tasks, dtype=jnp.int32) < index
        counts = jnp.where(index > 0, 1.0, 0.0)
        within = jnp.sum(jnp.where(earlier, inside, 0.0))
        return counts * jnp.stack([within, jnp.sum(change**2)])

    def step(carry, key):
        w, state, index, old, gradient = carry
        task = index // s.steps
        subspace, target = of.subspaces[task], of.targets[task]
        x, y = draw_batch(subspace, target, leak, s.batch, key)
        grads, inputs = dgd_gradients(loss, w, x, y, input_axis=-1)
        updates, state = rule.update(grads, state, w, inputs=inputs)
        old = old + lengths(updates, task)
        gradient = gradient + lengths(grads, task)
        return (w + updates, state, index + 1, old, gradient), None

    def task(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, errors(carry[0], of)

    keys = jax.random.split(jax.random.fold_in(key, 1), (s.tasks, s.steps))
    none = jnp.zeros((2,))
    carry = (w, rule.init(w), jnp.zeros((), jnp.int32), none, none)
    (*_, old, gradient), after = jax.lax.scan(task, carry, keys)
    return Stream(after, old, gradient)


def measures(stream: Stream) -> dict[str, np.ndarray]:
    """The numbers of the table, by seed; `stream` leads with seeds."""
    after = np.asarray(stream.errors, np.float64)
    learned = np.diagonal(after, axis1=-2, axis2=-1)
    final = after[..., -1, :]
    with np.errstate(invalid="ignore"):  # rates at which a rule diverges
        forgotten = final - learned
    return {
        "final": final.mean(-1),
        "learned": learned.mean(-1),
        "forgotten": forgotten[..., :-1].mean(-1),
        "old": _part(stream.old),
        "gradient": _part(stream.gradient),
    }


def _part(lengths):
    within, whole = np.moveaxis(np.asarray(lengths, np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.where(whole > 0, within / np.where(whole > 0, whole, 1.0), 0.0)


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
            return live(rule(rate), s, leak, key)

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


def summary(outcomes: dict[tuple[str, float], Outcome]) -> dict[str, float]:
    """The numbers of the result file: means over seeds, and the spread of `final`."""
    numbers = {}
    for (name, leak), outcome in outcomes.items():
        start = f"{name}_leak_{leak:g}"
        numbers[f"{start}_rate"] = outcome.rate
        for measure in MEASURES:
            numbers[f"{start}_{measure}"] = float(outcome.measures[measure].mean())
        numbers[f"{start}_final_sd"] = float(outcome.measures["final"].std())
    return numbers


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
        left.legend(fontsize=7, loc="upper left", ncols=2)
        got = {name: outcomes[name, leak].measures for name in RULES}
        order = sorted(RULES, key=lambda name: got[name]["final"].mean())
        series = {
            f"{measure}, all tasks": [got[name][measure] for name in order]
            for measure in ("learned", "final")
        }
        lab.points(right, order, series)
        right.set(xlabel="relative error", title=f"leak {leak:g}: best rule on top")
        right.legend(fontsize=8)
    return figure


def measure(task: lab.Task) -> dict[str, float]:
    """Runs all, and draws."""
    outcomes = compare(task.config)
    lab.save(draw(outcomes, task.config), task.picture)
    return summary(outcomes)


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=lambda flags: {"all": SETTINGS[flags.scale]},
    measure=measure,
    table=table,
)

if __name__ == "__main__":
    command.run(main)
