"""Text from a model, token by token, with a state of constant size."""

import codecs
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from hope_jax.data.tokenizer import Tokenizer
from hope_jax.models import lm
from hope_jax.stream.reader import Reader, check_tokenizer

_WINDOW = 256  # tokens of a prompt read in parallel, at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits, and where a text ends.

    What is likely enough is looked at after the temperature; tokens as likely as the
    last that is kept are kept too.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy), and so does
        what is too small to tell from it (below 1e-9).
      top_k: draw among this many likeliest tokens only; None draws among all.
      top_p: of these, among the fewest likeliest that together have this probability
        (arXiv:1904.09751).
      min_p: among those with at least this share of the likeliest one's probability
        (arXiv:2407.01082).
      stop: a text ends with the token that completes one of these.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                "temperature must be a finite number, 0 (greedy) or above, got"
                f" {self.temperature}."
            )
        k = self.top_k
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(
                "top_k must be at least 1, a whole number, or None for all tokens; got"
                f" {k!r}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                "top_p must be above 0, and at most 1, for all tokens, got"
                f" {self.top_p}."
            )
        if not 0 <= self.min_p <= 1:
            raise ValueError(
                f"min_p must lie between 0, for all tokens, and 1, got {self.min_p}."
            )
        if isinstance(self.stop, str) or not all(
            isinstance(one, str) and one for one in self.stop
        ):
            raise ValueError(
                f"stop must be a tuple of texts, none of them empty, got {self.stop!r}."
            )

    def __call__(self, logits: Float[Array, " N"], key: Array | None) -> Int[Array, ""]:
        if self.greedy:
            return jnp.argmax(logits).astype(jnp.int32)
        one = jax.tree.map(lambda a: a[0], drawing([self], logits.shape[-1]))
        if self.cuts:
            logits = jnp.where(logits < _least(logits, one), -jnp.inf, logits)
        assert key is not None  # only the likeliest token needs none
        return jax.random.categorical(key, logits / self.temperature).astype(jnp.int32)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: logits divided by less would be so far
        apart, or infinite."""
        return self.temperature < 1e-9

    @property
    def cuts(self) -> bool:
        """Whether any token is too unlikely."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


class Drawing(NamedTuple):
    """A `Sampling` a row, as arrays, so that others need no other program."""

    temperature: Float[Array | np.ndarray, "*B"]
    top_k: Int[Array | np.ndarray, "*B"]
    top_p: Float[Array | np.ndarray, "*B"]
    min_p: Float[Array | np.ndarray, "*B"]


def drawing(samplings: Sequence[Sampling], vocab: int) -> Drawing:
    """Of each row, for logits of `vocab` tokens."""
    made = [
        (
            0.0 if s.greedy else s.temperature,
            min(s.top_k or vocab, vocab),
            s.top_p,
            s.min_p,
        )
        for s in samplings
    ]
    types = np.float32, np.int32, np.float32, np.float32
    columns = zip(zip(*made, strict=True), types, strict=True)
    return Drawing(*(np.array(column, dtype) for column, dtype in columns))


def draw(
    logits: Float[Array, "B N"], how: Drawing, keys: Shaped[Array, " B"]
) -> Int[Array, " B"]:
    """A token a row, each by its own settings and key; what `Sampling` does."""
    hot = jnp.where(how.temperature == 0, 1.0, how.temperature)

    def cut():
        least = jax.vmap(_least)(logits, how._replace(temperature=hot))
        return jnp.where(logits < least[:, None], -jnp.inf, logits)

    cuts = (how.top_k < logits.shape[-1]) | (how.top_p < 1) | (how.min_p > 0)
    kept = jax.lax.cond(jnp.any(cuts), cut, lambda: logits)
    drawn = jax.vmap(jax.random.categorical)(keys, kept / hot[:, None])
    likeliest = jnp.argmax(logits, axis=-1)
    return jnp.where(how.temperature == 0, likeliest, drawn).astype(jnp.int32)


def _least(logits: Float[Array, " N"], how: Drawing) -> Float[Array, ""]:
    """The lowest logit that may still be drawn; with nothing to cut, all may."""
    falling = jnp.sort(logits, descending=True)
    k_th = falling[how.top_k - 1]
    kept = jnp.where(falling < k_th, -jnp.inf, falling)
    likely = jax.nn.softmax(kept / how.temperature)
    count = jnp.sum(jnp.cumsum(likely) - likely < how.top_p)
    p_th = jnp.where(how.top_p < 1, kept[count - 1], -jnp.inf)
    near = falling[0] + how.temperature * jnp.log(how.min_p)
    return jnp.maximum(k_th, jnp.maximum(p_th, near))


def find_stop(text: bytes, stop: Sequence[str], new: int) -> int | None:
    """Where the first text of `stop` begins that ends within the last `new` bytes.

    >>> find_stop(b"one two", ("two", "e t"), 3)
    2
    """
    if not stop:
        return None
    ends = len(text) - new
    found = []
    for one in (one.encode() for one in stop):
        at = text.find(one, max(0, ends - len(one) + 1))
        if at >= 0:
            found.append(at)
    return min(found, default=None)


def prefill(
    reader: Reader, params: PyTree, prompt: np.ndarray, learn: bool = True
) -> tuple[PyTree, Float[Array, "1 N"]]:
    """Reads a prompt of T >= 1 token ids: whole windows in parallel, then the rest.

    Returns:
      The state after them, for one row, and what the model says then.

    Raises:
      ValueError: the prompt is empty, or has an id that the model has no row for.
    """
    lm.ids("prompt", prompt, reader.vocab)
    if not len(prompt):
        raise ValueError("prompt must have at least one token, got none.")
    window = reader.window(_WINDOW)
    state, logits = reader.start(params, 1), jnp.zeros((1, reader.vocab))
    for i in range(0, len(prompt), window):
        piece = np.zeros((1, window), np.int32)
        count = len(prompt[i : i + window])
        piece[0, :count] = prompt[i : i + window]
        read = _read if count == window else _read_some
        logits, state = read(reader, learn, params, state, piece, jnp.int32(count))
    return state, logits


