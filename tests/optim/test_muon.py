"""Factors of a whole tree at once, AdaMuon, and which leaves they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from hope_jax.kernels.newton_schulz import orthogonalise
from hope_jax.optim.matrices import for_matrices, with_adamw
from hope_jax.optim.orthogonal import (
    adamuon,
    orthogonalise_tree,
    scale_by_adamuon,
)


@pytest.fixture(autouse=True)
def _optax_counts_in_integers():
    with jax.numpy_dtype_promotion("standard"):
        yield


# Compiled once a shape: by itself each call would compile its loop again.
factors_of = jax.jit(orthogonalise_tree, static_argnames="dtype")


def some_tree(key):
    shapes = {"a": (4, 6), "b": (6, 4), "c": (2, 3, 4, 6), "d": (5, 5), "e": (6, 4)}
    keys = jax.random.split(key, len(shapes))
    pairs = zip(shapes.items(), keys, strict=True)
    tree = {name: jax.random.normal(k, shape) for (name, shape), k in pairs}
    return {**tree, "e": tree["e"].astype(jnp.bfloat16)}


def singular_values(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def rms(x):
    return float(jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2)))


def products(tree, **settings):
    """The text of the program, whose matrix products are `dot_general`s."""
    with jax.numpy_dtype_promotion("strict"):
        run = jax.make_jaxpr(lambda tree: orthogonalise_tree(tree, **settings))
        return str(run(tree))


def test_batched_is_one_by_one(key):
    tree = some_tree(key)
    with jax.numpy_dtype_promotion("strict"):
        together = jax.jit(orthogonalise_tree)(tree)
    for name, leaf in tree.items():
        assert together[name].dtype == leaf.dtype
        alone = jax.jit(orthogonalise)(leaf.astype(jnp.float32))
        tolerance = 1e-2 if leaf.dtype == jnp.bfloat16 else 1e-4
        np.testing.assert_allclose(
            together[name].astype(jnp.float32), alone, atol=tolerance
        )


def test_one_call_for_all_matrices_of_one_shape(key):
    """Two shapes, five steps of three products."""
    assert products(some_tree(key)).count("dot_general") == 2 * 5 * 3


@pytest.mark.parametrize("dtype, slack", [(jnp.float32, 0.0), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_singular_values_are_in_the_band_at_any_scale(key, dtype, slack, scale):
    x = scale * jax.random.normal(key, (3, 8, 16))
    values = singular_values(factors_of([x], dtype=dtype)[0])
    assert 0.68 - slack <= values.min() and values.max() <= 1.21 + slack


def test_each_matrix_of_a_stack_has_its_own_scale(key):
    x = jax.random.normal(key, (4, 8))
    stack = jnp.stack([1e-30 * x, x, 1e30 * x])
    for factor in orthogonalise_tree(stack):
        np.testing.assert_allclose(factor, orthogonalise(x), atol=1e-4)


def test_zero_stays_zero_beside_others():
    x = jnp.stack([jnp.zeros((3, 4)), jnp.ones((3, 4))])
    y = orthogonalise_tree(x)
    assert not y[0].any() and y[1].any() and np.isfinite(y).all()


def test_bfloat16_where_the_device_has_it(key, monkeypatch):
    x = jax.random.normal(key, (4, 6))
    assert "bf16" not in products(x)
    assert "bf16" in products(x, dtype=jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "bf16" in products(x)
    assert "bf16" not in products(x, dtype=jnp.float32)


def test_a_mesh_shares_the_work(key):
    """Seven matrices on four devices: the same factors, less work on each device."""
    x = jax.random.normal(key, (7, 16, 16))

    def on(devices):
        mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        run = jax.jit(lambda x: orthogonalise_tree(x, mesh=mesh))
        return run.lower(x).compile()

    shared, alone = on(jax.devices()), on(jax.devices()[:1])
    np.testing.assert_allclose(shared(x), alone(x), atol=1e-5)
    np.testing.assert_allclose(shared(x), orthogonalise_tree(x), atol=1e-5)
    per_device = shared.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
    assert 0.2 < per_device < 0.4  # two of seven


@pytest.mark.parametrize("sign", [True, False])
def test_adamuon_by_hand(key, sign):
    mu, mu2, eps = 0.8, 0.6, 1e-8
    rule = scale_by_adamuon(decay=mu, beta2=mu2, eps=eps, sign=sign)
    state = rule.init(jnp.zeros((3, 5)))
    m, v = np.zeros((3, 5)), np.zeros((3, 5))
    step = jax.jit(rule.update)
    for k in jax.random.split(key, 3):
        g = jax.random.normal(k, (3, 5))
        update, state = step(g, state)
        m = mu * m + (1 - mu) * np.asarray(g)
        seen = jnp.asarray(np.sign(m) if sign else m, jnp.float32)
        o = np.asarray(orthogonalise(seen))
        v = mu2 * v + (1 - mu2) * o**2
        divided = o / (np.sqrt(v) + eps)
        expected = 0.2 * np.sqrt(15) * divided / np.linalg.norm(divided)
        np.testing.assert_allclose(update, expected, atol=1e-4)


def test_every_update_of_adamuon_has_the_size_of_adams(key):
    rule = scale_by_adamuon()
    state = rule.init(jnp.zeros((2, 4, 6)))
    update = jax.jit(rule.update)
    with jax.numpy_dtype_promotion("strict"):
        for scale in (0.0, 1e-20, 1e20, 1.0):
            step, state = update(scale * jax.random.normal(key, (2, 4, 6)), state)
            for matrix in step:
                expected = 0.2 if scale else 0.0
                np.testing.assert_allclose(rms(matrix), expected, rtol=1e-3)


def test_adamuon_descends(key):
    goal = jax.random.normal(key, (4, 4))
    rule = adamuon(optax.cosine_decay_schedule(0.3, 150), weight_decay=0.0)
    w = jnp.zeros_like(goal)
    state = rule.init(w)
    step = jax.jit(rule.update)
    for _ in range(150):
        update, state = step(w - goal, state, w)
        w = w + update
    assert rms(w - goal) < 0.05


def test_only_kernels_are_matrices(key):
    """What the rule gets, the others do not; a stack of kernels is kernels."""
    params = {
        "layers": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))},
        "token": {"embedding": jnp.ones((5, 3))},
        "conv_q": {"kernel": jnp.ones((4, 3))},
    }
    rule = for_matrices(optax.scale(2.0), optax.scale(3.0))
    update, _ = rule.update(params, rule.init(params), params)
    assert jax.tree.map(lambda x: float(x.max()), update) == {
        "layers": {"kernel": 2.0, "bias": 3.0},
        "token": {"embedding": 3.0},
        "conv_q": {"kernel": 3.0},
    }


def test_with_adamw_is_adamw_beside_the_matrices(key):
    params = {
        "kernel": jnp.ones((3, 4)),
        "bias": jnp.ones(4),
        "embedding": jnp.ones((5, 3)),
    }
    gradients = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    ours = with_adamw(scale_by_adamuon(), 0.1, b1=0.8, b2=0.9, weight_decay=0.5)
    mask = {"kernel": True, "bias": False, "embedding": True}
    adamw = optax.adamw(0.1, b1=0.8, b2=0.9, weight_decay=0.5, mask=mask)
    matrices = adamuon(0.1, weight_decay=0.5)
    here, there = ours.init(params), adamw.init(params)
    step = jax.jit(ours.update)
    for _ in range(2):
        update, here = step(gradients, here, params)
        expected, there = adamw.update(gradients, there, params)
        for name in ("bias", "embedding"):
            np.testing.assert_allclose(update[name], expected[name], rtol=1e-5)
    kernel, state = params["kernel"], matrices.init(params["kernel"])
    step = jax.jit(matrices.update)
    for _ in range(2):
        expected, state = step(gradients["kernel"], state, kernel)
    np.testing.assert_allclose(update["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: orthogonalise_tree({"b": jnp.ones(3)}), r"\['b'\] has shape \(3,\)"),
        (lambda: scale_by_adamuon().init(jnp.ones(3)), "the parameter has shape"),
        (lambda: scale_by_adamuon(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: scale_by_adamuon(beta2=-0.1), "beta2 must be .* got -0.1"),
        (lambda: scale_by_adamuon(ns_steps=0), "ns_steps must be .* got 0"),
        (lambda: scale_by_adamuon(ns_steps=jnp.array(5)), "name it in static_args"),
    ],
)
def test_wrong_arguments_say_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()
