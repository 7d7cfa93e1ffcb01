"""The recall experiment: its rows differ as they say, its results are read again."""

import dataclasses

import pytest

from experiments import memory
from hope_jax.train.metrics import read_result


def _flat(row):
    layer = dataclasses.asdict(row.layer)
    inner = {f"memory.{k}": v for k, v in layer.pop("memory").items()}
    return layer | inner | {"projections": row.projections}


def test_every_row_has_a_model():
    for group, rows in memory.GROUPS.items():
        for name, row in rows().items():
            config = memory.settings(row, 1e-2, smoke=False)
            assert name.startswith(group)
            assert memory.model(row, config).vocab == config.task.vocab
            assert config.steps == row.steps


def test_a_step_of_the_bisection_turns_one_switch():
    """But for the first, which changes the layer; a decay comes with its half-life,
    which nothing reads without one."""
    rows = list(memory.GROUPS["bisection"]().values())

    for before, after in zip(rows[1:], rows[2:], strict=False):
        a, b = _flat(before), _flat(after)
        turned = {k for k in a if a[k] != b[k]}
        if a["memory.retention"] == "none" != b["memory.retention"]:
            turned.remove("half_life_start")
        assert len(turned) == 1


def test_laws_are_one_choice_from_the_default_each():
    """Or two or three where one needs the others."""
    recall = memory.GROUPS["recall"]()
    hope, matrix = recall["recall_400_hope"], recall["recall_400_hope_matrix"]
    for name, row in memory.GROUPS["laws"]().items():
        default = matrix if "matrix" in name else hope
        a, b = _flat(row), _flat(default)
        assert 1 <= sum(a[k] != b[k] for k in a) <= 3, name


def test_rows_of_forgetting_differ_in_half_lives_alone():
    made = {}
    for name, row in memory.GROUPS["forgetting"]().items():
        of, _, tokens = name.rpartition("_")
        assert row.layer.half_life_start == float(tokens)
        plain = dataclasses.replace(row.layer, half_life_start=64.0)
        made.setdefault(of, []).append(plain)
    for layers in made.values():
        assert len(layers) == 4
        assert all(layer == layers[0] for layer in layers)


def test_a_smoke_run_writes_results_and_a_table(tmp_path, capsys, monkeypatch):
    few = dict(list(memory._recall().items())[:2])
    monkeypatch.setitem(memory.GROUPS, "recall", lambda: few)
    arguments = ["--group=recall", "--scale=smoke", "--seeds=3", f"--out={tmp_path}"]
    made = memory.main(arguments)
    for name in few:
        result = read_result(tmp_path / "memory" / f"{name}-s3.json")
        assert 0.0 <= result["metrics"]["accuracy"] <= 1.0
        assert f"| {name.removeprefix('recall_')} |" in made
    capsys.readouterr()
    assert memory.main(arguments) == made  # nothing is trained again
    assert "seed 3" not in capsys.readouterr().out


def test_names_are_checked():
    for arguments, message in (
        (["--group=recall", "--rows=fast"], "no row 'fast'; there are recall_400_"),
        (["--group=recall", "--scale=smoke"], "needs --out"),
        ([], "--group is needed"),
    ):
        with pytest.raises(SystemExit, match=message):
            memory.main(arguments)
