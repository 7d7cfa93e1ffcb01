"""Figure 4 (equation 53): momentum and delta momentum on a valley that bends.

Run:     python -m experiments.fig4_toy --out=DIR  (picture and result)
Smoke:   add --scale=smoke (one cell, few rates, seconds); a test runs it so.
Expect:  delta momentum with a clipped decay beats momentum in 23 of 27 cells (median 59
         steps against 110), its default in 7; experiments/log.md has more.
Cost:    a quarter of a minute on 2 CPU cores.

    psi(r, theta) = r^2 + k (r - theta + a sin(w r))^2,   from (-3.5, 2) to (0, 0)

The paper (arXiv:2512.24695) gives no k, a, w. Here they are searched: every rule is run
in every cell of the grid `Settings`, at every rate of one grid, the same for all rules;
its steps in a cell are those of its best rate. A run has arrived at the first step from
which psi stays below the tolerance. The picture shows the cell in which clipped delta
momentum gains most on momentum, so it is the paper's claim (that delta momentum is
faster) at its best; how often the claim holds over all cells is in the table and in the
result file.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments import lab
from hope_jax.optim.momenta import delta_momentum, momentum
from hope_jax.plot import Figure
from launch import command

NAME = "fig4_toy"
DECAY = 0.9  # of every momentum
CLAIM = ("momentum", "delta_momentum_clip")  # the slower and the faster, it says
DRAWN = (*CLAIM, "delta_momentum")

RULES: dict[str, Callable[[Array], optax.GradientTransformation]] = {
    "gradient_descent": optax.sgd,
    "momentum": partial(momentum, decay=DECAY),
    "delta_momentum": partial(delta_momentum, decay=DECAY),
    "delta_momentum_clip": partial(delta_momentum, decay=DECAY, stability="clip"),
    "delta_momentum_literal": partial(delta_momentum, decay=DECAY, stability="literal"),
    "adam": partial(optax.adam, b1=DECAY),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(lab.Grid):
    """What is searched.

    Attributes:
      k, a, w: values of the constants; every combination is a cell.
      steps: of a run.
      tolerance: of psi, for having arrived.
      start: (r, theta).
    """

    k: tuple[float, ...] = (1.0, 4.0, 16.0)
    a: tuple[float, ...] = (0.5, 1.0, 2.0)
    w: tuple[float, ...] = (1.0, 2.0, 4.0)
    low: float = 1e-5
    high: float = 10.0
    rates: int = 97
    steps: int = 2000
    tolerance: float = 1e-3
    start: tuple[float, float] = (-3.5, 2.0)


SETTINGS = {
    "full": Settings(),
    "smoke": Settings(k=(4.0,), a=(1.0,), w=(2.0,), low=1e-3, rates=9, steps=300),
}


def psi(at: Float[Array, "2"], constants: Float[Array, "3"]) -> Float[Array, ""]:
    """Equation 53 at `(r, theta)`, for `(k, a, w)`."""
    (r, theta), (k, a, w) = at, constants
    return r**2 + k * (r - theta + a * jnp.sin(w * r)) ** 2


def path(
    rule: optax.GradientTransformation,
    constants: Float[Array, "3"],
    start: Float[Array, "2"],
    steps: int,
) -> Float[Array, "N 2"]:
    """Where a rule stands after each of its steps."""

    def step(carry, _):
        at, state = carry
        updates, state = rule.update(jax.grad(psi)(at, constants), state, at)
        at = optax.apply_updates(at, updates)
        return (at, state), at

    _, points = jax.lax.scan(step, (start, rule.init(start)), length=steps)
    return points


def arrival(values: np.ndarray, tolerance: float) -> np.ndarray:
    """The first step (from 1) from which on `values[..., n]` stay below; inf if none.

    >>> float(arrival(np.array([9.0, 0.1, 9.0, 0.1, 0.2]), 1.0))
    4.0
    """
    below = np.cumprod((values < tolerance)[..., ::-1], axis=-1).sum(-1)
    return np.where(below > 0, values.shape[-1] - below + 1.0, np.inf)[()]


class Search(NamedTuple):
    """What came out, by rule; cells in the order of `cells`.

    Attributes:
      cells: `[C, 3]` of (k, a, w).
      steps: rule -> `[C]`, steps to the optimum at the best rate; inf if never.
      rates: rule -> `[C]`, that rate.
      shown: the cell of the picture.
    """

    cells: np.ndarray
    steps: dict[str, np.ndarray]
    rates: dict[str, np.ndarray]
    shown: int


def search(settings: Settings) -> Search:
    """Every rule at every rate in every cell."""
    cells = itertools.product(settings.k, settings.a, settings.w)
    cells = np.array(list(cells), np.float32)
    rates = settings.tried().astype(np.float32)
    start = jnp.array(settings.start, jnp.float32)
    steps, best = {}, {}
    for name, rule in RULES.items():

        def values(cell, rate, rule=rule):
            points = path(rule(rate), cell, start, settings.steps)
            return jax.vmap(lambda at: psi(at, cell))(points)

        over = jax.vmap(jax.vmap(values, (None, 0)), (0, None))
        found = arrival(np.asarray(jax.jit(over)(cells, rates)), settings.tolerance)
        steps[name] = found.min(axis=1)
        best[name] = rates[settings.best(found.T)]
    slow, fast = (np.minimum(steps[name], settings.steps) for name in CLAIM)
    both = np.isfinite(steps[CLAIM[0]]) & np.isfinite(steps[CLAIM[1]])
    shown = int(np.argmax(np.where(both, slow / fast, 0.0)))
    return Search(cells, steps, best, shown)


def summary(found: Search, settings: Settings) -> dict[str, float]:
    """The numbers of the result file; a run that never arrives counts as all steps."""
    most, shown = settings.steps, found.shown
    numbers = {}
    for name, steps in found.steps.items():
        numbers[name] = {
            "shown_steps": float(min(steps[shown], most)),
            "arrived": int(np.isfinite(steps).sum()),
            "median_steps": float(np.median(np.minimum(steps, most))),
            "faster_than_momentum": int((steps < found.steps["momentum"]).sum()),
        }
        if np.isfinite(steps[shown]):
            numbers[name]["shown_rate"] = float(found.rates[name][shown])
    k, a, w = found.cells[shown].tolist()
    where = {"cells": len(found.cells), "shown_k": k, "shown_a": a, "shown_w": w}
    return where | lab.flat(numbers)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The same numbers to read."""
    columns = {
        "steps shown": "{shown_steps:.0f} at {shown_rate:.2g}",
        "median steps": "{median_steps:.0f}",
        "arrived": "{arrived}",
        "beat momentum": "{faster_than_momentum}",
    }
    head = (
        "Steps to the optimum at the best rate: in the cell shown (k {shown_k:g}, "
        "a {shown_a:g}, w {shown_w:g}), and over all {cells} cells."
    )
    return lab.ranked(found, RULES, columns, by="median_steps", head=head)


