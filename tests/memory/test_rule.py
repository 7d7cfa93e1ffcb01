"""Learning rules of a memory, by numbers worked out by hand for two tokens each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.memory import rule
from tests import compare

close = compare.within_both(1e-5)


class Token(NamedTuple):
    k: jax.Array = jnp.array([1.0, 0.0])
    v: jax.Array = jnp.array([2.0, 4.0])
    eta: jax.Array = jnp.array(0.5)
    alpha: jax.Array = jnp.array(1.0)
    theta: jax.Array = jnp.array(0.5)


ZERO = {"w": jnp.zeros((2, 2))}
GRADIENTS = [
    {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])},
    {"w": jnp.array([[2.0, 0.0], [0.0, -2.0]])},
]


def walk(flow, params, gradients, tokens=None, **extra):
    """The weights after each gradient, as `core.level` applies the updates."""
    flow = optax.with_extra_args_support(flow)
    state, path = flow.init(params), []
    for gradient, token in zip(gradients, tokens or [Token()] * 2, strict=True):
        update, state = flow.update(gradient, state, params, context=token, **extra)
        params = optax.apply_updates(params, update)
        path.append(params["w"])
    return path


def nearest_orthogonal(s):
    left, _, right = jnp.linalg.svd(s, full_matrices=False)
    return left @ right


@pytest.mark.parametrize(
    "flow, first, second",
    [
        # -0.5 g
        (rule.descend(), [-0.5, -1.0], [-1.5, 0.0]),
        # S = -0.5 g, then 0.5 S - 0.5 g = (-1.25, 0.5)
        (optax.chain(rule.descend(), rule.inertia()), [-0.5, -1.0], [-1.75, -0.5]),
        # 0.5 S + u = (-0.75, -1.5), then 0.5 (-1.25, 0.5) + (-1, 1)
        (optax.chain(rule.descend(), rule.nesterov()), [-0.75, -1.5], [-2.375, -0.25]),
        # S = -(1, 2): signs; then 0.5 S - g = (-2.5, 1): signs
        (rule.muon(nearest_orthogonal), [-0.5, -0.5], [-1.0, 0.0]),
        (rule.scaled(optax.sgd(1.0)), [-0.5, -1.0], [-1.5, 0.0]),
        (rule.from_optax("optax.sign_sgd"), [-0.5, -0.5], [-1.0, 0.0]),
    ],
    ids=["descend", "inertia", "nesterov", "muon", "scaled", "from_optax"],
)
def test_two_steps(flow, first, second):
    path = walk(flow, ZERO, GRADIENTS)
    close(path[0], np.diag(first))
    close(path[1], np.diag(second))


def test_nesterov_is_the_one_of_optax():
    """At constant rates: optax's trace keeps gradients, ours steps."""
    ours = walk(optax.chain(rule.descend(), rule.nesterov()), ZERO, GRADIENTS)
    theirs = walk(optax.sgd(0.5, momentum=0.5, nesterov=True), ZERO, GRADIENTS)
    close(ours, theirs)


def test_adam_by_hand():
    """Step 1 is the sign. Then m = 0.5 m + 0.5 g, v = 0.75 v + 0.25 g^2, corrected."""
    path = walk(rule.adam(b1=0.5, b2=0.75), ZERO, GRADIENTS)
    close(path[0], np.diag([-0.5, -0.5]))
    m = np.array([0.25 * 1 + 0.5 * 2, 0.25 * 2 - 0.5 * 2]) / (1 - 0.25)
    v = np.array([0.1875 * 1 + 0.25 * 4, 0.1875 * 4 + 0.25 * 4]) / (1 - 0.75**2)
    close(path[1], np.diag(-0.5 - 0.5 * m / np.sqrt(v)))


def test_the_first_step_of_adam_does_not_see_the_size_of_the_gradient():
    tiny = {"w": 1e-4 * jnp.array([[1.0, -7.0], [0.0, 300.0]])}
    path = walk(rule.adam(), ZERO, [tiny], [Token()])
    close(path[0], [[-0.5, 0.5], [0.0, -0.5]], 1e-3)


@pytest.mark.parametrize("name", ["ours", "adam", "adamw", "adabelief", "yogi"])
def test_the_level_above_can_differentiate_a_step_without_gradient(name):
    flow = rule.adam() if name == "ours" else rule.from_optax(name)

    def moved(gradient):
        return walk(flow, ZERO, [{"w": gradient}], [Token()])[0].sum()

    assert bool(jnp.isfinite(jax.grad(moved)(jnp.zeros((2, 2)))).all())


