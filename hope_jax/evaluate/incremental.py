"""A network that learns task after task: what it learned, and what it forgot.

The network is that of `hope_jax.evaluate.noise`. No one tells it at a test which task
is asked: all classes that it has been shown compete.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from hope_jax.data.synthetic import incremental
from hope_jax.data.synthetic.incremental import Pool, Stream
from hope_jax.data.synthetic.noise import replace_labels
from hope_jax.evaluate.noise import Digits, begin, logits
from hope_jax.optim import capture

_NEVER = -1e9  # the logit of a class that was not shown yet
_FISHER = 128  # vectors that the importance of weights is estimated from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """How the tasks are taught.

    Attributes:
      hidden: width of the network.
      steps, batch: of each task.
      points: places in a task, evenly apart, at which all tasks are scored.
      replay: vectors of each class of each past task that are kept; half of every batch
        is then of them. 0 for none.
      consolidate: whether weights are held where they mattered: elastic weight
        consolidation (Kirkpatrick et al., arXiv:1612.00796), the sum over past tasks of
        ½ λ F (θ - θ*)², with the Fisher information of labels drawn from the network.
      joint: all tasks at once, for as many steps.
    """

    hidden: int = 64
    steps: int = 200
    batch: int = 32
    points: int = 5
    replay: int = 0
    consolidate: bool = False
    joint: bool = False

    def __post_init__(self):
        if self.points < 1 or self.steps % self.points:
            raise ValueError(
                f"points ({self.points}) must divide steps ({self.steps})."
            )


class Life(NamedTuple):
    """What came of it.

    Attributes:
      accuracy: of every task (last axis), at the points of each task (first two).
      losses: cross-entropy of the batches of each task, before their steps.
    """

    accuracy: Float[Array, "*S T P T"]
    losses: Float[Array, "*S T N"]


class _Held(NamedTuple):
    """The penalty's gradient is λ (weight θ - pull)."""

    weight: PyTree
    pull: PyTree


