"""Retentions, by numbers worked out by hand and by what theory promises of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.memory import retention
from tests import compare

close = compare.within_both(1e-5)


class Token(NamedTuple):
    alpha: jax.Array = jnp.array(0.5)
    eta: jax.Array = jnp.array(0.25)
    v: jax.Array = jnp.array([1.0, 2.0])


START = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
NOTHING = {"w": jnp.zeros((2, 2))}
STEP = {"w": jnp.array([[1.0, 0.0], [0.0, -1.0]])}


def walk(flow, params, updates, tokens):
    """The weights after each of `updates`, as `core.level` applies them."""
    state, path = flow.init(params), []
    for update, token in zip(updates, tokens, strict=True):
        update, state = flow.update(update, state, params, context=token)
        params = optax.apply_updates(params, update)
        path.append(params["w"])
    return path


def test_decay_by_hand():
    first, second = walk(
        retention.decay(), START, [STEP, NOTHING], [Token(), Token(jnp.array(0.1))]
    )
    close(first, [[1.5, 1.0], [1.5, 1.0]])
    close(second, [[0.15, 0.1], [0.15, 0.1]])


def test_decay_of_each_channel_of_the_keys():
    alpha = jnp.array([0.5, 0.25])
    first, second = walk(retention.decay(), START, [STEP, NOTHING], [Token(alpha)] * 2)
    close(first, [[1.5, 0.5], [1.5, 0.0]])
    close(second, [[0.75, 0.125], [0.75, 0.0]])
    equal = walk(retention.decay(), START, [STEP], [Token(jnp.array([0.5, 0.5]))])
    close(equal[0], walk(retention.decay(), START, [STEP], [Token()])[0], 0)


def test_decay_needs_the_width_of_the_keys():
    with pytest.raises(ValueError, match=r"alpha \(3,\) must be a scalar .* \(2, 2\)"):
        walk(retention.decay(), START, [STEP], [Token(jnp.ones(3))])


def test_oja_by_hand():
    """v'M = (7, 10); then v'M = (-1.75, -2.5)."""
    first, second = walk(retention.oja(), START, [NOTHING] * 2, [Token()] * 2)
    close(first, [[-0.75, -0.5], [-0.5, -1.0]])
    close(second, [[-0.3125, 0.125], [0.375, 0.25]])


def test_oja_keeps_a_unit_vector_of_the_key():
    """With v = M k, one row: the row that Oja's rule converges to has norm 1."""
    rule, params = retention.oja(), {"w": jnp.array([[0.3, 0.1]])}
    k = jnp.array([0.6, 0.8])
    for _ in range(200):
        v = params["w"] @ k
        write = {"w": 0.2 * jnp.outer(v, k)}
        context = Token(eta=jnp.array(0.2), v=v)
        update, _ = rule.update(write, (), params, context=context)
        params = optax.apply_updates(params, update)
    close(params["w"][0], k)


