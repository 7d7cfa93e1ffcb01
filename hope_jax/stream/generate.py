"""Text from a model, token by token, with a state of constant size."""

import codecs
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.data.tokenizer import Tokenizer
from hope_jax.models import lm
from hope_jax.stream.reader import Reader, check_tokenizer

_WINDOW = 256  # tokens of a prompt read in parallel, at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: draw among this many likeliest tokens only; None draws among all.
    """

    temperature: float = 0.8
    top_k: int | None = None

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                "temperature must be a finite number, 0 (greedy) or above, got"
                f" {self.temperature}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k must be at least 1, or None for all tokens, got {self.top_k}."
            )

    def __call__(self, logits: Float[Array, " N"], key: Array | None) -> Int[Array, ""]:
        if self.temperature == 0:
            return jnp.argmax(logits).astype(jnp.int32)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][-1]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        assert key is not None  # only the likeliest token needs none
        return jax.random.categorical(key, logits / self.temperature).astype(jnp.int32)


def prefill(
    reader: Reader, params: PyTree, prompt: np.ndarray, learn: bool = True
) -> tuple[PyTree, Int[np.ndarray, " R"]]:
    """Reads the whole windows of a prompt of T token ids in parallel.

    Returns:
      The state after them, for one row, and the R tokens that are left to read.

    Raises:
      ValueError: the prompt has an id that the model has no row for.
    """
    lm.ids("prompt", prompt, reader.vocab)
    window = reader.window(_WINDOW)
    state = reader.start(params, 1)
    whole = len(prompt) // window
    for i in range(whole):
        piece = np.asarray(prompt[i * window : (i + 1) * window], np.int32)
        state = _read(reader, learn, params, state, piece[None])
    return state, prompt[whole * window :]


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
    logits: Float[Array, " N"],
    given: Int[Array, " T"],
    keys: Array,
) -> tuple[Int[Array, " T"], Float[Array, " N"], PyTree]:
    """T tokens, each read before the next is drawn.

    Args:
      reader: the model.
      sampling: how tokens are drawn.
      vocab: ids from here on are never drawn.
      learn: whether the model's memory moves.
      params: the model's parameters.
      state: of one row.
      logits: what the model said after the token before.
      given: a token id where the text is known (the prompt), -1 where one is drawn.
      keys: one for each token.

    Returns:
      The tokens, the logits after the last of them and the state.
    """

    def step(carry, item):
        logits, state = carry
        given_t, key_t = item
        allowed = jnp.where(jnp.arange(logits.shape[0]) < vocab, logits, -jnp.inf)
        token = jnp.where(given_t < 0, sampling(allowed, key_t), given_t)
        logits, state = reader.apply(params, token[None, None], state, False, learn)
        return (logits[0, 0].astype(jnp.float32), state), token

    (logits, state), tokens = jax.lax.scan(step, (logits, state), (given, keys))
    return tokens, logits, state


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
    The text ends early where the model starts another document.

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
      ValueError: `tokens` or `block` below 1, or a tokenizer with more ids than the
        model.
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
    return _generate(
        reader, params, tokenizer, read, tokens, key, sampling, learn, block
    )


def _generate(reader, params, tokenizer, read, tokens, key, sampling, learn, block):
    # At least one token is left to `decode`, whose logits draw the first new one.
    state, rest = prefill(reader, params, read[:-1], learn)
    rest = np.append(rest, read[-1])
    drawn = -len(rest)  # index of the next token; below 0 it is still the prompt's
    logits = jnp.zeros(reader.vocab)
    while drawn < tokens:
        given = np.full(block, -1, np.int32)
        known = rest[:block]
        given[: len(known)], rest = known, rest[block:]
        at = np.maximum(np.arange(drawn, drawn + block), 0)
        made, logits, state = decode(
            reader,
            sampling,
            tokenizer.vocab_size,
            learn,
            params,
            state,
            logits,
            given,
            _fold_in(key, at),
        )
        if not bool(jnp.isfinite(logits).all()):
            raise FloatingPointError(
                f"logits are not finite within {drawn + block} tokens: the model's "
                "memory or its parameters hold NaN or inf, and no token can be drawn."
            )
        for token in np.asarray(made)[max(0, -drawn) : tokens - drawn].tolist():
            if token == tokenizer.bos:
                return
            yield token
        drawn += block


def as_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of a stream of ids. A character is held back until its last byte is there.

    Bytes that can never become UTF-8 turn into the replacement character.

    >>> from hope_jax.data.tokenizer import ByteTokenizer
    >>> list(as_text(ByteTokenizer(), "a\N{EURO SIGN}".encode()))
    ['a', '\N{EURO SIGN}']
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        if text := decoder.decode(tokenizer.decode([token])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


@functools.partial(
    jax.jit, static_argnames=("reader", "learn"), donate_argnames=("state",)
)
def _read(reader, learn, params, state, tokens):
    return reader.apply(params, tokens, state, True, learn)[1]


_fold_in = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
