"""A process of its own for one framework, pinned before the framework is imported.

The parent starts it (`Worker`) and asks, one JSON line a request; the child (`main`)
imports the module of its programs and answers. That module has `build(spec, arrays) ->
(program, collect)`: `program()` blocks until its outputs are there, `collect(outputs)`
makes them `{name: numpy array}`. Needs NumPy alone, so that a framework may live in an
environment of its own.
"""

import ctypes
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).parents[2]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(RuntimeError):
    """The worker could not do what it was asked; the message says why."""


class Worker:
    """The parent's side of a worker process.

    Args:
      module: of the programs.
      cores: to run on.
      python: the interpreter that has the framework.
      environment: further environment variables.
      memory: bytes it may allocate, so that it fails by itself before the system ends
        processes of its own choice; None is no limit.

    Raises:
      WorkerError: the module cannot be imported there.
    """

    def __init__(
        self,
        module: str,
        cores: Sequence[int],
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        memory: int | None = None,
    ):
        threads = {name: str(len(cores)) for name in _THREADS}
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [python, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "PYTHONSAFEPATH": "1",  # not the folder of this file
                **threads,
                **(environment or {}),
            },
        )
        try:
            of = {"module": module, "cores": list(cores), "memory": memory}
            self.versions = self.ask("start", **of)["versions"]
        except WorkerError:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer.

        Raises:
          WorkerError: what went wrong in the worker, or its death.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise WorkerError(f"the worker ended with code {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def measure(self, name: str, calls: int) -> tuple[float, float]:
        """Seconds of one call, on the clock and of all threads together."""
        reply = self.ask("measure", name=name, calls=calls)
        return reply["wall"], reply["cpu"]

    def close(self) -> None:
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except OSError:
            self._process.wait()  # it has ended before
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class _Desk:
    """The child's side: one method a request."""

    def __init__(self):
        self._module, self._programs = None, {}

    def start(self, module, cores, memory):
        """Keeps to its cores and its memory, then imports the module."""
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        self._module = importlib.import_module(module)
        return {"versions": self._module.versions()}

    def build(self, name, spec, inputs=None, outputs=None):
        """Compiles, calls twice and writes what came out to `outputs`, an npz file.

        Returns the seconds of compiling and of the second call, and that call's peak of
        resident memory in bytes, None where the system does not count it. What a larger
        program once took may not have been given back: build smaller ones first.
        """
        arrays = {}
        if inputs is not None:
            with np.load(inputs) as file:
                arrays = dict(file)
        started = time.perf_counter()
        program, collect = self._module.build(spec, arrays)
        found = program()
        compiled = time.perf_counter() - started
        _restart_peak()
        started = time.perf_counter()
        found = program()
        called = time.perf_counter() - started
        peak = _peak()
        if outputs is not None:
            np.savez(outputs, **collect(found))
        self._programs[name] = program
        return {
            "compile": max(compiled - called, 1e-3),
            "call": called,
            "peak": peak,
        }

    def measure(self, name, calls):
        program = self._programs[name]
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            program()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": wall / calls, "cpu": cpu / calls}

    def drop(self):
        self._programs.clear()
        self._module.reset()
        return {}


def _restart_peak() -> None:
    """Lets the peak be counted from what is resident now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier calls have freed
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # neither glibc nor Linux
        return


def _peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Answers the requests of its standard input, each a line of JSON."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    desk = _Desk()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(desk, request.pop("do"))(**request)
        except (Exception, SystemExit) as error:  # told to the parent, which decides
            reply = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
