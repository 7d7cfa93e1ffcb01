"""One test an equation of arXiv:2512.24695: memories and continuum memory.

The formulas are written out in NumPy; what they are compared with is named in a line
`Implements: module.function`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hope_jax.core.clock import Clock
from hope_jax.core.level import Collected, Level, begin, unroll
from hope_jax.core.transfer import backprop, initialise
from hope_jax.kernels.select import memory_scan
from hope_jax.memory.compose import MemoryConfig, Tokens, memory_level
from hope_jax.memory.state import begin_memory
from hope_jax.models import cms, lm
from hope_jax.models.block import Block
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.attention import AttentionConfig
from tests import compare

close = compare.within(1e-4, 1e-5)

T, K = 4, 3


def some_tokens(seed=0):
    """Tokens of unit keys, as a memory reads them."""
    rng = np.random.default_rng(seed)
    k, v, q = rng.normal(size=(3, T, K))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    eta, alpha = rng.uniform(0.2, 0.9, size=(2, T))
    fields = (k, v, q, eta, alpha, np.zeros(T))
    return Tokens(*(jnp.asarray(a, jnp.float32) for a in fields))


def test_equation_64_hebbian_memory():
    """M_t = alpha_t M_{t-1} + eta_t v_t k_t^T, from the objective -<M k, v>.

    Implements: hope_jax.memory.compose.memory_level
    """
    hebbian = memory_level(
        MemoryConfig(
            architecture="linear",
            bias="dot",
            rule="gd",
            dgd="none",
            gradient="exact",
        ),
        K,
    )
    tokens = some_tokens()
    end, reads = unroll(hebbian, begin(hebbian, {"w": jnp.eye(K)}), tokens)
    k, v, q, eta, alpha, _ = map(np.asarray, tokens[:6])
    m = np.eye(K)
    for t in range(T):
        m = alpha[t] * m + eta[t] * np.outer(v[t], k[t])
        close(reads[t], m @ q[t])
    close(end.params["w"], m)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_equation_65_delta_rule(impl):
    """M_t = M_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T, from |M k - v|^2.

    Implements: hope_jax.kernels.select.memory_scan
    """
    delta = MemoryConfig(
        architecture="linear",
        bias="l2",
        rule="gd",
        dgd="none",
        retention="none",
        gradient="exact",
        chunk=3,
    )
    tokens = some_tokens()
    start = begin_memory(delta, {"w": jnp.eye(K)})
    end, reads = memory_scan(delta, start, tokens, impl=impl)
    k, v, q, eta, _, _ = map(np.asarray, tokens[:6])
    m = np.eye(K)
    for t in range(T):
        m = m @ (np.eye(K) - eta[t] * np.outer(k[t], k[t]))
        m = m + eta[t] * np.outer(v[t], k[t])
        close(reads[t], m @ q[t])
    close(end.weights["w"], m)


def model(*levels, **options):
    """A language model of one block whose mixer is attention."""
    changes = dict(rule="sgd", reduction="sum", clip=1e9, pull=0.0, hidden=4) | options
    return ModelConfig(
        vocab=5,
        d_model=4,
        layers=1,
        heads=1,
        mixer=AttentionConfig(context=8),
        cms=CMSConfig(levels=levels, **changes),
    )


def silu(x):
    return x / (1 + np.exp(-x))


def link(level, x):
    """x + MLP(norm(x)), one block of the chain, from its parameters."""
    h = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    h = h * np.asarray(level.norm.scale[...])
    gate, up, down = (
        np.asarray(w.kernel[...])
        for w in (level.mlp.gate, level.mlp.up, level.mlp.down)
    )
    return x + (silu(h @ gate) * (h @ up)) @ down


@pytest.mark.parametrize("order", ["fast_to_slow", "slow_to_fast"])
def test_equation_70_a_chain_of_mlps(key, order):
    """y_t = MLP_fk(MLP_fk-1(... MLP_f1(x_t))); the blocks are pre-norm and residual.

    Implements: hope_jax.models.block.Block
    """
    levels = [CMSLevel(period=p) for p in (8, 16, math.inf)]
    block = Block(model(*levels, order=order), rngs=nnx.Rngs(0))
    block.mixer.out.kernel[...] = jnp.zeros_like(block.mixer.out.kernel[...])
    x = jax.random.normal(key, (2, 3, 4))
    y, _ = block(x)
    expected = np.asarray(x)
    for level in block.levels if order == "fast_to_slow" else block.levels[::-1]:
        expected = link(level, expected)
    close(y, expected)


def test_equation_71_a_level_moves_at_the_end_of_its_period():
    """theta_{i+1} = theta_i - sum over t = i - C + 1 .. i of eta f(theta; x_t).

    Implements: hope_jax.models.cms.move
    """
    chain = CMSConfig(
        levels=(CMSLevel(period=3),), rule="sgd", reduction="sum", clip=1e9, pull=0.0
    )
    (config,) = chain.whole
    start = {"w": jnp.zeros((2,))}
    weights = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}  # two rows
    gradients = np.arange(12.0).reshape(3, 2, 2)  # C = 3 tokens of each
    level = cms.begin_level(config, weights, axis=0)
    for g in gradients:
        total = {"w": level.learned.gradient["w"] + jnp.asarray(g, jnp.float32)}
        level = level._replace(learned=Collected(total, None))
    rate = jnp.array(0.1)
    moved, level = cms.move(chain, config, rate, start, weights, level, axis=0)
    close(moved["w"], np.asarray(weights["w"]) - 0.1 * gradients.sum(axis=0))
    np.testing.assert_array_equal(level.learned.gradient["w"], 0.0)


def test_equation_71_sums_exactly_one_period_of_the_task_loss(key):
    """C terms, not C + 1 as printed, none of which has seen the move.

    Implements: hope_jax.models.lm.apply
    """
    period, rate = 3, 0.2
    config = model(CMSLevel(period=period, rate=rate), CMSLevel(period=math.inf))
    graphdef, params = lm.build(config, key)
    tokens = jax.random.randint(key, (1, 2 * period + 1), 0, config.vocab)
    read = jax.jit(lambda p, x, s: lm.apply(graphdef, p, x, s, aligned=False))
    start = lm.initial_state(graphdef, params, 1)
    _, before = read(params, tokens[:, :period], start)  # the last label is unknown
    _, after = read(params, tokens[:, period : period + 1], before)
    _, later = read(params, tokens[:, period + 1 : 2 * period], after)

    def part(tree):
        return tree["blocks"]["levels"][0]["mlp"]

    def loss(params):
        logits, _ = lm.apply(graphdef, params, tokens[:, :period], learn=False)
        return jnp.sum(lm.next_token_loss(logits, tokens[:, 1 : period + 1]))

    level = part(params)
    gradient = part(jax.grad(loss)(params))
    expected = jax.tree.map(lambda w, g: w - rate * g, level, gradient)
    rows = lambda tree: jax.tree.map(lambda w: w[None], tree)  # noqa: E731
    fast = lambda state: state.blocks.fast[0]  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, fast(before), rows(level))
    close(fast(after), rows(expected))
    jax.tree.map(np.testing.assert_array_equal, fast(later), fast(after))


def regression():
    """w x against y, by gradient descent: a level whose whole life is one formula."""
    eta = 0.1

    def loss(w, item):
        return 0.5 * (w * item[0] - item[1]) ** 2

    fast = Level(
        init=lambda key: jnp.zeros(()),
        read=lambda w, item: w * item[0],
        objective=loss,
        flow=optax.sgd(eta),
    )

    def by_hand(start, x, y):
        """Where `start` leads, and its derivative in `start`."""
        w, slope = start, 1.0
        for x_t, y_t in zip(x, y, strict=True):
            w, slope = w - eta * (w * x_t - y_t) * x_t, slope * (1 - eta * x_t**2)
        return w, slope

    return fast, loss, by_hand


def test_equation_72_nested_a_level_learns_where_the_next_one_starts():
    """theta_0 of level s + 1 = argmin_Phi E l(Theta, T; Phi), learned by level s.

    The faster level starts anew from Phi in every window of the slower one.

    Implements: hope_jax.core.transfer.initialise
    """
    fast, loss, by_hand = regression()
    slow = Level(
        init=lambda key: jnp.zeros(()),
        read=lambda phi, task: phi,
        objective=initialise(fast, loss),
        flow=optax.sgd(0.5),
    )
    rng = np.random.default_rng(0)
    x, y, query, target = (
        rng.normal(size=shape).astype("f") for shape in [(2, 3), (2, 3), 2, 2]
    )
    windows = (
        (jnp.asarray(x), jnp.asarray(y)),
        (jnp.asarray(query), jnp.asarray(target)),
    )
    phi = 0.7
    end, _ = unroll(slow, begin(slow, jnp.array(phi)), windows)
    for x_w, y_w, q, z in zip(x, y, query, target, strict=True):
        w, slope = by_hand(phi, x_w, y_w)
        phi = phi - 0.5 * slope * (w * q - z) * q
    close(end.params, phi)


def test_equation_73_sequential_every_start_is_learned_at_the_lowest_frequency(key):
    """theta_0 of every level = argmin_Phi E l(Theta, T; Phi), T a whole sequence.

    The loss of the sequence is differentiated through every move of both fast levels:
    its slope along a direction is that of finite differences, and is not the slope that
    leaves the moves out.

    Implements: hope_jax.models.lm.apply
    """
    levels = CMSLevel(period=2, rate=0.4), CMSLevel(period=4, rate=0.4)
    tokens = jax.random.randint(key, (2, 9), 0, 5)

    def slopes(gradient):
        config = model(*levels, gradient=gradient, hidden=3)
        graphdef, params = lm.build(config, key)

        @jax.jit
        def loss(params):
            logits, _ = lm.apply(
                graphdef, params, tokens[:, :-1], labels=tokens[:, 1:], aligned=True
            )
            return jnp.mean(lm.next_token_loss(logits, tokens[:, 1:]))

        def along(direction, h):
            return loss(jax.tree.map(lambda w, d: w + h * d, params, direction))

        slow = jax.grad(loss)(params)
        for which in (0, 1):
            direction = jax.tree.map(jnp.zeros_like, params)
            mlp = direction["blocks"]["levels"][which]["mlp"]
            for w in jax.tree.leaves(mlp, is_leaf=lambda w: isinstance(w, nnx.Param)):
                w[...] = jax.random.normal(jax.random.key(w.size), w.shape)
            products = jax.tree.map(jnp.vdot, slow, direction)
            h = 5e-3
            numeric = (along(direction, h) - along(direction, -h)) / (2 * h)
            yield float(sum(jax.tree.leaves(products))), float(numeric)

    for ours, numeric in slopes("exact"):
        assert abs(numeric) > 1e-3
        assert abs(ours - numeric) < 0.02 * abs(numeric) + 2e-4, (ours, numeric)
    for ours, numeric in slopes("first_order"):
        assert ours != 0.0
        assert abs(ours - numeric) > 0.05 * abs(numeric), (ours, numeric)


def test_equation_74_independent_levels_are_aggregated():
    """y_t = Agg(MLP_fk(x_t), ..., MLP_f1(x_t)), a weighted sum; each on its own clock.

    Implements: hope_jax.core.transfer.backprop
    """
    eta, mix = 0.1, np.array([0.7, 0.3], "f")
    empty = lambda key: ()  # noqa: E731
    levels = {
        name: Level(empty, None, None, optax.sgd(eta), Clock(period=period))
        for name, period in (("fast", 1), ("slow", 2))
    }
    rng = np.random.default_rng(0)
    start = {n: rng.normal(size=(2, 3)).astype("f") for n in levels}
    x, target = rng.normal(size=(4, 3)).astype("f"), rng.normal(size=(4, 2)).astype("f")

    def objective(w, item):
        x_t, target_t = item
        y = mix[0] * jnp.tanh(w["fast"] @ x_t) + mix[1] * jnp.tanh(w["slow"] @ x_t)
        return 0.5 * jnp.sum((y - target_t) ** 2), y

    states = {n: begin(levels[n], jnp.asarray(w)) for n, w in start.items()}
    states, (_, y) = jax.lax.scan(
        lambda s, item: backprop(levels, s, objective, item), states, (x, target)
    )

    fast, slow, held = start["fast"], start["slow"], np.zeros((2, 3))
    for t in range(4):
        h_fast, h_slow = np.tanh(fast @ x[t]), np.tanh(slow @ x[t])
        expected = mix[0] * h_fast + mix[1] * h_slow
        close(y[t], expected)
        error = expected - target[t]
        held = held + np.outer(mix[1] * error * (1 - h_slow**2), x[t])
        fast = fast - eta * np.outer(mix[0] * error * (1 - h_fast**2), x[t])
        if t % 2 == 1:
            slow, held = slow - eta * held, np.zeros((2, 3))
    close(states["fast"].params, fast)
    close(states["slow"].params, slow)
