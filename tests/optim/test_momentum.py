import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.optim.momenta import (
    delta_level,
    delta_momentum,
    hebbian_level,
    momentum,
)

ETA, ALPHA = 0.3, 0.9


def last_memory(optimizer, stream):
    """The update after a stream of gradients, which is the memory."""
    state = optimizer.init(stream[0])
    for gradient in stream:
        update, state = optimizer.update(gradient, state)
    return update


def test_momentum_is_the_sum_of_its_past():
    update = last_memory(momentum(ETA, decay=ALPHA), jnp.array([1.0, 2.0, 4.0]))
    expected = -ETA * (ALPHA**2 * 1.0 + ALPHA * 2.0 + 4.0)
    np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_a_schedule_weighs_each_gradient_when_it_is_stored():
    def rate(count):
        return jnp.array([0.1, 0.5])[count]

    update = last_memory(momentum(rate, decay=ALPHA), jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(update, -(ALPHA * 0.1 + 0.5), rtol=1e-6)


def test_delta_momentum_element_wise_by_hand():
    stream = jnp.array([1.0, 2.0])
    m = -ETA  # from zero
    literal = (ALPHA - ETA * 4.0) * m - ETA * 2.0
    clip = 0.0 * m - ETA * 2.0  # eta g^2 = 1.2 > alpha: everything is forgotten
    for stability, expected in (("literal", literal), ("clip", clip)):
        rule = delta_momentum(ETA, decay=ALPHA, stability=stability)
        np.testing.assert_allclose(last_memory(rule, stream), expected, rtol=1e-6)


@pytest.mark.parametrize("eta", [0.01, 1.0, 30.0])
def test_the_proximal_form_is_the_minimum_it_claims(eta):
    """argmin (m g + 1)^2 / 2 + (m - alpha m_t)^2 / 2 eta: its gradient is zero."""
    m_t, g = -0.7, 2.0

    def gradient(m):
        return (m * g + 1) * g + (m - ALPHA * m_t) / eta

    rule = delta_momentum(eta, decay=ALPHA)
    state = rule.init(jnp.zeros(()))._replace(memory=jnp.array(m_t))
    update, _ = rule.update(jnp.array(g), state)
    np.testing.assert_allclose(gradient(float(update)), 0.0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (4,), (), (5, 2, 3)])
def test_the_matrix_form_against_a_direct_solve(key, shape):
    m_key, g_key = jax.random.split(key)
    m_t, g = jax.random.normal(m_key, shape), jax.random.normal(g_key, shape)

    def after(stability):
        rule = delta_momentum(ETA, decay=ALPHA, form="matrix", stability=stability)
        state = rule.init(m_t)._replace(memory=m_t)
        return np.asarray(rule.update(g, state)[0])

    def rows(x):
        return np.asarray(x).reshape(-1, *((1, 1) + shape)[-2:])

    proximal, literal, clip = [], [], []
    for m, g_i in zip(rows(m_t), rows(g), strict=True):
        wide, square = np.eye(g_i.shape[1]), g_i.T @ g_i
        proximal.append((ALPHA * m - ETA * g_i) @ np.linalg.inv(wide + ETA * square))
        literal.append(m @ (ALPHA * wide - ETA * square) - ETA * g_i)
        eta = min(ETA, ALPHA / np.sum(g_i**2))
        clip.append(m @ (ALPHA * wide - eta * square) - ETA * g_i)
    for stability, expected in (
        ("proximal", proximal),
        ("literal", literal),
        ("clip", clip),
    ):
        np.testing.assert_allclose(
            after(stability), np.reshape(expected, shape), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("stability", ["proximal", "clip", "literal"])
def test_delta_momentum_with_a_preconditioner(key, stability):
    """Equations 48 and 49 with P: it writes P g where it wrote g."""
    g = jax.random.normal(key, (3, 2))
    m = jnp.flip(g)
    p = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 0.5], [0.0, 0.0, 1.0]])

    def after(form, precondition):
        rule = delta_momentum(
            ETA,
            decay=ALPHA,
            form=form,
            stability=stability,
            precondition={"w": precondition},
        )
        state = rule.init({"w": m})._replace(memory={"w": m})
        return rule.update({"w": g}, state)[0]["w"]

    square = g.T @ g
    if stability == "proximal":
        inverse = jnp.linalg.inv(jnp.eye(2) + ETA * square)
        expected = (ALPHA * m - ETA * p @ g) @ inverse
        pointwise = (ALPHA * m - ETA * 2.0 * g) / (1 + ETA * g**2)
    else:
        eta = jnp.minimum(ETA, ALPHA / jnp.sum(g**2)) if stability == "clip" else ETA
        expected = m @ (ALPHA * jnp.eye(2) - eta * square) - ETA * p @ g
        eta = jnp.minimum(ETA, ALPHA / g**2) if stability == "clip" else ETA
        pointwise = m * (ALPHA - eta * g**2) - ETA * 2.0 * g
    np.testing.assert_allclose(after("matrix", p), expected, rtol=1e-4, atol=1e-5)
    for two in (2.0, jnp.full((3, 2), 2.0)):
        np.testing.assert_allclose(
            after("element", two), pointwise, rtol=1e-4, atol=1e-5
        )
    np.testing.assert_array_equal(after("matrix", None), after("matrix", 1.0))


