"""What the README and the pages of the rooms say is so: examples, paths, names."""

import argparse
import doctest
import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import quickstart
from hope_jax import optim
from hope_jax.core import config as config_lib
from hope_jax.models import mixers, zoo
from launch import table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")

PAGES = {str(p.relative_to(ROOT)): p for p in ROOT.glob("hope_jax/*/README.md")}
PAGES["README.md"] = README


def spans(text):
    """What stands between back-ticks, but not in blocks."""
    plain = re.sub(r"(?s)```.*?```", "", text)
    return set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", plain))


SPANS = spans(TEXT)
COMMANDS = re.findall(
    r"python -m (launch\.\w+) ?(.*)", re.sub(r"\\\n\s*", "", TEXT).replace("`", "\n")
)
PROGRAMS = sorted({program for program, _ in COMMANDS})
MADE = ("runs/", ".venv")  # by the commands, so not there before


def paths(text):
    """Spans that name a file or a folder of the repository, and targets of links."""
    said = spans(text)
    found = {s for s in said if re.fullmatch(r"[\w.-]+(/[\w.-]*)+|\w+\.(md|txt)", s)}
    found |= {s for s in said if s == "LICENSE"}
    links = {s for s in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in s}
    return sorted(s for s in found | links if not s.startswith(MADE))


def names():
    """Spans of any page that begin with a dotted name of the package."""
    said = set().union(*(spans(p.read_text(encoding="utf-8")) for p in PAGES.values()))
    found = (re.match(r"hope_jax(\.\w+)+", span) for span in said)
    return sorted({match[0] for match in found if match})


@functools.cache
def help_of(program):
    """What `--help` says; a bool of absl, `--[no]name`, is also `--name`."""
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "usage:" in done.stdout.lower() or "flags:" in done.stdout, done.stderr
    return done.stdout.replace("--[no]", "--")


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page):
    """With JAX as its users have it, not as strict as it is in other tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = doctest.testfile(str(PAGES[page]), module_relative=False)
    least = 20 if page == "README.md" else 0
    assert result.attempted > least and result.failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    found = paths(PAGES[page].read_text(encoding="utf-8"))
    assert len(found) > 30 or page != "README.md"
    assert [path for path in found if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", names())
def test_names_exist(name):
    module, parts = "hope_jax", name.split(".")[1:]
    found = importlib.import_module(module)
    for part in parts:
        module += f".{part}"
        if not hasattr(found, part):
            importlib.import_module(module)
        found = getattr(found, part)


@pytest.mark.parametrize("program", PROGRAMS)
def test_commands_take_the_flags_they_are_shown_with(program):
    known = set(re.findall(r"--\w+", help_of(program)))
    for arguments in (rest for name, rest in COMMANDS if name == program):
        flags = [a for a in shlex.split(arguments) if a.startswith("--")]
        assert {flag.partition("=")[0] for flag in flags} <= known


def test_flags_named_in_the_text_are_those_of_some_program():
    known = set(re.findall(r"--\w+", " ".join(map(help_of, PROGRAMS))))
    named = {m for span in SPANS for m in re.findall(r"^--\w+", span)}
    assert len(named) > 8 and named <= known


def test_commands_start_from_what_there_is():
    """Rows, scales and settings of the commands, held to the config they set."""
    parser = argparse.ArgumentParser()
    for flag in ("--row", "--workdir", "--experiment"):
        parser.add_argument(flag)
    parser.add_argument("--describe", action="store_true")
    parser.add_argument("--scale", default="full")
    parser.add_argument("--set", action="append", default=[])
    shown = [rest for name, rest in COMMANDS if name == "launch.train"]
    assert shown
    for arguments in shown:
        options = parser.parse_args(shlex.split(arguments))
        assert options.experiment == "quickstart"
        config = quickstart.rows(options.scale)[options.row]
        assert not options.set or config_lib.override(config, options.set) != config


def test_settings_named_are_those_of_the_config():
    settings = re.findall(r"--set ([\w.]+=[\w.-]+)", TEXT)
    assert len(settings) >= 4
    config = quickstart.rows("full")["hope"]
    for setting in settings:
        assert config_lib.override(config, [setting]) != config


def test_optimizers_and_sizes_are_all_named():
    assert SPANS >= set(optim.RULES)
    sizes = {name.rpartition("_")[2] for name in zoo.names()}
    assert SPANS >= sizes
    families = {name.rpartition("_")[0] for name in zoo.names()}
    by_mixer = families & set(mixers.names())
    assert by_mixer <= SPANS
    assert {f"{name}_" for name in families - by_mixer} <= SPANS


def test_scales_named_exist():
    named = re.findall(r"--scale=(\w+)", TEXT)
    assert named and set(named) <= set(quickstart.TRAIN)


@pytest.mark.parametrize("name", table.TABLES)
def test_tables_are_those_of_the_code(name):
    """Of the tests, of the registry of memories, and of the committed benchmarks."""
    block = re.search(rf"<!-- {name} -->\n(.*)\n<!-- /{name} -->", TEXT, re.DOTALL)
    assert block, f"README.md needs two markers around the table of {name}."
    assert block[1] == table.TABLES[name](), (
        "The table is old: python -m launch.table --write README.md"
    )


def test_quickstart_has_its_markers():
    assert TEXT.count("<!-- quickstart -->") == TEXT.count("<!-- /quickstart -->") == 1


def test_supported_versions_are_those_of_the_package():
    assert "Python 3.11 to 3.13" in TEXT
    assert 'python_requires=">=3.11"' in (ROOT / "setup.py").read_text()
