"""One test an equation of arXiv:2512.24695: Muon's factors, and M3."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.kernels.newton_schulz import CUBIC, MUON, orthogonalise
from hope_jax.optim.momenta import momentum
from hope_jax.optim.orthogonal import orthogonalise_tree
from hope_jax.optim.rules.m3 import m3, scale_by_m3


@pytest.fixture(autouse=True)
def _optax_counts_in_integers():
    with jax.numpy_dtype_promotion("standard"):
        yield


def singular_values(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def newton_schulz(m, steps=5):
    """NS of one matrix, in NumPy and float64."""
    a, b, c = MUON
    norm = np.linalg.norm(m)
    x = m / norm if norm else m
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def stream(steps, shape=(4, 6)):
    """Gradients g_1, g_2, ...; place 0 is unused, as in the paper's sums."""
    return np.random.default_rng(0).normal(size=(steps + 1, *shape))


def test_equation_42_muon():
    """W_{t+1} = W_t + NewtonSchulz_k(m_{t+1}), m_{t+1} = alpha m_t - eta grad.

    Implements: hope_jax.optim.orthogonal.orthogonalise_tree
    """
    ours = optax.chain(
        momentum(0.3, decay=0.9), optax.stateless(lambda m, _: orthogonalise_tree(m))
    )
    reference = optax.contrib.scale_by_muon(beta=0.9, nesterov=False)
    gradients = [jnp.asarray(g, jnp.float32) for g in stream(3)[1:]]
    here, there = ours.init(gradients[0]), reference.init(gradients[0])
    m = 0.0
    for g in gradients:
        update, here = ours.update(g, here)
        muon, there = reference.update(g, there)
        m = 0.9 * m - 0.3 * np.asarray(g, np.float64)
        np.testing.assert_allclose(update, newton_schulz(m), atol=1e-4)
        np.testing.assert_allclose(update, -muon, atol=1e-4)
        assert 0.68 < singular_values(update)[-1] < singular_values(update)[0] < 1.21


def test_equation_43_descent_is_newton_schulz(key):
    """A step of 1/8 down ||P^T P - I||^2 is the classical Newton-Schulz step.

    Implements: hope_jax.kernels.newton_schulz.orthogonalise
    """

    def objective(p):
        return jnp.sum((p.T @ p - jnp.eye(4)) ** 2)

    p = jax.random.normal(key, (6, 4))
    p = p / jnp.linalg.norm(p)  # as `orthogonalise` begins
    for _ in range(3):
        np.testing.assert_allclose(
            jax.grad(objective)(p), 4 * p @ (p.T @ p - jnp.eye(4)), atol=1e-5
        )
        p = p - jax.grad(objective)(p) / 8
    expected = orthogonalise(jax.random.normal(key, (6, 4)), 3, CUBIC)
    np.testing.assert_allclose(p, expected, atol=1e-5)


def test_equation_44_descent_with_a_proximal_term(key):
    """O_{i+1} = O_i - zeta (O_i - g + 2 O_i (O_i^T O_i - I)), O_0 = g.

    The bracket is not the gradient of equation 43 but of a sum with ||O - g||^2 / 2.
    The first step is a cubic Newton-Schulz step; the limit is not orthogonal, as it is
    without that term.

    Implements: hope_jax.kernels.newton_schulz.orthogonalise
    """
    zeta = 0.1
    g = jax.random.normal(key, (6, 4))
    g = g / jnp.linalg.norm(g)
    eye = jnp.eye(4)

    def bracket(o, near=1.0):
        return near * (o - g) + 2 * o @ (o.T @ o - eye)

    def objective(o):
        return jnp.sum((o - g) ** 2) / 2 + jnp.sum((o.T @ o - eye) ** 2) / 2

    o = 2 * g
    np.testing.assert_allclose(jax.grad(objective)(o), bracket(o), atol=1e-5)

    cubic = orthogonalise(g, 1, (1 + 2 * zeta, -2 * zeta, 0.0))
    np.testing.assert_allclose(g - zeta * bracket(g), cubic, atol=1e-5)

    near, free = g, g
    step = jax.jit(lambda o, near: o - zeta * bracket(o, near))
    for _ in range(200):
        near, free = step(near, 1.0), step(free, 0.0)
    np.testing.assert_allclose(step(near, 1.0), near, atol=1e-5)  # it has converged
    np.testing.assert_allclose(singular_values(free), 1.0, atol=1e-3)
    assert singular_values(near).max() < 0.97


