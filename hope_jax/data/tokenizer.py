"""Bytes to token ids and back, without loss: plain bytes, or byte-level BPE.

Both tokenizers offer `encode`, `encode_batch`, `decode`, `vocab_size`, `bos`,
`fingerprint` and `save`. Ids 0 to 255 are the bytes themselves; the last id, `bos`,
starts a document and is never produced by a text, whatever the text says.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from hope_jax.data.text import Document

_FORMAT = "hope_jax.tokenizer.1"
_PIECE = 1 << 20  # bytes; a long document is encoded in pieces of about this size
_LINE_END = re.compile(rb"[!-~](?=\n)")
_INVALID = re.compile("([\udc80-\udcff]+)")  # what surrogateescape makes of a bad byte


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Each byte is a token.

    >>> ByteTokenizer().encode(b"ab").tolist()
    [97, 98]
    """

    vocab_size = 257
    bos = 256

    @property
    def definition(self) -> dict:
        return {"format": _FORMAT, "kind": "bytes"}

    @property
    def fingerprint(self) -> str:
        return _sha256(self.definition)

    def encode(self, data: bytes) -> np.ndarray:
        """Token ids of `data`, int32[N]."""
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Iterable[bytes]) -> list[np.ndarray]:
        return [self.encode(data) for data in texts]

    def decode(self, ids) -> bytes:
        """The bytes that `ids`, int[N], stand for; `bos` stands for none."""
        ids = _checked(ids, self.vocab_size)
        return ids[ids != self.bos].astype(np.uint8).tobytes()

    def save(self, path: str | os.PathLike) -> None:
        _write(path, self.definition)


@dataclasses.dataclass(frozen=True)
class BpeTokenizer:
    """Byte-pair encoding over bytes (Sennrich et al., arXiv:1508.07909).

    Text is cut into words by GPT-2's pattern and merged inside them by the Hugging Face
    `tokenizers` library. Every byte is a token of its own too, so any bytes, UTF-8 or
    not, come back exactly. Make one with `train_bpe` or `load`.

    Attributes:
      merges: pairs of ids in the order they were learned. A pair whose bytes are new
        takes the next id, from 256 on.

    Raises:
      ValueError: a merge names an id that does not exist yet.
    """

    merges: tuple[tuple[int, int], ...]

    def __post_init__(self):
        self._tokens  # noqa: B018  built now, so that a bad merge is refused here

    @property
    def bos(self) -> int:
        return len(self._tokens)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens) + 1

    @property
    def definition(self) -> dict:
        return {"format": _FORMAT, "kind": "bpe", "merges": self.merges}

    @functools.cached_property
    def fingerprint(self) -> str:
        return _sha256(self.definition)

    def encode(self, data: bytes) -> np.ndarray:
        """Token ids of `data`, int32[N]."""
        return self.encode_batch([data])[0]

    def encode_batch(self, texts: Iterable[bytes]) -> list[np.ndarray]:
        """Token ids of each text, int32[N]; texts are spread over the cores."""
        done, waiting, size = [], [], 0
        for data in texts:
            waiting.append(data)
            size += len(data)
            if size >= 4 * _PIECE:  # the library needs 100 bytes of memory a token
                done += self._encode(waiting)
                waiting, size = [], 0
        return done + self._encode(waiting)

    def decode(self, ids) -> bytes:
        """The bytes that `ids`, int[N], stand for; `bos` stands for none."""
        tokens = (*self._tokens, b"")
        return b"".join([tokens[i] for i in _checked(ids, self.vocab_size).tolist()])

    def save(self, path: str | os.PathLike) -> None:
        _write(path, self.definition)

    @functools.cached_property
    def _tokens(self) -> tuple[bytes, ...]:
        tokens = [bytes([byte]) for byte in range(256)]
        known = set(tokens)
        for rank, (left, right) in enumerate(self.merges):
            if not (0 <= left < len(tokens) and 0 <= right < len(tokens)):
                raise ValueError(
                    f"merges[{rank}] is ({left}, {right}), but only the ids 0 to"
                    f" {len(tokens) - 1} exist before it."
                )
            token = tokens[left] + tokens[right]
            if token not in known:
                known.add(token)
                tokens.append(token)
        return tuple(tokens)

    @functools.cached_property
    def _library(self) -> tokenizers.Tokenizer:
        letters = _letters()
        words = ["".join(letters[byte] for byte in token) for token in self._tokens]
        merges = [(words[left], words[right]) for left, right in self.merges]
        vocab = {word: i for i, word in enumerate(words)}
        return _library(tokenizers.models.BPE(vocab=vocab, merges=merges))

    def _encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        # Runs of valid text go through the library; stray bytes are their own ids.
        runs, owner = [], []
        for i, data in enumerate(texts):
            for piece in _pieces(data):
                text = piece.decode("utf-8", "surrogateescape")
                for run in _INVALID.split(text):
                    runs.append(run)
                    owner.append(i)
        valid = ["" if _INVALID.match(run) else run for run in runs]
        encoded = self._library.encode_batch_fast(valid, add_special_tokens=False)
        parts: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in texts]
        for i, run, ids in zip(owner, runs, encoded, strict=True):
            if _INVALID.match(run):
                stray = run.encode("utf-8", "surrogateescape")
                parts[i].append(np.frombuffer(stray, np.uint8).astype(np.int32))
            else:
                parts[i].append(np.array(ids.ids, np.int32))
        return [np.concatenate(part) for part in parts]


