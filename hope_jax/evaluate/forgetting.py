"""What an optimizer forgets: its life on a stream of orthogonal tasks (equation 45)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from hope_jax.data.synthetic import orthogonal
from hope_jax.data.synthetic.orthogonal import OrthogonalConfig
from hope_jax.optim.capture import dgd_gradients


class Stream(NamedTuple):
    """What one rule does, on one stream of tasks.

    Attributes:
      errors: `[N, N]`, after each task (rows) of each task.
      old: squared length of the updates in earlier tasks' subspaces, and of all.
      gradient: the same of the gradients.
    """

    errors: Float[Array, "N N"]
    old: Float[Array, "2"]
    gradient: Float[Array, "2"]


def live(
    rule: optax.GradientTransformation,
    config: OrthogonalConfig,
    key: Array,
    *,
    leak: Float[Array, ""] | float,
    steps: int,
    batch: int,
) -> Stream:
    """Task after task, without a word to the rule that the task has changed.

    Args:
      rule: the optimizer; it is told the inputs, too.
      config: the tasks.
      key: of tasks and batches.
      leak: size of the inputs' part outside of their task's subspace.
      steps, batch: of each task.
    """
    s, rule = config, optax.with_extra_args_support(rule)
    of = orthogonal.tasks(s, jax.random.fold_in(key, 0))
    w = jnp.zeros((s.outputs, s.width))

    def lengths(change, index):
        inside = jnp.sum(jnp.einsum("ow,nwr->nor", change, of.subspaces) ** 2, (1, 2))
        earlier = jnp.arange(s.tasks, dtype=jnp.int32) < index
        counts = jnp.where(index > 0, 1.0, 0.0)
        within = jnp.sum(jnp.where(earlier, inside, 0.0))
        return counts * jnp.stack([within, jnp.sum(change**2)])

    def step(carry, key):
        w, state, index, old, gradient = carry
        task = index // steps
        subspace, target = of.subspaces[task], of.targets[task]
        x, y = orthogonal.batch(subspace, target, leak, batch, key)
        grads, inputs = dgd_gradients(orthogonal.loss, w, x, y, input_axis=-1)
        updates, state = rule.update(grads, state, w, inputs=inputs)
        old = old + lengths(updates, task)
        gradient = gradient + lengths(grads, task)
        return (w + updates, state, index + 1, old, gradient), None

    def task(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, orthogonal.errors(carry[0], of)

    keys = jax.random.split(jax.random.fold_in(key, 1), (s.tasks, steps))
    none = jnp.zeros((2,))
    carry = (w, rule.init(w), jnp.zeros((), jnp.int32), none, none)
    (*_, old, gradient), after = jax.lax.scan(task, carry, keys)
    return Stream(after, old, gradient)


def measures(stream: Stream) -> dict[str, np.ndarray]:
    """Numbers of streams, one each; `stream` leads with them.

    `learned`, the error right after each task, `final`, at the end of the stream, and
    `forgotten`, their difference over all but the last task, are means over tasks;
    `old` is the part of a rule's movement, during the tasks after the first, that lies
    in the subspaces of earlier tasks, `gradient` that of the gradients it received.
    """
    after = np.asarray(stream.errors, np.float64)
    learned = np.diagonal(after, axis1=-2, axis2=-1)
    final = after[..., -1, :]
    with np.errstate(invalid="ignore"):  # rates at which a rule diverges
        forgotten = final - learned
    return {
        "final": final.mean(-1),
        "learned": learned.mean(-1),
        "forgotten": forgotten[..., :-1].mean(-1),
        "old": _part(stream.old),
        "gradient": _part(stream.gradient),
    }


def _part(lengths):
    within, whole = np.moveaxis(np.asarray(lengths, np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.where(whole > 0, within / np.where(whole > 0, whole, 1.0), 0.0)
