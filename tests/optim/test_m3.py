"""M3: several memories of gradients on clocks of their own, orthogonalised.

The literal Algorithm 1 is held to a transcription in tests/equations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hope_jax.optim.orthogonal import orthogonalise_tree, scale_by_adamuon
from hope_jax.optim.rules.m3 import m3, scale_by_m3
from tests import compare

close = compare.within(1e-7, 0.0)

VARIANTS = ("adamuon", "two_scale", "literal")
# Compiled once a shape: by itself each call would compile its loop again.
factors_of = jax.jit(orthogonalise_tree)
SHAPES = {"a": (8, 4), "b": (2, 4, 8), "c": (5, 5)}


@pytest.fixture(autouse=True)
def _optax_counts_in_integers():
    with jax.numpy_dtype_promotion("standard"):
        yield


def some_gradients(key, steps, shapes=SHAPES):
    def draw(key):
        keys = jax.random.split(key, len(shapes))
        pairs = zip(shapes.items(), keys, strict=True)
        return {name: jax.random.normal(k, shape) for (name, shape), k in pairs}

    return [draw(k) for k in jax.random.split(key, steps)]


def run(rule, gradients, state=None):
    """Every update and every state, under strict types as in the rest of the tests."""
    state = rule.init(gradients[0]) if state is None else state
    step, updates, states = jax.jit(rule.update), [], []
    with jax.numpy_dtype_promotion("strict"):
        for gradient in gradients:
            update, state = step(gradient, state)
            updates.append(update)
            states.append(state)
    assert step._cache_size() == 1
    return updates, states


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def rms(x):
    return float(jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2)))


def test_one_scale_is_adamuon_without_the_signs(key):
    gradients = some_gradients(key, 4)
    updates, _ = run(scale_by_m3(periods=(1,), decays=(0.9,), beta2=0.8), gradients)
    reference = scale_by_adamuon(decay=0.9, beta2=0.8, sign=False)
    expected, _ = run(reference, gradients)
    close(updates, expected, atol=1e-6)


@pytest.mark.parametrize("periods", [(1,), (1, 3), (1, 2, 4), (1, 1)])
def test_any_number_of_scales(key, periods):
    """The sum of the factors of all memories, each kept by hand."""
    gradients = some_gradients(key, 9, {"a": (4, 6)})
    alphas = (0.5, 0.25)[: len(periods) - 1]
    decays = (0.9, 0.6, 0.3)[: len(periods)]
    rule = scale_by_m3(
        periods=periods, alpha=alphas, decays=decays, variant="two_scale"
    )
    updates, _ = run(rule, gradients)
    g = np.stack([gradient["a"] for gradient in gradients])
    memories = [np.zeros((4, 6))] * len(periods)
    for t, update in enumerate(updates, start=1):
        total = 0.0
        for s, (period, decay) in enumerate(zip(periods, decays, strict=True)):
            if t % period == 0:
                mean = g[t - period : t].mean(0)
                memories[s] = decay * memories[s] + (1 - decay) * mean
            factor = factors_of(jnp.asarray(memories[s], jnp.float32))
            total = total + (1.0, *alphas)[s] * factor
        np.testing.assert_allclose(update["a"], 0.2 * 6**0.5 * total, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_slow_memory_moves_only_on_its_clock(key, variant):
    gradients = some_gradients(key, 9)
    rule = scale_by_m3(periods=(1, 4), variant=variant)
    _, states = run(rule, gradients)
    before = rule.init(gradients[0]).scales[1]
    for t, state in enumerate(states, start=1):
        after = state.scales[1]
        assert same(before.memory, after.memory) == (t % 4 != 0)
        assert same(before.factor, after.factor) == (t % 4 != 0)
        before = after


def test_the_cached_factor_is_used_until_the_clock(key):
    """A factor put in the state by hand shows in every update, up to the next move."""
    gradients = some_gradients(key, 6, {"a": (4, 4)})
    rule = scale_by_m3(periods=(1, 4), alpha=0.5, variant="two_scale")
    without = scale_by_m3(periods=(1,), variant="two_scale")
    state = rule.init(gradients[0])
    slow = state.scales[1]._replace(factor={"a": 7 * jnp.ones((4, 4))})
    state = state._replace(scales=(state.scales[0], slow))
    updates, _ = run(rule, gradients, state)
    expected, _ = run(without, gradients)
    for t, (update, alone) in enumerate(zip(updates, expected, strict=True), start=1):
        added = np.asarray(update["a"] - alone["a"]) / (0.2 * 4**0.5)
        if t < 4:
            np.testing.assert_allclose(added, 0.5 * 7, atol=1e-5)
        else:
            assert np.abs(added).max() < 0.5 * 1.21


def test_slow_factors_cost_nothing_off_their_clock(key):
    """Outside the branches of the program are the products of the fast factor only."""
    rule = scale_by_m3(periods=(1, 10, 100))
    gradient = some_gradients(key, 1, {"a": (4, 6)})[0]
    jaxpr = jax.make_jaxpr(rule.update)(gradient, rule.init(gradient)).jaxpr

    def count(jaxpr, into_branches):
        total = 0
        for equation in jaxpr.eqns:
            total += equation.primitive.name == "dot_general"
            if equation.primitive.name == "cond" and not into_branches:
                continue
            for inner in jax.tree.leaves(equation.params):
                inner = getattr(inner, "jaxpr", inner)
                total += count(inner, into_branches) if hasattr(inner, "eqns") else 0
        return total

    assert count(jaxpr, into_branches=False) == 15
    assert count(jaxpr, into_branches=True) == 3 * 15


def test_spread_takes_the_factors_one_after_another(key):
    gradients = some_gradients(key, 12)
    rule = scale_by_m3(periods=(1, 5), spread=True)
    _, states = run(rule, gradients)
    before = rule.init(gradients[0]).scales[1]
    for t, state in enumerate(states, start=1):
        after = state.scales[1]
        assert same(before.memory, after.memory) == (t % 5 != 0)
        changed = [n for n in SHAPES if not same(before.factor[n], after.factor[n])]
        assert len(changed) == (1 if t >= 5 and t % 5 < 3 else 0)
        if t in (9, 12):  # all have had their turn
            expected = factors_of(after.memory)
            close(after.factor, expected, atol=1e-5)
        before = after


def test_spread_over_one_leaf_changes_nothing(key):
    gradients = some_gradients(key, 7, {"a": (4, 6)})
    updates, _ = run(scale_by_m3(periods=(1, 3), spread=True), gradients)
    expected, _ = run(scale_by_m3(periods=(1, 3)), gradients)
    close(updates, expected, atol=1e-6)


def test_orthogonalised_over_a_mesh_it_is_the_same(key):
    """Parameters and state cut over four devices, by rows."""
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))
    shapes = {"a": (8, 4), "b": (4, 4, 8)}
    gradients = some_gradients(key, 5, shapes)
    settings = dict(periods=(1, 2), dtype=jnp.float32)
    expected, _ = run(scale_by_m3(**settings), gradients)
    rule = scale_by_m3(**settings, mesh=mesh)
    rows = NamedSharding(mesh, PartitionSpec("x"))
    cut = [jax.device_put(gradient, rows) for gradient in gradients]
    state = jax.tree.map(
        lambda x: jax.device_put(x, rows) if x.ndim else x, rule.init(cut[0])
    )
    step = jax.jit(rule.update)
    for gradient, there in zip(cut, expected, strict=True):
        update, state = step(gradient, state)
        close(update, there, atol=2e-5)
    assert len(state.scales[1].memory["a"].devices()) == 4


def test_a_row_that_gets_no_more_gradients_does_not_take_over(key):
    """V of the first factor alone would divide the slow one by next to nothing."""
    rule = scale_by_m3(periods=(1, 20), alpha=0.5, decays=(0.8, 0.9), beta2=0.8)
    gradients = np.array(jax.random.normal(key, (400, 6, 8)))
    gradients[30:, 0] = 0.0

    def step(state, gradient):
        update, state = rule.update(gradient, state)
        return state, jnp.sqrt(jnp.mean(update**2, axis=-1))

    _, rows = jax.lax.scan(step, rule.init(gradients[0]), gradients)
    assert (rows[:, 0] < 3 * rows[:, 1:].mean(-1)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_descends(key, variant):
    goal = jax.random.normal(key, (4, 6))
    rule = m3(optax.cosine_decay_schedule(0.3, 150), periods=(1, 5), variant=variant)
    w = jnp.zeros_like(goal)
    state = rule.init(w)
    step = jax.jit(rule.update)
    start = rms(w - goal)
    for _ in range(150):
        update, state = step(w - goal, state, w)
        w = w + update
    # The sums of the literal one forget no gradient, and its steps shrink as 1/sqrt(t).
    assert rms(w - goal) < {"literal": 0.5}.get(variant, 0.1) * start


def test_weight_decay_is_decoupled():
    rule = m3(0.1, weight_decay=0.5)
    w = 2 * jnp.ones((3, 3))
    update, _ = rule.update(jnp.zeros((3, 3)), rule.init(w), w)
    np.testing.assert_allclose(update, -0.1 * 0.5 * w, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(periods=(1, 0)), r"periods must be whole .* got \(1, 0\)"),
        (dict(periods=(1, 2.5)), r"periods must be whole .* got \(1, 2.5\)"),
        (dict(periods=(2, 10)), "periods must begin with 1"),
        (dict(periods=()), "periods must begin with 1"),
        (dict(decays=(0.9,)), r"decays has 1 values for periods \(1, 10\): give 2"),
        (dict(decays=(0.9, 1.0)), r"each of decays must be in \[0, 1\), got 1.0"),
        (dict(alpha=(0.1, 0.2)), r"alpha has 2 values for periods \(1, 10\): give 1"),
        (dict(alpha=-0.1), "alpha must be at least 0, got -0.1"),
        (dict(variant="muon"), "variant must be .* got 'muon'"),
        (dict(beta2=1.5), r"beta2 must be in \[0, 1\), got 1.5"),
        (dict(ns_steps=2.0), "ns_steps must be a whole number >= 1, got 2.0"),
        (dict(variant="literal", spread=True), "spread=True delays the factors"),
    ],
)
def test_wrong_arguments_say_so(settings, message):
    with pytest.raises(ValueError, match=message):
        scale_by_m3(**settings)


def test_leaves_that_are_no_matrices_are_named():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(3,\)"):
        m3(0.1).init({"bias": jnp.ones(3)})
