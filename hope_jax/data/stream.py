"""Token ids to batches: shuffled rows for training, whole documents for evaluation.

Training reads rows of `seq_len + 1` ids through grain: the order depends on the seed
alone, and an iterator's state (a few numbers) goes on at the exact example. Grain
accepts a state of another pipeline without a word, so store `fingerprint` with it and
call `check_fingerprint` before it is restored.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

from hope_jax.data import reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How rows are cut, ordered and grouped.

    Attributes:
      seq_len: tokens that a row predicts.
      batch: rows of a step, over all processes.
      seed: of the order; each epoch is shuffled anew from it.
      workers: processes that read ahead; 0 reads in this one. The order is the same
        for any number, and an iterator's state fits any.
      shuffle: False keeps the order of the text.
      stretch: of `PackedRows`; 0 for `Rows`.

    Raises:
      ValueError: a field out of range.
    """

    seq_len: int
    batch: int
    seed: int
    workers: int = 0
    shuffle: bool = True
    stretch: int = 0

    def __post_init__(self):
        leasts = {"seq_len": 1, "batch": 1, "workers": 0, "stretch": 0}
        for name, least in leasts.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}.")


class Source(Protocol):
    """Rows of one length, by index."""

    @property
    def threads(self) -> int:
        """That read at a time, where rows are on a disk."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class Mixture:
    """Rows of several sources, each at its share of all.

    Of any stretch of rows each source gives its share, to within one; each is shuffled
    and repeated for itself. By index rows are those of the sources in turn, in that
    proportion and in their order.

    Args:
      parts: sources and their shares.

    Raises:
      ValueError: a share that is not above 0.
    """

    def __init__(self, parts: Sequence[tuple[Source, float]]):
        for _, share in parts:
            if not share > 0:
                raise ValueError(f"A share must be above 0, got {share}.")
        self.parts = tuple(parts)
        self.threads = max(source.threads for source, _ in parts)
        plain = [(grain.MapDataset.source(source), share) for source, share in parts]
        self._mixed = _mixed([(part.repeat(), share) for part, share in plain])

    def __len__(self) -> int:
        return sum(len(source) for source, _ in self.parts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self._mixed[index]
        assert row is not None
        return row


def _mixed(parts: Sequence[tuple[grain.MapDataset, float]]) -> grain.MapDataset:
    datasets, shares = zip(*parts, strict=True)
    total = sum(shares)
    return grain.MapDataset.mix(datasets, [share / total for share in shares])


def _ordered(rows: Source, config: "StreamConfig", part: int = 0) -> grain.MapDataset:
    """All rows, endless, as the seed says; each part of a mixture by one of its own."""
    if isinstance(rows, Mixture):
        return _mixed(
            [
                (_ordered(source, config, i), share)
                for i, (source, share) in enumerate(rows.parts)
            ]
        )
    dataset = grain.MapDataset.source(rows).seed((config.seed + part) % 2**32)
    return (dataset.shuffle() if config.shuffle else dataset).repeat()


class Rows:
    """Documents laid end to end and cut into rows: a random-access source for grain.

    Row `i` holds ids `i * seq_len` to `(i + 1) * seq_len`, both included: rows share
    one id, and each id but the very first is predicted once. The tail that fills no row
    is dropped; `dropped` counts its ids.

    Args:
      documents: int[N] each, led by `bos`.
      seq_len: tokens that a row predicts.
      vocab_size: ids must lie in `[0, vocab_size)`.

    Raises:
      ValueError: an id outside the vocabulary, fewer ids than one row, or `seq_len`
        below 1.
    """

    threads: int = 0  # in memory they would only wait for one another

    def __init__(
        self, documents: Sequence[np.ndarray], *, seq_len: int, vocab_size: int
    ):
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {seq_len}.")
        check_tokens(documents, vocab_size)
        self._ids = np.concatenate([np.zeros(0, np.int32), *documents], dtype=np.int32)
        self._seq_len = seq_len
        self._rows = max(0, self._ids.size - 1) // seq_len
        if self._rows < 1:
            raise ValueError(
                f"{len(documents)} documents hold {self._ids.size} tokens, but one row"
                f" of seq_len={seq_len} needs {seq_len + 1}. Use a shorter seq_len or"
                " more text."
            )
        self.dropped = self._ids.size - 1 - self._rows * seq_len

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        start = index * self._seq_len
        return {"tokens": self._ids[start : start + self._seq_len + 1]}

    def __repr__(self) -> str:
        return f"Rows({self._rows} of {self._seq_len} tokens)"


class PackedRows(Rows):
    """Rows in which every document begins at a multiple of `stretch` tokens.

    Row `i` is as in `Rows`, of a text in which documents are that far apart, and comes
    with the index of the document of each of its ids, `document`; -1 where a document
    is over and the next has not begun. A token is predicted from its own document only.

    Args:
      documents: int[N] each, led by `bos`.
      seq_len: tokens that a row predicts, a multiple of `stretch`.
      vocab_size: ids must lie in `[0, vocab_size)`.
      stretch: tokens.

    Raises:
      ValueError: as `Rows`; or `seq_len` is no multiple of `stretch`.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        *,
        seq_len: int,
        vocab_size: int,
        stretch: int,
    ):
        if stretch < 1 or seq_len % stretch:
            raise ValueError(
                f"seq_len ({seq_len}) must be a multiple of stretch ({stretch}), at "
                "least 1."
            )
        check_tokens(documents, vocab_size)
        laid, owners = [], []
        for index, ids in enumerate(documents):
            width = -(-ids.size // stretch) * stretch
            laid.append(np.pad(ids.astype(np.int32), (0, width - ids.size)))
            owners.append(np.full(width, -1, np.int32))
            owners[-1][: ids.size] = index
        super().__init__(laid, seq_len=seq_len, vocab_size=vocab_size)
        self._owners = np.concatenate(owners)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = super().__getitem__(index)
        start = index * self._seq_len
        return row | {"document": self._owners[start : start + self._seq_len + 1]}


def rows_of(
    documents: Sequence[np.ndarray], *, seq_len: int, vocab_size: int, stretch: int
) -> Rows:
    """`PackedRows`, or `Rows` with a `stretch` of 0."""
    if stretch:
        return PackedRows(
            documents, seq_len=seq_len, vocab_size=vocab_size, stretch=stretch
        )
    return Rows(documents, seq_len=seq_len, vocab_size=vocab_size)


def batches(
    rows: Source,
    config: StreamConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """An endless dataset of `{"tokens": int32[batch, seq_len + 1]}`, and of `document`
    likewise for `PackedRows`.

    `iter` of it has grain's `get_state` and `set_state`; call `close` on an iterator
    with workers when done. With several processes each reads `batch / process_count`
    rows, every `process_count`-th of the common order, so that step `n` sees the same
    rows over all of them however many there are.

    Raises:
      ValueError: fewer rows than one batch; a batch that the processes cannot share
        equally; rows of another `seq_len`; workers where absl flags are not parsed.
    """
    if len(rows) < config.batch:
        raise ValueError(
            f"The text gives {len(rows)} rows of seq_len={config.seq_len}, fewer than"
            f" one batch of {config.batch}. Use a smaller batch, a shorter seq_len or"
            " more text."
        )
    width = rows[0]["tokens"].size
    if width != config.seq_len + 1:
        raise ValueError(
            f"rows were cut for seq_len={width - 1}, but config.seq_len is"
            f" {config.seq_len}."
        )
    reading.check(config, process_index, process_count, "rows")
    dataset = _ordered(rows, config)[process_index::process_count]
    return reading.batched(dataset, config, process_count, rows.threads)


def fingerprint(
    config: StreamConfig,
    corpus_sha: str,
    tokenizer_fingerprint: str,
    *,
    process_count: int = 1,
) -> dict[str, int | bool | str]:
    """What an iterator's state belongs to; JSON, to be stored with a checkpoint."""
    settings = dataclasses.asdict(config)
    del settings["workers"]  # any number of them reads the same
    if not config.stretch:  # as before there was one
        del settings["stretch"]
    return {
        **settings,
        "process_count": process_count,
        "corpus": corpus_sha,
        "tokenizer": tokenizer_fingerprint,
    }


def check_fingerprint(saved: Mapping, current: Mapping) -> None:
    """Refuses to go on with another stream than the one that was saved.

    Raises:
      ValueError: names every field that differs, with both values.
    """
    differing = []
    for name in sorted({*saved, *current} - {"workers"}):  # which were once a part
        was, now = (
            repr(side[name]) if name in side else "absent" for side in (saved, current)
        )
        if was != now:
            differing.append(f"  {name}: saved {was}, now {now}")
    if differing:
        raise ValueError(
            "The data of the checkpoint is not the data of this run:\n"
            + "\n".join(differing)
            + "\nGive this run the saved values, or start a new one."
        )


def check_tokens(documents: Sequence[np.ndarray], vocab_size: int) -> None:
    """Refuses ids that an embedding table would read as something else, or as NaN.

    Raises:
      ValueError: names the document's index, the position and the value.
    """
    for index, ids in enumerate(documents):
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
            raise ValueError(
                f"documents[{index}] must be whole numbers in one dimension, at least"
                f" one; got {ids.dtype} of shape {ids.shape}."
            )
        if ids.min() < 0 or ids.max() >= vocab_size:
            at = np.flatnonzero((ids < 0) | (ids >= vocab_size))[0]
            raise ValueError(
                f"Token {ids[at]} at position {at} of documents[{index}] lies outside"
                f" [0, {vocab_size}). Encode the text with the tokenizer of the model."
            )


class Windows(NamedTuple):
    """A group of rows to score, `n` windows long. All arrays are [B, n * window].

    Attributes:
      tokens: int32, what the model reads.
      targets: int32, what it should say next; 0 where nothing is scored.
      mask: bool, which targets are scored.
      document: int32, the index of the target's document; -1 where nothing is scored.
    """

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    document: np.ndarray


def evaluation_windows(
    documents: Sequence[np.ndarray], *, window: int, batch: int, carried: bool
) -> Iterator[Windows]:
    """Groups whole documents for scoring. Each token after `bos` is scored once.

    A group starts from a fresh state, and the state is carried along its windows
    `[:, i * window : (i + 1) * window]`. Every group has `batch` rows and a multiple of
    `window` columns (rows end in masked tokens; whole rows may be masked), so one
    compiled function serves every call.

    Args:
      documents: int[1 + N] each, led by `bos`, which is read and never scored.
      window: tokens of one call.
      batch: rows of a group.
      carried: False: a row is one document, the longest first, so that rows of one
        group are of similar length. True: one group, whose rows are `batch` streams;
        each document in turn goes to the stream that is shortest so far.

    Raises:
      ValueError: `window` or `batch` below 1, or nothing to score.
    """
    for name, value in (("window", window), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    scored = [index for index, ids in enumerate(documents) if ids.size > 1]
    if not scored:
        raise ValueError(
            f"None of {len(documents)} documents has a token after bos to score."
        )
    if carried:
        streams: list[list[int]] = [[] for _ in range(batch)]
        lengths = [0] * batch
        for index in scored:
            shortest = lengths.index(min(lengths))
            streams[shortest].append(index)
            lengths[shortest] += documents[index].size
        groups = [streams]
    else:
        scored.sort(key=lambda index: -documents[index].size)  # stable
        alone = [[index] for index in scored]
        groups = [alone[i : i + batch] for i in range(0, len(alone), batch)]
    return (_windows(documents, group, window, batch) for group in groups)


def _windows(
    documents: Sequence[np.ndarray],
    group: Sequence[Sequence[int]],
    window: int,
    batch: int,
) -> Windows:
    """Each row the concatenation of its documents, read up to the last but one id."""
    longest = max(sum(documents[index].size for index in row) for row in group) - 1
    shape = (batch, -(-longest // window) * window)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    document = np.full(shape, -1, np.int32)
    for b, row in enumerate(group):
        start = 0
        for index in row:
            ids = documents[index]
            stop = start + ids.size
            # The last id is read as well when another document follows it.
            read = ids[: shape[1] - start]
            tokens[b, start : start + read.size] = read
            targets[b, start : stop - 1] = ids[1:]
            document[b, start : stop - 1] = index
            start = stop
    return Windows(tokens, targets, document >= 0, document)
