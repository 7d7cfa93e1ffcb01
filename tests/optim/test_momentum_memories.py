"""Momentum with preconditioners, feature maps, non-linear outputs and any memory."""

import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.core.level import begin, tick, unroll
from hope_jax.kernels.newton_schulz import orthogonalise
from hope_jax.memory import architecture
from hope_jax.memory.compose import MemoryConfig, Tokens, memory_level
from hope_jax.optim.dgd import dgd
from hope_jax.optim.from_level import from_level
from hope_jax.optim.momentum import (
    delta_momentum,
    feature_map_momentum,
    from_memory,
    ggd,
    gradient_level,
    gradient_start,
    momentum,
    nonlinear_momentum,
    preconditioned_momentum,
)

ETA, ALPHA = 0.3, 0.9

LINEAR = MemoryConfig(
    architecture="linear", bias="l2", rule="gd", dgd="none", gradient="exact"
)
MLP = MemoryConfig(architecture="mlp", expansion=2, rule="gd", chunk=1)

RULES = {
    "momentum": lambda: momentum(0.1),
    "delta": lambda: delta_momentum(0.1),
    "delta clip": lambda: delta_momentum(0.1, stability="clip"),
    "delta matrix": lambda: delta_momentum(0.1, form="matrix"),
    "delta matrix clip": lambda: delta_momentum(0.1, form="matrix", stability="clip"),
    "preconditioned": lambda: preconditioned_momentum(0.1, lambda g: 2.0 * g),
    "features": lambda: feature_map_momentum(0.1, jnp.tanh),
    "nonlinear": lambda: nonlinear_momentum(0.05, decay=0.5),
    "memory linear": lambda: from_memory(0.1, LINEAR),
    "memory mlp": lambda: from_memory(0.1, MLP),
}


def params():
    return {
        "w": jnp.linspace(-1.0, 2.0, 6).reshape(2, 3),
        "b": jnp.array([0.5, -0.5]),
        "s": jnp.array(1.5, jnp.float32),
    }


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


# Preconditioned, mapped, and bent at the output.


def test_a_preconditioner_multiplies_from_the_left(key):
    g = {"w": stream(key, (2, 3)), "b": stream(key, (2,)), "s": stream(key, ())}
    matrix = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    rule = preconditioned_momentum(
        ETA, {"w": matrix, "b": matrix, "s": jnp.array(5.0)}, decay=ALPHA
    )
    mapped = {
        "w": jnp.einsum("rs,tsc->trc", matrix, g["w"]),
        "b": jnp.einsum("rs,ts->tr", matrix, g["b"]),
        "s": 5.0 * g["s"],
    }
    close(updates(rule, g), updates(momentum(ETA, decay=ALPHA), mapped))
    unlike = preconditioned_momentum(ETA, {"w": None, "b": matrix, "s": None})
    close(updates(unlike, g)["w"], updates(momentum(ETA), g)["w"])


def test_a_preconditioner_may_be_a_function_or_a_transformation(key):
    g = stream(key, (2, 3))
    rule = preconditioned_momentum(ETA, jnp.sign, decay=ALPHA)
    close(updates(rule, g), updates(momentum(ETA, decay=ALPHA), jnp.sign(g)))
    adaptive = preconditioned_momentum(ETA, optax.scale_by_rms(), decay=ALPHA)
    scaled = updates(optax.scale_by_rms(), g)
    close(updates(adaptive, g), updates(momentum(ETA, decay=ALPHA), scaled))


def test_a_preconditioner_sees_float32():
    """In bfloat16 the second moment of RMSProp would stand still."""
    w = jnp.ones((2,), jnp.bfloat16)
    rule = preconditioned_momentum(0.1, optax.scale_by_rms(decay=0.999))
    update, state = rule.update(w, rule.init(w), w)
    assert update.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32)


