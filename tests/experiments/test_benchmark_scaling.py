"""The benchmark of meshes runs, and says what it measured."""

import pytest

from experiments.benchmarks import scaling
from hope_jax.train.metrics import read_benchmark


def test_quick(tmp_path, capsys):
    parts = ("transformer", "optimizers")
    scaling.main(["--quick", f"--only={','.join(parts)}", f"--out={tmp_path}"])
    names = {
        "transformer": "transformer_tiny on fsdp:2 against one device",
        "optimizers": "m3 against adamw on fsdp:2",
    }
    for part in parts:
        (path,) = (tmp_path / "benchmarks").glob(f"scaling_{part}-*.json")
        said = read_benchmark(path)["workloads"]
        assert [work["metric"] for work in said] == [m for _, m in scaling.CLOCKS]
        assert {work["workload"] for work in said} == {names[part]}
        assert all(len(work["ratios"]) == 2 and work["ours"] > 0 for work in said)
    out = capsys.readouterr().out
    assert out.count("of a step, goal 1.25") == 2
    assert all(f"| {name} |" in out for name in names.values())


def test_every_axis_on_every_number_of_devices():
    axes = ("data", "fsdp", "tensor")
    parts = scaling.races(scaling.FULL)
    (race,) = parts["transformer"]
    assert list(race.steps) == [
        "data:1",
        *(f"{a}:{n}" for a in axes for n in (2, 4, 8)),
    ]
    (race,) = parts["hope"]
    assert list(race.steps) == ["data:1", *(f"{a}:4" for a in axes)]
    assert [list(r.steps) for r in parts["optimizers"]] == [["adamw", "muon", "m3"]] * 2


def test_a_mesh_that_computes_something_else_is_not_timed(monkeypatch):
    """Its first loss is compared before anything is timed."""
    losses = iter([1.0, 1.1])

    class Other:
        def __init__(self, *_):
            self.first = next(losses)

    monkeypatch.setattr(scaling, "Step", Other)
    (race,) = scaling.races(scaling.QUICK)["transformer"]
    with pytest.raises(ValueError, match="losses of fsdp:2 differ by"):
        scaling.run(race, scaling.QUICK, lambda _: None)
