"""One test an equation of arXiv:2512.24695: momenta and preconditioners as memories.

Backpropagation (29-31), momentum (32-37), preconditioning (38-41), the memory that
forgets nothing it should avoid (45), more expressive momentum (46-52), generalised
gradient descent (59-60), and Appendix B, Adam and AdaGrad (100-111). Each names what
implements it in a line `Implements: module.function`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.core.level import Level, begin, tick
from hope_jax.kernels.newton_schulz import orthogonalise
from hope_jax.memory.architecture import mlp
from hope_jax.memory.compose import MemoryConfig, Tokens, memory_level
from hope_jax.optim.adaptive import adagrad_memory, adam_memory
from hope_jax.optim.generalised import (
    from_memory,
    ggd,
    gradient_level,
    gradient_start,
)
from hope_jax.optim.levels import from_level
from hope_jax.optim.momenta import (
    delta_level,
    delta_momentum,
    feature_map_momentum,
    hebbian_level,
    momentum,
    nonlinear_momentum,
    preconditioned_momentum,
)
from hope_jax.optim.rules.deep_momentum import deep_momentum
from tests import compare

close = compare.within(1e-4, 1e-5)

ETA, ALPHA = 0.3, 0.9


def normal(key, *shape, at=0):
    return jax.random.normal(jax.random.fold_in(key, at), shape)


def updates(rule, gradients):
    """Every update along a stream of gradients."""

    def step(state, gradient):
        update, state = rule.update(gradient, state, jnp.zeros_like(gradient))
        return state, update

    return jax.lax.scan(step, rule.init(jnp.zeros_like(gradients[0])), gradients)[1]


def standing_at(rule, memory, gradient):
    """The next memory of a momentum that stands at `memory`."""
    state = rule.init(memory)._replace(memory=memory)
    return rule.update(gradient, state)[1].memory


# Backpropagation.


def network(key):
    """A layer of 4 under one of 3, an input, and the gradient of a loss in the end."""
    layers = mlp(3, 4, "tanh", skip=jnp.zeros_like)
    weights = {"w1": normal(key, 3, 4), "w2": normal(key, 4, 3, at=1)}
    return layers, weights, normal(key, 3, at=2)


def loss(y):
    return jnp.sum(jnp.sin(y))


def errors(layers, weights, x):
    """The input and the error of each layer, from the top down."""
    inputs = layers.inputs(weights, x)
    top = jnp.cos(layers.apply(weights, x))
    z = weights["w2"] @ x
    return inputs, {"w1": top, "w2": (1 - jnp.tanh(z) ** 2) * (weights["w1"].T @ top)}


def test_equation_29_errors_come_down_through_the_layers(key):
    """dL/dW_l = delta_l x_{l-1}^T, delta_l = J(z_l)^T W_{l+1}^T delta_{l+1}.

    Implements: hope_jax.memory.architecture.mlp
    """
    layers, weights, x = network(key)
    inputs, delta = errors(layers, weights, x)
    gradient = jax.grad(lambda w: loss(layers.apply(w, x)))(weights)
    close(gradient, {n: jnp.outer(delta[n], inputs[n]) for n in weights})


def test_equation_30_backpropagation_writes_errors_under_inputs(key):
    """W_l <- W_l - eta delta_l x_{l-1}^T: every layer maps its input to its error.

    Implements: hope_jax.core.level.tick
    """
    layers, weights, x = network(key)
    level = Level(
        init=layers.init,
        read=layers.apply,
        objective=lambda w, x: loss(layers.apply(w, x)),
        flow=optax.sgd(ETA),
    )
    inputs, delta = errors(layers, weights, x)
    after = tick(level, begin(level, weights), x)[0].params
    close(
        after,
        {n: w - ETA * jnp.outer(delta[n], inputs[n]) for n, w in weights.items()},
    )


def test_equation_31_which_is_a_proximal_step_of_each_layer(key):
    """W_l <- argmin <W x, delta> + |W - W_l|^2 / 2 eta: the gradient there is zero.

    Implements: hope_jax.optim.generalised.ggd
    """
    layers, weights, x = network(key)
    inputs, delta = errors(layers, weights, x)
    config = MemoryConfig(
        architecture="linear", bias="dot", rule="gd", dgd="none", chunk=1
    )
    rule = ggd(ETA, config)
    gradient = {n: jnp.outer(delta[n], inputs[n]) for n in weights}
    step, _ = jax.jit(rule.update)(gradient, rule.init(weights), weights, inputs=inputs)

    def objective(w):
        linear = sum(jnp.vdot(w[n] @ inputs[n], delta[n]) for n in w)
        moved = jax.tree.map(jnp.subtract, w, weights)
        return linear + optax.tree.norm(moved, squared=True) / (2 * ETA)

    slope = jax.grad(objective)(jax.tree.map(jnp.add, weights, step))
    close(slope, jax.tree.map(jnp.zeros_like, slope))


# Momentum.


def test_equation_32_gradient_descent_is_momentum_that_forgets_all(key):
    """W_{t+1} = W_t - eta grad L(W_t; x_{t+1}).

    Implements: hope_jax.optim.momenta.momentum
    """
    g = normal(key, 4, 2, 3)
    close(updates(momentum(ETA, decay=0.0), g), -ETA * g)


def test_equation_33_momentum_maps_inputs_to_errors(key):
    """W + m_{t+1}, m_{t+1} = alpha m_t - eta delta x^T.

    Implements: hope_jax.optim.momenta.momentum
    """
    delta, x = normal(key, 4, 2), normal(key, 4, 3, at=1)
    out = updates(momentum(ETA, decay=ALPHA), jnp.einsum("to,ti->toi", delta, x))
    m = jnp.zeros((2, 3))
    for t in range(4):
        m = ALPHA * m - ETA * jnp.outer(delta[t], x[t])
        close(out[t], m)


def test_equation_34_it_is_gradient_descent_on_a_dot_product(key):
    """min_m <m x, delta>, without forgetting; with it, plus (1 - alpha) |m|^2 / 2 eta.

    Implements: hope_jax.optim.momenta.hebbian_level
    """
    m, delta, x = normal(key, 2, 3), normal(key, 2, at=1), normal(key, 3, at=2)
    for alpha in (1.0, ALPHA):

        def objective(m, alpha=alpha):
            kept = 0.5 * (1 - alpha) / ETA * jnp.sum(m**2)
            return jnp.vdot(m @ x, delta) + kept

        level = hebbian_level(ETA, decay=alpha)
        after = tick(level, begin(level, m), jnp.outer(delta, x))[0].params
        close(after, m - ETA * jax.grad(objective)(m))


def regression(rate):
    """A memory of gradients that fits m g to a target, here of numbers."""
    return Level(
        init=lambda key: jnp.zeros(()),
        read=lambda m, g: jnp.tanh(m) * g,
        objective=lambda m, g: 0.5 * jnp.sum((jnp.tanh(m) * g + g) ** 2),
        flow=optax.sgd(rate),
        read_at="post",
    )


@pytest.mark.parametrize("which", ["linear", "other"])
def test_equation_35_the_weights_move_by_what_the_memory_says(key, which):
    """W_{t+1} = W_t + m_{t+1}, whatever the memory is.

    Implements: hope_jax.optim.levels.from_level
    """
    level = hebbian_level(ETA) if which == "linear" else regression(ETA)
    g = normal(key, 4, 3)
    state, out = begin(level, jnp.zeros(3)), updates(from_level(level), g)
    for t in range(4):
        state, read = tick(level, state, g[t])
        close(out[t], read)


def test_equation_36_and_the_memory_may_be_asked_with_the_gradient(key):
    """W_{t+1} = W_t + m_{t+1}(u): a function of the gradient at hand.

    Implements: hope_jax.optim.generalised.from_memory
    """
    config = MemoryConfig(architecture="mlp", expansion=2, rule="gd", chunk=1)
    g = normal(key, 3, 2, 3)
    level = gradient_level(ETA, config)

    @jax.jit
    def both(g):
        state = begin(level, gradient_start(config)(g[0]))
        state, _ = jax.lax.scan(lambda s, g: tick(level, s, g), state, g)
        return level.read(state.params, g[-1]), updates(from_memory(ETA, config), g)[-1]

    close(*both(g))


def test_equation_37_the_memory_descends_an_objective_of_its_own(key):
    """m_{t+1} is a step on L(m; x, -delta), any objective.

    Implements: hope_jax.optim.levels.from_level
    """
    level, g = regression(ETA), normal(key, 1, 3)
    optimizer = from_level(level)
    start = jnp.zeros(3)
    _, state = optimizer.update(g[0], optimizer.init(start))
    m = start - ETA * jax.grad(level.objective)(start, g[0])
    close(state.params, m)


# Preconditioning.


def test_equation_38_preconditioned_gradient_descent(key):
    """W_{t+1} = W_t - eta P^{-1} g: Newton's method is there in one step.

    Implements: hope_jax.optim.momenta.preconditioned_momentum
    """
    root = normal(key, 3, 3)
    hessian = root @ root.T + jnp.eye(3)
    w = normal(key, 3, 2, at=1)
    rule = preconditioned_momentum(1.0, jnp.linalg.inv(hessian), decay=0.0)
    step, _ = rule.update(hessian @ w, rule.init(w))
    close(w + step, jnp.zeros_like(w), atol=1e-4)


def test_equation_39_a_preconditioner_is_any_map_of_gradients(key):
    """W_{t+1} = W_t - eta P(g).

    Implements: hope_jax.optim.momenta.preconditioned_momentum
    """
    g = normal(key, 4, 2, 3)
    rule = preconditioned_momentum(ETA, jnp.sign, decay=0.0)
    close(updates(rule, g), -ETA * jnp.sign(g))


PRECONDITIONER = MemoryConfig(
    architecture="linear", bias="l2", rule="gd", dgd="none", gradient="exact"
)


def test_equation_40_a_preconditioner_is_a_memory_of_coordinates(key):
    """min_P L(P(g); g^): asked for the sign of g, P learns to give it.

    Implements: hope_jax.optim.generalised.from_memory
    """
    g = jnp.broadcast_to(normal(key, 2, 4), (60, 2, 4))
    rule = from_memory(
        1.0, PRECONDITIONER, inner_rate=1.0, retention=1.0, target=jnp.sign
    )
    out = updates(rule, g)
    signs = jnp.sign(g[0]) / 2.0  # the direction of a row of four signs
    close(out[-1], -jnp.linalg.norm(g[0], axis=1, keepdims=True) * signs, 1e-2, 1e-2)


def test_equation_41_which_learns_by_gradient_descent(key):
    """P_{t+1} = P_t - zeta grad L(P_t; g, g^) (the print has P_{t+1} on both sides).

    Implements: hope_jax.optim.generalised.gradient_level
    """
    g, zeta = normal(key, 3), 0.4
    level = gradient_level(
        1.0, PRECONDITIONER, inner_rate=zeta, retention=1.0, target=jnp.sign
    )
    p = {"w": normal(key, 3, 3, at=1)}
    unit, signs = g / jnp.linalg.norm(g), jnp.sign(g) / jnp.sqrt(3.0)

    def objective(p):
        return 0.5 * jnp.sum((p["w"] @ unit - signs) ** 2)

    after = tick(level, begin(level, p), g)[0].params
    close(after["w"], p["w"] - zeta * jax.grad(objective)(p)["w"])


# What momentum forgets.


def test_equation_45_momentum_remembers_the_last_task_alone(key):
    """L_i(W) = E (W^T x - y)^2 with the inputs of task i along u_i, all orthogonal.

    Implements: hope_jax.optim.momenta.momentum
    """
    rule, w = momentum(0.05, decay=0.9), jnp.zeros(4)
    state = rule.init(w)

    def step(carry, sample):
        (state, w), (x, y) = carry, sample
        g = jax.grad(lambda w: (jnp.vdot(w, x) - y) ** 2)(w)
        update, state = rule.update(g, state)
        return (state, w + update), None

    for i, u in enumerate(jnp.eye(4)):
        size, y = normal(key, 150, at=i), normal(key, 150, at=4 + i)
        (state, w), _ = jax.lax.scan(step, (state, w), (size[:, None] * u[None], y))
        along = jnp.abs(state.memory @ u) / jnp.linalg.norm(state.memory)
        assert float(along) > 0.999


# More expressive momentum.


def some_memory(key):
    return normal(key, 2, 3), normal(key, 2, 3, at=1), normal(key, 2, 2, at=2)


def test_equation_46_preconditioned_momentum_is_a_hebbian_memory(key):
    """It descends <m g^T, P>: each step is the gradient of that.

    Implements: hope_jax.optim.momenta.preconditioned_momentum
    """
    m, g, p = some_memory(key)
    rule = preconditioned_momentum(ETA, p, decay=1.0)
    state = rule.init(m)
    state = state._replace(momentum=state.momentum._replace(memory=m))
    slope = jax.grad(lambda m: jnp.vdot(m @ g.T, p))(m)
    close(rule.update(g, state)[0], m - ETA * slope)


def test_equation_47_preconditioned_momentum(key):
    """W + m_{i+1}, m_{i+1} = alpha m_i - eta P g_i (alpha is missing in print).

    Implements: hope_jax.optim.momenta.preconditioned_momentum
    """
    g, (_, _, p) = normal(key, 4, 2, 3), some_memory(key)
    out, m = updates(preconditioned_momentum(ETA, p, decay=ALPHA), g), 0.0
    for t in range(4):
        m = ALPHA * m - ETA * p @ g[t]
        close(out[t], m)


def test_equation_48_delta_momentum_regresses(key):
    """Its objective is |m g^T + P|^2: the target is -P, with the sign that descends.

    Implements: hope_jax.optim.momenta.delta_momentum
    """
    m, g, p = some_memory(key)
    rule = functools.partial(delta_momentum, ETA, form="matrix", precondition=p)

    def objective(m):
        return 0.5 * jnp.sum((m @ g.T + p) ** 2)

    literal = standing_at(rule(decay=1.0, stability="literal"), m, g)
    close(literal, m - ETA * jax.grad(objective)(m))

    def proximal(new):
        return objective(new) + jnp.sum((new - ALPHA * m) ** 2) / (2 * ETA)

    slope = jax.grad(proximal)(standing_at(rule(decay=ALPHA), m, g))
    close(slope, jnp.zeros_like(m), atol=1e-4)


def test_equation_49_delta_momentum_is_the_delta_rule(key):
    """m (alpha I - eta g^T g) - eta P g; by the element m (alpha - eta g^2) - eta p g.

    The print lacks the step size on the decay and has g g^T. For one row and P = 1 it
    is the delta rule with key g and value -1: what m says about g is corrected.

    Implements: hope_jax.optim.momenta.delta_momentum
    """
    m, g, p = some_memory(key)
    matrix = delta_momentum(
        ETA, decay=ALPHA, form="matrix", stability="literal", precondition=p
    )
    kept = ALPHA * jnp.eye(3) - ETA * g.T @ g
    close(standing_at(matrix, m, g), m @ kept - ETA * p @ g)
    element = delta_momentum(ETA, decay=ALPHA, stability="literal")
    close(standing_at(element, m, g), m * (ALPHA - ETA * g**2) - ETA * g)

    level = delta_level(ETA, decay=ALPHA)
    close(tick(level, begin(level, m), g)[0].params, standing_at(element, m, g))
    row, unit = m[:1], g[:1] / jnp.linalg.norm(g[0])
    rule = delta_momentum(ETA, decay=1.0, form="matrix", stability="literal")
    corrected = row - ETA * (row @ unit.T - (-1.0)) @ unit
    close(standing_at(rule, row, unit), corrected)
    full = delta_momentum(1e6, decay=1.0, form="matrix")  # then m g = -1 at once
    close(standing_at(full, row, unit) @ unit.T, -jnp.ones((1, 1)), 1e-3)


def test_equation_50_deep_momentum(key):
    """W + m_{i+1}(u_i), m_{i+1} = alpha m_i - eta grad L(m_i; u_i): a network as m.

    Implements: hope_jax.optim.rules.deep_momentum.deep_momentum
    """
    rule = deep_momentum(ETA, decay=1.0, inner_rate=0.2, target=jnp.sign, hidden=4)
    u = normal(key, 3)
    state = rule.init(u)
    before = state.memory._replace(w1=normal(key, 3, 4, at=1))
    unit, signs = u / jnp.linalg.norm(u), jnp.sign(u) / jnp.sqrt(3.0)

    def objective(m):
        return 0.5 * jnp.sum((m(unit[None])[0] - signs) ** 2)

    update, after = rule.update(u, state._replace(memory=before))
    slope = jax.grad(objective)(before)
    memory = jax.tree.map(lambda m, s: m - 0.2 * s, before, slope)
    close(after.memory, memory)
    close(update, -ETA * jnp.sqrt(3.0) * memory(unit[None])[0])


def test_equation_51_feature_maps(key):
    """m_{i+1} = alpha m_i - eta P phi(g_i).

    Implements: hope_jax.optim.momenta.feature_map_momentum
    """
    g, (_, _, p) = normal(key, 4, 2, 3), some_memory(key)
    rule = feature_map_momentum(ETA, jnp.tanh, decay=ALPHA, precondition=p)
    out, m = updates(rule, g), 0.0
    for t in range(4):
        m = ALPHA * m - ETA * p @ jnp.tanh(g[t])
        close(out[t], m)


def test_equation_52_non_linear_outputs(key):
    """W + sigma(m_{i+1}); with Newton-Schulz for sigma and a linear m this is Muon.

    Implements: hope_jax.optim.momenta.nonlinear_momentum
    """
    g = normal(key, 4, 3, 3)
    m = -jnp.stack(
        [sum(ALPHA ** (t - i) * g[i] for i in range(t + 1)) for t in range(4)]
    )
    out = updates(nonlinear_momentum(ETA, jnp.tanh, decay=ALPHA), g)
    close(out, ETA * jnp.tanh(m))
    printed = nonlinear_momentum(ETA, jnp.tanh, decay=ALPHA, literal=True)
    close(updates(printed, g), jnp.tanh(ETA * m))
    muon = updates(nonlinear_momentum(ETA, decay=ALPHA), g)
    close(muon, ETA * orthogonalise(m), 1e-3, 1e-4)


# Generalised gradient descent.


def test_equation_59_generalised_gradient_descent(key):
    """argmin l(W; x, u) + Ret(W, W_t), for any l and Ret: its gradient there is zero.

    Here l2 with |W - W_t|^2 / 2 eta, solved exactly; and, l being linearised at W_t, a
    distance to alpha W_t, and the relative entropy of rows on a simplex.

    Implements: hope_jax.optim.generalised.ggd
    """
    x, u = normal(key, 3, at=1), normal(key, 2, at=2)
    start = jax.nn.softmax(normal(key, 2, 3))

    def after(**choices):
        config = MemoryConfig(architecture="linear", dgd="none", chunk=1, **choices)
        rule = ggd(ETA, config, retention=ALPHA if config.retention == "decay" else 1.0)
        gradient, state = jnp.outer(-u, x), rule.init(start)
        return start + rule.update(gradient, state, start, inputs=x)[0]

    def l2(w):
        return 0.5 * jnp.sum((w @ x - u) ** 2)

    def distance(w, start):
        return jnp.sum((w - start) ** 2) / (2 * ETA)

    solved = after(rule="implicit", retention="none")
    slope = jax.grad(lambda w: l2(w) + distance(w, start))(solved)
    close(slope, jnp.zeros_like(start))

    linear, decayed = jax.grad(l2)(start), after(rule="gd", retention="decay")
    slope = linear + jax.grad(distance)(decayed, ALPHA * start)
    close(slope, jnp.zeros_like(start))

    on_simplex = after(rule="gd", retention="kl")
    close(jnp.sum(on_simplex, axis=1), jnp.ones(2))
    slope = linear + (jnp.log(on_simplex / start) + 1) / ETA
    close(slope, jnp.broadcast_to(slope[:, :1], (2, 3)), atol=1e-4)  # along the simplex


def test_equation_60_whose_values_the_weights_make_themselves(key):
    """u_t = f_{W_t}(x_t) = -grad_y L(W_t; x_t): the step is one token of the memory.

    Implements: hope_jax.optim.generalised.ggd
    """
    config = MemoryConfig(
        architecture="linear", bias="huber", rule="gd", dgd="none", chunk=1
    )
    level = memory_level(config, 3)
    w, rule = normal(key, 3, 3), ggd(ETA, config, retention=ALPHA)
    state, memory = rule.init(w), begin(level, {"w": w})
    for t in range(3):
        x = normal(key, 3, at=1 + t)
        value = -jax.grad(loss)(w @ x)
        rates = {"eta": jnp.float32(ETA), "alpha": jnp.float32(ALPHA)}
        token = Tokens(k=x, v=value, q=x, theta=jnp.float32(0.0), **rates)
        memory, _ = tick(level, memory, token)
        gradient = jax.grad(lambda w, x=x: loss(w @ x))(w)
        step, state = rule.update(gradient, state, w, inputs=x)
        w = w + step
        close(w, memory.params["w"])


# Appendix B. 100 to 105 are certain; how 106 to 111 are split is not.


def sums(key, target="root", ridge=0.0, **more):
    """Gradients, and the last step of the literal Adam memory along them."""
    g = normal(key, 5, 2, 3)
    factors = {"b1": 1.0, "b2": 1.0} | more
    rule = adam_memory(
        1.0, eps=0.0, ridge=ridge, target=target, literal=True, **factors
    )
    return g, updates(rule, g)[-1]


def test_equation_100_the_weights_move_by_the_best_memory(key):
    """W_{i+1} = W_i - eta m*, which descends for g = +grad L (the print climbs).

    Implements: hope_jax.optim.adaptive.adam_memory
    """
    g, step = sums(key)
    faster = updates(adam_memory(ETA, b1=1.0, b2=1.0, eps=0.0, literal=True), g)[-1]
    close(faster, ETA * step)
    assert bool((jnp.sign(step) == -jnp.sign(g.sum(0))).all())


@pytest.mark.parametrize("target", ["root", "square"])
def test_equation_101_an_element_wise_regression(key, target):
    """sum |m g - P|^2 + lambda |m|^2 has its minimum there.

    Implements: hope_jax.optim.adaptive.adam_memory
    """
    g, step = sums(key, target, ridge=0.5)
    h = jnp.sum(g**2, axis=0)
    p = jnp.sqrt(h) if target == "root" else h

    def objective(m):
        return jnp.sum((m[None] * g - p[None]) ** 2) + 0.5 * jnp.sum(m**2)

    close(jax.grad(objective)(-step), jnp.zeros_like(step), atol=1e-4)


def test_equation_102_the_minimum(key):
    """m* = P M / (H + lambda).

    Implements: hope_jax.optim.adaptive.adam_memory
    """
    g, step = sums(key, ridge=0.5)
    h = jnp.sum(g**2, axis=0)
    close(-step, jnp.sqrt(h) * jnp.sum(g, axis=0) / (h + 0.5))


def test_equation_103_from_two_running_sums(key):
    """M <- M + beta1 g, H <- H + beta2 g^2.

    Implements: hope_jax.optim.adaptive.adam_memory
    """
    g = normal(key, 5, 2, 3)
    rule = adam_memory(ETA, b1=0.5, b2=0.25, literal=True)
    state = rule.init(g[0])
    for one in g:
        _, state = rule.update(one, state)
    close(state.first, 0.5 * jnp.sum(g, axis=0))
    close(state.root**2, 0.25 * jnp.sum(g**2, axis=0))


def test_equation_104_onto_squares_it_is_momentum(key):
    """P = sum g^2, lambda -> 0: the step is that of momentum.

    Implements: hope_jax.optim.adaptive.adam_memory
    """
    g, step = sums(key, "square")
    close(step, updates(momentum(1.0, decay=1.0), g)[-1])
    close(sums(key, "square", ridge=1e-6)[1], step)


def test_equation_105_onto_their_root_it_is_adam(key):
    """P = sqrt(sum g^2): eta / sqrt(beta2) M / (H^{1/2} + eps), Adam up to its means.

    Implements: hope_jax.optim.adaptive.adam_memory
    """
    g, step = sums(key, b1=0.5, b2=0.25)
    m, h = 0.5 * jnp.sum(g, axis=0), 0.25 * jnp.sum(g**2, axis=0)
    close(step, -m / jnp.sqrt(h) / jnp.sqrt(0.25))
    with jax.numpy_dtype_promotion("standard"):
        theirs = updates(optax.adam(ETA), g)
    close(updates(adam_memory(ETA), g), theirs, 2e-4)


def outer(key, ridge=0.0):
    """Gradients of a vector, its full AdaGrad's last step, H and its square root."""
    g = normal(key, 6, 3)
    rule = adagrad_memory(1.0, form="outer", decay=1.0, eps=0.0, ridge=ridge)
    h = g.T @ g
    values, vectors = jnp.linalg.eigh(h)
    return g, updates(rule, g)[-1], h, (vectors * jnp.sqrt(values)[None]) @ vectors.T