def test_a_feature_map_comes_before_the_preconditioner(key):
    g = stream(key, (2, 2))
    matrix = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    rule = feature_map_momentum(ETA, jnp.sign, decay=ALPHA, precondition=matrix)
    mapped = jnp.einsum("rs,tsc->trc", matrix, jnp.sign(g))
    close(updates(rule, g), updates(momentum(ETA, decay=ALPHA), mapped))
    sign = feature_map_momentum(ETA, jnp.sign, decay=0.0)
    close(updates(sign, g), -ETA * jnp.sign(g))


def test_the_identity_at_the_output_is_momentum(key):
    g = {"w": stream(key, (2, 3)), "s": stream(key, ())}
    for literal in (False, True):
        rule = nonlinear_momentum(ETA, lambda m: m, decay=ALPHA, literal=literal)
        close(updates(rule, g), updates(momentum(ETA, decay=ALPHA), g))


def test_newton_schulz_at_the_output_is_muon(key):
    g = stream(key, (3, 4))
    ours = updates(nonlinear_momentum(ETA, decay=ALPHA), g)
    trace = jnp.stack(
        [sum(ALPHA ** (t - i) * g[i] for i in range(t + 1)) for t in range(5)]
    )
    close(ours, -ETA * orthogonalise(trace), rtol=1e-3, atol=1e-4)
    with jax.numpy_dtype_promotion("standard"):
        muon = optax.contrib.scale_by_muon(beta=ALPHA, nesterov=False)
        theirs = updates(muon, g)
    close(ours, -ETA * theirs, rtol=5e-2, atol=2e-3)  # whose products are bfloat16
    s = np.linalg.svd(ours[-1] / ETA, compute_uv=False)
    assert 0.6 < s.min() and s.max() < 1.25


def test_the_printed_muon_throws_its_rate_away(key):
    g = stream(key, (3, 4))
    small, large = (
        updates(nonlinear_momentum(eta, decay=ALPHA, literal=True), g)
        for eta in (0.01, 10.0)
    )
    close(small, large, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_muon_is_blind_to_the_size_of_gradients(key, scale):
    g = stream(key, (3, 4))
    rule = nonlinear_momentum(ETA)
    close(updates(rule, scale * g), updates(rule, g), rtol=1e-3, atol=1e-4)


# Delta momentum at the ends of the range of a float.


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (4,), (3, 3)])
@pytest.mark.parametrize("scale", [1e-20, 1e3, 1e18])
def test_the_proximal_matrix_form_at_any_scale(key, shape, scale):
    """Against singular values: s goes to −η s / (1 + η s²), also for rank one."""
    for g in (jax.random.normal(key, shape), jnp.ones(shape)):
        rule = delta_momentum(ETA, form="matrix", decay=ALPHA)
        update, _ = rule.update(scale * g, rule.init(g))
        u, s, v = np.linalg.svd(
            np.asarray(g, np.float64).reshape(-1, shape[-1]), full_matrices=False
        )
        s = s * (s > 1e-6) * scale
        expected = (u * (-ETA * s / (1 + ETA * s**2))) @ v
        size = np.abs(expected).max()
        np.testing.assert_allclose(
            np.reshape(update, expected.shape) / size, expected / size, atol=1e-2
        )


def test_delta_momentum_element_wise_at_the_ends_of_the_range():
    for stability, expected in (("proximal", 0.0), ("clip", -ETA * 1e20)):
        rule = delta_momentum(ETA, stability=stability)
        update, _ = rule.update(jnp.array(1e20), rule.init(jnp.array(1.0)))
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-18)
    off = delta_momentum(lambda count: jnp.zeros(()), stability="clip")  # in a warm-up
    update, _ = off.update(jnp.array(1e20), off.init(jnp.array(1.0)))
    np.testing.assert_array_equal(update, 0.0)


# The horizon of section 4.3.


@pytest.mark.parametrize(
    "lags, share", [(6, 0.469), (7, 0.522), (43, 0.9892), (44, 0.9903)]
)
def test_what_the_last_gradients_weigh(lags, share):
    """The paper's "last 6 (43)" are the lags 0 to 6 (43): 7 and 44 gradients."""
    rule = momentum(1.0 - ALPHA, decay=ALPHA)
    gradients = jnp.ones(400).at[:-lags].set(0.0)
    recent = -updates(rule, gradients)[-1]
    every = -updates(rule, jnp.ones(400))[-1]
    np.testing.assert_allclose(recent / every, share, atol=6e-4 if lags < 9 else 6e-5)


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


