"""What the processes of one run must agree on before any of them goes on.

They read different rows and hold different devices; all else is the same in each. What
one of them decides for itself, when to stop or whether a file can be read, would leave
the others waiting in a collective for ever.
"""

import hashlib
from collections import deque
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Signalled(Protocol):
    """What notes the signals of this process."""

    signal: int | None


def writes() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return jax.process_index() == 0


def alone() -> bool:
    """Whether this process is all there is of its run."""
    return jax.process_count() == 1


def wait(place: str) -> None:
    """Returns once every process is at `place`."""
    multihost_utils.sync_global_devices(place)


def all_true(flag: bool) -> bool:
    """Whether `flag` is true in every process."""
    if alone():
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).all())


def check_same(**described: str) -> None:
    """Refuses to go on where processes were given different things.

    Args:
      described: name to text, of what must be the same.

    Raises:
      ValueError: names what differs and in which processes.
    """
    if alone():
        return
    for name, text in described.items():
        digest = hashlib.sha256(text.encode()).digest()
        every = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
        other = np.flatnonzero((every != every[0]).any(axis=1)).tolist()
        if other:
            raise ValueError(
                f"The processes of a run must be given the same {name}: that of "
                f"processes {other} differs from that of process 0."
            )


class Stop:
    """The signal at which a run stops, after the same step in every process.

    Each process says with every step whether it was signalled; all hear of a step when
    they read its metrics, which is one step later.

    Args:
      own: of this process.
      mesh: over which the run is shared.
    """

    def __init__(self, own: Signalled, mesh: Mesh):
        self._own, self._heard = own, None
        self._alone = alone()
        self._said: deque[jax.Array] = deque()
        if not self._alone:
            self._rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            whole = NamedSharding(mesh, PartitionSpec())
            self._largest = jax.jit(jnp.max, out_shardings=whole)

    @property
    def signal(self) -> int | None:
        """Its number; None while nobody was signalled."""
        return self._own.signal if self._alone else self._heard

    def say(self) -> None:
        """With the dispatch of a step; waits for nobody."""
        if self._alone:
            return
        number = np.full(jax.local_device_count(), self._own.signal or 0, np.int32)
        put = jax.make_array_from_process_local_data
        self._said.append(self._largest(put(self._rows, number)))

    def hear(self, leave: int = 0) -> None:
        """With the metrics of steps, of all but the last `leave`."""
        while len(self._said) > leave:
            self._heard = int(self._said.popleft()) or self._heard
