"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping

from rich import progress

from hope_jax.train import processes
from hope_jax.train.config import RunConfig


class Progress:
    """Shows the steps of a run.

    Args:
      config: of the run.
      done: steps that it goes on from.
    """

    def __init__(self, config: RunConfig, done: int):
        self._config = config
        self.begin(done)
        self._bar: progress.Progress | None = None
        if sys.stdout.isatty() and processes.writes():
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[numbers]}"),
                progress.TimeRemainingColumn(),
            )

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self._config.row,
                total=self._config.train.steps,
                completed=self._done,
                numbers="compiling",
            )
        elif self._done < self._config.train.steps:
            say("compiling the step, once")
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, done: int) -> None:
        """Goes on from another step; the clock starts with the next."""
        self._start = self._done = done
        self._began: float | None = None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._done = step
        if self._began is None:  # the first step compiles, so the clock starts after it
            self._began, self._start = time.monotonic(), step
        numbers = (
            f"loss {metrics['loss']:.4f} nats  {metrics['bits_per_byte']:.3f} bits/byte"
        )
        speed = self.speeds().get("tokens_per_second")
        if speed:
            numbers += f"  {speed:,.0f} tokens/s"
        if "validation_bits_per_byte" in metrics:
            numbers += f"  validation {metrics['validation_bits_per_byte']:.3f}"
        train = self._config.train
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % train.log_every == 0 or step in (1, train.steps):
            left = ""
            if speed:
                seconds = (train.steps - step) * train.batch * train.seq_len / speed
                left = f"  {seconds:,.0f} s left"
            say(f"step {step}/{train.steps}  {numbers}{left}")

    def speeds(self) -> dict[str, float]:
        """Tokens a second since the first step of this process."""
        steps = self._done - self._start
        if self._began is None or steps < 1:
            return {}
        tokens = steps * self._config.train.batch * self._config.train.seq_len
        return {"tokens_per_second": tokens / (time.monotonic() - self._began)}


def say(line: str) -> None:
    """Prints a line now; of several processes the first does."""
    if processes.writes():
        print(line, flush=True)
