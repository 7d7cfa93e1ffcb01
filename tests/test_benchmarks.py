"""Benchmarks run at their small sizes, and time what they say they time."""

import dataclasses
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments.benchmarks import hope_layer, models, serving, timing
from hope_jax.models.config import with_context
from hope_jax.train.metrics import read_benchmark


def test_programs_take_turns_and_every_other_round_backwards(monkeypatch):
    monkeypatch.setattr(timing, "_SHORTEST", 1e-9)
    called = []
    programs = {name: lambda name=name: called.append(name) for name in "ab"}
    times = timing.interleave(programs, rounds=3)
    warm_up = list("aabb")
    assert called == warm_up + list("ab") + list("ba") + list("ab")
    assert {len(t.wall) for t in times.values()} == {3}
    assert {len(t.cpu) for t in times.values()} == {3}


def test_seconds_are_those_of_one_call(monkeypatch):
    monkeypatch.setattr(timing, "_SHORTEST", 0.02)
    # Threads that earlier tests left behind may still run.
    monkeypatch.setattr(time, "process_time", time.thread_time)
    calls = []

    def program():
        calls.append(None)
        time.sleep(0.005)

    (times,) = timing.interleave({"sleeps": program}, rounds=1).values()
    assert len(calls) > 3
    assert 0.005 <= times.wall[0] < 0.05
    assert times.cpu[0] < times.wall[0]  # sleeping takes no core


def test_rounds_are_at_least_one():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        timing.interleave({}, rounds=0)


def test_ratios_are_of_pairs():
    """The median of the ratios, which is not the ratio of the medians."""
    found = timing.workload("w", "m", ours=[1.0, 4.0, 9.0], peer=[1.0, 1.0, 3.0])
    assert found == {
        "workload": "w",
        "metric": "m",
        "ours": 4.0,
        "peer": 1.0,
        "ratio": 3.0,
        "ratios": [1.0, 4.0, 3.0],
    }


@pytest.mark.parametrize("wrong", [2.1, float("nan"), float("inf")])
def test_programs_that_disagree_are_not_timed(wrong):
    right = {"a": jnp.array([1.0, 2.0])}
    assert timing.check_agreement("they", right, right, 1e-3) == 0.0
    with pytest.raises(ValueError, match="they differ by .* not timed"):
        timing.check_agreement("they", {"a": jnp.array([1.0, wrong])}, right, 1e-3)


def test_a_reference_that_differs_stops_the_benchmark(monkeypatch):
    wrong = lambda layer, x: (x, ())  # noqa: E731
    monkeypatch.setattr(hope_layer, "self_modifying_reference", wrong)
    programs = hope_layer.build(hope_layer.QUICK)
    some = {name: programs[name] for name in programs if name[1:] == ("forward", 4)}
    monkeypatch.setattr(hope_layer, "build", lambda sizes: some)
    with pytest.raises(ValueError, match="layer and reference, forward, T 4, differ"):
        hope_layer.run(hope_layer.QUICK, report=lambda line: None)


def test_hope_layer(tmp_path, capsys):
    hope_layer.main(["--quick", "--rounds=2", f"--out={tmp_path}"])
    (path,) = (tmp_path / "benchmarks").iterdir()
    benchmark = read_benchmark(path)
    assert benchmark["name"] == "hope_layer"
    workloads = {(w["workload"], w["metric"]): w for w in benchmark["workloads"]}
    assert len(workloads) == len(benchmark["workloads"])
    for peer, task, length in [
        ("attention", "forward", 4),
        ("attention", "forward", 8),
        ("attention", "training", 4),
        ("attention", "training", 8),
        ("reference", "forward", 4),
        ("reference", "forward", 8),
        ("reference", "training", 4),
    ]:
        name = f"self-modifying layer against {peer}, {task}, T {length}"
        for metric in ("tokens per second", "tokens per second of one core"):
            assert len(workloads[name, metric]["ratios"]) == 2
            assert workloads[name, metric]["ours"] > 0
    for layer in ("layer", "attention"):
        for task in ("forward", "training"):
            name = f"growth of {layer}, {task}, T 8 against 4"
            assert (name, "tokens per second of one core") in workloads
    output = capsys.readouterr().out
    assert "layer and reference, training, T 4, agree to" in output
    assert path.name in output


def test_models_are_timed_beside_another_checkout(tmp_path, monkeypatch, capsys):
    """In workers of its own; here the other checkout is this one."""
    small = {"d_model": 32, "heads": 1, "vocab": 64, "layers": 1}
    spec = {"model": "transformer_tiny", "task": "training", "rows": 2, "T": 4}
    spec |= {"turns": 2, "set": small}
    case = models.Case(name="training", spec=spec, rounds=2, twin="transformer_tiny")
    layer = models.Case(name="layer", spec=spec | {"task": "layer"}, rounds=2)
    monkeypatch.setattr(models, "cases", lambda quick: [case, layer] if quick else [])
    root = Path(models.__file__).parents[2]
    models.main(["--quick", f"--before={root}", f"--out={tmp_path}"])
    (path,) = (tmp_path / "benchmarks").iterdir()
    found = {w["workload"] for w in read_benchmark(path)["workloads"]}
    workers = ("before", "twin", "twin at once")
    assert found == {
        *(f"training, against {name}" for name in workers),
        "layer, against before",
    }
    said = capsys.readouterr().out
    assert said.count(": loss ") == 4 and "not timed" not in said
    squares = [line.split()[-1] for line in said.splitlines() if "mean square" in line]
    assert len(squares) == 2 and squares[0] == squares[1] != "0"


def test_serving(tmp_path, monkeypatch, capsys):
    """With the Transformer in the place of Hope, which takes a minute to compile."""
    monkeypatch.setattr(timing, "_SHORTEST", 1e-9)
    get = serving.zoo.get
    options = ["--slots=2", "--memory=0.00002", "--contexts=8,900"]
    monkeypatch.setattr(
        serving.Sizes, "get", lambda self, name: _served(self, name, get)
    )
    found = {}
    for part in serving.PARTS:
        serving.main(["--quick", f"--only={part}", *options, f"--out={tmp_path}"])
        (path,) = (tmp_path / "benchmarks").glob(f"serving_{part}-*.json")
        for w in read_benchmark(path)["workloads"]:
            found[w["workload"], w["metric"]] = w
    per_cpu = "tokens per CPU second"
    for task in (
        "decode, 2 slots, apart",
        "read, 2 slots, together",
        "prefill, 2 rows",
    ):
        assert found[f"{task}, against a context of 8", per_cpu]["ours"] > 0
    small, large = (
        found[f"sessions, against a context of {n}", "sessions per GB"]
        for n in (8, 900)
    )
    assert small["ours"] == large["ours"] and large["peer"] < small["peer"] / 20
    said = capsys.readouterr().out
    assert "2 slots, context 900: left out" in said
    assert "2 rows, context 900: left out" in said
    assert not any("prefill" in name and "900" in name for name, _ in found)


def _served(sizes, name, get):
    made = dataclasses.replace(get("transformer_tiny"), **dict(sizes.model))
    return with_context(made, 4) if name == "hope_tiny" else made


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--slots=0", "slots and contexts must be at least 1"),
        ("--memory=0", "memory must be above 0 GB, got 0"),
        ("--contexts=x", "invalid literal"),
    ],
)
def test_serving_refuses(flag, message):
    with pytest.raises(SystemExit) as stopped:
        serving.main(["--quick", flag])
    assert message in str(stopped.value.code)


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        models.main([f"--before={tmp_path}"])
    assert "is no checkout of this project" in str(stopped.value.code)
