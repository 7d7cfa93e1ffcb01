import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import hope_jax
from hope_jax.core import clock, level
from hope_jax.core.clock import Clock
from hope_jax.core.level import (
    Fast,
    Level,
    Slow,
    begin,
    hope_update,
    tick,
    unroll,
)

ETA = 0.3


def memory(**changes) -> Level:
    """A matrix that learns v from k and is asked q."""

    def objective(m, item):
        k, v, _ = item
        return 0.5 * jnp.sum((m @ k - v) ** 2)

    plain = Level(
        init=lambda key: jax.random.normal(key, (2, 3)),
        read=lambda m, item: m @ item[2],
        objective=objective,
        flow=optax.sgd(ETA),
    )
    return plain._replace(**changes)


def items(key, length=9):
    k, v, q = jax.random.split(key, 3)
    return (
        jax.random.normal(k, (length, 3)),
        jax.random.normal(v, (length, 2)),
        jax.random.normal(q, (length, 3)),
    )


def by_hand(m, context, period, anchor, read_at):
    m = np.asarray(m)
    at_anchor, total, reads = m, np.zeros_like(m), []
    for i, (k, v, q) in enumerate(zip(*map(np.asarray, context), strict=True), 1):
        before = m
        point = at_anchor if anchor > 1 else m
        total = total + np.outer(point @ k - v, k)
        if period != math.inf and i % period == 0:
            m, total = m - ETA * total, np.zeros_like(m)
        reads.append({"pre": before, "post": m, "anchor": point}[read_at] @ q)
        if i % anchor == 0:
            at_anchor = m
    return m, np.stack(reads)


@pytest.mark.parametrize("read_at", ["pre", "post", "anchor"])
@pytest.mark.parametrize(("period", "anchor"), [(1, 1), (3, 1), (math.inf, 1), (1, 4)])
def test_unroll_is_the_loop_written_by_hand(key, period, anchor, read_at):
    lev = memory(clock=Clock(period=period, anchor=anchor), read_at=read_at)
    start, context = lev.init(key), items(key)
    state, reads = unroll(lev, begin(lev, start), context)
    expected, expected_reads = by_hand(start, context, period, anchor, read_at)
    np.testing.assert_allclose(state.params, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reads, expected_reads, rtol=1e-4, atol=1e-5)
    assert int(state.count) == 9


def test_a_non_parametric_level_is_solved_anew_from_its_past():
    def mean(seen, x_t):
        return jnp.mean(seen.context, where=seen.mask)

    lev = memory(read=mean, init=lambda key: (), clock=Clock(period=0))
    state, reads = unroll(lev, begin(lev, ()), jnp.array([2.0, 4.0, 9.0]))
    np.testing.assert_allclose(reads, [2.0, 3.0, 5.0])
    assert int(state.count) == 3
    with pytest.raises(ValueError, match="use `unroll`"):
        tick(lev, state, jnp.zeros(()))


@pytest.mark.parametrize(("period", "anchor"), [(1, 1), (3, 1), (1, 4)])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_context_may_be_cut_anywhere(key, cut, period, anchor):
    lev = memory(
        clock=Clock(period=period, anchor=anchor), flow=optax.sgd(0.1, momentum=0.9)
    )
    state, context = begin(lev, lev.init(key)), items(key)
    whole, reads = unroll(lev, state, context)
    half, first = unroll(lev, state, jax.tree.map(lambda x: x[:cut], context))
    rest, second = unroll(lev, half, jax.tree.map(lambda x: x[cut:], context))
    np.testing.assert_allclose(jnp.concatenate([first, second]), reads, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), rest, whole)


def outer_loss(lev, start, context):
    _, reads = unroll(lev, begin(lev, start), context)
    return jnp.sum(jnp.sin(reads))


@pytest.mark.parametrize(("period", "anchor"), [(1, 1), (3, 1), (1, 4)])
def test_exact_outer_gradient_by_finite_differences(key, float64, period, anchor):
    lev = memory(clock=Clock(period=period, anchor=anchor))
    start = lev.init(key)
    assert start.dtype == jnp.float64
    check_grads(
        lambda start, context: outer_loss(lev, start, context),
        (start, items(key, 5)),
        order=1,
        modes=["rev"],
        rtol=1e-6,
    )


