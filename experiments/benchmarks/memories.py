"""Memories against public implementations: speed, growth in length, memory, compiling.

Run:     python -m experiments.benchmarks.memories --peer_python=PYTHON
         PYTHON has the peers (`pip install torch titans-pytorch transformers`); what it
         lacks is named and left out.
Smoke:   add --quick (small sizes, under a minute); a test runs it so, without peers.
Goal:    TARGETS below, of the peer at its best, eager or compiled.
Expect:  what was measured last is in experiments/results/benchmarks/, with its commit.
Cost:    an hour and a half on 2 CPU cores, most of it PyTorch's compiler; `--only`
         runs a part.

Every framework has a process of its own, pinned to one core (timed by its CPU time) and
then to all of them (by the clock; there ours also runs with its rows on two virtual
devices). Both are given the same arrays. Outputs and gradients are compared before
anything is timed, and programs that disagree get no ratio. A group's programs, and a
product of two matrices in each process as a canary, take turns in interleaved rounds.

What is compared:

gated delta rule: the same function, at the same chunk and at each side's best.

titans: one function, computed as each does it. titans-pytorch moves its momentum and
decay once a chunk, ours for every token. At momentum 0 and a decay on the chunk's first
token the two are the same; both still carry their momentum. There are three groups a
chunk size: gradients taken at the *sequence's start* (titans-pytorch by default) or at
the *chunk's start* (the paper), with queries that read the state of the chunk's start,
which is all that titans-pytorch forms; and *every read current*, where our queries read
the memory after their own token's write: more work, of which only the last token of a
chunk can be compared. *Every token* gives titans-pytorch chunks of one token, where all
of it agrees at any momentum and decay, but forms weights for every token.

decode: one token at a time; ours in a scan.

points: every named memory by itself, on the tokens of its own layer, against its
definition token by token (`impl="reference"`), and its growth in length.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import lab
from experiments.benchmarks import timing
from experiments.benchmarks.worker import Worker, WorkerError
from hope_jax.memory import named
from hope_jax.train.metrics import write_benchmark
from launch import command

TOLERANCE = {"forward": 1e-4, "decode": 1e-4, "training": 1e-3}
OURS, DEVICES, PEERS = "ours", "ours on 2 devices", "peers"
MODULES = {
    OURS: "experiments.benchmarks.ours",
    DEVICES: "experiments.benchmarks.ours",
    PEERS: "experiments.benchmarks.peers",
}
PARTS = ("gated_delta", "titans", "decode", "points")
# Ratio to the peer at its best, and to it eager.
TARGETS = {
    "gated_delta": {"forward": (1.5, 2.0), "training": (1.5, 2.5)},
    "titans C 64": {"forward": (2.0, 4.0), "training": (1.5, 2.5)},
    "titans C 16": {"forward": (4.0, 8.0), "training": (3.0, 5.0)},
}
GROWTH = 1 / 1.1  # of the speed, where the time grows 4.4 times for 4 times the tokens
_NO_MOMENTUM = -200.0  # its sigmoid is exactly 0 in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Attributes:
      rows, heads, width: sequences, heads, and width of a head.
      chunks: tokens per chunk that both sides run with.
      lengths: tokens; growth is between the two longest.
      reference: tokens of the runs beside the reference.
      decode: tokens made one by one, and those of *every token*.
      rounds: interleaved rounds.
      canary: matrices are so wide.
      unrolled: chunks in a sequence, beyond which a peer whose loop over chunks the
        compiler unrolls is not compiled.
      compiled: peers run compiled as well; without, all is over in minutes.
      longest: seconds of a call, beyond which a peer is not timed.
      points: named memories.
    """

    rows: int = 2
    heads: int = 4
    width: int = 64
    chunks: tuple[int, ...] = (16, 32, 64)
    lengths: tuple[int, ...] = (512, 2048, 8192)
    reference: int = 512
    decode: int = 256
    rounds: int = 5
    canary: int = 1024
    unrolled: int = 128
    compiled: bool = True
    longest: float = 60.0
    points: tuple[str, ...] = tuple(n for n, p in named.POINTS.items() if p().memory)


