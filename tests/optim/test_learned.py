"""Learned memories of gradients: what they are, what they see, how they learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.core.level import begin, unroll
from hope_jax.optim.meta import (
    Item,
    LearnedConfig,
    Task,
    init_learned,
    learned,
    memory_level,
    meta_train,
    solve,
)
from tests import compare

close = compare.within()

CONFIGS = {
    "recurrent": LearnedConfig(width=2, hidden=3, decay=0.8),
    "attention": LearnedConfig(
        memory="attention", width=2, window=3, hidden=3, decay=0.8
    ),
}
both = pytest.mark.parametrize("name", CONFIGS)


def some_meta(config, size=0.5):
    """Slow parameters of which none is zero."""
    meta = init_learned(jax.random.key(1), config)
    leaves, structure = jax.tree.flatten(meta)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        leaf + size * jax.random.normal(k, leaf.shape, leaf.dtype)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return structure.unflatten(moved)


def rule_of(name, rate=0.1, meta=None):
    config = CONFIGS[name]
    return learned(some_meta(config) if meta is None else meta, config, rate)


@functools.partial(jax.jit, static_argnums=0)
def live(name, gradients, meta=None):
    """Every update along a stream of gradients, and the last state."""
    rule = rule_of(name, meta=meta)
    at = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)

    def step(state, gradient):
        update, state = rule.update(gradient, state)
        return state, update

    state, updates = jax.lax.scan(step, rule.init(at), gradients)
    return updates, state


def stream(key, shape=(4,), steps=6):
    return jax.random.normal(key, (steps, *shape))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# What they compute -------------------------------------------------------------------


@both
def test_it_starts_as_rmsprop(key, name):
    g = stream(key)
    updates, _ = live(name, g, init_learned(key, CONFIGS[name]))
    with jax.numpy_dtype_promotion("standard"):
        rms = optax.scale_by_rms(0.8, eps=0.0, bias_correction=True)
        state = rms.init(g[0])
        for gradient, update in zip(g, updates, strict=True):
            expected, state = rms.update(gradient, state)
            close(update, -0.1 * expected)
    np.testing.assert_allclose(updates[0], -0.1 * jnp.sign(g[0]), rtol=1e-5)


def by_hand(name, meta, g, rate=0.1, decay=0.8):
    """One coordinate, written out with loops. `g` [T] -> updates [T]."""
    config = CONFIGS[name]
    (memory, net), out = jax.tree.map(np.asarray, meta), []
    square, peak, m, seen = 0.0, 0.0, np.zeros(config.width), []
    for t, g_t in enumerate(g):
        square = decay * square + (1 - decay) * g_t**2
        rms = np.sqrt(square / (1 - decay ** (t + 1)))
        peak = max(peak, rms)
        unit = g_t / rms
        even = np.array([1.0, np.log(abs(unit)) / 10, np.log(rms / peak) / 10])
        seen.append((unit, even))
        for j in range(config.width):
            if name == "recurrent":
                z = 1 / (1 + np.exp(-np.dot(memory.gate[j], even)))
                m[j] += z * (unit - m[j])
            else:
                past = list(reversed(seen))[: config.window]
                scores = [
                    memory.lag[j, age]
                    + memory.agree[j] * unit * u
                    + even @ memory.similar[j] @ e
                    for age, (u, e) in enumerate(past)
                ]
                weights = np.exp(scores) / np.sum(np.exp(scores))
                m[j] = np.dot(weights, [u for u, _ in past])
        x = np.concatenate([[abs(unit)], even[1:], np.abs(m), unit * m])
        y = net.w2 @ np.tanh(net.w1 @ x + net.b1) + net.b2
        direction = (1 + y[0]) * unit + np.dot(y[1:-1], m)
        out.append(-rate * direction * np.exp(6 * np.tanh(y[-1] / 6)))
    return np.array(out)


@both
def test_it_is_what_is_written_out_by_hand(key, name):
    g = stream(key) * jnp.geomspace(1.0, 0.01, 6)[:, None]
    meta = some_meta(CONFIGS[name])
    updates, _ = live(name, g, meta)
    for i in range(4):
        expected = by_hand(name, meta, np.asarray(g[:, i], np.float64))
        np.testing.assert_allclose(updates[:, i], expected, rtol=1e-4)


@both
def test_its_memory_is_the_level_that_it_names(key, name):
    """Its reads, and their pullbacks to the slow parameters, one number at a time."""
    config, meta = CONFIGS[name], some_meta(CONFIGS[name])
    g = stream(key, (), 7)
    rms = [
        np.sqrt(np.average(np.square(g[: t + 1]), weights=0.8 ** np.arange(t, -1, -1)))
        for t in range(7)
    ]
    items = Item(g / jnp.array(rms), jnp.log(rms / np.maximum.accumulate(rms)))

    def by_level(memory):
        level, context = memory_level(memory, config), items
        if name == "attention":
            context = (items, jnp.arange(7, dtype=jnp.int32))
        return unroll(level, begin(level, level.init(key)), context)[1]

    def by_optimizer(memory):
        def reading(j):  # a read-out that says number j, and nothing else
            w2, b2 = jnp.zeros_like(meta.readout.w2), jnp.zeros_like(meta.readout.b2)
            b2 = b2.at[0].set(-1.0).at[1 + j].set(1.0)
            readout = meta.readout._replace(w2=w2, b2=b2)
            return (
                -10.0 * live(name, g, meta._replace(memory=memory, readout=readout))[0]
            )

        return jnp.stack([reading(j) for j in range(config.width)], axis=1)

    def pulled(reads):
        out, pullback = jax.vjp(jax.jit(reads), meta.memory)
        return out, pullback(jnp.cos(jnp.arange(14.0)).reshape(7, 2))

    close(pulled(by_level), pulled(by_optimizer), rtol=1e-4, atol=1e-5)


def test_without_gates_that_move_the_recurrence_is_momentum(key):
    """Gates of 1/2 and 1/4 whatever comes: decayed means of the unit gradients."""
    meta, g = init_learned(key, CONFIGS["recurrent"]), stream(key)
    updates, state = live("recurrent", g, meta)
    m = np.zeros((4, 2))
    for unit in np.asarray(-10.0 * updates):
        m += np.array([1 / 2, 1 / 4]) * (unit[:, None] - m)
    close(state.memory, m)


# What they see -----------------------------------------------------------------------


@pytest.mark.slow
@both
def test_an_update_sees_all_gradients_before_it_and_none_after(key, name):
    g = stream(key, ())
    seen = jax.jacobian(lambda g: live(name, g)[0])(g)
    assert np.all(seen[np.triu_indices(6, 1)] == 0.0)
    assert np.all(np.abs(seen[np.tril_indices(6, -1)]) > 0.0)


def test_attention_forgets_what_is_older_than_its_window():
    """Gradients of one size, so that only signs can be remembered."""
    signs = jnp.array([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    g = signs[:, None] * jnp.ones((1, 4))
    other = g.at[1].set(-1.0)
    changed = {}
    for name in CONFIGS:
        meta = some_meta(CONFIGS[name])
        updates = [live(name, stream, meta)[0] for stream in (g, other)]
        changed[name] = np.asarray(updates[0] != updates[1]).all(1).tolist()
    assert changed["attention"] == [False, True, True, True, False, False]
    assert changed["recurrent"] == [False, True, True, True, True, True]


@both
def test_coordinates_are_alike_wherever_they_are(key, name):
    g = stream(key)
    updates, _ = live(name, g, some_meta(CONFIGS[name]))
    order = jnp.array([3, 0, 2, 1])
    turned, _ = live(name, g[:, order], some_meta(CONFIGS[name]))
    close(turned, updates[:, order])
    split, _ = live(name, {"a": g[:, :2].reshape(6, 1, 2), "b": g[:, 2]})
    close(split["a"].reshape(6, 2), updates[:, :2])
    close(split["b"], updates[:, 2])


@both
@pytest.mark.parametrize("scale", [2.0**-66, 1e20, -1.0])
def test_the_unit_of_gradients_does_not_matter_and_their_sign_turns_steps(
    key, name, scale
):
    g, meta = stream(key), some_meta(CONFIGS[name])
    scaled, plain = (live(name, x, meta)[0] for x in (scale * g, g))
    close(scaled, np.sign(scale) * plain, rtol=1e-4)


@both
def test_nothing_overflows_and_zeros_teach_nothing_wrong(name):
    meta, shape = some_meta(CONFIGS[name]), jnp.array([[1.0, -2.0, 0.0, 0.5]])

    @jax.jit
    def slopes(meta, g):
        return jax.grad(lambda m, g: jnp.sum(live(name, g, m)[0]), (0, 1))(meta, g)

    for scales in ([1e-20] * 6, [1e20] * 6, [0.0] * 6, [0.0, 1e20, 1e-20] * 2):
        g = jnp.array(scales)[:, None] * shape
        updates, state = live(name, g, meta)
        assert finite((updates, state)) and finite(slopes(meta, g))
        np.testing.assert_array_equal(updates[:, 2], 0.0)
    bound = 0.1 * np.exp(6.0) * 5 / np.sqrt(0.2)
    assert np.all(np.abs(updates) < bound)


# How they learn ----------------------------------------------------------------------


def ravine(key):
    """Two weights, one much steeper than the other, and one that does nothing."""
    turn, *start = jax.random.normal(key, (4,))
    steep, start = jnp.array([1.0, 0.03, 0.0]), jnp.stack(start) + 1.0

    def loss(w, key):
        noise = jax.random.uniform(key, (3,), w.dtype, 0.8, 1.2)
        x = jnp.cos(turn) * w[0] - jnp.sin(turn) * w[1]
        y = jnp.sin(turn) * w[0] + jnp.cos(turn) * w[1]
        return jnp.sum(steep * noise * jnp.stack([x, y, w[2]]) ** 2) + 1e-6

    return Task(start, loss)


@pytest.mark.slow
@both
def test_the_slow_gradient_is_that_of_finite_differences(key, float64, name):
    config = CONFIGS[name]
    task = ravine(key)
    meta = some_meta(config, 0.2)
    direction = some_meta(config, 0.2)

    @jax.jit
    @jax.value_and_grad
    def score(meta):
        return jnp.mean(jnp.log(solve(task, learned(meta, config, 0.1), 6, key)[1]))

    _, gradient = score(meta)
    assert finite(gradient)
    along = sum(
        jnp.vdot(d, g)
        for d, g in zip(*map(jax.tree.leaves, (direction, gradient)), strict=True)
    )
    eps = 1e-6
    there, back = (
        score(jax.tree.map(lambda m, d, s=s: m + s * eps * d, meta, direction))[0]
        for s in (1.0, -1.0)
    )
    assert abs(along) > 1e-3
    np.testing.assert_allclose(along, (there - back) / (2 * eps), rtol=1e-6)


def steps(rounds=1, outer=None, **changes):
    settings = dict(learning_rate=0.1, rounds=rounds, horizon=4, batch=3) | changes
    outer = optax.sgd(0.01) if outer is None else outer
    config = CONFIGS["recurrent"]
    return meta_train(ravine, config, outer, jax.random.key(3), **settings)


@pytest.mark.slow
def test_one_move_of_the_outer_level_by_hand():
    """Its gradient is the mean's over tasks, and goes through every inner step."""
    config, meta = CONFIGS["recurrent"], some_meta(CONFIGS["recurrent"], 0.2)
    (draw,) = jax.random.split(jax.random.split(jax.random.key(3))[1], 1)

    @jax.jit
    @jax.value_and_grad
    def score(meta, constant):
        stop = optax.stateless(
            lambda g, p: jnp.where(constant, jax.lax.stop_gradient(g), g)
        )

        def loss(key):
            rule = optax.chain(stop, learned(meta, config, 0.3))
            return jnp.log(solve(ravine(key), rule, 8, key)[1])

        return jnp.mean(jax.vmap(loss)(jax.random.split(draw, 3)))

    for changes, constant in (({}, False), ({"second_order": False}, True)):
        after = steps(start=meta, horizon=8, learning_rate=0.3, **changes)
        value, gradient = score(meta, constant)
        np.testing.assert_allclose(after.losses, [value], rtol=1e-4)
        moved = jax.tree.map(lambda m, start: (start - m) / 0.01, after.meta, meta)
        close(moved, gradient, rtol=2e-3, atol=1e-3)


