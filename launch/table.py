"""The tables of the pages: equation -> function -> test, named memories, evidence.

Print one:              python -m launch.table [--table=memories]
Put it on its page:     python -m launch.table --write tests/README.md
                        python -m launch.table --write hope_jax/memory/README.md
                        python -m launch.table --write README.md
                        python -m launch.table --write experiments/README.md

An equation's test is named `test_equation_<number>_<what>` in tests/equations and has
in its docstring a line `Implements: module.function`. The tests are parsed, not run.
The memories are those of `hope_jax.memory.named`, their speeds those of the result
files of experiments/benchmarks. Evidence is what modules of experiments/ say of their
result files in a function `evidence`; what has none yet has no line. Tables by the name
of an experiment are what its command prints of all its result files.
"""

import ast
import functools
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch import command

_ROOT = Path(__file__).resolve().parent.parent
_TESTS = _ROOT / "tests" / "equations"
_EXPERIMENTS = _ROOT / "experiments"
_BENCHMARKS = _EXPERIMENTS / "results" / "benchmarks"
_NAME = re.compile(r"test_equation_(\d+)(?:_\w+)?$")
_IMPLEMENTS = re.compile(r"^\s*Implements:\s*([\w.]+)\s*$", re.MULTILINE)


class Row(NamedTuple):
    """One equation: its number, what implements it, and the test that shows it."""

    equation: int
    function: str
    file: str
    test: str


