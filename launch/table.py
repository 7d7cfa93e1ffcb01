"""Lists equation -> function -> test, from the tests in tests/equations.

Print it:              python -m launch.table
Put it in the README:  python -m launch.table --write README.md

A test is named `test_equation_<number>_<what>` and has in its docstring a line
`Implements: module.function`. The tests are parsed, not run; nothing else is imported.
"""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

_TESTS = Path(__file__).resolve().parent.parent / "tests" / "equations"
_NAME = re.compile(r"test_equation_(\d+)(?:_\w+)?$")
_IMPLEMENTS = re.compile(r"^\s*Implements:\s*([\w.]+)\s*$", re.MULTILINE)
_START, _END = "<!-- equations -->", "<!-- /equations -->"


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
            name = isinstance(node, ast.FunctionDef) and _NAME.match(node.name)
            if not name:
                continue
            line = _IMPLEMENTS.search(ast.get_docstring(node) or "")
            if line is None:
                raise ValueError(
                    f"{path.name}: the docstring of {node.name} needs a line "
                    "'Implements: module.function'."
                )
            file = path.relative_to(folder.parent.parent).as_posix()
            found.append(Row(int(name[1]), line[1], file, node.name))
    return sorted(found)


def markdown(table: list[Row]) -> str:
    """The rows as a Markdown table with links from the repository's root."""
    lines = ["| Equation | Function | Test |", "|---:|---|---|"]
    lines += [
        f"| {row.equation} | `{row.function}` | [`{row.test}`]({row.file}) |"
        for row in table
    ]
    return "\n".join(lines)


def written(text: str, table: str) -> str:
    """`text` with what stands between its two markers replaced by `table`.

    Raises:
      ValueError: unless each marker is there once, in order.
    """
    if text.count(_START) != 1 or text.count(_END) != 1:
        raise ValueError(f"needs one line '{_START}' and one line '{_END}'.")
    before, rest = text.split(_START)
    if _END not in rest:
        raise ValueError(f"'{_START}' must come before '{_END}'.")
    after = rest.split(_END)[1]
    return f"{before}{_START}\n{table}\n{_END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write",
        metavar="FILE",
        type=Path,
        help=f"replace what FILE has between '{_START}' and '{_END}'",
    )
    file = parser.parse_args(arguments).write
    try:
        table = markdown(rows())
        if file is None:
            print(table)
        else:
            text = file.read_text(encoding="utf-8")
            file.write_text(written(text, table), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"launch.table: {file or _TESTS}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
