"""An optimizer is a memory of gradients: the equivalences, in numbers."""

import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.core.clock import Clock
from hope_jax.core.level import Level, begin, unroll
from hope_jax.core.transfer import attend
from hope_jax.optim.levels import from_level
from hope_jax.optim.momenta import delta_level, delta_momentum, hebbian_level, momentum


def params():
    return {
        "w": jnp.arange(6.0).reshape(2, 3) / 3,
        "b": jnp.array([0.5, -0.5]),
        "s": jnp.array(1.5),
    }


def gradients(key, steps=8):
    def stream(i, leaf):
        return jax.random.normal(jax.random.fold_in(key, i), (steps, *leaf.shape))

    leaves, structure = jax.tree.flatten(params())
    return structure.unflatten([stream(i, leaf) for i, leaf in enumerate(leaves)])


def updates(optimizer, stream, start=None):
    """Every update of `optimizer` along a stream of gradients."""

    def step(carry, gradient):
        state, at = carry
        update, state = optimizer.update(gradient, state, at)
        return (state, optax.apply_updates(at, update)), update

    start = params() if start is None else start
    carry = optimizer.init(start), start
    return jax.jit(lambda g: jax.lax.scan(step, carry, g)[1])(stream)


def same(ours, theirs, stream, rtol=1e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol, 1e-6),
        updates(ours, stream),
        updates(theirs, stream),
    )


def test_hebbian_memory_is_momentum_is_sgd(key):
    stream = gradients(key)
    as_level = from_level(hebbian_level(0.1, decay=0.8))
    same(as_level, momentum(0.1, decay=0.8), stream)
    same(as_level, optax.sgd(0.1, momentum=0.8), stream)


def test_delta_memory_is_delta_momentum(key):
    stream = gradients(key)
    as_level = from_level(delta_level(0.1, decay=0.8))
    same(as_level, delta_momentum(0.1, decay=0.8, stability="literal"), stream)


def test_linear_attention_is_one_gradient_step_on_the_dot_product(key):
    """Equations 14-18: M + v k^T is a step of size 1 on -<M k, v>."""
    keys = jax.random.split(key, 3)
    k, v, q = (jax.random.normal(one, (7, 4)) for one in keys)
    memory = Level(
        init=lambda key: jnp.zeros((4, 4)),
        read=lambda m, item: m @ item[2],
        objective=lambda m, item: -jnp.vdot(m @ item[0], item[1]),
        flow=optax.sgd(1.0),
        read_at="post",
    )
    state, reads = unroll(memory, begin(memory, memory.init(key)), (k, v, q))
    np.testing.assert_allclose(state.params, v.T @ k, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reads, jnp.tril(q @ k.T) @ v, rtol=1e-4, atol=1e-5)


def test_the_same_level_is_a_memory_of_tokens_and_of_gradients(key):
    level = hebbian_level(0.3, decay=0.7)
    stream = jax.random.normal(key, (6, 3))
    _, reads = unroll(level, begin(level, jnp.zeros(3)), stream)
    np.testing.assert_allclose(
        updates(from_level(level), stream, jnp.zeros(3)), reads, rtol=1e-6
    )


def test_a_slow_level_updates_on_its_clock(key):
    stream = gradients(key)
    level = hebbian_level(0.1, decay=1.0)._replace(clock=Clock(period=4))
    out = updates(from_level(level), stream)["w"]
    np.testing.assert_array_equal(out[:3], 0.0)
    np.testing.assert_allclose(out[3], -0.1 * stream["w"][:4].sum(0), rtol=1e-4)
    np.testing.assert_array_equal(out[4], out[3])


def test_a_memory_of_another_shape_than_the_leaf(key):
    """One scale for each leaf, learned from its gradients: |W| is what it starts at."""
    scale = Level(
        init=lambda key: jnp.ones(()),
        read=lambda s, g: -s * g,
        objective=lambda s, g: 0.5 * (s - jnp.vdot(g, g)) ** 2,
        flow=optax.sgd(0.5),
    )
    optimizer = from_level(scale, start=lambda leaf: scale.init(key))
    stream = gradients(key, steps=2)
    out = updates(optimizer, stream)
    g = stream["w"]
    np.testing.assert_allclose(out["w"][0], -g[0], rtol=1e-6)
    learned = 0.5 * (1 + jnp.vdot(g[0], g[0]))
    np.testing.assert_allclose(out["w"][1], -learned * g[1], rtol=1e-5)


def test_it_joins_chains_masks_and_extra_arguments(key):
    memory = from_level(hebbian_level(0.1))
    chain = optax.chain(
        optax.scale(2.0),
        optax.masked(memory, {"w": True, "b": False, "s": True}),
    )
    gradient = params()
    update, _ = chain.update(gradient, chain.init(params()), params(), value=1.0)
    np.testing.assert_allclose(update["w"], -0.2 * gradient["w"], rtol=1e-6)
    np.testing.assert_allclose(update["b"], 2.0 * gradient["b"], rtol=1e-6)


def test_a_second_step_of_a_slow_level_does_not_compile_again():
    optimizer = from_level(delta_level(0.1)._replace(clock=Clock(period=3)))
    step = jax.jit(optimizer.update)
    state = optimizer.init(params())
    for gradient in (params(), jax.tree.map(jnp.sin, params())):
        update, state = step(gradient, state, params())
    assert step._cache_size() == 1
    assert jax.tree.structure(update) == jax.tree.structure(params())


def test_a_non_parametric_level_sees_the_last_gradients(key):
    def total(gradients, mask, g):
        return -jnp.sum(jnp.where(mask.reshape(-1, *[1] * g.ndim), gradients, 9.0), 0)

    g = gradients(key, steps=5)
    out = updates(from_level(attend(total), context=3), g)
    for name, leaf in g.items():
        absent = 9.0 * jnp.array([2.0, 1.0, 0.0, 0.0, 0.0])
        for t in range(5):
            expected = -leaf[max(0, t - 2) : t + 1].sum(0) - absent[t]
            np.testing.assert_allclose(out[name][t], expected, rtol=1e-5, atol=1e-6)


def test_levels_that_are_no_optimizers_are_refused():
    with pytest.raises(ValueError, match=r"non-parametric \(period 0\)"):
        from_level(attend())
    with pytest.raises(ValueError, match=r"Give context, how many .* got 0"):
        from_level(attend(), context=0)
    with pytest.raises(ValueError, match=r"context \(3\) is for non-parametric"):
        from_level(hebbian_level(0.1), context=3)
    level = hebbian_level(0.1)._replace(read=lambda m, g: jnp.sum(m))
    optimizer = from_level(level)
    with pytest.raises(ValueError, match=r"reads shape \(\) .* of shape \(2, 3\)"):
        optimizer.update(
            {"w": jnp.ones((2, 3))}, optimizer.init({"w": jnp.ones((2, 3))})
        )


def test_examples_in_docstrings():
    results = doctest.testmod(sys.modules[from_level.__module__])
    assert results.attempted > 0 and results.failed == 0
