import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from hope_jax.core import transfer
from hope_jax.core.clock import Clock
from hope_jax.core.level import Level, begin, unroll
from hope_jax.core.transfer import (
    attend,
    backprop,
    condition,
    generate,
    initialise,
    receive,
    regress,
)
from tests import compare

close = compare.within()


# condition ----------------------------------------------------------------------------


def test_condition_on_an_answer_and_across_it():
    def read(w, x, given):
        return w * x * given

    def other(theta):
        return lambda x: theta + x

    def answer(w, theta, **how):
        return condition(read, other(theta), **how)(w, jnp.array(2.0))

    one, three = jnp.array(1.0), jnp.array(3.0)
    np.testing.assert_allclose(answer(three, one), 18.0)
    stopped = jax.grad(answer, argnums=(0, 1))(three, one)
    crossed = jax.grad(lambda w, t: answer(w, t, differentiable=True), (0, 1))
    np.testing.assert_allclose(stopped, (6.0, 0.0))
    np.testing.assert_allclose(crossed(three, one), (6.0, 6.0))


# attend -------------------------------------------------------------------------------


def qkv(key, length=6):
    k, v, q = jax.random.split(key, 3)
    return (
        jax.random.normal(k, (length, 4)),
        jax.random.normal(v, (length, 3)),
        jax.random.normal(q, (length, 4)),
    )


def softmax_attention(k, v, q, window=None):
    length = k.shape[0]
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    scores = jnp.where(seen, q @ k.T / 2.0, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1) @ v


@pytest.mark.parametrize("window", [None, 1, 3])
def test_attend_is_softmax_attention_in_value_and_gradient(key, window):
    context = qkv(key)

    def ours(context):
        level = attend(regress(window=window))
        return unroll(level, begin(level, level.init(key)), context)[1]

    theirs = jax.jit(lambda c: softmax_attention(*c, window=window))
    close(ours(context), theirs(context))
    close(
        jax.grad(lambda c: jnp.sum(jnp.sin(ours(c))))(context),
        jax.grad(lambda c: jnp.sum(jnp.sin(theirs(c))))(context),
    )


def test_attend_through_another_level(key):
    x = jax.random.normal(key, (5, 4))
    w = jax.random.normal(jax.random.key(1), (3, 4, 4))
    level = attend(through=lambda x_t: tuple(w @ x_t))
    _, reads = unroll(level, begin(level, ()), x)
    close(reads, softmax_attention(*(x @ w_i.T for w_i in w)))


def test_attend_takes_any_read():
    level = attend(lambda context, mask, x_t: jnp.sum(context, where=mask) - x_t)
    _, reads = unroll(level, begin(level, ()), jnp.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(reads, [0.0, 1.0, 3.0])


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="window must be at least 1 item.*got 0"):
        regress(window=0)


# backprop -----------------------------------------------------------------------------

ETA_0, ETA_1 = 0.1, 0.3


def two_layers(period_0, period_1):
    def layer(eta, period):
        return Level(
            init=lambda key: jax.random.normal(key, (3, 3)),
            read=lambda w, x: w @ x,
            objective=lambda w, x: jnp.zeros(()),
            flow=optax.sgd(eta),
            clock=Clock(period=period),
        )

    def objective(params, item):
        x, target = item
        y = params["1"] @ jnp.tanh(params["0"] @ x)
        return 0.5 * jnp.sum((y - target) ** 2), y

    return {"0": layer(ETA_0, period_0), "1": layer(ETA_1, period_1)}, objective


