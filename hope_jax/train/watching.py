"""What a run costs while it goes: where the time went, memory, arithmetic, profiles.

Nothing here changes what a run computes, nor what `metrics.jsonl` says of it, in which
no time stands. Each process writes what it saw to `hosts/<process>.jsonl`.
"""

import importlib
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from hope_jax.core import config as config_lib
from hope_jax.models import lm
from hope_jax.models.config import ModelConfig
from hope_jax.train.config import RunConfig

HOSTS = "hosts"
PROFILE = "profile"

# Multiplications and additions a second in bfloat16, dense, as their makers state them.
PEAKS = {
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5p": 459e12,
    "tpu v5": 459e12,
    "tpu v6": 918e12,
    "v100": 125e12,
    "a100": 312e12,
    "h100": 989e12,
    "h200": 989e12,
    "b200": 2250e12,
}


def flops_per_token(model: ModelConfig) -> float:
    """Of training, by the count of PaLM (arXiv:2204.02311, appendix B) without its term
    for attention: 6 for each parameter that a token is multiplied with.

    What memories compute beyond that, to learn while they read, is not counted: it
    lowers the utilisation.
    """
    count = lm.count_parameters(model)
    table = model.vocab * model.d_model
    return 6.0 * (count - (0 if model.tied_embedding else table))


def peak(device: Any) -> float | None:
    """The most operations a second of a device; None of one that is not known."""
    kind = device.device_kind.lower()
    return next((most for name, most in PEAKS.items() if name in kind), None)


def memory() -> dict[str, float]:
    """Most bytes so far: of this process, and of its fullest device if that tells."""
    unit = 1 if sys.platform == "darwin" else 1024
    most = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"memory/host_peak_bytes": float(most)}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        found["memory/device_peak_bytes"] = float(max(peaks))
    return found


def profiled(text: str) -> tuple[int, int]:
    """The steps that `first:last` names, both included.

    Raises:
      ValueError: no such steps.

    >>> profiled("10:12")
    (10, 12)
    """
    first, colon, last = text.partition(":")
    try:
        steps = int(first), int(last if colon else first)
    except ValueError:
        steps = 0, 0
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"profile must be first:last steps, from 1 on; got {text!r}.")
    return steps


def check(steps: int, profile: tuple[int, int] | None, wandb: str | None) -> None:
    """Refuses what a run of so many steps cannot be watched with.

    Raises:
      ValueError: a profile of steps that never come; `wandb` where that is not
        installed.
    """
    if profile is not None and profile[1] > steps:
        raise ValueError(
            f"profile ends with step {profile[1]}, but train.steps is {steps}."
        )
    if wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb ({wandb!r}) asks for Weights & Biases, which is not installed: "
            "pip install wandb, or leave it out."
        )


class Watch:
    """Watches a run.

    Args:
      config: of the run.
      workdir: its folder.
      seconds: spent in each kind of call so far (`Watchdog.seconds`).
      done: steps that it goes on from.
      profile: first and last step of which a trace is kept in `profile/`, for
        TensorBoard or Perfetto; None for none.
      wandb: the project of Weights & Biases in which the run is shown; None for none.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        seconds: Mapping[str, float],
        done: int,
        *,
        profile: tuple[int, int] | None = None,
        wandb: str | None = None,
    ):
        self._began, self._seconds = time.monotonic(), seconds
        self._flops = flops_per_token(config.model)
        most = [peak(device) for device in jax.devices()]
        self._peak = sum(p for p in most if p) if all(most) else None
        self._profile, self._folder, self._tracing = profile, workdir / PROFILE, False
        self._board = None
        if wandb is not None and jax.process_index() == 0:
            self._board = _board(wandb, config, workdir)
        hosts = workdir / HOSTS
        hosts.mkdir(exist_ok=True)
        path = hosts / f"{jax.process_index()}.jsonl"
        self._file = path.open("a", encoding="utf-8")
        self.took(done)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_) -> None:
        self._end_trace()
        self._file.close()
        if self._board is not None:
            self._board.finish()

    def took(self, done: int) -> None:
        """The next step to be begun is the one after `done`."""
        if self._profile is not None and done + 1 == self._profile[0]:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def ended(self, step: int) -> None:
        """A step has ended on the devices."""
        if self._profile is not None and step == self._profile[1]:
            self._end_trace()

    def speeds(self, speeds: Mapping[str, float]) -> dict[str, float]:
        """With `tokens_per_second`, if it is among them, all that is known.

        `goodput` is the share of the time since the run was begun in which steps were
        taken; `waiting/...` are the shares of all else that was waited for.
        """
        found = {**speeds, **memory()}
        elapsed = time.monotonic() - self._began
        for name, seconds in self._seconds.items():
            share = min(1.0, seconds / elapsed)
            what = name.removeprefix("a ").replace(" ", "_")
            found["goodput" if what == "step" else f"waiting/{what}"] = share
        if self._peak is not None and "tokens_per_second" in speeds:
            done = speeds["tokens_per_second"] * self._flops
            found["mfu"] = done / self._peak
        return found

    def wrote(
        self, step: int, metrics: Mapping[str, float], speeds: Mapping[str, float]
    ) -> None:
        """A line of the log was written."""
        line = {"step": step, "at": round(time.time(), 3), **speeds}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.log({**metrics, **speeds}, step=step)

    def _end_trace(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def _board(project: str, config: RunConfig, workdir: Path) -> Any:
    return importlib.import_module("wandb").init(
        project=project,
        name=f"{config.row}-s{config.seed}",
        config=config_lib.to_json(config),
        dir=str(workdir),
    )
