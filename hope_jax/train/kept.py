"""What a run keeps of itself while it goes: where it stands, its log, its steps."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hope_jax.train import guard, processes
from hope_jax.train.checkpoint import Checkpoints, Place
from hope_jax.train.config import RunConfig
from hope_jax.train.metrics import MetricLog
from hope_jax.train.progress import Progress, say
from hope_jax.train.state import TrainState
from hope_jax.train.watching import Watch


class NonFinite(FloatingPointError):
    """Too many steps in a row had to be skipped. Names the step and its numbers."""


class Unread(NamedTuple):
    """A step whose metrics were not waited for yet.

    Attributes:
      step: its number.
      metrics: of the step, on the devices.
      more: what else is written down of it.
    """

    step: int
    metrics: Mapping[str, jax.Array]
    more: Mapping[str, float] = {}


class Moment(NamedTuple):
    """Where a run stands between two steps: whole at once, so that any thread can save.

    Attributes:
      state: after `done` steps.
      done: steps done.
      place: of the data iterator.
      unread: steps that are not in the log yet, in order.
    """

    state: TrainState
    done: int
    place: Any
    unread: tuple[Unread, ...] = ()


class Kept:
    """The log and the checkpoints of a run, which follow its steps.

    Args:
      config: of the run.
      workdir: its folder.
      checkpoints: where it saves.
      fingerprint: of its data.
      bytes_per_token: of its text.
      now: where it stands.
      saved: the step of its last checkpoint, or None.
      watch: is told of steps and lines.

    Attributes:
      now: where it stands.
      saved: the step of its last checkpoint, or None.
      latest: the metrics of the last step read that was finite.
      in_a_row: steps up to the last one read that were skipped.
      returned: whether the run went back, and no checkpoint says so yet.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        checkpoints: Checkpoints,
        fingerprint: Mapping[str, Any],
        bytes_per_token: float,
        now: Moment,
        saved: int | None,
        watch: Watch,
    ):
        self.now, self.saved = now, saved
        self.latest: dict[str, float] = {}
        known = now.state.guard
        self.in_a_row = 0 if known is None else int(known.in_a_row)
        self.returned = False
        self._config, self._workdir = config, workdir
        self._checkpoints, self._fingerprint = checkpoints, fingerprint
        self._bytes_per_token = bytes_per_token
        self._log = _log(workdir, now.done)
        self._shown = Progress(config, now.done)
        self._bad, self._watch = "", watch

    def __enter__(self) -> "Kept":
        self._shown.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._shown.__exit__(*error)
        self._log.close()

    @property
    def ahead(self) -> bool:
        """Whether steps were done that are not saved."""
        return self.now.done > (self.saved or 0)

    def took(
        self, state: TrainState, place: Any, metrics: Mapping[str, jax.Array]
    ) -> None:
        """A step was begun; its metrics are not there yet."""
        done = self.now.done + 1
        unread = (*self.now.unread, Unread(done, metrics))
        self.now = Moment(state, done, place, unread)
        self._watch.took(done)

    def found(self, more: Mapping[str, float]) -> None:
        """What else is to be written down of the last step."""
        *before, last = self.now.unread
        self.now = self.now._replace(unread=(*before, last._replace(more=more)))

    def read(self, leave: int = 0) -> None:
        """Waits for the metrics of all steps but the last `leave`; writes them down."""
        while len(self.now.unread) > leave:
            first, *rest = self.now.unread
            self._read(first)
            self.now = self.now._replace(unread=tuple(rest))

    def save(self) -> None:
        """Brings log and checkpoints up to the last step, and returns when both are on
        disk: a kill then loses no more than what comes after."""
        self.read()
        if self.saved == self.now.done:
            return
        self._log.sync()
        self._checkpoints.save(
            self.now.done,
            self.now.state,
            iterator=Place(self.now.place),
            config=self._config,
            fingerprint=self._fingerprint,
        )
        self._checkpoints.wait()
        self.saved, self.returned = self.now.done, False

    def gave_up(self) -> bool:
        """Whether too many steps in a row were skipped, the last one among them."""
        most = min(self._config.guard.give_up, max(1, self._config.train.steps // 10))
        if self.in_a_row >= most:
            self.read()  # the step at hand may be a good one
        return self.in_a_row >= most

    def go_back(self, like: TrainState) -> None:
        """Goes on from an earlier checkpoint, with the data that comes next.

        That checkpoint knows nothing of it: the next step is to be saved (`returned`),
        lest a kill has the run read the same data again.

        Args:
          like: shapes, types and shardings of the state.

        Raises:
          NonFinite: there is none to go back to, or the run went back often enough.
        """
        config, now = self._config.guard, self.now
        known = now.state.guard
        assert known is not None
        returns = int(known.returns)
        steps = [step for step in self._checkpoints.steps() if step < now.done]
        if returns >= config.returns or not steps:
            self.save()
            raise self._given_up()
        far = [step for step in steps if step <= now.done - config.back]
        happened = list(self._checkpoints.lineage)  # an earlier return, for example
        self._checkpoints.forget_after(far[-1] if far else steps[0])
        found = self._checkpoints.restore(
            like, iterator=None, config=self._config, fingerprint=self._fingerprint
        )
        assert found is not None
        state, step = found
        self._checkpoints.lineage = happened
        self._checkpoints.tell("returned", now.done, to=step)
        known = state.guard
        assert known is not None
        counted = known._replace(returns=known.returns * 0 + (returns + 1))
        state = state._replace(guard=counted)
        say(
            f"{self._bad} {self.in_a_row} steps in a row were skipped: back to step "
            f"{step}, and on with other data ({returns + 1} of {config.returns})"
        )
        self.in_a_row, self.saved, self.returned = 0, step, True
        self.now = Moment(state, step, now.place)
        self._log.close()
        self._log = _log(self._workdir, step)
        self._shown.begin(step)

    def _given_up(self) -> NonFinite:
        return NonFinite(
            f"{self._bad} It was skipped, as were {self.in_a_row} steps in a row: "
            f"parameters and optimizer are as before them. {self._workdir} keeps the "
            f"checkpoint of step {self.saved}. A lower optimizer.learning_rate or a "
            "longer optimizer.warmup_steps may help: begin so with --init_from, from a "
            "checkpoint."
        )

    def _read(self, unread: Unread) -> None:
        step = unread.step
        found = {k: float(v) for k, v in jax.device_get(unread.metrics).items()}
        self._watch.ended(step)
        self.in_a_row = int(found.pop(guard.IN_A_ROW))
        found[guard.SKIPPED] = int(found[guard.SKIPPED])
        finite = all(math.isfinite(found[name]) for name in guard.FINITE)
        if self.in_a_row:
            bad = [n for n in guard.FINITE if finite or not math.isfinite(found[n])]
            self._bad = f"Step {step}: " + ", ".join(f"{n} is {found[n]}" for n in bad)
            self._bad += "."
            if self.in_a_row == 1:
                say(f"{self._bad} Skipped: nothing has moved.")
        if not finite:
            return
        found["bits_per_byte"] = bits(found["loss"], self._bytes_per_token)
        train = self._config.train
        found["tokens"] = step * train.batch * train.seq_len
        found |= unread.more
        self.latest = found
        self._shown.update(step, found)
        if unread.more or step % train.log_every == 0 or step == train.steps:
            speeds = self._watch.speeds(self._shown.speeds())
            self._log.write(step, found, speeds=speeds)
            self._watch.wrote(step, found, speeds)


def _log(workdir: Path, step: int) -> "MetricLog | _Unwritten":
    return MetricLog(workdir, step) if processes.writes() else _Unwritten()


class _Unwritten:
    """The log of a process that writes none."""

    def write(self, *_, **__) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def bits(nats: float, bytes_per_token: float) -> float:
    """Bits a byte."""
    return nats / math.log(2) / bytes_per_token
