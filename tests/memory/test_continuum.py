"""Levels of geometric clocks are together a memory that forgets by a power of time."""

import numpy as np
import pytest

from hope_jax.memory.continuum import power_law

LONGEST = 1e6
TIMES = np.geomspace(1.0, LONGEST, 2001)


@pytest.mark.parametrize("exponent", [0.25, 1.0, 2.0])
def test_the_error_is_within_its_bound_and_falls_exponentially(exponent):
    """The bound is less than half as large again, and twice the levels square it."""
    bounds = []
    for levels in (4, 8, 16, 32):
        law = power_law(exponent, LONGEST, levels)
        ratios = law.half_lives[1:] / law.half_lives[:-1]
        np.testing.assert_allclose(ratios, ratios[0])
        kept = law.kept(TIMES) * TIMES**exponent
        error = np.abs(kept - 1).max()
        assert law.error / 1.5 < error <= law.error
        bounds.append(law.error)
    assert bounds[3] < bounds[2] ** 1.5 < bounds[1] ** 1.5**2 < 0.2


def test_one_clock_has_no_power_law():
    """The best of one half-life is off by more than half somewhere in a decade."""
    times = np.geomspace(1.0, 1e3, 101)
    law = power_law(1.0, 1e3, 8)
    alone = [
        np.abs(c * np.exp2(-times / h) * times - 1).max()
        for h in np.geomspace(0.1, 1e4, 60)
        for c in np.geomspace(1e-4, 10, 60)
    ]
    assert law.error < 0.05 < 0.5 < min(alone)


def test_levels_that_move_by_steps_keep_it_to_one_pull():
    """Of what a level has learned, (1 - pull) to the number of its moves is left: at
    least what a smooth decay leaves, and at most that over 1 - pull."""
    pull, exponent, shortest = 0.1, 1.0, 1024.0
    law = power_law(exponent, LONGEST, 12, shortest=shortest)
    assert law.error < 0.01
    periods = np.round(law.half_lives * -np.log2(1 - pull))
    assert periods[0] > 20
    times = np.round(np.geomspace(shortest, LONGEST, 501))
    left = (1 - pull) ** np.floor(times[:, None] / periods)
    left = np.sum(left * law.weights, axis=1)
    ratio = left * times**exponent
    rounded = 1 / periods[0]  # to whole tokens
    assert ratio.min() > (1 - law.error) * (1 - rounded)
    assert ratio.max() < (1 + law.error) / (1 - pull) * (1 + rounded)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(exponent=0.0), "exponent must be positive, got 0.0"),
        (dict(longest=0.5), "in this order, got 1.0 and 0.5"),
        (dict(levels=1), "levels must be at least 2, got 1"),
    ],
)
def test_what_is_no_continuum_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        power_law(**dict(exponent=1.0, longest=10.0, levels=4) | given)
