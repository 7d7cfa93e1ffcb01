"""Deep momentum: what its memory learns, forgets and does not see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.optim.rules.deep_momentum import DeepMemory, deep_momentum
from tests import compare

close = compare.within()

ETA = 0.3


def live(rule, gradients):
    """The last state and every update along a stream of gradients."""
    at = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)

    def step(state, gradient):
        update, state = rule.update(gradient, state, at)
        return state, update

    return jax.lax.scan(step, rule.init(at), gradients)


def stream(key, shape, steps=6):
    return jax.random.normal(key, (steps, *shape))


def gain(memory, x):
    """How much of x the memory gives back along x."""
    return float(jnp.vdot(memory(x[None])[0], x) / jnp.vdot(x, x))


def test_it_starts_as_gradient_descent(key):
    memory = deep_momentum(ETA).init(jnp.zeros((4, 3))).memory
    x = jax.random.normal(key, (5, 3))
    close(memory(x), x)


def test_without_forgetting_it_is_gradient_descent(key):
    g = {"w": stream(key, (2, 3)), "s": stream(key, ())}
    _, out = live(deep_momentum(ETA, decay=1.0), g)
    close(out, jax.tree.map(lambda x: -ETA * x, g), 1e-4)


@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_two_steps_by_hand(key, objective):
    """The network, its loss over rows and its forgetting, written out again."""
    g = stream(key, (3, 2), steps=2)
    rule = deep_momentum(ETA, decay=0.8, inner_rate=0.5, objective=objective, hidden=4)
    m = rule.init(g[0]).memory._asdict()
    base = {"skip": 0.0 * m["skip"], "w1": 0.0 * m["w1"], "w2": m["w2"]}

    def network(m, x):
        return m["skip"] * x + m["w1"] @ (jnp.tanh(m["w2"] @ x) / 2.0)

    def loss(m, rows):
        total = 0.0
        for x in rows:
            y = network(m, x)
            hit = -jnp.vdot(y, x)
            total += 0.5 * jnp.sum((y - x) ** 2) if objective == "l2" else hit
        return total / len(rows)

    _, out = live(rule, g)
    for t in range(2):
        norm = jnp.linalg.norm(g[t], axis=1, keepdims=True)
        slope = jax.grad(loss)(m, g[t] / norm)
        m = jax.tree.map(lambda m, b, s: b + 0.8 * (m - b) - 0.5 * s, m, base, slope)
        expected = [
            -ETA * n * network(m, x / n) for n, x in zip(norm, g[t], strict=True)
        ]
        close(out[t], jnp.stack(expected), 1e-4, 1e-5)


def test_it_keeps_the_directions_it_goes_on_seeing():
    seen, unseen = jnp.eye(4)[0], jnp.eye(4)[1]
    rule = deep_momentum(ETA, decay=0.95, inner_rate=0.3)
    state, _ = live(rule, jnp.broadcast_to(3.0 * seen, (60, 4)))
    assert gain(state.memory, seen) > 0.85
    assert gain(state.memory, unseen) < gain(state.memory, seen) - 0.1


def test_forgetting_scales_the_function(key):
    """With gradients of nothing, alpha m is the function times alpha."""
    g = stream(key, (2, 3))
    rule = deep_momentum(ETA, decay=0.8, inner_rate=0.5, target=jnp.sign)
    state, _ = live(rule, g)
    _, after = rule.update(jnp.zeros((2, 3)), state)
    x = jax.random.normal(key, (5, 3))
    moved = state.memory._replace(w2=after.memory.w2)
    close(after.memory(x), 0.8 * moved(x), 1e-4)
    start = state.start
    close(after.memory.w2 - start, 0.8 * (state.memory.w2 - start), 1e-4)
    assert float(jnp.abs(state.memory.w2 - start).max()) > 1e-4


def test_the_dot_product_adds_up_as_momentum_does():
    """`skip` alone goes to rate / (1 − alpha) for unit rows."""
    rule = deep_momentum(ETA, decay=0.9, inner_rate=0.05, objective="dot")
    state, _ = live(rule, jnp.broadcast_to(jnp.array([3.0, 4.0]), (150, 2)))
    np.testing.assert_allclose(state.memory.skip, 0.05 / 0.1, rtol=1e-3)


def test_it_learns_a_preconditioned_target(key):
    """From one direction to another: gradients to their signs."""
    g = jnp.broadcast_to(jnp.array([[3.0, 0.1, -1.0], [0.2, -2.0, 1.0]]), (200, 2, 3))
    rule = deep_momentum(1.0, decay=0.999, inner_rate=0.5, target=jnp.sign)
    _, out = live(rule, g)
    for step, row in zip(out[-1], jnp.sign(g[-1]), strict=True):
        close(step, -row, atol=0.1)  # as long as the target, sqrt(3)


def test_a_target_may_have_a_state(key):
    g = stream(key, (2, 3))
    rule = deep_momentum(ETA, target=optax.trace(0.9))
    state, out = live(rule, g)
    trace = live(optax.with_extra_args_support(optax.trace(0.9)), g)[0].trace
    close(state.target.trace, trace)
    size = jnp.linalg.norm(trace, axis=1, keepdims=True)
    unit = g[-1] / jnp.linalg.norm(g[-1], axis=1, keepdims=True)
    close(out[-1], -ETA * size * state.memory(unit), 1e-4)
    plain = live(deep_momentum(ETA), g)[1]
    assert not np.allclose(out[-1], plain[-1], rtol=1e-2)


def test_the_printed_target_drifts_whatever_the_gradients_say():
    """<m(u), 1>: with the sign of the print every output goes the same way."""
    rule = deep_momentum(1.0, objective="dot", target="ones", inner_rate=0.5)
    for sign in (1.0, -1.0):
        _, out = live(rule, sign * jnp.ones((40, 2)))
        assert float(out[-1].max()) < -1.0


def test_rows_share_a_memory_and_zero_rows_do_not_count(key):
    g = stream(key, (3, 2))
    order = jnp.array([2, 0, 1])
    rule = deep_momentum(ETA, inner_rate=0.5, target=jnp.sign)
    out = live(rule, g)[1]
    close(live(rule, g[:, order])[1], out[:, order], 1e-4)
    padded = jnp.concatenate([g, jnp.zeros((6, 4, 2))], axis=1)
    wide = live(rule, padded)[1]
    close(wide[:, :3], out, 1e-4)
    np.testing.assert_array_equal(wide[:, 3:], 0.0)


@pytest.mark.parametrize("scale", [2.0**-66, 2.0**66])
def test_the_update_is_of_degree_one(key, scale):
    g = stream(key, (3, 2))
    rule = deep_momentum(ETA, inner_rate=0.5)
    close(live(rule, scale * g)[1] / scale, live(rule, g)[1], 1e-4)


def test_choices_that_are_none_are_refused():
    for changes, message in (
        ({"decay": 1.5}, r"decay is the part .* got 1.5"),
        ({"inner_rate": 0.0}, "inner_rate must be positive, got 0.0"),
        ({"hidden": 0}, "hidden must be positive, got 0"),
        ({"objective": "l3"}, "There is no bias 'l3'"),
        ({"target": "one"}, "target must be 'ones', .* got 'one'"),
    ):
        with pytest.raises(ValueError, match=message):
            deep_momentum(ETA, **changes)


def test_the_memory_is_a_network_of_two_layers(key):
    m = DeepMemory(jnp.array(2.0), jnp.ones((2, 4)), jnp.ones((4, 2)))
    x = jnp.array([[1.0, -0.5]])
    hidden = 4 * np.tanh(0.5) / 2.0
    close(m(x), 2.0 * x + hidden)
