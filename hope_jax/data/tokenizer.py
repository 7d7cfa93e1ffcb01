"""Bytes to token ids and back: plain bytes, byte-level BPE, or a tokenizer of others.

All offer `encode`, `encode_batch`, `decode`, `vocab_size`, `bos`, `fingerprint` and
`save`, which writes `tokenizer.json` as Hugging Face's `tokenizers` does. `bos` starts
a document and is never produced by a text, whatever the text says. Of ours, ids 0 to
255 are the bytes themselves and `bos` is the last.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from hope_jax.data.text import Document

_FORMAT = "hope_jax.tokenizer.1"  # in which they were once saved
_BOS = "<|begin of text|>"  # its spaces keep it from being a word of ours
BESIDE = "tokenizer_config.json"
_PIECE = 1 << 20  # bytes; a long document is encoded in pieces of about this size
_WORD = 128  # characters; training takes time like the square of a word's length
# What a file may ask for, many times what a published tokenizer does.
_MOST_FILE = 1 << 28  # bytes
_MOST_IDS = 1 << 22
_MOST_BYTES = 1 << 28  # of all tokens together
_LONGEST = 1 << 16  # bytes of a token
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

    def encode(self, data: bytes | str) -> np.ndarray:
        """Token ids of `data`, int32[N]; of a string, of its UTF-8."""
        return np.frombuffer(_bytes(data), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Iterable[bytes | str]) -> list[np.ndarray]:
        return [self.encode(data) for data in texts]

    def decode(self, ids) -> bytes:
        """The bytes that `ids`, int[N], stand for; `bos` stands for none."""
        ids = _checked(ids, self.vocab_size)
        return ids[ids != self.bos].astype(np.uint8).tobytes()

    def save(self, path: str | os.PathLike) -> None:
        _write(path, self)

    def to_library(self) -> tokenizers.Tokenizer:
        """As one of the library's, which gives texts the same ids."""
        vocab = {letter: byte for byte, letter in enumerate(_letters())}
        library = _library(tokenizers.models.BPE(vocab=vocab, merges=[]), words=False)
        return _with_bos(library)


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
      ValueError: a merge names an id that does not exist yet, or there are more tokens,
        or longer ones, than any tokenizer has: told before they take memory.
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

    def encode(self, data: bytes | str) -> np.ndarray:
        """Token ids of `data`, int32[N]; of a string, of its UTF-8."""
        return self.encode_batch([data])[0]

    def encode_batch(self, texts: Iterable[bytes | str]) -> list[np.ndarray]:
        """Token ids of each text, int32[N]; texts are spread over the cores."""
        done, waiting, size = [], [], 0
        for data in map(_bytes, texts):
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
        _write(path, self)

    def to_library(self) -> tokenizers.Tokenizer:
        """As one of the library's, which gives texts the same ids."""
        return _with_bos(self._made())

    @functools.cached_property
    def _tokens(self) -> tuple[bytes, ...]:
        tokens = [bytes([byte]) for byte in range(256)]
        known, room = set(tokens), _MOST_BYTES
        _at_most("ids", 257 + len(self.merges), _MOST_IDS)
        for rank, (left, right) in enumerate(self.merges):
            if not (0 <= left < len(tokens) and 0 <= right < len(tokens)):
                raise ValueError(
                    f"merges[{rank}] is ({left}, {right}), but only the ids 0 to"
                    f" {len(tokens) - 1} exist before it."
                )
            length = len(tokens[left]) + len(tokens[right])
            _at_most(f"bytes of the token of merges[{rank}]", length, _LONGEST)
            token = tokens[left] + tokens[right]
            if token not in known:
                room -= length
                _at_most("bytes of all tokens", _MOST_BYTES - room, _MOST_BYTES)
                known.add(token)
                tokens.append(token)
        return tuple(tokens)

    @functools.cached_property
    def _library(self) -> tokenizers.Tokenizer:
        # No special token is registered: text that spells one must stay text.
        return self._made()

    def _made(self) -> tokenizers.Tokenizer:
        letters = _letters()
        words = ["".join(letters[byte] for byte in token) for token in self._tokens]
        merges = [(words[left], words[right]) for left, right in self.merges]
        vocab = {word: i for i, word in enumerate(words)}
        return _library(tokenizers.models.BPE(vocab=vocab, merges=merges))

    def _encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        pieces = [list(_pieces(data)) for data in texts]
        return _encoded(self._library, pieces, np.arange(256, dtype=np.int32))


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokenizer of Hugging Face's `tokenizers`, as that of a checkpoint.

    It gives a text the ids that the library gives it without its special tokens: text
    that spells one stays text. Special tokens stand for no bytes. Make one with `load`.

    A tokenizer that puts a space before a text, as Llama 2's, has it in the ids, and
    `decode` takes it off where they begin with `bos`: elsewhere a text goes on.

    Attributes:
      file: what is in `tokenizer.json`, as the library writes it.
      bos: the id that begins a text.

    Raises:
      ValueError: the library cannot read it, `bos` is not one of its tokens, or tokens
        have no bytes of their own.
    """

    file: str
    bos: int

    def __post_init__(self):
        if _from_text(self.file).id_to_token(self.bos) is None:
            raise ValueError(f"bos must be the id of a token, got {self.bos}.")
        self._tokens  # noqa: B018  built now, so that what has no bytes is refused here

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @property
    def definition(self) -> dict:
        return {"format": "tokenizers", "file": self.file, "bos": self.bos}

    @functools.cached_property
    def fingerprint(self) -> str:
        return _sha256(self.definition)

    def encode(self, data: bytes | str) -> np.ndarray:
        """Token ids of `data`, int32[N]; of a string, of its UTF-8.

        Raises:
          ValueError: bytes that are no UTF-8, and the tokenizer has none for bytes.
        """
        return self.encode_batch([data])[0]

    def encode_batch(self, texts: Iterable[bytes | str]) -> list[np.ndarray]:
        """Token ids of each text, int32[N]; texts are spread over the cores."""
        pieces = [[_bytes(data)] for data in texts]
        return _encoded(self._library, pieces, self._byte_ids)

    def decode(self, ids) -> bytes:
        """The bytes that `ids`, int[N], stand for."""
        ids = _checked(ids, self.vocab_size).tolist()
        data = b"".join([self._tokens[i] or b"" for i in ids])
        if ids[:1] == [self.bos] and self._spelling.spaced:
            return data.removeprefix(b" ")
        return data

    def save(self, path: str | os.PathLike) -> None:
        """Writes `path`, and which token begins a text beside it."""
        Path(path).write_text(self.file, encoding="utf-8")
        bos = self._library.id_to_token(self.bos)
        beside = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos}
        text = json.dumps(beside, indent=2)
        Path(path).with_name(BESIDE).write_text(text, encoding="utf-8")

    def to_library(self) -> tokenizers.Tokenizer:
        """As the library reads it."""
        return tokenizers.Tokenizer.from_str(self.file)

    @functools.cached_property
    def _library(self) -> tokenizers.Tokenizer:
        library = self.to_library()
        library.no_truncation()
        library.no_padding()
        library.add_special_tokens([library.id_to_token(self.bos)])
        library.encode_special_tokens = True  # spelled by a text they stay text
        return library

    @functools.cached_property
    def _spelling(self) -> "_Spelling":
        return _spelling(json.loads(self.file))

    @functools.cached_property
    def _tokens(self) -> tuple[bytes | None, ...]:
        library, spelling = self._library, self._spelling
        added = library.get_added_tokens_decoder()
        ids = library.get_vocab(with_added_tokens=True)
        tokens: list[bytes | None] = [None] * (1 + max(ids.values()))
        for word, i in ids.items():
            tokens[i] = spelling.bytes_of(word)
        for i, token in added.items():
            tokens[i] = b"" if token.special else token.content.encode()
        return tuple(tokens)

    @functools.cached_property
    def _byte_ids(self) -> np.ndarray | None:
        """The ids of single bytes, where a text may hold any."""
        if self._spelling.spaced:
            return None  # each run of text would get a space of its own
        ids = [self._library.token_to_id(word) for word in self._spelling.single]
        return None if None in ids else np.array(ids, np.int32)


Tokenizer = ByteTokenizer | BpeTokenizer | PretrainedTokenizer


def train_bpe(texts: Iterable[bytes], vocab_size: int = 4096) -> BpeTokenizer:
    """Learns merges from `texts`. The same texts give the same tokenizer.

    The time goes with the size of the texts, whatever they say: a word of more than
    128 characters teaches as several.

    Args:
      texts: documents; bytes that are not UTF-8 teach nothing and are left out.
      vocab_size: ids in all, `bos` and the 256 bytes included. A short text may run out
        of pairs to merge and give fewer.

    Raises:
      ValueError: `vocab_size` below 257 or above 4,194,304, or no text.
    """
    _at_most("ids", vocab_size, _MOST_IDS)
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
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [library.pre_tokenizer, tokenizers.pre_tokenizers.FixedLength(_WORD)]
    )
    library.train_from_iterator(pieces, trainer)

    ids = {letter: byte for byte, letter in enumerate(letters)}
    merges = []
    for left, right in json.loads(library.to_str())["model"]["merges"]:
        merges.append((ids[left], ids[right]))
        ids.setdefault(left + right, len(ids))
    return BpeTokenizer(tuple(merges))


def load(path: str | os.PathLike, bos: str | None = None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`: one that `save` wrote, now or in the former
    format of this package, or that of a checkpoint. JSON alone: nothing in it is run.

    Args:
      path: of the file.
      bos: for a tokenizer of others, the token that begins a text; by default what
        `tokenizer_config.json` beside it says, or what it begins texts with itself.

    Raises:
      FileNotFoundError: nothing at `path`.
      ValueError: the file is no tokenizer, or a damaged one, or one that asks for more
        memory than any tokenizer needs, or none begins a text.
    """
    size = Path(path).stat().st_size
    _at_most(f"bytes of {str(path)!r}", size, _MOST_FILE)
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    try:
        definition = json.loads(text)
        if "format" in definition:
            found = _former(definition)
        else:
            _check_ids(definition)
            library = _from_text(text)
            added = library.get_added_tokens_decoder().values()
            ours = [token.content for token in added] == [_BOS]
            found = _ours(library) if ours else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is not a tokenizer: {error!r}. Save it again, or train a"
            " new one."
        ) from error
    if found is None:
        library = _from_text(text)
        return PretrainedTokenizer(library.to_str(), _begins(library, Path(path), bos))
    if bos is not None:
        raise ValueError(
            f"bos is for tokenizers of others, got {bos!r} for one of this package."
        )
    return found


