"""Interleaved timing: every ratio comes from two programs run one after the other."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

_SHORTEST = 0.1  # seconds: a shorter program is called several times a round


class Times(NamedTuple):
    """Seconds of one call, round by round.

    Attributes:
      wall: on the clock, with all cores.
      cpu: of all threads together, which is the time of one core.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]


def measure(program: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Seconds of one call of a program of this process, on the clock and of all
    threads together."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        jax.block_until_ready(program())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / calls, cpu / calls


def interleave(
    programs: Mapping[Hashable, Any],
    rounds: int,
    measure: Callable[[Any, int], tuple[float, float]] = measure,
) -> dict[Hashable, Times]:
    """Times compiled programs in turn, so that a noisy machine troubles all alike.

    Every other round goes through them backwards. A first call of each, which is not
    counted, says how often a short program is called.

    Args:
      programs: what `measure` knows how to call.
      rounds: how often each is timed.
      measure: `(program, calls) -> (wall, cpu)` seconds of one call.

    Raises:
      ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    calls = {}
    for name, program in programs.items():
        measure(program, 1)
        wall, _ = measure(program, 1)
        calls[name] = max(1, math.ceil(_SHORTEST / max(wall, 1e-4)))
    found = {name: [] for name in programs}
    for i in range(rounds):
        order = list(programs)
        for name in order if i % 2 == 0 else reversed(order):
            found[name].append(measure(programs[name], calls[name]))
    return {
        name: Times(*(tuple(t) for t in zip(*measured, strict=True)))
        for name, measured in found.items()
    }


def workload(
    name: str, metric: str, ours: Sequence[float], peer: Sequence[float]
) -> dict[str, Any]:
    """One entry of a benchmark file from figures of which more is better, by round."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "workload": name,
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "metric": metric,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def table(
    workloads: Sequence[Mapping[str, Any]],
    targets: Mapping[tuple[str, str], float] | None = None,
) -> str:
    """The workloads, one a line, with the range of their ratios.

    Args:
      workloads: of a benchmark file.
      targets: workload and metric -> what some ratios should reach.
    """
    lines = []
    for w in workloads:
        low, high = min(w["ratios"]), max(w["ratios"])
        line = (
            f"{w['workload']}: {w['ours']:,.2f} against {w['peer']:,.2f} "
            f"{w['metric']}, ratio {w['ratio']:.2f} ({low:.2f} to {high:.2f})"
        )
        target = (targets or {}).get((w["workload"], w["metric"]))
        if target is not None:
            met = "met" if w["ratio"] >= target else "NOT met"
            line += f", target {target:.2f} {met}"
        lines.append(line)
    return "\n".join(lines)


def check_agreement(what: str, ours: Any, peer: Any, tolerance: float) -> float:
    """The largest difference of two outputs, relative to each array's largest entry.

    Raises:
      ValueError: it is above `tolerance`, or not finite: no ratio is worth its name.
    """
    worst = 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(peer), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(float(np.max(np.abs(b))), 1e-12)
        worst = max(worst, float(np.max(np.abs(a - b))) / scale)
        if not np.isfinite(a).all() or not np.isfinite(b).all():
            worst = math.inf
    if not worst <= tolerance:
        raise ValueError(
            f"{what} differ by {worst:.1e} of their size, more than {tolerance:.0e}: "
            "they do not compute the same, so they are not timed."
        )
    return worst
