"""The notebooks run as they are, cell by cell, and hold what one wrote alone."""

import ast
import json
import re
from pathlib import Path

import jax
import matplotlib
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
MOST = 32 * 1024  # bytes of a notebook
MACHINE = re.compile(r"/(?:home|root|Users|work|tmp)/|[A-Z]:\\\\")
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def shown(value) -> str | bytes:
    """What a notebook shows of a cell's last value."""
    for ask in ("_repr_png_", "_repr_html_"):
        if hasattr(value, ask):
            made = getattr(value, ask)()
            return made[0] if ask == "_repr_png_" else made
    return repr(value)


def run(path: Path) -> list[str | bytes]:
    """Executes the cells in one namespace, as a fresh kernel does; what they show."""
    space, said = {"__name__": "__main__"}, []
    for i, source in enumerate(cells(path, "code"), start=1):
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        where = f"{path.name}, cell {i}"
        exec(compile(tree, where, "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), space)
            if value is not None:
                said.append(shown(value))
    return said


def test_there_are_four():
    assert [path.stem for path in PATHS] == [
        "a_level_of_your_own",
        "memories_and_their_four_choices",
        "optimizers_as_memories",
        "restore_ablate_draw",
    ]


@each
@pytest.mark.slow
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """With JAX as its users have it, not as strict as it is in other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with (
        matplotlib.rc_context({"backend": "Agg"}),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        said = run(path)
    assert sum(isinstance(one, bytes) for one in said) >= 1  # a picture
    assert not any(one.startswith("<hope_jax") for one in said if isinstance(one, str))


@each
def test_a_notebook_holds_no_output_and_no_place(path):
    text = path.read_text(encoding="utf-8")
    made = json.loads(text)
    assert len(text.encode()) <= MOST
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    for cell in made["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert not re.search(r"(?m)^\s*[%!]", "".join(cell["source"]))  # no magics
    assert not MACHINE.search(text)
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
    assert set(made["metadata"]) == {"kernelspec", "language_info"}


@each
def test_a_notebook_says_what_it_does_and_checks_it(path):
    said, code = cells(path, "markdown"), cells(path, "code")
    assert said[0].startswith("# ") and len(said) >= 4
    assert sum("assert " in source for source in code) >= 3


def test_what_a_cell_shows_and_what_fails(tmp_path):
    def notebook(*sources):
        path = tmp_path / "some.ipynb"
        made = [{"cell_type": "code", "source": [source]} for source in sources]
        path.write_text(json.dumps({"cells": made}))
        return path

    assert run(notebook("x = 3", "x + 1", "print(x)")) == ["4"]
    with pytest.raises(AssertionError):
        run(notebook("x = 3", "assert x == 4"))