def _former(definition: dict) -> Tokenizer:
    """A tokenizer saved as `_FORMAT`."""
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


def _from_text(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing else
        raise ValueError(str(error)) from error


def _check_ids(definition: dict) -> None:
    """Before the library reads them: it makes room up to the largest."""
    vocab = definition["model"].get("vocab", ())
    ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab)]
    ids += [token["id"] for token in definition.get("added_tokens") or ()]
    _at_most("ids", 1 + max(ids, default=0), _MOST_IDS)


def _ours(library: tokenizers.Tokenizer) -> Tokenizer:
    """The tokenizer of this package that was saved so: the one that would be again."""
    said = json.loads(library.to_str())
    ids, merges = said["model"]["vocab"], said["model"]["merges"]
    made = ByteTokenizer(), BpeTokenizer(tuple((ids[a], ids[b]) for a, b in merges))
    for one in made:
        if json.loads(one.to_library().to_str()) == said:
            return one
    raise ValueError(f"it begins texts with {_BOS!r}, but is not as this package saves")


def _begins(library: tokenizers.Tokenizer, path: Path, bos: str | None) -> int:
    """The id of the token that begins a text."""
    beside = path.with_name(BESIDE)
    if bos is None and beside.exists():
        said = json.loads(beside.read_text(encoding="utf-8")).get("bos_token")
        bos = said.get("content") if isinstance(said, dict) else said
    if bos is None:
        library.no_padding()  # to a length of the file's
        empty = library.encode("", add_special_tokens=True)
        bos = next(iter(empty.tokens), None)
    if bos is None:
        raise ValueError(
            f"{str(path)!r} says of no token that it begins a text, nor does {BESIDE} "
            "beside it: name one, as bos='<|endoftext|>'."
        )
    found = library.token_to_id(bos)
    if found is None:
        raise ValueError(f"bos must be a token of {str(path)!r}, got {bos!r}.")
    return found


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