def test_a_rule_of_optax_takes_each_tokens_own_rate():
    tokens = [Token(eta=jnp.array(0.5)), Token(eta=jnp.array(0.0))]
    first, second = walk(rule.from_optax("adam"), ZERO, GRADIENTS, tokens)
    close(first, np.diag([-0.5, -0.5]))
    close(second, first, 0)


def test_a_rule_of_optax_is_given_what_it_asks_for():
    """A transformation that steps along the key and the input of its matrix."""

    def update(updates, state, params=None, *, context, inputs, **extra):
        del params, extra
        return {n: jnp.outer(context.v, inputs[n]) for n in updates}, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    x = {"w": jnp.array([0.0, 1.0])}
    path = walk(rule.scaled(tx), ZERO, GRADIENTS, inputs=x)
    close(path[1], [[0.0, 2.0], [0.0, 4.0]])


@pytest.mark.parametrize(
    "name", ["adafactor", "lion", "rmsprop", "contrib.muon", "contrib.prodigy"]
)
def test_rules_of_optax_scan(name):
    """Their states keep type and shape, and a quadratic goes down."""
    flow, start = rule.from_optax(name), {"w": jnp.full((2, 3), 2.0)}

    def step(carry, _):
        params, state = carry
        token = Token(eta=jnp.array(0.1))
        update, state = flow.update(params, state, params, context=token)
        return (optax.apply_updates(params, update), state), ()

    (end, _), _ = jax.lax.scan(step, (start, flow.init(start)), length=10)
    assert float(jnp.abs(end["w"]).max()) < 2.0


@pytest.mark.parametrize(
    "name, message",
    [
        ("optax.adamm", "no optimizer 'adamm' .* Near: adam"),
        ("scale_by_adam", "no optimizer 'scale_by_adam' with a learning_rate"),
        ("contrib.dpsgd", r"optax.contrib.dpsgd needs l2_norm_clip, .* `rule.scaled`"),
        ("lbfgs", "optax.lbfgs cannot be a memory's rule, .*value_fn"),
    ],
)
def test_rules_optax_cannot_give(name, message):
    with pytest.raises(ValueError, match=message):
        rule.from_optax(name)


def test_implicit_by_hand():
    """x = (2, 0): 0.5 / (1 + 0.5 4) = 1/6; what has no input takes 0.5."""
    start = ZERO | {"gain": jnp.zeros(2)}
    gradients = [g | {"gain": jnp.array([1.0, 2.0])} for g in GRADIENTS]
    inputs = {"w": jnp.array([2.0, 0.0])}
    first, second = walk(rule.implicit(), start, gradients, inputs=inputs)
    close(first, np.diag([-1 / 6, -2 / 6]))
    close(second, np.diag([-3 / 6, 0.0]))
    step, _ = rule.implicit().update(
        gradients[0], (), start, context=Token(), inputs=inputs
    )
    close(step["gain"], [-0.5, -1.0])


def test_implicit_descent_minimises_the_proximal_objective():
    """The gradient of |M x - v|^2 / 2 + |M - M0|^2 / (2 eta) is zero where it lands."""
    m0, x, v = jnp.array([[1.0, -2.0], [0.5, 3.0]]), jnp.array([3.0, -1.0]), Token().v

    def loss(m):
        return 0.5 * jnp.sum((m @ x - v) ** 2)

    gradient = {"w": jax.grad(loss)(m0)}
    (m,) = walk(rule.implicit(), {"w": m0}, [gradient], [Token()], inputs={"w": x})
    close(jax.grad(loss)(m) + (m - m0) / 0.5, np.zeros((2, 2)), 1e-4)


def test_newton_by_hand():
    """From zero with ridge 1/2 and rates 1/2: M1 = v / 2 in column 0. Then with alpha
    1/2 and key (0, 1), G = (v / 4, w / 2), H = (1/4, 1/2)."""
    tokens = [
        Token(),
        Token(k=jnp.array([0.0, 1.0]), v=jnp.array([3.0, 1.0]), alpha=jnp.array(0.5)),
    ]
    first, second = walk(rule.newton(0.5), ZERO, GRADIENTS, tokens)
    close(first, [[1.0, 0.0], [2.0, 0.0]])
    close(second, [[0.5 / 0.75, 1.5], [1.0 / 0.75, 0.5]])


