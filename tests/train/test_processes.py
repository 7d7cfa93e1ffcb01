"""What processes agree on; `tests/launch/test_local_cluster.py` has real ones."""

import numpy as np
import pytest

from hope_jax.train import processes, sharding, signals


@pytest.fixture
def two(monkeypatch):
    """As if another process had said the same, but for what is in the list."""
    other = []
    monkeypatch.setattr(processes, "alone", lambda: False)

    def gathered(own):
        return np.stack([own, other.pop(0) if other else own])

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gathered)
    return other


def test_other_arguments_are_named(two):
    processes.check_same(config="a", data="b")
    two += [np.frombuffer(b"?" * 32, np.uint8)]
    with pytest.raises(ValueError, match=r"the same config: that of processes \[1\]"):
        processes.check_same(config="a", data="b")


def test_one_that_fails_is_heard_of(two):
    assert processes.all_true(True) and not processes.all_true(False)
    two += [np.array(False)]
    assert not processes.all_true(True)


def test_a_signal_is_heard_with_the_step_it_was_said_with(two):
    own = signals.Stop()
    stop = processes.Stop(own, sharding.make_mesh())
    stop.say()
    own.signal = 15
    stop.say()
    stop.hear(leave=1)
    assert stop.signal is None  # of the first step, before which there was none
    stop.say()
    stop.hear(leave=1)
    assert stop.signal == 15


def test_a_process_alone_stops_at_once():
    own = signals.Stop()
    stop = processes.Stop(own, sharding.make_mesh())
    stop.say()
    stop.hear()
    own.signal = 2
    assert stop.signal == 2 and processes.writes()
    processes.check_same(config="a")
