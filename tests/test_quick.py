"""`--quick` chooses one member of each kind."""

import pytest

from tests.chosen import quick


class Item:
    def __init__(self, nodeid, *markers):
        self.nodeid, self.markers = nodeid, markers

    def get_closest_marker(self, name):
        return name if name in self.markers else None


def test_it_keeps_the_first_of_each_function_and_nothing_slow():
    items = [
        Item("a.py::test_it[1-x::y]"),
        Item("a.py::test_it[2[0]]"),
        Item("b.py::test_it[1]"),
        Item("a.py::test_slow", "slow"),
        Item("a.py::test_slow_member[1]", "slow"),
        Item("a.py::test_slow_member[2]"),
        Item("hope_jax/a.py::hope_jax.a"),
        Item("a.py::test_other"),
    ]
    assert [item.nodeid for item in quick(items)] == [
        "a.py::test_it[1-x::y]",
        "b.py::test_it[1]",
        "a.py::test_slow_member[2]",
        "hope_jax/a.py::hope_jax.a",
        "a.py::test_other",
    ]


@pytest.mark.parametrize("member", [0, 1])
def test_it_is_chosen_so(request, member):
    """And the command without it leaves nothing out."""
    assert member == 0 or not request.config.getoption("quick")