def test_equation_106_a_matrix_regression(key):
    """sum |m g - P|^2 + lambda |m|^2 for a matrix m and P = (sum g g^T)^{1/2} a row.

    Each row of m regresses on its own entry of P; its minimum, applied to all rows of
    P = H^{1/2}, is the step.

    Implements: hope_jax.optim.adaptive.adagrad_memory
    """
    g, step, _, root = outer(key, ridge=0.5)

    def objective(m, p):
        return jnp.sum((g @ m - p) ** 2) + 0.5 * jnp.sum(m**2)

    # The step is sum_i g_i H^{1/2} (H + lambda)^{-1}, one entry of P at a time.
    memories = step_of_rows(g, 0.5)
    for p in (1.0, 2.0):
        slope = jax.grad(objective)(p * memories, p)
        close(slope, jnp.zeros(3), atol=1e-3)
    close(-step, root @ memories, 1e-3, 1e-3)


def step_of_rows(g, ridge):
    """The minimum for P = 1: M (H + lambda I)^{-1}."""
    return jnp.linalg.solve(g.T @ g + ridge * jnp.eye(3), jnp.sum(g, axis=0))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_equation_107_the_sum_of_gradients(key, shape):
    """M <- M + beta1 g^T: with decay 1, the sum; with 0, AdaGrad's own gradient.

    Implements: hope_jax.optim.adaptive.adagrad_memory
    """
    g = normal(key, 5, *shape)
    for decay, expected in ((1.0, jnp.sum(g, axis=0)), (0.0, g[-1])):
        rule = adagrad_memory(ETA, form="outer", decay=decay)
        state = rule.init(g[0])
        for one in g:
            _, state = rule.update(one, state)
        close(state.first, expected)


