"""The guard of a step, pure: one that would do harm leaves everything as it was.

A step whose loss, gradient or update is not finite is skipped, and so is one whose loss
or gradient norm lies far above those of the last good steps. Parameters and optimizer
stay bit for bit what they were, and the step is counted. What the guard knows is part
of the train state, so it is there again after a restart.

Windows of 128 steps, 6 standard deviations and half a window before it acts are those
of OLMo's optimizer that skips. Unlike there a value enters the window no higher than
the bound: one outlier does not blind the guard to the next, and a change of twenty
deviations that lasts is taken up in ten steps. A NaN never enters it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

WATCHED = ("loss", "grad_norm")
FINITE = (*WATCHED, "update_norm")
SKIPPED, IN_A_ROW = "skipped", "skipped_in_a_row"
LEAST = 0.01  # deviation, in means: what is nearly constant has no spikes


class Guard(NamedTuple):
    """What the guard of a run knows.

    Attributes:
      recent: the last losses and gradient norms that were finite, in a ring.
      seen: how many ever entered it.
      skipped: steps that were skipped.
      in_a_row: those of them since the last that was not.
      returns: how often the run went back to an earlier checkpoint.
    """

    recent: Float[Array, "2 W"]
    seen: Int[Array, ""]
    skipped: Int[Array, ""]
    in_a_row: Int[Array, ""]
    returns: Int[Array, ""]


def begin(window: int) -> Guard:
    """Before the first step. In buffers of its own, so that it may be donated."""

    def zero():
        return jnp.zeros((), jnp.int32)

    recent = jnp.zeros((len(WATCHED), window), jnp.float32)
    return Guard(recent, zero(), zero(), zero(), zero())


def judge(
    guard: Guard, watched: Float[Array, "2"], finite: Bool[Array, ""], sigma: float
) -> tuple[Bool[Array, ""], Guard]:
    """Whether a step may be taken, and what is known after it.

    Args:
      guard: what is known before.
      watched: its loss and gradient norm.
      finite: whether all that it computed is.
      sigma: standard deviations above the mean that are too far; 0 for none.
    """
    window = guard.recent.shape[1]
    held = jnp.arange(window, dtype=jnp.int32) < guard.seen
    count = jnp.maximum(held.sum(), 1).astype(jnp.float32)
    mean = jnp.where(held, guard.recent, 0).sum(axis=1) / count
    away = jnp.where(held, guard.recent - mean[:, None], 0)
    deviation = jnp.sqrt((away**2).sum(axis=1) / count)
    bound = mean + sigma * jnp.maximum(deviation, LEAST * jnp.abs(mean))
    acts = (guard.seen >= window // 2) & (sigma > 0)
    taken = finite & ~(acts & jnp.any(watched > bound))

    entry = jnp.where(acts, jnp.minimum(watched, bound), watched)
    at = jnp.arange(window, dtype=jnp.int32) == guard.seen % window
    recent = jnp.where(at & finite, entry[:, None], guard.recent)
    skip = (~taken).astype(jnp.int32)
    return taken, Guard(
        recent=recent,
        seen=guard.seen + finite.astype(jnp.int32),
        skipped=guard.skipped + skip,
        in_a_row=jnp.where(taken, 0, guard.in_a_row + 1).astype(jnp.int32),
        returns=guard.returns,
    )


def guarded(step: Callable, sigma: float) -> Callable:
    """`step`, of a state with a `guard`, which changes nothing when it should not.

    Args:
      step: `(state, batch) -> (state, metrics)`, as `hope_jax.train.step.make_step`.
      sigma: as of `judge`.

    Returns:
      The same, with the metrics `skipped`, of the run, and `skipped_in_a_row`.
    """

    def safe(state: Any, batch: Any):
        after, metrics = step(state, batch)
        finite = jnp.isfinite(jnp.stack([metrics[name] for name in FINITE])).all()
        watched = jnp.stack([metrics[name] for name in WATCHED])
        taken, guard = judge(state.guard, watched, finite, sigma)
        level = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), after.level, state.level
        )
        counts = {SKIPPED: guard.skipped, IN_A_ROW: guard.in_a_row}
        return after._replace(level=level, guard=guard), {**metrics, **counts}

    return safe
