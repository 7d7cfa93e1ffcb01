"""One step of training, pure: the slow level moves by what the fast ones read."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from hope_jax.core.level import Differentiate, Fast, Slow, hope_update
from hope_jax.models import share
from hope_jax.train import sharding
from hope_jax.train.state import TrainState, outer_level

Metrics = dict[str, Array]
Apply = Callable[..., tuple[Float[Array, "B T"], PyTree]]


class Packed(NamedTuple):
    """Rows of several documents (`hope_jax.data.stream.PackedRows`).

    Attributes:
      tokens: ids.
      document: that of each, -1 of none.
      weight: of each prediction in the mean; None before `weighed`.
    """

    tokens: Int[Array, "B T1"]
    document: Int[Array, "B T1"]
    weight: Float[Array, "B T"] | None = None


def weighed(batch: Packed, axis: str | None = None) -> Packed:
    """With weights of mean 1, none for what another document says; over `axis` of
    `jax.pmap` too."""
    before, after = batch.document[:, :-1], batch.document[:, 1:]
    own = ((before == after) & (after >= 0)).astype(jnp.float32)
    mean, size = own.mean(), own.size
    if axis is not None:
        mean, size = jax.lax.pmean(mean, axis), size * jax.lax.axis_size(axis)
    return batch._replace(weight=own / jnp.maximum(mean, 1.0 / size))


def begins(document: Int[Array, "B T1"], stretch: int) -> Bool[Array, "B S"]:
    """The stretches of a row where another document begins."""
    read = document[:, :-1].reshape(document.shape[0], -1, stretch)
    other = read[:, 1:, 0] != read[:, :-1, -1]
    first = jnp.zeros((read.shape[0], 1), bool)
    return jnp.concatenate([first, other], axis=1)


def make_step(
    graphdef: Any,
    apply_fn: Apply,
    tx: optax.GradientTransformation,
    differentiation: Callable[[int], Differentiate | None] = lambda tokens: None,
    mesh: Mesh | None = None,
    stretch: int = 0,
    accumulate: int = 1,
    by_layer: bool = False,
    of_step: Callable[[PyTree, PyTree, PyTree], Metrics] = lambda *trees: {},
    axis: str | None = None,
) -> Callable[[TrainState, Int[Array, "B T1"] | Packed], tuple[TrainState, Metrics]]:
    """The step of a language model: `(state, batch) -> (state, metrics)`.

    It is `hope_update` with the model's parameters as the slow level and everything
    that learns inside the sequence as the fast one. Each row of each batch is read from
    the learned initial states.

    Args:
      graphdef: the static half of the model.
      apply_fn: `(graphdef, params, tokens[B, T], state, after=tokens[B]) -> (losses[B,
        T], state)`, as `hope_jax.models.lm.apply`, for a state of None; with `Packed`
        rows it is given `begins` too, and where devices share the tokens of a row,
        `shared`.
      tx: the slow level's optimizer.
      differentiation: `tokens -> differentiate` of `hope_update`, for an optimizer that
        needs more than gradients (`hope_jax.optim.differentiation`).
      mesh: whose devices share the rows of a batch, or their tokens too
        (`hope_jax.train.sharding`).
      stretch: tokens between places where a document of `Packed` rows may begin.
      accumulate: parts in which each device reads its rows, one after another.
      by_layer: of a mesh that cuts parameters, gather the weights of a layer when it is
        read; by default all are gathered before the step.
      of_step: further metrics, of the gradient, of the change of the parameters, and of
        these before it.
      axis: of `jax.pmap`, whose devices share the rows instead of those of a mesh
        (`hope_jax.train.sharding.pmap_step`).

    Returns:
      A pure function. Metrics are float32 scalars: `loss` in nats, `grad_norm`,
      `update_norm`, and those of `of_step`; and int32 `tokens`, predicted in the step.
    """

    axis_of_tokens = sharding.shared(mesh)

    def live(apply, params, fast, batch):
        losses, state = _read(
            apply, graphdef, params, batch, fast, stretch, axis_of_tokens
        )
        return losses, state if axis_of_tokens is None else None

    def objective(params, context):
        batch, losses = context
        return _mean(losses, batch, axis_of_tokens)

    level = outer_level(tx, objective)

    def differentiate(tokens, parts):
        devices = 1 if mesh is None else sharding.shares(mesh)
        own = differentiation(tokens[:, 1:].size // (devices * accumulate))
        if accumulate > 1:
            own = sharding.in_turn(own, accumulate)
        if axis is not None:
            return sharding.of_replicas(own, axis)
        if mesh is None or sharding.shares(mesh) == 1:
            return own  # XLA refuses a mean over one device beside a tensor axis
        return sharding.of_rows(own, mesh, by_layer=parts is not None)

    def step(state: TrainState, batch: Int[Array, "B T1"] | Packed):
        apply, parts = apply_fn, None
        if by_layer and mesh is not None:
            parts = sharding.parts_of(state.params, mesh)
            if parts is not None:
                apply = functools.partial(apply_fn, parts=parts)
        count = _tokens(batch)[:, 1:].size
        if isinstance(batch, Packed):
            batch = weighed(batch, axis)
            count = jnp.sum(jnp.asarray(batch.weight) > 0)
        count = jnp.asarray(count, jnp.int32)
        if axis is not None:
            count = jax.lax.psum(count, axis)
        after = hope_update(
            batch,
            Slow(level, state.level),
            Fast(functools.partial(live, apply)),
            differentiate=differentiate(_tokens(batch), parts),
        )
        moved = after.slow.state
        change = jax.tree.map(jnp.subtract, moved.params, state.params)
        metrics = {
            "loss": after.loss,
            "grad_norm": optax.tree.norm(after.gradient),
            "update_norm": optax.tree.norm(change),
            "tokens": count,
            **of_step(after.gradient, change, state.params),
        }
        return state._replace(level=moved), metrics

    return step


def make_evaluation(
    graphdef: Any, apply_fn: Apply, stretch: int = 0, mesh: Mesh | None = None
) -> Callable[[PyTree, Int[Array, "B T1"] | Packed], Float[Array, ""]]:
    """`(params, batch of rows of T + 1) -> mean loss in nats`, memory reset at each
    row, and where a document of `Packed` ones begins; arguments as of `make_step`."""
    axis = sharding.shared(mesh)

    def mean(params, batch):
        losses, _ = _read(apply_fn, graphdef, params, batch, None, stretch, axis)
        return _mean(losses, batch, axis)

    def evaluate(params, batch):
        if isinstance(batch, Packed):
            batch = weighed(batch)
        if mesh is None or axis is None:
            return mean(params, batch)
        return sharding.of_shares(mean, mesh)(params, batch)

    return evaluate


def _tokens(batch):
    return batch.tokens if isinstance(batch, Packed) else batch


def _read(apply_fn, graphdef, params, batch, state, stretch, axis=None):
    """Losses of all tokens, or of this device's share of them over an `axis`."""
    tokens, more = _tokens(batch), {}
    if isinstance(batch, Packed):
        more["begins"] = begins(batch.document, stretch)
    if axis is not None:
        tokens, more = share.own(tokens, axis, 1), share.own(more, axis)
        more["shared"] = axis
    return apply_fn(
        graphdef, params, tokens[:, :-1], state, after=tokens[:, -1], **more
    )


def _mean(losses, batch, axis=None):
    if isinstance(batch, Packed):
        weight = batch.weight
        losses = losses * (weight if axis is None else share.own(weight, axis))
    return losses.astype(jnp.float32).mean()