def by_hand(w_0, w_1, context, period_0, period_1):
    """Spec: delta_1 = y - target, delta_0 = phi' (W_1^T delta_1), two clocks."""
    w_0, w_1 = np.asarray(w_0), np.asarray(w_1)
    sums = [np.zeros_like(w_0), np.zeros_like(w_1)]
    reads = []
    for i, (x, target) in enumerate(zip(*map(np.asarray, context), strict=True), 1):
        hidden = np.tanh(w_0 @ x)
        reads.append(w_1 @ hidden)
        delta_1 = reads[-1] - target
        delta_0 = (1 - hidden**2) * (w_1.T @ delta_1)
        sums[0] += np.outer(delta_0, x)
        sums[1] += np.outer(delta_1, hidden)
        if i % period_0 == 0:
            w_0, sums[0] = w_0 - ETA_0 * sums[0], np.zeros_like(w_0)
        if i % period_1 == 0:
            w_1, sums[1] = w_1 - ETA_1 * sums[1], np.zeros_like(w_1)
    return w_0, w_1, sums[0], np.stack(reads)


@pytest.mark.parametrize("periods", [(4, 1), (1, 4), (3, 2), (float("inf"), 1)])
def test_two_layers_on_two_clocks_in_one_gradient_flow(key, periods):
    levels, objective = two_layers(*periods)
    keys = jax.random.split(key, 4)
    params = {"0": levels["0"].init(keys[0]), "1": levels["1"].init(keys[1])}
    context = jax.random.normal(keys[2], (7, 3)), jax.random.normal(keys[3], (7, 3))
    states = {name: begin(levels[name], params[name]) for name in levels}
    states, (_, reads) = jax.lax.scan(
        lambda s, x: backprop(levels, s, objective, x), states, context
    )
    w_0, w_1, owed, expected = by_hand(params["0"], params["1"], context, *periods)
    close(reads, expected, rtol=1e-4)
    close(states["0"].params, w_0, rtol=1e-4)
    close(states["1"].params, w_1, rtol=1e-4)
    if 1 < periods[0] < float("inf"):
        # What the slow level is owed in mid-period: its own items' gradients, summed.
        close(states["0"].gradient, owed, rtol=1e-4)


def test_backprop_is_differentiable_in_where_it_started(key, float64):
    levels, objective = two_layers(2, 1)
    keys = jax.random.split(key, 4)
    params = {"0": levels["0"].init(keys[0]), "1": levels["1"].init(keys[1])}
    context = jax.random.normal(keys[2], (4, 3)), jax.random.normal(keys[3], (4, 3))

    def outer(params):
        states = {name: begin(levels[name], params[name]) for name in levels}
        _, (_, reads) = jax.lax.scan(
            lambda s, x: backprop(levels, s, objective, x), states, context
        )
        return jnp.sum(jnp.sin(reads))

    check_grads(outer, (params,), order=1, modes=["rev"], rtol=1e-6)


def test_backprop_hands_each_flow_its_inputs(key):
    def update(gradient, state, params=None, *, inputs, **extra):
        return jnp.outer(jnp.ones(3), inputs), state

    flow = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    levels, objective = two_layers(1, 1)
    levels["0"] = levels["0"]._replace(flow=flow)
    states = {name: begin(levels[name], jnp.zeros((3, 3))) for name in levels}
    x = jnp.array([1.0, 2.0, 3.0])
    states, _ = backprop(
        levels, states, objective, (x, x), inputs=lambda params, item: {"0": item[0]}
    )
    np.testing.assert_array_equal(states["0"].params, np.outer(np.ones(3), x))


def test_backprop_takes_gradients_at_anchors(key):
    levels, objective = two_layers(1, 1)
    levels["0"] = levels["0"]._replace(clock=Clock(anchor=2))
    params = {name: levels[name].init(key) for name in levels}
    context = jax.random.normal(key, (2, 3)), jax.random.normal(key, (2, 3))
    states = {name: begin(levels[name], params[name]) for name in levels}
    first, item = (jax.tree.map(lambda x, t=t: x[t], context) for t in (0, 1))
    one, _ = backprop(levels, states, objective, first)
    two, _ = backprop(levels, one, objective, item)
    point = {"0": params["0"], "1": one["1"].params}  # "0" still at its chunk's start
    gradient = jax.grad(lambda w: objective(w, item)[0])(point)
    close(two["0"].params, one["0"].params - ETA_0 * gradient["0"], rtol=1e-4)
    close(two["1"].params, one["1"].params - ETA_1 * gradient["1"], rtol=1e-4)


