"""Checkpoints that are checked: what comes back is what was saved, or it is refused.

Orbax writes and rotates them. It restores flipped bits and casts types without a word,
and never falls back to an older step; so each checkpoint carries a manifest with the
type, shape and digest of every array, and a restore holds what it read against that.

    <directory>/<step>/params, state   arrays, by name
                       data            where the data iterator stands
                       meta            config, data fingerprint, manifest
"""

import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import grain
import grain.checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from hope_jax.core import config as config_lib
from hope_jax.data import reading, stream, tokenizer
from hope_jax.memory.flow import FlowState
from hope_jax.models import lm
from hope_jax.optim.groups import path_names
from hope_jax.train import guard as guard_lib
from hope_jax.train import limits, metrics, processes
from hope_jax.train.config import RunConfig
from hope_jax.train.folder import try_folder
from hope_jax.train.state import TrainState

FOLDER = "checkpoints"
TOKENIZER = "tokenizer.json"

# A resumed run may change these; they do not touch what it computes.
_FREE = (
    *("train.checkpoint_every:", "train.keep:", "train.workers:", "data.path:"),
    *("guard.give_up:", "guard.returns:", "guard.back:"),
    *("guard.patience:", "guard.long_patience:"),
    *("train.mesh:", "train.gather:"),
)
_FORMAT = 2
# Both are of 256 bits; BLAKE3 is three times as fast on one core and uses several.
_DIGESTS = {
    1: hashlib.sha256,
    2: functools.partial(blake3.blake3, max_threads=blake3.blake3.AUTO),
}
_RATES = "rates"
_OLD_RATES = (
    "\nA run of an earlier version, in which only CMS levels faster than a row had "
    "inner rates, can be read (evaluated, generated from) but not gone on with."
)
_PART = re.compile(r"[A-Za-z0-9_-]+")


class Damaged(Exception):
    """A checkpoint that is not what was saved. Names the step and what is wrong."""


class ConfigMismatch(ValueError):
    """A checkpoint of another run. Names each field that differs, with both values."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written. Names the step."""


class Restored(NamedTuple):
    """What `restore_params` gives."""

    config: RunConfig
    params: PyTree
    step: int


