"""Words of groups: tables that are groups', and products against a loop."""

import jax
import numpy as np
import pytest

from hope_jax.data.synthetic.words import GROUPS, WordsConfig, products

SIZES = {"z2": 2, "s3": 6, "a4": 12, "a5": 60, "s4": 24, "s5": 120}


@pytest.mark.parametrize("group", GROUPS)
def test_its_table_is_a_group_s(group):
    table = products(group)
    every = np.arange(SIZES[group])
    assert table.shape == (len(every), len(every))
    assert (table[0] == every).all() and (table[:, 0] == every).all()
    for axis in (0, 1):  # each element once in each line: all can be undone
        assert (
            np.sort(table, axis) == np.sort(every).reshape((-1, 1)[:: 1 - 2 * axis])
        ).all()
    a, b, c = np.random.default_rng(0).integers(0, len(every), (3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    commutes = (table == table.T).all()
    assert commutes == (group == "z2")


def test_a4_and_a5_are_the_even_half():
    """Squares and threefold products are in it: no element has an even order but 2."""
    for group, orders in (("a4", {1, 2, 3}), ("a5", {1, 2, 3, 5})):
        table, found = products(group), set()
        for a in range(len(table)):
            x, n = a, 1
            while x != 0:
                x, n = table[x, a], n + 1
            found.add(n)
        assert found == orders


def test_labels_are_products_so_far():
    config = WordsConfig(group="s3", length=17)
    asked = jax.tree.map(np.asarray, config.batch(jax.random.key(0), 32))
    table = products("s3")
    for word, told in zip(asked.tokens, asked.labels, strict=True):
        state = 0
        for element, label in zip(word, told, strict=True):
            state = table[state, element]
            assert state == label
    assert asked.mask.all() and set(asked.tokens.flat) == set(range(6))


def test_bad_tasks_are_refused():
    with pytest.raises(ValueError, match="group must be one of z2, .*got 's2'"):
        WordsConfig(group="s2")
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        WordsConfig(length=0)
