"""Noisy labels and noisy gradients: which memory of gradients filters them.

Run:     python -m experiments.noisy_gradients --out=DIR  (picture and result)
Smoke:   add --scale=smoke (few steps and rates, seconds); a test runs it so.
Expect:  no rule is best everywhere (test losses; 0.092 of Muon's is the least without
         noise, 0.097 M3's, 0.111 gradient descent's, 0.144 momentum's).
         labels: M3 is first (0.40 and 0.94; momentum 0.46, 1.06), but within the spread
         delta momentum and Lion are its equals at the lower level, and AdaMuon, Lion
         and Muon at the higher.
         gaussian: hardly any memory filters it. At the higher level ten of the fifteen
         rules, plain gradient descent among them, are equal (0.36 to 0.38); at the
         lower one Muon and Lion are ahead (0.175; 0.189).
         student: what bounds each step wins, Lion and AdaMuon (0.28, 0.29; momentum
         0.36), then AdaMuon, M3, delta momentum by matrices and AdamW (0.63 to 0.64;
         momentum 0.93).
         spikes: of 300 u, delta momentum by matrices does not notice them (0.139), as
         clipping does not (0.145); AdaMuon and Muon suffer (0.19, 0.20), AdamW more
         (0.48), momentum, delta momentum by elements and deep momentum most (0.9).
         Robust biases are no help: memories of directions are robust already, and the
         size of a gradient goes by them. On directions Huber's loss is the l2 loss.
Cost:    eight minutes of one CPU core.

A network of one hidden layer learns scikit-learn's digits from minibatches, at a
constant rate. Four kinds of noise, each at two levels:

    labels    a share of the training labels is replaced by another class, for good
    gaussian  g + s z,  z ~ N(0, I) at every step
    student   g + s t,  t of Student's distribution with 2 degrees of freedom, number
              by number: its variance is infinite
    spikes    g + s z at one step of fifty, g at the others

where s is in units of u, the root mean square of the clean gradient where training
starts. Every rule sees the same digits, batches, and noise. It has the same budget at
each level: all rates of one grid for all, each with both decays of its memory, of
which the pair with the least loss on clean validation digits is kept (gradient descent
has no decay, and so but half the choice). That uses tuning seeds; numbers are of other
seeds, on test digits that no tuning sees. A seed is a start, an order of batches and a
draw of the noise.

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
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from experiments import lab
from hope_jax.data import images
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
SPIKES = 0.02  # the share of steps that have one
DIVERGED = 100.0

Rule = Callable[[Array, Array], optax.GradientTransformation]


def _memory(inner_rate: float, **bias) -> Rule:
    """A matrix for each weight matrix, which maps directions of gradients to
    themselves as well as its bias lets it."""
    config = MemoryConfig(architecture="linear", rule="gd", dgd="none", chunk=1, **bias)
    return lambda rate, decay: from_memory(
        rate, config, retention=decay, inner_rate=inner_rate
    )


RULES: dict[str, Rule] = {
    "gradient_descent": lambda rate, decay: optax.sgd(rate),
    "momentum": lambda rate, decay: momentum(rate, decay=decay),
    "clipped_momentum": lambda rate, decay: optax.chain(
        optax.clip_by_global_norm(1.0), momentum(rate, decay=decay)
    ),
    "delta_momentum": lambda rate, decay: delta_momentum(rate, decay=decay),
    "delta_momentum_matrix": lambda rate, decay: delta_momentum(
        rate, decay=decay, form="matrix"
    ),
    "deep_momentum": lambda rate, decay: deep_momentum(rate, decay=decay),
    "deep_momentum_huber": lambda rate, decay: deep_momentum(
        rate, decay=decay, objective="huber"
    ),
    "memory_l2": _memory(0.5, bias="l2"),
    "memory_huber": _memory(0.5, bias="huber", threshold=0.1),
    "memory_l1": _memory(0.05, bias="lp", power=1.0),
    "adamw": lambda rate, decay: optax.adamw(rate, b1=decay),
    "lion": lambda rate, decay: optax.lion(rate, b1=decay),
    "muon": lambda rate, decay: optax.contrib.muon(
        rate, beta=decay, adam_b1=decay, consistent_rms=0.2
    ),
    "adamuon": lambda rate, decay: with_adamw(
        scale_by_adamuon(decay=decay), rate, b1=decay
    ),
    "m3": lambda rate, decay: with_adamw(
        scale_by_m3(periods=(1, 10), decays=(decay, 0.9)), rate, b1=decay
    ),
}


class Noise(NamedTuple):
    """How much of each kind: a share of the labels, and s / u of the other three."""

    labels: Float[Array, "*C"] | float = 0.0
    gaussian: Float[Array, "*C"] | float = 0.0
    student: Float[Array, "*C"] | float = 0.0
    spikes: Float[Array, "*C"] | float = 0.0


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


class Digits(NamedTuple):
    """Images in [0, 1], a row each, and their classes."""

    x: Float[Array, "N 64"]
    y: Int[Array, " N"]


def load() -> dict[str, Digits]:
    """Scikit-learn's digits: `train`, `valid` and `test`."""
    found = {}
    for split in ("train", "valid", "test"):
        digits = images.load("digits", split=split)
        (batch,) = images.evaluation_batches(digits, len(digits))
        x = jnp.asarray(batch["image"]).reshape(len(digits), -1)
        found[split] = Digits(x, jnp.asarray(batch["label"]))
    return found