def live(
    rule: optax.GradientTransformation,
    of: Pool,
    held: Digits,
    stream: Stream,
    key: Array,
    lesson: Lesson,
    *,
    strength: Float[Array, ""] | float = 0.0,
    inputs: bool = False,
) -> Life:
    """Task after task, without a word to the rule that the task has changed.

    Args:
      rule: the optimizer.
      of: what it is taught from.
      held: what it is scored on.
      stream: the tasks.
      key: of the start, the batches and what is kept.
      lesson: how.
      strength: λ, where weights are consolidated.
      inputs: whether the rule takes the inputs of matrices too.
    """
    s, rule = lesson, optax.with_extra_args_support(rule)
    count, tasks = len(of.counts), len(stream.classes)
    keys = jax.random.split(key, 4)
    params = begin(s.hidden, keys[0])
    shown = incremental.seen(stream, count)
    shown = jnp.ones_like(shown) if s.joint else shown
    kept = incremental.keep(stream, s.replay, keys[1]) if s.replay else stream
    nothing = jax.tree.map(jnp.zeros_like, params)

    def batch(task, key):
        keys = jax.random.split(key, 4)
        place = jnp.full((s.batch,), task)
        if s.joint:
            place = jax.random.randint(keys[0], (s.batch,), 0, tasks)
        x, y = incremental.draw(of, stream, place, keys[1])
        if s.replay:
            past = jax.random.randint(keys[2], (s.batch,), 0, jnp.maximum(task, 1))
            old = (jnp.arange(s.batch) % 2 == 1) & (task > 0)
            again = incremental.draw(of, kept, past, keys[3])
            x = jnp.where(old[:, None], again[0], x)
            y = jnp.where(old, again[1], y)
        return x, y

    def step(carry, key, task):
        params, state, anchors = carry
        x, y = batch(task, key)
        loss = lambda params: entropy(params, x, y, shown[task])  # noqa: E731
        if inputs:
            value, slope, grams = capture.value_and_dgd_gradients(loss, params)
            more = {"inputs": grams}
        else:
            (value, slope), more = jax.value_and_grad(loss)(params), {}
        if s.consolidate:
            slope = jax.tree.map(
                lambda g, w, f, p: g + strength * (f * w - p), slope, params, *anchors
            )
        updates, state = rule.update(slope, state, params, **more)
        return (optax.apply_updates(params, updates), state, anchors), value

    def learn(carry, given):
        task, key = given
        keys = jax.random.split(key, (s.points, s.steps // s.points))

        def point(carry, keys):
            carry, losses = jax.lax.scan(lambda c, k: step(c, k, task), carry, keys)
            return carry, (accuracies(carry[0], held, stream, shown[task]), losses)

        carry, (accuracy, losses) = jax.lax.scan(point, carry, keys)
        if s.consolidate:
            params, state, anchors = carry
            keys = jax.random.split(jax.random.fold_in(key, 1))
            x, _ = incremental.draw(of, stream, jnp.full((_FISHER,), task), keys[0])
            weight = importance(params, x, shown[task], keys[1])
            pull = jax.tree.map(jnp.multiply, weight, params)
            anchors = jax.tree.map(jnp.add, anchors, _Held(weight, pull))
            carry = params, state, anchors
        return carry, Life(accuracy, losses.ravel())

    carry = params, rule.init(params), _Held(nothing, nothing)
    each = jnp.arange(tasks, dtype=jnp.int32), jax.random.split(keys[2], tasks)
    return jax.lax.scan(learn, carry, each)[1]


def program(
    rule: Callable[[Array], optax.GradientTransformation],
    stream: Callable[[Pool, int, Array], Stream],
    tasks: int,
    lesson: Lesson,
    *,
    inputs: bool = False,
) -> Callable[..., Life]:
    """All lives of a rule as one program: every trial with every seed.

    Args:
      rule: `rate -> optimizer`; the rate is traced.
      stream: `(pool, tasks, key) -> tasks`, of `hope_jax.data.synthetic.incremental`.
      tasks, lesson, inputs: as of `live`.

    Returns:
      `(rates [N], strengths [N], keys [S], labels, pool, held) -> lives [N, S]`, where
      `labels` is the share of the pool's labels that is replaced for good. Tasks, start
      and batches depend on the key alone.
    """

    def one(rate, strength, key, labels, of, held):
        keys = jax.random.split(key, 3)
        wrong = of._replace(y=replace_labels(of.y, labels, keys[0], len(of.counts)))
        made = stream(of, tasks, keys[1])
        more = {"strength": strength, "inputs": inputs}
        return live(rule(rate), wrong, held, made, keys[2], lesson, **more)

    seeds = jax.vmap(one, (None, None, 0, None, None, None))
    return jax.jit(jax.vmap(seeds, (0, 0, None, None, None, None)))


def entropy(
    params: PyTree,
    x: Float[Array, "B F"],
    y: Int[Array, " B"],
    shown: Bool[Array, " C"],
) -> Float[Array, ""]:
    """Cross-entropy in nats, over the classes that were shown."""
    said = jnp.where(shown[None], logits(params, x), _NEVER)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(said, y))


def accuracies(
    params: PyTree, held: Digits, stream: Stream, shown: Bool[Array, " C"]
) -> Float[Array, " T"]:
    """Of each task: of its classes, given as it gives them."""

    def one(inputs, classes):
        said = logits(params, incremental.turned(held.x, inputs))
        right = jnp.argmax(jnp.where(shown[None], said, _NEVER), axis=-1) == held.y
        own = jnp.any(held.y[:, None] == classes[None], axis=-1)
        return jnp.mean(right.astype(jnp.float32), where=own)

    return jax.vmap(one)(stream.inputs, stream.classes)


def importance(
    params: PyTree, x: Float[Array, "B F"], shown: Bool[Array, " C"], key: Array
) -> PyTree:
    """The diagonal of the Fisher information: mean squares of the gradients of single
    vectors, with labels as the network itself would give them."""
    said = jnp.where(shown[None], logits(params, x), _NEVER)
    y = jax.random.categorical(key, said).astype(jnp.int32)
    of_one = lambda x, y: jax.grad(entropy)(params, x[None], y[None], shown)  # noqa: E731
    return jax.tree.map(lambda g: jnp.mean(g**2, axis=0), jax.vmap(of_one)(x, y))


def measures(life: Life) -> dict[str, np.ndarray]:
    """Numbers of lives, one each; `life` leads with them.

    With R[i, j] the accuracy of task j after task i of T:

        acc      mean over j of R[T, j]
        aia      mean over i of the mean over j <= i of R[i, j]
        learned  mean over j of R[j, j]
        bwt      mean over j < T of R[T, j] - R[j, j]
        forgotten  mean over j < T of max over j <= i < T of R[i, j], less R[T, j]
        least    mean over j < T of the least accuracy of task j at any later point

    As in Lopez-Paz and Ranzato (arXiv:1706.08840), Rebuffi et al. (arXiv:1611.07725),
    Chaudhry et al. (arXiv:1801.10112) and De Lange et al. (arXiv:2205.13452).
    """
    points = np.asarray(life.accuracy, np.float64)
    after = points[..., -1, :]
    tasks = after.shape[-1]
    final, learned = after[..., -1, :], np.diagonal(after, axis1=-2, axis2=-1)
    so_far = [after[..., i, : i + 1].mean(-1) for i in range(tasks)]
    best = [after[..., j:-1, j].max(-1) for j in range(tasks - 1)]
    least = [points[..., j + 1 :, :, j].min((-1, -2)) for j in range(tasks - 1)]
    before = final[..., :-1]
    found = {
        "acc": final.mean(-1),
        "aia": np.mean(so_far, axis=0),
        "learned": learned.mean(-1),
        "bwt": (before - learned[..., :-1]).mean(-1),
        "forgotten": (np.stack(best, axis=-1) - before).mean(-1),
        "least": np.mean(least, axis=0),
    }
    return {name: np.asarray(values) for name, values in found.items()}


def arrival(life: Life, target: float, window: int = 10) -> np.ndarray:
    """Steps of each task until the mean loss of `window` batches is at `target`, all
    steps where it never is: `[*S, T]`."""
    losses = np.nan_to_num(np.asarray(life.losses, np.float64), nan=np.inf)
    total = np.lib.stride_tricks.sliding_window_view(losses, window, axis=-1).mean(-1)
    there = total <= target
    first = there.argmax(-1) + float(window)
    return np.where(there.any(-1), first, float(losses.shape[-1]))
