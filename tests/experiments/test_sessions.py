"""Many sessions beside each other and alone: a difference would be seen."""

import numpy as np
import pytest

from experiments import sessions
from hope_jax.train.metrics import read_result
from tests.stream.test_session import BLOCK, CONFIG, SLOTS


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Of a small server, with the program of tests/stream."""
    setting = sessions.Setting(
        model=CONFIG, sessions=6, slots=SLOTS, block=BLOCK, requests=20
    )
    monkeypatch.setattr(sessions, "rows", lambda scale: {"hope": setting})

    def measure():
        said = sessions.main(["--scale=smoke", f"--out={tmp_path}"])
        assert "sessions that differ" in said and "| hope | 20 |" in said
        return read_result(tmp_path / "sessions" / "hope-s0.json")["metrics"]

    return measure


def test_sessions_are_as_if_alone(measured):
    found = measured()
    assert found["sessions that differ"] == found["weights that changed"] == 0
    assert found["requests"] == 20 < found["tokens"] and found["programs"] <= 1


def test_what_is_not_as_alone_is_counted(measured, monkeypatch):
    wish, count = sessions.wish, iter(range(1000))

    def another(*which):
        return wish(*which) | {"text": np.array([next(count) % 256])}

    monkeypatch.setattr(sessions, "wish", another)
    assert measured()["sessions that differ"] > 3
