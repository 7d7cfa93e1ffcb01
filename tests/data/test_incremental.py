"""Streams of tasks: who is in which task, and what may be drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.data.synthetic import incremental


def some(counts=(3, 1, 2, 4)):
    """Vectors whose first number is their class, and whose second is their place."""
    y = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    x = np.stack([y, np.arange(len(y)), np.zeros_like(y)], axis=1).astype(np.float32)
    return incremental.pool(jnp.asarray(x), jnp.asarray(y), len(counts))


def test_a_pool_finds_vectors_by_class():
    of = some()
    assert of.counts.tolist() == [3, 1, 2, 4]
    assert of.rows[0, :3].tolist() == [0, 1, 2] and of.rows[1, 0] == 3
    with pytest.raises(ValueError, match="class 1 of 3 has no vector"):
        incremental.pool(jnp.zeros((2, 1)), jnp.array([0, 2], jnp.int32), 3)


def test_split_tasks_share_no_class_and_draw_their_own(key):
    of = some()
    stream = incremental.split(of, 2, key)
    assert sorted(stream.classes.ravel().tolist()) == [0, 1, 2, 3]
    shown = incremental.seen(stream, 4)
    assert shown.sum(1).tolist() == [2, 4]
    tasks = jnp.arange(400, dtype=jnp.int32) % 2
    x, y = incremental.draw(of, stream, tasks, key)
    np.testing.assert_array_equal(x[:, 0], y)
    for task in range(2):
        mine, places = np.asarray(y)[task::2], np.asarray(x)[task::2, 1]
        assert set(mine) == set(stream.classes[task].tolist())
        share = np.mean(mine == mine[0])
        assert 0.4 < share < 0.6  # however many vectors each class has
        assert len(set(places)) == of.counts[stream.classes[task]].sum()
    with pytest.raises(ValueError, match="tasks must divide the 4 classes, got 3"):
        incremental.split(of, 3, key)


def test_permuted_tasks_turn_inputs_each_in_its_way(key):
    of = some()._replace(x=jnp.tile(jnp.arange(6.0)[None], (10, 1)))
    stream = incremental.permuted(of, 3, key)
    assert incremental.seen(stream, 4).all()
    x, _ = incremental.draw(of, stream, jnp.arange(3, dtype=jnp.int32), key)
    np.testing.assert_array_equal(x, stream.inputs)
    assert len({tuple(row) for row in x.tolist()}) == 3
    assert np.sort(x).tolist() == [list(range(6))] * 3


def test_what_is_kept_is_a_subset_of_its_size(key):
    of = some()
    stream = incremental.split(of, 2, key)
    kept = incremental.keep(stream, 2, key)
    for rows, counts, own, all_ in zip(
        *(np.asarray(a).reshape(4, -1) for a in (kept.rows, kept.counts)),
        *(np.asarray(a).reshape(4, -1) for a in (stream.rows, stream.counts)),
        strict=True,
    ):
        chosen = rows[: counts[0]]
        assert counts[0] == min(2, all_[0]) == len(set(chosen))
        assert set(chosen) <= set(own[: all_[0]])
    of_all = jax.vmap(lambda k: incremental.keep(stream, 2, k))
    many = of_all(jax.random.split(key, 100))  # no vector twice, where there are two
    alike = many.rows[..., 0] == many.rows[..., 1]
    assert not (alike & (many.counts == 2)).any()
    again = jax.vmap(lambda k: incremental.keep(stream, 1, k).rows)(
        jax.random.split(key, 300)
    )
    first = int(jnp.argmax(stream.counts[0]))
    drawn = np.unique(again[:, 0, first, 0], return_counts=True)[1]
    assert len(drawn) == stream.counts[0, first] and drawn.min() > 0.6 * drawn.mean()


def test_streams_are_pure_in_their_key(key):
    of = some()
    for make in incremental.STREAMS.values():
        one, two = make(of, 2, key), make(of, 2, key)
        jax.tree.map(np.testing.assert_array_equal, one, two)
        other = make(of, 2, jax.random.key(7))
        assert any(
            (a != b).any()
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        )
