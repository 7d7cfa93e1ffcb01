"""Meshes: what sharing a step costs, and optimizers whose state is in parts.

Run:     python -m experiments.benchmarks.scaling
Smoke:   add --quick --out=DIR (small sizes); a test does so.
Goal:    a step with M3 or Muon on a mesh at most 1.25 times one with AdamW.
Expect:  what was measured last is in experiments/results/benchmarks/, with its commit.
Cost:    five minutes of one CPU core, most of them to compile; of --only=transformer,
         hope or optimizers a part.

The devices are virtual ones of this machine, which share its cores: more of them make
nothing faster. The work of a step is the same on every mesh, so what a step takes
longer than on one device is what the mesh costs: programs that wait for one another,
copies, collectives, and products too small for a core. In CPU seconds of all threads
that is overhead alone; on the clock two devices may also use two cores better than one
does. Real devices have memory and links of their own, of which this says nothing.

A Transformer trains on 1, 2, 4 and 8 devices along each axis of a mesh, a small Hope
whose levels move on 1 and 4. Optimizers move the Transformer, on two meshes of 4.
Newton-Schulz makes about `30 d` operations a parameter of a matrix of width d, the
model `6` for each token of the batch, so that a step with Muon takes at least
`1 + 30 d / (6 tokens)` of one with AdamW: 1.08 here. Of 0.5M tokens and d = 2,048 that
is 1.02.
"""

import dataclasses
import os

# A pool of no more threads than there are devices can dead-lock; JAX reads both when it
# starts. Of who imports this file it is no business.
if __name__ == "__main__":
    os.environ.setdefault("NPROC", "32")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import lab
from experiments.benchmarks import timing
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
    axes: tuple[str, ...] = (sharding.DATA, sharding.FSDP, sharding.TENSOR)
    counts: tuple[int, ...] = (1, 2, 4, 8)
    rules: tuple[str, ...] = ("muon", "m3")
    rounds: int = 3


def _twin(width: int, layers: int, vocab: int, seq_len: int) -> ModelConfig:
    model = with_context(zoo.get("transformer_tiny"), seq_len)
    cms = dataclasses.replace(model.cms, hidden=4 * width)
    return dataclasses.replace(
        model, d_model=width, layers=layers, heads=8, vocab=vocab, cms=cms
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
    transformer=_twin(64, 2, 1024, 256),
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
        self, model: ModelConfig, mesh: str, rows: int, seq_len: int, rule: str
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


class Race(NamedTuple):
    """Steps that are timed in turn.

    Attributes:
      name: of its workloads, with a place for that of a step.
      peer: against which of them.
      calls: steps that are timed at once.
      steps: the arguments of `Step` but for the length of rows.
    """

    name: str
    peer: str
    calls: int
    steps: dict[str, tuple[ModelConfig, str, int, str]]


def races(sizes: Sizes) -> dict[str, list[Race]]:
    """What is timed, part by part."""

    def on(model, rows, counts):
        meshes = ["data:1", *(f"{a}:{n}" for a in sizes.axes for n in counts if n > 1)]
        steps = {mesh: (model, mesh, rows, "adamw") for mesh in meshes}
        return Race(f"{model.name} on {{}} against one device", "data:1", 1, steps)

    def by(mesh):
        twin, rows = sizes.transformer, sizes.transformer_rows
        steps = {rule: (twin, mesh, rows, rule) for rule in ("adamw", *sizes.rules)}
        return Race(f"{{}} against adamw on {mesh}", "adamw", PERIOD, steps)

    some = min(4, max(sizes.counts))
    cut = [axis for axis in sizes.axes if axis != sharding.TENSOR]
    return {
        "transformer": [on(sizes.transformer, sizes.transformer_rows, sizes.counts)],
        "hope": [on(sizes.hope, sizes.hope_rows, (some,))],
        "optimizers": [by(f"{axis}:{some}") for axis in cut],
    }


def run(race: Race, sizes: Sizes, report: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Times one race: workloads of a benchmark file.

    Raises:
      ValueError: the first loss of a step is not that of its peer.
    """
    programs = {}
    for name, (model, mesh, rows, rule) in race.steps.items():
        report(f"compiling {model.name} on {mesh}, {rule}")
        programs[name] = Step(model, mesh, rows, sizes.seq_len, rule)
    first = programs[race.peer].first
    for name, program in programs.items():
        timing.check_agreement(f"losses of {name}", program.first, first, TOLERANCE)
    times = timing.interleave(
        programs, sizes.rounds, lambda p, n: timing.measure(p, race.calls * n)
    )
    found = []
    for name in programs:
        for kind, metric in CLOCKS if name != race.peer else ():
            ours, peer = getattr(times[name], kind), getattr(times[race.peer], kind)
            each = ([1 / t for t in one] for one in (ours, peer))
            found.append(timing.workload(race.name.format(name), metric, *each))
    return found


def table(workloads: Sequence[dict[str, Any]]) -> str:
    """A line a step: how many times as long it takes, in CPU time and on the clock."""
    lines = {}
    for w in workloads:
        low, high = (1 / end for end in (max(w["ratios"]), min(w["ratios"])))
        cell = f"{1 / w['ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.setdefault(w["workload"], []).append(cell)
    columns = ["times as long a step", "in CPU seconds", "on the clock"]
    return lab.table(columns, [[name, *cells] for name, cells in lines.items()])


def _define(define) -> None:
    define.list("only", [], "parts, with commas between; all by default")
    define.bool("quick", False, "small sizes")
    define.string("out", str(lab.RESULTS), "folder of the results")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures part by part, prints how long steps take and writes a file of each."""
    flags = command.parse(__doc__, _define, arguments)
    sizes = QUICK if flags.quick else FULL
    parts = races(sizes)
    with command.fail_in_words():
        wanted = lab.chosen(parts, flags.only, "only", "part")
    for part in wanted:
        found = [w for race in parts[part] for w in run(race, sizes, print)]
        print(table(found))
        for work in found if part == "optimizers" else ():
            met = "met" if work["ratio"] >= GOAL else "NOT met"
            took = f"{1 / work['ratio']:.2f} of a step, goal {1 / GOAL:.2f} {met}"
            print(f"{work['workload']}, {work['metric']}: {took}")
        name = f"scaling_{part}"
        print(write_benchmark(flags.out, name=name, workloads=found))


if __name__ == "__main__":
    command.run(main)
