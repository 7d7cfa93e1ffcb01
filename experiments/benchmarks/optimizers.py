"""Optimizers: time of a step, its slowest step, compiling, state (Figure 12).

Run:     python -m experiments.benchmarks.optimizers
         python -m experiments.benchmarks.optimizers --size=140m --only=muon,m3
Smoke:   add --size=tiny (seconds a rule); a test runs some rules so.
Goal:    a step of M3 at most 1.15 times one of Muon's, in the mean over its period.
Expect:  what was measured last is in experiments/results/benchmarks/, with its commit.
Cost:    seven minutes on 2 CPU cores, half of them Shampoo's and SOAP's; 4 GB. The
         second command an hour there, and 15 GB.

A step takes gradients, is one update of a whole optimizer of `hope_jax.optim`, as
training builds it but for the clipping, and moves the parameters, in place. The
parameters are those of a Transformer with scanned layers; the gradients are random and
stay the same, for no time depends on them.

Every rule is timed in interleaved rounds with AdamW and a product of two matrices, the
canary; a group at a time, so that no more than its states are in memory. A rule with a
slow clock is timed over whole periods: its speed is the mean, and its slowest step that
position in the period whose median is the longest. Two times: of all threads together,
which is that of one core, and by the clock, of all cores; on an accelerator the clock
alone.

Muon is Optax's, on the same matrices, stacked as the layers are. `muon_ours` is M3's
own code without a slow memory and without a second moment: the same function, so a
ratio between the two is one of code, and between M3 and `muon_ours` one of what M3
adds. On accelerators ours multiplies in bfloat16 and Optax in float32. `dgd` and `ggd`
are without the capture of inputs, which is a part of the backward pass.
`adagrad_memory_outer` has one matrix for all the layers of a leaf, Shampoo and SOAP two
for each.
"""

import dataclasses
import math
import os
import statistics
import time

# LAPACK dead-locks a pool of two of XLA's threads, so training has a larger one too;
# and its own threads stand in the way of XLA's. Both are read when JAX starts.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from experiments import lab
from experiments.benchmarks import timing
from hope_jax import optim
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig
from hope_jax.models.config import ModelConfig
from hope_jax.optim import groups
from hope_jax.optim.rules.adagrad_memory import AdaGradMemory
from hope_jax.optim.rules.delta_momentum import DeltaMomentum
from hope_jax.optim.rules.m3 import M3
from hope_jax.train.config import OptimizerConfig
from hope_jax.train.metrics import write_benchmark
from launch import command

REFERENCE, CANARY = "adamw", "canary"
GOAL = 1 / 1.15  # of the speed of Muon
TOLERANCE = {"cpu": 2e-3}  # of first updates
_COARSE = 5e-2  # where one of them multiplies in bfloat16
_TOKENS = 256  # whose Gram matrices dgd is given

