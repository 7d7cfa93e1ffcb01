"""The recipes of CONTRIBUTING.md work: each is applied to a copy of the repository, and
the suite of its kind finds what was added."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = {
    part.partition("\n")[0]: part
    for part in TEXT.split("\n## ")[1:]
    if re.search(r"```(python|diff) \S", part)
}
MOST_LINES = 100


def apply(recipe: str, root: Path) -> None:
    """Writes the files of a recipe, and puts the lines marked + where it says: each
    below the line above it, which the file has once."""
    for kind, file, body in re.findall(
        r"(?ms)^```(python|diff) (\S+)\n(.*?)^```$", recipe
    ):
        path = root / file
        if kind == "python":
            assert not path.exists() and body.count("\n") <= MOST_LINES
            path.write_text(body, encoding="utf-8")
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        place = None
        for line in body.splitlines():
            if line.startswith(" "):
                assert lines.count(line[1:]) == 1, line
                place = lines.index(line[1:])
            else:
                assert line.startswith("+") and place is not None, line
                place += 1
                lines.insert(place, line[1:])
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def copied(tmp_path):
    for name in ("hope_jax", "experiments", "launch", "tests"):
        junk = shutil.ignore_patterns("__pycache__", "results", "*.png")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=junk)
    (tmp_path / "experiments/results").mkdir()
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_works_as_it_is_written(name, copied):
    apply(RECIPES[name], copied)
    commands = re.findall(r"(?m)^    python (-m .*)$", RECIPES[name])
    assert commands
    for command in commands:
        done = subprocess.run(
            [sys.executable, *shlex.split(command)],
            cwd=copied,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        if "pytest" in command:
            assert len(re.findall(r"(?m)^[.]+", done.stdout)) > 0


def test_style_of_the_recipes(copied):
    for recipe in RECIPES.values():
        apply(recipe, copied)
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "hope_jax", "experiments"],
            cwd=copied,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_there_are_five():
    assert list(RECIPES) == ["A memory", "A mixer", "An optimizer", "An experiment"]
    assert "## A rule for memories" in TEXT  # which needs no file: its page is run
