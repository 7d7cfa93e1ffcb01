"""Figure 11: the optimizers of the paper on a vision transformer.

Run:     python -m experiments.fig11_vit --out=DIR  (picture and result)
         Another image set, in the digits' small model: --data=FOLDER or
         --data=tfds:NAME --data_dir=PREPARED. Figure 11's own, one seed, on an
         accelerator: --scale=s16 or b16 --data=FOLDER (ImageNet-21K, sub-folders train,
         valid and test), or a set of TFDS with --splits='train[:99%],train[99%:],test'.
Smoke:   add --scale=smoke (few steps and rates, half a minute); a test runs it so.
Expect:  rules that orthogonalise are ahead (test loss of AdaMuon 0.106, M3 0.121, Muon
         0.145, AdamW 0.191); M3 is not shown to beat Muon; experiments/log.md has more.
Cost:    10 minutes of one CPU core.

scikit-learn's digits, divided into train, valid and test for good. Every optimizer is
tuned alike: each rate of one grid for all, with each weight decay, one run each on a
tuning seed; the least cross-entropy on `valid` at the end of the run chooses. Numbers
and curves are of other seeds (of weights and batches, the same for all optimizers) and
of `test`, which tuning does not see. All have the same warm-up, cosine, clipping of the
gradients' norm and decays (b1, b2); rules for matrices leave all else to AdamW.

The paper says neither rates nor decays nor steps; it shows M3 below AdamW and Muon.
`momentum` is here to tell what a delta rule or a network adds to it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import lab
from experiments.benchmarks import timing
from hope_jax.data import images as image_files
from hope_jax.data.images import Images
from hope_jax.models import vit
from hope_jax.plot import Figure
from hope_jax.train import images
from hope_jax.train.config import OptimizerConfig
from launch import command

NAME = "fig11_vit"
OPTIMIZERS = ("adamw", "muon", "adamuon", "m3")
OPTIMIZERS += ("momentum", "delta_momentum", "deep_momentum")
_TUNING_SEED = 1000
_TIMED = 20  # steps at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(lab.Grid):
    """What is run.

    Attributes:
      model: the transformer; `classes` is set from the data.
      steps, batch: of a run.
      tuning_steps: of a run of tuning.
      every: steps between two points of a curve; both counts of steps are multiples.
      warmup: steps.
      final_fraction: of the rate, where the cosine ends.
      weight_decays: the other side of the grid of learning rates.
      clip_norm: most norm of a gradient.
      seeds: for the numbers; tuning has another.
      target: cross-entropy on `test`, the steps to which are counted.
      augment: random crops and mirroring, for photographs.
      threads: optimizers that run at once.
      split_batch: divide each batch among all devices.
    """

    model: vit.ViTConfig
    steps: int = 300
    batch: int = 64
    tuning_steps: int = 300
    every: int = 15
    warmup: int = 20
    final_fraction: float = 0.01
    low: float = 1e-3
    high: float = 10.0
    rates: int = 9
    weight_decays: tuple[float, ...] = (0.0, 0.1)
    clip_norm: float = 1.0
    seeds: int = 5
    target: float = 0.25
    augment: bool = False
    threads: int = 2
    split_batch: bool = False

    def __post_init__(self):
        for name in ("steps", "tuning_steps"):
            if getattr(self, name) % self.every:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of every "
                    f"({self.every})."
                )


_PAPER = Settings(
    model=vit.get("s16"),
    steps=100_000,
    batch=1024,
    tuning_steps=10_000,
    every=500,
    warmup=5000,
    low=3e-4,
    high=3e-3,
    rates=3,
    weight_decays=(0.1,),
    seeds=1,
    target=4.0,
    augment=True,
    threads=1,
    split_batch=True,
)
SETTINGS = {
    "full": Settings(model=vit.get("digits")),
    "smoke": Settings(
        model=vit.get("digits", d_model=8, hidden=16, layers=1, heads=2, patch=4),
        steps=20,
        batch=16,
        tuning_steps=20,
        every=5,
        warmup=2,
        low=1e-3,
        high=1e-1,
        rates=2,
        weight_decays=(0.0, 0.1),
        seeds=2,
        target=2.3,
    ),
    "s16": _PAPER,
    "b16": dataclasses.replace(_PAPER, model=vit.get("b16")),
}


class Lane(NamedTuple):
    """What runs of one optimizer differ in."""

    rate: float
    weight_decay: float
    seed: int


@functools.cache
def program(name: str, steps: int, settings: Settings) -> images.Program:
    """One optimizer, compiled once for all rates, decays and seeds."""
    config = OptimizerConfig(
        rule=name,
        warmup_steps=settings.warmup,
        final_fraction=settings.final_fraction,
        clip_norm=settings.clip_norm,
    )

    def rule(lane):
        return images.optimizer(config, lane.rate, lane.weight_decay, steps)

    return images.program(settings.model, rule)


class Data(NamedTuple):
    """To train, tune and test on."""

    train: Images
    valid: Images
    test: Images


def load(
    settings: Settings,
    data: str = "digits",
    splits: Sequence[str] = ("train", "valid", "test"),
    data_dir: str | None = None,
) -> tuple[Data, Settings]:
    """The images in the size of the model, and the settings with their classes."""
    if len(splits) != 3:
        raise ValueError(
            f"splits must be three, to train, tune and test on; got {list(splits)}."
        )
    model = settings.model
    shape = {"size": model.image, "channels": model.channels, "data_dir": data_dir}
    found = Data(*(image_files.load(data, split=s, **shape) for s in splits))
    classes = len(found.train.classes)
    model = dataclasses.replace(model, classes=classes)
    return found, dataclasses.replace(settings, model=model)


class Outcome(NamedTuple):
    """One optimizer.

    Attributes:
      rate, weight_decay: chosen.
      edge: whether the rate is the first or the last of the grid.
      valid: cross-entropy on `valid` of every rate and decay, `[rates, decays]`.
      curves: of the seeds, on `test`.
      step_ms: milliseconds of a step (`step_times`).
    """

    rate: float
    weight_decay: float
    edge: bool
    valid: np.ndarray
    curves: images.Curves
    step_ms: float


def grid(settings: Settings) -> list[Lane]:
    """Every rate with every weight decay: the same for all optimizers."""
    s = settings
    rates = s.tried().tolist()
    return [Lane(r, d, _TUNING_SEED) for r in rates for d in s.weight_decays]


def compare(
    settings: Settings, data: Data, names: Sequence[str] | None = None
) -> dict[str, Outcome]:
    """Every optimizer, tuned and then run on the seeds."""
    print(*data, sep="\n")
    s, tried, names = settings, grid(settings), names or OPTIMIZERS
    reader = images.Reader(data.train, s.batch, s.every, s.augment)
    for seed in (_TUNING_SEED, *range(s.seeds)):
        reader.keep(seed, max(s.steps, s.tuning_steps))  # before threads share it

    def both(name):
        def train(lanes, held, steps):
            given = program(name, steps, s), lanes, reader, held, steps
            return images.run(s.model, *given, divided=s.split_batch)

        # As Optax needs it; a thread does not inherit it.
        with jax.numpy_dtype_promotion("standard"):
            valid = train(tried, data.valid, s.tuning_steps).held[:, -1]
            best = tried[s.best(valid, len(tried))]
            lanes = [best._replace(seed=seed) for seed in range(s.seeds)]
            return best, valid, train(lanes, data.test, s.steps)

    with ThreadPoolExecutor(s.threads) as pool:
        found = dict(zip(names, pool.map(both, names), strict=True))
    times = step_times({name: best for name, (best, *_) in found.items()}, reader, s)
    return {
        name: Outcome(
            rate=best.rate,
            weight_decay=best.weight_decay,
            edge=s.rates > 1 and best.rate in (tried[0].rate, tried[-1].rate),
            valid=valid.reshape(s.rates, -1),
            curves=curves,
            step_ms=times[name],
        )
        for name, (best, valid, curves) in found.items()
    }


def step_times(
    lanes: dict[str, Lane], reader: images.Reader, settings: Settings
) -> dict[str, float]:
    """Milliseconds of a step: medians of rounds in which all take turns.

    Of all cores' time on a CPU, which other programs share; by the clock elsewhere.
    """
    place, divide = images.placement(settings.batch, settings.split_batch)
    count = min(settings.every, _TIMED)
    parts = [divide(*part) for part in reader.parts(_TUNING_SEED, count)]

    def stepping(name: str, lane: Lane) -> Callable[[], Any]:
        compiled = program(name, settings.steps, settings)
        carry = place(compiled.begin(lane))

        def run():
            nonlocal carry
            for part in parts:
                carry, loss = compiled.advance(lane, carry, *part)
            return loss

        return run

    times = timing.interleave({n: stepping(n, lane) for n, lane in lanes.items()}, 5)
    kind = "cpu" if jax.default_backend() == "cpu" else "wall"
    steps = sum(part[0].shape[0] for part in parts)
    return {
        n: 1e3 * float(np.median(getattr(t, kind))) / steps for n, t in times.items()
    }


def steps_to(held: np.ndarray, target: float, every: int) -> np.ndarray:
    """The first point of each row at or below `target`, in steps; inf if none.

    >>> steps_to(np.array([[2.0, 0.9, 1.1], [2.0, 2.0, 2.0]]), 1.0, every=20).tolist()
    [40.0, inf]
    """
    there = held <= target
    return np.where(there.any(axis=1), every * (there.argmax(axis=1) + 1.0), np.inf)


def summary(outcomes: dict[str, Outcome], settings: Settings) -> dict[str, float]:
    """The numbers of the result file: means over seeds and spreads."""
    numbers = {}
    for name, outcome in outcomes.items():
        c = outcome.curves
        arrived = steps_to(c.held, settings.target, settings.every)
        valid = np.where(np.isnan(outcome.valid), np.inf, outcome.valid)
        numbers[name] = {
            **lab.spread("train_loss", c.train[:, -1]),
            **lab.spread("test_loss", c.held[:, -1]),
            **lab.spread("test_accuracy", c.accuracy[:, -1]),
            "arrived": float(np.isfinite(arrived).sum()),
            "steps_to_target": float(arrived.mean()),
            "least_test_loss": float(c.held.mean(axis=0).min()),
            "valid_loss": float(valid.min()),
            "rate": outcome.rate,
            "weight_decay": outcome.weight_decay,
            "rate_at_edge": float(outcome.edge),
            "step_ms": outcome.step_ms,
        }
    return lab.flat(numbers)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The same numbers to read, the best on `test` first."""
    columns = {
        "rate": "{rate:.2g}",
        "at edge": "{rate_at_edge:g}",
        "decay": "{weight_decay:g}",
        "train loss": "{train_loss:.4f} ({train_loss_sd:.4f})",
        "test loss": "{test_loss:.4f} ({test_loss_sd:.4f})",
        "test accuracy": "{test_accuracy:.2%} ({test_accuracy_sd:.2%})",
        "steps to target": "{steps_to_target:.0f}",
        "ms a step": "{step_ms:.2f}",
    }
    head = (
        "Means over {seeds} seeds (standard deviation) at step {steps}, each tuned over"
        " {rates} rates from {low:g} to {high:g} and decays {weight_decays}; the target"
        " is a test loss of {target:g}."
    )
    more = {"by": "test_loss", "head": head, "missing": "not all"}
    return lab.ranked(found, OPTIMIZERS, columns, **more)


