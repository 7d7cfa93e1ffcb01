"""The shell scripts, run in a copy of their folder with a Python that only pretends."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BASH = shutil.which("bash")
LAUNCH = Path(__file__).parents[2] / "launch"

# Knows its version, makes "environments" that are copies of itself, logs the rest.
PYTHON = """#!/bin/bash
PATH=/usr/bin:/bin
case "$1 $2" in
  "-c "*print*) echo {major}.{minor} ;;
  "-c "*exit*) (( {minor} >= 11 )) ;;
  "-m venv") [[ "$3" == --clear ]] && rm -rf "$4"; mkdir -p "$4/bin"
    cp "$0" "$4/bin/python" && echo "venv $4" >>"$LOG" ;;
  "-m pip")
    echo "pip $0 ${{@: -1}}${{PIP_NO_CACHE_DIR:+ without cache}}" >>"$LOG"
    exit "${{PIP_STATUS:-0}}" ;;
  *) echo "run $0 $*" >>"$LOG" ;;
esac
"""


@pytest.fixture
def copy(tmp_path):
    """A repository with the scripts, and three Pythons on a path of their own."""
    root = tmp_path / "a repository"
    shutil.copytree(LAUNCH, root / "launch", ignore=shutil.ignore_patterns("*.py*"))
    (root / "requirements.txt").write_text("jax\n")
    (root / "setup.py").write_text("# setup\n")
    (tmp_path / "bin").mkdir()
    for name, minor in (
        ("python3", 11),
        ("python3.10", 10),
        ("python3.12", 12),
    ):
        program = tmp_path / "bin" / name
        program.write_text(PYTHON.format(major=3, minor=minor))
        program.chmod(0o755)
    (tmp_path / "log").touch()
    return root


def run(root, script="quickstart.sh", *arguments, cwd="/", **variables):
    tmp = root.parent
    environment = {
        "PATH": str(tmp / "bin"),  # Python, and nothing else
        "CDPATH": str(tmp),
        "LOG": str(tmp / "log"),
        "HOME": str(tmp),
        **variables,
    }
    (tmp / "log").write_text("")
    done = subprocess.run(
        [BASH, os.path.relpath(root / "launch" / script, cwd), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    said = (tmp / "log").read_text().replace(str(root), "ROOT")
    return done, said.splitlines()


def test_makes_an_environment_and_starts_the_program(copy):
    done, log = run(copy, "quickstart.sh", "--scale=smoke", "--workdir=a b")
    assert done.returncode == 0, done.stderr
    assert log == [
        "venv .venv",
        "pip ROOT/.venv/bin/python .",
        "run ROOT/.venv/bin/python -m launch.quickstart --scale=smoke --workdir=a b",
    ]
    assert (copy / ".venv" / ".gitignore").read_text() == "*\n"


def test_a_home_that_cannot_be_written_is_no_cache(copy):
    _, log = run(copy, HOME="/proc/none")
    assert log[1] == "pip ROOT/.venv/bin/python . without cache"


@pytest.mark.parametrize("folder", [".", "launch", "..", "/"])
def test_runs_from_any_folder(copy, folder):
    done, log = run(copy, cwd=copy / folder)
    assert done.returncode == 0, done.stderr
    assert log[-1] == "run ROOT/.venv/bin/python -m launch.quickstart"


def test_a_second_start_installs_nothing(copy):
    run(copy)
    done, log = run(copy)
    assert done.returncode == 0 and done.stdout == ""
    assert log == ["run ROOT/.venv/bin/python -m launch.quickstart"]


@pytest.mark.parametrize("name", ["requirements.txt", "setup.py"])
def test_changed_requirements_are_installed(copy, name):
    run(copy)
    (copy / name).write_text("other\n")
    assert run(copy)[1][0] == "pip ROOT/.venv/bin/python ."
    assert len(run(copy)[1]) == 1


def test_another_python_has_an_environment_of_its_own(copy):
    run(copy)
    _, log = run(copy, PYTHON="python3.12")
    assert log[:2] == ["venv .venv-3.12", "pip ROOT/.venv-3.12/bin/python ."]
    for variables, folder in (({}, ".venv"), ({"PYTHON": "python3.12"}, ".venv-3.12")):
        _, log = run(copy, **variables)
        assert log == [f"run ROOT/{folder}/bin/python -m launch.quickstart"]


def test_the_first_python_gets_the_plain_name(copy):
    _, log = run(copy, PYTHON="python3.12")
    assert log[0] == "venv .venv"


def test_an_environment_that_lost_its_python_is_made_again(copy):
    run(copy)
    (copy / ".venv" / "bin" / "python").write_text("#!/does/not/exist\n")
    _, log = run(copy)
    assert log[:2] == ["venv .venv", "pip ROOT/.venv/bin/python ."]


def test_a_failed_installation_is_tried_again(copy):
    done, log = run(copy, PIP_STATUS="1")
    assert done.returncode != 0
    assert log == ["venv .venv", "pip ROOT/.venv/bin/python ."]
    _, log = run(copy)
    assert log[0] == "pip ROOT/.venv/bin/python ." and log[1].startswith("run ")


def test_tests_install_their_extra_and_so_the_base(copy):
    done, log = run(copy, "test.sh", "tests/core", "-k", "clock")
    assert done.returncode == 0, done.stderr
    python = "ROOT/.venv/bin/python"
    assert log == [
        "venv .venv",
        f"pip {python} .[test]",
        f"run {python} -m ruff check .",
        f"run {python} -m ruff format --check .",
        f"run {python} -m pyright --pythonpath {python}",
        f"run {python} -m pytest -n 2 --dist loadfile --durations=25"
        " tests/core -k clock",
    ]
    assert run(copy)[1] == [f"run {python} -m launch.quickstart"]


def test_the_base_does_not_stand_for_the_extra(copy):
    run(copy)
    assert run(copy, "test.sh")[1][0] == "pip ROOT/.venv/bin/python .[test]"


@pytest.mark.parametrize(
    "python, message",
    [
        ("python3.10", "'python3.10' is Python 3.10, but 3.11 or newer is needed"),
        ("python9", "No Python at 'python9'"),
    ],
)
def test_a_python_that_will_not_do_is_refused(copy, python, message):
    done, log = run(copy, PYTHON=python)
    assert done.returncode != 0 and message in done.stderr
    assert log == [] and not (copy / ".venv").exists()


def test_scripts_are_strict():
    for script in LAUNCH.glob("*.sh"):
        text = script.read_text()
        assert "set -euo pipefail" in text or script.name == "environment.sh"
        subprocess.run([BASH, "-n", str(script)], check=True)
