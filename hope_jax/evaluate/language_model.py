"""Bits per byte of a language model on documents, in three modes of its memory.

A model that learns while it reads has no single score: it depends on what the memory
has seen. So every number here says its mode.

    reset     each document starts at the learned initial states
    carried   the memory goes on from document to document
    frozen    as `reset`, and no level moves while reading

Bits per byte is the total negative log-likelihood of the tokens over ln 2 and the
number of bytes that they spell. It compares models of any vocabulary with each other
and with file compressors. A tokenizer that can spell a text in several ways makes it an
upper bound. The token that starts a document is read and never scored.
"""

import functools
import gzip
import lzma
import math
import time
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.data.stream import Windows, evaluation_windows
from hope_jax.data.text import Document
from hope_jax.data.tokenizer import Tokenizer, encode_documents
from hope_jax.models import learning
from hope_jax.models.config import ModelConfig
from hope_jax.stream.reader import Reader, check_tokenizer

Mode = Literal["reset", "carried", "frozen"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Score(NamedTuple):
    """What reading documents in one mode cost. Arrays have one entry a document.

    Attributes:
      mode: how the memory was treated.
      names: the documents, in the order given.
      nats: float64, negative log-likelihood.
      tokens: int64, tokens scored.
      bytes: int64, bytes of text.
    """

    mode: Mode
    names: tuple[str, ...]
    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """All documents as one text."""
        return float(self.nats.sum() / (math.log(2) * self.bytes.sum()))

    @property
    def per_document(self) -> np.ndarray:
        """Bits per byte of each document, float64."""
        return self.nats / (math.log(2) * self.bytes)


class Compression(NamedTuple):
    """What file compressors need for documents. Arrays have one entry a document.

    Attributes:
      names: the documents, in the order given.
      gzip: int64, bytes that `gzip -9` writes for the document by itself.
      xz: int64, bytes that `xz -9` writes.
      bytes: int64, bytes of text.
    """

    names: tuple[str, ...]
    gzip: np.ndarray
    xz: np.ndarray
    bytes: np.ndarray

    @property
    def gzip_bits_per_byte(self) -> float:
        return float(8 * self.gzip.sum() / self.bytes.sum())

    @property
    def xz_bits_per_byte(self) -> float:
        return float(8 * self.xz.sum() / self.bytes.sum())


def compression(documents: Sequence[Document]) -> Compression:
    """Sizes under gzip -9 (without a file name or time) and xz -9, each by itself.

    >>> sizes = compression([Document("a", b"a" * 1000), Document("b", b"b" * 1000)])
    >>> sizes.gzip.tolist(), round(sizes.gzip_bits_per_byte, 3)
    ([29, 29], 0.232)
    """
    data = [document.data for document in _some(documents)]
    return Compression(
        names=tuple(document.name for document in documents),
        gzip=np.array([len(gzip.compress(d, 9, mtime=0)) for d in data]),
        xz=np.array([len(lzma.compress(d, preset=9)) for d in data]),
        bytes=np.array([len(d) for d in data]),
    )


def score(
    reader: Reader,
    params: PyTree,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    mode: Mode,
    rows: int = 2,
    window: int = 512,
) -> Score:
    """Reads `documents` and counts what each one cost.

    The rows of a batch are readers that know nothing of each other; all read windows of
    one length, so a mode is compiled once. In `reset` and `frozen` every row of a group
    is one document, and the numbers do not depend on `rows` or `window`. In `carried`
    the documents are dealt to `rows` streams, or fewer, so that there are two or more
    for each: the fewer the streams, the more each of them reads.

    Args:
      reader: the model.
      params: its parameters.
      tokenizer: as in training.
      documents: what to read; each needs at least one byte.
      mode: one of `MODES`.
      rows: most documents to read side by side.
      window: tokens of a step, rounded up to a multiple of the model's span.

    Raises:
      ValueError: an unknown mode, `rows` or `window` below 1, no documents, an empty
        document, a tokenizer with more ids than the model, or a row, in whole windows,
        that it has no room for.
      FloatingPointError: a document's score is not finite.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}.")
    check_tokenizer(reader, tokenizer)
    window = reader.window(window)
    most = len(_some(documents))
    rows = min(rows, max(1, most // 2) if mode == "carried" else most)
    ids = encode_documents(tokenizer, documents)

    nats = np.zeros(len(ids))
    for group in evaluation_windows(
        ids, window=window, batch=rows, carried=mode == "carried"
    ):
        reader.check_room(f"a row in mode {mode!r}", group.tokens.shape[1])
        for cost, document in _costs(reader, params, group, window, mode != "frozen"):
            scored = document >= 0
            np.add.at(nats, document[scored], cost[scored])

    names = tuple(document.name for document in documents)
    if not np.isfinite(nats).all():
        bad = names[int(np.argmin(np.isfinite(nats)))]
        raise FloatingPointError(
            f"The score of {bad!r} is not finite in mode {mode!r}: the model's logits"
            " overflowed or were NaN."
        )
    return Score(
        mode=mode,
        names=names,
        nats=nats,
        tokens=np.array([len(i) - 1 for i in ids]),
        bytes=np.array([len(document.data) for document in documents]),
    )


def modes_of(config: ModelConfig, documents: Sequence[Document]) -> tuple[Mode, ...]:
    """The modes that differ: `carried` where there are several documents, `frozen` of a
    model that learns while it reads."""
    learns = bool(config.fast) or learning.has_memories(config)
    wanted = {"reset": True, "carried": len(documents) > 1, "frozen": learns}
    return tuple(mode for mode in MODES if wanted[mode])


def evaluate(
    reader: Reader,
    params: PyTree,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    modes: Sequence[Mode] = MODES,
    rows: int = 2,
    window: int = 512,
) -> dict[str, float]:
    """Flat metrics of a model on documents, the memory mode in every name.

    Returns:
      For each mode, `bits_per_byte_<mode>`, `nats_per_token_<mode>` and
      `seconds_<mode>` (compilation included), in the order of `modes`.
    """
    metrics = {}
    for mode in modes:
        start = time.perf_counter()
        result = score(
            reader, params, tokenizer, documents, mode=mode, rows=rows, window=window
        )
        metrics[f"bits_per_byte_{mode}"] = result.bits_per_byte
        metrics[f"nats_per_token_{mode}"] = float(
            result.nats.sum() / result.tokens.sum()
        )
        metrics[f"seconds_{mode}"] = time.perf_counter() - start
    return metrics


def _costs(
    reader: Reader, params: PyTree, group: Windows, window: int, learn: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each window's costs in nats, float64[B, window], and who pays for them."""
    state = reader.start(params, group.tokens.shape[0])
    running = None  # fetched only when the next window is on its way
    for start in range(0, group.tokens.shape[1], window):
        tokens, targets, _, document = (
            array[:, start : start + window] for array in group
        )
        cost, state = _read(reader, learn, params, state, tokens, targets)
        if running is not None:
            yield np.asarray(running[0], np.float64), running[1]
        running = cost, document
    assert running is not None  # a group has a window
    yield np.asarray(running[0], np.float64), running[1]


@functools.partial(
    jax.jit, static_argnames=("reader", "learn"), donate_argnames=("state",)
)
def _read(
    reader: Reader,
    learn: bool,
    params: PyTree,
    state: PyTree,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], PyTree]:
    """One window of every row: the cost of each target in nats, and the state."""
    logits, state = reader.apply(params, tokens, state, True, learn)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], state


def _some(documents: Sequence[Document]) -> Sequence[Document]:
    if not documents:
        raise ValueError("documents is empty; give at least one document to score.")
    for document in documents:
        if not document.data:
            raise ValueError(
                f"document {document.name!r} has no bytes, so no bits per byte; leave"
                " it out."
            )
    return documents
