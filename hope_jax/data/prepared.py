"""Prepared data: documents as token ids in a folder, of which a row is read at a time.

    manifest.json       counts, sizes, checksums, the fingerprint of the tokenizer
    tokenizer.json      that tokenizer
    train-00000.array_record, train-00000.lengths, validation-00000.array_record, ...

A document is led by `bos` and cut into pieces of `PIECE` ids, a record each, so that a
row of a long document costs what one of a short does. `lengths` holds how many ids each
document has, uint32. What is kept in memory goes with neither: a number for every
`_BLOCK` documents.

`launch/prepare_data.py` writes such a folder.
"""

import bisect
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from hope_jax.core.show import printable
from hope_jax.data import tokenizer
from hope_jax.data.text import Document

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = "hope_jax.prepared.1"
PIECE = 4096  # ids of a record
Split = Literal["train", "validation"]
SPLITS = get_args(Split)

_BLOCK = 1024  # documents
_PASS = 1 << 20  # documents, a multiple of `_BLOCK`, of which lengths are read at once
_OPEN = 256  # record files open at a time
_KEPT = 256  # blocks whose layout is kept


class Unprepared(ValueError):
    """A folder that is not what `launch/prepare_data.py` finished, or damaged."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared folder, its manifest read and its files found whole.

    Attributes:
      folder: where it is.
      manifest: what it says of itself.
      tokenizer: of its ids.
    """

    folder: Path
    manifest: Mapping[str, Any]
    tokenizer: tokenizer.Tokenizer

    @property
    def sha256(self) -> str:
        """Of its documents, wherever their texts were."""
        made = ("tokens", "bytes", "sha256", "lengths")
        parts = [
            [shard[split].get(what) for what in made]
            for split in SPLITS
            for shard in self.manifest["shards"]
        ]
        return digest([self.manifest["tokenizer"], self.manifest["piece"], parts])

    def total(self, split: Split, what: str) -> int:
        """Of a split its `documents`, `tokens`, or `bytes` of text."""
        return sum(shard[split][what] for shard in self.manifest["shards"])

    def documents(self, split: Split) -> "TokenDocuments":
        return TokenDocuments(self, split)

    def rows(
        self, split: Split, *, seq_len: int, stretch: int = 0, least: int = 0
    ) -> "PreparedRows":
        """Rows as `hope_jax.data.stream.Rows` and `PackedRows` of the same documents.

        Args:
          split: of which documents.
          seq_len: tokens that a row predicts.
          stretch: of `PackedRows`; 0 for `Rows`.
          least: ids of the shortest document that is read.
        """
        return PreparedRows(self, split, seq_len=seq_len, stretch=stretch, least=least)

    def summary(self) -> str:
        """What is there, in a few lines to print."""
        lines = [f"prepared {printable(str(self.folder))}"]
        for split in SPLITS:
            documents, tokens, size = (
                self.total(split, what) for what in ("documents", "tokens", "bytes")
            )
            lines.append(
                f"  {split:<11}{documents:>12,} documents {tokens:>15,} tokens "
                f"{size:>15,} bytes"
            )
        return "\n".join([*lines, f"  sha256     {self.sha256}"])


def is_prepared(path: str | os.PathLike | None) -> bool:
    """Whether something was prepared there, if only in part."""
    if path is None:
        return False
    folder = Path(path).expanduser()
    return any((folder / name).is_file() for name in (MANIFEST, "plan.json"))


