"""The loader's benchmark runs, and says what it measured."""

import json

from experiments.benchmarks import loader


def test_quick(tmp_path):
    loader.main(["--quick", f"--out={tmp_path}", "--compile_cache=none"])
    (path,) = (tmp_path / "benchmarks").glob("loader-*.json")
    said = json.loads(path.read_text())["workloads"]
    assert [w["workload"].split()[0] for w in said] == ["rows", "packed", "mixture"]
    assert all(w["ours"] > 0 and w["peer"] > 0 for w in said)
