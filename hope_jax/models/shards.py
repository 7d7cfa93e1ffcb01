"""Tensors by name in a folder of safetensors files, as Hugging Face lays them out.

model.safetensors, or model.safetensors.index.json and the shards that it names
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
      path, name: where it is.
      shape: what its header says it is.
    """

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Its values, of the type in the file."""
        with safe_open(self.path, framework="numpy") as file:
            return file.get_tensor(self.name)


class Made(NamedTuple):
    """A tensor to be written, made when its turn comes."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def find(folder: str | os.PathLike) -> dict[str, Stored]:
    """Every tensor in `folder`, by name; headers alone are read.

    Raises:
      FileNotFoundError: there is no model, or a shard is not there.
      ValueError: a file that is damaged, of a type that is no floating point of 16 or
        32 bits, or not what the index says.
    """
    folder = Path(folder)
    if not (folder / INDEX).exists():
        if not (folder / FILE).exists():
            raise FileNotFoundError(f"Neither {FILE} nor {INDEX} in {str(folder)!r}.")
        return _header(folder / FILE)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        where = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder / INDEX, "no index with a weight_map") from error
    found = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise _damaged(folder / INDEX, f"it names {file!r}, in another folder")
        for name, stored in _header(folder / file).items():
            if where.get(name) != file:
                raise _damaged(
                    folder / INDEX,
                    f"it has {name!r} in {where.get(name)!r}, which is in {file!r}",
                )
            found[name] = stored
    absent = sorted(set(where) - set(found))
    if absent:
        raise _damaged(folder / INDEX, f"{absent[0]!r} is in no shard")
    return found


def write(
    folder: str | os.PathLike,
    tensors: Mapping[str, Made],
    dtype: np.dtype,
    shard: int,
) -> None:
    """Writes `tensors` into `folder`, those of one file at a time.

    Args:
      folder: that is there.
      tensors: by name.
      dtype: all become.
      shard: bytes of a file; more go into several, and an index.
    """
    sizes = {n: math.prod(t.shape) * dtype.itemsize for n, t in tensors.items()}
    shards, size = [[]], 0
    for name in tensors:
        if shards[-1] and size + sizes[name] > shard:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sizes[name]
    count = len(shards)
    files = [FILE] if count == 1 else [_shard(i, count) for i in range(count)]
    for file, names in zip(files, shards, strict=True):
        made = {n: np.asarray(tensors[n].make(), dtype, order="C") for n in names}
        path = Path(folder) / file
        path.touch()
        mode = path.stat().st_mode
        save_file(made, path, metadata={"format": "pt"})
        path.chmod(mode)  # the library's own lets nobody else read it
    if count > 1:
        where = {n: f for f, ns in zip(files, shards, strict=True) for n in ns}
        total = {"total_size": sum(sizes.values())}
        index = json.dumps({"metadata": total, "weight_map": where}, indent=2)
        (Path(folder) / INDEX).write_text(index, encoding="utf-8")


def _shard(i, count):
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _header(path: Path) -> dict[str, Stored]:
    if not path.exists():
        raise FileNotFoundError(f"No {path.name} in {str(path.parent)!r}.")
    found = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                said = file.get_slice(name)
                if said.get_dtype() not in TYPES:
                    raise _damaged(
                        path,
                        f"a tensor of type {said.get_dtype()!r}; known are "
                        f"{', '.join(TYPES)}",
                    )
                found[name] = Stored(path, name, tuple(said.get_shape()))
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    return found


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{str(path)!r} cannot be read: {what}. Fetch or save it again.")