def load(path: str | os.PathLike) -> Prepared:
    """The prepared folder at `path`. Nothing but names, sizes and lengths is read.

    Raises:
      Unprepared: not finished, of another version, or a file that is not what the
        manifest says; names it.
    """
    folder = Path(path).expanduser().resolve()
    if not (folder / MANIFEST).is_file():
        raise Unprepared(
            f"{str(folder)!r} has no {MANIFEST}: its preparation did not end. Give "
            "python -m launch.prepare_data the same command again, and it goes on."
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        said = manifest.pop("sha256")
        if manifest["format"] != FORMAT:
            raise Unprepared(
                f"{str(folder)!r} is of format {manifest['format']!r}, but this "
                f"version reads {FORMAT!r}: prepare it again."
            )
        if digest(manifest) != said:
            raise ValueError("its checksum is wrong")
    except Unprepared:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unprepared(
            f"{str(folder / MANIFEST)!r} is damaged ({error!r}): prepare it again."
        ) from None
    manifest["sha256"] = said
    for shard in manifest["shards"]:
        for split in SPLITS:
            for path, size in files(folder, shard, split):
                if not path.is_file() or path.stat().st_size != size:
                    raise Unprepared(
                        f"{str(path)!r} should have {size:,} bytes and "
                        + (
                            f"has {path.stat().st_size:,}"
                            if path.exists()
                            else "is gone"
                        )
                        + ". Prepare it again: give the same command, and only what is "
                        "missing is made."
                    )
    tokens = tokenizer.load(folder / TOKENIZER)
    if tokens.fingerprint != manifest["tokenizer"]:
        raise Unprepared(
            f"{str(folder / TOKENIZER)!r} is not the tokenizer that its data was made "
            f"with: then {manifest['tokenizer']}, now {tokens.fingerprint}."
        )
    return Prepared(folder, manifest, tokens)


def files(folder: Path, shard: Mapping[str, Any], split: str) -> list[tuple[Path, int]]:
    """The files of a split of a shard, and their sizes; none of an empty one."""
    part = shard[split]
    if not part["documents"]:
        return []
    name = f"{split}-{shard['name']}"
    return [
        (folder / f"{name}.array_record", part["size"]),
        (folder / f"{name}.lengths", 4 * part["documents"]),
    ]


def dtype(vocab_size: int) -> np.dtype:
    """Of ids on disk, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def array_record() -> Any:
    """ArrayRecord's, which is loaded when it is needed."""
    return importlib.import_module("array_record.python.array_record_module")


def digest(data: Any) -> str:
    """SHA-256 of JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class _Records:
    """The documents of a split: which records are whose, and what is in them."""

    def __init__(self, of: Prepared, split: Split, stretch: int, least: int):
        manifest = of.manifest
        self._vocab, self._piece = manifest["vocab_size"], manifest["piece"]
        self._dtype = dtype(self._vocab)
        self._stretch, self._least = max(1, stretch), least
        self._shards = [s for s in manifest["shards"] if s[split]["documents"]]
        self._names = [str(of.folder / f"{split}-{s['name']}") for s in self._shards]
        first, shards, widths, records = [0], [], [0], []
        for index, shard in enumerate(self._shards):
            part, hashed = shard[split], hashlib.sha256()
            lengths, before, tokens = self._lengths(index), 0, 0
            for start in range(0, len(lengths), _PASS):
                some = np.array(lengths[start : start + _PASS])
                hashed.update(some.tobytes())
                edges = np.arange(0, len(some), _BLOCK)
                of_block = np.add.reduceat(self._records(some), edges)
                for at, width, count in zip(
                    edges.tolist(),
                    np.add.reduceat(self._widths(some), edges).tolist(),
                    of_block.tolist(),
                    strict=True,
                ):
                    shards.append(index)
                    first.append(first[-1] + len(some[at : at + _BLOCK]))
                    widths.append(widths[-1] + width)
                    records.append(before)
                    before += count
                tokens += int(some.sum(dtype=np.int64))
            if hashed.hexdigest() != part["lengths"] or tokens != part["tokens"]:
                raise Unprepared(
                    f"{self._names[index]}.lengths is damaged: remove it, and prepare "
                    "it again with the same command."
                )
        # Of each block, its first document and place; the last entries are ends.
        self._first = np.array(first, np.int64)
        self._places = np.array(widths, np.int64)
        self._shard = np.array(shards, np.int32)
        self._record = np.array(records, np.int64)
        self._renew()

    def _renew(self):
        self._lock, self._readers, self._maps = threading.Lock(), {}, {}
        self._kept: dict[int, tuple[np.ndarray, ...]] = {}

    def __getstate__(self):  # grain sends it to its workers
        state = dict(self.__dict__)
        for name in ("_lock", "_readers", "_maps", "_kept"):
            del state[name]
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._renew()

    @property
    def count(self) -> int:
        """Documents."""
        return int(self._first[-1])

    @property
    def width(self) -> int:
        """Ids that are laid out, with what is between documents."""
        return int(self._places[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids `start` to `stop` of all that is laid out, and the index of the document
        of each; 0 and -1 between documents. Both int32."""
        ids = np.zeros(stop - start, np.int32)
        owners = np.full(stop - start, -1, np.int32)
        block = int(np.searchsorted(self._places, start, "right")) - 1
        while block < len(self._shard) and self._places[block] < stop:
            lengths, widths, places, records = self._laid(block)
            at = max(0, int(np.searchsorted(places, start, "right")) - 1)
            while at < len(lengths) and places[at] < stop:
                low = max(start, int(places[at]))
                high = min(
                    stop, int(places[at]) + min(int(lengths[at]), int(widths[at]))
                )
                if low < high:
                    ids[low - start : high - start] = self._piece_of(
                        block,
                        int(records[at]),
                        int(lengths[at]),
                        low - int(places[at]),
                        high - int(places[at]),
                    )
                    owner = (int(self._first[block]) + at) % (2**31 - 1)
                    owners[low - start : high - start] = owner
                at += 1
            block += 1
        return ids, owners

    def document(self, index: int) -> np.ndarray:
        """All ids of a document, int32."""
        block = bisect.bisect_right(self._first, index) - 1
        lengths, at = self._block(block), index - int(self._first[block])
        record = int(self._record[block]) + int(self._records(lengths[:at]).sum())
        length = int(lengths[at])
        return self._piece_of(block, record, length, 0, length)

    def _piece_of(self, block, record, length, low, high) -> np.ndarray:
        """Ids `low` to `high` of the document whose first record this is."""
        first, last = low // self._piece, -(-high // self._piece)
        name = self._names[self._shard[block]]
        wanted = list(range(record + first, record + last))
        try:
            data = b"".join(self._reader(name).read(wanted))
        except Exception as error:  # whatever the bytes made of the library
            raise Unprepared(
                f"{name}.array_record is damaged ({str(error)[:200]}): remove it, and "
                "give the command that prepared it again."
            ) from error
        most = min(length, last * self._piece) - first * self._piece
        if len(data) != most * self._dtype.itemsize:
            raise Unprepared(
                f"Records {record + first} to {record + last - 1} of "
                f"{name}.array_record hold {len(data)} bytes, not "
                f"{most * self._dtype.itemsize}: remove that file, and give the "
                "command that prepared it again."
            )
        ids = np.frombuffer(data, self._dtype).astype(np.int32)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab:
            raise Unprepared(
                f"{name}.array_record holds ids outside [0, {self._vocab}): prepare it "
                "again."
            )
        return ids[low - first * self._piece : high - first * self._piece]

    def _widths(self, lengths: np.ndarray) -> np.ndarray:
        wide = lengths.astype(np.int64)
        laid = -(-wide // self._stretch) * self._stretch
        return np.where(wide >= self._least, laid, 0)

    def _records(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths.astype(np.int64) // self._piece)

    def _laid(self, block: int) -> tuple[np.ndarray, ...]:
        """Of each document of a block its ids, those it is laid out in, where it begins
        and its first record; the last used blocks are kept."""
        with self._lock:
            found = self._kept.pop(block, None)
            if found is not None:
                self._kept[block] = found
                return found
        lengths = self._block(block)
        widths = self._widths(lengths)
        places = int(self._places[block]) + np.concatenate([[0], widths.cumsum()])
        records = self._records(lengths).cumsum()
        records = int(self._record[block]) + np.concatenate([[0], records])
        with self._lock:
            self._kept[block] = lengths, widths, places, records
            while len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
        return lengths, widths, places, records

    def _block(self, block: int) -> np.ndarray:
        shard = int(self._shard[block])
        start = int(self._first[block])
        begins = int(self._first[int(np.searchsorted(self._shard, shard))])
        stop = int(self._first[block + 1])
        with self._lock:
            if shard not in self._maps:
                self._maps[shard] = self._lengths(shard)
            lengths = self._maps[shard]
        return np.array(lengths[start - begins : stop - begins])

    def _lengths(self, shard: int) -> np.ndarray:
        return np.memmap(f"{self._names[shard]}.lengths", "<u4", mode="r")

    def _reader(self, name: str):
        with self._lock:
            reader = self._readers.pop(name, None)
            if reader is None:
                reader = array_record().ArrayRecordReader(
                    f"{name}.array_record",
                    "readahead_buffer_size:0",
                    file_reader_buffer_size=32768,
                )
            self._readers[name] = reader  # the last used stands last
            if len(self._readers) > _OPEN:  # another thread may still read the first
                del self._readers[next(iter(self._readers))]
        return reader


class PreparedRows:
    """Rows of a prepared folder: a random-access source for grain.

    Row `i` is that of `hope_jax.data.stream.Rows`, or of `PackedRows` with a `stretch`,
    over the same documents.

    Raises:
      ValueError: fewer ids than one row; a length below 1; `seq_len` is no multiple of
        `stretch`.
    """

    threads: int = 2  # read ahead; four are four times slower than two

    def __init__(
        self, of: Prepared, split: Split, *, seq_len: int, stretch: int, least: int
    ):
        if seq_len < 1 or stretch < 0 or (stretch and seq_len % stretch):
            raise ValueError(
                f"seq_len ({seq_len}) must be at least 1 and a multiple of stretch "
                f"({stretch})."
            )
        self._seq_len, self._packed = seq_len, bool(stretch)
        self._records = _Records(of, split, stretch, least)
        self._rows = max(0, self._records.width - 1) // seq_len
        if self._rows < 1:
            shorter = f" of at least {least} tokens" if least else ""
            raise ValueError(
                f"The {split} documents{shorter} in {str(of.folder)!r} fill "
                f"{self._records.width:,} tokens, but one row of seq_len={seq_len} "
                f"needs {seq_len + 1}. Use a shorter seq_len or more text."
            )
        self.dropped = self._records.width - 1 - self._rows * seq_len

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        start = index * self._seq_len
        ids, owners = self._records.read(start, start + self._seq_len + 1)
        return {"tokens": ids} | ({"document": owners} if self._packed else {})

    def __repr__(self) -> str:
        return f"PreparedRows({self._rows} of {self._seq_len} tokens)"


class TokenDocuments(Sequence):
    """The documents of a split, int32[1 + N] each, read when they are asked for."""

    def __init__(self, of: Prepared, split: Split):
        self._records = _Records(of, split, 0, 0)

    def __len__(self) -> int:
        return self._records.count

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self._records.document(index)


class Texts(Sequence):
    """The documents of a split as text, read when they are asked for."""

    def __init__(self, of: Prepared, split: Split):
        self._of, self._split = of, split
        self._documents = of.documents(split)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.read(i) for i in range(*index.indices(len(self)))]
        return self.read(index)

    def read(self, index: int) -> Document:
        ids = self._documents[index]
        name = f"{self._of.folder.name}/{self._split}/{index}"
        return Document(name, self._of.tokenizer.decode(ids))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Prepared folders as the documents of a run, as `hope_jax.data.text.Corpus` is.

    Attributes:
      parts: folders, all of one tokenizer, each with the share of rows that it gives.
      max_validation_bytes: most bytes of validation text, in whole documents.

    Raises:
      ValueError: tokenizers that differ.
    """

    parts: tuple[tuple[Prepared, float], ...]
    max_validation_bytes: int | None = None

    def __post_init__(self):
        first = self.parts[0][0]
        for part, _ in self.parts[1:]:
            if part.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise ValueError(
                    f"A mixture needs one tokenizer, but {str(first.folder)!r} and "
                    f"{str(part.folder)!r} were prepared with different ones: prepare "
                    "one with --tokenizer=tokenizer.json of the other."
                )

    @property
    def name(self) -> str:
        if len(self.parts) == 1:
            return str(self.parts[0][0].folder)
        return ",".join(f"{part.folder}:{share:g}" for part, share in self.parts)

    @property
    def tokenizer(self) -> tokenizer.Tokenizer:
        return self.parts[0][0].tokenizer

    @property
    def train(self) -> Sequence[Document]:
        """All of them, each read when it is asked for."""
        return _Joined([Texts(part, "train") for part, _ in self.parts])

    @functools.cached_property
    def validation(self) -> tuple[Document, ...]:
        """Within `max_validation_bytes`, shared by the parts as rows are."""
        chosen: list[Document] = []
        for part, share in self.parts:
            most = self.max_validation_bytes
            most = None if most is None else max(1, round(share * most))
            chosen += some(Texts(part, "validation"), most)
        return tuple(chosen)

    @property
    def train_bytes(self) -> int:
        return sum(part.total("train", "bytes") for part, _ in self.parts)

    @property
    def validation_bytes(self) -> int:
        return sum(len(document.data) for document in self.validation)

    @property
    def sha256(self) -> str:
        if len(self.parts) == 1:
            return self.parts[0][0].sha256
        return digest([[part.sha256, share] for part, share in self.parts])

    def bytes_per_token(self, split: Split) -> float:
        """Of what rows are made of."""
        return sum(
            share * part.total(split, "bytes") / part.total(split, "tokens")
            for part, share in self.parts
        )

    def summary(self) -> str:
        lines = []
        for part, share in self.parts:
            lines.append(part.summary())
            if len(self.parts) > 1:
                lines.append(f"  rows       {100 * share:.3g} %")
        return "\n".join(lines)


class _Joined(Sequence):
    def __init__(self, parts: Sequence[Sequence]):
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


_SHARE = re.compile(r"(.+):([0-9.]+(?:[eE]-?[0-9]+)?)")


def corpus(
    spec: str | os.PathLike | None, max_validation_bytes: int | None = None
) -> Corpus | None:
    """What `--data` names, if it is a prepared folder or a mixture of several.

    Args:
      spec: a folder, or folders with shares, `a:0.7,b:0.3`.
      max_validation_bytes: see `Corpus`.

    Returns:
      None for anything else: text.

    Raises:
      Unprepared: see `load`; or a part of a mixture that is no prepared folder.
      ValueError: see `Corpus`; shares that are not all above 0.
    """
    if spec is None:
        return None
    if is_prepared(spec):
        return Corpus(((load(spec), 1.0),), max_validation_bytes)
    found = [_SHARE.fullmatch(part) for part in str(spec).split(",")]
    if not all(found) or Path(spec).expanduser().exists():
        return None
    shares = [(one[1], float(one[2])) for one in found if one]
    for path, share in shares:
        if not is_prepared(path):
            raise Unprepared(
                f"{path!r} is a part of a mixture, but no prepared folder: make it "
                "with python -m launch.prepare_data."
            )
        if not 0 < share < float("inf"):
            raise ValueError(f"The share of {path!r} must be above 0, got {share}.")
    total = sum(share for _, share in shares)
    parts = tuple((load(path), share / total) for path, share in shares)
    return Corpus(parts, max_validation_bytes)


def some(texts: Texts, most: int | None) -> list[Document]:
    """Whole documents of at most `most` bytes in all, one at least, in their order:
    chosen as if by lot, always the same ones."""
    if most is None:
        return list(texts)
    kept, used = {}, 0
    for index in np.random.default_rng(0).permutation(len(texts)).tolist():
        document = texts.read(index)
        if not kept or used + len(document.data) <= most:
            kept[index] = document
            used += len(document.data)
        if used > 0.9 * most:
            break
    return [kept[index] for index in sorted(kept)]
