"""What a notebook shows of a level, a system, a config or a state: a small table.

A notebook asks a value for `_repr_html_`; those here make one of its parts. All text is
escaped, and no array is read.
"""

import dataclasses
import html
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import jax

MOST = 60  # lines of a state

_CELL = "text-align:left;padding:1px 10px;vertical-align:top"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of text as an HTML table.

    >>> table("a < b", ["name"], [["x"]]).count("&lt;")
    1
    """
    return _table(title, columns, [[html.escape(cell) for cell in row] for row in rows])


def config(value: Any) -> str:
    """The fields of a dataclass; those that are not at their default are bold, and
    configs inside it are folded away."""
    rows = []
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        cell = _folded(held)
        if held != _default(field):
            cell = f"<b>{cell}</b>"
        rows.append([html.escape(field.name), cell])
    return _table(type(value).__name__, ["field", "value"], rows)


def state(tree: Any) -> str:
    """Where the leaves of a pytree are, and what they are, but not what is in them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    rows, count = [], 0
    for path, leaf in leaves:
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        kind = type(leaf).__name__ if dtype is None else f"{dtype}{list(shape or ())}"
        count += getattr(leaf, "size", 1)
        rows.append([jax.tree_util.keystr(path), kind])
    if len(rows) > MOST:
        rows = [*rows[:MOST], [f"and {len(rows) - MOST} more", ""]]
    title = f"{type(tree).__name__}: {len(leaves)} arrays, {count:,} numbers"
    return table(title, ["where", "what"], rows)


def named(function: Any) -> str:
    """What a function is called; "" of one that has no name of its own.

    >>> import functools, operator
    >>> named(functools.partial(operator.add, 1)), named(lambda x: x)
    ('add', '')
    """
    inside = getattr(function, "func", function)  # of a partial
    name = getattr(inside, "__name__", type(inside).__name__)
    return "" if name == "<lambda>" else name.strip("_")


def rule(flow: Any) -> str:
    """What an optax transformation is called: by the function that made it; of a chain
    those of its parts.

    >>> import optax
    >>> rule(optax.sgd(0.1)), rule(optax.adam(0.1))
    ('scale', 'scale_by_adam, scale')
    """
    update = getattr(flow, "update", flow)
    made = getattr(update, "__qualname__", type(update).__name__).split(".")[0]
    names = getattr(getattr(update, "__code__", None), "co_freevars", ())
    cells = getattr(update, "__closure__", None) or ()
    inside: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=True):
        inside[name] = cell.cell_contents
    if made == "with_extra_args_support":
        return rule(inside["tx"])
    if made == "chain":
        parts = (rule(part) for part in inside.get("update_fns", ()))
        return ", ".join(part for part in parts if part != "identity") or "identity"
    return "" if made == "<lambda>" else made


def _folded(held):
    """A config inside another, or several, behind a line that opens them."""
    several = held if isinstance(held, tuple) else (held,)
    if not held or not all(map(_is_config, several)):
        return html.escape(repr(held))
    named = ", ".join(str(getattr(one, "kind", type(one).__name__)) for one in several)
    inside = "".join(config(one) for one in several)
    return f"<details><summary>{html.escape(named)}</summary>{inside}</details>"


def _is_config(value):
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _default(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _table(title, columns, rows):
    """Of cells that are HTML already."""

    def line(tag, cells):
        made = "".join(f'<{tag} style="{_CELL}">{cell}</{tag}>' for cell in cells)
        return f"<tr>{made}</tr>"

    head = line("th", map(html.escape, columns))
    body = "".join(line("td", row) for row in rows)
    caption = f'<caption style="text-align:left">{html.escape(title)}</caption>'
    return f"<table>{caption}{head}{body}</table>"


def printable(text: str, keep: str = "") -> str:
    r"""`text` with what steers a terminal, or is no text, as backslash escapes.

    Args:
      text: may hold what `os.fsdecode` makes of bytes that are no UTF-8.
      keep: characters that stay.

    >>> print(printable("a\x1b[31mb\udcff"))
    a\x1b[31mb\udcff
    """
    return "".join(
        c
        if c in keep or unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp")
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
