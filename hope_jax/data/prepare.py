"""Text to prepared data, in parallel, and from where a stopped preparation left off.

A plan says which units make which shard, before any is read. A shard is made by one
process from the plan alone, written beside and renamed, its counts last; so the same
command makes the same bytes with any number of processes, however often it was stopped.

    plan.json                    what the command asked for, and the units of each shard
    shards/00000.json            the counts of a shard that is whole
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import process
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from hope_jax.data import prepared, sources, text, tokenizer, workers
from hope_jax.data.sources import Reading

PLAN = "plan.json"
SHARDS = "shards"
_LOCK = ".lock"
_GROUP = 64  # documents that are encoded together
_NAMES = 20  # of what was left out, that a shard's counts keep


class Preparing(ValueError):
    """What is in the folder is not what this command would make."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is made of what.

    Attributes:
      sources: as they were given.
      how: documents are found in them.
      held_out: share of documents for validation, chosen by the hash of their text, so
        that one that stands there twice is on one side.
      shard_bytes: about how much text a shard is made of.
      tokenizer: which tokenizer was asked for.
      fingerprint: of that tokenizer.
    """

    sources: tuple[str, ...]
    how: Reading
    held_out: float
    shard_bytes: int
    tokenizer: str
    fingerprint: str

    def __post_init__(self):
        if not self.sources:
            raise ValueError("Give a source: a path, hf:NAME or tfds:NAME.")
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"held_out must lie between 0 and 1, got {self.held_out}: some "
                "documents are needed to judge by."
            )
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, got {self.shard_bytes}.")


def train_tokenizer(
    given: Sequence[str], how: sources.Reading, vocab: int, most: int
) -> tokenizer.Tokenizer:
    """BPE of about `most` bytes of the sources, an equal part of each unit."""
    units = [unit for source in given for unit in sources.units(source, how)]
    share = max(1, most // len(units))

    def learned() -> Iterator[bytes]:
        for unit in units:
            left = share
            for data in sources.documents(unit, how, {}):
                yield data[:left]
                left -= len(data)
                if left <= 0:
                    break

    return tokenizer.train_bpe(learned(), vocab)


def shards_of(plan: Plan) -> list[list[sources.Unit]]:
    """The units of each shard: as many as have about `shard_bytes`, in their order."""
    shards: list[list[sources.Unit]] = []
    room = 0
    for source in plan.sources:
        for unit in sources.units(source, plan.how):
            size = unit.size if unit.changed else 4096 * unit.size  # of examples
            if room < size or not shards:
                shards.append([])
                room = plan.shard_bytes
            shards[-1].append(unit)
            room -= size
    return shards


def prepare(
    folder: str | os.PathLike,
    plan: Plan,
    tokens: tokenizer.Tokenizer,
    *,
    processes: int = 1,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> prepared.Prepared:
    """Makes a prepared folder, or what is missing of it.

    Args:
      folder: new, empty, or begun by the same plan.
      plan: what is made.
      tokens: the tokenizer of the plan.
      processes: that make shards at a time.
      told: is called with how much is done of how much: bytes of the sources.

    Raises:
      Preparing: the folder holds something else, or what another plan began.
      hope_jax.data.sources.Unreadable: a document that is no text.
      ValueError: no document was held out, or all were.
    """
    folder = Path(folder).expanduser().resolve()
    shards = shards_of(plan)
    said = {
        "format": prepared.FORMAT,
        "plan": dataclasses.asdict(plan) | {"sources": list(plan.sources)},
        "piece": prepared.PIECE,
        "shards": [[dataclasses.asdict(unit) for unit in units] for units in shards],
    }
    _check(folder, said)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(folder / _LOCK, timeout=0))
        except filelock.Timeout:
            raise Preparing(
                f"Another program prepares {str(folder)!r}; wait for it, or give "
                "another folder."
            ) from None
        _begin(folder, said, tokens)
        _make(folder, plan, shards, tokens, processes, told)
        _finish(folder, said, tokens, len(shards))
    return prepared.load(folder)


def _make(
    folder: Path,
    plan: Plan,
    shards: Sequence[Sequence[sources.Unit]],
    tokens: tokenizer.Tokenizer,
    processes: int,
    told: Callable[[int, int], None],
) -> None:
    """Makes the shards that are missing."""
    sizes = [sum(max(1, unit.size) for unit in units) for units in shards]
    done = [name for name in map(_name, range(len(shards))) if _is_whole(folder, name)]
    progress = sum(sizes[int(name)] for name in done)
    told(progress, sum(sizes))
    missing = [i for i in range(len(shards)) if _name(i) not in done]
    for number in _made(folder, plan, shards, missing, tokens, processes):
        progress += sizes[number]
        told(progress, sum(sizes))


def begun(folder: Path) -> Mapping[str, Any] | None:
    """What a plan has begun in a folder, None where there is nothing; only looks.

    Raises:
      Preparing: it is no folder, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise Preparing(f"{str(folder)!r} is no folder; give another.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names <= {f".{PLAN}", _LOCK}:  # a kill may leave these
        return None
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        if isinstance(before, dict) and isinstance(before.get("plan"), dict):
            return before
    raise Preparing(
        f"{str(folder)!r} holds something else already; give a folder for this alone."
    )


def _check(folder: Path, said: Mapping[str, Any]) -> None:
    """Refuses a folder that holds anything but what this plan began; only looks."""
    before = begun(folder)
    if before not in (None, said):
        plans = before["plan"], said["plan"]
        fields = [key for key in plans[1] if plans[0].get(key) != plans[1][key]]
        what = ", ".join(fields) or "files of its sources have changed since"
        raise Preparing(
            f"{str(folder)!r} was begun otherwise: {what}. Give the same command, or "
            "another folder."
        )


def _begin(folder: Path, said: Mapping[str, Any], tokens: tokenizer.Tokenizer) -> None:
    _check(folder, said)  # nobody was kept from it so far
    if not (folder / PLAN).exists():
        _write(folder / PLAN, said)
    (folder / SHARDS).mkdir(exist_ok=True)
    tokens.save(folder / prepared.TOKENIZER)


def _made(
    folder: Path,
    plan: Plan,
    shards: Sequence[Sequence[sources.Unit]],
    missing: Sequence[int],
    tokens: tokenizer.Tokenizer,
    processes: int,
) -> Iterator[int]:
    """Makes shards, and gives the number of each when it is whole."""
    jobs = [(folder, plan, tuple(shards[i]), _name(i)) for i in missing]
    if processes <= 1 or len(jobs) <= 1:
        for number, job in zip(missing, jobs, strict=True):
            _shard(*job, tokens)
            yield number
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),  # JAX may have threads
        initializer=_alone,
        initargs=(str(folder / prepared.TOKENIZER),),
    )
    try:
        waiting = {
            pool.submit(_shard_of_worker, job): number
            for number, job in zip(missing, jobs, strict=True)
        }
        for future in concurrent.futures.as_completed(waiting):
            future.result()
            yield waiting[future]
    except process.BrokenProcessPool:
        raise Preparing(
            "A process that prepares was killed, perhaps for want of memory. Give the "
            "same command with fewer --processes: it goes on."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_TOKENIZER: list[tokenizer.Tokenizer] = []  # of a worker


def _alone(path: str) -> None:
    workers.end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core
    _TOKENIZER[:] = [tokenizer.load(path)]


def _shard_of_worker(job: tuple) -> None:
    folder, plan, units, name = job
    _shard(folder, plan, units, name, _TOKENIZER[0])


def _shard(
    folder: Path,
    plan: Plan,
    units: Sequence[sources.Unit],
    name: str,
    tokens: tokenizer.Tokenizer,
) -> None:
    """Writes one shard; its counts are the last of it."""
    skipped: text.Skipped = {}
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(_Writer(folder, f"{split}-{name}", tokens))
            for split in prepared.SPLITS
        }

        def write(group: list[bytes]) -> None:
            for data, ids in zip(group, tokens.encode_batch(group), strict=True):
                held = _share(data) < plan.held_out
                writers["validation" if held else "train"].write(ids, len(data))

        group: list[bytes] = []
        size = 0
        for unit in units:
            for data in sources.documents(unit, plan.how, skipped):
                group.append(data)
                size += len(data)
                if len(group) == _GROUP or size > 1 << 20:
                    write(group)
                    group, size = [], 0
        write(group)
        counts = {split: writer.finish() for split, writer in writers.items()}
    _write(
        folder / SHARDS / f"{name}.json",
        {
            "name": name,
            **counts,
            "sources": prepared.digest([dataclasses.asdict(unit) for unit in units]),
            "skipped": {
                reason: {"count": len(names), "first": names[:_NAMES]}
                for reason, names in skipped.items()
            },
        },
    )