QUICK = Sizes(
    heads=1,
    width=4,
    chunks=(2, 4),
    lengths=(4, 8),
    reference=4,
    decode=8,
    rounds=2,
    canary=64,
    points=("gated_delta_net", "titans"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """One way to run a group: its label, whose it is, what it is built from."""

    label: str
    package: str
    spec: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        return self.package == OURS


class Group(NamedTuple):
    """Programs that are timed beside each other because they compute the same.

    Attributes:
      name: of the workload.
      part: of `PARTS`.
      variants: ours first.
      tasks, lengths: what each variant runs.
      arrays: inputs and cotangent, given the tokens; None: made from the spec.
      compared: positions at which the outputs must agree; the cotangent is 0 elsewhere.
      targets: by task, of the ratio to the peer at its best and eager.
    """

    name: str
    part: str
    variants: tuple[Variant, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    arrays: Callable[[int], dict[str, np.ndarray]]
    compared: slice = slice(None)
    targets: dict[str, tuple[float, float]] = {}  # noqa: RUF012


def groups(sizes: Sizes, parts: Sequence[str]) -> Iterator[Group]:
    """Everything that is measured, in order."""
    if "gated_delta" in parts:
        yield _gated_delta(sizes)
    for chunk in reversed(sizes.chunks):
        if "titans" in parts and chunk in (sizes.chunks[0], sizes.chunks[-1]):
            where = f"titans C {chunk}"
            both, targets = ("forward", "training"), TARGETS.get(where, {})
            yield _titans(
                sizes,
                f"{where}, gradients at the sequence's start",
                dict(chunk=chunk, anchor=None),
                both,
                targets=targets,
            )
            yield _titans(
                sizes,
                f"{where}, gradients at the chunk's start",
                dict(chunk=chunk),
                both,
                targets=targets,
            )
            yield _titans(
                sizes,
                f"{where}, every read current",
                dict(chunk=chunk, read="post", early=False),
                both,
                lengths=sizes.lengths[-2:-1],
                compared=slice(chunk - 1, None, chunk),
                targets=targets,
            )
            yield _titans(
                sizes,
                f"{where}, every token",
                dict(chunk=chunk, read="post", early=False, store=1),
                both,
                lengths=(sizes.decode,),
                compared=slice(None),
                compiled=False,
            )
    if "decode" in parts:
        yield _titans(
            sizes,
            f"titans C {sizes.chunks[-1]}, decode",
            dict(chunk=sizes.chunks[-1]),
            ("decode",),
            lengths=(sizes.decode,),
            compiled=False,
        )
    if "points" in parts:
        yield from (_point(sizes, name) for name in sizes.points)


def _gated_delta(sizes: Sizes) -> Group:
    def spec(chunk, **more):
        return dict(program="gated_delta", chunk=chunk, **_shape(sizes), **more)

    def arrays(length):
        make = _Arrays(sizes, length)
        return {
            **make.tokens(),
            "eta": make.uniform(0.0, 1.0),
            "decay": np.log(make.uniform(0.9, 1.0)),
            "w": make.normal(sizes.heads, sizes.width, sizes.width),
        }

    variants = [Variant(f"C {c}", OURS, spec(c)) for c in sizes.chunks]
    for compiled, word in ((False, "eager"), (True, "compiled")):
        variants += [
            Variant(f"{word}, C {c}", "transformers", spec(c, compiled=compiled))
            for c in sizes.chunks
        ]
    return Group(
        "gated delta rule",
        "gated_delta",
        tuple(variants),
        ("forward", "training"),
        sizes.lengths,
        arrays,
        targets=TARGETS["gated_delta"],
    )


def _titans(
    sizes,
    name,
    settings,
    tasks,
    lengths=None,
    compared=slice(1, None),  # noqa: B008
    compiled=True,
    targets=None,
) -> Group:
    chunk = settings["chunk"]
    spec = dict(program="titans", anchor=chunk, store=chunk, read="anchor", early=True)
    spec |= _shape(sizes) | settings

    def arrays(length):
        make = _Arrays(sizes, length)
        gates = length // spec["store"]
        momentum = make.normal(sizes.rows, sizes.heads, gates)
        if spec["store"] > 1:
            momentum[...] = _NO_MOMENTUM
        hidden = 4 * sizes.width
        return {
            **make.tokens(),
            "eta": make.uniform(0.0, 1.0 / chunk),
            "decay": make.normal(sizes.rows, sizes.heads, gates) - 3.0,
            "momentum": momentum,
            "w1": make.normal(sizes.heads, sizes.width, hidden) * 0.5 * hidden**-0.5,
            "w2": make.normal(sizes.heads, hidden, sizes.width) * sizes.width**-0.5,
        }

    peers = [Variant("eager", "titans-pytorch", spec | {"compiled": False})]
    if compiled:
        peers.append(Variant("compiled", "titans-pytorch", spec | {"compiled": True}))
    return Group(
        name,
        "decode" if "decode" in tasks else "titans",
        (Variant("", OURS, spec), *peers),
        tasks,
        lengths or sizes.lengths,
        arrays,
        compared,
        targets or {},
    )


def _point(sizes: Sizes, name: str) -> Group:
    def arrays(length):
        make = _Arrays(sizes, length)
        shape = (sizes.rows, length, sizes.heads * sizes.width)
        return {"x": make.normal(*shape), "cotangent": make.tokens()["cotangent"]}

    spec = dict(program="point", point=name, **_shape(sizes))
    chunk, reference = (
        Variant(impl, OURS, spec | {"impl": impl}) for impl in ("chunk", "reference")
    )
    return Group(
        f"point {name}",
        "points",
        (chunk, reference),
        ("forward", "training"),
        tuple(sorted({*sizes.lengths, sizes.reference})),
        arrays,
    )


def _shape(sizes: Sizes) -> dict[str, int]:
    return {"rows": sizes.rows, "heads": sizes.heads, "width": sizes.width}


class _Arrays:
    """Inputs, the same on every machine."""

    def __init__(self, sizes: Sizes, length: int):
        self._generator = np.random.default_rng(0)
        self._shape = (sizes.rows, sizes.heads, length)
        self._width = sizes.width

    def normal(self, *shape):
        return self._generator.standard_normal(shape).astype(np.float32)

    def uniform(self, low, high):
        """A number a token."""
        return self._generator.uniform(low, high, self._shape).astype(np.float32)

    def tokens(self):
        """Keys and queries of unit norm, values, the cotangent of the reads."""
        k, v, q, cotangent = (self.normal(*self._shape, self._width) for _ in range(4))
        unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
        return {"k": unit(k), "v": v, "q": unit(q), "cotangent": cotangent}


class Placement(NamedTuple):
    """Where processes run, and which of their times counts."""

    name: str
    metric: str
    time: str
    cores: tuple[int, ...]
    workers: tuple[str, ...]


def placements(cores: Sequence[int], rows: int) -> list[Placement]:
    """One core by CPU time, then all by the clock."""
    one = Placement(
        "one core",
        "tokens per second of one core",
        "cpu",
        tuple(cores[:1]),
        (OURS, PEERS),
    )
    if len(cores) == 1:
        return [one]
    several = (OURS, DEVICES, PEERS) if rows % 2 == 0 else (OURS, PEERS)
    return [
        one,
        Placement("all cores", "tokens per second", "wall", tuple(cores), several),
    ]


class Program(NamedTuple):
    """What is timed: a variant of a group, in one worker."""

    worker: str
    variant: Variant
    task: str
    length: int

    @property
    def label(self) -> str:
        who = self.worker if self.variant.is_ours else self.variant.package
        return f"{who} ({self.variant.label})" if self.variant.label else who

    @property
    def name(self) -> str:
        return f"{self.label}, {self.task}, T {self.length}"


class Bench:
    """Workers of one placement, and the workloads they were measured at.

    `found` are entries of a benchmark file, `targets` what some of them should reach,
    `failed` the programs that computed something else, and the groups that broke.
    """

    def __init__(self, placement: Placement, sizes: Sizes, peer_python: str, report):
        self.placement, self._sizes, self._report = placement, sizes, report
        self._python, self._workers = peer_python, {}
        self.found, self.targets, self.failed = [], {}, []
        self._folder = tempfile.TemporaryDirectory()
        self._start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()
        self._folder.cleanup()

    def _start(self) -> None:
        for worker in self.placement.workers:
            environment = {}
            if worker != PEERS:
                environment = {"JAX_PLATFORMS": "cpu"}
            if worker == DEVICES:
                # A collective of two devices needs more threads than two cores bring.
                environment |= {"JAX_NUM_CPU_DEVICES": "2", "NPROC": "32"}
            python = self._python if worker == PEERS else sys.executable
            try:
                self._workers[worker] = Worker(
                    MODULES[worker],
                    self.placement.cores,
                    python,
                    environment,
                    memory=_most_memory() if worker == PEERS else None,
                )
            except WorkerError as error:
                if worker != PEERS:
                    raise
                self._report(f"no peers: {error}")
                continue
            versions = self._workers[worker].versions
            listed = ", ".join(
                f"{name} {version}" for name, version in versions.items()
            )
            self._report(f"{worker} on {self.placement.name}: {listed}")

    def _stop(self) -> None:
        while self._workers:
            self._workers.popitem()[1].close()

    def run(self, group: Group) -> None:
        """Builds, compares, times and forgets the programs of a group."""
        self._report(f"{group.name}, {self.placement.name}")
        try:
            self._run(group)
            for worker in self._workers.values():
                worker.ask("drop")
        except WorkerError as error:  # the other groups are worth their hour
            self._report(f"  {group.name} broke: {error}")
            self.failed.append(f"{group.name} ({self.placement.name}): {error}")
            self._stop()
            self._start()

    def _run(self, group: Group) -> None:
        built = self._build(group)
        canary = {"program": "canary", "size": self._sizes.canary}
        for worker in self._workers.values():
            worker.ask("build", name="canary", spec=canary)
        names = {program: (program.worker, program.name) for program in built}
        names |= {worker: (worker, "canary") for worker in self._workers}

        def measure(name, calls):
            return self._workers[name[0]].measure(name[1], calls)

        taken = timing.interleave(names, self._sizes.rounds, measure)
        seconds = {key: getattr(t, self.placement.time) for key, t in taken.items()}
        speeds = {
            program: [program.length * self._sizes.rows / t for t in seconds[program]]
            for program in built
        }
        self._compare_speeds(group, speeds)
        self._compare_lengths(group, speeds)
        if self.placement.name == "one core":
            self._compare_costs(group, built)
        self._compare_canaries(group, seconds)

    def _build(self, group: Group) -> dict[Program, dict[str, Any]]:
        """The programs that run and agree with our first, and what building took."""
        built = {}
        inputs, outputs = (
            os.path.join(self._folder.name, f"{name}.npz")
            for name in ("inputs", "outputs")
        )
        for length in group.lengths:
            arrays = group.arrays(length)
            ignored = np.ones(length, bool)
            ignored[group.compared] = False
            arrays["cotangent"][:, :, ignored] = 0.0
            np.savez(inputs, **arrays)
            for task in group.tasks:
                first = None
                for program in self._programs(group, task, length):
                    costs = self._try(program, inputs, outputs)
                    if costs is None:
                        continue
                    with np.load(outputs) as file:
                        values = dict(file)
                    if "y" in values:
                        values["y"] = values["y"][:, :, group.compared]
                    first = values if first is None else first
                    if self._agrees(group, program, first, values):
                        built[program] = costs
        return built

    def _programs(self, group: Group, task: str, length: int) -> Iterator[Program]:
        for variant in group.variants:
            for worker in self._workers:
                program = Program(worker, variant, task, length)
                if variant.is_ours == (worker != PEERS) and self._wanted(program):
                    yield program

    def _wanted(self, program: Program) -> bool:
        spec, package = program.variant.spec, program.variant.package
        if spec.get("impl") == "reference":
            # Backwards it keeps a state a token: gigabytes, where that is an MLP.
            small = named.get(spec["point"]).memory.chosen.architecture.linear
            shown = program.task == "forward" or small
            return program.length == self._sizes.reference and shown
        if package != OURS and package not in self._workers[PEERS].versions:
            self._report(f"  {program.name}: left out, {package} is not installed")
            return False
        if package != OURS and spec["compiled"] and not self._sizes.compiled:
            return False
        if package == "transformers" and spec["compiled"]:
            return program.length // spec["chunk"] <= self._sizes.unrolled
        return True

    def _try(self, program: Program, inputs: str, outputs: str):
        try:
            costs = self._workers[program.worker].ask(
                "build",
                name=program.name,
                spec=program.variant.spec | {"task": program.task},
                inputs=inputs,
                outputs=outputs,
            )
        except WorkerError as error:
            if program.worker != PEERS or not self._workers[PEERS].alive:
                raise
            reason = str(error).splitlines()[0]
            self._report(f"  {program.name}: left out, {reason}")
            return None
        if program.worker == PEERS and costs["call"] > self._sizes.longest:
            self._report(f"  {program.name}: left out, a call is {costs['call']:.0f} s")
            return None
        return costs

    def _agrees(self, group: Group, program: Program, first, values) -> bool:
        what = f"{group.name}: {program.name} and ours"
        try:
            worst = timing.check_agreement(what, first, values, TOLERANCE[program.task])
        except ValueError as error:
            self._report(f"  {error}")
            self.failed.append(str(error))
            return False
        if values is not first:
            self._report(f"  {program.name}: agrees to {worst:.0e}")
        return True

    def _add(self, name, metric, ours, peer, target=None) -> None:
        self.found.append(timing.workload(name, metric, ours, peer))
        if target is not None:
            self.targets[name, metric] = target

    def _compare_speeds(self, group: Group, speeds) -> None:
        """Ours against each peer of the same chunk, then each side at its best."""
        metric = self.placement.metric
        for a, b in _pairs(group, speeds):
            target = None
            if a.worker == OURS and b.variant.label.startswith("eager"):
                _, target = group.targets.get(a.task, (None, None))
            name = f"{group.name}, {a.task}, T {a.length}: {a.label} against {b.label}"
            self._add(name, metric, speeds[a], speeds[b], target)

        def fastest(programs):
            return max(programs, key=lambda p: statistics.median(speeds[p]))

        for (task, length), (ours, peers) in _sides(speeds).items():
            if ours and peers and group.part != "points":
                a, b = fastest(ours), fastest(peers)
                target, _ = group.targets.get(task, (None, None))
                name = (
                    f"{group.name}, {task}, T {length}: at their best, {a.label} "
                    f"against {b.label}"
                )
                self._add(name, metric, speeds[a], speeds[b], target)

    def _compare_lengths(self, group: Group, speeds) -> None:
        """Each variant's speed on the longest input against that on the one before."""
        if len(group.lengths) < 2:
            return
        short, long = group.lengths[-2:]
        for program, speed in speeds.items():
            other = program._replace(length=short)
            if program.length == long and other in speeds:
                self._add(
                    f"{group.name}, {program.task}: growth of {program.label}, "
                    f"T {long} against {short}",
                    self.placement.metric,
                    speed,
                    speeds[other],
                    GROWTH if program.variant.is_ours else None,
                )

    def _compare_costs(self, group: Group, built) -> None:
        """Compile times, and the peak memory of each process during a call."""
        for a, b in _pairs(group, built):
            at = f"{group.name}, {a.task}, T {a.length}"
            pair = f"{a.label} against {b.label}"
            tokens = a.length * self._sizes.rows
            if built[a]["peak"] and built[b]["peak"]:
                self._add(
                    f"{at}: memory of {pair}",
                    "tokens per MiB of the process's peak resident memory",
                    *([tokens * 2**20 / built[p]["peak"]] for p in (a, b)),
                )
            if b.variant.spec.get("compiled"):
                self._add(
                    f"{at}: compiling {pair}",
                    "compilations per minute",
                    *([60 / built[p]["compile"]] for p in (a, b)),
                )

    def _compare_canaries(self, group: Group, seconds) -> None:
        """How fast a matrix product was in each process, round by round."""
        size = self._sizes.canary
        rates = {w: [2e-9 * size**3 / t for t in seconds[w]] for w in self._workers}
        for worker, rate in rates.items():
            if worker != OURS or len(rates) == 1:
                self._add(
                    f"canary beside {group.name}: {OURS} against {worker}",
                    f"GFLOP/s of products of width {size}, {self.placement.name}",
                    rates[OURS],
                    rate,
                )


def _sides(programs):
    """By task and length, ours and what it is compared with: the peers, or a point's
    own reference."""
    found = {}
    for program in programs:
        ours, peers = found.setdefault((program.task, program.length), ([], []))
        own = program.variant.is_ours and program.variant.label != "reference"
        (ours if own else peers).append(program)
    return found


def _pairs(group: Group, programs) -> Iterator[tuple[Program, Program]]:
    """Ours and theirs of one task, length and chunk."""
    for ours, peers in _sides(programs).values():
        for a in ours:
            for b in peers:
                if a.variant.spec.get("chunk") == b.variant.spec.get("chunk"):
                    yield a, b


def run(
    sizes: Sizes,
    parts: Sequence[str],
    peer_python: str,
    cores: Sequence[int],
    report: Callable[[str], Any],
    keep: Callable[[list[dict[str, Any]]], Any],
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], float], list[str]]:
    """Workloads, the targets that some of them have, and what failed.

    `keep` is given the workloads so far after every group.
    """
    found, targets, failed = [], {}, []
    for placement in placements(cores, sizes.rows):
        with Bench(placement, sizes, peer_python, report) as bench:
            for group in groups(sizes, parts):
                if group.part == "points" and placement.name != "one core":
                    continue
                bench.run(group)
                keep(found + bench.found)
        found += bench.found
        targets |= bench.targets
        failed += bench.failed
    return found, targets, failed


def _define(define) -> None:
    define.bool("quick", False, "small sizes, seconds")
    define.string("peer_python", sys.executable, "the interpreter that has the peers")
    define.list("only", [], f"some of {','.join(PARTS)}; all by default")
    define.bool("eager", False, "no compiled peers: minutes, no verdict")
    define.list("points", [], "some named memories, with commas between")
    define.integer("rounds", None, "interleaved rounds", lower_bound=1)
    define.list("lengths", [], "tokens, ascending, with commas between")
    define.string("out", str(lab.RESULTS), "folder of the results")
    define.string("name", "memories", "of the result file")


def _sizes(flags: Any) -> Sizes:
    """The sizes that the flags ask for.

    Raises:
      ValueError: a length that is no number, or no such memory.
    """
    changes: dict[str, Any] = {"compiled": not flags.eager}
    if flags.rounds is not None:
        changes["rounds"] = flags.rounds
    if not all(length.isdigit() for length in flags.lengths):
        raise ValueError(f"--lengths must be whole numbers, got {flags.lengths}.")
    if flags.lengths:
        changes["lengths"] = tuple(map(int, flags.lengths))
    if flags.points:
        changes["points"] = tuple(
            lab.chosen(named.POINTS, flags.points, "points", "memory")
        )
    return dataclasses.replace(QUICK if flags.quick else Sizes(), **changes)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 when something broke, or computed something else and was not timed."""
    flags = command.parse(__doc__, _define, arguments)
    with command.fail_in_words():
        parts, sizes = lab.chosen(PARTS, flags.only, "only", "part"), _sizes(flags)
    jax.config.update("jax_platforms", "cpu")  # of this process, which names the file

    def keep(found):
        return write_benchmark(flags.out, name=flags.name, workloads=found)

    found, targets, failed = run(
        sizes, parts, flags.peer_python, available_cores(), print, keep
    )
    print(timing.table(found, targets))
    print(keep(found))
    for line in failed:
        print(f"not timed: {line}")
    return 1 if failed else 0


def _most_memory() -> int:
    """Three quarters of the machine's."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


def available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


if __name__ == "__main__":
    command.run(main)