def test_first_order_takes_updates_as_constants(key, float64):
    lev = memory(gradient="first_order", read_at="post")
    start, context = lev.init(key), items(key)
    gradient = jax.grad(outer_loss, argnums=1)(lev, start, context)
    # d m_t / d m_0 = I, so each read adds cos(read_t) q_t^T.
    _, reads = unroll(lev, begin(lev, start), context)
    np.testing.assert_allclose(gradient, jnp.cos(reads).T @ context[2], rtol=1e-9)
    exact = jax.grad(outer_loss, argnums=1)(
        lev._replace(gradient="exact"), start, context
    )
    assert not np.allclose(gradient, exact, atol=1e-3)


def test_none_leaves_the_initial_state_alone(key):
    lev = memory(gradient="none")
    gradient = jax.grad(outer_loss, argnums=1)(lev, lev.init(key), items(key))
    np.testing.assert_array_equal(gradient, 0.0)


def test_the_flow_is_given_the_item_and_the_inputs(key):
    def update(gradient, state, params=None, *, context, inputs):
        return -ETA * jnp.outer(context[1], inputs), state

    flow = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    lev = memory(flow=flow, inputs=lambda m, item: 2 * item[0])
    context = items(key, 1)
    state, _ = unroll(lev, begin(lev, jnp.zeros((2, 3))), context)
    expected = -ETA * jnp.outer(context[1][0], 2 * context[0][0])
    np.testing.assert_allclose(state.params, expected, rtol=1e-6)


def test_a_second_call_does_not_compile_again(key):
    lev = memory(clock=Clock(period=3), flow=optax.sgd(0.1, momentum=0.9))
    live = jax.jit(lambda state, context: unroll(lev, state, context))
    state, _ = live(begin(lev, lev.init(key)), items(key))
    live(state, items(jax.random.key(1)))
    assert live._cache_size() == 1


# hope_update --------------------------------------------------------------------------


def slow_and_fast(**changes):
    """Slow: an embedding and the fast memory's start. Fast: the memory."""
    fast = memory(read_at="post")

    def live(params, state, x):
        context = jax.tree.map(lambda leaf: leaf * params["scale"], x)
        if state is None:
            state = begin(fast, params["start"])
        state, reads = unroll(fast, state, context)
        return reads, state

    def objective(params, seen):
        x, read = seen
        return jnp.mean((read - x[1]) ** 2) + jnp.sum(params["scale"] ** 2)

    slow = Level(
        init=lambda key: {"scale": jnp.ones(()), "start": fast.init(key)},
        read=lambda params, x: (),
        objective=objective,
        flow=optax.sgd(0.1),
    )._replace(**changes)
    return slow, live


def test_hope_update_hands_the_slow_level_the_gradient_of_the_whole_life(key):
    slow, live = slow_and_fast()
    params, x = slow.init(key), items(key)

    def direct(params):
        return slow.objective(params, (x, live(params, None, x)[0]))

    out = hope_update(x, Slow(slow, begin(slow, params)), Fast(live))
    loss, gradient = jax.value_and_grad(direct)(params)
    np.testing.assert_allclose(out.loss, loss, rtol=1e-6)
    for name in params:
        np.testing.assert_allclose(out.gradient[name], gradient[name], rtol=1e-4)
        np.testing.assert_allclose(
            out.slow.state.params[name],
            params[name] - 0.1 * gradient[name],
            rtol=1e-4,
            atol=1e-6,
        )
    assert float(jnp.abs(gradient["start"]).max()) > 1e-3
    np.testing.assert_allclose(out.fast.state.params, live(params, None, x)[1].params)


def test_hope_update_keeps_the_slow_clock(key):
    slow, live = slow_and_fast(clock=Clock(period=2))
    start = begin(slow, slow.init(key))
    one = hope_update(items(key), Slow(slow, start), Fast(live))
    two = hope_update(items(jax.random.key(1)), one.slow, Fast(live))
    jax.tree.map(np.testing.assert_array_equal, one.slow.state.params, start.params)
    jax.tree.map(
        lambda p, new, a, b: np.testing.assert_allclose(
            new, p - 0.1 * (a + b), rtol=1e-4, atol=1e-6
        ),
        start.params,
        two.slow.state.params,
        one.gradient,
        two.gradient,
    )


