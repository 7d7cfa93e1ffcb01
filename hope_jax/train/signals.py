"""Signals that end a run: noted, so that the step at hand is finished and saved."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from hope_jax.data.workers import ENDING

AGAIN = 1.0  # seconds; wrappers pass a signal on that the run was sent itself


class Stop:
    """Whether a run was asked to end.

    Attributes:
      signal: the number of the first signal, or None.
    """

    def __init__(self):
        self.signal: int | None = None
        self._noted = 0.0
        self._pipe: int | None = None
        self._arrived: tuple[int, float] | None = None

    def note(self, number: int) -> None:
        """A signal has come; the second Ctrl-C of a person interrupts."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._noted = number, now
        elif number == signal.SIGINT and now - self._noted > AGAIN:
            raise KeyboardInterrupt

    def arrived(self) -> tuple[int, float] | None:
        """The first signal and when it was seen, in seconds of `time.monotonic`.

        Other threads may ask: it is known while the main one is in a long call.
        """
        if self._arrived is None and self.signal is not None:
            self._arrived = self.signal, self._noted
        if self._arrived is None and self._pipe is not None:
            with contextlib.suppress(OSError):  # nothing has come
                came = [n for n in os.read(self._pipe, 64) if n in ENDING]
                if came:
                    self._arrived = came[0], time.monotonic()
        return self._arrived


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Notes SIGTERM, SIGINT, SIGHUP and SIGUSR1 and lets nothing be lost by a second.

    A second Ctrl-C, a second or more after the first, interrupts. Signals that the
    process ignores (SIGHUP under `nohup`) stay so. Does nothing outside of the main
    thread: signals are somebody else's there.
    """
    stop, before = Stop(), {}
    try:
        for number in ENDING:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            handler = signal.signal(number, lambda number, frame: stop.note(number))
            before[number] = handler
    except ValueError:
        yield stop
        return
    with contextlib.ExitStack() as stack:
        for number, handler in before.items():
            stack.callback(signal.signal, number, handler)
        stack.enter_context(_seen_by_threads(stop))
        yield stop


@contextlib.contextmanager
def _seen_by_threads(stop: Stop) -> Iterator[None]:
    """Python runs handlers in the main thread alone, and not during its long calls; the
    numbers of signals are written to a pipe at once."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    other = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    if other == -1:
        stop._pipe = read
    else:  # an event loop's
        signal.set_wakeup_fd(other, warn_on_full_buffer=False)
    try:
        yield
    finally:
        stop._pipe = None
        if other == -1:
            signal.set_wakeup_fd(-1)
        os.close(read)
        os.close(write)
