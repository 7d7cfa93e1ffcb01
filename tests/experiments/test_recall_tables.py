"""MQAR and MAD: rows, what they share, smoke runs, tables and the picture."""

import itertools
import types

import pytest

from experiments import mqar, table4_mad
from hope_jax.core import config as config_lib
from hope_jax.evaluate import probe
from hope_jax.memory import named
from hope_jax.models import lm
from hope_jax.train.metrics import read_result


def rows(module, group=None, scale="full"):
    return module.rows(types.SimpleNamespace(group=group, scale=scale))


def test_points_of_mqar_are_zoology_s():
    made = rows(mqar, "all")
    found = {(r.probe.task.length, r.probe.task.pairs) for r in made.values()}
    assert found == {(64, 4), (128, 8), (256, 16), (512, 64)}
    for name, row in made.items():
        task = row.probe.task
        assert task.vocab == 8192 and task.ordered and not task.random_filler
        assert row.probe.batch * task.length == mqar.TOKENS
        assert name.startswith(f"{task.length}x{task.pairs}_")
    ends = [name.partition("_")[2] for name in made if name.startswith("64x4_")]
    assert {*named.memories(), "hope", "hope_matrix", "attention"} <= set(ends)
    parts = [rows(mqar, group) for group in ("main", "longer", "named")]
    assert sum(map(len, parts)) == len(made) == len({k for p in parts for k in p})


@pytest.mark.parametrize("module", [mqar, table4_mad])
def test_all_rows_have_one_budget(module):
    """Of MAD all of one task; at the points of MQAR, as many tokens a step."""
    budgets: dict[object, set] = {}
    for row in rows(module, "all").values():
        p, mad = row.probe, module is table4_mad
        task, own = (p.task, p.batch) if mad else (None, p.batch * p.task.length)
        of = budgets.setdefault(task, set())
        of.add((p.steps, own, p.d_model, p.layers, p.optimizer, row.rates))
        saved = config_lib.to_json(row)
        assert config_lib.from_json(type(row), saved) == row
    assert len(budgets) == (len(table4_mad.TASKS) if module is table4_mad else 1)
    assert all(len(of) == 1 for of in budgets.values())


def test_models_of_mad_are_as_large_as_hope():
    """Of one task: the others differ in tables of tokens, which all have alike."""
    made = rows(table4_mad)
    assert len(made) == len(table4_mad.TASKS) * len(table4_mad.MODELS)
    hope = made["recall_hope"].probe
    target = lm.count_parameters(probe.model_for(hope, table4_mad.MODELS["hope"]))
    for name in table4_mad.MODELS:
        model = table4_mad.model(made[f"recall_{name}"])
        assert abs(lm.count_parameters(model) - target) <= 0.02 * target, name
        assert not model.fast and model.layers == 2  # four layers, in mad-lab's count


def test_a_smoke_run_of_mqar(tmp_path, capsys):
    chosen = "64x4_linear_attention,128x8_linear_attention"
    flags = ["--scale=smoke", "--seeds=1", f"--rows={chosen}", f"--out={tmp_path}"]
    made = mqar.main(flags)
    for row in chosen.split(","):
        result = read_result(tmp_path / "mqar" / f"{row}-s1.json")["metrics"]
        assert 0.0 <= result["accuracy"] <= 1.0 and result["rows"] == 4.0
        assert f"{result['state_bytes']:,.0f}" in made
    assert made.splitlines()[0].count("state, bytes") == 2
    assert (tmp_path / "mqar" / "mqar.png").stat().st_size > 1000
    capsys.readouterr()
    assert mqar.main(flags) == made  # nothing is trained again
    assert "seed 1" not in capsys.readouterr().out


def test_a_smoke_run_of_mad(tmp_path):
    """Of the task that has another head, and one that training asks otherwise."""
    chosen = "compression_attention,recall_attention"
    flags = ["--scale=smoke", "--seeds=0", f"--rows={chosen}", f"--out={tmp_path}"]
    made = table4_mad.main(flags).splitlines()
    assert len(made) == 2 + len(table4_mad.MODELS)
    attention = next(line for line in made if line.startswith("| attention |"))
    for row, paper in zip(chosen.split(","), ("49.4", "100"), strict=True):
        result = read_result(tmp_path / "table4_mad" / f"{row}-s0.json")["metrics"]
        assert f"| {100 * result['accuracy']:.1f} [{paper}] |" in attention


def test_a_table_has_a_line_a_model():
    def result(row, seed, accuracy):
        metrics = {"accuracy": accuracy, "state_bytes": 1000.0, "rows": 64.0}
        return {"row": row, "seed": seed, "metrics": metrics}

    found = [result("copying_hope", 0, 0.9), result("copying_hope", 1, 0.8)]
    made = table4_mad.table(found).splitlines()
    ours, theirs = "[51.2] | [100] |  | [52.1] | 85.0 ± 5.0 (90.0) [99.7] |", "[85.2] |"
    assert made[2] == f"| hope | {ours} {theirs}"
    found = [result("64x4_a", 0, 0.5), result("64x4_b", 0, 1.0), result("9x2_b", 0, 0)]
    made = mqar.table([*found, result("9x2_b", 1, 1)]).splitlines()
    assert made[2:] == [
        "| a |  |  |  | 1,000 | 0.500 | 64 |",
        "| b | 1,000 | 0.500 ± 0.500 (1.000) | 64 | 1,000 | 1.000 | 64 |",
    ]


def test_the_picture_tells_who_has_more_for_less():
    """The best of all with no more state are drawn apart: an orange dot. Names of dots
    that lie on each other stand above each other."""

    def result(name, size, right, rows=64.0):
        metrics = {"state_bytes": size, "accuracy": right, "rows": rows}
        return {"row": f"64x4_{name}", "metrics": metrics}

    found = [result("a", 10, 0.5), result("b", 20, 0.4), result("c", 30, 0.9)]
    above, below = mqar.draw(found).axes
    for axes in (above, below):
        dots = [tuple(dot.get_facecolor()[0]) for dot in axes.collections]
        assert dots[0] == dots[2] != dots[1]
        assert [text.get_text() for text in axes.texts] == ["a", "b", "c"]
    alike = [result(name, 10, 0.5, 64 + 6 * i) for i, name in enumerate("defg")]
    above, below = mqar.draw([*alike, result("h", 10, 0.9, 256)]).axes
    assert [text.get_text() for text in above.texts] == ["4 memories", "h"]
    assert [text.get_text() for text in below.texts] == [*"defgh"]
    shifts = [text.xyann[1] for text in below.texts]
    assert shifts[0] == shifts[-1] and shifts[:4] == sorted(set(shifts[:4]))


def test_mad_reads_as_many_rows_as_its_authors():
    made = rows(table4_mad)
    examples = {name: row.probe.examples for name, row in made.items()}
    assert examples.pop("memorisation_hope") == 256
    assert examples["copying_hope"] == examples["compression_titans"] == 12_800


def test_tasks_of_mad_are_those_of_the_paper_and_one_more():
    numbers = list(itertools.chain(*table4_mad.PAPER.values()))
    assert all(len(row) == len(table4_mad.TASKS) for row in table4_mad.PAPER.values())
    assert sum(number is None for number in numbers) == len(table4_mad.PAPER)
    assert set(table4_mad.PAPER) <= set(table4_mad.MODELS)
