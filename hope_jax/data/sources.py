"""Where text comes from: files of many kinds, and data sets by name, as documents.

A source is a path or a glob of text, JSON lines (`.jsonl`, also `.gz` and `.zst`) and
Parquet; `hf:NAME` of Hugging Face's `datasets`; or `tfds:NAME` of TensorFlow Datasets.
It is cut into units, which are read apart from each other: a file, a stretch of the
lines of a large one, a row group, some examples of a data set.
"""

import contextlib
import dataclasses
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hope_jax.data import text

JSON_LINES = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".zst")
_LINES = 32 << 20  # bytes of JSON lines that are a unit
_EXAMPLES = 10_000  # of a data set, that are a unit
_EXTRA = "pip install 'hope_jax[data]'"


@dataclasses.dataclass(frozen=True)
class Unit:
    """Some documents of a source.

    Attributes:
      kind: `text`, `lines`, `parquet`, `hf` or `tfds`.
      name: the file's, or the data set's.
      start: the first byte, row group or example.
      stop: after the last; -1 for the end.
      size: about how many bytes, or examples.
      changed: when the file was changed, in nanoseconds; 0 of a data set.
    """

    kind: str
    name: str
    start: int = 0
    stop: int = -1
    size: int = 0
    changed: int = 0


@dataclasses.dataclass(frozen=True)
class Reading:
    """How documents are found in units.

    Attributes:
      field: of JSON lines, of Parquet and of data sets, that holds the text.
      separator: what stands between the documents of a text file; None: it is one.
      undecodable: what to do with what is no UTF-8, or no JSON: `raise`, `skip` it,
        or `keep` the bytes of a text file.
      split: of a data set by name.
      config: of a data set by name: which of its parts.
      folder: where data sets by name are kept.
    """

    field: str = "text"
    separator: str | None = None
    undecodable: text.Undecodable = "raise"
    split: str = "train"
    config: str | None = None
    folder: str | None = None


class Unreadable(ValueError):
    """A document that is no text, or a record that holds none. Says where it is."""


def units(source: str, how: Reading) -> list[Unit]:
    """All units of a source, in a fixed order.

    Raises:
      FileNotFoundError: nothing there.
      Unreadable: no such data set, or a file that its library cannot read; names it.
      ImportError: a library that is not installed; says which.
    """
    kind, colon, name = source.partition(":")
    if colon and kind in ("hf", "tfds"):
        with _named(source):
            count = len(_dataset(kind, name, how))
        return [
            Unit(kind, name, start, min(start + _EXAMPLES, count), _EXAMPLES)
            for start in range(0, count, _EXAMPLES)
        ]
    skipped: text.Skipped = {}
    root, names = text.find(source, skipped)
    found = [unit for name in names for unit in _of_file(root / name)]
    if not found:
        raise FileNotFoundError(f"No text at {source!r}: no file that is not empty.")
    return found


def _of_file(path: Path) -> list[Unit]:
    said = path.stat()
    size, name, changed = said.st_size, str(path), said.st_mtime_ns
    kind = path.suffix.lower()
    if kind in PACKED:
        inner = Path(path.stem).suffix.lower()
        which = "lines" if inner in JSON_LINES else "text"
        return [Unit(which, name, size=size, changed=changed)]
    if kind == ".parquet":
        with _named(name):
            groups = _parquet(path).metadata
        return [
            Unit(
                "parquet", name, i, i + 1, groups.row_group(i).total_byte_size, changed
            )
            for i in range(groups.num_row_groups)
        ]
    if kind in JSON_LINES:
        return [
            Unit(
                "lines",
                name,
                at,
                min(at + _LINES, size),
                min(_LINES, size - at),
                changed,
            )
            for at in range(0, size, _LINES)
        ]
    return [Unit("text", name, size=size, changed=changed)] if size else []


def documents(unit: Unit, how: Reading, skipped: text.Skipped) -> Iterator[bytes]:
    """The documents of a unit, none of them empty.

    Args:
      unit: which.
      how: they are found in it.
      skipped: gets what is left out, by reason.

    Raises:
      Unreadable: under `raise`, what is no text; names the file and the place. Always,
        a file that its library cannot read; names it.
    """
    for place, found in _readable(unit, how):
        where = f"{unit.name}:{place}"
        try:
            data = _data(found, how, where)
        except Unreadable as error:
            if how.undecodable != "skip":
                raise
            skipped.setdefault("no text", []).append(str(error))
            continue
        if data:
            yield data
        else:
            skipped.setdefault("empty", []).append(where)