@pytest.mark.parametrize("form", ["element", "matrix"])
def test_only_the_literal_form_blows_up(key, form):
    stream = 10.0 * jax.random.normal(key, (60, 3, 2))

    def size(stability):
        rule = delta_momentum(ETA, decay=ALPHA, form=form, stability=stability)

        def step(state, gradient):
            update, state = rule.update(gradient, state)
            return state, jnp.abs(update).max()

        return jax.lax.scan(step, rule.init(stream[0]), stream)[1].max()

    assert size("proximal") < 10.0
    assert size("clip") < 100.0
    assert not size("literal") < 1e6


def test_clipping_survives_a_gradient_of_nothing():
    rule = delta_momentum(ETA, decay=0.0, form="matrix", stability="clip")
    update, _ = rule.update(jnp.zeros((2, 2)), rule.init(jnp.ones((2, 2))))
    np.testing.assert_array_equal(update, 0.0)


def test_the_memory_is_float32_whatever_the_parameters_are():
    """0.999 is 1 in bfloat16: a memory kept there would forget nothing."""
    w = jnp.zeros((2,), jnp.bfloat16)
    rule = momentum(1.0, decay=0.999)
    state = rule.init(w)
    update, state = rule.update(jnp.ones_like(w), state)
    assert update.dtype == jnp.bfloat16 and state.memory.dtype == jnp.float32
    for _ in range(200):
        _, state = rule.update(jnp.zeros_like(w), state)
    np.testing.assert_allclose(state.memory, -(0.999**200), rtol=1e-4)


def test_choices_that_are_none_are_refused():
    for rule in (momentum, delta_momentum, hebbian_level, delta_level):
        with pytest.raises(ValueError, match=r"in \[0, 1\]; got 1.5"):
            rule(0.1, decay=1.5)
    with pytest.raises(ValueError, match="form must be .* got 'row'"):
        delta_momentum(0.1, form="row")
    w = {"w": jnp.ones((3, 2))}
    for form, p, reason in (
        ("element", {"w": jnp.eye(3)}, "must be a number or have that shape"),
        ("matrix", {"w": jnp.eye(2)}, r"square matrix \(3, 3\)"),
        ("matrix", {"v": None}, "precondition must be a tree like the parameters"),
    ):
        rule = delta_momentum(0.1, form=form, precondition=p)
        with pytest.raises(ValueError, match=reason):
            rule.update(w, rule.init(w))
    with pytest.raises(ValueError, match="stability must be .* got 'none'"):
        delta_momentum(0.1, stability="none")
