"""What a memory learned, in a file of its own: arrays that are checked, no code.

The format is safetensors. Its metadata hold a version, what else is to be known, and a
SHA-256 of all of it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hope_jax.train.checkpoint import Damaged

SUFFIX = ".safetensors"

_FORMAT = "hope_jax.session.1"
_TYPES = {"float32": "F32", "bfloat16": "BF16", "int32": "I32", "bool": "BOOL"}


def write(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping) -> None:
    """Replaces a file in one move; only its owner may read it.

    Args:
      path: of the file; its folder exists.
      arrays: by name.
      about: what JSON can say.
    """
    arrays = {name: np.asarray(a, order="C") for name, a in arrays.items()}
    said = json.dumps(about, sort_keys=True)
    sha256 = _digest(arrays, said)
    data = save(arrays, {"format": _FORMAT, "about": said, "sha256": sha256})
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
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
    try:
        with safe_open(path, framework="numpy") as file:
            about, sha256 = _metadata(path, file)
            _check_header(path, file, like)
            made = {name: file.get_tensor(name) for name in like}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    if sha256 != _digest(made, about):
        raise _damaged(path, "its checksum is wrong")
    return made, json.loads(about)


def _metadata(path, file):
    """What it says of itself, and the checksum."""
    said = file.metadata() or {}
    if said.get("format") != _FORMAT:
        raise _damaged(path, f"it is not of the format {_FORMAT}")
    if not {"about", "sha256"} <= said.keys():
        raise _damaged(path, "its metadata are not whole")
    return said["about"], said["sha256"]


def _check_header(path, file, like):
    """Refuses arrays that are not those of `like`, of which nothing is read."""
    names = list(file.keys())
    wrong = [name for name in names if name not in like]
    for name, a in like.items():
        expected = list(a.shape), _TYPES[str(jnp.dtype(a.dtype))]
        said = file.get_slice(name) if name in names else None
        if said is None or (said.get_shape(), said.get_dtype()) != expected:
            wrong.append(name)
    if any(_FORMER in name for name in wrong):
        raise _damaged(
            path,
            "it is of a version that kept a second copy of the memories of a "
            "self-modifying layer in mid-chunk; open it anew and feed it its text",
        )
    if wrong:
        raise _damaged(path, f"its arrays are of another model, as {wrong[0]!r}")


_FORMER = ".memories.anchor"  # of the names of such arrays


def _digest(arrays, said):
    hashed = hashlib.sha256(said.encode())
    for name, a in sorted(arrays.items()):
        hashed.update(json.dumps([name, str(a.dtype), list(a.shape)]).encode())
        hashed.update(a.tobytes())
    return hashed.hexdigest()


def _damaged(path, why):
    return Damaged(f"The session in {path} cannot be read: {why}.")
