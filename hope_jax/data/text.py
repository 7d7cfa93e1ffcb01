"""Text corpora: documents found on disk, in a fixed order, split by file.

A `Corpus` holds raw bytes; a tokenizer gives them a meaning. The default corpus, the
Python standard library's own source files, is on every machine that runs this package.
"""

import dataclasses
import functools
import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from hope_jax.core.show import printable

Undecodable = Literal["raise", "skip", "keep"]
Skipped = dict[str, list[str]]  # reason -> names, in the order they were met

_ONE_IN = 20  # one file in twenty, or a twentieth of a single file, is validation
_VALIDATION_BYTES = 250_000  # a minute of evaluation of a small model on two cores

# Not the library itself: tests, installed or bundled packages, lib2to3 (it holds old
# copies of other modules, which validation must not), and what the build of this very
# interpreter wrote (it names its machine's folders).
_NOT_LIBRARY = frozenset(
    "test tests idle_test site-packages dist-packages _bundled _vendor __pycache__"
    " lib2to3 lib-dynload".split()
)
_BUILD_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")


@dataclasses.dataclass(frozen=True)
class Document:
    """One file: its name in the corpus (a relative posix path) and its bytes."""

    name: str
    data: bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to learn from and documents to be judged on, each in a fixed order.

    Attributes:
      name: what the corpus is called in a summary.
      train: documents to learn from.
      validation: documents to be judged on; never a part of `train`.
      skipped: pairs (reason, names) of the files that were found and left out.

    Raises:
      ValueError: one of the two splits has no bytes.
    """

    name: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    skipped: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self):
        for split in ("train", "validation"):
            if not any(document.data for document in getattr(self, split)):
                raise ValueError(
                    f"{split} of corpus {self.name!r} holds no bytes; both splits need"
                    f" some text.{_listed(self.skipped)}"
                )

    @property
    def train_bytes(self) -> int:
        return _size(self.train)

    @property
    def validation_bytes(self) -> int:
        return _size(self.validation)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of every name and byte of both splits, in order."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            digest.update(b"%d documents" % len(split))
            for document in split:
                for part in (os.fsencode(document.name), document.data):
                    digest.update(b"%d:" % len(part))  # lengths keep parts apart
                    digest.update(part)
        return digest.hexdigest()

    def summary(self) -> str:
        """Files, bytes, hash and what was left out, in a few lines to print."""
        lines = [f"corpus {printable(self.name)}"]
        for split, size in (
            ("train", self.train_bytes),
            ("validation", self.validation_bytes),
        ):
            files = len(getattr(self, split))
            lines.append(f"  {split:<11}{files:>8,} files {size:>15,} bytes")
        lines.append(f"  sha256     {self.sha256}")
        return "\n".join(lines) + _listed(self.skipped)


def load(
    spec: str | os.PathLike | None = None,
    *,
    max_train_bytes: int | None = None,
    max_validation_bytes: int | None = _VALIDATION_BYTES,
    undecodable: Undecodable = "raise",
) -> Corpus:
    """The corpus that a command line names.

    Args:
      spec: None or "stdlib" for the standard library, else a file, folder or glob.
      max_train_bytes: see `standard_library`.
      max_validation_bytes: see `standard_library`.
      undecodable: see `from_path`.
    """
    limits = dict(
        max_train_bytes=max_train_bytes, max_validation_bytes=max_validation_bytes
    )
    if spec is None or spec == "stdlib":
        return standard_library(**limits)
    return from_path(spec, undecodable=undecodable, **limits)


def standard_library(
    *,
    max_train_bytes: int | None = None,
    max_validation_bytes: int | None = _VALIDATION_BYTES,
) -> Corpus:
    """Source files of the running interpreter's own library, tests left out.

    A file's split depends on its relative name alone, so it stays on the same side in
    another Python version or under other limits. The text itself does differ between
    versions: record `Corpus.sha256` with a result.

    Args:
      max_train_bytes: most bytes of training text, in whole files; None for all.
      max_validation_bytes: the same for the validation text. Files are chosen by the
        hash of their names, so that a part is a fair sample of the whole; one that does
        not fit is passed over. If none fits, the smallest is kept.

    Raises:
      ValueError: a limit below 1.
      FileNotFoundError: this interpreter keeps no source files on disk.
    """
    _check_limits(
        max_train_bytes=max_train_bytes, max_validation_bytes=max_validation_bytes
    )
    root = Path(sysconfig.get_path("stdlib")).resolve()
    skipped: Skipped = {}
    names = [
        name
        for name in _walk(root, skipped, exclude=_NOT_LIBRARY)
        if name.endswith(".py") and not name.startswith((*_BUILD_FILES, "config-"))
    ]
    if not names:
        raise FileNotFoundError(
            f"No Python source files under {str(root)!r}, where this interpreter's"
            " library should be. Name some text instead: a file, a folder or a glob."
        )
    documents = _read(root, names, "skip", skipped)
    return _corpus(
        f"Python {platform.python_version()} standard library",
        documents,
        lambda document: _digest(document.name) % _ONE_IN == 0,
        skipped,
        max_train_bytes,
        max_validation_bytes,
    )


def from_path(
    path: str | os.PathLike,
    *,
    undecodable: Undecodable = "raise",
    max_train_bytes: int | None = None,
    max_validation_bytes: int | None = _VALIDATION_BYTES,
) -> Corpus:
    """Documents of a text file, of a folder with all below it, or of a glob.

    About one file in twenty is for validation, at least one, chosen by the hash of its
    name; a file that is more than half of the text stays in training. The last
    twentieth of a single file, from the start of a line, is its validation document.

    Empty files, hidden files and symbolic links inside a folder are left out and
    counted: a link could lead out of the folder, or show one text twice and so carry a
    validation document into the training text. `path` itself may be a link.

    Args:
      path: file, folder or glob (`**` for any depth).
      undecodable: what to do with a file that is not UTF-8: "raise"; "skip" it; or
        "keep" its raw bytes, which both tokenizers of this package can read.
      max_train_bytes: see `standard_library`.
      max_validation_bytes: see `standard_library`; bounds the tail of a single file.

    Raises:
      FileNotFoundError: nothing at `path`, or no file that matches it.
      ValueError: an argument out of range, no text in any file, or a file that is not
        UTF-8 under "raise" (the message has its name and the byte's offset).
    """
    if undecodable not in get_args(Undecodable):
        raise ValueError(
            f"undecodable must be one of {', '.join(get_args(Undecodable))},"
            f" got {undecodable!r}."
        )
    _check_limits(
        max_train_bytes=max_train_bytes, max_validation_bytes=max_validation_bytes
    )
    skipped: Skipped = {}
    root, names = find(path, skipped)
    found = f"{len(names)} file{'' if len(names) == 1 else 's'}"
    if not names:
        raise FileNotFoundError(
            f"No files to read at {str(path)!r}.{_listed(_frozen(skipped))}"
        )
    documents = _read(root, names, undecodable, skipped)
    if not documents:
        raise ValueError(
            f"No text in the {found} at {str(path)!r}.{_listed(_frozen(skipped))}"
        )
    if len(documents) == 1:
        documents = _cut(documents[0], max_validation_bytes)
        return _corpus(
            str(path),
            documents,
            lambda document: document is documents[1],
            skipped,
            max_train_bytes,
            None,
        )
    total = _size(documents)
    fair = [d for d in documents if 2 * len(d.data) <= total]
    fair.sort(key=lambda document: _digest(document.name))
    held_out = {d.name for d in fair[: max(1, round(len(documents) / _ONE_IN))]}
    return _corpus(
        str(path),
        documents,
        lambda document: document.name in held_out,
        skipped,
        max_train_bytes,
        max_validation_bytes,
    )


def find(path: str | os.PathLike, skipped: Skipped) -> tuple[Path, list[str]]:
    """The folder that names are relative to, and the sorted names of regular files."""
    given = Path(path).expanduser()
    if given.is_file():
        resolved = given.resolve()
        return resolved.parent, [resolved.name]
    if given.is_dir():
        root = given.resolve()
        return root, _walk(root, skipped)
    if not glob.has_magic(str(given)):
        raise FileNotFoundError(
            f"No file or folder at {str(path)!r} (looked from {os.getcwd()!r})."
        )
    fixed = []
    for part in given.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = Path(*fixed).resolve()
    pattern = os.path.join(*given.parts[len(fixed) :])
    matches = glob.glob(pattern, root_dir=root, recursive=True)
    names = {Path(match).as_posix() for match in matches}
    return root, [name for name in sorted(names) if _regular(root, name, skipped)]


def _walk(root: Path, skipped: Skipped, exclude: frozenset = frozenset()) -> list[str]:
    def stop(error):  # os.walk would leave an unreadable folder out without a word
        raise error

    names = []
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name not in exclude]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        here = Path(folder).relative_to(root)
        names += [(here / name).as_posix() for name in (*files, *links)]
    return [name for name in sorted(names) if _regular(root, name, skipped)]


def _regular(root: Path, name: str, skipped: Skipped) -> bool:
    path = root / name
    if path.resolve() != path:
        skipped.setdefault("symbolic link", []).append(name)
    elif any(part.startswith(".") for part in Path(name).parts):
        skipped.setdefault("hidden", []).append(name)
    elif path.is_dir():
        pass  # a glob's `*` names folders as well
    elif not path.is_file():
        skipped.setdefault("not a regular file", []).append(name)
    else:
        return True
    return False


def _read(
    root: Path, names: Sequence[str], undecodable: Undecodable, skipped: Skipped
) -> list[Document]:
    documents = []
    for name in names:
        data = (root / name).read_bytes()
        if not data:
            skipped.setdefault("empty", []).append(name)
            continue
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            if undecodable == "raise":
                raise ValueError(
                    f"{str(root / name)!r} is not UTF-8: byte {error.start} is"
                    f" 0x{data[error.start]:02x}. Convert it, or pass"
                    " undecodable='skip' to leave such files out or"
                    " undecodable='keep' to read their raw bytes."
                ) from None
            if undecodable == "skip":
                skipped.setdefault("not UTF-8", []).append(name)
                continue
        documents.append(Document(name, data))
    return documents


def _cut(document: Document, max_validation_bytes: int | None) -> list[Document]:
    """A single file as two documents: all but its last twentieth, and that."""
    name, data = document.name, document.data
    if len(data) < 2:
        raise ValueError(
            f"{name!r} has {len(data)} byte; a file needs two at least to be split"
            " into training and validation text."
        )
    limit = len(data) if max_validation_bytes is None else max_validation_bytes
    tail = min(limit, max(1, len(data) // _ONE_IN))
    at = len(data) - tail
    # The start of a line: one soon after, else the last one before.
    later = data.find(b"\n", at - 1, at + tail // 2) + 1
    earlier = data.rfind(b"\n", len(data) // 2, at) + 1
    if later:
        at = later
    elif earlier and len(data) - earlier <= limit:
        at = earlier
    else:  # the start of a character
        for _ in range(3):
            if at > 1 and 0x80 <= data[at] < 0xC0:
                at -= 1
    return [
        Document(f"{name}[:{at}]", data[:at]),
        Document(f"{name}[{at}:]", data[at:]),
    ]


def _corpus(
    name: str,
    documents: Sequence[Document],
    is_validation: Callable[[Document], bool],
    skipped: Skipped,
    max_train_bytes: int | None,
    max_validation_bytes: int | None,
) -> Corpus:
    train = [d for d in documents if not is_validation(d)]
    validation = [d for d in documents if is_validation(d)]
    return Corpus(
        name,
        _limited(train, "max_train_bytes", max_train_bytes, skipped),
        _limited(validation, "max_validation_bytes", max_validation_bytes, skipped),
        _frozen(skipped),
    )


def _check_limits(**limits: int | None) -> None:
    for argument, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{argument} must be at least 1 or None, got {limit}.")


def _limited(
    documents: Sequence[Document], argument: str, limit: int | None, skipped: Skipped
) -> tuple[Document, ...]:
    """Whole documents of at most `limit` bytes in all, in the order given."""
    if limit is None:
        return tuple(documents)
    kept, used = set(), 0
    for document in sorted(documents, key=lambda d: _digest(d.name)):
        if used + len(document.data) <= limit:
            used += len(document.data)
            kept.add(document.name)
    if not kept and documents:
        kept.add(min(documents, key=lambda d: len(d.data)).name)
    left = [d.name for d in documents if d.name not in kept]
    if left:
        skipped[f"over {argument}={limit:,}"] = left
    return tuple(d for d in documents if d.name in kept)


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest())


def _size(documents: Sequence[Document]) -> int:
    return sum(len(document.data) for document in documents)


def _frozen(skipped: Skipped) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((reason, tuple(names)) for reason, names in skipped.items())


def _listed(skipped: tuple[tuple[str, tuple[str, ...]], ...], most: int = 3) -> str:
    """Reasons, counts and the first names, each on a line of its own."""
    text = ""
    for reason, names in skipped:
        more = ", ..." if len(names) > most else ""
        first = printable(", ".join(names[:most]))
        text += f"\n  skipped    {len(names):,} {reason}: {first}{more}"
    return text
