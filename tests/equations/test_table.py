"""The table equation -> function -> test tells the truth."""

import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from hope_jax.memory import named
from hope_jax.train import metrics
from launch import table

ROOT = Path(__file__).parents[2]


def test_every_function_named_exists():
    for row in table.rows():
        module, _, name = row.function.rpartition(".")
        assert row.function.startswith("hope_jax."), row
        assert callable(getattr(importlib.import_module(module), name)), row
        assert not name.startswith("_"), row


def test_every_test_uses_what_it_names():
    """The function's name occurs in the file, so the table does not point elsewhere."""
    for row in table.rows():
        text = (ROOT / "tests" / row.file).read_text(encoding="utf-8")
        assert f"def {row.test}(" in text
        name = row.function.rpartition(".")[2]
        code = [line for line in text.splitlines() if "Implements:" not in line]
        assert re.search(rf"\b{name}\b", "\n".join(code)), row


def test_the_equations_of_the_framework_are_all_there():
    listed = {row.equation for row in table.rows()}
    assert listed >= {5, *range(8, 19), *range(24, 29), *range(54, 59), 62}


def test_equations_come_in_order_and_once():
    rows = table.rows()
    assert [row.equation for row in rows] == sorted(row.equation for row in rows)
    assert len({row.test for row in rows}) == len(rows)


def write(folder, docstring):
    tests = folder / "tests" / "equations"
    tests.mkdir(parents=True)
    code = f'def test_equation_7_x():\n    """{docstring}"""\n'
    code += 'def test_equation_2():\n    """Implements: a.b"""\n'
    (tests / "test_some.py").write_text(code + "def test_other():\n    pass\n")
    return tests


def test_a_table_by_hand(tmp_path):
    tests = write(tmp_path, "y = x\n\n    Implements: a.b.c\n    ")
    assert table.markdown(table.rows(tests)) == (
        "| Equation | Function | Test |\n|---:|---|---|\n"
        "| 2 | `a.b` | [`test_equation_2`](equations/test_some.py) |\n"
        "| 7 | `a.b.c` | [`test_equation_7_x`](equations/test_some.py) |"
    )


def test_a_test_that_does_not_say_what_it_shows_is_named(tmp_path):
    with pytest.raises(ValueError, match="test_equation_7_x needs a line 'Implements"):
        table.rows(write(tmp_path, "y = x"))


def test_write_replaces_what_is_between_the_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- equations -->\nold\n<!-- /equations -->\nz\n")
    assert table.main(["--write", str(readme)]) == 0
    expected = table.markdown(table.rows())
    assert readme.read_text() == (
        f"a\n<!-- equations -->\n{expected}\n<!-- /equations -->\nz\n"
    )
    once = readme.read_text()
    assert table.main(["--write", str(readme)]) == 0 and readme.read_text() == once
    for bad in ("no markers", "<!-- /equations --> <!-- equations -->"):
        readme.write_text(bad)
        assert table.main(["--write", str(readme)]) == 1
        assert readme.read_text() == bad
    assert table.main(["--write", str(tmp_path / "none.md")]) == 1
    assert "none.md" in capsys.readouterr().err


def test_memories_are_the_registry_with_measured_speeds(tmp_path):
    workload = "point titans, {}, T 512: ours (chunk) against ours (reference)"
    metric = "tokens per second of one core"
    entries = [
        {"workload": workload.format("forward"), "metric": metric, "ratio": 3.14},
        {"workload": workload.format("training"), "metric": metric, "ratio": 20.0},
        {"workload": workload.format("training"), "metric": "other", "ratio": 9.0},
    ]
    file = tmp_path / "memories-1-x-cpu.json"
    file.write_text(json.dumps({"workloads": entries}))
    lines = table.memories(tmp_path).splitlines()
    assert len(lines) == 2 + len(named.POINTS)
    (titans,) = (line for line in lines if "`titans`" in line)
    assert titans == (
        "| Titans (LMM) | `titans` | MLP | l2 | decay | momentum | anchored, 64 "
        "| 3.1 / 20.0 | [2501.00663](https://arxiv.org/abs/2501.00663) |"
    )
    (attention,) = (line for line in lines if "`softmax_attention`" in line)
    assert "| non-parametric |  |" in attention


def test_evidence_is_what_experiments_say_of_the_results_there_are(tmp_path):
    def write(row, nats, scale="full"):
        metrics.write_result(
            tmp_path,
            experiment="quickstart",
            row=row,
            scale=scale,
            seed=0,
            config={},
            metrics={"nats_per_token_reset": nats},
        )

    write("hope", 2.0)
    assert len(table.evidence(tmp_path).splitlines()) == 2  # its twin has no result
    write("transformer", 2.0, "smoke")
    assert len(table.evidence(tmp_path).splitlines()) == 2  # of the full scale
    write("transformer", 2.0)
    head, _, line = table.evidence(tmp_path).splitlines()
    assert head == "| table | file | command | result | the paper's | distance |"
    assert line.endswith(
        "| [quickstart.py](experiments/quickstart.py) | `bash launch/quickstart.sh` "
        "| 1.00 | 0.77 (760M, 30B) | +0.23 |"
    )


def test_experiments_with_evidence_are_found_and_their_commands_are_theirs():
    names = table.experiments()
    assert {"quickstart", "small_lm", "fig4_toy", "table5_formal_languages"} <= {*names}
    for line in table.evidence().splitlines()[2:]:
        _, what, file, command, result, *_ = map(str.strip, line.split("|"))
        name = re.fullmatch(r"\[(\w+)\.py\]\(experiments/\1\.py\)", file)[1]
        assert what and result and name in names
        words = command.strip("`").split()
        assert words[:2] == ["bash", "launch/quickstart.sh"] or words[0] == name
        if words[0] == name:
            flags = {word[2:].partition("=")[0] for word in words[1:]}
            assert flags <= flags_of(importlib.import_module(f"experiments.{name}"))


def flags_of(module) -> set[str]:
    known = {"rows"}
    note = lambda flag, *_, **__: known.add(flag)  # noqa: E731
    module.main._define(types.SimpleNamespace(list=note, string=note, enum=note))
    return known


def test_the_command_needs_no_jax():
    code = "import sys, launch.table as t; t.main([]); sys.exit('jax' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "| 62 | `hope_jax.core.transfer.regress` |" in run.stdout