LINKS = {
    "lq2": retention.lq(2.0, epsilon=0.0),
    "lq3": retention.lq(3.0, epsilon=0.0),
    "lq4": retention.lq(4.0, epsilon=0.0),
    "simplex": retention.simplex(2.0),
    "hypentropy": retention.hypentropy(0.5),
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_goes_there_and_back(name):
    link = LINKS[name]
    w = link.primal(jnp.array([[0.3, -0.7], [1.1, 0.2]]))
    close(link.primal(link.dual(w)), w)


def test_mirror_by_hand():
    """A link W = 2A: A0 = W0 / 2, A1 = 0.5 A0 + u, A2 = 0.5 A1."""
    double = retention.Link(primal=lambda a: 2.0 * a, dual=lambda w: 0.5 * w)
    first, second = walk(
        retention.mirror(double), START, [STEP, NOTHING], [Token()] * 2
    )
    close(first, [[2.5, 1.0], [1.5, 0.0]])
    close(second, [[1.25, 0.5], [0.75, 0.0]])


def test_mirror_decays_each_channel_of_the_keys():
    same = retention.Link(primal=lambda a: a, dual=lambda w: w)
    alpha = jnp.array([0.5, 0.25])
    mirrored = walk(retention.mirror(same), START, [STEP] * 2, [Token(alpha)] * 2)
    decayed = walk(retention.decay(), START, [STEP] * 2, [Token(alpha)] * 2)
    close(mirrored, decayed)


def test_lq_by_hand():
    """Four ones: W = A / 4^(2/4). Then A = 0.5 + 2.5 and W = 3 / (4 81)^(2/4)."""
    link = retention.lq(4.0)
    close(link.dual(jnp.full((2, 2), 0.5)), np.ones((2, 2)))
    ones = {"w": jnp.ones((2, 2))}
    updates = [{"w": jnp.full((2, 2), 0.0)}, {"w": jnp.full((2, 2), 2.5)}]
    first, second = walk(
        retention.mirror(link),
        {"w": 0.5 * ones["w"]},
        updates,
        [Token(alpha=jnp.array(1.0)), Token()],
    )
    close(first, np.full((2, 2), 0.5))
    close(second, np.full((2, 2), 1 / 6))


@pytest.mark.parametrize("power", [2.0, 2.5, 3.0, 4.0, 5.0])
def test_norms_of_lq(power):
    """|W| = |A|^(3-q), and the dual goes back where it can."""
    a = jnp.array([[0.5, -2.0], [1.0, 3.0]])

    def norm(x):
        return np.sum(np.abs(x) ** power) ** (1 / power)

    link = retention.lq(power)
    w = link.primal(a)
    close(norm(w), norm(a) ** (3 - power), 1e-4)
    close(link.dual(w), w if power == 3 else a, 1e-3)
    close(link.primal(link.dual(w)), w, 1e-3)


@pytest.mark.parametrize("power", [2.0, 2.5, 3.0, 4.0])
def test_lq_at_zero(power):
    link = retention.lq(power)
    zero = jnp.zeros((2, 2))
    for fn in link:
        value, slope = jax.vjp(fn, zero)
        close(value, zero)
        assert bool(jnp.isfinite(slope(jnp.ones((2, 2)))[0]).all())


def test_lq_of_four_is_bounded():
    sizes = jnp.logspace(-6, 3, 200)
    norms = [float(retention.lq(4.0).primal(jnp.full((1, 1), s))[0, 0]) for s in sizes]
    assert 23.0 < max(norms) < 0.71 / 0.03


def test_simplex_by_hand():
    """Rows (1/4, 3/4), (1/2, 1/2); alpha 1 and a step log 3 or log 2 on one entry."""
    start = {"w": jnp.array([[0.25, 0.75], [0.5, 0.5]])}
    update = {"w": jnp.log(jnp.array([[3.0, 1.0], [1.0, 2.0]]))}
    one = Token(alpha=jnp.array(1.0))
    path = walk(retention.mirror(retention.simplex()), start, [update] * 2, [one] * 2)
    close(path[0], [[0.5, 0.5], [1 / 3, 2 / 3]])
    close(path[1], [[0.75, 0.25], [0.2, 0.8]])


def some_updates(key, count, scale=1.0):
    shape = (count, 3, 4)
    return [{"w": u} for u in scale * jax.random.normal(key, shape)]


def test_simplex_is_equation_27_of_miras(key):
    """W = c softmax(alpha log W - eta grad), told from the weights alone."""
    w = 2.0 * jax.nn.softmax(jnp.arange(12.0).reshape(3, 4) % 5)
    updates, token = some_updates(key, 6), Token(alpha=jnp.array(0.8))
    path = walk(
        retention.mirror(retention.simplex(2.0)), {"w": w}, updates, [token] * 6
    )
    for update, moved in zip(updates, path, strict=True):
        w = 2.0 * jax.nn.softmax(0.8 * jnp.log(w) + update["w"], axis=-1)
        close(moved, w, 1e-4)


def test_simplex_keeps_its_rows_whole(key):
    flow = retention.mirror(retention.simplex(3.0))
    params = {"w": jnp.full((3, 4), 0.75)}

    def step(carry, update):
        params, state = carry
        token = Token(alpha=jnp.array(0.99))
        update, state = flow.update({"w": update}, state, params, context=token)
        params = optax.apply_updates(params, update)
        return (params, state), params["w"]

    updates = jax.random.normal(key, (2000, 3, 4))
    _, path = jax.lax.scan(step, (params, flow.init(params)), updates)
    assert float(path.min()) >= 0.0
    assert float(path.max()) > 2.0  # it does go to the corners
    close(path.sum(-1), np.full((2000, 3), 3.0), 1e-5)


def test_simplex_moves_a_start_onto_itself():
    w = retention.simplex(2.0)
    close(w.primal(w.dual(jnp.zeros((1, 4)))), np.full((1, 4), 0.5))
    close(w.primal(w.dual(jnp.array([[-1.0, 2.0]]))), [[0.0, 2.0]])


def test_hypentropy_by_hand():
    """W = sinh(A): sinh(log 2) = 3/4, sinh(log 4) = 15/8, sinh(-log 2) = -3/4."""
    update = {"w": jnp.array([[np.log(2.0), -np.log(2.0)]])}
    one = Token(alpha=jnp.array(1.0))
    zero = {"w": jnp.zeros((1, 2))}
    link = retention.hypentropy(1.0)
    path = walk(retention.mirror(link), zero, [update] * 2, [one] * 2)
    close(path[0], [[0.75, -0.75]])
    close(path[1], [[1.875, -1.875]])


def test_hypentropy_of_a_large_beta_is_plain_descent(key):
    beta = 100.0
    updates, token = some_updates(key, 5, 0.1), Token(alpha=jnp.array(1.0))
    slow = [{"w": u["w"] / beta} for u in updates]
    zero = {"w": jnp.zeros((3, 4))}
    path = walk(retention.mirror(retention.hypentropy(beta)), zero, slow, [token] * 5)
    close(path[-1], sum(u["w"] for u in updates), 1e-4)


def test_hypentropy_never_overflows():
    link = retention.hypentropy(0.5)
    far = link.primal(jnp.array([-1e30, 1e30]))
    close(far / (0.5 * np.sinh(16.0)), [-1.0, 1.0])
    assert bool(jnp.isfinite(jax.grad(lambda a: link.primal(a).sum())(far)).all())


def test_elastic_net_by_hand():
    """Decay by 1/2, a step, then both a half nearer to zero."""
    flow = optax.chain(
        retention.decay(), retention.project(retention.soft_threshold(0.5))
    )
    first, second = walk(flow, START, [STEP, STEP], [Token()] * 2)
    close(first, [[1.0, 0.5], [1.0, 0.5]])  # of [[1.5, 1], [1.5, 1]]
    close(second, [[1.0, 0.0], [0.0, -0.25]])  # of [[1.5, .25], [.5, -.75]]
    assert float(second[0, 1]) == 0.0


def test_soft_threshold_is_the_proximal_step_of_the_absolute_value():
    """argmin_x |x - w|^2 / 2 + 0.7 |x|, by looking everywhere."""
    grid = jnp.linspace(-3, 3, 6001)
    for w in (-2.0, -0.5, 0.0, 0.7, 1.9):
        best = grid[jnp.argmin(0.5 * (grid - w) ** 2 + 0.7 * jnp.abs(grid))]
        close(retention.soft_threshold(0.7)(jnp.array([w])), [best], 1e-3)


def test_clamp_norm_by_hand():
    """A norm of 5 becomes 2.5; one of 1 stays to the bit; zero has a slope."""
    clamp = retention.clamp_norm(2.5)
    close(clamp(jnp.array([[3.0, 0.0], [0.0, -4.0]])), [[1.5, 0.0], [0.0, -2.0]])
    inside = jnp.array([[0.6, 0.0], [0.0, 0.8]])
    close(clamp(inside), inside, 0)
    close(jax.jacobian(clamp)(jnp.zeros(2)), np.eye(2))


def test_projections_wait_for_their_turn():
    """Every third update: the first two pass, and the count begins again."""
    flow = retention.project(retention.clamp_norm(1.0), every=3)
    one = {"w": jnp.array([[1.0, 0.0]])}
    path = walk(flow, {"w": jnp.zeros((1, 2))}, [one] * 7, [Token()] * 7)
    close([w[0, 0] for w in path], [1.0, 2.0, 1.0, 2.0, 3.0, 1.0, 2.0])
    state = flow.init(one)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [jnp.int32]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: retention.lq(1.5), "power .q of lq. must be at least 2, got 1.5"),
        (lambda: retention.simplex(0.0), "scale must be positive, got 0.0"),
        (lambda: retention.hypentropy(-1.0), "beta must be positive, got -1.0"),
        (lambda: retention.soft_threshold(-1.0), "amount must not be negative, got -1"),
        (lambda: retention.clamp_norm(0.0), "bound must be positive, got 0.0"),
        (
            lambda: retention.project(retention.clamp_norm(1.0), every=0),
            "every must be at least 1, got 0",
        ),
    ],
)
def test_retentions_that_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()
