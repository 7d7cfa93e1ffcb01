"""Safetensors files: tensors by name in a folder, as Hugging Face lays them out.

    model.safetensors, or model.safetensors.index.json and the shards that it names

A file is the length of its header (8 bytes, little-endian), the header as JSON, which
says type, shape and place of each tensor, and their bytes.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_MOST = 100_000_000  # bytes of a header


class Stored(NamedTuple):
    """Where a tensor is.

    Attributes:
      path: its file.
      start: of its first byte in the file.
      shape, dtype: what it is.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Its values, read from the file where they are looked at."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.start, self.shape)


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
    """Writes `tensors` into `folder`, one at a time.

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
        _write_file(Path(folder) / file, {n: tensors[n] for n in names}, dtype)
    if count > 1:
        where = {n: f for f, ns in zip(files, shards, strict=True) for n in ns}
        total = {"total_size": sum(sizes.values())}
        index = json.dumps({"metadata": total, "weight_map": where}, indent=2)
        (Path(folder) / INDEX).write_text(index, encoding="utf-8")


def _shard(i, count):
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _write_file(path, tensors, dtype):
    (code,) = (name for name, known in TYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, made in tensors.items():
        start, end = end, end + math.prod(made.shape) * dtype.itemsize
        header[name] = {
            "dtype": code,
            "shape": list(made.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for made in tensors.values():
            file.write(np.ascontiguousarray(made.make().astype(dtype)).tobytes())


def _header(path: Path) -> dict[str, Stored]:
    if not path.exists():
        raise FileNotFoundError(f"No {path.name} in {str(path.parent)!r}.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MOST):
            raise _damaged(path, f"a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        header = dict(json.loads(text))
        header.pop("__metadata__", None)
        found = {name: _stored(path, 8 + length, **of) for name, of in header.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    at = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: item[1].start):
        if stored.start != at:
            raise _damaged(path, f"{name!r} begins at {stored.start}, not at {at}")
        at += math.prod(stored.shape) * stored.dtype.itemsize
    if at != size:
        raise _damaged(path, f"it has {size} bytes, its tensors end at {at}")
    return found


def _stored(path, begin, *, dtype, shape, data_offsets) -> Stored:
    if dtype not in TYPES:
        raise ValueError(f"a tensor of type {dtype!r}; known are {', '.join(TYPES)}")
    numbers = [*shape, *data_offsets]
    if not all(type(n) is int and n >= 0 for n in numbers) or len(data_offsets) != 2:
        raise ValueError(f"a tensor of shape {shape} at {data_offsets}")
    start, end = data_offsets
    if end - start != math.prod(shape) * TYPES[dtype].itemsize:
        raise ValueError(f"a tensor of shape {shape} in {end - start} bytes")
    return Stored(path, begin + start, tuple(shape), TYPES[dtype])


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{str(path)!r} cannot be read: {what}. Fetch or save it again.")
