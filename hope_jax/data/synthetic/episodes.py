"""Two tasks in one row, made of labelled images: learn one, learn another, recall both.

    task 1's shots, queries of task 1, task 2's shots, queries of task 2, then of task 1

As in "Metalearning Continual Learning Algorithms" (Irie et al., arXiv:2312.00276). A
task has some classes, labelled 0, 1, ... anew in every row, and both use the same
labels. A shot is an image with its label, a query one without; each class of a query
is drawn by itself, so that no answer tells of another, and no image comes twice.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hope_jax.core.config import at_least

ASKED = ("task 1", "task 2", "task 1 after task 2")


class Episode(NamedTuple):
    """Rows of images and what is asked of them.

    Attributes:
      x: an image at each place.
      told: the label that comes with it; the number of classes where none does.
      labels: its label.
      asked: the queries of task 1, of task 2, and of task 1 after task 2.
    """

    x: Float[Array, "*B T F"]
    told: Int[Array, "*B T"]
    labels: Int[Array, "*B T"]
    asked: Bool[Array, "*B 3 T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """A kind of row.

    Attributes:
      ways: classes of a task.
      shots: images of each, with their labels.
      queries: asked at each of the three places.
    """

    ways: int = 5
    shots: int = 5
    queries: int = 5

    def __post_init__(self):
        at_least(self, ways=2, shots=1, queries=1)

    @property
    def length(self) -> int:
        """Images of a row."""
        return 2 * self.ways * self.shots + 3 * self.queries

    def row(self, key: Array, images: Float[Array, "C D F"]) -> Episode:
        """One row drawn from `key`, of D images of each of C classes.

        Raises:
          ValueError: fewer classes, or fewer images of one, than a row needs.
        """
        classes, drawings, _ = images.shape
        needed = self.shots + 2 * self.queries
        for name, have, least in (
            ("classes", classes, 2 * self.ways),
            ("images of a class", drawings, needed),
        ):
            if have < least:
                raise ValueError(
                    f"images has {have} {name}, but a row needs {least}: "
                    f"{self.ways} ways, {self.shots} shots, {self.queries} queries."
                )
        keys = jax.random.split(key, 4)
        of = jax.random.choice(keys[0], classes, (2, self.ways), replace=False)
        noise = jax.random.uniform(keys[1], (2, self.ways, drawings))
        which = jnp.argsort(noise, axis=-1)[..., :needed]

        shots = jnp.arange(self.ways * self.shots, dtype=jnp.int32)
        shots = jax.vmap(lambda key: jax.random.permutation(key, shots))(
            jax.random.split(keys[2])
        )
        label, number = shots % self.ways, shots // self.ways
        asks = jax.random.randint(keys[3], (3, self.queries), 0, self.ways)
        place = self.shots + jnp.arange(self.queries, dtype=jnp.int32)
        parts = [
            (0, label[0], number[0]),
            (0, asks[0], place),
            (1, label[1], number[1]),
            (1, asks[1], place),
            (0, asks[2], place + self.queries),
        ]
        x = [images[of[task, a], which[task, a, i]] for task, a, i in parts]
        labels = jnp.concatenate([a for _, a, _ in parts])
        ends = [len(a) for _, a, _ in parts]
        part = jnp.repeat(jnp.arange(5), jnp.array(ends), total_repeat_length=sum(ends))
        asked = part[None] == jnp.array([1, 3, 4])[:, None]
        told = jnp.where(jnp.any(asked, axis=0), self.ways, labels)
        return Episode(jnp.concatenate(x), told, labels, asked)

    def batch(self, key: Array, images: Float[Array, "C D F"], rows: int) -> Episode:
        """`rows` rows drawn from `key`; pure, and may be compiled with its step."""
        each = jax.random.split(key, rows)
        return jax.vmap(lambda key: self.row(key, images))(each)
