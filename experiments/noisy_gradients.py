"""Noisy labels and noisy gradients: which memory of gradients filters them.

Run:     python -m experiments.noisy_gradients --out=DIR  (picture and result)
Smoke:   add --scale=smoke (few steps and rates, seconds); a test runs it so.
Expect:  no rule is best everywhere; experiments/log.md says which is where.
Cost:    eight minutes of one CPU core.

A network of one hidden layer learns scikit-learn's digits from minibatches, at a
constant rate, in four kinds of noise (`hope_jax.data.synthetic.noise`), each at two
levels: a share of the labels replaced for good, or noise in the gradients in units of
u, the root mean square of the clean gradient where training starts. Every rule sees the
same digits, batches, and noise. It has the same budget at each level: all rates of one
grid for all, each with both decays of its memory, of which the pair with the least loss
on clean validation digits is kept (gradient descent has no decay, and so but half the
choice). That uses tuning seeds; numbers are of other seeds, on test digits that no
tuning sees. A seed is a start, an order of batches and a draw of the noise.

Rules are told apart by their loss on the same seed: a run names those whose mean
difference from the best is no larger than its standard deviation over seeds. A loss
above 100, or none at all, counts as 100: it diverged.
"""

import dataclasses
import functools
import os

# LAPACK dead-locks a pool of two of XLA's threads, and its own threads stand in the way
# of XLA's. Both are read when JAX starts.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array

from experiments import lab
from hope_jax.data.synthetic.noise import Noise
from hope_jax.evaluate import noise as noise_lib
from hope_jax.evaluate.noise import Scores
from hope_jax.memory.compose import MemoryConfig
from hope_jax.optim.generalised import from_memory
from hope_jax.optim.matrices import with_adamw
from hope_jax.optim.momenta import delta_momentum, momentum
from hope_jax.optim.orthogonal import scale_by_adamuon
from hope_jax.optim.rules.deep_momentum import deep_momentum
from hope_jax.optim.rules.m3 import scale_by_m3
from hope_jax.plot import Figure
from launch import command

NAME = "noisy_gradients"

Rule = Callable[[Array, Array], optax.GradientTransformation]


def _memory(inner_rate: float, **bias) -> Rule:
    """A matrix for each weight matrix, which maps directions of gradients to
    themselves as well as its bias lets it."""
    config = MemoryConfig(architecture="linear", rule="gd", dgd="none", chunk=1, **bias)
    return lambda rate, decay: from_memory(
        rate, config, retention=decay, inner_rate=inner_rate
    )


def _ours(rule, **more) -> Rule:
    return lambda rate, decay: rule(rate, decay=decay, **more)


def _matrices(rule: Callable[[Array], optax.GradientTransformation]) -> Rule:
    return lambda rate, decay: with_adamw(rule(decay), rate, b1=decay)


