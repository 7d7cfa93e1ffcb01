"""The benchmark of meshes runs, and says what it measured."""

import pytest

from experiments.benchmarks import scaling
from hope_jax.train.metrics import read_benchmark


def test_quick(tmp_path, capsys):
    scaling.main(["--quick", f"--out={tmp_path}"])
    (path,) = (tmp_path / "benchmarks").glob("scaling-*.json")
    said = read_benchmark(path)["workloads"]
    races = [
        "transformer_tiny on fsdp:2 against one device",
        "m3 against adamw on fsdp:2",
    ]
    clocks = ["steps per second of one core", "steps per second"]
    expected = [(race, clock) for race in races for clock in clocks]
    assert [(work["workload"], work["metric"]) for work in said] == expected
    assert all(len(work["ratios"]) == 2 and work["ours"] > 0 for work in said)
    out = capsys.readouterr().out
    assert out.count("of a step, goal 1.25") == 2


def test_every_axis_on_every_number_of_devices():
    assert scaling.meshes(scaling.FULL) == [
        "data:1",
        *(f"{axis}:{n}" for axis in ("data", "fsdp", "tensor") for n in (2, 4, 8)),
    ]


def test_a_mesh_that_computes_something_else_is_not_timed(monkeypatch):
    """Its first loss is compared before anything is timed."""
    losses = iter([1.0, 1.1])

    class Other:
        def __init__(self, *_):
            self.first = next(losses)

    monkeypatch.setattr(scaling, "Step", Other)
    with pytest.raises(ValueError, match="losses on fsdp:2 differ by"):
        scaling.run(scaling.QUICK, lambda _: None)