def test_newton_is_ridge_regression(key):
    """argmin sum_i w_i |M k_i - v_i|^2 + ridge |M|^2 - 2 ridge a <M, M0>, all at once;
    w_i and a are what decay has left, and a = 1 centres the ridge on M0."""
    k_key, v_key, m_key, alpha_key = jax.random.split(key, 4)
    k = jax.random.normal(k_key, (6, 4))
    v = jax.random.normal(v_key, (6, 3))
    m0 = jax.random.normal(m_key, (3, 4))
    alpha = jax.random.uniform(alpha_key, (6,), minval=0.5)
    eta = jnp.linspace(0.2, 1.0, 6)
    tokens = [Token(k[i], v[i], eta[i], alpha[i]) for i in range(6)]
    path = walk(rule.newton(0.7), {"w": m0}, [{"w": m0}] * 6, tokens)
    close(
        walk(rule.newton(0.7), {"w": m0}, [{}], [Token(k[0], v[0], 0 * eta[0])]), [m0]
    )

    left = np.cumprod(np.array(alpha)[::-1])[::-1]
    weights = np.array(eta) * np.append(left[1:], 1.0)
    # Ordinary least squares on rows of root weight, with the ridge as more rows.
    rows = np.concatenate([np.sqrt(weights)[:, None] * k, np.sqrt(0.7) * np.eye(4)])
    wanted = np.concatenate(
        [np.sqrt(weights)[:, None] * v, np.sqrt(0.7) * left[0] * np.array(m0).T]
    )
    best, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    close(path[-1], best.T, 1e-4)


def test_newton_recalls_every_pair_a_small_ridge_allows(key):
    k = jax.random.normal(key, (3, 4))
    v = jnp.arange(6.0).reshape(3, 2)
    tokens = [Token(k[i], v[i], jnp.array(1.0)) for i in range(3)]
    path = walk(rule.newton(1e-4), {"w": jnp.zeros((2, 4))}, [{}] * 3, tokens)
    close(path[-1] @ k.T, v.T, 1e-2)


def test_newton_needs_a_ridge():
    with pytest.raises(ValueError, match="ridge must be positive, got 0.0"):
        rule.newton(0.0)


def test_erase_by_hand():
    """M - (M r) p' with r = (0, 2), p = r / 8 twice: column 1 halves each time."""
    start = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "gain": jnp.ones(2)}
    nothing = {"w": jnp.zeros((2, 2)), "gain": jnp.zeros(2)}
    flow = rule.erase(lambda token, x: {"w": (x["w"], 0.25 * token.eta * x["w"])})
    inputs = {"w": jnp.array([0.0, 2.0]), "gain": jnp.ones(2)}
    first, second = walk(flow, start, [nothing] * 2, inputs=inputs)
    close(first, [[1.0, 1.0], [3.0, 2.0]])
    close(second, [[1.0, 0.5], [3.0, 1.0]])


def test_newton_schulz_brings_singular_values_near_one(key):
    """Muon's coefficients trade accuracy for speed: 0.6 to 1.3, from 0.02 up."""
    left, _, right = jnp.linalg.svd(jax.random.normal(key, (4, 6)), full_matrices=False)
    x = left @ jnp.diag(jnp.array([1.0, 0.5, 0.1, 0.02])) @ right
    near = rule.newton_schulz(x)
    sizes = jnp.linalg.svd(near, compute_uv=False)
    assert 0.6 < float(sizes.min()) and float(sizes.max()) < 1.3
    turned = left.T @ near @ right.T
    close(turned, jnp.diag(jnp.diag(turned)), 1e-3)


def test_muon_is_the_steepest_step_and_leaves_vectors_alone(key):
    """Whatever the size and spectrum of the gradient, singular values are eta."""
    gradient = {"w": jax.random.normal(key, (3, 4)), "gain": jnp.array([1.0, -2.0])}
    flow = rule.muon(nearest_orthogonal)
    start = jax.tree.map(jnp.zeros_like, gradient)
    for size in (1e-3, 1.0, 1e3):
        sized = jax.tree.map(lambda g, size=size: size * g, gradient)
        step, _ = flow.update(sized, flow.init(start), start, context=Token())
        close(jnp.linalg.svd(step["w"], compute_uv=False), [0.5] * 3)
        assert float(jnp.vdot(step["w"], gradient["w"])) < 0
        close(step["gain"], -0.5 * sized["gain"])