Tokenizer = ByteTokenizer | BpeTokenizer


def train_bpe(texts: Iterable[bytes], vocab_size: int = 4096) -> BpeTokenizer:
    """Learns merges from `texts`. The same texts give the same tokenizer.

    Args:
      texts: documents; bytes that are not UTF-8 teach nothing and are left out.
      vocab_size: ids in all, `bos` and the 256 bytes included. A short text may run out
        of pairs to merge and give fewer.

    Raises:
      ValueError: `vocab_size` below 257, or no text.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size must be at least 257 (256 bytes and bos), got {vocab_size}."
        )
    pieces = [
        piece.decode("utf-8", "ignore") for data in texts for piece in _pieces(data)
    ]
    if not any(pieces):
        raise ValueError("texts holds no text; a tokenizer needs some to learn from.")
    letters = _letters()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=list(letters),
        show_progress=False,
    )
    library = _library(tokenizers.models.BPE())
    library.train_from_iterator(pieces, trainer)

    ids = {letter: byte for byte, letter in enumerate(letters)}
    merges = []
    for left, right in json.loads(library.to_str())["model"]["merges"]:
        merges.append((ids[left], ids[right]))
        ids.setdefault(left + right, len(ids))
    return BpeTokenizer(tuple(merges))


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer that `save` wrote. JSON alone: nothing in the file is run.

    Raises:
      FileNotFoundError: nothing at `path`.
      ValueError: the file is not a tokenizer of this package, or a damaged one.
    """
    try:
        definition = json.loads(Path(path).read_text(encoding="utf-8"))
        if definition["format"] != _FORMAT:
            raise ValueError(f"its format is {definition['format']!r}")
        if definition["kind"] == "bytes":
            return ByteTokenizer()
        if definition["kind"] != "bpe":
            raise ValueError(f"its kind is {definition['kind']!r}")
        merges = tuple((left, right) for left, right in definition["merges"])
        if not all(type(i) is int for pair in merges for i in pair):
            raise ValueError("a merge holds something else than two whole numbers")
        return BpeTokenizer(merges)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a tokenizer saved as {_FORMAT}: {error!r}. Save it"
            " again, or train a new one."
        ) from error


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[Document]
) -> list[np.ndarray]:
    """Token ids of each document, int32[1 + N], led by `bos`.

    >>> encode_documents(ByteTokenizer(), [Document("a", b"hi")])[0].tolist()
    [256, 104, 105]
    """
    bos = np.array([tokenizer.bos], np.int32)
    encoded = tokenizer.encode_batch(document.data for document in documents)
    return [np.concatenate([bos, ids]) for ids in encoded]


def _library(model: tokenizers.models.BPE) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(model)
    # No special token is registered: text that spells one must stay text.
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return library


def _letters() -> list[str]:
    """The character by which the library's byte-level words write each byte.

    A printable byte is written as itself; the others, in order, by the rest.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(letter) for letter in alphabet if ord(letter) < 256}
    others = iter(letter for letter in alphabet if ord(letter) >= 256)
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def _pieces(data: bytes) -> Iterable[bytes]:
    """`data` cut where GPT-2's pattern ends a word anyway: before the end of a line.

    Behind it would not do, as that end and the next line's indent are one word.
    """
    start = 0
    while start < len(data):
        found = _LINE_END.search(data, start + _PIECE)
        stop = found.end() if found else len(data)
        yield data[start:stop]
        start = stop


def _checked(ids, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.zeros(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"ids must be whole numbers in one dimension, got {ids.dtype} of shape"
            f" {ids.shape}."
        )
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"ids holds {wrong[0]}, outside [0, {vocab_size}).")
    return ids


def _sha256(definition: dict) -> str:
    return hashlib.sha256(_dumped(definition).encode()).hexdigest()


def _write(path: str | os.PathLike, definition: dict) -> None:
    Path(path).write_text(_dumped(definition), encoding="utf-8")


def _dumped(definition: dict) -> str:
    return json.dumps(definition, sort_keys=True, separators=(",", ":"))