# Beside the names of optimizers: the same with other options.
VARIANTS: dict[str, optim.Rule] = {
    "muon_ours": M3(periods=(1,), variant="two_scale"),
    "m3_spread": M3(spread=True),
    "delta_momentum_matrix": DeltaMomentum(form="matrix"),
    "adagrad_memory_outer": AdaGradMemory(form="outer"),
}
# Rules that are compared with each other, and so timed together; others have a group
# each. AdamW is in all of them.
TOGETHER = ("muon", "muon_ours", "m3", "m3_spread")
PAIRS = (
    ("muon_ours", "muon"),
    ("m3", "muon"),
    ("m3_spread", "muon"),
    ("m3", "muon_ours"),
    ("m3_spread", "muon_ours"),
)
SAME = ("muon_ours", "muon")  # compute the same function


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
      model: a Transformer, whose parameters move.
      canary: matrices are so wide.
      rounds: interleaved rounds.
    """

    model: ModelConfig
    canary: int = 1024
    rounds: int = 5


def _transformer(d_model: int, layers: int, heads: int, hidden: int, vocab: int):
    return ModelConfig(
        name=f"transformer_{d_model}",
        mixer="attention",
        d_model=d_model,
        layers=layers,
        heads=heads,
        vocab=vocab,
        cms=CMSConfig(hidden=hidden),
    )


SIZES = {
    "10m": Size(model=_transformer(320, 6, 5, 1024, 4096)),
    "140m": Size(model=_transformer(768, 12, 12, 3152, 32_000)),
    "tiny": Size(model=_transformer(8, 2, 2, 16, 16), canary=64, rounds=2),
}


def names() -> tuple[str, ...]:
    """Everything that can be measured beside AdamW."""
    return tuple(name for name in (*optim.RULES, *VARIANTS) if name != REFERENCE)


def config(name: str) -> OptimizerConfig:
    """The optimizer of a name, with the defaults of training but for clipping."""
    settings = {"weight_decay": 0.0} if name == "adam" else {}
    rule = VARIANTS.get(name, name)
    return OptimizerConfig(rule=rule, clip_norm=None, warmup_steps=0, **settings)


def period(settings: OptimizerConfig) -> int:
    """Steps after which an optimizer has done all that it ever does."""
    clocks = [1]
    for rule in optim.rules_of(settings).values():
        clocks += getattr(rule, "periods", ())
        clocks.append(getattr(rule, "frequency", 1))
    return math.lcm(*clocks)


class Rule:
    """A compiled optimizer, and where it stands. A call is a step.

    Attributes:
      name: of it.
      period: see the function of this name.
      compiling: seconds of it.
      state: bytes of its state for each parameter.
      products: floating point operations of Muon's orthogonalisations, in a step.
      rounds: one list a measurement: seconds (wall, cpu) of each step of the period.
    """

    def __init__(self, name: str, model: ModelConfig):
        self.name = name
        settings = config(name)
        self.period = period(settings)
        shapes = lm.abstract(model)
        matrices = jax.tree_util.tree_map_with_path(
            lambda path, leaf: groups.kind(path, leaf) == "matrices", shapes
        )
        tx = optim.build(
            settings,
            total_steps=1_000_000,
            periods=optim.one_clock(shapes),
            layers=matrices,
        )
        extra = {}
        if settings.rule.inputs == "grams":
            extra["inputs"] = jax.tree.map(_gram, shapes, matrices)

        def step(carry, gradients, extra):
            params, state = carry
            updates, state = tx.update(gradients, state, params, **extra)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), shapes)
        # Copied, for no buffer can be given away twice.
        state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tx.init(params))
        self._carry, self._given = (params, state), (gradients(shapes), extra)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.state = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / count
        self.products = sum(
            _newton_schulz(leaf.shape)
            for leaf, chosen in zip(
                *map(jax.tree.leaves, (shapes, matrices)), strict=True
            )
            if chosen
        )
        start = time.perf_counter()
        program = jax.jit(step, donate_argnums=0)
        self._program = program.lower(self._carry, *self._given).compile()
        self.compiling = time.perf_counter() - start
        self.rounds = []

    def __call__(self) -> PyTree:
        """Moves the parameters and returns them."""
        self._carry = self._program(self._carry, *self._given)
        return self._carry[0]


def gradients(shapes: PyTree) -> PyTree:
    """Random ones, the same for every rule."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten(
        jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    )


def _gram(leaf, chosen):
    """Of the random inputs of one batch; None for what multiplies nothing."""
    if not chosen:
        return None
    shape = (*leaf.shape[:-2], _TOKENS, leaf.shape[-2])
    x = jax.random.normal(jax.random.key(1), shape) / math.sqrt(_TOKENS)
    return jnp.einsum("...ni,...nj->...ij", x, x)


def _newton_schulz(shape: Sequence[int], steps: int = 5) -> int:
    """Operations of a stack of matrices: three products a step."""
    short, long = sorted(shape[-2:])
    each = 2 * short * short * (2 * long + short)
    return steps * each * math.prod(shape[:-2])


class Canary:
    """The product of two matrices, as a rule of one step."""

    name, period = CANARY, 1

    def __init__(self, size: int):
        x = jax.random.normal(jax.random.key(0), (size, size))
        self._program = jax.jit(jnp.matmul).lower(x, x).compile()
        self._given, self.rounds = (x, x), []

    def __call__(self):
        return self._program(*self._given)


