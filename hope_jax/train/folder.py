"""Folders to write in: new, empty, or of this program; any other is left as it is."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a drive has one letter


class ForeignFolder(ValueError):
    """A folder that this program did not write, or cannot write, or that is none. Names
    it."""


def check_folder(
    flag: str,
    path: str | os.PathLike,
    names: Iterable[str],
    is_ours: Callable[[Path], bool],
) -> Path:
    """`path`, if it may and can be written in. Nothing of it is made or removed.

    Args:
      flag: what the path was given as, for messages.
      path: the folder.
      names: what will be written in it.
      is_ours: `folder -> bool`, whether this program wrote a folder with something
        in it.

    Raises:
      ForeignFolder: as `check_place`; something in the folder that leads out of it, or
        a folder with other things.

    >>> check_folder("--workdir", "gs://bucket/run", [], bool)
    Traceback (most recent call last):
    hope_jax.train.folder.ForeignFolder: --workdir='gs://bucket/run' is a URL; give a \
folder of this machine.
    """
    folder, above = _place(flag, path)
    given = f"{flag}={os.fspath(path)!r}"
    for name in names:
        if (folder / name).is_symlink():
            raise ForeignFolder(
                f"{given}: {name!r} in it is a link; what is written there would land "
                f"elsewhere, in {os.readlink(folder / name)!r}. Give another folder."
            )
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
        raise ForeignFolder(
            f"{given} has files that this program did not write; nothing was touched. "
            "Give a new or an empty folder."
        )
    _try(given, above)
    return folder


def check_place(flag: str, path: str | os.PathLike) -> Path:
    """`path`, if a folder is or can be made there and files in it.

    Tries it with a folder and a file in what is there already, which are removed again.

    Args:
      flag: what the path was given as, for messages.
      path: the folder.

    Raises:
      ForeignFolder: an empty path, a URL, a file, a link to nothing, or what the system
        refuses.
    """
    folder, above = _place(flag, path)
    _try(f"{flag}={os.fspath(path)!r}", above)
    return folder


def _place(flag: str, path: str | os.PathLike) -> tuple[Path, Path]:
    """The folder, and what of its path is there already; only looks."""
    text = os.fspath(path)
    given = f"{flag}={text!r}"
    if not text.strip():
        raise ForeignFolder(f"{given} is empty; give a folder for this alone.")
    if _URL.match(text):
        raise ForeignFolder(f"{given} is a URL; give a folder of this machine.")
    if "\0" in text:
        raise ForeignFolder(f"{given} is no path: it holds a zero byte.")
    folder = Path(path)
    try:
        above = next(p for p in (folder, *folder.parents) if _is_there(p))
        if not above.is_dir():
            what = "no folder"
            if above.is_symlink() and not above.exists():
                what = f"a link to {os.readlink(above)!r}, where nothing is"
            raise ForeignFolder(f"{given}: {str(above)!r} is {what}.")
    except OSError as error:  # a name that is too long, for example
        raise _refused(given, error) from None
    return folder, above


def _is_there(path: Path) -> bool:
    """A link too, wherever it leads."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _try(given: str, above: Path) -> None:
    try:
        try_folder(above)
    except OSError as error:
        raise _refused(given, error) from None


def _refused(given: str, error: OSError) -> ForeignFolder:
    return ForeignFolder(
        f"{given} cannot be written to: {error.strerror}. Give another folder."
    )


def try_folder(folder: Path) -> None:
    """Makes a folder in `folder`, with a file; removes both, also where that fails.

    Raises:
      OSError: what the system refuses.
    """
    made = tempfile.mkdtemp(prefix=".try-", dir=folder)
    try:
        (Path(made) / "file").write_bytes(b".")
    finally:
        shutil.rmtree(made, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Makes `folder`, with those above it, and tries it.

    Raises:
      OSError: what the system refuses; nothing that was made is left.
    """
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_folder(folder)
    except OSError:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
