"""Small models with the functions of a real one, whose answers are known."""

import jax
import jax.numpy as jnp

from hope_jax.stream.reader import Reader


def uniform(vocab: int) -> Reader:
    """Says the same of every token."""

    def apply(params, tokens, state, aligned, learn):
        return jnp.zeros((*tokens.shape, vocab)), state + tokens.shape[1]

    return Reader(apply, lambda params, batch: jnp.zeros(batch, jnp.int32), 1, vocab)


def counting(vocab: int, span: int = 1) -> Reader:
    """Expects each token as often as it was read so far, plus one: a memory of counts.

    With `learn=False` the counts stay at zero, so the model is uniform.
    """

    def apply(params, tokens, state, aligned, learn):
        if aligned and tokens.shape[1] % span:
            raise ValueError("an aligned window must be a multiple of span")
        read = jax.nn.one_hot(tokens, vocab) * float(learn)
        counts = state[:, None] + jnp.cumsum(read, axis=1)
        return jnp.log(counts + params), counts[:, -1]

    def initial_state(params, batch):
        return jnp.zeros((batch, vocab))

    return Reader(apply, initial_state, span, vocab)


def reciting(vocab: int, text: bytes) -> Reader:
    """Says `text` over and over, whatever it reads: its state is a position."""
    said = jnp.asarray(list(text))

    def apply(params, tokens, state, aligned, learn):
        at = state[:, None] + jnp.arange(tokens.shape[1])[None]
        logits = 50.0 * jax.nn.one_hot(said[at % len(text)], vocab)
        return logits, state + tokens.shape[1]

    return Reader(apply, lambda params, batch: jnp.zeros(batch, jnp.int32), 1, vocab)