def measure(rule: Rule | Canary, calls: int) -> tuple[float, float]:
    """Seconds of a step, the mean of so many periods; each position is noted."""
    steps = [timing.measure(rule, 1) for _ in range(calls * rule.period)]
    each = np.array(steps).reshape(calls, rule.period, 2)
    rule.rounds.append(each.mean(0).tolist())
    wall, cpu = each.mean((0, 1))
    return float(wall), float(cpu)


def slowest(rule: Rule, rounds: int) -> timing.Times:
    """The step of the period that takes longest, in each of the last rounds.

    It is one position for all rounds, that with the longest median: the longest step of
    each round would be the noisiest.
    """
    each = np.array(rule.rounds[-rounds:])  # [round, position, (wall, cpu)]
    positions = np.argmax(np.median(each, axis=0), axis=0)
    return timing.Times(
        *(tuple(each[:, at, i].tolist()) for i, at in enumerate(positions))
    )


class Row(NamedTuple):
    """A rule in the printed table.

    Attributes:
      rule: what was timed.
      mean, slowest: of its steps.
      reference: of AdamW's.
    """

    rule: Rule
    mean: timing.Times
    slowest: timing.Times
    reference: timing.Times


def run(
    members: Sequence[str], reference: Rule, size: Size, report: Callable[[str], Any]
) -> tuple[list[dict[str, Any]], list[Row]]:
    """Times some rules beside AdamW: workloads of a benchmark file, and rows.

    Raises:
      ValueError: two of them that should compute the same do not.
    """
    rules = {REFERENCE: reference} | build(members, size, report)
    canary = Canary(size.canary)
    times = timing.interleave({**rules, CANARY: canary}, size.rounds, measure)
    worst = {name: slowest(rule, size.rounds) for name, rule in rules.items()}
    found = []
    for kind, metric in kinds():

        def compare(what, ours, peer, kind=kind, metric=metric):
            ours, peer = getattr(ours, kind), getattr(peer, kind)
            found.append(
                timing.workload(
                    what, metric, [1 / t for t in ours], [1 / t for t in peer]
                )
            )

        pairs = [(name, REFERENCE) for name in rules if name != REFERENCE]
        pairs += [pair for pair in PAIRS if set(pair) <= set(rules)]
        for name, peer in pairs:
            compare(f"{name} against {peer}", times[name], times[peer])
            if rules[name].period > 1:
                what = f"slowest step of {name} against {peer}"
                compare(what, worst[name], times[peer])
        peak = [2e-9 * size.canary**3 / t for t in getattr(times[CANARY], kind)]
        rate = f"GFLOP/s{metric.removeprefix('steps per second')}"
        for name in {"muon", "muon_ours"} & set(rules):
            products = [
                1e-9 * rules[name].products / t for t in getattr(times[name], kind)
            ]
            what = f"products of {name} against one of width {size.canary}"
            found.append(timing.workload(what, rate, products, peak))
        beside = ", ".join(members)
        middle = [statistics.median(peak)] * len(peak)
        found.append(
            timing.workload(
                f"canary beside {beside} against its median", rate, peak, middle
            )
        )
    for name, rule in rules.items():
        if name != REFERENCE:
            found += costs(rule, reference)
    rows = [
        Row(rule, times[name], worst[name], times[REFERENCE])
        for name, rule in rules.items()
    ]
    return found, rows


def build(
    members: Sequence[str], size: Size, report: Callable[[str], Any]
) -> dict[str, Rule]:
    """The rules of these names, after those that must agree have shown that they do."""
    rules, firsts = {}, []
    for name in members:
        report(f"compiling {name}")
        rules[name] = Rule(name, size.model)
        if name in SAME:  # copied, as the next step takes it away
            firsts.append(jax.tree.map(lambda leaf: np.array(leaf), rules[name]()))
    if len(firsts) == len(SAME):
        what = f"first updates of {' and '.join(SAME)}"
        tolerance = TOLERANCE.get(jax.default_backend(), _COARSE)
        worst = timing.check_agreement(what, *firsts, tolerance)
        report(f"{what} agree to {worst:.0e}")
    return rules


def kinds() -> list[tuple[str, str]]:
    """Fields of `Times`, and what their inverse is called."""
    clock = ("wall", "steps per second")
    if jax.default_backend() != "cpu":
        return [clock]
    return [("cpu", "steps per second of one core"), clock]


