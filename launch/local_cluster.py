"""Runs a program as several processes of one run on this machine.

    python -m launch.local_cluster --processes=2 --logs=runs/logs -- \\
        python -m launch.train --experiment=quickstart --row=hope --workdir=runs/hope

Each is given --coordinator, --num_processes and --process_id, and writes what it says
to a file of its own under --logs. SIGTERM, SIGINT and SIGHUP go to each of them, once.
When one ends, or was sent a signal, all have --grace seconds to end as well, and are
then killed with all that they have started. They end with this program, even if it is
killed (on Linux).
"""

import contextlib
import ctypes
import functools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch import command

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TICK = 0.05
_PR_SET_PDEATHSIG = 1


def _define(define) -> None:
    define.integer("processes", 2, "how many")
    define.integer(
        "devices",
        None,
        "virtual CPU devices of each; by default every process has what JAX finds",
    )
    define.string("logs", None, "folder of a file each; by default they write here")
    define.integer(
        "grace", 60, "seconds that all have to end when one has, or after a signal"
    )
    define.bool("dry_run", False, "print the command of each and exit")


def commands(program: Sequence[str], count: int, port: int) -> list[list[str]]:
    """The argument list of each process."""
    joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    return [[*program, *joined, f"--process_id={i}"] for i in range(count)]


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs them; the exit status is that of the first that did not end well."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    given = command.parse(__doc__, _define, arguments[:split], compiles=False)
    program = arguments[split + 1 :]
    if not program:
        command.fail("give the program after --, as: -- python -m launch.train ...")
    for name, least in (("processes", 1), ("devices", 1), ("grace", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            command.fail(f"--{name} must be at least {least}, got {value}.")
    each = commands(program, given.processes, free_port())
    if given.dry_run:
        print(*map(shlex.join, each), sep="\n")
        return 0
    environment = dict(os.environ)
    if given.devices is not None:
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(given.devices),
        }
    try:
        return run(each, environment, given.logs, given.grace)
    except OSError as error:
        command.fail(f"{error}. The program was: {shlex.join(program)}")
        raise AssertionError from error


def run(
    each: Sequence[Sequence[str]],
    environment: dict[str, str],
    logs: str | os.PathLike | None,
    grace: float,
) -> int:
    """Runs the processes until all have ended.

    Args:
      each: argument lists.
      environment: of all of them.
      logs: folder of `process-<i>.log`; None lets them write where this one does.
      grace: seconds from the end of the first, or from a signal, to that of all.

    Returns:
      0 if all ended well, else the status of the first that did not, 128 + signal if a
      signal ended it.
    """
    started: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        # Their parent is this thread: it lives as long as the program does.
        stack.callback(_end, started)
        came = stack.enter_context(_noted())
        for i, arguments in enumerate(each):
            out: Any = None
            if logs is not None:
                Path(logs).mkdir(parents=True, exist_ok=True)
                path = Path(logs) / f"process-{i}.log"
                out = stack.enter_context(path.open("ab"))
            started.append(
                subprocess.Popen(
                    arguments,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    preexec_fn=functools.partial(_die_with_parent, os.getpid()),
                )
            )
        return _wait(started, grace, came)


def _wait(started: Sequence[subprocess.Popen], grace: float, came: deque[int]) -> int:
    worst, over, killed, signalled = 0, None, False, False
    while True:
        while came:
            signalled = True
            _send(started, came.popleft())
        codes = [process.poll() for process in started]
        worst = worst or next((code for code in codes if code), 0)
        if None not in codes:
            return 128 - worst if worst < 0 else worst
        if over is None and (signalled or any(code is not None for code in codes)):
            over = time.monotonic() + grace
        if over is not None and time.monotonic() > over and not killed:
            slow = [i for i, code in enumerate(codes) if code is None]
            print(f"processes {slow} did not end in {grace} s: killed", flush=True)
            _kill(started)
            worst, killed = worst or -signal.SIGKILL, True
        time.sleep(_TICK)


def _send(started: Sequence[subprocess.Popen], number: int) -> None:
    """To those that run; what they have started is theirs to end."""
    for process in started:
        if process.poll() is None:
            process.send_signal(number)


def _kill(started: Sequence[subprocess.Popen]) -> None:
    """Those that run, with what they have started."""
    for process in started:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _end(started: Sequence[subprocess.Popen]) -> None:
    _kill(started)
    for process in started:
        process.wait()


@contextlib.contextmanager
def _noted() -> Iterator[deque[int]]:
    """The signals that come from now on, to be passed on when all have started; not
    those that are ignored, as SIGHUP is under `nohup`."""
    came: deque[int] = deque()
    before = {}
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, lambda n, _: came.append(n))
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent(parent: int) -> None:
    """Runs in the child, before it is the program: the kernel kills it when its parent
    is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)


if __name__ == "__main__":
    command.run(main)
