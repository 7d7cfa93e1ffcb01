"""Optimizers by name and by clock: which parameters move when, and by what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hope_jax import optim
from hope_jax.core import config as config_lib
from hope_jax.optim import groups
from hope_jax.optim.rules.dgd import dgd
from hope_jax.optim.rules.m3 import M3, scale_by_m3
from hope_jax.optim.rules.momentum import Momentum
from hope_jax.train.config import OptimizerConfig


@pytest.fixture(autouse=True)
def _optax_counts_in_integers():
    with jax.numpy_dtype_promotion("standard"):
        yield


SETTINGS = dict(
    rule="adamw",
    learning_rate=0.1,
    warmup_steps=0,
    final_fraction=1.0,
    weight_decay=0.0,
    clip_norm=None,
)


def settings(**changes):
    return OptimizerConfig(**{**SETTINGS, **changes})


def run(tx, params, gradients):
    """All updates that `tx` gives, one for each of `gradients`."""
    state, every = tx.init(params), []
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        every.append(updates)
    return every, params, state


def some_gradients(key, params, steps):
    return [
        jax.tree.map(lambda p, k=k: jax.random.normal(k, p.shape), params)
        for k in jax.random.split(key, steps)
    ]


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gate_equals_multi_steps(key, reduce):
    """MultiSteps runs its rule at every step and masks it: slow and obvious."""
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    gradients = some_gradients(key, params, 13)
    ours = groups.on_clock(optax.adamw(0.1), 4, reduce=reduce)
    reference = optax.MultiSteps(
        optax.adamw(0.1), 4, use_grad_mean=reduce == "mean"
    ).gradient_transformation()
    for a, b in zip(
        run(ours, params, gradients)[0],
        run(reference, params, gradients)[0],
        strict=True,
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


def test_slow_parameters_get_the_sum_of_their_own_gradients(key):
    """Design promise 5: whatever the faster clock does to its parameters meanwhile."""
    xs = jax.random.normal(key, (8, 2))

    def loss(params, x):
        return params["slow"] * x[0] * params["fast"] + jnp.sin(params["fast"] * x[1])

    params = {"fast": jnp.array(0.5), "slow": jnp.array(2.0)}
    tx = groups.on_clocks(
        lambda period: optax.sgd(0.3), {"fast": 1, "slow": 4}, reduce="sum"
    )
    state, slow_gradients = tx.init(params), []
    for i, x in enumerate(xs):
        gradient = jax.grad(loss)(params, x)
        slow_gradients.append(gradient["slow"])
        before = params
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        assert params["fast"] != before["fast"]
        moved = 0.3 * sum(slow_gradients[-4:]) if (i + 1) % 4 == 0 else 0.0
        np.testing.assert_allclose(before["slow"] - params["slow"], moved, rtol=1e-5)


def test_clipping_a_slow_group_ignores_the_faster_ones():
    config = settings(rule="sgd", clip_norm=1.0, learning_rate=1.0)
    params = {"fast": jnp.zeros(1), "slow": jnp.zeros(1)}
    tx = optim.build(config, total_steps=10, periods={"fast": 1, "slow": 2})
    huge = {"fast": jnp.array([1e6]), "slow": jnp.array([0.5])}
    updates, *_ = run(tx, params, [huge, huge])
    np.testing.assert_allclose(updates[1]["slow"], [-0.5], rtol=1e-6)
    np.testing.assert_allclose(updates[1]["fast"], [-1.0], rtol=1e-6)


@pytest.mark.parametrize("rule", ["adamw", "momentum", "muon"])
def test_a_rate_that_comes_later_moves_as_the_config_s(key, rule):
    """Traced, so that one program serves every rate."""
    config = settings(
        rule=rule, weight_decay=0.1, warmup_steps=2, final_fraction=0.1, clip_norm=1.0
    )
    params = {"layer": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    gradients = [
        jax.tree.map(lambda p, k=k: jax.random.normal(k, p.shape), params)
        for k in jax.random.split(key, 3)
    ]
    clocks = optim.one_clock(params)

    def moved(peak=None):
        tx = optim.build(config, total_steps=4, periods=clocks, peak=peak)
        state, every = tx.init(params), []
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
            every.append(updates)
        return every

    at = jax.jit(moved)
    for rate in (0.1, 0.01):
        config = dataclasses.replace(config, learning_rate=rate)
        made = at(jnp.float32(rate))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), made, moved()
        )
    assert at._cache_size() == 1


def test_saved_in_the_middle_of_a_period(key):
    """The state is a pytree of arrays that holds all there is to go on with."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = groups.on_clocks(lambda period: optax.adam(0.1), {"a": 1, "b": 5})
    gradients = some_gradients(key, params, 12)
    _, unbroken, _ = run(tx, params, gradients)
    _, params, state = run(tx, params, gradients[:7])
    leaves, treedef = jax.tree.flatten(state)
    state = jax.tree.unflatten(treedef, [jnp.array(np.asarray(x)) for x in leaves])
    for gradient in gradients[7:]:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, params, unbroken)