def test_backprop_refuses_levels_without_states():
    levels, objective = two_layers(1, 1)
    with pytest.raises(ValueError, match="must have the same names"):
        backprop(levels, {}, objective, ())


def test_receive_adds_up_and_moves_on_the_clock():
    levels, _ = two_layers(2, 1)
    state = begin(levels["0"], jnp.zeros((3, 3)))
    state = receive(levels["0"], state, jnp.full((3, 3), 1.0))
    np.testing.assert_array_equal(state.params, 0.0)
    state = receive(levels["0"], state, jnp.full((3, 3), 2.0))
    np.testing.assert_allclose(state.params, -ETA_0 * 3.0)


# initialise ---------------------------------------------------------------------------


def regression(steps_eta=0.2):
    """Fits a sinusoid's amplitude and offset by gradient descent on its points."""

    def loss(w, point):
        x, y = point
        return 0.5 * (w["a"] * jnp.sin(x) + w["b"] - y) ** 2

    fast = Level(
        init=lambda key: {"a": jnp.zeros(()), "b": jnp.zeros(())},
        read=lambda w, point: w["a"] * jnp.sin(point[0]) + w["b"],
        objective=loss,
        flow=optax.sgd(steps_eta),
    )

    def score(w, query):
        return jnp.mean(jax.vmap(lambda x, y: loss(w, (x, y)))(*query))

    return fast, score


def sinusoid(key, points=5):
    """A task: amplitude in [2, 3], offset in [0.5, 1]; points to fit, points to ask."""
    x_key, a_key, b_key = jax.random.split(key, 3)
    x = jax.random.uniform(x_key, (2, points), minval=-3.0, maxval=3.0)
    a = jax.random.uniform(a_key, minval=2.0, maxval=3.0)
    b = jax.random.uniform(b_key, minval=0.5, maxval=1.0)
    y = a * jnp.sin(x) + b
    return (x[0], y[0]), (x[1], y[1])


def start():
    return {"a": jnp.array(0.3), "b": jnp.array(-0.2)}


def test_maml_exact_by_finite_differences(key, float64):
    fast, score = regression()
    objective = initialise(fast, score, gradient="exact")
    task = sinusoid(key)
    check_grads(lambda w: objective(w, task), (start(),), 1, ["rev"], rtol=1e-6)


def test_maml_first_order_is_the_gradient_at_the_end(key, float64):
    fast, score = regression()
    context, query = sinusoid(key)
    gradient = jax.grad(initialise(fast, score, gradient="first_order"))(
        start(), (context, query)
    )
    end, _ = unroll(fast, begin(fast, start()), context)
    close(gradient, jax.grad(score)(end.params, query), rtol=1e-9)
    exact = jax.grad(initialise(fast, score))(start(), (context, query))
    for name in gradient:
        assert abs(gradient[name]) > 1e-3
        assert abs(gradient[name] - exact[name]) > 1e-3


def test_maml_none_is_zero(key):
    fast, score = regression()
    objective = initialise(fast, score, gradient="none")
    assert jax.grad(objective)(start(), sinusoid(key)) == {"a": 0.0, "b": 0.0}
    value = initialise(fast, score)(start(), sinusoid(key))
    np.testing.assert_allclose(objective(start(), sinusoid(key)), value, rtol=1e-6)


@pytest.mark.parametrize("gradient", ["exact", "first_order"])
def test_maml_learns_where_to_start(key, gradient):
    fast, score = regression()
    objective = initialise(fast, score, gradient=gradient)

    def over_tasks(w, tasks):
        return jnp.mean(jax.vmap(objective, (None, 0))(w, tasks))

    slow = Level(
        init=fast.init,
        read=over_tasks,
        objective=over_tasks,
        flow=optax.sgd(0.3),
    )
    tasks = jax.vmap(jax.vmap(sinusoid))(jax.random.split(key, (60, 8)))
    state, losses = unroll(slow, begin(slow, slow.init(key)), tasks)
    assert losses[-10:].mean() < 0.15 * losses[:3].mean()
    assert 2.0 < state.params["a"] < 3.0


