"""The design, held by reading the code: who imports whom, and what nobody calls."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Data flows down this list; a room imports only from itself and from those above it.
ROOMS = (
    "core",
    "memory",
    "kernels",
    "optim",
    "models",
    "data",
    "train",
    "stream",
    "evaluate",
)
WITHOUT_FLAX = ("core", "memory", "kernels", "optim")
# Each loads code from data, and a checkpoint or a text must never be code.
CODE_FROM_DATA = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal"}
CODE_FROM_DATA |= {"shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}
SHELL = {"os.system", "os.popen"}
ARGUMENTS = {"allow_pickle": "unpickles arrays", "shell": "is a shell's command line"}


def sources(root: Path) -> list[Path]:
    folders = ("hope_jax", "launch", "experiments")
    return sorted(p for folder in folders for p in (root / folder).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, those inside functions too.

    `from a import b` counts as `a.b`, for `b` may be a module.
    """
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(root).parts[: -node.level]
                base = ".".join([*package, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def room_of(name: str) -> str | None:
    """The room of a dotted name; "" for the package's own root; None outside of it."""
    package, _, rest = name.partition(".")
    if package != "hope_jax":
        return None
    first = rest.partition(".")[0]
    return first if first in ROOMS else ""


def wrong_imports(root: Path) -> list[str]:
    """Every import that goes up the list, or out of the package."""
    found = []
    for place, room in enumerate(ROOMS):
        for path in sorted((root / "hope_jax" / room).rglob("*.py")):
            for line, name in imported(path, root):
                where = f"{path.relative_to(root)}:{line}: {room} imports {name}"
                other = room_of(name)
                if name.partition(".")[0] in ("launch", "experiments", "tests"):
                    found.append(where)
                elif other == "":  # the root imports the rooms, so none imports it
                    found.append(where)
                elif other is not None and ROOMS.index(other) > place:
                    found.append(where)
                elif room in WITHOUT_FLAX and name.partition(".")[0] == "flax":
                    found.append(where)
    return found


def dangers(root: Path) -> list[str]:
    """Every use of what runs data as code, or text as a shell's command line."""
    found = []
    for path in sources(root):
        for line, name in imported(path, root):
            if set(name.split(".")) & CODE_FROM_DATA or name in SHELL:
                found.append(f"{path.relative_to(root)}:{line}: {name}")
        for node in ast.walk(tree(path)):
            where = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called.removeprefix("builtins.") in CALLS:
                    found.append(f"{where}: {called}()")
                for keyword in node.keywords:
                    off = isinstance(keyword.value, ast.Constant)
                    off = off and not keyword.value.value
                    if keyword.arg in ARGUMENTS and not off:
                        found.append(f"{where}: {keyword.arg} {ARGUMENTS[keyword.arg]}")
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in SHELL:
                found.append(f"{where}: {ast.unparse(node)}")
    return found


def test_every_folder_is_a_room():
    folders = {p.parent.name for p in (ROOT / "hope_jax").glob("*/__init__.py")}
    assert folders == set(ROOMS)


def test_rooms_import_only_from_those_above():
    assert wrong_imports(ROOT) == []


def test_the_package_itself_loads_no_flax():
    code = "import sys, hope_jax; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_runs_data_as_code():
    assert len(sources(ROOT)) > 40
    assert dangers(ROOT) == []


@pytest.mark.parametrize(
    "file, line",
    [
        ("core/clock.py", "from hope_jax.memory import rule"),
        ("core/clock.py", "from flax import nnx"),
        ("core/clock.py", "from hope_jax import describe"),
        ("core/clock.py", "import hope_jax"),
        ("memory/rule.py", "from ..kernels import delta"),
        ("memory/rule.py", "from .. import plot"),
        ("kernels/delta.py", "import hope_jax.optim.rules.dgd as dgd"),
        ("optim/dgd.py", "def late():\n    import flax.nnx"),
        ("models/lm.py", "from hope_jax.data import text"),
        ("data/text.py", "from hope_jax import train"),
        ("train/loop.py", "from hope_jax.stream.reader import Reader"),
        ("stream/reader.py", "from hope_jax.evaluate import language_model"),
        ("evaluate/causality.py", "from launch import table"),
    ],
)
def test_an_import_up_the_list_is_found(tmp_path, file, line):
    path = tmp_path / "hope_jax" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(wrong_imports(tmp_path)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "def late():\n    import marshal",
        "eval('1')",
        "exec(text)",
        "builtins.eval('1')",
        "numpy.load(file, allow_pickle=True)",
        "numpy.load(file, allow_pickle=trusted)",
        "subprocess.run(command, shell=True)",
        "os.system('ls')",
        "run = os.system",
        "from os import system",
    ],
)
@pytest.mark.parametrize("folder", ["hope_jax/train", "launch", "experiments"])
def test_data_run_as_code_is_found(tmp_path, folder, line):
    path = tmp_path / folder / "some.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(dangers(tmp_path)) == 1


def test_what_is_allowed_is_not_found(tmp_path):
    path = tmp_path / "hope_jax" / "stream" / "some.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import re, flax\n"
        "from hope_jax.core import config\n"
        "from . import reader\n"
        "re.compile('a')\n"
        "numpy.load(file, allow_pickle=False)\n"
        "jax.eval_shape(f)\n"
    )
    assert wrong_imports(tmp_path) == [] and dangers(tmp_path) == []