def _library(model: tokenizers.models.BPE, words: bool = True) -> tokenizers.Tokenizer:
    """A byte-level one; `words` says whether GPT-2's pattern cuts texts."""
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=words
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def _with_bos(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    library.add_special_tokens([tokenizers.AddedToken(_BOS, special=True)])
    return library


@dataclasses.dataclass(frozen=True)
class _Spelling:
    """How the words of a vocabulary spell bytes.

    Attributes:
      letters: byte-level, the byte of each character; else None.
      space: else what stands for a space.
      spaced: whether a space is put before a text.
    """

    letters: dict[str, int] | None
    space: str
    spaced: bool

    @property
    def single(self) -> list[str]:
        """The words of the 256 bytes."""
        if self.letters is not None:
            return sorted(self.letters, key=self.letters.__getitem__)
        return [f"<0x{byte:02X}>" for byte in range(256)]

    def bytes_of(self, word: str) -> bytes:
        if self.letters is not None:
            if not self.letters.keys() >= set(word):
                return word.encode()
            return bytes(self.letters[letter] for letter in word)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", word)
        if byte:
            return bytes([int(byte[1], 16)])
        return word.replace(self.space, " ").encode()


def _spelling(definition: dict) -> _Spelling:
    """Of a `tokenizer.json`, by its decoder.

    Raises:
      ValueError: words that have no bytes of their own.
    """
    said: dict[str, Any] = definition["decoder"] or {"type": "none"}
    steps: list[Any] = said["decoders"] if said["type"] == "Sequence" else [said]
    letters, space, spaced = None, " ", False
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                letters = {letter: byte for byte, letter in enumerate(_letters())}
            case {"type": "Replace", "pattern": {"String": mark}, "content": " "}:
                space = mark
            case {"type": "Metaspace", "replacement": mark}:
                space, spaced = mark, step.get("prepend_scheme") != "never"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                spaced = True
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                raise ValueError(
                    f"a tokenizer whose decoder is {step['type']!r} gives its tokens "
                    "no bytes of their own; byte-level ones and those with bytes to "
                    "fall back on do."
                )
    return _Spelling(letters, space, spaced)


def _encoded(
    library: tokenizers.Tokenizer,
    texts: Sequence[Sequence[bytes]],
    byte_ids: np.ndarray | None,
) -> list[np.ndarray]:
    """Ids of texts in pieces: runs of valid UTF-8 go through the library, stray bytes
    are those of `byte_ids`."""
    runs, owner = [], []
    for i, pieces in enumerate(texts):
        for piece in pieces:
            for run in _INVALID.split(piece.decode("utf-8", "surrogateescape")):
                runs.append(run)
                owner.append(i)
    valid = ["" if _INVALID.match(run) else run for run in runs]
    encoded = library.encode_batch_fast(valid, add_special_tokens=False)
    parts: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in texts]
    for i, run, ids in zip(owner, runs, encoded, strict=True):
        if not _INVALID.match(run):
            parts[i].append(np.array(ids.ids, np.int32))
            continue
        stray = run.encode("utf-8", "surrogateescape")
        if byte_ids is None:
            raise ValueError(
                f"texts[{i}] has the bytes {stray[:8]!r}, which are no UTF-8, and this "
                "tokenizer has no tokens for single bytes: decode the text first."
            )
        parts[i].append(byte_ids[np.frombuffer(stray, np.uint8)])
    return [np.concatenate(part) for part in parts]


def _bytes(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data


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


def _at_most(what: str, value: int, most: int) -> None:
    if value > most:
        raise ValueError(
            f"{what}: {value:,} are more than the {most:,} that a tokenizer may have."
        )


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


def _write(path: str | os.PathLike, one: ByteTokenizer | BpeTokenizer) -> None:
    Path(path).write_text(one.to_library().to_str(), encoding="utf-8")


def _dumped(definition: dict) -> str:
    return json.dumps(definition, sort_keys=True, separators=(",", ":"))
