"""Processes that read data: they end with their parent, and it learns of their end."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import connection

ENDING = tuple(  # signals that ask a run to end
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
WAIT = 4.0  # seconds in which the library may raise what it knows of a dead worker


class Died(RuntimeError):
    """A process that reads data ended before it was asked to. Says how."""


def begin(*_) -> None:
    """Called in a worker of a run as it starts: it ends with its parent alone.

    Terminals and schedulers send a signal to all processes at once. The run finishes
    its step and saves, and needs its workers until then.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Called in a process as it starts: once its parent is gone, it ends.

    Otherwise it would wait for ever for somebody to take what it has read.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait():
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Workers:
    """The processes that this one has started since this was made."""

    def __init__(self):
        self._others = set(multiprocessing.active_children())
        self._known = set()
        self._died: float | None = None

    def dead(self, wait: float | None = None) -> str | None:
        """How a worker ended that should not have, `wait` seconds ago (by default
        `WAIT`) or more."""
        self._known |= set(multiprocessing.active_children()) - self._others
        ended = [process for process in self._known if process.exitcode]
        if not ended:
            return None
        self._died = self._died or time.monotonic()
        if time.monotonic() - self._died < (WAIT if wait is None else wait):
            return None
        return f"a worker that reads data has ended with status {ended[0].exitcode}"

    def kill(self) -> None:
        """Ends them, also those that are stopped."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()
