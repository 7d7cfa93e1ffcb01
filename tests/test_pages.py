"""What the pages say is so: their examples, paths, names, commands and tables."""

import argparse
import doctest
import functools
import importlib
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from experiments import quickstart
from hope_jax import optim
from hope_jax.core import config as config_lib
from hope_jax.models import zoo
from hope_jax.models.mixers import MIXERS
from launch import table

ROOT = Path(__file__).parents[1]
MADE = ("runs/", ".venv")  # by the commands, so not there before
MOST = 8 * 1024  # bytes of the first page


class Page(NamedTuple):
    """A page and what is written on it.

    Attributes:
      path: from the root.
      text: all of it.
      spans: what stands between single backticks.
      commands: pairs of a program and its arguments.
    """

    path: str
    text: str
    spans: frozenset[str]
    commands: tuple[tuple[str, str], ...]


def page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    plain = re.sub(r"(?s)```.*?```", "", text)
    spans = frozenset(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", plain))
    joined = re.sub(r"\\\n\s*", "", text).replace("`", "\n")
    commands = re.findall(r"python -m ((?:launch|experiments)\.\w+) ?(.*)", joined)
    return Page(path.relative_to(ROOT).as_posix(), text, spans, tuple(commands))


PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md"]
PATHS += sorted((ROOT / "hope_jax").glob("*/README.md"))
PAGES = {p.path: p for p in map(page, PATHS)}
README = PAGES["README.md"]
EXPERIMENTS = page(ROOT / "experiments/README.md")
# CONTRIBUTING.md speaks of what its recipes add; test_contributing.py runs them.
SETTLED = [page for path, page in PAGES.items() if path != "CONTRIBUTING.md"]
COMMANDS = [c for p in SETTLED for c in p.commands]
PROGRAMS = sorted({program for program, _ in COMMANDS})
each_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def paths(page: Page) -> list[Path]:
    """Spans that name a file or a folder of the repository, and targets of links."""
    spans = {s for s in page.spans if re.fullmatch(r"[\w.-]+(/[\w.-]*)+", s)}
    spans |= {s for s in page.spans if re.fullmatch(r"\w+\.(md|txt|cff)|LICENSE", s)}
    links = re.findall(r"\]\(([^)\s]+)\)", page.text)
    here = (ROOT / page.path).parent
    found = [here / link for link in sorted(links) if "://" not in link]
    for span in sorted(spans):
        if not span.startswith(MADE):
            found.append(here / span if (here / span).exists() else ROOT / span)
    return found


def names(page: Page) -> list[str]:
    """Spans that begin with a dotted name of the package."""
    found = (re.match(r"hope_jax(\.\w+)+", span) for span in page.spans)
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


def test_the_first_page_is_short():
    block = r"(?s)<!-- evidence -->.*<!-- /evidence -->"  # grows with result files
    assert len(re.sub(block, "", README.text).encode()) <= MOST


@each_page
def test_examples_run(page):
    """With JAX as its users have it, not as strict as it is in other tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = doctest.testfile(str(ROOT / page.path), module_relative=False)
    assert result.failed == 0
    assert result.attempted == len(re.findall(r"(?m)^>>> ", page.text))


@pytest.mark.parametrize("page", [*PAGES.values(), EXPERIMENTS], ids=lambda p: p.path)
def test_paths_exist(page):
    assert [str(path) for path in paths(page) if not path.exists()] == []


def test_there_are_examples_and_paths():
    counts = {path: len(paths(page)) for path, page in PAGES.items()}
    assert counts["README.md"] > 15 and counts["tests/README.md"] > 80
    assert sum("\n>>> " in page.text for page in PAGES.values()) >= 3


@pytest.mark.parametrize("name", sorted({n for p in PAGES.values() for n in names(p)}))
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
        own = itertools.takewhile(lambda a: a != "--", shlex.split(arguments))
        flags = [a for a in own if a.startswith("--")]  # after it is another command
        assert {flag.partition("=")[0] for flag in flags} <= known


def test_flags_named_in_the_text_are_those_of_some_program():
    known = set(re.findall(r"--\w+", " ".join(map(help_of, PROGRAMS))))
    spans = [span for page in SETTLED for span in page.spans]
    named = {m for span in spans for m in re.findall(r"^--\w+", span)}
    assert len(named) > 8 and named <= known


def test_commands_start_from_what_there_is():
    """Rows, scales and settings of the commands, held to the config they set."""
    parser = argparse.ArgumentParser()
    for flag in ("--row", "--workdir", "--experiment", "--init_from", "--data"):
        parser.add_argument(flag)
    for flag in ("--describe", "--resume"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--scale", default="full")
    parser.add_argument("--set", action="append", default=[])
    shown = [rest for name, rest in COMMANDS if name == "launch.train"]
    assert shown
    for arguments in shown:
        options = parser.parse_args(shlex.split(arguments))
        begun = options.resume or options.init_from  # by the command above it
        assert options.experiment == "quickstart" or begun
        config = quickstart.rows(options.scale)[options.row or "hope"]
        assert not options.set or config_lib.override(config, options.set) != config


def test_settings_named_are_those_of_the_config():
    """A line's settings together, on the quickstart's Hope or, where they say so
    (`launch.evaluate`), on its Transformer++."""
    rows = quickstart.rows("full")
    count = 0
    for page in SETTLED:
        for line in page.text.splitlines():
            settings = re.findall(r"--set ([\w.]+=[\w.,-]+)", line)
            count += len(settings)
            config = rows["transformer" if "launch.evaluate" in line else "hope"]
            assert not settings or config_lib.override(config, settings) != config
    assert count >= 8


def test_optimizers_and_sizes_are_all_named():
    assert PAGES["hope_jax/optim/README.md"].spans >= set(optim.RULES)
    spans = PAGES["hope_jax/models/README.md"].spans
    sizes = {name.rpartition("_")[2] for name in zoo.names()}
    assert spans >= sizes
    families = {name.rpartition("_")[0] for name in zoo.names()}
    by_mixer = families & set(MIXERS)
    assert by_mixer <= spans | PAGES["hope_jax/memory/README.md"].spans
    assert {f"{name}_" for name in families - by_mixer} <= spans


def test_scales_named_exist():
    named = re.findall(r"--scale=(\w+)", README.text)
    assert named and set(named) <= set(quickstart.TRAIN)


@pytest.mark.parametrize("name", table.TABLES)
def test_tables_are_those_of_the_code(name):
    """Of the tests, of the registry of memories, and of the committed benchmarks."""
    text = (ROOT / table.PAGES[name]).read_text(encoding="utf-8")
    block = re.search(rf"<!-- {name} -->\n(.*)\n<!-- /{name} -->", text, re.DOTALL)
    assert block, f"{table.PAGES[name]} needs two markers around the table of {name}."
    assert block[1] == table.TABLES[name](), (
        f"The table is old: python -m launch.table --write {table.PAGES[name]}"
    )


def test_quickstart_has_its_markers():
    for marker in ("<!-- quickstart -->", "<!-- /quickstart -->"):
        assert README.text.count(marker) == 1


def test_supported_versions_are_those_of_the_package():
    assert "Python 3.11 to 3.13" in README.text
    assert 'python_requires=">=3.11"' in (ROOT / "setup.py").read_text()