@pytest.mark.slow
def test_a_life_cut_in_pieces_goes_on_where_it_was():
    """With slow parameters that stand still, pieces make the whole."""
    still = optax.set_to_zero()
    whole, pieces = steps(2, still), steps(2, still, truncation=2)
    assert whole.losses.shape == (2,) and pieces.losses.shape == (4,)
    close(pieces.losses.reshape(2, 2).mean(1), whole.losses)
    same(whole.meta, pieces.meta)
    mean = steps(2, still, objective="mean")
    assert np.all(np.log(mean.losses) > whole.losses)


def test_a_longer_life_begins_like_a_shorter_one(key):
    rule = rule_of("recurrent")
    long, short = (solve(ravine(key), rule, n, key) for n in (5, 3))
    close(long[1][:3], short[1])


@pytest.mark.slow
@both
def test_it_learns_to_solve_tasks_that_it_has_not_seen(key, name):
    config = CONFIGS[name]
    outer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.02))
    with jax.numpy_dtype_promotion("standard"):
        start = init_learned(jax.random.key(0), config)
        trained = meta_train(
            ravine,
            config,
            outer,
            jax.random.key(1),
            learning_rate=0.1,
            rounds=25,
            horizon=20,
            truncation=10,
            batch=8,
            start=start,
        )
    held_out = jax.random.split(jax.random.key(99), 32)

    @jax.jit
    def score(meta):
        def one(key):
            return solve(ravine(key), learned(meta, config, 0.1), 20, key)[1]

        return jnp.mean(jnp.log(jax.vmap(one)(held_out)))

    assert score(trained.meta) < score(start) - 1.0
    assert trained.losses[-4:].mean() < trained.losses[:4].mean() - 1.0