class Place(grain.DatasetIterator):
    """Where a data iterator stood: what `save` needs of one that has moved on.

    Args:
      state: its `get_state()`.
    """

    def __init__(self, state: Any):
        super().__init__()
        self._state = state

    def __next__(self):
        raise StopIteration

    def get_state(self) -> Any:
        return self._state

    def set_state(self, state: Any) -> None:
        self._state = state


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are, or will be.
      keep: newest steps kept; None for all.
      read_only: never create, rotate or set aside anything.

    Attributes:
      lineage: what has happened to the run, which is saved with every step: that it was
        begun from another's, extended, or went back. Each has `event` and `step`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int | None = None,
        read_only: bool = False,
    ):
        self.directory = Path(directory).absolute()
        self._keep, self._read_only = keep, read_only
        self._saving: int | None = None
        self.lineage: list[dict[str, Any]] = []
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        if not self._read_only and processes.writes():
            # Orbax would do so in a thread, which complains when an early error ends
            # the program. A save that has just failed may still be writing: what it
            # adds is left for the next start.
            for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            # And wait for minutes for a folder that cannot be made.
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SaveFailed(
                    f"{self.directory} cannot be made: {error.strerror}. Move away "
                    "what is there, or give another folder."
                ) from None
        # Its own read_only warns that it is, and does no more where nothing is saved.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=not self._read_only
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that were written to the end, in order. Says nothing of damage."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        iterator: Any,
        config: RunConfig,
        fingerprint: Mapping[str, Any],
    ) -> None:
        """Starts to write `state` and returns; `state` may be donated right after.

        Args:
          step: later than all steps saved so far.
          state: of the run after `step` steps.
          iterator: grain's iterator, standing after the batch of `step`, or the `Place`
            where it stood then.
          config: of the run.
          fingerprint: of the data (`hope_jax.data.stream.fingerprint`).

        Raises:
          SaveFailed: the save before this one failed, or this one cannot start.
        """
        if self._read_only:
            raise _save_failed(step, self.directory, "it was opened to be read")
        self.wait()
        try:  # Orbax would wait for minutes for a folder that cannot be made
            if processes.writes():
                try_folder(self.directory)
        except OSError as error:
            raise _save_failed(step, self.directory, error.strerror) from None
        params, rest = _arrays(state.params, "params"), _arrays(_rest(state), "state")
        meta = {
            "format": _FORMAT,
            "step": step,
            "config": config_lib.to_json(config),
            "fingerprint": dict(fingerprint),
            "params": manifest(params),
            "state": manifest(rest),
            "data": _json_digest(iterator.get_state()),
            "versions": metrics.versions("orbax-checkpoint", "grain"),
            "lineage": self.lineage,
        }
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            state=ocp.args.StandardSave(rest),
            data=grain.checkpoint.CheckpointSave(iterator),
            meta=ocp.args.JsonSave({"body": meta, "sha256": _json_digest(meta)}),
        )
        self._saving = step
        try:
            started = self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise _save_failed(step, self.directory, error) from error
        if not started:
            raise _save_failed(step, self.directory, "Orbax refused the step")

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          SaveFailed: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise _save_failed(self._saving, self.directory, error) from error

    def close(self) -> None:
        """Waits and lets go of threads and files."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def readable(self) -> bool:
        """Whether any step says of which config it is: then this program wrote it."""
        for step in self.steps():
            try:
                self._meta(step)
                return True
            except Damaged:
                continue
        return False

    def check_config(self, config: RunConfig) -> None:
        """Refuses to go on with another run; reads the newest readable config alone.

        Raises:
          ConfigMismatch: names each field, with both values.
        """
        for step in reversed(self.steps()):
            try:
                meta = self._meta(step)
            except Damaged:
                continue  # `restore` reports it
            _check_config(meta["config"], config, step)
            return

    def restore(
        self,
        like: TrainState,
        *,
        iterator: Any,
        config: RunConfig,
        fingerprint: Mapping[str, Any],
    ) -> tuple[TrainState, int] | None:
        """The newest state that is what was saved, and its step; None if none is there.

        A damaged step is reported, moved beside the directory, and the one before it is
        tried: what it held will be written again.

        Args:
          like: shapes, types and shardings (`hope_jax.train.state.abstract`).
          iterator: grain's iterator, which is moved to where the step left it; None for
            none.
          config: of this run; must be the saved one.
          fingerprint: of this run's data; must be the saved one, but for the number of
            processes.

        Raises:
          ConfigMismatch: config, data, or the type or shape of an array differs.
          Damaged: no step is intact; names the reason for each.
        """

        def read(step):
            meta = self._meta(step)
            _check_config(meta["config"], config, step)
            then = dict(meta["fingerprint"])
            count = {"process_count": then.get("process_count", 1)}  # is free
            try:
                stream.check_fingerprint({**then, **count}, {**fingerprint, **count})
            except ValueError as error:
                raise ConfigMismatch(str(error)) from None
            params = self._tree(step, "params", like.params, meta)
            known = like.guard
            if known is not None and "guard.seen" not in meta["state"]:
                known = None  # of a version without one: it begins
            rest = self._tree(step, "state", _rest(like._replace(guard=known)), meta)
            if iterator is not None:
                iterator.set_state(self._place(step, meta, fingerprint))
            guard = rest.get("guard")
            if guard is None and like.guard is not None:
                places = jax.tree.map(lambda leaf: leaf.sharding, like.guard)
                guard = jax.device_put(guard_lib.begin(config.guard.window), places)
            level = rest["level"]._replace(params=params)
            self.lineage = list(meta.get("lineage", ()))
            before, after = meta["config"]["train"]["steps"], config.train.steps
            if before != after:
                self.tell("extended", step, steps=[before, after])
            return TrainState(level, rest["key"], guard), step

        found = self._newest(read)
        if found is not None and not self._read_only:
            self._set_aside([later for later in self.steps() if later > found[1]])
        return found

    def restore_params(
        self,
        expected: RunConfig | Sequence[RunConfig] | None = None,
        sharding: Any = None,
    ) -> Restored:
        """The newest parameters that are what was saved; see the function below."""
        wanted = expected or ()
        wanted = [wanted] if isinstance(wanted, RunConfig) else wanted
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def read(step):
            meta = self._meta(step)
            for one in wanted:
                _check_config(meta["config"], one, step)
            config = config_lib.from_json(RunConfig, meta["config"])
            limits.check_model(config.model)
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                lm.abstract(config.model),
            )
            # Of versions too in which slow CMS levels had no inner rate: theirs begins.
            grown = {_RATES: lm.first_rates(config.model)} if config.model.fast else {}
            params = self._tree(step, "params", like, meta, grown)
            return Restored(config, params, step)

        found = self._newest(read)
        if found is None:
            raise FileNotFoundError(f"No checkpoint under {self.directory}.")
        return found

    def verify(self, step: int) -> int:
        """Reads all arrays of `step`, holds them against its manifest, returns `step`.

        Raises:
          Damaged: names the step and what is wrong.
        """
        meta = self._meta(step)
        for item in ("params", "state"):
            self._read(step, item, meta, jax.local_devices()[0])
        return step

    def _newest(self, read: Callable[[int], Any]) -> Any:
        """`read(step)` of the newest step that is intact; None if there is no step."""
        reasons = []
        for step in reversed(self.steps()):
            found, damage = None, None
            try:
                found = read(step)
            except Damaged as error:
                damage = error
            if processes.all_true(damage is None):
                return found
            damage = damage or _damaged(step, self.directory, "says another process")
            logging.warning("%s Trying the step before.", damage)
            reasons.append(str(damage))
        if not reasons:
            return None
        raise Damaged(
            f"No checkpoint under {self.directory} is intact:\n" + "\n".join(reasons)
        )

    def _meta(self, step: int) -> dict[str, Any]:
        saved = self._item(step, "meta", ocp.args.JsonRestore())
        if not isinstance(saved, dict) or set(saved) != {"body", "sha256"}:
            raise _damaged(step, self.directory, "its meta is not what was written")
        if _json_digest(saved["body"]) != saved["sha256"]:
            raise _damaged(step, self.directory, "the checksum of its meta is wrong")
        meta = saved["body"]
        if not isinstance(meta, dict) or "format" not in meta:
            raise _damaged(step, self.directory, "its meta has no format")
        if meta["format"] not in _DIGESTS:
            raise ConfigMismatch(
                f"Step {step} has checkpoint format {meta['format']}, but this version "
                f"reads {' and '.join(map(str, _DIGESTS))}; it was written by "
                f"{meta.get('versions', {}).get('hope_jax', 'another version')}."
            )
        if meta["step"] != step:
            raise _damaged(step, self.directory, f"it is really step {meta['step']}")
        return meta

    def _tree(
        self,
        step: int,
        item: str,
        like: PyTree,
        meta: Mapping,
        grown: Mapping[str, jax.Array] | None = None,
    ) -> PyTree:
        """`grown` are vectors that may be saved shorter; they then go on as here."""
        wanted = _targets(like, item, meta[item])
        targets, rest = dict(wanted), {}
        for name, whole in (grown or {}).items():
            count = meta[item][name][1][0] if name in meta[item] else 0
            if count < len(whole):
                rest[name] = whole[count:]
                targets[name] = jax.ShapeDtypeStruct(
                    (count,), whole.dtype, sharding=wanted[name].sharding
                )
        saved = {n: t for n, t in targets.items() if n in meta[item] or n not in rest}
        _check_arrays(meta[item], saved, item, step)
        flat = self._read(step, item, meta, saved)
        for name, more in rest.items():
            known = [flat[name]] if name in flat else []
            flat[name] = jax.device_put(
                jnp.concatenate([*known, more]), wanted[name].sharding
            )
        leaves, treedef = jax.tree.flatten(like)
        return treedef.unflatten(
            jax.random.wrap_key_data(flat[name]) if _is_key(leaf) else flat[name]
            for name, leaf in zip(wanted, leaves, strict=True)
        )

    def _read(self, step: int, item: str, meta: Mapping, targets: Any) -> dict:
        limits.check_declared(meta[item], f"{item} of step {step} in {self.directory}")
        if not isinstance(targets, dict):
            sharding = jax.sharding.SingleDeviceSharding(targets)
            targets = {
                name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
                for name, (dtype, shape, _) in meta[item].items()
            }
        flat = self._item(step, item, ocp.args.StandardRestore(targets))
        found = manifest(flat, meta["format"])
        wrong = [name for name in meta[item] if found[name] != meta[item][name]]
        if wrong:
            raise _damaged(
                step, self.directory, f"checksums are wrong in {item}: {wrong[:3]}"
            )
        return flat

    def _place(self, step: int, meta: Mapping, now: Mapping) -> dict[str, Any]:
        """Where this process's data goes on. All that saved it said the same, for they
        read in step; `now` they may be more, or fewer."""
        try:
            (file,) = (self.directory / str(step) / "data").glob("process_0-of-*.json")
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if not _says_damage(error):
                raise
            text = f"{type(error).__name__} in data: {str(error)[:300]}"
            raise _damaged(step, self.directory, text) from error
        if _json_digest(state) != meta["data"]:
            raise _damaged(
                step, self.directory, "the state of its data is not as saved"
            )
        before, count = (
            said.get("process_count", 1) for said in (meta["fingerprint"], now)
        )
        return reading.shared(state, before, count)

    def _item(self, step: int, item: str, arguments: Any) -> Any:
        try:
            composite = ocp.args.Composite(**{item: arguments})
            return self._manager.restore(step, args=composite)[item]
        except Exception as error:  # whatever the bytes made of the libraries
            if not _says_damage(error):
                raise
            text = f"{type(error).__name__} in {item}: {str(error)[:300]}"
            raise _damaged(step, self.directory, text) from error

    def tell(self, event: str, step: int, **more: Any) -> None:
        """Adds to the lineage, which the next save writes."""
        self.lineage.append({"event": event, "step": step, **more})

    def forget_after(self, step: int) -> None:
        """Moves the steps after `step` away, for a run that goes back to it."""
        self._set_aside([later for later in self.steps() if later > step], "returned")

    def _set_aside(self, steps: list[int], why: str = "damaged") -> None:
        """Moves steps away: Orbax writes no step older than its last."""
        if not steps:
            return
        beside = self.directory.with_name(f"{self.directory.name}.{why}")
        if processes.writes():
            beside.mkdir(exist_ok=True)
            for step in steps:
                logging.warning("Moving %s step %d to %s.", why, step, beside)
                target = beside / str(step)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(self.directory / str(step), target)
        processes.wait("steps are moved away")
        self._manager.close()
        self._manager = self._open()


def restore_params(
    directory: str | os.PathLike,
    expected: RunConfig | Sequence[RunConfig] | None = None,
) -> Restored:
    """Config, parameters and step of the newest intact checkpoint, for evaluation.

    Args:
      directory: a workdir, or its `checkpoints` folder.
      expected: a config, or several, that the saved one must equal.

    Raises:
      FileNotFoundError: no checkpoint there.
      ConfigMismatch: the saved config is not `expected`; names each field.
      Damaged: no step is intact.
    """
    with Checkpoints(find(directory), read_only=True) as checkpoints:
        return checkpoints.restore_params(expected)


def restore_origin(directory: str | os.PathLike) -> tuple[Restored, dict[str, Any]]:
    """What another run can begin from, and what its lineage says of that.

    Raises:
      FileNotFoundError: no checkpoint there.
      Damaged: no step is intact.
    """
    with Checkpoints(find(directory), read_only=True) as checkpoints:
        found = checkpoints.restore_params()
        meta = checkpoints._meta(found.step)
    return found, {
        "path": str(Path(directory).absolute()),
        "step": found.step,
        "sha256": _json_digest(meta["params"]),
        "lineage": meta.get("lineage", []),
    }


def saved_meta(directory: str | os.PathLike) -> dict[str, Any]:
    """What the newest checkpoint that can be read says of itself: `config`, the
    `fingerprint` of its data, `versions`, `lineage`; reads no array.

    Raises:
      FileNotFoundError: no checkpoint there.
      Damaged: none says anything.
    """
    with Checkpoints(find(directory), read_only=True) as checkpoints:
        found = checkpoints._newest(checkpoints._meta)
    if found is None:
        raise FileNotFoundError(f"No checkpoint under {directory}.")
    return found


def saved_config(directory: str | os.PathLike) -> RunConfig:
    """The config of `saved_meta`."""
    return config_lib.from_json(RunConfig, saved_meta(directory)["config"])


def restore_tokenizer(directory: str | os.PathLike) -> tokenizer.Tokenizer:
    """The tokenizer of a run, which must be the one its checkpoints were made with.

    Raises:
      FileNotFoundError: no checkpoint, or no tokenizer beside it.
      ConfigMismatch: another tokenizer.
    """
    folder = find(directory)
    path = folder.parent / TOKENIZER
    if not path.exists():
        raise FileNotFoundError(f"No {TOKENIZER} beside {folder}.")
    found, saved = tokenizer.load(path), saved_meta(folder)["fingerprint"]
    if found.fingerprint != saved["tokenizer"]:
        raise ConfigMismatch(
            f"{path} is not the tokenizer of its checkpoints: saved "
            f"{saved['tokenizer']}, now {found.fingerprint}."
        )
    return found


def latest_verified_step(directory: str | os.PathLike) -> int | None:
    """The newest step whose every array is what was saved; None if there is none."""
    try:
        folder = find(directory)
    except FileNotFoundError:
        return None
    with Checkpoints(folder, read_only=True) as checkpoints:
        try:
            return checkpoints._newest(checkpoints.verify)
        except Damaged:
            return None


def find(directory: str | os.PathLike) -> Path:
    """The folder of checkpoints that `directory` is, or holds.

    Raises:
      FileNotFoundError: neither.
    """
    directory = Path(directory)
    for folder in (directory / FOLDER, directory):
        if folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir()):
            return folder
    raise FileNotFoundError(
        f"No checkpoint in {str(directory)!r}; give the workdir of a run."
    )


def manifest(arrays: Mapping[str, Any], format: int = _FORMAT) -> dict[str, list]:
    """Type, shape and digest of every array: what a restore is held against.

    Args:
      arrays: by name.
      format: of the checkpoint, which says whether digests are BLAKE3 or SHA-256.
    """
    digest = _DIGESTS[format]

    def entry(host: np.ndarray) -> list:
        raw = np.ascontiguousarray(host).reshape(-1).view(np.uint8).data
        return [str(host.dtype), list(host.shape), digest(raw).hexdigest()]

    with futures.ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        # Gathered here, in one order, for that takes all processes.
        hosts = (np.asarray(jax.device_get(_addressable(a))) for a in arrays.values())
        return dict(zip(arrays, pool.map(entry, hosts), strict=True))


def params_digest(params: PyTree) -> str:
    """What `restore_origin` says of these parameters, if they are a checkpoint's."""
    return _json_digest(manifest(_arrays(params, "params")))


