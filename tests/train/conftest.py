"""A run that the tests of this folder share."""

import pytest

from hope_jax.train import loop
from tests.train import programs, tiny


@pytest.fixture(autouse=True)
def shared_programs(monkeypatch):
    programs.share(monkeypatch)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The workdir of the tiny run of 12 steps, finished; nothing is written in it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert loop.train(tiny.rows("smoke")["tiny"], workdir).finished
    return workdir