# How they fit in; more in test_conformance.py ---------------------------------------


def test_a_schedule_is_asked_at_every_step(key):
    g = stream(key)
    rule = rule_of("recurrent", lambda count: jnp.where(count < 2, 0.1, 0.3))

    @jax.jit
    def scheduled(g):
        step = lambda state, gradient: rule.update(gradient, state)[::-1]  # noqa: E731
        return jax.lax.scan(step, rule.init(g[0]), g)[1]

    plain, _ = live("recurrent", g, some_meta(CONFIGS["recurrent"]))
    close(scheduled(g), plain * jnp.array([[1.0], [1.0], *[[3.0]] * 4]))


def test_no_leaves_are_no_trouble():
    rule = rule_of("recurrent")
    assert rule.update({}, rule.init({}))[0] == {}


def test_choices_that_are_none_are_refused():
    for changes, message in (
        ({"memory": "lstm"}, "memory must be one of .* got 'lstm'"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"window": 4}, "recurrent memory has no window, got window=4"),
        ({"memory": "attention"}, "needs a window .* got window=None"),
        ({"memory": "attention", "window": 0}, "at least 1 gradient, got window=0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"span": 0.0}, "span must be positive and finite, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LearnedConfig(**changes)
    for changes, message in (
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"truncation": 3}, r"truncation \(3\) must divide the horizon \(4\)"),
        ({"objective": "last"}, "objective must be one of log, mean, got 'last'"),
    ):
        with pytest.raises(ValueError, match=message):
            steps(**changes)
    meta = init_learned(jax.random.key(0), CONFIGS["recurrent"])
    with pytest.raises(ValueError, match="meta is of another kind"):
        learned(meta, CONFIGS["attention"], 0.1)
    with pytest.raises(ValueError, match=r"meta has a leaf of shape \(2, 3\)"):
        learned(meta, LearnedConfig(width=4), 0.1)
