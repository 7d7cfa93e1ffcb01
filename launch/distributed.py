"""Many processes, one run: flags that say who they are, and the call that joins them.

    launch.train ... --coordinator=10.0.0.2:8476 --num_processes=2 --process_id=0
    srun python -m launch.train ... --coordinator=auto  # on SLURM

Without `--coordinator` a program is one process alone, and opens no port.
"""

import ipaddress
import re
from types import SimpleNamespace
from typing import Any

AUTO = "auto"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\]")


def define(define: SimpleNamespace) -> None:
    """Adds the flags; see `launch.command.parse`."""
    define.string(
        "coordinator",
        None,
        "host:port of process 0, where the processes of one run meet; 'auto' where "
        "SLURM, Open MPI, Kubernetes or a TPU pod tells each of them",
    )
    define.integer("num_processes", None, "how many they are, with a host:port")
    define.integer("process_id", None, "which of them this is, from 0")
    define.integer(
        "start_timeout", 300, "seconds in which all processes must have started"
    )
    define.integer(
        "heartbeat_timeout",
        30,
        "seconds without a sign of life after which a process counts as dead, and the "
        "others end",
    )


def check(given: Any) -> None:
    """Refuses flags that do not go together.

    Raises:
      ValueError: names the flag and its value.
    """
    named = {"num_processes": given.num_processes, "process_id": given.process_id}
    for name in ("start_timeout", "heartbeat_timeout"):
        if getattr(given, name) < 1:
            raise ValueError(
                f"--{name} must be at least 1 second, got {getattr(given, name)}."
            )
    if given.coordinator in (None, AUTO):
        for name, value in named.items():
            if value is not None:
                raise ValueError(
                    f"--{name}={value} needs --coordinator=host:port of process 0."
                )
        return
    host, _, port = given.coordinator.rpartition(":")
    if not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"--coordinator={given.coordinator!r} must be host:port, or {AUTO!r}."
        )
    for name, value in named.items():
        if value is None:
            raise ValueError(f"--coordinator={given.coordinator} needs --{name}.")
    if not 0 <= given.process_id < given.num_processes:
        raise ValueError(
            f"--process_id={given.process_id} must lie in [0, --num_processes), and "
            f"that is {given.num_processes}."
        )


def start(given: Any) -> None:
    """Joins the processes of a run, before JAX is used for anything else.

    A process that does not come, or that dies later, ends the others after the
    time-outs: JAX then aborts them with a message, and what was saved can be resumed.

    Args:
      given: the flags.

    Raises:
      ValueError: flags that do not go together.
    """
    check(given)
    if given.coordinator is None:
        return
    import jax  # after --help

    # The loop has its own handlers of signals; this one would swallow them.
    jax.config.update("jax_enable_preemption_service", False)
    timeouts = {
        "initialization_timeout": given.start_timeout,
        "heartbeat_timeout_seconds": given.heartbeat_timeout,
    }
    if given.coordinator == AUTO:
        try:
            jax.distributed.initialize(**timeouts)
        except ValueError as error:
            raise ValueError(
                f"--coordinator={AUTO}: nothing here says which processes there are "
                f"({error}) Give --coordinator=host:port, --num_processes and "
                "--process_id."
            ) from None
        return
    jax.distributed.initialize(
        given.coordinator,
        given.num_processes,
        given.process_id,
        cluster_detection_method="deactivate",
        coordinator_bind_address=_bound(given.coordinator),
        **timeouts,
    )


def _bound(coordinator: str) -> str | None:
    """Where process 0 listens: on this machine alone, if all meet there."""
    host = coordinator.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return coordinator
    try:
        return coordinator if ipaddress.ip_address(host).is_loopback else None
    except ValueError:  # a name
        return None