def test_equation_108_the_sum_of_outer_products(key):
    """H <- H + beta2 g g^T.

    Implements: hope_jax.optim.adaptive.adagrad_memory
    """
    g = normal(key, 5, 3)
    rule = adagrad_memory(ETA, form="outer")
    state = rule.init(g[0])
    for one in g:
        _, state = rule.update(one, state)
    close(state.second.size**2 * state.second.gram, g.T @ g)


def test_equation_109_its_minimum_has_the_inverse_on_the_right(key):
    """m* = P M (H + lambda I)^{-1}: on the left it does not fit unless m is square.

    Implements: hope_jax.optim.adaptive.adagrad_memory
    """
    g, step, h, root = outer(key, ridge=0.5)
    right = jnp.linalg.inv(h + 0.5 * jnp.eye(3))
    close(step, -jnp.sum(g, axis=0) @ root @ right, 1e-3, 1e-3)
    rows = normal(key, 6, 2, 3)  # where a left inverse would be 2 x 2, not 3 x 3
    rule = adagrad_memory(1.0, form="outer", decay=1.0, eps=0.0, ridge=0.5)
    h = jnp.einsum("trc,trd->cd", rows, rows)
    values, vectors = jnp.linalg.eigh(h)
    shrunk = vectors * (jnp.sqrt(values) / (values + 0.5))[None]
    expected = -jnp.sum(rows, axis=0) @ shrunk @ vectors.T
    close(updates(rule, rows)[-1], expected, 1e-3, 1e-3)


def test_equation_110_which_a_small_ridge_leaves_as_it_is(key):
    """lambda -> 0.

    Implements: hope_jax.optim.adaptive.adagrad_memory
    """
    step = outer(key)[1]
    close(outer(key, ridge=1e-5)[1], step, 1e-3, 1e-3)
    assert not np.allclose(outer(key, ridge=1.0)[1], step, rtol=0.05)


def test_equation_111_adagrad(key):
    """The step is H^{-1/2} M: full AdaGrad with momentum, and without it the diagonal.

    Implements: hope_jax.optim.adaptive.adagrad_memory
    """
    g, step, _, root = outer(key)
    close(step, -jnp.linalg.solve(root, jnp.sum(g, axis=0)), 1e-3, 1e-3)
    theirs = optax.adagrad(ETA, initial_accumulator_value=0.0, eps=0.0)
    close(updates(adagrad_memory(ETA, eps=0.0), g), updates(theirs, g))
