"""Trees of arrays that should be the same but for rounding."""

import jax
import numpy as np


def within(rtol: float = 1e-5, atol: float = 1e-6):
    """`close(a, b)`, which may be given other tolerances of each number."""

    def close(a, b, rtol=rtol, atol=atol):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)

    return close


def within_both(tolerance: float):
    """`close(a, b)` of one tolerance, relative and absolute."""

    def close(a, b, tolerance=tolerance):
        within(tolerance, tolerance)(a, b)

    return close


def within_size(tolerance: float):
    """`close(a, b)` relative to one more than the largest number of each array."""

    def close(a, b, tolerance=tolerance):
        def compare(a, b):
            a, b = np.asarray(a), np.asarray(b)
            scale = 1.0 + np.max(np.abs(b), initial=0.0)
            np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0)

        jax.tree.map(compare, a, b)

    return close