def test_nothing_of_an_off_step_comes_through():
    """MultiSteps would give 0 * nan = nan here."""
    rule = optax.stateless(lambda updates, params: jax.tree.map(jnp.log, updates))
    tx = groups.on_clock(rule, 2)
    updates, state = tx.update(jnp.array(-1.0), tx.init(jnp.zeros(())))
    assert updates == 0
    updates, _ = tx.update(jnp.array(3.0), state)
    np.testing.assert_allclose(updates, 0.0, atol=1e-6)  # log of the mean, 1


def no_inputs(params):
    """Which leaves are matrices, and Gram matrices for them that hold no inputs."""

    def gram(leaf, chosen):
        return jnp.zeros((*leaf.shape[:-1], leaf.shape[-2])) if chosen else None

    layers = jax.tree_util.tree_map_with_path(
        lambda path, leaf: groups.kind(path, leaf) == "matrices", params
    )
    return layers, jax.tree.map(gram, params, layers)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("adamw", 0.1), ("momentum", 0.1), ("dgd", 0.3), ("ggd", 0.3), ("m3", 0.4)],
)
def test_rules_of_every_build_compile_once_and_converge(key, name, rate):
    """On an nnx state with stacked layers, on two clocks, to the bottom of a bowl.

    All names go there on one clock in `test_conformance.py`.
    """
    shapes = {"kernel": (2, 3, 4), "bias": (2, 4), "embedding": (5, 3)}
    keys = jax.random.split(key, len(shapes))
    params = nnx.State(
        {
            "layer": {
                n: nnx.Param(jax.random.normal(k, s))
                for k, (n, s) in zip(keys, shapes.items(), strict=True)
            }
        }
    )
    periods = jax.tree.map(lambda p: 3 if p.ndim == 3 else 1, params)
    config = settings(rule=name, learning_rate=rate, final_fraction=0.02)
    rule = config.rule
    if hasattr(rule, "b1"):
        rule = dataclasses.replace(rule, b1=0.8)
    config = dataclasses.replace(config, rule=rule)
    layers, inputs = no_inputs(params)
    tx = optim.build(config, total_steps=300, periods=periods, layers=layers)

    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(lambda p: p - 0.5, params)
        updates, state = tx.update(
            gradient, state, params, context=gradient, inputs=inputs
        )
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(params)
        for _ in range(300):
            params, state = step(params, state)
    assert step._cache_size() == 1
    worst = max(float(jnp.abs(p - 0.5).max()) for p in jax.tree.leaves(params))
    assert worst < 0.1


def test_muon_takes_stacked_kernels_and_only_those(key):
    """A Muon update of a matrix has all its singular values alike; Adam's has not."""
    params = {
        "kernel": jnp.zeros((2, 8, 8)),
        "embedding": jnp.zeros((8, 8)),
        "bias": jnp.zeros((8, 8)),
        "conv_q": {"kernel": jnp.zeros((2, 8, 8))},
    }
    tx = optim.build(
        settings(rule="muon"), total_steps=9, periods=optim.one_clock(params)
    )
    updates, *_ = run(tx, params, some_gradients(key, params, 1))

    def spread(matrix):
        values = jnp.linalg.svd(matrix, compute_uv=False)
        return float(values[..., 0].max() / values[..., -1].min())

    assert spread(updates[0]["kernel"]) < 2.5
    assert spread(updates[0]["embedding"]) > 5
    assert spread(updates[0]["bias"]) > 5
    assert spread(updates[0]["conv_q"]["kernel"]) > 5


