"""Rows of two tasks: what stands where, and that no answer is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.data.synthetic.episodes import ASKED, EpisodeConfig

CONFIG = EpisodeConfig(ways=3, shots=2, queries=2)
IMAGES = jnp.stack(  # each says which class and which image of it it is
    jnp.meshgrid(jnp.arange(9.0), jnp.arange(7.0), indexing="ij"), axis=-1
)


@pytest.fixture(scope="module")
def rows():
    made = CONFIG.batch(jax.random.key(3), IMAGES, 400)
    return jax.tree.map(np.asarray, made)


def test_places_of_a_row(rows):
    assert rows.x.shape == (400, CONFIG.length, 2) and CONFIG.length == 18
    assert len(ASKED) == rows.asked.shape[1]
    for place, at in enumerate(([6, 7], [14, 15], [16, 17])):
        expected = np.isin(np.arange(18), at)
        assert (rows.asked[:, place] == expected).all()
    shot = ~rows.asked.any(axis=1)
    assert (rows.told[shot] == rows.labels[shot]).all()
    assert (rows.told[~shot] == CONFIG.ways).all()


def test_each_task_has_classes_of_its_own_and_every_label_as_often(rows):
    classes = rows.x[..., 0].astype(int)
    first, second = np.r_[0:8, 16:18], np.r_[8:16]
    for row in range(50):
        of = []
        for places in (first, second):
            pairs = set(
                zip(rows.labels[row, places], classes[row, places], strict=True)
            )
            assert len(pairs) == CONFIG.ways  # one class a label
            of.append({found for _, found in pairs})
        assert len(of[0] | of[1]) == 2 * CONFIG.ways
    for shots in (slice(0, 6), slice(8, 14)):
        counted = np.sort(rows.labels[:, shots], axis=1)
        assert (counted == np.repeat(np.arange(3), 2)).all()


def test_no_image_comes_twice_but_by_chance_in_one_query(rows):
    """Queries have places of their own among a class's images, so that one is never a
    shot, and never asked again later."""
    for row in range(50):
        seen = {}
        for place, image in enumerate(map(tuple, rows.x[row])):
            seen.setdefault(image, []).append(place)
        assert all(len(places) == 1 for places in seen.values())


def test_labels_of_queries_are_independent_and_tell_nothing(rows):
    asked = rows.labels[:, [6, 7, 14, 15, 16, 17]]
    shares = np.stack([(asked == label).mean(0) for label in range(3)])
    assert np.abs(shares - 1 / 3).max() < 0.09
    same = (asked[:, 0] == asked[:, 1]).mean()
    assert abs(same - 1 / 3) < 0.09  # not each class once
    # A class has any label.
    labels = rows.labels[rows.x[..., 0] == 0]
    assert np.bincount(labels, minlength=3).min() > 0.25 * len(labels)


def test_a_row_is_pure_in_its_key(rows):
    again = CONFIG.batch(jax.random.key(3), IMAGES, 400)
    jax.tree.map(np.testing.assert_array_equal, again, rows)
    assert len({tuple(row.ravel()) for row in rows.x}) == 400


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="images has 5 classes, but a row needs 6"):
        CONFIG.row(jax.random.key(0), IMAGES[:5])
    with pytest.raises(ValueError, match="5 images of a class, but a row needs 6"):
        CONFIG.row(jax.random.key(0), IMAGES[:, :5])
    with pytest.raises(ValueError, match="ways must be at least 2, got 1"):
        EpisodeConfig(ways=1)
