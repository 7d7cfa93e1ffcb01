"""Result files, benchmark files and the log of a run."""

import json

import numpy as np
import pytest

from hope_jax.train import metrics

RESULT = dict(
    experiment="table1",
    row="hope",
    scale="smoke",
    seed=3,
    config={"model": {"d_model": 8}},
    metrics={"bpb": 1.5, "steps": 10},
)
WORKLOAD = dict(
    workload="forward T=512",
    ours=2.0,
    peer=1.0,
    metric="tokens/s",
    ratio=2.0,
    ratios=[1.5, 2.0, 2.5],
)


def test_result_round_trip(tmp_path):
    path = metrics.write_result(tmp_path, **RESULT)
    assert path == tmp_path / "table1" / "hope-s3.json"
    result = metrics.read_result(path)
    assert tuple(result) == metrics.RESULT_KEYS
    assert {key: result[key] for key in RESULT} == RESULT
    assert set(result["versions"]) == {"python", *metrics.PACKAGES}
    assert result["device"].endswith("cpu")
    metrics.write_result(tmp_path, **{**RESULT, "row": "other"})
    metrics.write_benchmark(tmp_path, name="layer", workloads=[WORKLOAD])
    assert [r["row"] for r in metrics.read_results(tmp_path)] == ["hope", "other"]
    assert len(metrics.read_results(tmp_path, "table1")) == 2
    assert metrics.read_results(tmp_path, "table2") == []
    assert not list(tmp_path.glob("**/.*"))  # nothing half-written is left


def test_numpy_numbers_become_plain(tmp_path):
    values = {"loss": np.float32(0.5), "steps": np.int64(3)}
    path = metrics.write_result(tmp_path, **{**RESULT, "metrics": values})
    assert metrics.read_result(path)["metrics"] == {"loss": 0.5, "steps": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"loss": float("nan")}}, "loss .* must be finite, got nan"),
        ({"metrics": {"loss": float("inf")}}, "loss .* must be finite, got inf"),
        ({"metrics": {"a": {"loss": 1.0}}}, "a in .* must be a number"),
        ({"metrics": {"ok": True}}, "ok in .* must be a number, got True"),
        ({"row": "../evil"}, "row must be letters.*got '../evil'"),
        ({"experiment": "a/b"}, "experiment must be letters"),
        ({"experiment": "benchmarks"}, "must not be 'benchmarks'"),
        ({"seed": "3"}, "seed of this result must be a int, got '3'"),
    ],
)
def test_what_no_result_may_hold(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        metrics.write_result(tmp_path, **{**RESULT, **change})
    assert not list(tmp_path.rglob("*.json"))


def test_a_damaged_result_is_refused_by_name(tmp_path):
    path = metrics.write_result(tmp_path, **RESULT)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in data.items() if k != "device"}))
    with pytest.raises(ValueError, match=r"hope-s3.json.*missing \['device'\]"):
        metrics.read_result(path)
    path.write_text(json.dumps({**data, "extra": 1}))
    with pytest.raises(ValueError, match=r"unknown \['extra'\]"):
        metrics.read_results(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="hope-s3.json is no JSON"):
        metrics.read_result(path)


def test_benchmark_round_trip(tmp_path):
    path = metrics.write_benchmark(tmp_path, name="layer", workloads=[WORKLOAD])
    assert path.parent.name == "benchmarks"
    assert path.name.startswith("layer-") and path.name.endswith("cpu.json")
    assert metrics.read_benchmark(path)["workloads"] == [WORKLOAD]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 2.2}, "ratio of workload 0 .* median of ratios, 2.0; got 2.2"),
        ({"ours": float("nan")}, "ours in workload 0"),
        ({"ratios": []}, "ratios of workload 0 .* is empty"),
        ({"note": "x"}, r"unknown \['note'\]"),
    ],
)
def test_what_no_benchmark_may_hold(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        metrics.write_benchmark(
            tmp_path, name="layer", workloads=[{**WORKLOAD, **change}]
        )


def test_commit_is_unknown_outside_a_repository(tmp_path, monkeypatch):
    assert metrics.commit() != ""
    monkeypatch.setattr(metrics, "_ROOT", tmp_path)
    assert metrics.commit() == "unknown"


def test_a_resumed_log_equals_an_unbroken_one(tmp_path):
    def write(log, steps):
        for step in steps:
            log.write(step, {"loss": np.float32(1 / step)}, speeds={"t": step * 2.0})
        log.sync()
        log.close()

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(metrics.MetricLog(tmp_path / "a"), range(1, 10))
    write(metrics.MetricLog(tmp_path / "b"), range(1, 8))
    broken = tmp_path / "b" / "metrics.jsonl"
    with broken.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while it wrote
    write(metrics.MetricLog(tmp_path / "b", step=5), range(6, 10))
    assert broken.read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()
    assert [r["step"] for r in metrics.read_log(broken)] == list(range(1, 10))


def test_the_log_refuses_nan_and_reports_bad_lines(tmp_path):
    log = metrics.MetricLog(tmp_path)
    with pytest.raises(ValueError, match="loss in the metrics of step 4"):
        log.write(4, {"loss": float("nan")})
    log.close()
    assert log.path.read_text() == ""
    log.path.write_text('{"step": 1}\n}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="Line 2 of"):
        metrics.read_log(log.path)