def draw(outcomes: dict[str, Outcome], settings: Settings) -> Figure:
    """Train and test loss against steps, as in the paper: means, bands over seeds."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, kind, title in zip(
        figure.subplots(1, 2), ("train", "held"), ("train", "test"), strict=True
    ):
        for i, (name, outcome) in enumerate(outcomes.items()):
            values = getattr(outcome.curves, kind)
            at = settings.every * np.arange(1, values.shape[1] + 1)
            line = lab.style(i, f"{name} {values[:, -1].mean():.2g}")
            lab.band(axes, at, values, **line)
        axes.set(
            xlabel="step", ylabel="cross-entropy", title=f"{title} loss", yscale="log"
        )
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8, title="at the end", title_fontsize=8, handlelength=3)
    return figure


def _rows(flags) -> dict[str, tuple[Data, Settings]]:
    if flags.data != "digits" and not flags.out:
        raise ValueError(f"--data={flags.data} needs --out: results are of the digits.")
    given = SETTINGS[flags.scale], flags.data, flags.splits, flags.data_dir
    return {"all": load(*given)}


def _saved(task: lab.Task) -> dict[str, Any]:
    shown = {"data": task.flags.data, "splits": task.flags.splits}
    return shown | dataclasses.asdict(task.config[1])


def _define(define) -> None:
    define.string("data", "digits", "digits, tfds:NAME, a folder")
    define.string("data_dir", None, "where tfds:NAME was prepared")
    define.list("splits", ["train", "valid", "test"], "to train, tune and test on")


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """M3's loss over Muon's, which has to be lower by more than seeds differ."""
    spread = max(
        (r["metrics"][f"{n}_test_loss_sd"] / r["metrics"]["muon_test_loss"])
        for n in ("m3", "muon")
        for r in found
    )
    m3, muon = (lab.values(found, "all", f"{n}_test_loss") for n in ("m3", "muon"))
    return lab.claimed(
        f"Figure 11, test loss of M3 over Muon's, digits, ± {spread:.2f} by seed",
        lab.quotient(m3, muon),
        "below 1 (curves)",
        lambda ratio: ratio < 1 - spread,
        "{:.2f}",
    )


main = lab.comparison(
    name=NAME,
    doc=__doc__,
    settings=SETTINGS,
    compare=lambda config: compare(config[1], config[0]),
    summary=lambda found, config: summary(found, config[1]),
    draw=lambda found, config: draw(found, config[1]),
    table=table,
    rows=_rows,
    define=_define,
    saved=_saved,
)

if __name__ == "__main__":
    command.run(main)