class _Writer:
    """A split of a shard, which is there when it is whole."""

    def __init__(self, folder: Path, name: str, tokens: tokenizer.Tokenizer):
        self._path = folder / f"{name}.array_record"
        self._lengths_path = folder / f"{name}.lengths"
        self._beside = folder / f".{name}.array_record"
        self._dtype, self._bos = prepared.dtype(tokens.vocab_size), tokens.bos
        self._writer: Any = None
        self._lengths: list[int] = []
        self._bytes = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_) -> None:
        if self._writer is not None:  # an error on the way
            self._writer.close()
            self._beside.unlink(missing_ok=True)

    def write(self, ids: np.ndarray, size: int) -> None:
        if self._writer is None:
            self._writer = prepared.array_record().ArrayRecordWriter(
                str(self._beside), "group_size:1,zstd:1"
            )
        whole = np.concatenate([np.array([self._bos]), ids]).astype(self._dtype)
        if whole.size >= 2**32:
            raise sources.Unreadable(
                f"A document of {whole.size:,} tokens is too long: cut it."
            )
        for start in range(0, whole.size, prepared.PIECE):
            self._writer.write(whole[start : start + prepared.PIECE].tobytes())
        self._lengths.append(whole.size)
        self._bytes += size

    def finish(self) -> dict[str, Any]:
        """What the manifest says of it."""
        counts = {
            "documents": len(self._lengths),
            "tokens": sum(self._lengths),
            "bytes": self._bytes,
        }
        if self._writer is None:
            return counts
        self._writer.close()
        self._writer = None
        lengths = np.array(self._lengths, "<u4").tobytes()
        beside = self._lengths_path.with_name(f".{self._lengths_path.name}")
        beside.write_bytes(lengths)
        os.replace(beside, self._lengths_path)
        with open(self._beside, "rb") as file:
            hashed = hashlib.file_digest(file, "sha256").hexdigest()
        size = self._beside.stat().st_size
        os.replace(self._beside, self._path)
        return counts | {
            "size": size,
            "sha256": hashed,
            "lengths": hashlib.sha256(lengths).hexdigest(),
        }