def draw(found: Search, settings: Settings) -> Figure:
    """Paths over contours, as in the paper, and psi along them."""
    cell = jnp.array(found.cells[found.shown])
    start = jnp.array(settings.start, jnp.float32)
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    plane, curve = figure.subplots(1, 2)

    paths = {}
    for name, rule in RULES.items():
        rate = jnp.asarray(found.rates[name][found.shown])
        points = path(rule(rate), cell, start, settings.steps)
        paths[name] = np.concatenate([start[None], points])

    drawn = np.concatenate([paths[name] for name in DRAWN])
    low = np.minimum(drawn.min(0), (-4.2, -3.0)) - 0.2
    high = np.maximum(drawn.max(0), (1.2, 2.6)) + 0.2
    r, theta = np.meshgrid(*np.linspace(low, high, 300).T)
    height = np.log10(np.asarray(psi((r, theta), tuple(np.asarray(cell)))) + 1e-3)
    plane.contourf(r, theta, height, levels=24, cmap="Greys", alpha=0.75)
    looks = {name: lab.style(i, name) for i, name in enumerate(RULES)}
    for name in DRAWN:
        steps = int(min(found.steps[name][found.shown], settings.steps))
        line = paths[name][: steps + 1]
        look = looks[name] | {"label": f"{looks[name]['label']}: {steps} steps"}
        plane.plot(*line.T, marker=".", lw=1.2, ms=4, **look)
    plane.plot(*settings.start, "ks", ms=6)
    plane.plot(0, 0, "k*", ms=12)
    k, a, w = found.cells[found.shown]
    plane.set(
        xlabel="r",
        ylabel="θ",
        title=f"ψ of equation 53, k = {k:g}, α = {a:g}, ω = {w:g}",
    )
    plane.legend(loc="lower right", fontsize=8)

    for name, points in paths.items():
        values = np.asarray(jax.vmap(lambda at: psi(at, cell))(points))
        curve.semilogy(values, lw=1.5, **looks[name])
    curve.axhline(settings.tolerance, color="#555555", ls=":", lw=1)
    last = [s[found.shown] for s in found.steps.values() if np.isfinite(s[found.shown])]
    curve.set(
        xlabel="step",
        ylabel="ψ",
        xlim=(0, min(settings.steps, 1.2 * max(last, default=settings.steps))),
        ylim=(settings.tolerance / 10, 100 * float(psi(start, cell))),
        title="each at its best rate",
    )
    curve.legend(fontsize=8)
    return figure


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """Median steps of delta momentum over momentum's, clipped and by default."""
    slow = lab.values(found, "all", "momentum_median_steps")
    return [
        line
        for name, words in (("delta_momentum_clip", "clipped "), ("delta_momentum", ""))
        for line in lab.claimed(
            f"Figure 4, steps of {words}delta momentum over momentum's, 27 valleys",
            lab.quotient(lab.values(found, "all", f"{name}_median_steps"), slow),
            "below 1 (curves)",
            lambda ratio: ratio < 1,
            "{:.2f}",
        )
    ]


main = lab.comparison(
    name=NAME,
    doc=__doc__,
    settings=SETTINGS,
    compare=search,
    summary=summary,
    draw=draw,
    table=table,
)

if __name__ == "__main__":
    command.run(main)