def rows(folder: Path = _TESTS) -> list[Row]:
    """The equation tests under `folder`, by number.

    Raises:
      ValueError: for an equation test that does not say what implements it.
    """
    found = []
    for path in sorted(folder.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            name = _NAME.match(node.name)
            if name is None:
                continue
            line = _IMPLEMENTS.search(ast.get_docstring(node) or "")
            if line is None:
                raise ValueError(
                    f"{path.name}: the docstring of {node.name} needs a line "
                    "'Implements: module.function'."
                )
            file = path.relative_to(folder.parent).as_posix()
            found.append(Row(int(name[1]), line[1], file, node.name))
    return sorted(found)


def markdown(table: list[Row]) -> str:
    """The rows as a Markdown table with links from `tests/`."""
    lines = ["| Equation | Function | Test |", "|---:|---|---|"]
    lines += [
        f"| {row.equation} | `{row.function}` | [`{row.test}`]({row.file}) |"
        for row in table
    ]
    return "\n".join(lines)


def memories(benchmarks: Path = _BENCHMARKS) -> str:
    """The named memories: four choices, chunk, speed over their definition, source.

    The speed is of the chunk form over `impl="reference"`, forward and training, where
    a result file has it.
    """
    from hope_jax.memory import named

    ratios = _ratios(benchmarks)
    lines = [
        "| Memory | Name | Architecture | Bias | Retention | Rule | Chunk "
        "| Speed | Source |",
        "|---|---|---|---|---|---|---|---:|---|",
    ]
    for name, make in named.POINTS.items():
        point = make()
        four = ("", "", "", "")
        chunk = point.chunk
        if point.memory is not None:
            four = named.choices(point.memory)
            chunk = f"{chunk}, {point.memory.chunk}"
        speeds = [
            f"{ratios[key]:.1f}"
            for task in ("forward", "training")
            if (key := (name, task)) in ratios
        ]
        cells = [point.title, f"`{name}`", *four, chunk, " / ".join(speeds)]
        link = point.source.replace("arXiv:", "https://arxiv.org/abs/")
        cells.append(f"[{point.source.removeprefix('arXiv:')}]({link})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratios(benchmarks: Path) -> dict[tuple[str, str], float]:
    """Chunk form over reference, by memory and task."""
    workload = re.compile(
        r"point (\w+), (\w+), T \d+: ours \(chunk\) against ours \(reference\)"
    )
    found = {}
    for path in sorted(benchmarks.glob("memories*.json")):
        for entry in json.loads(path.read_text(encoding="utf-8"))["workloads"]:
            match = workload.fullmatch(entry["workload"])
            if match and entry["metric"] == "tokens per second of one core":
                found[match.groups()] = entry["ratio"]
    return found


def evidence(
    results: Path = _EXPERIMENTS / "results", names: Sequence[str] | None = None
) -> str:
    """What was measured beside the paper's numbers, from the result files there are.

    Args:
      results: their folder; results of a smaller scale say nothing here.
      names: of modules in experiments/, by default all that define `evidence(found)`.
    """
    lines = [
        "| table | file | command | result | the paper's | distance |",
        "|---|---|---|---|---|---|",
    ]
    for name in experiments() if names is None else names:
        found = _full(results, name)
        if not found:
            continue
        module = importlib.import_module(f"experiments.{name}")
        for line in module.evidence(found):
            file = f"[{name}.py](experiments/{name}.py)"
            command = f"`{line.command or name}`"
            cells = [line.what, file, command, *line[1:4]]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _full(folder: Path, name: str) -> list[dict[str, Any]]:
    from hope_jax.train import metrics

    found = metrics.read_results(folder, name)
    return [result for result in found if result["scale"] == "full"]


def experiments() -> list[str]:
    """Modules of experiments/ that say what is evidence; they are parsed, not run."""
    said = "\ndef evidence("
    found = _EXPERIMENTS.glob("*.py")
    return sorted(p.stem for p in found if said in p.read_text(encoding="utf-8"))


def measured(name: str, folder: Path = _EXPERIMENTS / "results") -> str:
    """All results of an experiment at full scale, as its command prints them."""
    return importlib.import_module(f"experiments.{name}").table(_full(folder, name))


EXPERIMENTS = (  # in the order of their page
    "table5_formal_languages",
    "table4_mad",
    "state_tracking",
    "mqar",
    "small_lm",
    "in_context_continual",
    "memory",
    "cost_scaling",
    "twins",
)
TABLES = {
    "equations": lambda: markdown(rows()),
    "memories": memories,
    "evidence": evidence,
    **{name: functools.partial(measured, name) for name in EXPERIMENTS},
}
PAGES = {
    "equations": "tests/README.md",
    "memories": "hope_jax/memory/README.md",
    "evidence": "README.md",
    **dict.fromkeys(EXPERIMENTS, "experiments/README.md"),
}


def written(text: str) -> str:
    """`text` with each table between its two markers, `<!-- name -->` and
    `<!-- /name -->`, made anew.

    Raises:
      ValueError: unless it has the markers of a table, each of them once, in order.
    """
    present = [n for n in TABLES if f"<!-- {n} -->" in text or f"<!-- /{n} -->" in text]
    if not present:
        raise ValueError(f"has no markers '<!-- name -->' of {', '.join(TABLES)}.")
    for name in present:
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"needs one line '{start}' and one line '{end}'.")
        before, rest = text.split(start)
        if end not in rest:
            raise ValueError(f"'{start}' must come before '{end}'.")
        after = rest.split(end)[1]
        text = f"{before}{start}\n{TABLES[name]()}\n{end}{after}"
    return text


def _define(define) -> None:
    define.enum("table", "equations", list(TABLES), "which one is printed")
    define.string(
        "write",
        None,
        "replace the tables that this file has between '<!-- name -->' markers",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table, or writes those of a file."""
    given = command.parse(__doc__, _define, arguments, compiles=False)
    file = None if given.write is None else Path(given.write)
    try:
        if not _TESTS.is_dir():  # installed
            raise ValueError(
                "the tables are of a copy of the repository; run it there."
            )
        if file is None:
            print(TABLES[given.table]())
        else:
            text = file.read_text(encoding="utf-8")
            file.write_text(written(text), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"launch.table: {file or _ROOT}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    command.run(main)