def _addressable(array: Any) -> Any:
    """An array that this process can read; processes gather in one order."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array
    if array.is_fully_replicated:
        return array
    assert isinstance(array.sharding, NamedSharding)
    whole = NamedSharding(array.sharding.mesh, PartitionSpec())
    return jax.jit(lambda a: a, out_shardings=whole)(array)


def _rest(state: TrainState) -> dict[str, Any]:
    """All of a state but its parameters, which are an item of their own."""
    rest = {"level": state.level._replace(params=None), "key": state.key}
    return rest if state.guard is None else rest | {"guard": state.guard}


def _arrays(tree: PyTree, item: str) -> dict[str, jax.Array]:
    """Leaves by name; keys as their data."""
    return {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for name, leaf in _named(tree, item).items()
    }


def _targets(
    like: PyTree, item: str, saved: Collection[str]
) -> dict[str, jax.ShapeDtypeStruct]:
    """What is wanted of each array, under the name by which it was saved."""

    def target(leaf):
        shape, dtype = leaf.shape, leaf.dtype
        if _is_key(leaf):
            data = jax.eval_shape(jax.random.key_data, _shape_of(leaf))
            shape, dtype = data.shape, data.dtype
        return jax.ShapeDtypeStruct(shape, dtype, sharding=leaf.sharding)

    named = now = _named(like, item)
    for places in _EARLIER:
        if set(named) == set(saved):
            break
        named = _named(like, item, places)
    if set(named) != set(saved):  # which a message then says of today's names
        named = now
    return {name: target(leaf) for name, leaf in named.items()}


# Before the parts of a memory's flow had names, they had places in a chain; where a
# memory learned all rows of a gradient at once, its rule was a chain inside that.
def _in_a_row(part: str, present: list[str]) -> str:
    return f"{present.index(part)}"


def _rule_apart(part: str, present: list[str]) -> str:
    rule = [name for name in present if name in ("step", "momentum")]
    if part in rule:
        return f"0.{rule.index(part)}"
    return f"{1 + present.index(part) - len(rule)}"


_EARLIER = (_in_a_row, _rule_apart)


def _paths(tree: PyTree, places: Callable[[str, list[str]], str] | None):
    """The names on the way to each leaf; of the parts of flows their `places`."""
    flatten = jax.tree_util.tree_flatten_with_path
    is_flow = lambda node: isinstance(node, FlowState)  # noqa: E731
    for path, node in flatten(tree, is_leaf=is_flow if places else None)[0]:
        if places is None or not is_flow(node):
            yield path_names(path), node
            continue
        present = [n for n, part in node._asdict().items() if part is not None]
        for (first, *rest), leaf in flatten(node)[0]:
            (part,) = path_names((first,))
            place = places(part, present).split(".")
            yield (*path_names(path), *place, *path_names(tuple(rest))), leaf


def _named(
    tree: PyTree, item: str, places: Callable[[str, list[str]], str] | None = None
) -> dict[str, Any]:
    """Leaves by dotted name: independent of the containers, so of library versions."""
    named: dict[str, Any] = {}
    for parts, leaf in _paths(tree, places):
        for part in parts:
            if not _PART.fullmatch(part):
                raise ValueError(
                    f"{part!r} in {item} cannot name an array in a checkpoint: use "
                    "letters, digits, '_' and '-'."
                )
        name = ".".join(parts)
        if name in named:
            raise ValueError(f"Two arrays of {item} are both named {name!r}.")
        named[name] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _check_config(saved: Mapping, current: RunConfig, step: int) -> None:
    free = _FREE
    if _steps(saved) < current.train.steps:  # the run is extended
        free = (*free, "train.steps:")
    differing = [
        line
        for line in config_lib.differences(saved, current)
        if not line.startswith(free)
    ]
    if differing:
        raise ConfigMismatch(
            f"The checkpoint of step {step} is of another config:\n  "
            + "\n  ".join(differing)
            + "\nGive this run the saved values, or start a new one."
        )


def _steps(saved: Any) -> float:
    """`train.steps` of a saved config, if it has a number there."""
    try:
        return float(saved["train"]["steps"])
    except (TypeError, KeyError, ValueError):
        return math.inf


def _check_arrays(saved: Mapping, targets: Mapping, item: str, step: int) -> None:
    """Types and shapes before anything is read: Orbax would cast without a word."""

    def said(name):
        dtype, shape = saved[name][:2]
        return f"{dtype}{shape}"

    lines = []
    for name in [*saved, *(n for n in targets if n not in saved)]:
        before = said(name) if name in saved else "nothing"
        now = "nothing"
        if name in targets:
            now = f"{targets[name].dtype}{list(targets[name].shape)}"
        if before != now:
            lines.append(f"{item}.{name}: saved {before}, now {now}")
    if lines:
        raise ConfigMismatch(
            f"The arrays of step {step} are not those of this model:\n  "
            + "\n  ".join(lines)
            + (_OLD_RATES if any(f".{_RATES}: " in line for line in lines) else "")
        )


# What the system or a library may say of bytes that are as they were.
_NOT_DAMAGE = (MemoryError, ImportError, NotImplementedError, RecursionError)
_NOT_DAMAGE_SAID = re.compile(
    "RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|UNIMPLEMENTED|out of memory"
    "|Input/output error|Permission denied|Too many open files|Cannot allocate memory"
    "|Stale file handle|Operation not permitted",
    re.IGNORECASE,
)


def _says_damage(error: BaseException | None) -> bool:
    """Whether an error of reading can come from the bytes; those that led to it too."""
    while error is not None:
        if isinstance(error, _NOT_DAMAGE) or _NOT_DAMAGE_SAID.search(str(error)):
            return False
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                return False
        if isinstance(error, BaseExceptionGroup):
            return all(map(_says_damage, error.exceptions))
        error = error.__cause__ or error.__context__
    return True


def _json_digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _damaged(step: int, directory: Path, reason: str) -> Damaged:
    return Damaged(f"Checkpoint {directory / str(step)} is damaged: {reason}.")


def _save_failed(step: int | None, directory: Path, error: Any) -> SaveFailed:
    said = str(error) or repr(error)
    known = re.search(r": ([^:\[]+) \[os_error_code", said)  # by a library, at length
    said = known[1] if known else said.splitlines()[0][:300]
    return SaveFailed(
        f"The checkpoint of step {step} could not be written to {directory}: {said}. "
        "Steps before it are as they were; make room or rights, then resume."
    )
