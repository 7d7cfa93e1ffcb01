"""One program a folder: a lock that says who holds it, and ends with its holder."""

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from absl import logging

FILE = ".lock"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class InUse(RuntimeError):
    """Another program writes in a folder. Names both."""


@contextlib.contextmanager
def hold(folder: str | os.PathLike, flag: str = "--workdir") -> Iterator[None]:
    """Keeps `folder` for this program alone.

    The system lets go of the lock when the process ends, however it does; what is then
    left of the file is no hindrance.

    Args:
      folder: an existing folder.
      flag: what it was given as, for messages.

    Raises:
      InUse: another program holds it; names its process.
      OSError: the folder cannot be written in.
    """
    path = Path(folder) / FILE
    file = _locked(path)
    if file is None:
        raise InUse(
            f"{flag}={os.fspath(folder)!r} is in use by {_owner(path)}: wait until it "
            "ends, or give another folder."
        )
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _locked(path: Path) -> int | None:
    """A descriptor of the file, locked; None where another program has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(file)
                raise
            logging.warning("%s cannot be locked here: %s.", path, error.strerror)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # its holder has just removed it


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:200]
    except OSError:
        return "another program"