def costs(rule: Rule, reference: Rule) -> list[dict[str, Any]]:
    """What a rule costs beside time, so that more is better."""
    return [
        timing.workload(
            f"compiling {rule.name} against {reference.name}",
            "compilations per minute",
            *([60 / r.compiling] for r in (rule, reference)),
        ),
        timing.workload(
            f"state of {rule.name} against {reference.name}",
            "parameters per byte of state",
            *([1 / r.state] for r in (rule, reference)),
        ),
    ]


def table(rows: Sequence[Row]) -> str:
    """A line a rule: milliseconds of a step, and how many of AdamW's."""
    columns = {"cpu": "one core", "wall": "all cores, by the clock"}
    shown = [kind for kind, _ in kinds()]
    heads = [f"{columns[kind]}: ms, of AdamW" for kind in shown]
    heads += ["slowest step, of AdamW", "compiling, s", "state, bytes a parameter"]
    lines = [f"| rule | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in rows:
        cells = []
        for kind in shown:
            ours, peer = getattr(row.mean, kind), getattr(row.reference, kind)
            cells.append(f"{1e3 * statistics.median(ours):,.1f}, {_range(ours, peer)}")
        ours, peer = getattr(row.slowest, shown[0]), getattr(row.reference, shown[0])
        cells.append(_range(ours, peer) if row.rule.period > 1 else "")
        cells += [f"{row.rule.compiling:.1f}", f"{row.rule.state:.1f}"]
        lines.append(f"| {row.rule.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(workloads: Sequence[dict[str, Any]]) -> str:
    """Whether M3's step is short enough beside Muon's."""
    lines = []
    for w in workloads:
        name, _, peer = w["workload"].partition(" against ")
        if name in ("m3", "m3_spread") and peer in ("muon", "muon_ours"):
            met = "met" if w["ratio"] >= GOAL else "NOT met"
            low, high = (1 / end for end in (max(w["ratios"]), min(w["ratios"])))
            lines.append(
                f"{w['workload']}, {w['metric']}: {1 / w['ratio']:.2f} ({low:.2f} to "
                f"{high:.2f}) of its step, goal {1 / GOAL:.2f} {met}"
            )
    return "\n".join(lines)


def _range(ours: Sequence[float], peer: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    middle = statistics.median(ratios)
    return f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def groups_of(wanted: Sequence[str]) -> list[tuple[str, ...]]:
    """What is in memory at once, besides AdamW."""
    together = tuple(name for name in TOGETHER if name in wanted)
    alone = [(name,) for name in wanted if name not in TOGETHER]
    return ([together] if together else []) + alone


def _define(define) -> None:
    define.enum("size", "10m", list(SIZES), "of the parameters")
    define.list("only", [], "names, with commas between; all by default")
    define.integer("rounds", None, "interleaved rounds", lower_bound=1)
    define.string("name", None, "of the result file; optimizers_SIZE by default")
    define.string("out", str(lab.RESULTS), "folder of the results")


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 when some rule could not be timed."""
    flags = command.parse(__doc__, _define, arguments)
    with command.fail_in_words():
        wanted = lab.chosen(names(), flags.only, "only", "rule")
    size = SIZES[flags.size]
    if flags.rounds is not None:
        size = dataclasses.replace(size, rounds=flags.rounds)
    file = flags.name or f"optimizers_{flags.size}"
    parameters = lm.count_parameters(size.model)
    print(f"{parameters:,} parameters on {jax.devices()[0].device_kind}")

    reference = Rule(REFERENCE, size.model)
    found, rows, failed = [], {}, []
    for members in groups_of(wanted):
        try:
            workloads, more = run(members, reference, size, print)
        except ValueError as error:  # one that refuses a size costs its group alone
            failed.append(f"{', '.join(members)}: {error}")
            continue
        found += workloads
        rows |= {row.rule.name: row for row in more if row.rule.name not in rows}
        path = write_benchmark(flags.out, name=file, workloads=found)
    print(table(list(rows.values())))
    print(goals(found))
    if found:
        print(path)
    for line in failed:
        print(f"not timed: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    command.run(main)