def _share(data: bytes) -> float:
    """A number in [0, 1) that a text decides."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8]) / 2**64


def _name(number: int) -> str:
    return f"{number:05d}"


def _is_whole(folder: Path, name: str) -> bool:
    try:
        shard = json.loads((folder / SHARDS / f"{name}.json").read_text("utf-8"))
        return all(
            path.stat().st_size == size
            for split in prepared.SPLITS
            for path, size in prepared.files(folder, shard, split)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _finish(
    folder: Path, said: Mapping[str, Any], tokens: tokenizer.Tokenizer, count: int
) -> None:
    shards = [
        json.loads((folder / SHARDS / f"{_name(i)}.json").read_text("utf-8"))
        for i in range(count)
    ]
    for split in prepared.SPLITS:
        if not sum(shard[split]["documents"] for shard in shards):
            total = sum(s[of]["documents"] for s in shards for of in prepared.SPLITS)
            raise ValueError(
                f"None of {total:,} documents is for {split}: choose another held_out "
                f"than {said['plan']['held_out']}, in another folder, or give more "
                "documents (a text file is one, unless a separator says where others "
                "begin)."
            )
    manifest = {
        "format": prepared.FORMAT,
        "tokenizer": tokens.fingerprint,
        "vocab_size": tokens.vocab_size,
        "piece": prepared.PIECE,
        "held_out": said["plan"]["held_out"],
        "shards": shards,
    }
    _write(folder / prepared.MANIFEST, manifest | {"sha256": prepared.digest(manifest)})


def _write(path: Path, data: Any) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def skipped(made: prepared.Prepared) -> dict[str, tuple[int, list[str]]]:
    """What was left out, by reason: how many documents, and the first of them."""
    found: dict[str, tuple[int, list[str]]] = {}
    for shard in made.manifest["shards"]:
        for reason, said in shard["skipped"].items():
            count, first = found.get(reason, (0, []))
            found[reason] = count + said["count"], [*first, *said["first"]][:_NAMES]
    return found