RULES: dict[str, Rule] = {
    "gradient_descent": lambda rate, decay: optax.sgd(rate),
    "momentum": _ours(momentum),
    "clipped_momentum": lambda rate, decay: optax.chain(
        optax.clip_by_global_norm(1.0), momentum(rate, decay=decay)
    ),
    "delta_momentum": _ours(delta_momentum),
    "delta_momentum_matrix": _ours(delta_momentum, form="matrix"),
    "deep_momentum": _ours(deep_momentum),
    "deep_momentum_huber": _ours(deep_momentum, objective="huber"),
    "memory_l2": _memory(0.5, bias="l2"),
    "memory_huber": _memory(0.5, bias="huber", threshold=0.1),
    "memory_l1": _memory(0.05, bias="lp", power=1.0),
    "adamw": lambda rate, decay: optax.adamw(rate, b1=decay),
    "lion": lambda rate, decay: optax.lion(rate, b1=decay),
    "muon": lambda rate, decay: optax.contrib.muon(
        rate, beta=decay, adam_b1=decay, consistent_rms=0.2
    ),
    "adamuon": _matrices(lambda decay: scale_by_adamuon(decay=decay)),
    "m3": _matrices(lambda decay: scale_by_m3(periods=(1, 10), decays=(decay, 0.9))),
}
NOISES: dict[str, Noise] = {
    "clean": Noise(),
    "labels-0.2": Noise(labels=0.2),
    "labels-0.5": Noise(labels=0.5),
    "gaussian-3": Noise(gaussian=3.0),
    "gaussian-10": Noise(gaussian=10.0),
    "student-3": Noise(student=3.0),
    "student-10": Noise(student=10.0),
    "spikes-30": Noise(spikes=30.0),
    "spikes-300": Noise(spikes=300.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(lab.Grid):
    """What is run.

    Attributes:
      hidden: width of the network.
      steps, batch: of training.
      decays: of every memory, each tried with all rates.
      seeds: for tuning, and as many others for the numbers.
    """

    hidden: int = 32
    steps: int = 300
    batch: int = 32
    low: float = 3e-4
    high: float = 9.5
    rates: int = 10
    decays: tuple[float, ...] = (0.9, 0.99)
    seeds: int = 5

    def trials(self) -> list[tuple[float, float]]:
        """The rates and decays that every rule tries, at every noise."""
        rates = self.tried().tolist()
        return [(rate, decay) for decay in self.decays for rate in rates]


SETTINGS = {
    "full": Settings(),
    "smoke": Settings(hidden=4, steps=5, batch=4, rates=2, decays=(0.9,), seeds=2),
}


class Outcome(NamedTuple):
    """A rule in one noise: the rate and decay of its tuning, and scores by seed."""

    rate: float
    decay: float
    scores: Scores


def compare(
    settings: Settings, report: Callable[[str], None] = print
) -> dict[tuple[str, str], Outcome]:
    """Every rule in every noise, at the best of its trials: `(rule, noise) -> ...`."""
    s, digits, trials = settings, noise_lib.load(), settings.trials()
    keys = jax.random.split(jax.random.key(0), 2 * s.seeds)
    sizes = {"hidden": s.hidden, "steps": s.steps, "batch": s.batch}
    outcomes = {}
    for name, rule in RULES.items():
        best, found = noise_lib.tuned(
            *(rule, digits, list(NOISES.values()), np.array(trials, np.float32)),
            lambda scores: s.best(scores, len(trials)),
            *(keys[: s.seeds], keys[s.seeds :]),
            **sizes,
        )
        for i, noise in enumerate(NOISES):
            scores = jax.tree.map(lambda a, i=i: a[:, i], found)
            outcomes[name, noise] = Outcome(*trials[best[i]], scores)
        report(f"{name} is done")
    return outcomes


def tied(outcomes: dict[tuple[str, str], Outcome], noise: str) -> list[str]:
    """The rules that cannot be told from the best, which is the first of them."""
    losses = {name: outcomes[name, noise].scores.loss for name in RULES}
    order = sorted(RULES, key=lambda name: losses[name].mean())
    best = losses[order[0]]

    def near(name):
        difference = losses[name] - best
        return difference.mean() <= difference.std(ddof=1)

    return [name for name in order if near(name)]


def summary(outcomes: dict[tuple[str, str], Outcome], noise: str) -> dict[str, float]:
    """The numbers of one result file: means over seeds, and standard deviations."""
    found = {}
    for name in RULES:
        rate, decay, scores = outcomes[name, noise]
        found[name] = {"rate": rate, "decay": decay}
        for measure in ("loss", "accuracy"):
            found[name] |= lab.spread(measure, getattr(scores, measure), ddof=1)
    return lab.flat(found)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The same numbers to read, best first."""
    columns = {
        "test loss (sd)": "{loss:.3f} ({loss_sd:.3f})",
        "accuracy (sd)": "{accuracy:.3f} ({accuracy_sd:.3f})",
        "rate": "{rate:.1e}",
        "decay": "{decay:g}",
    }
    head = "Means (and standard deviations) over {seeds} unseen seeds."
    return lab.ranked(found, RULES, columns, by="loss", head=head)


def picture(outcomes: dict[tuple[str, str], Outcome], settings: Settings) -> Figure:
    """Test losses: a panel a kind of noise, a line a rule, a colour a level."""
    kinds = Noise._fields
    figure = Figure(figsize=(13, 2.0 + 0.36 * len(RULES)), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True)
    mean = {key: outcome.scores.loss.mean() for key, outcome in outcomes.items()}
    order = sorted(RULES, key=lambda name: mean[name, "clean"])
    for panel, kind in zip(panels, kinds, strict=True):
        levels = [noise for noise in NOISES if noise.startswith(kind)]
        series = {
            name: [outcomes[rule, noise].scores.loss for rule in order]
            for name, noise in zip(
                ("no noise", "lower level", "higher level"),
                ("clean", *levels),
                strict=True,
            )
        }
        lab.points(panel, order, series)
        panel.axvline(np.log(10), color="#555555", lw=0.8, ls=":")
        amounts = " and ".join(noise.rpartition("-")[2] for noise in levels)
        panel.set(xscale="log", title=f"{kind}, {amounts}", xlabel="clean test loss")
        panel.tick_params(axis="x", which="both", labelsize=8, rotation=45)
    lab.legend(figure, panel, columns=3)
    figure.suptitle(
        f"Tuned at each level; mean and range of {settings.seeds} seeds; "
        "the dotted line is chance"
    )
    return figure


@functools.cache
def _compared(settings: Settings, file: Path) -> dict[tuple[str, str], Outcome]:
    """All rows, which share their programs, and their picture."""
    outcomes = compare(settings)
    for noise in NOISES:
        print(f"{noise}: cannot be told apart: {', '.join(tied(outcomes, noise))}")
    lab.save(picture(outcomes, settings), file)
    return outcomes


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=lambda flags: dict.fromkeys(NOISES, SETTINGS[flags.scale]),
    measure=lambda task: summary(_compared(task.config, task.picture), task.row),
    table=table,
)

if __name__ == "__main__":
    command.run(main)