@functools.partial(
    jax.jit,
    static_argnames=("reader", "sampling", "vocab", "learn"),
    donate_argnames=("state",),
)
def decode(
    reader: Reader,
    sampling: Sampling,
    vocab: int,
    learn: bool,
    params: PyTree,
    state: PyTree,
    logits: Float[Array, "B N"],
    given: Int[Array, "B T"],
    keys: Array,
) -> tuple[Int[Array, "B T"], Float[Array, "B N"], PyTree]:
    """T tokens a row, each read before the next is drawn; rows stand anywhere.

    Args:
      reader: the model.
      sampling: how tokens are drawn.
      vocab: ids from here on are never drawn.
      learn: whether the model's memory moves.
      params: the model's parameters.
      state: of B rows.
      logits: what the model said after the token before.
      given: a token id where the text is known, -1 where one is drawn.
      keys: one for each of the T tokens; rows have their own parts of it.

    Returns:
      The tokens, the logits after the last of them and the state.
    """
    rows = logits.shape[0]

    def choose(logits, x):
        given, key = x
        allowed = jnp.where(jnp.arange(logits.shape[1]) < vocab, logits, -jnp.inf)
        own = key[None] if rows == 1 else jax.random.split(key, rows)
        drawn = jax.vmap(sampling)(allowed, own)
        return jnp.where(given < 0, drawn, given)

    return reader.write(params, state, logits, choose, (given.T, keys), learn)


def generate(
    reader: Reader,
    params: PyTree,
    tokenizer: Tokenizer,
    prompt: bytes,
    *,
    tokens: int,
    key: Array,
    sampling: Sampling | None = None,
    learn: bool = True,
    block: int = 8,
) -> Iterator[int]:
    """Token ids that go on after `prompt`, as they are made.

    The prompt is read as the start of a document; an empty one leaves that start alone.
    The text ends early where the model starts another document, and with the token
    that completes a text of `sampling.stop`.

    Args:
      reader: the model.
      params: its parameters.
      tokenizer: as in training.
      prompt: the text to go on from.
      tokens: most tokens to make.
      key: decides every draw; token i is drawn with `fold_in(key, i)`.
      sampling: how tokens are drawn; None is `Sampling()`.
      learn: whether the memory moves while it reads and writes.
      block: tokens made between two looks at the host; a speed choice, never a result.

    Raises:
      ValueError: `tokens` or `block` below 1, a tokenizer with more ids than the model,
        or a text, made in whole blocks, that the model has no room for.
      FloatingPointError: the model says NaN; raised where its first token would be.
    """
    # Checked here and not in the generator below, which runs at its first `next`.
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}.")
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}.")
    check_tokenizer(reader, tokenizer)
    sampling = Sampling() if sampling is None else sampling
    read = np.concatenate([[tokenizer.bos], tokenizer.encode(prompt)]).astype(np.int32)
    made = -(-tokens // block) * block
    reader.check_room("the prompt and what follows", len(read) + made)
    return _generate(
        reader, params, tokenizer, read, tokens, key, sampling, learn, block
    )


def _generate(reader, params, tokenizer, read, tokens, key, sampling, learn, block):
    state, logits = prefill(reader, params, read, learn)
    stop, text = sampling.stop, b""
    sampling = dataclasses.replace(sampling, stop=())  # which no program depends on
    for drawn in range(0, tokens, block):
        made, logits, state = decode(
            reader,
            sampling,
            tokenizer.vocab_size,
            learn,
            params,
            state,
            logits,
            np.full((1, block), -1, np.int32),
            _fold_in(key, np.arange(drawn, drawn + block)),
        )
        if not bool(jnp.isfinite(logits).all()):
            raise FloatingPointError(
                f"logits are not finite within {drawn + block} tokens: the model's "
                "memory or its parameters hold NaN or inf, and no token can be drawn."
            )
        for token in np.asarray(made)[0, : tokens - drawn].tolist():
            if token == tokenizer.bos:
                return
            yield token
            if stop:
                new = tokenizer.decode([token])
                text += new
                if find_stop(text, stop, len(new)) is not None:
                    return


def as_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of a stream of ids. A character is held back until its last byte is there.

    Bytes that can never become UTF-8 turn into the replacement character.

    >>> from hope_jax.data.tokenizer import ByteTokenizer
    >>> list(as_text(ByteTokenizer(), "a\N{EURO SIGN}".encode()))
    ['a', '\N{EURO SIGN}']
    """
    return in_characters(tokenizer.decode([token]) for token in ids)


def in_characters(pieces: Iterable[bytes]) -> Iterator[str]:
    """Text of bytes, as `as_text` gives it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


_compiled = functools.partial(
    jax.jit, static_argnames=("reader", "learn"), donate_argnames=("state",)
)


@_compiled
def _read(reader, learn, params, state, tokens, count):
    """A whole window, from a place where that may be read in parallel."""
    del count  # all of them
    logits, state = reader.apply(params, tokens, state, True, learn)
    return logits[:, -1].astype(jnp.float32), state


@_compiled
def _read_some(reader, learn, params, state, tokens, count):
    logits, state = reader.read(params, tokens, state, count, learn)
    last = jax.lax.dynamic_index_in_dim(logits, count - 1, axis=1, keepdims=False)
    return last.astype(jnp.float32), state


_fold_in = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
