"""Feature maps: their inner products are what theory says they are."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.memory import features
from tests import compare

close = compare.within_both(1e-5)


def pairs(key, count, width, length=1.0):
    """`count` queries and keys of the given length."""
    q, k = jax.random.normal(key, (2, count, width))
    unit = lambda x: length * x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    return unit(q), unit(k)


def products(name, degree, q, k, *coefficients):
    phi = [features.features(name, degree, x, *coefficients) for x in (q, k)]
    return jnp.sum(phi[0] * phi[1], axis=-1)


def test_polynomial_by_hand():
    """1, x, y, then x^2, root 2 xy, y^2 times c2."""
    c = jnp.array([5.0, 1.0, 10.0])
    phi = features.features("polynomial", 2, jnp.array([2.0, 3.0]), c)
    close(phi, [5.0, 2.0, 3.0, 40.0, 60.0 * math.sqrt(2.0), 90.0])


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_polynomial_is_a_polynomial_of_the_inner_product(degree, key):
    q, k = pairs(key, 6, 3, length=1.5)
    c = jnp.linspace(0.5, 1.5, degree + 1)
    dot = np.sum(q * k, axis=-1)
    expected = sum(float(c[i]) ** 2 * dot**i for i in range(degree + 1))
    close(products("polynomial", degree, q, k, c), expected, 1e-4)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_exponential_is_where_the_polynomial_starts(degree, key):
    q, k = pairs(key, 4, 3)
    start = features.coefficients("polynomial", degree)
    learned = products("polynomial", degree, q, k, start)
    close(learned, products("exponential", degree, q, k), 0)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_the_error_of_the_exponential(degree, key, float64):
    """Lagrange's bound, met to within its factor exp(|q.k|)."""
    q, k = pairs(key, 20, 3, length=1.2)
    dot = np.sum(q * k, axis=-1)
    error = np.abs(products("exponential", degree, q, k) - np.exp(dot))
    term = np.abs(dot) ** (degree + 1) / math.factorial(degree + 1)
    rounding = 1e-7  # of float32 coefficients
    assert np.all(error <= term * np.exp(np.maximum(dot, 0.0)) + rounding)
    assert np.all(
        error >= term * np.exp(np.minimum(dot, 0.0)) / (degree + 2) - rounding
    )


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_order_of_the_exponential(degree):
    """Half the product, and the error shrinks 2^(degree + 1) times."""
    one = jnp.ones(1)

    def error(z):
        return abs(float(products("exponential", degree, z * one, one)) - math.exp(z))

    assert 2 ** (degree + 0.8) < error(0.5) / error(0.25) < 2 ** (degree + 1.2)


@pytest.mark.parametrize(
    "name, degree, count",
    [
        ("none", 2, 4),
        ("elu", 2, 4),
        ("polynomial", 1, 5),  # 1 + 4
        ("polynomial", 2, 15),  # + 4 + 6
        ("exponential", 3, 35),  # + 4 + 12 + 4
    ],
)
def test_widths_shapes_and_types(name, degree, count):
    assert features.width(name, degree, 4) == count
    c = features.coefficients(name, degree)
    assert (c is None) == (name != "polynomial")
    for batch in ((), (3,), (2, 3)):
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.ShapeDtypeStruct((*batch, 4), dtype)
            mapped = functools.partial(features.features, name, degree)
            phi = jax.eval_shape(mapped, x, c)
            assert (phi.shape, phi.dtype) == ((*batch, count), dtype)


def test_coefficients_start_at_the_exponential():
    c = features.coefficients("polynomial", 3)
    assert c.dtype == jnp.float32
    close(c**2, [1.0, 1.0, 1 / 2, 1 / 6])


def test_elu_is_positive_and_one_more_than_large_inputs():
    phi = features.features("elu", 1, jnp.array([-50.0, -1.0, 0.0, 2.0]))
    close(phi, [0.0, math.exp(-1.0), 1.0, 3.0])


@pytest.mark.parametrize("name", features.FEATURES)
def test_the_linear_part(name):
    x = jnp.array([[0.5, 2.0, 3.0], [1.0, 4.0, 0.25]])
    phi = features.features(name, 2, x, features.coefficients(name, 2))
    part = features.linear_part(name, 2, phi, 3)
    close(part, x + 1.0 if name == "elu" else x, 0)


def test_coefficients_learn():
    """d (phi(q).phi(k)) / d c_i = 2 c_i (q.k)^i, and zeros in x have a slope."""
    q, k = jnp.array([0.0, 2.0]), jnp.array([3.0, 0.5])
    c = features.coefficients("polynomial", 2)
    slope = jax.grad(lambda c: products("polynomial", 2, q, k, c))(c)
    close(slope, 2 * c)  # q.k = 1
    slope = jax.grad(lambda q: products("polynomial", 2, q, k, c))(q)
    close(slope, 2.0 * k)  # (1 + q.k) k


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: features.width("fourier", 2, 4),
            "features must be one of none, .*'four",
        ),
        (
            lambda: features.width("polynomial", 0, 4),
            "degree must be at least 1 .* got 0",
        ),
        (lambda: features.coefficients("exponential", -1), "degree must be at least 1"),
        (
            lambda: features.features("polynomial", 2, jnp.ones(3)),
            "coefficients belong to features 'polynomial' .* got none",
        ),
        (
            lambda: features.features("exponential", 2, jnp.ones(3), jnp.ones(3)),
            "coefficients belong to .* got some for 'exponential'",
        ),
        (
            lambda: features.features("polynomial", 2, jnp.ones(3), jnp.ones(2)),
            r"coefficients \(2,\) must be one for each degree from 0 to 2: \(3,\)",
        ),
    ],
)
def test_features_that_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()