def test_hope_update_takes_gradients_at_the_anchor(key):
    slow, live = slow_and_fast(clock=Clock(anchor=2))
    one = hope_update(items(key), Slow(slow, begin(slow, slow.init(key))), Fast(live))
    x = items(jax.random.key(1))
    two = hope_update(x, one.slow, Fast(live))
    gradient = jax.grad(lambda p: slow.objective(p, (x, live(p, None, x)[0])))(
        slow.init(key)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        two.gradient,
        gradient,
    )


def test_hope_update_takes_parameters_of_several_types_and_hands_on_inputs(key):
    seen = {}

    def update(gradient, state, params=None, *, inputs, **extra):
        seen["inputs"] = inputs
        return jax.tree.map(jnp.zeros_like, gradient), state

    flow = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    slow, live = slow_and_fast(
        flow=flow, inputs=lambda params, seen: {"x": seen[0][0][0], "read": seen[1]}
    )
    params = slow.init(key) | {"unused": jnp.ones((2,), jnp.bfloat16)}
    x = items(key)
    out = hope_update(x, Slow(slow, begin(slow, params)), Fast(live))
    assert out.gradient["unused"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(seen["inputs"]["x"], x[0][0])
    np.testing.assert_array_equal(seen["inputs"]["read"], out.read)


# Clock --------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [-1, 1.5, math.nan])
def test_clock_refuses_periods_that_are_none(period):
    with pytest.raises(ValueError, match=f"got {period}"):
        Clock(period=period)


def test_clock_refuses_anchors_that_are_none():
    with pytest.raises(ValueError, match="anchor must be at least 1 item, got 0"):
        Clock(anchor=0)
    with pytest.raises(ValueError, match=r"anchor \(4\) needs period 1, got period 2"):
        Clock(period=2, anchor=4)


def test_clock_in_numbers():
    assert [i for i in range(1, 8) if Clock(period=3).moves(i)] == [3, 6]
    assert not any(Clock(period=p).moves(i) for p in (0, math.inf) for i in (1, 2))
    assert Clock(period=4).frequency() == 0.25
    assert Clock(period=math.inf).frequency() == 0.0
    assert Clock(period=0).frequency() == math.inf


@pytest.mark.parametrize("module", [clock, level])
def test_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0


def test_the_core_is_the_package_root():
    assert hope_jax.unroll is unroll and hope_jax.Clock is Clock
    assert all(hasattr(hope_jax, name) for name in hope_jax.__all__)


def test_inputs_do_not_add_up_over_a_period():
    level = Level(
        init=lambda key: jnp.zeros(()),
        read=lambda m, x: m,
        objective=lambda m, x: 0.5 * (m - x) ** 2,
        flow=optax.sgd(1.0),
        clock=Clock(period=2),
        inputs=lambda m, x: x,
    )
    with pytest.raises(ValueError, match=r"period \(2\) must be 1 .* inputs"):
        tick(level, begin(level, jnp.zeros(())), jnp.zeros(()))


def test_parameters_and_states_are_told_apart():
    level = Level(
        init=lambda key: jnp.zeros(2),
        read=lambda m, x: m,
        objective=lambda m, x: jnp.sum((m - x) ** 2),
        flow=optax.sgd(0.1),
    )
    state, x = begin(level, jnp.zeros(2)), jnp.ones((3, 2))
    with pytest.raises(
        ValueError, match="params is a LevelState, where a level stands"
    ):
        begin(level, state)
    for live, items in ((unroll, x), (tick, x[0])):
        with pytest.raises(ValueError, match="state must be a LevelState, got dict"):
            live(level, {"m": jnp.zeros(2)}, items)


def test_a_context_of_another_type_is_named(float64):
    level = Level(
        init=lambda key: jnp.zeros((), jnp.float32),
        read=lambda m, x: m,
        objective=lambda m, x: 0.5 * (m - x) ** 2,
        flow=optax.GradientTransformation(
            lambda m: jnp.zeros((), jnp.float32),
            lambda g, s, p: (-g, s.astype(jnp.float64)),
        ),
    )
    start = begin(level, jnp.zeros((), jnp.float32))
    with pytest.raises(ValueError, match=r"state.opt is float32, but .* float64: give"):
        unroll(level, start, jnp.ones(3, jnp.float32))