@pytest.mark.slow
def test_each_kind_has_the_rule_that_is_named_for_it(key):
    """Beside M3: signs for the embedding, gradients for the convolution, Adam else."""
    params = {
        "layer": {"kernel": jnp.zeros((2, 4, 4)), "bias": jnp.zeros((2, 4))},
        "conv_q": {"kernel": jnp.zeros((3, 4))},
        "token": {"embedding": jnp.zeros((5, 4))},
    }
    config = settings(rule="m3", embeddings="lion", convolutions="sgd")
    periods = jax.tree.map(lambda _: 1, params)
    tx = optim.build(config, total_steps=9, periods=periods)
    (gradient,) = some_gradients(key, params, 1)
    (updates,), _, state = run(tx, params, [gradient])

    def expected(name, part, leaf):
        direction = {"m3": scale_by_m3(decays=(0.9, 0.9)), "adam": optax.scale_by_adam}
        rule = direction[name] if name == "m3" else direction[name](b1=0.9, b2=0.95)
        g = gradient[part][leaf]
        return -0.1 * rule.update(g, rule.init(params[part][leaf]))[0]

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    close(updates["layer"]["kernel"], expected("m3", "layer", "kernel"))
    close(updates["layer"]["bias"], expected("adam", "layer", "bias"))
    close(updates["conv_q"]["kernel"], -0.1 * gradient["conv_q"]["kernel"])
    embedded = gradient["token"]["embedding"]
    close(updates["token"]["embedding"], -0.1 * jnp.sign(embedded))

    periods["layer"]["kernel"] = 4
    table = optim.describe(config, params, periods)
    rows = table.splitlines()[2:]
    assert [tuple(c.strip() for c in row.split("|")[1:-1]) for row in rows] == [
        ("embeddings", "lion", "every step", "20"),
        ("convolutions", "sgd", "every step", "12"),
        ("others", "adamw", "every step", "8"),
        ("matrices", "m3", "every 4 steps", "32"),
    ]


@pytest.mark.slow
def test_inputs_are_reduced_like_gradients(key):
    """Two steps on halves of a batch are one on all of it, in every period; saved and
    loaded in between. Matrices without inputs move like all that is no matrix."""
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (6, 3))
    params = {name: {"kernel": jax.random.normal(keys[1], (3, 2))} for name in "abc"}
    params["a"]["bias"] = jnp.zeros(2)
    periods = {"a": {"kernel": 2, "bias": 2}, "b": {"kernel": 1}, "c": {"kernel": 2}}
    layers = jax.tree.map(lambda p: p.ndim == 2, params) | {"c": {"kernel": False}}
    config = settings(rule="dgd", others="lion")
    tx = optim.build(config, total_steps=9, periods=periods, layers=layers)
    update = jax.jit(tx.update)

    def half(rows):
        gram = rows.T @ rows / len(rows)
        gradient = jax.tree.map(lambda p: p + rows[0, 0], params)
        return gradient, jax.tree.map(lambda c: gram if c else None, layers)

    (g1, x1), (g2, x2) = half(x[:3]), half(x[3:])
    first, state = update(g1, tx.init(params), params, inputs=x1)
    assert not first["a"]["kernel"].any() and first["b"]["kernel"].any()
    state = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), state)
    second, state = update(g2, state, params, inputs=x2)
    mean = jax.tree.map(lambda *g: sum(g) / 2, g1, g2)
    rule = dgd(0.1, input_axis=-2)
    w, g = params["a"]["kernel"], mean["a"]["kernel"]
    whole, _ = rule.update(g, rule.init(w), w, inputs=x.T @ x / 6)
    np.testing.assert_allclose(second["a"]["kernel"], whole, rtol=1e-4, atol=1e-6)
    for part, leaf in (("a", "bias"), ("c", "kernel")):
        signs = -0.1 * jnp.sign(mean[part][leaf])
        np.testing.assert_allclose(second[part][leaf], signs, rtol=1e-6)
    for gradient, inputs in ((g1, x1), (g2, x2)):
        later, state = update(gradient, state, params, inputs=inputs)
    np.testing.assert_allclose(later["a"]["kernel"], second["a"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(optim.RULES) - {"adam"}))
