"""A trained model as a folder to hand out, and back.

    model.safetensors   the parameters, by name, or shards and their index
    config.json         of the run, as beside its checkpoints
    tokenizer.json      and tokenizer_config.json, for a tokenizer of others
    release.json        what the parameters are: step, type, versions, data
    SHA256SUMS          of every file, as `sha256sum -c` reads it

and what `launch.release` adds: README.md, metrics.jsonl, result files. A folder without
optimizer and data state cannot be gone on with; `hope_jax.restore` reads it, and a new
run can begin with it (`origin`).
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hope_jax.core import config as config_lib
from hope_jax.data import tokenizer
from hope_jax.data.tokenizer import Tokenizer
from hope_jax.models import lm, shards
from hope_jax.optim.leaves import path_names
from hope_jax.train import checkpoint, limits, metrics
from hope_jax.train import config as run_config
from hope_jax.train.checkpoint import TOKENIZER, ConfigMismatch, Damaged
from hope_jax.train.config import RunConfig

CONFIG = "config.json"
ABOUT = "release.json"
SUMS = "SHA256SUMS"
DTYPES = ("float32", "float16")
_FORMAT = 1
_SHARD = 5_000_000_000  # bytes of a file
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


class Release(NamedTuple):
    """What a folder holds.

    Attributes:
      config: of the run; paths in it are names alone.
      params: float32, as of `lm.build`.
      tokenizer: of the run.
      about: of `ABOUT`.
    """

    config: RunConfig
    params: PyTree
    tokenizer: Tokenizer
    about: Mapping[str, Any]


class Origin(NamedTuple):
    """What another run can begin from.

    Attributes:
      config: of the run that made it.
      params: float32, as of `lm.build`.
      tokenizer: of that run.
      lineage: `path`, `step`, `sha256` of the parameters, which a float32 release and
        its checkpoint have in common, and the `lineage` of that run.
    """

    config: RunConfig
    params: PyTree
    tokenizer: Tokenizer
    lineage: dict[str, Any]


def write(
    folder: str | os.PathLike,
    config: RunConfig,
    params: PyTree,
    tokens: Tokenizer,
    *,
    step: int,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes all but the sums, which `seal` makes when the folder is complete.

    Args:
      folder: that is there, and empty.
      config: of the run.
      params: all floating point.
      tokens: the tokenizer.
      step: at which the parameters were taken.
      dtype: one of `DTYPES`, of the parameters in the folder.
      about: more for `release.json`.

    Returns:
      What `release.json` says.

    Raises:
      ValueError: another type, or a parameter that does not fit into it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    folder, kept = Path(folder), np.dtype(dtype)
    named = _named(params)
    for name, leaf in named.items():
        value = np.asarray(leaf)
        if not np.issubdtype(value.dtype, np.floating):
            raise ValueError(f"{name} is {value.dtype}, and parameters are floats.")
        with np.errstate(over="ignore"):
            fits = np.isfinite(value.astype(kept)).all()
        if not fits:
            raise ValueError(
                f"{name} has numbers that are not finite in {dtype}: its largest is "
                f"{np.abs(value).max():g}. Use float32."
            )
    made = {
        name: shards.Made(leaf.shape, lambda leaf=leaf: np.asarray(leaf))
        for name, leaf in named.items()
    }
    shards.write(folder, made, kept, _SHARD)
    tokens.save(folder / TOKENIZER)
    metrics.write_json(folder / CONFIG, config_lib.to_json(_without_paths(config)))
    said = {
        "format": _FORMAT,
        "step": step,
        "dtype": dtype,
        "parameters": lm.count_parameters(config.model),
        "versions": metrics.versions(),
        **(about or {}),
    }
    metrics.write_json(folder / ABOUT, said)
    return said


def seal(folder: str | os.PathLike) -> None:
    """Writes `SHA256SUMS` of all files below `folder`."""
    folder = Path(folder)
    lines = [
        f"{digest(folder / name)}  {name}\n" for name in files(folder) if name != SUMS
    ]
    metrics.replace(folder / SUMS, "".join(lines))


def is_release(folder: str | os.PathLike) -> bool:
    """Whether there are sums and what they are the sums of."""
    return all((Path(folder) / name).is_file() for name in (SUMS, ABOUT, CONFIG))


def verify(folder: str | os.PathLike) -> list[str]:
    """The names of all files, if each is what it was when it was written.

    Raises:
      FileNotFoundError: the folder is no release.
      hope_jax.train.checkpoint.Damaged: a file is missing, too many or another; named.
    """
    said = sums(folder)
    for name in said:
        _check(Path(folder), name, said)
    more = sorted(set(files(Path(folder))) - set(said) - {SUMS})
    if more:
        raise Damaged(
            f"{os.fspath(folder)!r} holds {', '.join(map(repr, more[:3]))}, which "
            f"{SUMS} does not list: remove what was added, or release anew."
        )
    return list(said)


def read(folder: str | os.PathLike) -> Release:
    """What `write` wrote, of files that are what they were.

    Raises:
      FileNotFoundError: the folder is no release, or has no weights.
      hope_jax.train.checkpoint.Damaged: a file is another than was written, or weights
        are not those of the model.
      hope_jax.train.checkpoint.ConfigMismatch: another format.
      ValueError: a config that this version does not know, or a model too large.
    """
    folder, said = Path(folder), sums(folder)
    beside = [name for name in said if name in (TOKENIZER, tokenizer.BESIDE)]
    weights = [name for name in said if name.startswith("model.")]
    weights += [name for name in said if name.startswith("model-")]
    for name in (ABOUT, CONFIG, *beside, *weights):
        _check(folder, name, said)
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise ConfigMismatch(
            f"{ABOUT} in {str(folder)!r} has not format {_FORMAT}, which this version "
            "reads: fetch a newer hope_jax, or an older release."
        )
    config = read_config(folder)
    limits.check_model(config.model)
    params = _load(folder, config, said)
    return Release(config, params, tokenizer.load(folder / TOKENIZER), about)


def origin(directory: str | os.PathLike) -> Origin:
    """What a run can begin from that is in `directory`: a run, or a release.

    Raises:
      FileNotFoundError: neither.
      hope_jax.train.checkpoint.ConfigMismatch: a tokenizer of another run.
      hope_jax.train.checkpoint.Damaged: no step is intact, or a released file is not
        what it was.
      ValueError: as of `read`.
    """
    if not is_release(directory):
        (config, params, _), lineage = checkpoint.restore_origin(directory)
        tokens = checkpoint.restore_tokenizer(directory)
        return Origin(config, params, tokens, lineage)
    config, params, tokens, about = read(directory)
    lineage = {
        "path": str(Path(directory).absolute()),
        "step": about["step"],
        "sha256": checkpoint.params_digest(params),
        "lineage": about.get("training", {}).get("lineage", []),
    }
    return Origin(config, params, tokens, lineage)


def read_config(folder: str | os.PathLike) -> RunConfig:
    """The config alone, unchecked.

    Raises:
      ValueError: it is none that this version knows.
    """
    return run_config.read_config(RunConfig, Path(folder) / CONFIG)


def _load(folder: Path, config: RunConfig, said: Mapping[str, str]) -> PyTree:
    stored, like = shards.find(folder), lm.abstract(config.model)
    unlisted = {tensor.path.name for tensor in stored.values()} - set(said)
    if unlisted:
        raise Damaged(f"{str(folder)!r}: {SUMS} does not list {sorted(unlisted)[0]!r}.")
    shapes = {name: leaf.shape for name, leaf in _named(like).items()}
    found = {name: tensor.shape for name, tensor in stored.items()}
    for name in sorted({*shapes, *found}):
        if shapes.get(name) != found.get(name):
            raise Damaged(
                f"The weights in {str(folder)!r} are not those of its {CONFIG}: "
                f"{name} is {found.get(name, 'missing')}, and the model's "
                f"{shapes.get(name, 'missing')}."
            )

    def load(path, leaf):
        value = stored[".".join(path_names(path))].read()
        return jnp.asarray(value.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(load, like)


def sums(folder: str | os.PathLike) -> dict[str, str]:
    """Name -> SHA-256, as `SHA256SUMS` has them.

    Raises:
      FileNotFoundError: the folder is no release.
      hope_jax.train.checkpoint.Damaged: lines that are none, or names that lead out.
    """
    if not is_release(folder):
        raise FileNotFoundError(
            f"{os.fspath(folder)!r} is no release: it needs {SUMS}, {ABOUT} and "
            f"{CONFIG}."
        )
    found: dict[str, str] = {}
    text = (Path(folder) / SUMS).read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        path = PurePosixPath(match[2]) if match else None
        if match is None or path is None or path.is_absolute() or ".." in path.parts:
            raise Damaged(f"{SUMS} of {os.fspath(folder)!r} has a line {line!r}.")
        found[match[2]] = match[1]
    return found


def files(folder: Path) -> list[str]:
    """The names of all that is below `folder` and no folder, in order."""
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(folder: Path, name: str, said: Mapping[str, str]) -> None:
    path = folder / name
    if not path.is_file() or path.is_symlink():
        raise Damaged(f"{str(path)!r} is missing, and {SUMS} lists it: fetch it again.")
    if name not in said:
        raise Damaged(f"{SUMS} of {str(folder)!r} does not list {name!r}.")
    if digest(path) != said[name]:
        raise Damaged(
            f"{str(path)!r} is not the file that was released: its SHA-256 is not that "
            f"of {SUMS}. Fetch it again."
        )


def _named(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(path_names(path)): leaf for path, leaf in leaves}


def _without_paths(config: RunConfig) -> RunConfig:
    """Paths of the machine it was trained on say nothing elsewhere."""
    data = config.data
    path = data.path and ",".join(Path(part).name for part in data.path.split(","))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, path=path, tokenizer=Path(data.tokenizer).name),
    )
