"""A sequence model that learns in context, trained on rows of two tasks.

Nothing but the outer loss says whether it is to keep the first task while it learns the
second: with the loss of asking the first again it may learn to, without it need not
(Irie et al., arXiv:2312.00276).
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from hope_jax import optim
from hope_jax.core.config import at_least
from hope_jax.data import images as images_lib
from hope_jax.data.synthetic.episodes import ASKED, Episode, EpisodeConfig
from hope_jax.models import vectors
from hope_jax.models.cms import CMSConfig
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.base import MixerConfig
from hope_jax.train.config import OptimizerConfig

_STRIDE = 20  # steps of one call of the device
_ROWS = 64  # episodes that are scored at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextConfig:
    """What all models that are compared share.

    Attributes:
      episode: the rows.
      size: side of an image.
      d_model, layers, heads, hidden: sizes of the model and of its MLPs.
      optimizer: of the outermost level.
      batch: rows of a step.
      steps: of training.
      evaluation: rows of each kind that a model is scored on.
    """

    episode: EpisodeConfig = EpisodeConfig()
    size: int = 14
    d_model: int = 64
    layers: int = 2
    heads: int = 4
    hidden: int = 128
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-3, warmup_steps=50, weight_decay=0.0
    )
    batch: int = 16
    steps: int = 1000
    evaluation: int = 512

    def __post_init__(self):
        at_least(self, size=1, batch=1, steps=1, evaluation=2)

    @property
    def inputs(self) -> int:
        """Numbers that are read at each place: an image, and its label or none."""
        return self.size**2 + self.episode.ways + 1


class Told(NamedTuple):
    """At each place of `ASKED`, row by row: the share of right answers, and the loss
    in nats."""

    accuracy: Float[Array, "B 3"]
    loss: Float[Array, "B 3"]


def model_for(config: InContextConfig, mixer: MixerConfig | str) -> ModelConfig:
    """The blocks around a mixer, or its kind."""
    made = ModelConfig(
        name="in_context",
        vocab=config.episode.ways,
        d_model=config.d_model,
        layers=config.layers,
        heads=config.heads,
        mixer=MIXERS.of(mixer, "mixer"),
        cms=CMSConfig(hidden=config.hidden),
    )
    return with_context(made, config.episode.length)


def characters(
    data: str,
    split: str,
    size: int,
    data_dir: str | os.PathLike | None = None,
    *,
    turned: bool = False,
) -> Float[np.ndarray, "C D F"]:
    """Images by class, each with a mean of 0 and a variance of 1; ink is bright.

    Args:
      data, split, data_dir: as of `hope_jax.data.images.load`.
      size: side of an image.
      turned: whether every class turned by 90, 180 and 270 degrees is one more.
    """
    given = images_lib.load(data, split=split, size=size, data_dir=data_dir)
    pixels = images_lib.by_class(given)[..., 0]
    if data == "omniglot":
        pixels = 1.0 - pixels
    if turned:
        pixels = np.concatenate([np.rot90(pixels, k, (2, 3)) for k in range(4)])
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    pixels = pixels - pixels.mean(-1, keepdims=True)
    return pixels / np.maximum(pixels.std(-1, keepdims=True), 1e-3)


def counted(said: Float[Array, "B T N"], episode: Episode) -> Told:
    """What answers, as logits, are worth."""
    cost = optax.softmax_cross_entropy_with_integer_labels(said, episode.labels)
    right = (jnp.argmax(said, axis=-1) == episode.labels).astype(jnp.float32)
    asked = episode.asked.astype(jnp.float32)
    mean = lambda a: jnp.einsum("bt,bkt->bk", a, asked) / asked.sum(-1)  # noqa: E731
    return Told(mean(right), mean(cost))


def read(
    graphdef: Any, ways: int, params: Any, episode: Episode
) -> Float[Array, "B T N"]:
    """What a model answers at every place."""
    # A label as long as an image, so that neither drowns the other.
    told = episode.x.shape[-1] ** 0.5 * jax.nn.one_hot(episode.told, ways + 1)
    return vectors.apply(graphdef, params, jnp.concatenate([episode.x, told], -1))[0]


def nearest(ways: int, params: Any, episode: Episode) -> Float[Array, "B T N"]:
    """What the nearest shot of the task that is asked says; no model, and it is told
    which task that is."""
    del params
    shot = episode.told < ways
    first = jnp.cumsum(shot, axis=-1) <= jnp.sum(shot, axis=-1, keepdims=True) // 2
    second_asked = episode.asked[:, 1]
    own = shot[:, None] & (first[:, None] != second_asked[..., None])
    square = jnp.sum(episode.x**2, axis=-1)
    apart = square[..., None] + square[:, None]
    apart = apart - 2.0 * jnp.einsum("bqf,bsf->bqs", episode.x, episode.x)
    of = jax.nn.one_hot(episode.told, ways, dtype=bool)  # none of what has no label
    far = jnp.where((own[..., None] & of[:, None]), apart[..., None], jnp.inf)
    return -jnp.min(far, axis=2) / episode.x.shape[-1]


def train(
    config: InContextConfig,
    model: ModelConfig,
    seed: int,
    images: Float[np.ndarray, "C D F"],
    *,
    backward: bool,
) -> tuple[Any, dict[str, float]]:
    """Trains a model; parameters and rows depend on the seed alone.

    Args:
      config: how.
      model: what, as of `model_for`.
      seed: of all that is drawn.
      images: of which rows are made, as of `characters`.
      backward: whether task 1 after task 2 is in the loss.

    Returns:
      The parameters, and `seconds`, its compilation apart, and the mean loss of the
      last tenth of the steps at each place.

    Raises:
      FloatingPointError: it diverged.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    graphdef, params = vectors.build(model, config.inputs, init_key)
    answer = functools.partial(read, graphdef, config.episode.ways)
    places = 3 if backward else 2
    tx = optim.build(
        config.optimizer, total_steps=config.steps, periods=optim.one_clock(params)
    )

    def step(i, carry):
        params, state, images, start, total = carry
        rows = config.episode.batch(
            jax.random.fold_in(key, start + i), images, config.batch
        )

        def objective(params):
            loss = counted(answer(params, rows), rows).loss.mean(0)
            return loss[:places].mean(), loss

        slope, loss = jax.grad(objective, has_aux=True)(params)
        updates, state = tx.update(slope, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, images, start, total + loss

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(carry, images, start, count):
        carry = (*carry, images, start, jnp.zeros(len(ASKED)))
        params, state, *_, total = jax.lax.fori_loop(0, count, step, carry)
        return (params, state), total / count

    given = jnp.asarray(images)
    carry, losses = (params, tx.init(params)), []
    compiled = advance.lower(carry, given, 0, 1).compile()
    start = time.perf_counter()
    for first in range(0, config.steps, _STRIDE):
        count = min(_STRIDE, config.steps - first)
        carry, loss = compiled(carry, given, first, count)
        losses.append(np.asarray(loss))
        if not math.isfinite(losses[-1].sum()):
            raise FloatingPointError(f"{model.kinds} diverged by step {first + count}.")
    made = {"seconds": round(time.perf_counter() - start, 1)}
    last = np.mean(losses[-max(1, len(losses) // 10) :], axis=0)
    return carry[0], made | dict(zip(ASKED, map(float, last), strict=True))


def score(
    config: InContextConfig,
    model: ModelConfig | None,
    params: Any,
    seed: int,
    images: Mapping[str, Float[np.ndarray, "C D F"]],
) -> dict[str, Told]:
    """What is answered on rows of several kinds of images, the same for all models.

    Args:
      config: as of `train`.
      model: as of `train`; None answers as `nearest`.
      params: of `train`.
      seed: of the rows.
      images: kind -> what they are made of.
    """
    answer = functools.partial(nearest, config.episode.ways)
    if model is not None:
        graphdef, _ = vectors.build(model, config.inputs, jax.random.key(0))
        answer = functools.partial(read, graphdef, config.episode.ways)
    count = min(_ROWS, config.evaluation)

    @jax.jit
    def some(params, images, key):
        rows = config.episode.batch(key, images, count)
        return counted(answer(params, rows), rows)

    found = {}
    for number, (kind, given) in enumerate(images.items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        keys = jax.random.split(key, -(-config.evaluation // count))
        each = [some(params, given, key) for key in keys]
        whole = jax.tree.map(lambda *a: np.concatenate(a), *each)
        found[kind] = jax.tree.map(lambda a: a[: config.evaluation], whole)
    return found