# generate -----------------------------------------------------------------------------


def linear(eta=0.5):
    return Level(
        init=lambda key: jnp.zeros((2, 2)),
        read=lambda w, item: w @ item[0],
        objective=lambda w, item: 0.5 * jnp.sum((w @ item[0] - item[1]) ** 2),
        flow=optax.sgd(eta),
        inputs=lambda w, item: item[0],
    )


def test_a_hypernetwork_learns_the_weights_it_makes(key):
    """Task c's map is the matrix A0 + c A1: the generator must find A0 and A1."""
    truth = jax.random.normal(key, (2, 2, 2))
    c_key, x_key = jax.random.split(key)
    c = jax.random.normal(c_key, (400,))
    x = jax.random.normal(x_key, (400, 2))
    y = x @ truth[0].T + c[:, None] * (x @ truth[1].T)

    hyper = generate(
        linear(0.1),
        weights=lambda phi, item: phi[0] + item[2] * phi[1],
        init=lambda key: jnp.zeros((2, 2, 2)),
    )
    assert hyper.inputs is None  # these are the matrices' inputs, not phi's
    state, reads = unroll(hyper, begin(hyper, hyper.init(key)), (x, y, c))
    close(state.params, truth, rtol=0, atol=0.05)
    close(reads[0], jnp.zeros(2))

    fixed = generate(
        linear(),
        weights=lambda phi, item: phi[0] + item[2] * phi[1],
        init=lambda key: jnp.zeros((2, 2, 2)),
        differentiable=False,
    )
    gradient = jax.grad(fixed.objective)(truth, (x[0], 1 + y[0], c[0]))
    np.testing.assert_array_equal(gradient, 0.0)


def test_context_made_by_another_level_passes_its_gradient_back(key):
    """Keys and values projected by a slow level: the memory's context flow."""
    x = jax.random.normal(key, (5, 2))

    def outer(w, differentiable):
        fed = generate(
            linear(),
            context=lambda m, x_t: (w @ x_t, x_t),
            differentiable=differentiable,
        )
        state, _ = unroll(fed, begin(fed, jnp.zeros((2, 2))), x)
        return jnp.sum(jnp.sin(state.params))

    def direct(w):
        state, _ = unroll(linear(), begin(linear(), jnp.zeros((2, 2))), (x @ w.T, x))
        return jnp.sum(jnp.sin(state.params))

    w = jnp.array([[1.0, 0.5], [-0.5, 1.0]])
    close(jax.grad(outer)(w, True), jax.grad(direct)(w))
    close(outer(w, False), direct(w))
    np.testing.assert_array_equal(jax.grad(outer)(w, False), 0.0)


def test_self_generated_values(key):
    """v = M x itself: the target is a constant of the step, or it is not."""
    m, x = jax.random.normal(key, (2, 2)), jnp.array([1.0, 2.0])

    def gradient(differentiable):
        fed = generate(
            linear(),
            context=lambda m, x_t: (x_t, 3.0 * m @ x_t),
            differentiable=differentiable,
        )
        np.testing.assert_array_equal(fed.inputs(m, x), x)
        return jax.grad(fed.objective)(m, x)

    error = m @ x - 3.0 * m @ x
    close(gradient(False), jnp.outer(error, x), rtol=1e-4)
    close(gradient(True), -2.0 * jnp.outer(error, x), rtol=1e-4)


def test_generate_says_what_it_needs():
    with pytest.raises(ValueError, match="`weights` or `context`, and not both"):
        generate(linear())
    with pytest.raises(ValueError, match="`init` is where the generator's own"):
        generate(linear(), weights=lambda phi, x: phi)
    with pytest.raises(ValueError, match="leave it out with `context`"):
        generate(linear(), context=lambda m, x: x, init=lambda key: ())


def test_examples_in_docstrings():
    results = doctest.testmod(transfer)
    assert results.attempted > 0 and results.failed == 0