# What all of them promise.


@pytest.mark.parametrize("name", RULES)
def test_they_are_finite_and_learn_and_compile_once(name):
    rule = RULES[name]()
    step = jax.jit(rule.update)
    for scale in (1e-20, 1e20, 0.0):
        g = jax.tree.map(lambda leaf, scale=scale: scale * leaf, params())
        state = rule.init(params())
        for _ in range(3):
            update, state = step(g, state, params())
            assert all(
                np.isfinite(leaf).all() for leaf in jax.tree.leaves((update, state))
            )
    close(update, jax.tree.map(jnp.zeros_like, params()))
    at = params()
    state = rule.init(at)
    for _ in range(80):
        update, state = step(at, state, at)
        at = optax.apply_updates(at, update)
    assert optax.tree.norm(at) < 0.2 * optax.tree.norm(params())
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", RULES)
def test_they_keep_types_and_join_chains(name):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    rule = optax.chain(
        optax.scale(2.0),
        optax.masked(RULES[name](), {"w": True, "b": False, "s": True}),
    )
    update, state = rule.update(half, rule.init(half), half, value=1.0)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(update))
    close(update["b"].astype(jnp.float32), 2.0 * params()["b"], 1e-2)
    floats = [s for s in jax.tree.leaves(state) if jnp.issubdtype(s.dtype, jnp.inexact)]
    assert all(s.dtype == jnp.float32 for s in floats)


@pytest.mark.parametrize(
    "make, static",
    [
        (momentum, ()),
        (delta_momentum, ()),
        (nonlinear_momentum, ()),
        (preconditioned_momentum, ("precondition",)),
        (from_memory, ("seed",)),
    ],
)
def test_rates_can_be_injected(make, static):
    extra = {preconditioned_momentum: {"precondition": jnp.sign}}.get(make, {})
    extra |= {"config": LINEAR} if make is from_memory else {}
    with jax.numpy_dtype_promotion("standard"):
        rule = optax.inject_hyperparams(make, static_args=static)(
            learning_rate=0.1, **extra
        )
        state = rule.init(params())
        state.hyperparams["learning_rate"] = jnp.array(0.2)
        update, _ = jax.jit(rule.update)(params(), state, params())
    plain = make(0.2, **extra)
    close(update, plain.update(params(), plain.init(params()), params())[0])


def test_choices_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 3\) for a gradient .* \(2, 3\)"):
        rule = preconditioned_momentum(ETA, jnp.eye(3))
        rule.update(jnp.ones((2, 3)), rule.init(jnp.ones((2, 3))))
    with pytest.raises(ValueError, match="precondition must be a function"):
        rule = preconditioned_momentum(ETA, {"other": jnp.eye(2)})
        rule.update(params(), rule.init(params()))
    with pytest.raises(ValueError, match="feature_map must be a function, got 'elu'"):
        feature_map_momentum(ETA, "elu")
    with pytest.raises(ValueError, match=r"feature_map made shape \(4,\) .* \(2,\)"):
        rule = feature_map_momentum(ETA, lambda g: jnp.concatenate([g, g]))
        rule.update(jnp.ones(2), rule.init(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"sigma must keep the shape: .* \(1, 1\)"):
        rule = nonlinear_momentum(ETA, lambda m: m[:1, :1])
        rule.update(jnp.ones(2), rule.init(jnp.ones(2)))
    for make in (nonlinear_momentum, lambda e, decay: delta_momentum(e, decay=decay)):
        with pytest.raises(ValueError, match=r"in \[0, 1\]; got -0.1"):
            make(ETA, decay=-0.1)


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


def test_examples_in_docstrings():
    results = doctest.testmod(sys.modules[momentum.__module__])
    assert results.attempted > 0 and results.failed == 0