def test_equation_75_two_memories_of_gradients():
    """M1_t = M1_{t-1} + b1 g_t; M2_t = M2_{t-1} + b3 sum of the last C gradients where
    t = 0 mod C, else unchanged: with forgetting, and a mean for the sum.

    Implements: hope_jax.optim.rules.m3.scale_by_m3
    """
    period, fast, slow = 3, 0.8, 0.5
    rule = scale_by_m3(periods=(1, period), decays=(fast, slow))
    update = jax.jit(rule.update)
    g = stream(3 * period + 1)
    state = rule.init(jnp.zeros(g.shape[1:]))
    before = state.scales[1]
    m1 = m2 = np.zeros(g.shape[1:])
    for t in range(1, len(g)):
        _, state = update(jnp.asarray(g[t], jnp.float32), state)
        m1 = fast * m1 + (1 - fast) * g[t]
        if t % period == 0:
            m2 = slow * m2 + (1 - slow) * g[t - period + 1 : t + 1].mean(0)
        else:  # to the last bit
            np.testing.assert_array_equal(state.scales[1].memory, before.memory)
            np.testing.assert_array_equal(state.scales[1].factor, before.factor)
        before = state.scales[1]
        np.testing.assert_allclose(state.scales[0].memory, m1, atol=1e-5)
        np.testing.assert_allclose(state.scales[1].memory, m2, atol=1e-5)
        np.testing.assert_allclose(state.scales[1].factor, newton_schulz(m2), atol=1e-4)


def test_equation_75_without_its_slow_memory_is_muon():
    """With alpha = 0 and no second moment M3 is Muon, here at the scale of AdamW.

    Implements: hope_jax.optim.rules.m3.m3
    """
    ours = m3(1.0, alpha=0.0, decays=(0.9, 0.5), periods=(1, 2), variant="two_scale")
    muon = optax.contrib.muon(1.0, beta=0.9, nesterov=False, consistent_rms=0.2)
    g = [{"a": a, "b": a[:, :4]} for a in jnp.asarray(stream(4), jnp.float32)]
    here, there = ours.init(g[0]), muon.init(g[0])
    ours_step, muon_step = jax.jit(ours.update), jax.jit(muon.update)
    for gradient in g[1:]:
        update, here = ours_step(gradient, here, gradient)
        expected, there = muon_step(gradient, there, gradient)
        for name, u in update.items():
            np.testing.assert_allclose(u, expected[name], atol=1e-4)
            assert jnp.sqrt(jnp.mean(u**2)) > 0.1


def test_equation_75_algorithm_1_literal():
    """Algorithm 1, line by line, over three periods.

    Implements: hope_jax.optim.rules.m3.scale_by_m3
    """
    f, b1, b2, b3, alpha, eps = 3, 0.95, 0.4, 0.9, 0.5, 1e-8
    g = stream(3 * f + 2)
    g[0] = 0  # line 3 begins its first sum one gradient too early
    shape = g.shape[1:]

    expected = []
    m1, m2, v = np.zeros(shape), np.zeros(shape), np.zeros(shape)  # line 1
    for k in range(4):  # line 2
        if k > 0:
            m2 = m2 + b3 * sum(g[i] for i in range((k - 1) * f, k * f + 1))  # line 3
        o2 = newton_schulz(m2)  # line 4
        for t in range(k * f + 1, min((k + 1) * f + 1, len(g))):  # lines 5, 6
            m1 = m1 + b1 * g[t]  # line 7
            v = v + b2 * g[t] ** 2  # line 8
            o1 = newton_schulz(m1)  # line 9
            expected.append((o1 + alpha * o2) / (np.sqrt(v) + eps))  # line 10

    rule = scale_by_m3(
        variant="literal",
        periods=(1, f),
        alpha=alpha,
        decays=(b1, b3),
        beta2=b2,
        eps=eps,
    )
    update = jax.jit(rule.update)
    state = rule.init(jnp.zeros(shape))
    for t in range(1, len(g)):
        step, state = update(jnp.asarray(g[t], jnp.float32), state)
        np.testing.assert_allclose(step, expected[t - 1], rtol=1e-3, atol=1e-4)
