"""What a memory learned, in a file of its own: arrays that are checked, no code.

The format is safetensors: eight bytes that say how long the header is, a header in JSON
with the type, shape and place of every array, and their bytes. Its metadata hold a
version, what else is to be known, and a SHA-256 of all of it.
"""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hope_jax.train.checkpoint import Damaged

SUFFIX = ".safetensors"

_FORMAT = "hope_jax.session.1"
_MOST = 1 << 20  # bytes of a header
_TYPES = {"float32": "F32", "bfloat16": "BF16", "int32": "I32"}


def write(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping) -> None:
    """Replaces a file in one move; only its owner may read it.

    Args:
      path: of the file; its folder exists.
      arrays: by name.
      about: what JSON can say.
    """
    data = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays.values())
    table, said = _table(arrays), json.dumps(about, sort_keys=True)
    header = json.dumps(
        {
            "__metadata__": {
                "format": _FORMAT,
                "about": said,
                "sha256": _digest(table, said, data),
            },
            **table,
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(struct.pack("<Q", len(header)) + header + data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read(path: Path, like: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a file, and what else it says.

    Nothing is made room for before the header says what `like` says.

    Args:
      path: of a file; one that leads elsewhere is refused.
      like: name -> something with the `shape` and `dtype` that are expected.

    Raises:
      FileNotFoundError: none is there.
      hope_jax.train.checkpoint.Damaged: it is not what `write` writes of such arrays.
    """
    if path.is_symlink() or not path.is_file():
        if path.is_symlink() or path.exists():
            raise Damaged(f"{path} is no plain file.")
        raise FileNotFoundError(f"No session at {path}.")
    expected = _table(like)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, begins = _header(path, file, size)
        metadata = header.pop("__metadata__")
        if header != expected:
            wrong = [
                n for n in {**expected, **header} if header.get(n) != expected.get(n)
            ]
            raise _damaged(path, f"its arrays are of another model, as {wrong[0]!r}")
        length = sum(_bytes(a) for a in like.values())
        if size != begins + length:
            raise _damaged(path, f"it has {size} bytes, not {begins + length}")
        data = file.read(length)
    if metadata["sha256"] != _digest(expected, metadata["about"], data):
        raise _damaged(path, "its checksum is wrong")
    made = {}
    for name, a in like.items():
        begin, end = expected[name]["data_offsets"]
        made[name] = np.frombuffer(data[begin:end], jnp.dtype(a.dtype)).reshape(a.shape)
    return made, _parsed(path, metadata["about"], "what it says of itself")


def _header(path, file, size):
    """The header, which has the parts that every one has, and where data begin."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= min(_MOST, size - 8):
        raise _damaged(path, "its header is not whole")
    header = _parsed(path, file.read(length), "its header")
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise _damaged(path, f"it is not of the format {_FORMAT}")
    if not all(isinstance(metadata.get(name), str) for name in ("about", "sha256")):
        raise _damaged(path, "its metadata are not whole")
    return header, 8 + length


def _parsed(path, text, what):
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _damaged(path, f"{what} is no JSON")
    return found


def _table(arrays):
    """The arrays one after another, as a header has them."""
    table, at = {}, 0
    for name, a in arrays.items():
        table[name] = {
            "dtype": _TYPES[str(jnp.dtype(a.dtype))],
            "shape": list(a.shape),
            "data_offsets": [at, at := at + _bytes(a)],
        }
    return table


def _bytes(a):
    return int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize


def _digest(table, said, data):
    head = json.dumps([table, said], sort_keys=True).encode()
    return hashlib.sha256(head + data).hexdigest()


def _damaged(path, why):
    return Damaged(f"The session in {path} cannot be read: {why}.")
