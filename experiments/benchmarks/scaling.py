"""Meshes: what sharing a step costs, and optimizers whose state is in parts.

Run:     python -m experiments.benchmarks.scaling
Smoke:   add --quick --out=DIR (small sizes); a test does so.
Goal:    a step with M3 or Muon on a mesh at most 1.25 times one with AdamW.
Expect:  what was measured last is in experiments/results/benchmarks/, with its commit.
Cost:    ten minutes on 2 CPU cores, most of them to compile.

The devices are virtual ones of this machine, which share its cores: more of them make
nothing faster. The work of a step is the same on every mesh, so what a step takes
longer than on one device is what the mesh costs: programs that wait for one another,
copies, collectives, and products too small for a core. In CPU seconds of all threads
that is overhead alone; on the clock two devices may also use two cores better than one
does. Real devices have memory and links of their own, of which this says nothing.

`hope` is a small Hope whose levels move, on 1, 2, 4 and 8 devices along each axis of a
mesh. Optimizers are those of a Transformer, on two meshes of 4. Newton-Schulz makes
`30 d` operations a parameter of a matrix of width d, the model `6` for each token of
the batch, so that a step with Muon takes at least `1 + 30 d / (6 tokens)` of one with
AdamW: 1.16 here. Of 0.5M tokens and d = 2,048 that is 1.02.
"""

import dataclasses
import os

# A pool of no more threads than there are devices can dead-lock; JAX reads both when it
# starts.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments import lab
from experiments.benchmarks import timing
from hope_jax import optim
from hope_jax.models import lm, zoo
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.models.mixers.self_modifying import MLP, SelfModifyingConfig
from hope_jax.train import guard, loop, sharding
from hope_jax.train import state as state_lib
from hope_jax.train.config import OptimizerConfig, RunConfig, TrainConfig
from hope_jax.train.metrics import write_benchmark
from launch import command

