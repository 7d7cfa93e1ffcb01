"""What an optimizer makes of noise: a small network, trained in it, scored without."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.data import images
from hope_jax.data.synthetic.noise import Noise, draw, replace_labels

DIVERGED = 100.0  # a loss above it, or none at all, counts as it


class Digits(NamedTuple):
    """Images in [0, 1], a row each, and their classes."""

    x: Float[Array, "N 64"]
    y: Int[Array, " N"]


def load() -> dict[str, Digits]:
    """Scikit-learn's digits: `train`, `valid` and `test`."""
    found = {}
    for split in ("train", "valid", "test"):
        digits = images.load("digits", split=split)
        (batch,) = images.evaluation_batches(digits, len(digits))
        x = jnp.asarray(batch["image"]).reshape(len(digits), -1)
        found[split] = Digits(x, jnp.asarray(batch["label"]))
    return found


def begin(hidden: int, key: Array) -> PyTree:
    """The network where training starts: one hidden layer."""

    def layer(key, rows, columns):
        kernel = jax.random.normal(key, (rows, columns)) * (2.0 / rows) ** 0.5
        return {"kernel": kernel, "bias": jnp.zeros(columns)}

    keys = jax.random.split(key)
    return {"hidden": layer(keys[0], 64, hidden), "out": layer(keys[1], hidden, 10)}


def logits(params: PyTree, x: Float[Array, "B 64"]) -> Float[Array, "B 10"]:
    def layer(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"][None, :]

    return layer("out", jax.nn.relu(layer("hidden", x)))


def loss(params: PyTree, x: Array, y: Array) -> Float[Array, ""]:
    """Cross-entropy in nats; that of chance is 2.30."""
    said = logits(params, x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(said, y))


class Scores(NamedTuple):
    """Clean losses on validation and test digits, and the test's accuracy."""

    validation: Float[Array, "*S"]
    loss: Float[Array, "*S"]
    accuracy: Float[Array, "*S"]


def train(
    rule: optax.GradientTransformation,
    digits: dict[str, Digits],
    noise: Noise,
    key: Array,
    *,
    hidden: int,
    steps: int,
    batch: int,
) -> Scores:
    """One network, trained in noise and scored without.

    The unit of the noise in gradients is the root mean square of the clean gradient
    where training starts.
    """
    rule = optax.with_extra_args_support(rule)
    keys = jax.random.split(key, 3)
    x, y = digits["train"]
    labels = replace_labels(y, noise.labels, keys[0])
    params = begin(hidden, keys[1])
    clean = ravel_pytree(jax.grad(loss)(params, x, y))[0]
    unit = jnp.sqrt(jnp.mean(clean**2))

    def step(carry, key):
        params, state = carry
        keys = jax.random.split(key)
        rows = jax.random.randint(keys[0], (batch,), 0, len(y))
        gradient = jax.grad(loss)(params, x[rows], labels[rows])
        added = draw(noise, params, keys[1])
        gradient = jax.tree.map(lambda g, n: g + unit * n, gradient, added)
        updates, state = rule.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    each = jax.random.split(keys[2], steps)
    (params, _), _ = jax.lax.scan(step, (params, rule.init(params)), each)

    def bounded(value):
        return jnp.where(value < DIVERGED, value, DIVERGED)  # also where it is NaN

    valid, test = digits["valid"], digits["test"]
    right = jnp.argmax(logits(params, test.x), axis=-1) == test.y
    return Scores(
        bounded(loss(params, *valid)),
        bounded(loss(params, *test)),
        jnp.mean(right.astype(jnp.float32)),
    )


def tuned(
    rule: Callable[[Array, Array], optax.GradientTransformation],
    digits: dict[str, Digits],
    noises: Sequence[Noise],
    trials: np.ndarray,
    best: Callable[[np.ndarray], np.ndarray],
    tuning: Array,
    keys: Array,
    **sizes: int,
) -> tuple[np.ndarray, Scores]:
    """A rule in every noise, at the trial that is best there.

    Args:
      rule: `(rate, decay) -> optimizer`; both are traced.
      digits: as of `load`.
      noises: of which each has a trial of its own.
      trials: `[trials, 2]`, rates and decays.
      best: mean validation losses `[trials, noises]` -> index of the best trial.
      tuning, keys: of the runs that choose, and of those that count.
      **sizes: of `train`.

    Returns:
      The index of the trial of each noise, and scores `[keys, noises]`.
    """
    given = jax.tree.map(lambda *each: jnp.array(each), *noises)

    def one(rate, decay, noise, key):
        return train(rule(rate, decay), digits, noise, key, **sizes)

    # One program: all noises and seeds, at a rate and decay for each noise.
    by_noise = jax.vmap(one, (0, 0, 0, None))
    program = jax.jit(jax.vmap(by_noise, (None, None, None, 0)))

    def run(pairs, keys):
        found = program(pairs[:, 0], pairs[:, 1], given, keys)
        return jax.tree.map(lambda score: np.asarray(score, np.float64), found)

    every = np.ones((len(noises), 1), np.float32)
    tried = [run(every * pair, tuning) for pair in trials]
    chosen = best(np.stack([t.validation.mean(0) for t in tried]))
    return chosen, run(trials[chosen], keys)
