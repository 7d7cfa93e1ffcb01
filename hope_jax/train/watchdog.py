"""A watch over calls that may never return: what hangs is shown, saved and ended.

Each such call is made under a name that has a limit. Past it the stacks of all threads
are written to a file and to stderr, and the call is interrupted; one that cannot be
(it is not Python) ends the process with status 75, after what the run has done has been
saved. A run that was asked to end waits `GRACE` seconds for any call.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from hope_jax.train.signals import Stop

STATUS = 75  # of sysexits.h: a temporary failure, to be tried again
GRACE = 10.0  # seconds that a call may go on after a signal
REACT = 5.0  # seconds in which an interrupted call has to end
RESCUE = 60.0  # seconds in which what was done has to be saved
FILE = "stalled.txt"
_TICK = 0.2
_INTERRUPT = signal.SIGUSR2


class Stalled(RuntimeError):
    """A call went on past its limit, or after a signal. Names it and the seconds.

    Attributes:
      status: with which the program is to end.
    """

    def __init__(self, why: str, status: int = STATUS):
        super().__init__(why)
        self.status = status


class Watchdog:
    """Watches the calls of one thread, the one that makes it.

    Args:
      limits: seconds by name of a call; 0 for none.
      stop: tells of signals.
      rescue: saves what was done; is called from another thread while the watched call
        hangs, and given `RESCUE` seconds.
      file: where stacks are written.
      dead: tells why a call cannot end, or None; asked while a call goes on.
      exit: ends the process with a status, at once.

    Attributes:
      seconds: spent so far in the calls of each name, those inside another apart.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        stop: Stop,
        rescue: Callable[[], None],
        file: Path,
        *,
        dead: Callable[[], str | None] = lambda: None,
        exit: Callable[[int], object] = os._exit,
    ):
        self._limits, self._stop, self._rescue = dict(limits), stop, rescue
        self._file, self._dead, self._exit = file, dead, exit
        self.seconds: dict[str, float] = {}
        self._call: tuple[str, float] | None = None
        self._told: tuple[tuple[str, float], str] | None = None
        self._leaving = threading.Lock()  # held for good once the process is to end
        self._closed = threading.Event()
        self._watched = threading.get_ident()
        self._before = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        with contextlib.suppress(ValueError):  # not the main thread
            self._before = signal.signal(_INTERRUPT, self._interrupted)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        self._thread.join()
        if self._before is not None:
            signal.signal(_INTERRUPT, self._before)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Watches the body as the call `name`, which has a limit.

        Raises:
          Stalled: it went on past that.
        """
        outer, self._call = self._call, (name, began := time.monotonic())
        try:
            yield
        finally:
            took = time.monotonic() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            with self._leaving:
                self._call = outer

    def _interrupted(self, number, frame) -> None:
        told, self._told = self._told, None
        if told is not None and told[0] is self._call:
            self._call = None  # it is being left
            raise Stalled(told[1], self._status())

    def _watch(self) -> None:
        while not self._closed.wait(_TICK):
            call = self._call
            why = call and self._overdue(*call)
            if not call or not why:
                continue
            self._show(why)
            if self._before is not None:
                self._told = call, why
                signal.pthread_kill(self._watched, _INTERRUPT)
                if self._left(call):
                    continue
            with self._leaving:
                if self._call is call:
                    return self._end(why)

    def _left(self, call: tuple[str, float]) -> bool:
        """Waits for the interrupted call to end."""
        end = time.monotonic() + REACT
        while self._call is call and time.monotonic() < end:
            if self._closed.wait(_TICK / 4):
                return True
        return self._call is not call

    def _overdue(self, name: str, since: float) -> str:
        """Why the call has to end, or nothing."""
        now, limit = time.monotonic(), self._limits[name]
        if limit and now - since > limit:
            return f"{name} has not ended in {limit:g} s"
        came = self._stop.arrived()
        if came is not None and now - max(came[1], since) > GRACE:
            told = signal.Signals(came[0]).name
            return f"{name} has not ended {GRACE:g} s after {told}"
        return self._dead() or ""

    def _show(self, why: str) -> None:
        """The stacks of all threads, for whoever looks for the cause."""
        line = f"{why}; the stacks of all threads are in {self._file}\n"
        with contextlib.suppress(Exception), open(self._file, "w") as file:
            file.write(line)
            file.flush()
            faulthandler.dump_traceback(file)
        for stream in (sys.stderr, sys.__stderr__):
            if _dump(line, stream):
                return

    def _end(self, why: str) -> None:
        """Saves from another thread, for saving may hang as well, and exits."""
        saving = threading.Thread(target=self._save, daemon=True)
        saving.start()
        saving.join(RESCUE)
        if saving.is_alive():
            _say(f"what was done could not be saved in {RESCUE:g} s")
        status = self._status()
        _say(
            f"{why}: ending with status {status}. --resume goes on from the last save."
        )
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        self._told = None
        self._exit(status)

    def _status(self) -> int:
        came = self._stop.arrived()
        return STATUS if came is None else 128 + came[0]

    def _save(self) -> None:
        try:
            self._rescue()
        except BaseException as error:  # noqa: BLE001 the process ends, whatever it was
            _say(f"what was done since the last save is lost: {error}")


def _dump(line: str, stream: IO[str] | None) -> bool:
    """Whether the stacks could be written to a stream, which needs a real file."""
    try:
        assert stream is not None
        stream.write(line)
        stream.flush()
        faulthandler.dump_traceback(stream)
        return True
    except Exception:
        return False


def _say(line: str) -> None:
    with contextlib.suppress(Exception):
        print(line, file=sys.stderr, flush=True)
