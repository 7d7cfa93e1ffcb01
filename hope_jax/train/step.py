"""One step of training, pure: the slow level moves by what the fast ones read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.core.level import Differentiate, Fast, Slow, hope_update
from hope_jax.models.lm import next_token_loss
from hope_jax.train import sharding
from hope_jax.train.state import TrainState, outer_level

Metrics = dict[str, Array]
Apply = Callable[..., tuple[Float[Array, "B T N"], PyTree]]


def mean_loss(
    logits: Float[Array, "B T N"], tokens: Int[Array, "B T1"]
) -> Float[Array, ""]:
    """Mean cross-entropy of each next token, in nats, float32.

    Args:
      logits: `logits[:, t]` predicts `tokens[:, t + 1]`.
      tokens: one more a row than there are logits.
    """
    return next_token_loss(logits.astype(jnp.float32), tokens[:, 1:]).mean()


def make_step(
    graphdef: Any,
    apply_fn: Apply,
    tx: optax.GradientTransformation,
    differentiation: Callable[[int], Differentiate | None] = lambda tokens: None,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Int[Array, "B T1"]], tuple[TrainState, Metrics]]:
    """The step of a language model: `(state, tokens) -> (state, metrics)`.

    It is `hope_update` with the model's parameters as the slow level and everything
    that learns inside the sequence as the fast one. Each row of each batch is read from
    the learned initial states.

    Args:
      graphdef: the static half of the model.
      apply_fn: `(graphdef, params, tokens[B, T]) -> (logits[B, T, N], state)`.
      tx: the slow level's optimizer.
      differentiation: `tokens -> differentiate` of `hope_update`, for an optimizer that
        needs more than gradients (`hope_jax.optim.differentiation`).
      mesh: whose devices share the rows of a batch (`hope_jax.train.sharding`).

    Returns:
      A pure function. Metrics are float32 scalars: `loss` in nats, `grad_norm`,
      `update_norm`; and int32 `tokens`, predicted in the step.
    """

    def live(params, fast, tokens):
        return apply_fn(graphdef, params, tokens[:, :-1], fast)

    def objective(params, context):
        tokens, logits = context
        return mean_loss(logits, tokens)

    level = outer_level(tx, objective)

    def differentiate(tokens):
        if mesh is None or mesh.size == 1:
            return differentiation(tokens[:, 1:].size)
        own = differentiation(tokens[:, 1:].size // mesh.size)
        return sharding.of_rows(own, mesh)

    def step(state: TrainState, tokens: Int[Array, "B T1"]):
        after = hope_update(
            tokens,
            Slow(level, state.level),
            Fast(live),
            differentiate=differentiate(tokens),
        )
        moved = after.slow.state
        change = jax.tree.map(jnp.subtract, moved.params, state.params)
        metrics = {
            "loss": after.loss,
            "grad_norm": optax.tree.norm(after.gradient),
            "update_norm": optax.tree.norm(change),
            "tokens": jnp.asarray(tokens[:, 1:].size, jnp.int32),
        }
        return state._replace(level=moved), metrics

    return step


def make_evaluation(
    graphdef: Any, apply_fn: Apply
) -> Callable[[PyTree, Int[Array, "B T1"]], Float[Array, ""]]:
    """`(params, tokens[B, T+1]) -> mean loss in nats`, memory reset at each row."""

    def evaluate(params, tokens):
        logits, _ = apply_fn(graphdef, params, tokens[:, :-1], None)
        return mean_loss(logits, tokens)

    return evaluate
