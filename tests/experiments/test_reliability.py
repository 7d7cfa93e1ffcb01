"""What is left out of a restore is missed, a flipped bit is noticed, a kill is not."""

import gc

import pytest

from experiments import reliability
from hope_jax.train.metrics import read_result
from tests.train import programs

# Orbax leaves coroutines behind when a file is damaged.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def leftovers():
    """Finalises them here, not in the middle of something else."""
    yield
    gc.collect()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("controls", {"same_with_all": 1.0, "left_out": 4.0, "elsewhere": 4.0}),
        ("bit_flips", {"flips": 12.0, "silent": 0.0}),
    ],
)
def test_a_smoke_run_finds_what_is_expected(tmp_path, monkeypatch, row, expected):
    programs.share(monkeypatch)
    flags = ["--scale=smoke", f"--out={tmp_path}", f"--rows={row}", "--seeds=1"]
    made = reliability.main(flags)
    found = read_result(tmp_path / "reliability" / f"{row}-s1.json")["metrics"]
    assert {name: found[name] for name in expected} == expected
    assert f"| {row} |" in made
    if row == "bit_flips":
        assert found["noticed"] > 0
        assert found["noticed"] + found["harmless"] == found["flips"]