GOAL = 1 / 1.25  # of the speed of AdamW
TOLERANCE = 1e-4  # of first losses
CLOCKS = (
    ("cpu", "steps per second of one core"),
    ("wall", "steps per second"),
)
PERIOD = 10  # steps after which M3 has done all that it ever does


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is timed.

    Attributes:
      hope, hope_rows: a model whose levels move, and the rows of a step.
      transformer, transformer_rows: the model that optimizers move.
      seq_len: tokens of a row.
      axes: of meshes.
      counts: of devices.
      rules: optimizers beside AdamW.
      rounds: interleaved rounds.
    """

    hope: ModelConfig
    transformer: ModelConfig
    hope_rows: int = 8
    transformer_rows: int = 16
    seq_len: int = 256
    axes: tuple[str, ...] = sharding.AXES
    counts: tuple[int, ...] = (1, 2, 4, 8)
    rules: tuple[str, ...] = ("muon", "m3")
    rounds: int = 5


def _twin(width: int, layers: int, vocab: int, seq_len: int) -> ModelConfig:
    model = with_context(zoo.get("transformer_tiny"), seq_len)
    cms = dataclasses.replace(model.cms, hidden=4 * width)
    return dataclasses.replace(
        model, d_model=width, layers=layers, vocab=vocab, cms=cms
    )


FULL = Sizes(
    hope=ModelConfig(
        name="hope",
        d_model=64,
        layers=1,
        heads=8,
        vocab=1024,
        mixer=SelfModifyingConfig(
            memory=dataclasses.replace(MLP, chunk=64), projection_chunk=64
        ),
        cms=CMSConfig(levels=(CMSLevel(period=64), CMSLevel(period=4096)), hidden=128),
    ),
    transformer=_twin(128, 4, 1024, 256),
)
_TINY = _twin(16, 1, 32, 16)
QUICK = Sizes(
    hope=_TINY,
    transformer=_TINY,
    hope_rows=4,
    transformer_rows=4,
    seq_len=16,
    axes=("fsdp",),
    counts=(1, 2),
    rules=("m3",),
    rounds=2,
)


class Step:
    """A step of training, compiled for a mesh of the first devices, and where it is.

    Attributes:
      first: loss of the first step.
    """

    def __init__(
        self, model: ModelConfig, mesh: str, rows: int, seq_len: int, rule="adamw"
    ):
        config = RunConfig(
            experiment="scaling",
            row=model.name,
            model=model,
            optimizer=OptimizerConfig(rule=rule, warmup_steps=0),
            train=TrainConfig(steps=10**6, batch=rows, seq_len=seq_len, mesh=mesh),
        )
        size = int(np.prod(list(sharding.read_mesh(mesh).values()), dtype=int))
        made = loop.make_mesh(config, jax.devices()[:size])
        graphdef, params = lm.build(model, jax.random.key(0))
        tx, layers = loop.make_optimizer(config, graphdef, params, made)
        known = guard.begin(config.guard.window)
        state = state_lib.create(params, tx, jax.random.key(1), known)
        self._state = sharding.place(state, params, made)
        shape = rows, seq_len + 1
        tokens = np.random.default_rng(0).integers(0, model.vocab, shape)
        self._tokens = sharding.shard_batch(np.int32(tokens), made)
        step = loop.make_step(config, graphdef, tx, layers, made)
        self._run = sharding.jit_step(step, made, self._state)
        self.first = float(self()["loss"])

    def __call__(self) -> dict[str, Any]:
        self._state, metrics = self._run(self._state, self._tokens)
        # Waited for: of programs in flight the collectives can dead-lock.
        return jax.block_until_ready(metrics)


def meshes(sizes: Sizes) -> list[str]:
    """One device, and each axis over each of the other counts."""
    others = [f"{a}:{n}" for a in sizes.axes for n in sizes.counts if n > 1]
    return ["data:1", *others]


def run(sizes: Sizes, report: Callable[[str], Any] = print) -> list[dict[str, Any]]:
    """Times everything and returns the workloads of a benchmark file.

    Raises:
      ValueError: a mesh on which the first loss is another.
    """
    found = []

    def made(model, mesh, rows, rule="adamw"):
        report(f"compiling {model.name} on {mesh}, {rule}")
        return Step(model, mesh, rows, sizes.seq_len, rule)

    def race(programs, peer, steps, name):
        first = programs[peer].first
        for what, program in programs.items():
            timing.check_agreement(f"losses on {what}", program.first, first, TOLERANCE)
        times = timing.interleave(
            programs, sizes.rounds, lambda p, n: timing.measure(p, steps * n)
        )
        for what in programs:
            if what == peer:
                continue
            for kind, metric in CLOCKS:
                ours, theirs = getattr(times[what], kind), getattr(times[peer], kind)
                each = ([1 / t for t in one] for one in (ours, theirs))
                found.append(timing.workload(name(what), metric, *each))

    rows, model = sizes.hope_rows, sizes.hope
    race(
        {mesh: made(model, mesh, rows) for mesh in meshes(sizes)},
        "data:1",
        1,
        lambda mesh: f"{model.name} on {mesh} against one device",
    )
    rows, model = sizes.transformer_rows, sizes.transformer
    for axis in sizes.axes:
        if axis == sharding.TENSOR:  # matrices are whole over the rows
            continue
        mesh = f"{axis}:{min(4, max(sizes.counts))}"
        race(
            {rule: made(model, mesh, rows, rule) for rule in ("adamw", *sizes.rules)},
            "adamw",
            PERIOD,
            lambda rule, mesh=mesh: f"{rule} against adamw on {mesh}",
        )
    return found


def table(workloads: Sequence[dict[str, Any]]) -> str:
    """A line a mesh or rule: how much longer its step takes, in CPU time and clock."""
    lines = ["| step | in CPU seconds | on the clock |", "|---|---:|---:|"]
    for work in workloads[::2]:
        both = [w for w in workloads if w["workload"] == work["workload"]]
        cells = [
            f"{1 / w['ratio']:.2f} ({1 / max(w['ratios']):.2f} to "
            f"{1 / min(w['ratios']):.2f})"
            for w in both
        ]
        lines.append(f"| {work['workload']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _define(define) -> None:
    define.bool("quick", False, "small sizes")
    define.string("out", str(lab.RESULTS), "folder of the results")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints how much longer steps take and writes the file."""
    flags = command.parse(__doc__, _define, arguments)
    found = run(QUICK if flags.quick else FULL)
    print(table(found))
    for work in found:
        if work["workload"].partition(" ")[0] in optim.RULES:
            met = "met" if work["ratio"] >= GOAL else "NOT met"
            took = f"{1 / work['ratio']:.2f} of a step, goal {1 / GOAL:.2f} {met}"
            print(f"{work['workload']}, {work['metric']}: {took}")
    print(write_benchmark(flags.out, name="scaling", workloads=found))


if __name__ == "__main__":
    command.run(main)