def _data(found: Any, how: Reading, where: str) -> bytes:
    if isinstance(found, Unreadable):
        raise found
    if isinstance(found, str):
        try:
            return found.encode()
        except UnicodeEncodeError:  # half of a pair, which JSON may hold
            raise Unreadable(
                f"{where} holds half a character, which no UTF-8 has."
            ) from None
    if not isinstance(found, bytes):
        raise Unreadable(
            f"{where}: {how.field!r} must be text, got {type(found).__name__}. Name "
            "the field that holds it with --field."
        )
    if how.undecodable != "keep":
        try:
            found.decode()
        except UnicodeDecodeError as error:
            raise Unreadable(
                f"{where} is not UTF-8: byte {error.start} is "
                f"0x{found[error.start]:02x}. Use --undecodable=skip to leave it out."
            ) from None
    return found


def _readable(unit: Unit, how: Reading) -> Iterator[tuple[int, Any]]:
    with _named(unit.name):
        yield from _found(unit, how)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Names a file, or a data set, in what a library says of it."""
    try:
        yield
    except Unreadable:
        raise
    except (EOFError, OSError, ValueError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise Unreadable(f"{name} cannot be read: {first}") from error


def _found(unit: Unit, how: Reading) -> Iterator[tuple[int, Any]]:
    """Pairs of a place and what is there: text, or why there is none."""
    match unit.kind:
        case "text":
            yield from _texts(unit, how)
        case "lines":
            for place, line in _lines(unit):
                if line.strip():
                    yield place, _of_json(line, how, f"{unit.name}:{place}")
        case "parquet":
            table = _parquet(Path(unit.name))
            if how.field not in table.schema_arrow.names:
                raise Unreadable(
                    f"{unit.name} has no column {how.field!r}: it has "
                    f"{', '.join(table.schema_arrow.names)}. Choose with --field."
                )
            for batch in table.iter_batches(
                row_groups=[unit.start], columns=[how.field], batch_size=1024
            ):
                for i, value in enumerate(batch.column(0)):
                    yield i, value.as_py()
        case _:
            dataset = _dataset(unit.kind, unit.name, how)
            for i in range(unit.start, unit.stop):
                example = dataset[i]
                if how.field not in example:
                    raise Unreadable(
                        f"Example {i} of {unit.name} has no {how.field!r}: it has "
                        f"{', '.join(example)}. Choose with --field."
                    )
                yield i, example[how.field]


def _texts(unit: Unit, how: Reading) -> Iterator[tuple[int, bytes]]:
    with _opened(unit.name) as file:
        if how.separator is None:
            yield 0, file.read()
            return
        mark, rest, place = how.separator.encode(), bytearray(), 0
        while piece := file.read(1 << 20):
            seen = max(0, len(rest) - len(mark) + 1)
            rest += piece
            if rest.find(mark, seen) < 0:
                continue
            *whole, rest = rest.split(mark)
            for one in whole:
                yield place, bytes(one).strip(b"\r\n")
                place += 1
        yield place, bytes(rest).strip(b"\r\n")


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in the unit, by their first byte or number."""
    with _opened(unit.name) as file:
        if unit.stop < 0:
            yield from enumerate(file, start=1)
            return
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()
        while (at := file.tell()) < unit.stop and (line := file.readline()):
            yield at, line


def _of_json(line: bytes, how: Reading, where: str) -> Any:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"{where} is no JSON: {error}.")
    if not isinstance(said, dict) or how.field not in said:
        has = ", ".join(said) if isinstance(said, dict) else "no fields"
        return Unreadable(f"{where} has no {how.field!r}: it has {has}. Use --field.")
    return said[how.field]


def _opened(name: str) -> Any:
    if name.lower().endswith(".gz"):
        return gzip.open(name, "rb")
    if name.lower().endswith(".zst"):
        stream = _library("pyarrow").input_stream(name, compression="zstd")
        return io.BufferedReader(_Raw(stream), 1 << 20)
    return open(name, "rb")  # noqa: SIM115  the caller's `with`


class _Raw(io.RawIOBase):
    """Arrow's stream, as Python's buffers read one."""

    def __init__(self, stream):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        data = self._stream.read(len(into))
        into[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _parquet(path: Path) -> Any:
    _library("pyarrow")
    return importlib.import_module("pyarrow.parquet").ParquetFile(path)


def _dataset(kind: str, name: str, how: Reading) -> Any:
    """A data set by name, which has a length and gives examples by their index."""
    if kind == "hf":
        library = _library("datasets")
        folder = Path(name).expanduser()
        saved = ("dataset_info.json", "dataset_dict.json")
        if not any((folder / file).is_file() for file in saved):
            return library.load_dataset(
                name, how.config, split=how.split, cache_dir=how.folder
            )
        found = library.load_from_disk(str(folder))
        if not isinstance(found, dict):
            return found
        if how.split not in found:
            raise ValueError(
                f"{name} has no split {how.split!r}: it has {', '.join(found)}."
            )
        return found[how.split]
    library = _library("tensorflow_datasets")
    builder = f"{name}/{how.config}" if how.config else name
    if os.path.isdir(name):
        made = library.builder_from_directory(name)
    else:
        made = library.builder(builder, data_dir=how.folder)
    return made.as_data_source(split=how.split)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is needed to read this: {_EXTRA} ({error})."
        ) from error
