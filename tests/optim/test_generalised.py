"""Memories that learn gradients, and weights that are memories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.core.level import begin, tick, unroll
from hope_jax.memory import architecture
from hope_jax.memory.compose import MemoryConfig, Tokens, memory_level
from hope_jax.optim.dgd import dgd
from hope_jax.optim.from_level import from_level
from hope_jax.optim.generalised import from_memory, ggd, gradient_level, gradient_start

ETA, ALPHA = 0.3, 0.9

LINEAR = MemoryConfig(
    architecture="linear", bias="l2", rule="gd", dgd="none", gradient="exact"
)
MLP = MemoryConfig(architecture="mlp", expansion=2, rule="gd", chunk=1)


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def stream(key, shape, steps=5):
    return jax.random.normal(key, (steps, *shape))


def updates(rule, gradients, start=None):
    """Every update along a stream of gradients, at parameters that stand still."""
    at = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)
    at = at if start is None else start

    def step(state, gradient):
        update, state = rule.update(gradient, state, at)
        return state, update

    return jax.lax.scan(step, rule.init(at), gradients)[1]


# Memories of gradients.


def test_a_linear_memory_of_gradients_by_hand():
    """One row, l2, from M = 0: M = a k k^T after t steps, a <- alpha a + z (1 - a)."""
    rule = from_memory(ETA, LINEAR, inner_rate=0.5, retention=ALPHA)
    g = jnp.array([3.0, 4.0])
    a, expected = 0.0, []
    for _ in range(4):
        a = ALPHA * a + 0.5 * (1 - a)
        expected.append(-ETA * a * np.array(g))
    close(updates(rule, jnp.broadcast_to(g, (4, 2))), jnp.stack(expected))


@pytest.mark.parametrize("dgd_on", ["none", "both"])
def test_rows_teach_the_memory_by_their_mean(key, dgd_on):
    config = MemoryConfig(
        architecture="linear", bias="dot", rule="gd", dgd=dgd_on, gradient="exact"
    )
    g = jax.random.normal(key, (2, 3, 2))
    g = g.at[1, 1].set(0.0)
    rule = from_memory(ETA, config, inner_rate=0.5, retention=ALPHA)
    m, expected = np.zeros((2, 2)), []
    for i, rows in enumerate(np.asarray(g)):
        norm = np.linalg.norm(rows, axis=1, keepdims=True)
        k = rows / np.where(norm > 0, norm, 1.0)
        outer = k.T @ k / (3 - i)  # the zero row does not count
        erased = m @ outer if dgd_on == "both" else 0.0
        m = ALPHA * m + 0.5 * (outer - erased)
        expected.append(-ETA * rows @ m.T)
    close(updates(rule, g), jnp.asarray(np.stack(expected), jnp.float32), 1e-4, 1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LINEAR,
        MLP,
        MemoryConfig(architecture="mlp", expansion=2, rule="momentum", chunk=3),
        MemoryConfig(architecture="vector", bias="dot", rule="gd", gradient="exact"),
    ],
)
def test_one_row_is_one_token_of_the_memory(key, config):
    """With one row the memory lives as it does on a stream of tokens."""
    g = stream(key, (3,), steps=7)
    rule = from_memory(
        1.0, config, inner_rate=0.2, retention=ALPHA, inertia=0.5, seed=3
    )
    norm = jnp.linalg.norm(g, axis=1, keepdims=True)
    k, rate = g / norm, jnp.ones(7)
    tokens = Tokens(
        k=k,
        v=k,
        q=k,
        eta=0.2 * rate,
        alpha=ALPHA * rate,
        theta=(0.5 if config.inertia else 0.0) * rate,
    )
    memory = memory_level(config, 3)
    start = begin(memory, memory.init(jax.random.key(3)))
    _, reads = unroll(memory, start, tokens)
    close(updates(rule, g), -norm * reads, rtol=1e-4, atol=1e-5)


def test_the_level_and_the_transformation_are_one(key):
    g = {"w": stream(key, (2, 3)), "b": stream(key, (2,)), "s": stream(key, ())}
    level = gradient_level(ETA, MLP)
    by_level = from_level(level, gradient_start(MLP))
    close(updates(by_level, g), updates(from_memory(ETA, MLP), g))
    with pytest.raises(ValueError, match="as wide as the leaf"):
        level.init(key)


@pytest.mark.parametrize("config", [LINEAR, MLP])
def test_the_order_of_rows_is_of_no_matter(key, config):
    g = stream(key, (4, 3))
    order = jnp.array([2, 0, 3, 1])
    rule = from_memory(ETA, config)
    close(updates(rule, g[:, order]), updates(rule, g)[:, order], 1e-4, 1e-5)


@pytest.mark.parametrize("config", [LINEAR, MLP])
@pytest.mark.parametrize("scale", [2.0**-66, 2.0**66])
def test_a_memory_sees_directions_and_moves_by_sizes(key, config, scale):
    g = stream(key, (4, 3))
    rule = from_memory(ETA, config)
    close(updates(rule, scale * g) / scale, updates(rule, g), 1e-4, 1e-5)


def test_a_memory_learns_the_coordinates_it_is_given():
    """Equation 40: P(g) becomes the sign of g, here along its direction."""
    rule = from_memory(1.0, LINEAR, inner_rate=1.0, retention=1.0, target=jnp.sign)
    g = jnp.array([3.0, 4.0])
    out = updates(rule, jnp.broadcast_to(g, (3, 2)))
    close(out[-1], -5.0 * jnp.ones(2) / jnp.sqrt(2.0))


CONFIGS = {
    "retention none": {"retention": "none"},
    "lq": {"retention": "lq", "dgd": "none"},
    "kl": {"retention": "kl", "dgd": "none", "architecture": "linear"},
    "bregman": {"retention": "bregman", "dgd": "none"},
    "elastic net": {"retention": "elastic_net", "retention_scale": 1e-3},
    "norm clamp": {"retention": "norm_clamp", "retention_scale": 9.0},
    "huber": {"bias": "huber"},
    "lp": {"bias": "lp"},
    "nesterov": {"rule": "nesterov"},
    "muon": {"rule": "muon"},
    "optax": {"rule": "optax.adam", "dgd": "none"},
    "gated": {"architecture": "gated_mlp"},
    "deep": {"architecture": "deep_mlp", "depth": 3},
    "vector": {"architecture": "vector"},
    "after": {"recall": "after"},
    "features": {"features": "exponential"},
    "polynomial": {"features": "polynomial", "dgd": "none"},
    "norm": {"norm": True, "gradient": "anchored"},
    "input": {"dgd": "input"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_memory_learns_gradients(key, name):
    """It runs, stays finite, and its weights have moved from where they started."""
    base = {"expansion": 2, "chunk": 2, "rule": "gd"}
    config = MemoryConfig(**base | CONFIGS[name])
    rule = from_memory(0.1, config, inner_rate=0.1)
    g = jax.random.normal(key, (2, 3))
    state = rule.init(g)
    step = jax.jit(rule.update)
    first, moved = step(g, state)
    for _ in range(3):
        update, moved = step(g, moved)
    assert bool(jnp.isfinite(update).all()) and float(jnp.abs(update).max()) > 0
    assert not np.allclose(first, update, rtol=1e-4)
    assert step._cache_size() == 1


def test_memories_that_are_no_memory_of_rows_are_refused():
    newton = MemoryConfig(
        architecture="linear", rule="newton", dgd="none", gradient="exact"
    )
    with pytest.raises(ValueError, match="rule='newton' solves for one key at a time"):
        from_memory(0.1, newton)
    with pytest.raises(ValueError, match="window must be 1 .* got 4"):
        from_memory(0.1, MemoryConfig(window=4, dgd="none"))
    with pytest.raises(ValueError, match=r"retention is the part .* got 1.5"):
        from_memory(0.1, LINEAR, retention=1.5)
    rule = from_memory(0.1, LINEAR, target=lambda g: g[:1])
    with pytest.raises(ValueError, match=r"target made shape \(1,\) .* \(2,\)"):
        rule.update(jnp.ones(2), rule.init(jnp.ones(2)))


# Generalised gradient descent: the weights are the memory.


def layer(key, rows=2, columns=3, norm=None, batch=()):
    w_key, x_key, d_key = jax.random.split(key, 3)
    w = jax.random.normal(w_key, (*batch, rows, columns))
    x = jax.random.normal(x_key, (*batch, columns))
    if norm is not None:
        x = norm * x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    delta = jax.random.normal(d_key, (*batch, rows))
    return w, x, delta, delta[..., :, None] * x[..., None, :]


def matrix(**changes):
    base = {"architecture": "linear", "bias": "l2", "rule": "gd", "dgd": "none"}
    return MemoryConfig(**base | {"chunk": 1} | changes)


def one_step(rule, w, x, g, **more):
    return rule.update(g, rule.init(w), w, inputs=x, **more)[0]


def test_ggd_with_the_dot_product_is_gradient_descent(key):
    w, x, _, g = layer(key)
    close(one_step(ggd(ETA, matrix(bias="dot")), w, x, g), -ETA * g)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_ggd_with_l2_is_delta_gradient_descent(key, batch):
    w, x, _, g = layer(key, batch=batch)
    close(one_step(ggd(ETA), w, x, g), one_step(dgd(ETA), w, x, g), 1e-4)
    turned = ggd(ETA, input_axis=-2)
    close(one_step(turned, w.mT, x, g.mT), one_step(ggd(ETA), w, x, g).mT)


@pytest.mark.parametrize(
    "config", [matrix(), matrix(bias="dot", dgd="both")], ids=["l2", "dgd"]
)
def test_its_explicit_form_with_retention(key, config):
    w, x, _, g = layer(key, norm=1.0)
    explicit = dgd(ETA, explicit=True, retention=ALPHA)
    ours = ggd(ETA, config, retention=ALPHA)
    close(one_step(ours, w, x, g), one_step(explicit, w, x, g), 1e-4, 1e-5)


def test_a_robust_bias_bounds_what_one_token_does(key):
    w, x, delta, g = layer(key, norm=1.0)
    rule = ggd(ETA, matrix(bias="huber_norm", threshold=0.5))
    for scale in (1.0, 1e4):
        step = one_step(rule, w, x, scale * g)
        error = w @ x + scale * delta
        np.testing.assert_allclose(jnp.linalg.norm(step), 0.5 * ETA, rtol=1e-4)
        pointed = -0.5 * ETA * error / jnp.linalg.norm(error)
        close(step @ x, pointed, 1e-3, 1e-4)


def test_a_mirror_retention_multiplies_the_weights(key):
    """`kl`: rows of W are softmax(log W − eta grad), entropic descent."""
    w, x, _, g = layer(key)
    w = jax.nn.softmax(w)
    rule = ggd(ETA, matrix(bias="dot", retention="kl"))
    expected = jax.nn.softmax(jnp.log(w) - ETA * g)
    close(w + one_step(rule, w, x, g), expected, 1e-4, 1e-5)


def test_ggd_with_inertia_is_momentum(key):
    w, x, _, g = layer(key)
    rule = ggd(ETA, matrix(bias="dot", rule="momentum"), inertia=0.5)
    state = rule.init(w)
    for expected in (1.0, 1.5, 1.75):
        update, state = rule.update(g, state, w, inputs=x)
        close(update, -ETA * expected * g)
    assert int(state.count) == 3


@pytest.mark.parametrize("rule", ["newton", "optax.adam", "oja"])
def test_ggd_takes_rules_for_one_pair(key, rule):
    changes = {"rule": rule, "gradient": "exact"}
    if rule == "oja":
        changes = {"retention": "oja", "bias": "dot", "gradient": "exact"}
    if rule == "optax.adam":
        changes = {"rule": rule}
    w, x, delta, g = layer(key)
    step = one_step(ggd(ETA, matrix(**changes)), w, x, g)
    if rule == "newton":  # the best matrix for one pair, ridge 1 about W
        gram = jnp.eye(3) + ETA * jnp.outer(x, x)
        close(w + step, (w - ETA * g) @ jnp.linalg.inv(gram), 1e-4, 1e-5)
    elif rule == "oja":
        u = -delta
        close(step, ETA * jnp.outer(u, x - u @ w), 1e-4, 1e-5)
    else:
        signs = -ETA * jnp.sign(jnp.outer(w @ x + delta, x))
        close(step, signs, 1e-3)


def test_leaves_without_inputs_take_gradient_steps(key):
    w, x, _, g = layer(key)
    rule = ggd(ETA)
    at, inputs = {"w": w, "b": jnp.ones(2)}, {"w": x, "b": None}
    step = one_step(rule, at, inputs, {"w": g, "b": jnp.ones(2)})
    close(step["b"], jnp.full(2, -ETA))
    close(step["w"], one_step(rule, w, x, g))


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e18])
def test_ggd_is_finite(key, scale):
    w, x, _, g = layer(key)
    for inputs in (x, scale * x):
        step = one_step(ggd(ETA), w.astype(jnp.bfloat16), inputs, scale * g)
        assert bool(jnp.isfinite(step).all())


def test_ggd_refuses_what_it_cannot_do(key):
    with pytest.raises(ValueError, match="architecture must be 'linear'.*got 'mlp'"):
        ggd(ETA, MemoryConfig())
    with pytest.raises(ValueError, match="chunk must be 1.*got 4"):
        ggd(ETA, matrix(chunk=4))
    with pytest.raises(ValueError, match="input_axis must be .* got 0"):
        ggd(ETA, input_axis=0)
    w, x, _, g = layer(key)
    with pytest.raises(ValueError, match="ggd needs the parameters and `inputs`"):
        ggd(ETA).update(g, ggd(ETA).init(w), w)
    with pytest.raises(ValueError, match=r"shape \(2,\) for a matrix of shape"):
        one_step(ggd(ETA), w, x[:2], g)


def test_a_level_moves_a_gradient_at_a_time(key):
    """`chunk` counts gradients: the anchor is refreshed every third one."""
    config = MemoryConfig(
        architecture="linear", bias="l2", rule="gd", dgd="none", chunk=3
    )
    level = gradient_level(ETA, config, inner_rate=0.1)
    g = stream(key, (2, 3))
    state = begin(level, gradient_start(config)(g[0]))
    for i in range(5):
        state, _ = tick(level, state, g[i])
        assert np.allclose(state.anchor["w"], state.params["w"]) == (i == 2)
    function = architecture.linear(3)
    assert state.params["w"].shape == function.init(key)["w"].shape
