"""Recall of a model on `data.synthetic.recall`: answers right, answers' cost.

Only questions count. A model that has learned which tokens are values and nothing else
stands at `RecallConfig.chance` or below.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from hope_jax.data.synthetic.recall import RecallBatch, RecallConfig, batch

Read = Callable[[PyTree, Array], Array]


class RecallScore(NamedTuple):
    """Means over all questions.

    Attributes:
      accuracy: share of questions whose likeliest token is the answer.
      loss: cross-entropy of the answers in nats.
    """

    accuracy: Float[Array, ""]
    loss: Float[Array, ""]


def score_batch(logits: Float[Array, "B T N"], asked: RecallBatch) -> RecallScore:
    """Accuracy and loss at the questions of one batch, float32.

    The loss is what training descends: it is differentiable in `logits`.

    Raises:
      ValueError: logits of other rows or length than the batch.
    """
    if logits.shape[:2] != asked.tokens.shape:
        raise ValueError(
            f"logits must be [B, T, N] with [B, T] = {asked.tokens.shape}, got "
            f"{logits.shape}."
        )
    weight = asked.mask.astype(jnp.float32)
    right = (jnp.argmax(logits, axis=-1) == asked.labels).astype(jnp.float32)
    cost = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), asked.labels
    )
    questions = weight.sum()
    return RecallScore(
        (right * weight).sum() / questions, (cost * weight).sum() / questions
    )


def score(
    read: Read,
    params: PyTree,
    config: RecallConfig,
    key: Array,
    *,
    rows: int = 64,
    batches: int = 8,
) -> RecallScore:
    """`score_batch` over batches drawn from `key`; pure, and may be compiled.

    Args:
      read: `(params, tokens[B, T]) -> logits[B, T, N]`, from fresh states.
      params: of the model.
      config: the task.
      key: of the rows; keep it apart from that of training.
      rows: of one batch.
      batches: read one after the other.

    Raises:
      ValueError: `rows` or `batches` below 1.
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}.")

    def one(key):
        asked = batch(config, key, rows)
        return score_batch(read(params, asked.tokens), asked)

    # Every row asks as many questions, so the mean of means is the mean.
    return jax.tree.map(jnp.mean, jax.lax.map(one, jax.random.split(key, batches)))
