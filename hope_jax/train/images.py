"""Training of a vision transformer, compiled once for all that its runs differ in."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from hope_jax import optim
from hope_jax.data import images as images_lib
from hope_jax.data.images import BatchConfig, Images
from hope_jax.models import vit
from hope_jax.optim import groups
from hope_jax.train import sharding
from hope_jax.train.config import OptimizerConfig

_KEYS = ("image", "label")


class Program(NamedTuple):
    """One optimizer, compiled once for all of its lanes.

    A lane is what runs differ in: a tuple of numbers, among them its `seed`.

    Attributes:
      begin: `lane -> (params, state)`.
      advance: `(lane, carry, images [T, B, ...], labels) -> (carry, losses [T])`.
    """

    begin: Callable
    advance: Callable


class Curves(NamedTuple):
    """`[R, N]` each: runs, and a point every so many steps.

    Attributes:
      train: cross-entropy of the batches since the last point.
      held: cross-entropy on all of the held-out split.
      accuracy: on the same.
    """

    train: np.ndarray
    held: np.ndarray
    accuracy: np.ndarray


def program(
    model: vit.ViTConfig, rule: Callable[[Any], optax.GradientTransformation]
) -> Program:
    """Steps of `rule(lane)` on the cross-entropy of `model`."""

    def advance(lane, carry, images, labels):
        tx = rule(lane)

        def step(carry, batch):
            params, state = carry
            loss, gradient = jax.value_and_grad(
                lambda params: jnp.mean(losses(model, params, *batch)[0])
            )(params)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, carry, (images, labels))

    first = jax.jit(lambda lane, params: rule(lane).init(params))

    def begin(lane):
        params = fresh(model, lane.seed)
        return params, first(lane, params)

    return Program(begin, jax.jit(advance, donate_argnums=1))


def optimizer(
    config: OptimizerConfig, rate, weight_decay, steps: int
) -> optax.GradientTransformationExtraArgs:
    """`hope_jax.optim.build` with a rate and a decay that may be traced arrays."""
    rules = optim.rules_of(config)
    names = optim.labelled(rules)
    shape = optim.schedule(1.0, config.warmup_steps, steps, config.final_fraction)
    known = optim.Settings(
        rate=lambda count: rate * shape(count + 1), weight_decay=weight_decay
    )
    made = {names[kind]: rule.make(known) for kind, rule in rules.items()}
    choose = functools.partial(groups.names_of, names=names, layers=None)
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, groups.by_name(made, choose))


def losses(model: vit.ViTConfig, params, images, labels):
    """Cross-entropy and hit or miss of each image."""
    logits = vit.apply(_graphdef(model), params, images)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return entropy, jnp.argmax(logits, axis=-1) == labels


@functools.cache
def _graphdef(model):
    return vit.build(model, jax.random.key(0))[0]


@functools.partial(jax.jit, static_argnums=0)
def fresh(model: vit.ViTConfig, seed):
    """The parameters of a seed."""
    return vit.build(model, jax.random.key(seed))[1]


@functools.partial(jax.jit, static_argnums=0)
def score(model: vit.ViTConfig, params, images, labels, mask):
    """Sums of cross-entropy and of hits."""
    entropy, hits = losses(model, params, images, labels)
    return jnp.sum(entropy, where=mask), jnp.sum(hits, where=mask)


class Reader:
    """Batches by seed, and held-out splits; kept where the images are in memory.

    Args:
      images: to train on.
      batch: of a step.
      every: steps between two points of a curve.
      augment: random crops and mirroring, for photographs.
    """

    def __init__(self, images: Images, batch: int, every: int, augment: bool = False):
        self.images, self.batch, self.every = images, batch, every
        self._augment, self._kept = augment, {}

    def parts(self, seed: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`(images [T, B, S, S, N], labels [T, B])`, T steps at a time."""
        size = 1 if self.images.on_disk else self.every
        kept = self._kept.get(seed)
        stream = self._batches(seed) if kept is None else iter(kept[:steps])
        for _ in range(steps // size):
            batches = [next(stream) for _ in range(size)]
            images, labels = (np.stack([b[key] for b in batches]) for key in _KEYS)
            yield images, labels

    def held(self, images: Images):
        """The batches of a held-out split, each image once."""
        batches = functools.partial(images_lib.evaluation_batches, images, self.batch)
        if images.on_disk:
            return batches()
        if images.name not in self._kept:
            self._kept[images.name] = list(batches())
        return self._kept[images.name]

    def keep(self, seed: int, steps: int) -> None:
        """Reads the batches of a seed, if they are to be kept."""
        if not self.images.on_disk:
            stream = self._batches(seed)
            self._kept[seed] = [next(stream) for _ in range(steps)]

    def _batches(self, seed):
        config = BatchConfig(batch=self.batch, seed=seed, augment=self._augment)
        return iter(images_lib.batches(self.images, config))


def run(
    model: vit.ViTConfig,
    compiled: Program,
    lanes: Sequence[Any],
    reader: Reader,
    held: Images,
    steps: int,
    *,
    divided: bool = False,
) -> Curves:
    """Runs every lane for `steps` steps, a multiple of the reader's `every`.

    Args:
      model: what is trained.
      compiled: how.
      lanes: what the runs differ in.
      reader: of the batches.
      held: images that the points of the curves are scored on.
      steps: of each run.
      divided: each batch is divided among all devices.
    """
    place, divide = placement(reader.batch, divided)

    def one(lane):
        carry = place(compiled.begin(lane))
        points, since = [], []
        for images, labels in reader.parts(lane.seed, steps):
            carry, loss = compiled.advance(lane, carry, *divide(images, labels))
            since += loss.tolist()
            if len(since) == reader.every:
                entropy = hits = count = 0
                for batch in reader.held(held):
                    arrays = (batch[key] for key in (*_KEYS, "mask"))
                    sums = score(model, carry[0], *arrays)
                    entropy, hits = entropy + float(sums[0]), hits + int(sums[1])
                    count += int(batch["mask"].sum())
                points.append((np.mean(since), entropy / count, hits / count))
                since = []
        return tuple(zip(*points, strict=True))

    return Curves(*map(np.array, zip(*map(one, lanes), strict=True)))


def placement(batch: int, divided: bool) -> tuple[Callable, Callable]:
    """How weights and batches come onto the devices: as they are, or divided."""
    if not divided:
        return lambda carry: carry, lambda *arrays: arrays
    devices = jax.devices()[: math.gcd(jax.device_count(), batch)]
    mesh = sharding.make_mesh(devices)
    rows = NamedSharding(mesh, PartitionSpec(None, sharding.DATA))
    return (
        lambda carry: sharding.replicate(carry, mesh),
        lambda *arrays: jax.device_put(arrays, (rows,) * len(arrays)),
    )
