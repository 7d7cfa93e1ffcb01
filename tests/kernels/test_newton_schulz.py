"""Newton-Schulz against the singular value decomposition and against its scalar map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.newton_schulz import CUBIC, MUON, QUINTIC, orthogonalise

BAND = (0.68, 1.21)
POORLY_SEEN = 0.0015  # of ‖x‖: what lies below leaves 5 steps of MUON below the band


def with_values(values, rows, columns):
    """A matrix of these singular values, and its orthogonal factor."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (rows, columns))
    u, v = left[:, : len(values)], right[:, : len(values)]
    as_jax = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    return as_jax(u * values @ v.T), as_jax(u @ v.T)


compiled = jax.jit(orthogonalise, static_argnums=(1, 2))


def scalar_map(values, steps, coefficients):
    a, b, c = coefficients
    s = np.asarray(values, np.float64) / np.linalg.norm(values)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


def singular_values(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


@pytest.mark.parametrize("coefficients", [MUON, CUBIC, QUINTIC], ids=str)
@pytest.mark.parametrize("rows, columns", [(12, 12), (6, 20), (20, 6)])
def test_singular_values_follow_the_polynomial(rows, columns, coefficients):
    values = np.geomspace(1.0, 1e-3, min(rows, columns))
    x, _ = with_values(values, rows, columns)
    got = singular_values(compiled(x, 4, coefficients))
    expected = np.sort(scalar_map(values, 4, coefficients))[::-1]
    np.testing.assert_allclose(got, expected, atol=3e-5)


@pytest.mark.parametrize("shape", [(16, 16), (8, 64), (64, 8), (64, 64)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_random_matrices_reach_the_band(shape, scale):
    x = np.float32(scale * np.random.default_rng(3).normal(size=(5, *shape)))
    y = np.asarray(compiled(x))
    for before, after in zip(x, y, strict=True):
        share = singular_values(before) / np.linalg.norm(before)
        seen = np.sum(share >= POORLY_SEEN)
        assert seen >= min(shape) - 2
        values = singular_values(after)
        assert BAND[0] <= values[seen - 1] and values[0] <= BAND[1]


@pytest.mark.parametrize(
    "coefficients, steps, smallest, band",
    [
        (MUON, 5, 2e-3, BAND),
        (MUON, 10, 4e-6, BAND),
        (CUBIC, 20, 5e-4, (0.95, 1.001)),
        (QUINTIC, 12, 9e-4, (0.95, 1.001)),
    ],
    ids=str,
)
def test_ill_conditioned_matrices_reach_the_band(coefficients, steps, smallest, band):
    values = np.geomspace(1.0, 1.2 * smallest, 8)
    assert values[-1] / np.linalg.norm(values) >= smallest
    x, factor = with_values(values, 8, 12)
    y = compiled(x, steps, coefficients)
    after = singular_values(y)
    assert band[0] <= after[-1] and after[0] <= band[1]
    apart = np.max(
        np.abs(singular_values(np.asarray(y) - np.asarray(factor)))
    )  # same singular vectors
    assert apart <= max(1 - band[0], band[1] - 1) + 0.02


def test_what_is_too_small_stays_below_the_band():
    x, _ = with_values(np.array([1.0, 1e-4]), 2, 2)
    values = singular_values(compiled(x))
    np.testing.assert_allclose(values[1], 3.4445**5 * 1e-4, rtol=0.02)


def test_five_cubic_steps_do_not_converge_and_twenty_do():
    x, factor = with_values(np.geomspace(1.0, 0.05, 8), 8, 8)
    error = lambda steps, c: np.max(  # noqa: E731
        np.abs(np.asarray(compiled(x, steps, c)) - np.asarray(factor))
    )
    assert error(5, CUBIC) > 0.1
    assert error(20, CUBIC) < 1e-5
    assert error(12, QUINTIC) < 1e-5


def test_batch_is_one_by_one_and_transposes(key):
    x = jax.random.normal(key, (2, 3, 4, 7))
    y = orthogonalise(x)
    assert y.shape == x.shape
    np.testing.assert_allclose(y[1, 2], orthogonalise(x[1, 2]), atol=1e-6)
    np.testing.assert_allclose(orthogonalise(x.mT), y.mT, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(orthogonalise)(x), y, atol=1e-6)


def test_low_precision_products_widen_the_band_a_little(key):
    x = jax.random.normal(key, (8, 64))
    y = orthogonalise(x, dtype=jnp.bfloat16)
    assert y.dtype == jnp.float32
    values = singular_values(y)
    assert BAND[0] - 0.02 <= values[-1] and values[0] <= BAND[1] + 0.02
    assert float(jnp.max(jnp.abs(y - orthogonalise(x)))) > 1e-4  # it was used
    half = x.astype(jnp.bfloat16)
    assert orthogonalise(half).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_zero_is_zero_with_finite_gradients(shape):
    zero = jnp.zeros(shape)
    ones = np.ones(shape, np.float32)

    @jax.jit
    def pulled(zero):
        y, pullback = jax.vjp(orthogonalise, zero)
        return y, pullback(ones)[0]

    y, gradient = pulled(zero)
    assert np.all(y == 0)
    assert np.all(np.isfinite(gradient))
    batch = np.stack([zero, ones])  # a zero beside others harms none
    slope = jax.grad(lambda x: jnp.sum(orthogonalise(x)[1] ** 2 * 0.5))
    assert np.all(np.isfinite(jax.jit(slope)(batch)))
    slope = jax.grad(lambda x: orthogonalise(x)[0, 0])
    assert np.all(np.isfinite(jax.jit(slope)(zero)))


def test_gradient_is_the_slope(float64):
    x, along = (
        jax.random.normal(k, (4, 6), jnp.float64)
        for k in jax.random.split(jax.random.key(1))
    )
    loss = jax.jit(lambda x: jnp.sum(jnp.sin(3 * orthogonalise(x))))
    step = 1e-5
    slope = (loss(x + step * along) - loss(x - step * along)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(x), along), slope, rtol=1e-6)


@pytest.mark.parametrize(
    "x, steps, message",
    [
        (jnp.ones(3), 5, r"x must be matrices .* got shape \(3,\)"),
        (jnp.ones((3, 3), jnp.int32), 5, "x must be floating point, got int32"),
        (jnp.ones((3, 3)), -1, "steps must be at least 0, got -1"),
    ],
)
def test_bad_input(x, steps, message):
    with pytest.raises(ValueError, match=message):
        orthogonalise(x, steps)
