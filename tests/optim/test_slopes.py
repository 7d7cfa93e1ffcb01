"""Generalised gradient descent of networks: every token's own objective, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.memory.compose import MemoryConfig
from hope_jax.optim.capture import dgd_gradients, value_and_slopes
from hope_jax.optim.rules.dgd import dgd
from hope_jax.optim.slopes import descend_slopes, objective
from tests.optim.test_dgd_capture import network, squares

CONFIG = MemoryConfig(
    architecture="linear", bias="l2", rule="gd", retention="none", dgd="none", chunk=1
)


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def slopes_of(params, batch, settings):
    return value_and_slopes(
        squares, params, batch, objective=objective(settings), tokens=6
    )


def by_token(params, batch):
    """For each matrix a list of (x, y, u): input, product, and what it should be."""
    x, target = (np.asarray(a).reshape(6, -1) for a in batch)
    triples = {"first": [], "second": []}
    for x_t, target_t in zip(x, target, strict=True):
        y = x_t @ params["first"]
        h = np.tanh(y + params["bias"])
        out = h @ params["second"]
        delta = out - target_t
        triples["second"].append((h, out, -delta))
        triples["first"].append((x_t, y, -(params["second"] @ delta) * (1 - h**2)))
    return triples


HUBER = config(bias="huber", threshold=0.5)
ERRORS = {  # of y and u, the gradient in y
    "l2": lambda y, u: y - u,
    "dot": lambda y, u: -u,
    "huber": lambda y, u: np.clip(y - u, -0.5, 0.5),
}


@pytest.mark.parametrize("settings", [CONFIG, config(bias="dot"), HUBER])
def test_slopes_are_those_of_every_tokens_own_objective(key, settings):
    params, batch = network(key)
    loss, slopes = slopes_of(params, batch, settings)
    expected, gradients = jax.value_and_grad(squares)(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(slopes["bias"], gradients["bias"], rtol=1e-5)
    error = ERRORS[settings.bias]
    for name, triples in by_token(params, batch).items():
        by_hand = np.mean([np.outer(x, error(y, u)) for x, y, u in triples], axis=0)
        np.testing.assert_allclose(slopes[name], by_hand, rtol=1e-4, atol=1e-5)
    if settings.bias == "dot":
        np.testing.assert_allclose(slopes["first"], gradients["first"], rtol=1e-4)


def test_slopes_through_scan_and_vmap_and_the_other_side(key):
    """Stacked layers, tokens mapped one by one, y = W x: all the same numbers."""
    keys = jax.random.split(key, 2)
    w, x = jax.random.normal(keys[0], (3, 4, 4)), jax.random.normal(keys[1], (5, 4))

    def stack(w, x):
        layer = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return jnp.mean(jnp.sum(jax.lax.scan(layer, x, w)[0], axis=-1))

    def mapped(w, x):
        def one(x):
            for i in range(3):
                x = jnp.tanh(w[f"{i}"] @ x)
            return jnp.sum(x)

        return jnp.mean(jax.vmap(one)(x))

    options = dict(objective=objective(HUBER), tokens=5)
    _, one = value_and_slopes(stack, w, x, **options)
    apart = {f"{i}": w[i].T for i in range(3)}
    _, other = value_and_slopes(mapped, apart, x, input_axis=-1, **options)
    for i in range(3):
        np.testing.assert_allclose(one[i], other[f"{i}"].T, rtol=1e-4, atol=1e-6)


def test_of_squares_it_is_explicit_dgd(key):
    params, batch = network(key)
    _, slopes = slopes_of(params, batch, CONFIG)
    gradients, inputs = dgd_gradients(squares, params, batch)
    ours = descend_slopes(0.3, config(retention="decay"), retention=0.9, input_axis=-2)
    moved, state = ours.update(slopes, ours.init(params), params)
    assert state.count == 1
    reference = dgd(0.3, explicit=True, retention=0.9, input_axis=-2)
    expected, _ = reference.update(
        gradients, reference.init(params), params, inputs=inputs
    )
    for name in params:
        np.testing.assert_allclose(moved[name], expected[name], rtol=1e-4, atol=1e-6)


def test_rules_and_retentions_of_stacked_kernels(key):
    """Each matrix of a stack by itself: momentum, and a bound on its norm."""
    settings = config(rule="momentum", retention="norm_clamp", retention_scale=0.7)
    rule = descend_slopes(0.1, settings, inertia=0.5, input_axis=-2)
    w = jax.random.normal(key, (2, 3, 4))
    slope = jnp.ones_like(w)
    state = rule.init(w)
    for step in (0.1, 0.15):
        moved, state = rule.update(slope, state, w)
        plain = w - step * slope
        norm = jnp.linalg.norm(plain, axis=(-2, -1), keepdims=True)
        expected = plain * jnp.minimum(1.0, 0.7 / norm)
        w = w + moved
        np.testing.assert_allclose(w, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e20])
def test_robust_slopes_are_bounded_whatever_the_loss(key, size):
    params, (x, target) = network(key)
    _, slopes = slopes_of(params, (x, size * target), HUBER)
    bound = 0.5 * float(jnp.abs(x).max())
    assert float(jnp.abs(slopes["first"]).max()) <= bound
    assert all(bool(jnp.isfinite(s).all()) for s in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(architecture="mlp"), "architecture must be 'linear'.* got 'mlp'"),
        (dict(dgd="both"), "dgd must be 'none'.* got 'both'"),
        (dict(rule="implicit"), "rule='implicit' solves .* optim.dgd"),
        (dict(gradient="exact", retention="channel"), "retention='channel' solves"),
    ],
)
def test_what_is_no_memory_of_a_batch_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        descend_slopes(0.1, config(**changes))
    with pytest.raises(ValueError, match="input_axis must be"):
        descend_slopes(0.1, CONFIG, input_axis=1)
    rule = descend_slopes(0.1, CONFIG)
    with pytest.raises(ValueError, match="needs the parameters"):
        rule.update(jnp.ones((2, 2)), rule.init(jnp.ones((2, 2))))
