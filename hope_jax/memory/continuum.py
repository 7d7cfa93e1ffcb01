"""The continuum as a limit: memories of several clocks that forget by a power of time.

Section 7 of arXiv:2512.24695 puts memories of rising periods beside one another. One of
them forgets exponentially; with geometric half-lives and the right weights their sum
approaches `t⁻ᵖ`, which no single clock has, exponentially fast in their number. The
paper states no such limit; the quadrature below is classical.
"""

import math
from typing import NamedTuple

import numpy as np


class PowerLaw(NamedTuple):
    """Exponential memories that together keep `t⁻ᵖ` of what came t tokens ago.

    Attributes:
      half_lives: float64[levels], in tokens, a geometric series from fast to slow.
      weights: float64[levels], how much each of them adds.
      error: bound on the relative error between `shortest` and `longest`.
    """

    half_lives: np.ndarray
    weights: np.ndarray
    error: float

    def kept(self, tokens: np.ndarray) -> np.ndarray:
        """What is left after so many tokens, float64 like them."""
        each = np.exp2(-np.asarray(tokens, np.float64)[..., None] / self.half_lives)
        return np.sum(each * self.weights, axis=-1)


def power_law(
    exponent: float, longest: float, levels: int, *, shortest: float = 1.0
) -> PowerLaw:
    """Half-lives and weights of `levels` memories that keep `t⁻ᵖ`.

        t⁻ᵖ = 1/Γ(p) ∫ exp(p u − t eᵘ) du ≈ h/Γ(p) Σₖ λₖᵖ exp(−λₖ t),  λₖ = λ₀ exp(−h k)

    the trapezoidal rule in the logarithm of the rates. Of its relative error

        2 Σₘ |Γ(p + 2πi m/h)| / Γ(p)     is of the step, whatever t is: about exp(−π²/h)
        h Σⱼ sⱼᵖ exp(−sⱼ) / Γ(p)         of the faster levels that are not there,
                                         sⱼ = λ₀ shortest exp(h j), j >= 1
        h (λₙ longest)ᵖ / Γ(p) (eʰᵖ − 1) of the slower ones, λₙ the slowest rate

    and the rates are chosen such that the sum of the three is least. For one error as
    many levels are needed as `log(longest / shortest)` is long, times its digits.

    A level of the continuum memory forgets by its pull to where it starts: it keeps
    `(1 − pull)` to the number of its moves, so its half-life is `period / −log2(1 −
    pull)`. Equal pulls and these half-lives make periods geometric too.

    Args:
      exponent: p, positive.
      longest, shortest: between how many tokens the bound holds.
      levels: how many, at least 2.

    Raises:
      ValueError: one of them out of range.

    >>> [f"{power_law(1.0, 1e6, n).error:.0e}" for n in (4, 8, 16, 32)]
    ['9e-01', '1e-01', '1e-02', '1e-04']
    """
    if not exponent > 0:
        raise ValueError(f"exponent must be positive, got {exponent}.")
    if not 0 < shortest < longest < math.inf:
        raise ValueError(
            "shortest and longest must be positive, finite and in this order, got "
            f"{shortest} and {longest}."
        )
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}.")
    # In units of the shortest: the fastest rate, at least p so that what is faster
    # matters less and less, and the slowest, as a part of 1 / longest.
    fast = np.geomspace(exponent, 40.0 * (1 + exponent), 161)[:, None]
    slow = np.geomspace(1e-12, exponent, 321)[None] / (longest / shortest)
    step = np.log(fast / slow) / (levels - 1)
    error = _error(exponent, longest / shortest, fast, slow, step)
    i, j = np.unravel_index(np.argmin(error), error.shape)
    rates = np.geomspace(fast[i, 0], slow[0, j], levels) / shortest
    scale = step[i, j] / math.gamma(exponent)
    return PowerLaw(np.log(2) / rates, scale * rates**exponent, float(error[i, j]))


_SUMMED = 24  # what is beyond falls faster than a geometric series


def _error(p, span, fast, slow, step):
    """The bound of `power_law`, of `[A, 1]` fastest and `[1, B]` slowest rates."""
    terms = np.arange(1, _SUMMED + 1)[:, None, None]
    s = np.exp(np.minimum(np.log(fast) + step * terms, 6.5))  # beyond it adds nothing
    faster = step * np.sum(s**p * np.exp(-s), axis=0) / math.gamma(p)
    slower = step * (slow * span) ** p / math.gamma(p) / np.expm1(step * p)
    # |Γ(p + iy) / Γ(p)|² = Π 1 / (1 + y² / (p + n)²): some of the factors are a bound.
    # It depends on the step alone, and falls with it, so that a coarse table of steps
    # will do, each read at the next larger one.
    known = np.geomspace(step.min(), step.max(), 400)
    y = 2 * np.pi * np.arange(1, 9)[:, None] / known
    at = p + np.arange(2000.0)[:, None, None]
    sizes = np.exp(-0.5 * np.sum(np.log1p((y / at) ** 2), axis=0))
    table = np.maximum.accumulate(2 * np.sum(sizes, axis=0))
    where = np.searchsorted(known, step * (1 - 1e-12))
    return faster + slower + table[np.minimum(where, len(known) - 1)]