def begin(hidden: int, key: Array) -> PyTree:
    """The network where training starts."""

    def layer(key, rows, columns):
        kernel = jax.random.normal(key, (rows, columns)) * (2.0 / rows) ** 0.5
        return {"kernel": kernel, "bias": jnp.zeros(columns)}

    keys = jax.random.split(key)
    return {"hidden": layer(keys[0], 64, hidden), "out": layer(keys[1], hidden, 10)}


def logits(params: PyTree, x: Float[Array, "B 64"]) -> Float[Array, "B 10"]:
    def layer(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"][None, :]

    return layer("out", jax.nn.relu(layer("hidden", x)))


def loss(params: PyTree, x: Array, y: Array) -> Float[Array, ""]:
    """Cross-entropy in nats; that of chance is 2.30."""
    said = logits(params, x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(said, y))


def replace_labels(y: Int[Array, " N"], share, key: Array) -> Int[Array, " N"]:
    """`y` with a share of it turned into any other class."""
    keys = jax.random.split(key)
    other = (y + jax.random.randint(keys[0], y.shape, 1, 10)) % 10
    return jnp.where(jax.random.uniform(keys[1], y.shape) < share, other, y)


def draw(noise: Noise, like: PyTree, key: Array) -> PyTree:
    """What is added to a gradient at one step, in units of u."""
    flat, restore = ravel_pytree(like)
    keys = jax.random.split(key, 3)
    z = jax.random.normal(keys[0], flat.shape)
    # The inverse of the distribution function is known for 2 degrees of freedom.
    p = jax.random.uniform(keys[1], flat.shape, minval=1e-6, maxval=1.0 - 1e-6)
    t = (2.0 * p - 1.0) / jnp.sqrt(2.0 * p * (1.0 - p))
    spike = jnp.where(jax.random.uniform(keys[2]) < SPIKES, noise.spikes, 0.0)
    return restore((noise.gaussian + spike) * z + noise.student * t)


class Scores(NamedTuple):
    """Clean losses on validation and test digits, and the test's accuracy."""

    validation: Float[Array, "*S"]
    loss: Float[Array, "*S"]
    accuracy: Float[Array, "*S"]


def train(
    rule: optax.GradientTransformation,
    digits: dict[str, Digits],
    noise: Noise,
    settings: Settings,
    key: Array,
) -> Scores:
    """One network, trained in noise and scored without."""
    s, rule = settings, optax.with_extra_args_support(rule)
    keys = jax.random.split(key, 3)
    x, y = digits["train"]
    labels = replace_labels(y, noise.labels, keys[0])
    params = begin(s.hidden, keys[1])
    clean = ravel_pytree(jax.grad(loss)(params, x, y))[0]
    unit = jnp.sqrt(jnp.mean(clean**2))

    def step(carry, key):
        params, state = carry
        keys = jax.random.split(key)
        batch = jax.random.randint(keys[0], (s.batch,), 0, len(y))
        gradient = jax.grad(loss)(params, x[batch], labels[batch])
        added = draw(noise, params, keys[1])
        gradient = jax.tree.map(lambda g, n: g + unit * n, gradient, added)
        updates, state = rule.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    steps = jax.random.split(keys[2], s.steps)
    (params, _), _ = jax.lax.scan(step, (params, rule.init(params)), steps)

    def bounded(value):
        return jnp.where(value < DIVERGED, value, DIVERGED)  # also where it is NaN

    valid, test = digits["valid"], digits["test"]
    right = jnp.argmax(logits(params, test.x), axis=-1) == test.y
    return Scores(
        bounded(loss(params, *valid)),
        bounded(loss(params, *test)),
        jnp.mean(right.astype(jnp.float32)),
    )


class Outcome(NamedTuple):
    """A rule in one noise: the rate and decay of its tuning, and scores by seed."""

    rate: float
    decay: float
    scores: Scores


def compare(
    settings: Settings, report: Callable[[str], None] = print
) -> dict[tuple[str, str], Outcome]:
    """Every rule in every noise, at the best of its trials: `(rule, noise) -> ...`."""
    s, digits = settings, load()
    noises = jax.tree.map(lambda *each: jnp.array(each), *NOISES.values())
    keys = jax.random.split(jax.random.key(0), 2 * s.seeds)
    trials = np.array(s.trials(), np.float32)
    outcomes = {}
    for name, rule in RULES.items():

        def one(rate, decay, noise, key, rule=rule):
            return train(rule(rate, decay), digits, noise, s, key)

        # A program a rule: all noises and seeds, at a rate and decay for each noise.
        by_noise = jax.vmap(one, (0, 0, 0, None))
        program = jax.jit(jax.vmap(by_noise, (None, None, None, 0)))

        def run(pairs, keys, program=program):
            found = program(pairs[:, 0], pairs[:, 1], noises, keys)
            return jax.tree.map(lambda score: np.asarray(score, np.float64), found)

        every = np.ones((len(NOISES), 1), np.float32)
        tried = [run(every * pair, keys[: s.seeds]) for pair in trials]
        validation = np.stack([t.validation.mean(0) for t in tried])
        best = s.best(validation, len(trials))
        found = run(trials[best], keys[s.seeds :])
        for i, noise in enumerate(NOISES):
            outcomes[name, noise] = Outcome(
                *s.trials()[best[i]], jax.tree.map(lambda a, i=i: a[:, i], found)
            )
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
    numbers = {}
    for name in RULES:
        rate, decay, scores = outcomes[name, noise]
        numbers |= {f"{name}_rate": rate, f"{name}_decay": decay}
        for measure in ("loss", "accuracy"):
            values = getattr(scores, measure)
            numbers[f"{name}_{measure}"] = float(values.mean())
            numbers[f"{name}_{measure}_sd"] = float(values.std(ddof=1))
    return numbers


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
    figure = Figure(figsize=(13, 0.8 + 0.36 * len(RULES)), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True)
    mean = {key: outcome.scores.loss.mean() for key, outcome in outcomes.items()}
    order = sorted(RULES, key=lambda name: mean[name, "clean"])
    for panel, kind in zip(panels, kinds, strict=True):
        series = {
            noise.rpartition("-")[2]: [outcomes[n, noise].scores.loss for n in order]
            for noise in NOISES
            if noise == "clean" or noise.startswith(kind)
        }
        lab.points(panel, order, series)
        panel.axvline(np.log(10), color="#555555", lw=0.8, ls=":")
        panel.set(xscale="log", title=kind, xlabel="clean test loss")
        panel.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3
        )
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