def test_only_matrices_decay(name):
    params = {
        "layers": {
            "attention": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
            "norm": {"scale": jnp.ones((2, 3))},
            "eta": {"rate": jnp.ones((3, 4))},
        },
        "token": {"embedding": jnp.ones((5, 3))},
    }
    layers, inputs = no_inputs(params)
    tx = optim.build(
        settings(rule=name, weight_decay=0.5),
        total_steps=2,
        periods=optim.one_clock(params),
        layers=layers,
    )
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(still, tx.init(params), params, inputs=inputs)
    moved = optax.apply_updates(params, updates)
    decayed = jax.tree.map(lambda p: bool((p < 1).all()), moved)
    assert decayed == {
        "layers": {
            "attention": {"kernel": True, "bias": False},
            "norm": {"scale": False},
            "eta": {"rate": False},
        },
        "token": {"embedding": True},
    }
    assert decayed == groups.decays(params)


def test_the_schedule_is_of_steps_on_every_clock():
    """At a common step, a slow and a fast parameter move at one rate."""
    config = settings(rule="sgd", learning_rate=1.0, warmup_steps=4, final_fraction=0.1)
    params = {"fast": jnp.zeros(()), "slow": jnp.zeros(())}
    tx = optim.build(config, total_steps=12, periods={"fast": 1, "slow": 3})
    ones = jax.tree.map(jnp.ones_like, params)
    updates, *_ = run(tx, params, [ones] * 12)
    fast = [-float(u["fast"]) for u in updates]
    slow = [-float(u["slow"]) for u in updates]
    np.testing.assert_allclose(fast[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(fast[-1], 0.1, rtol=1e-5)
    assert [i for i, u in enumerate(slow) if u] == [2, 5, 8, 11]
    np.testing.assert_allclose(slow[2::3], fast[2::3], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: groups.on_clock(optax.sgd(1.0), 0), "period .* got 0"),
        (lambda: groups.on_clock(optax.sgd(1.0), 2.5), "period .* got 2.5"),
        (lambda: groups.on_clock(optax.sgd(1.0), 2, reduce="max"), "got 'max'"),
        (
            lambda: optim.build(settings(rule="adamv"), total_steps=1, periods=1),
            "rule must be one of adamw, .*, got 'adamv'. Did you mean 'adam'",
        ),
        (
            lambda: optim.build(
                settings(rule="adam", weight_decay=0.1), total_steps=1, periods=1
            ),
            "adam has no weight decay, got weight_decay=0.1",
        ),
        (lambda: settings(embeddings="lian"), "embeddings must .*'lian'.*'lion'"),
        (lambda: settings(others="m3"), "others='m3': m3 moves matrices, and biases"),
        (
            lambda: settings(embeddings="dgd"),
            "embeddings='dgd': dgd .*inputs are known",
        ),
        (
            lambda: config_lib.override(settings(), ["rule.alpha=0.5"]),
            r"rule \(Adam\) has no field 'alpha'",
        ),
        (lambda: settings(rule=3), "rule must be the name or the config .* got 3"),
        (lambda: settings(rule=Momentum(b1=1.0)), "b1 must be .* below 1, got 1.0"),
        (
            lambda: settings(rule=M3(b1=0.5, decays=(0.8, 0.7))),
            r"b1 \(0.5\) is not read where decays are given",
        ),
        (
            lambda: optim.build(settings(rule="dgd"), total_steps=1, periods=1),
            "dgd needs layers, .*dense_kernels",
        ),
        (
            lambda: optim.build(
                settings(rule="m3"), total_steps=1, periods={"w": 1}
            ).init({"w": jnp.ones((2, 2))}),
            "No matrix was found for m3 among w: .*with_adamw",
        ),
        (
            lambda: groups.on_clock(optax.sgd(1.0), 2, layers=True).update(1.0, None),
            "layers names matrices .*inputs",
        ),
    ],
)
def test_wrong_arguments_say_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()
