"""Feature maps of keys and queries, applied before the memory sees them.

    none           x
    elu            elu(x) + 1, positive (linear transformers, arXiv:2006.16236)
    polynomial     monomials up to a degree, coefficients cᵢ learned (ATLAS 5)
    exponential    the same with cᵢ = 1 / √i!, which are its start too (ATLAS 22-23)

A monomial of degree i is weighted by cᵢ and the root of its multinomial coefficient, so
that `φ(q)·φ(k) = Σᵢ cᵢ² (q·k)ⁱ` exactly. It is the i-th tensor power without its equal
entries: `C(K + i − 1, i)` features, not Kⁱ. With cᵢ² = 1 / i! the sum is the Taylor
polynomial of `exp(q·k)` (arXiv:2505.23735).
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hope_jax.core.config import Kinds
from hope_jax.memory.choice import Choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMap(Choice):
    """A feature map by name, and what is so of it.

    Attributes:
      plain: it is x itself, so that a key keeps its norm.
      taylor: it has all monomials up to a degree, and is wider than x.
      learned: it has coefficients that the level above learns.
    """

    plain: bool = False
    taylor: bool = False
    learned: bool = False


FEATURES: Kinds[FeatureMap] = Kinds.of_entries(
    "features",
    FeatureMap(kind="none", plain=True),
    FeatureMap(kind="elu"),
    FeatureMap(kind="polynomial", options=("degree",), taylor=True, learned=True),
    FeatureMap(kind="exponential", options=("degree",), taylor=True),
)


def width(name: str, degree: int, width: int) -> int:
    """How many features there are of a vector of `width`.

    Raises:
      ValueError: unknown name, or a degree below 1 for one of the Taylor maps.
    """
    return math.comb(width + degree, degree) if _taylor(name, degree) else width


def coefficients(name: str, degree: int) -> Float[Array, " I"] | None:
    """Where the learned coefficients c₀ .. c_degree start; None if there are none."""
    _taylor(name, degree)
    return _exponential(degree) if FEATURES.get(name).learned else None


def features(
    name: str,
    degree: int,
    x: Float[Array, "*B K"],
    coefficients: Float[Array, " I"] | None = None,
) -> Float[Array, "*B F"]:
    """`φ(x)`, in the type of x, the features of each degree together and in order.

    Args:
      name: the map.
      degree: the highest degree; `none` and `elu` do not read it.
      x: keys or queries.
      coefficients: c₀ .. c_degree of `polynomial`; no other map takes any.

    >>> phi = features("exponential", 2, jnp.array([2.0, 3.0]))
    >>> [round(f, 2) for f in phi.tolist()]
    [1.0, 2.0, 3.0, 2.83, 6.0, 6.36]
    """
    taylor = _taylor(name, degree)
    found = FEATURES.get(name)
    if (coefficients is None) == found.learned:
        raise ValueError(
            f"coefficients belong to features 'polynomial' and to no other: got "
            f"{'none' if coefficients is None else 'some'} for {name!r}."
        )
    if not taylor:
        return x if found.plain else jax.nn.elu(x) + 1.0
    if coefficients is None:
        coefficients = _exponential(degree)
    if coefficients.shape != (degree + 1,):
        raise ValueError(
            f"coefficients {coefficients.shape} must be one for each degree from 0 to "
            f"{degree}: ({degree + 1},)."
        )
    coefficients = coefficients.astype(x.dtype)
    powers = [
        coefficients[i] * _monomials(x, *_table(x.shape[-1], i))
        for i in range(degree + 1)
    ]
    return jnp.concatenate(powers, axis=-1)


def linear_part(
    name: str, degree: int, phi: Float[Array, "*B F"], width: int
) -> Float[Array, "*B K"]:
    """The features of degree one: x itself (times c₁, which starts at 1).

    It is as wide as x, so memories with a skip connection add it to what they recall.
    The other maps are all of that degree.
    """
    return phi[..., 1 : 1 + width] if _taylor(name, degree) else phi


def _taylor(name: str, degree: int) -> bool:
    """Whether the map is a Taylor polynomial; refuses what is no map at all."""
    taylor = FEATURES.get(name).taylor
    if taylor and degree < 1:
        raise ValueError(f"degree must be at least 1 for {name!r}, got {degree}.")
    return taylor


def _exponential(degree: int) -> Float[Array, " I"]:
    start = [math.factorial(i) ** -0.5 for i in range(degree + 1)]
    return jnp.array(start, jnp.float32)


@functools.cache
def _table(width: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors [F, degree] of every monomial, and the roots of their multinomial
    coefficients [F]."""
    factors = list(itertools.combinations_with_replacement(range(width), degree))

    def orders(monomial):
        repeats = Counter(monomial).values()
        return math.factorial(degree) // math.prod(map(math.factorial, repeats))

    weights = np.sqrt([orders(monomial) for monomial in factors])
    return np.array(factors, np.int32).reshape(len(factors), degree), weights


def _monomials(x, factors, weights):
    product = jnp.broadcast_to(
        jnp.asarray(weights, x.dtype), (*x.shape[:-1], len(weights))
    )
    for column in factors.T:
        product = product * x[..., column]
    return product
