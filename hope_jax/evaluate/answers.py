"""Answers of a model to a synthetic task: how many are right, and what they cost.

Only what is asked counts. Where the answer is a token, the likeliest is compared with
it; where it is a set, every token with a logit above zero is said to be in it. A model
that has learned which tokens are answers and nothing else stands at chance or below.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.data.synthetic.task import Asked, Task

Read = Callable[[PyTree, Array, Array | None], Array]


def questions(task: Task, asked: Asked) -> tuple[Int[Array, "B Q"] | None, Asked]:
    """Where a batch of `task` asks something, and what is asked there: most of what a
    model says of a row is asked of nobody, and need not be made. None where all is."""
    if task.asked >= asked.tokens.shape[1]:
        return None, asked
    return asked.only(task.asked)


class Score(NamedTuple):
    """Means over all that is asked.

    Attributes:
      accuracy: share of answers that are right; a set is right as a whole.
      whole: share of rows whose answers are all right.
      loss: of an answer in nats: cross-entropy, of sets that of their members, each
        apart, as a mean over members.
    """

    accuracy: Float[Array, ""]
    whole: Float[Array, ""]
    loss: Float[Array, ""]


def score_batch(logits: Float[Array, "B T N"], asked: Asked) -> Score:
    """What a batch is answered, float32.

    The loss is what training descends: it is differentiable in `logits`.

    Raises:
      ValueError: logits of other rows, length or, for sets, answers than the batch.
    """
    of = asked.labels.shape if asked.labels.ndim == 3 else asked.tokens.shape
    if logits.shape[: len(of)] != of:
        names = "[B, T, N]" if len(of) == 3 else "[B, T]"
        raise ValueError(
            f"logits must be [B, T, N] with {names} = {of}, got {logits.shape}."
        )
    logits, weight = logits.astype(jnp.float32), asked.mask.astype(jnp.float32)
    if asked.labels.ndim == 3:
        right = ((logits > 0) == asked.labels).all(axis=-1)
        members = asked.labels.astype(jnp.float32)
        cost = optax.sigmoid_binary_cross_entropy(logits, members).mean(axis=-1)
    else:
        right = jnp.argmax(logits, axis=-1) == asked.labels
        cost = optax.softmax_cross_entropy_with_integer_labels(logits, asked.labels)
    answers = weight.sum()
    return Score(
        accuracy=(right.astype(jnp.float32) * weight).sum() / answers,
        whole=(right | ~asked.mask).all(axis=1).astype(jnp.float32).mean(),
        loss=(cost * weight).sum() / answers,
    )


def score(
    read: Read,
    params: PyTree,
    task: Task,
    key: Array,
    *,
    rows: int = 64,
    batches: int = 8,
) -> Score:
    """`score_batch` over batches drawn from `key`; pure, and may be compiled.

    Args:
      read: `(params, tokens[B, T], at[B, Q] | None) -> logits` at these places of fresh
        rows, `[B, Q, N]`, or at all, `[B, T, N]`.
      params: of the model.
      task: what is asked.
      key: of the rows; keep it apart from that of training.
      rows: of one batch.
      batches: read one after the other.

    Raises:
      ValueError: `rows` or `batches` below 1.
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}.")

    def one(key):
        asked = task.batch(key, rows)
        at, there = questions(task, asked)
        return score_batch(read(params, asked.tokens, at), there), there.mask.sum()

    each, answers = jax.lax.map(one, jax.random.split(key, batches))
    weight = answers.astype(jnp.float32) / answers.sum().astype(jnp.float32)
    return Score(
        accuracy=(each.accuracy * weight).sum(),
        whole=each.whole.mean(),
        loss=(each.loss * weight).sum(),
    )
