"""Memories that learn gradients, and weights that are memories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.core.level import begin, tick, unroll
from hope_jax.memory import bias, compose, features, named
from hope_jax.memory.compose import MemoryConfig, Tokens, memory_level
from hope_jax.optim.generalised import (
    attention_level,
    from_memory,
    ggd,
    gradient_level,
    gradient_start,
)
from hope_jax.optim.leaves import unit_rows
from hope_jax.optim.levels import from_level
from hope_jax.optim.rules.dgd import dgd
from tests import compare

close = compare.within()

ETA, ALPHA = 0.3, 0.9

LINEAR = MemoryConfig(
    architecture="linear", bias="l2", rule="gd", dgd="none", gradient="exact"
)
LONGHORN = named.longhorn().memory
MLP = MemoryConfig(architecture="mlp", expansion=2, rule="gd", chunk=1)


def stream(key, shape, steps=5):
    return jax.random.normal(key, (steps, *shape))


def live(rule, gradients):
    """The last state and every update along a stream of gradients."""

    def step(state, gradient):
        update, state = rule.update(gradient, state)
        return state, update

    return jax.lax.scan(step, rule.init(gradients[0]), gradients)


def updates(rule, gradients):
    return jax.jit(lambda g: live(rule, g)[1])(gradients)


# Memories of gradients.

CHOICES = {
    "bregman": {"retention": "bregman", "dgd": "none"},
    "elastic net": {"retention": "elastic_net", "retention_scale": 1e-3},
    "norm clamp": {"retention": "norm_clamp", "retention_scale": 9.0},
    "huber": {"bias": "huber"},
    "nesterov": {"rule": "nesterov", "retention": "none"},
    "adam": {"rule": "optax.adam", "dgd": "none"},
    "vector": {"architecture": "vector"},
    "after": {"recall": "after"},
    "deep": {"architecture": "deep_mlp", "depth": 3, "expansion": 2, "dgd": "input"},
}


def optimizer(name):
    """Every point of `memory.named`, and choices that none of them makes."""
    target = jnp.sign  # else a residual memory has nothing to learn
    if name in CHOICES:
        config = {"architecture": "linear", "rule": "gd", "chunk": 2} | CHOICES[name]
        return from_memory(0.1, MemoryConfig(**config), target=target)
    config = named.get(name).memory
    if config is None:
        context = 3 if name == "sliding_window" else 20
        return from_level(attention_level(0.1, target=target), context=context)
    return from_memory(0.1, config, target=target)


@pytest.mark.parametrize("name", [*named.POINTS, *CHOICES])
def test_every_memory_is_an_optimizer(name):
    """Down a bowl; its memory learns; of degree 1 in gradients of any size."""
    rule = optimizer(name)
    start = jnp.linspace(-1.0, 2.0, 12).reshape(4, 3)

    def descend(scale):
        def step(carry, _):
            at, state = carry
            update, state = rule.update(scale * at, state, at)
            return (at + update / scale, state), jnp.sum(at**2)

        first = rule.init(start)
        (_, last), losses = jax.lax.scan(step, (start, first), None, length=20)
        return losses, first, last

    losses, *states = jax.jit(jax.vmap(descend))(jnp.array([1.0, 2.0**-66, 2.0**66]))
    assert losses[0, -1] < 0.8 * losses[0, 0]
    close(losses[1:], jnp.broadcast_to(losses[0], (2, 20)), 1e-3)
    first, last = map(jax.tree.leaves, jax.tree.map(np.asarray, states))
    assert all(np.isfinite(leaf).all() for leaf in last)
    assert not all(map(np.allclose, first, last))


def as_tokens(config, gradients, inner_rate, retention, inertia):
    """The rows of a stream of gradients as the tokens of a memory."""
    rows = gradients.reshape(-1, gradients.shape[-1])
    v = unit_rows(rows)[0]
    there = jnp.any(rows != 0, axis=-1)
    coefficients = features.coefficients(config.features, config.degree)
    k = features.features(config.features, config.degree, v, coefficients)
    k = jnp.where(there[:, None], k, 0.0)
    each = jnp.ones(len(rows))
    return Tokens(
        k=k,
        v=v,
        q=k,
        eta=jnp.where(there, inner_rate, 0.0),
        alpha=retention ** (len(gradients) / len(rows)) * each,
        theta=inertia * each,
    )


def lived(config, tokens, seed):
    """The memory that has read `tokens`, by its definition, and its reads."""
    memory = memory_level(config, tokens.v.shape[-1])
    past = [jnp.zeros((config.window - 1, x.shape[-1])) for x in (tokens.k, tokens.v)]
    context = compose.level_context(config, tokens, past)
    standing = begin(memory, memory.init(jax.random.key(seed)))
    return unroll(memory, standing, context)


IN_TURN = {
    "implicit": (named.longhorn(4).memory, 6),
    "newton": (named.mesa(4).memory, 2),
    "oja": (named.ojanet(4).memory, 5),
    "steps": (named.delta_product(4).memory, 3),
    "channel": (named.kda(4).memory, 4),
    "window": (named.swla(4).memory, 6),
    "window, one row": (named.swla(4).memory, 1),
    "features and mirror": (
        MemoryConfig(
            expansion=2, features="polynomial", retention="bregman", dgd="none", chunk=4
        ),
        6,
    ),
    "mlp": (MemoryConfig(expansion=2, chunk=6), 4),
}


@pytest.mark.parametrize("name", IN_TURN)
def test_rows_in_turn_are_tokens_of_the_memory(key, name):
    """By its definition, with chunks that go on from one gradient to the next."""
    config, rows = IN_TURN[name]
    g = stream(key, (rows, 3)).at[2, rows // 2].set(0.0)
    rates = {"inner_rate": 0.1, "retention": ALPHA, "inertia": 0.5}
    rule = from_memory(ETA, config, rows="sequence", seed=3, **rates)

    @jax.jit
    def both(g):
        ours, out = live(rule, g)
        tokens = as_tokens(config, g, **rates)
        theirs = lived(config, tokens, 3)[0].params
        recalled = compose.build_architecture(config, 3).apply(theirs, tokens.q[-rows:])
        norm = jnp.linalg.norm(g[-1], axis=-1, keepdims=True)
        return (ours[0].params, out[-1]), (theirs, -ETA * norm * recalled)

    close(*both(g), 1e-3, 1e-5)


ONE_ROW = {
    "linear": LINEAR,
    "mlp": MLP,
    "anchored": MemoryConfig(expansion=2, rule="momentum", chunk=3, read="anchor"),
    "vector": MemoryConfig(
        architecture="vector", bias="dot", rule="gd", gradient="exact", read="pre"
    ),
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row_is_one_token_of_the_memory(key, name):
    """With one row the memory lives as on a stream of tokens, read either way."""
    config, g = ONE_ROW[name], stream(key, (3,), steps=7)
    rates = {"inner_rate": 0.2, "retention": ALPHA, "inertia": 0.5}

    @jax.jit
    def three(g):
        _, reads = lived(config, as_tokens(config, g, **rates), 3)
        return reads, *(
            updates(from_memory(1.0, config, rows=rows, seed=3, **rates), g)
            for rows in ("mean", "sequence")
        )

    reads, mean, sequence = three(g)
    close(mean, -jnp.linalg.norm(g, axis=1, keepdims=True) * reads, 1e-4, 1e-5)
    close(sequence, mean, 1e-4, 1e-5)


def test_the_way_rows_are_read_is_chosen_by_what_the_memory_can(key):
    g = stream(key, (2, 3), steps=3)

    @jax.jit
    def chosen(g):
        one = lambda config, **how: live(from_memory(ETA, config, **how), g)[1]  # noqa: E731
        return {
            rows: [one(config), one(config, rows=rows)]
            for rows, config in (("mean", LINEAR), ("sequence", LONGHORN))
        } | {"other": [one(LINEAR), one(LINEAR, rows="sequence")]}

    out = chosen(g)
    close(*out["mean"])
    close(*out["sequence"])
    assert not np.allclose(*out["other"], rtol=1e-2)


def test_rows_that_are_zero_are_no_rows(key):
    g = stream(key, (3, 2)).at[:, 1].set(0.0)
    two = jnp.array([0, 2])
    for rows in ("mean", "sequence"):
        rule = from_memory(ETA, named.delta_net().memory, rows=rows)
        out = updates(rule, g)
        close(out[:, two], updates(rule, g[:, two]))
        close(out[:, 1], jnp.zeros((5, 2)))


MUON = dict(architecture="linear", rule="muon", dgd="none", window=2, chunk=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "at, config",
    [(2, named.ojanet().memory), (0, MemoryConfig(features="polynomial", **MUON))],
    ids=["oja", "window of features"],
)
def test_a_gradient_of_zero_teaches_nothing(key, at, config):
    """Though its target is not zero, nor the features of a zero key."""
    rule = from_memory(ETA, config, retention=1.0, target=lambda g: g + 1.0)
    g = stream(key, (1, 3), steps=4)
    out = updates(rule, jnp.insert(g, at, 0.0, axis=0))
    close(out, jnp.insert(updates(rule, g), at, 0.0, axis=0))


@pytest.mark.slow
def test_attention_over_rows_by_hand(key):
    g = stream(key, (2, 3)).at[1, 0].set(0.0)
    every = updates(from_level(attention_level(ETA), context=9), g)
    close(every, unroll(attention_level(ETA), begin(attention_level(ETA), ()), g)[1])
    out = updates(from_level(attention_level(ETA), context=2), g)
    unit = np.asarray(unit_rows(g)[0]).reshape(5, 2, 3)
    for t, norms in enumerate(np.linalg.norm(g, axis=-1)):
        keys = unit[max(0, t - 1) : t + 1].reshape(-1, 3)
        keys = keys[np.any(keys != 0, axis=-1)]
        for r in range(2):
            s = np.exp(3**0.5 * keys @ unit[t, r])
            close(out[t, r], -ETA * norms[r] * (s @ keys) / s.sum(), 1e-4, 1e-5)


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
    """In whatever order they come."""
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
    out = updates(rule, g)
    close(out, jnp.asarray(np.stack(expected), jnp.float32), 1e-4, 1e-5)
    order = jnp.array([2, 0, 1])
    close(updates(rule, g[:, order]), out[:, order], 1e-4, 1e-5)


def test_the_level_and_the_transformation_are_one(key):
    g = stream(key, (2, 3))
    for config in (LINEAR, LONGHORN):
        level = gradient_level(ETA, config)
        by_level = from_level(level, gradient_start(config))
        close(updates(by_level, g), updates(from_memory(ETA, config), g))
        with pytest.raises(ValueError, match="as wide as the leaf"):
            level.init(key)


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


def test_leaves_of_any_shape():
    """Axes before the last number the rows, and a number is a row of one."""
    at = {"s": jnp.array(1.5, jnp.float32), "w": jnp.ones((2, 2, 3))}
    flat = {"s": jnp.array([[1.5]]), "w": jnp.ones((4, 3))}
    for config in (LINEAR, LONGHORN):
        rule = from_memory(ETA, config)
        move = jax.jit(lambda g, rule=rule: rule.update(g, rule.init(g))[0])
        close(move(at), jax.tree.map(lambda u, g: u.reshape(g.shape), move(flat), at))


def test_rows_in_turn_keep_types_take_injected_rates_and_compile_once(key):
    w = {"half": stream(key, (3,), 2).astype(jnp.bfloat16), "none": jnp.ones((0, 3))}
    with jax.numpy_dtype_promotion("standard"):
        rule = optax.inject_hyperparams(from_memory, static_args=("seed",))(
            learning_rate=0.1, config=LONGHORN, retention=0.5
        )
        state = rule.init(w)
        state.hyperparams["learning_rate"] = jnp.float32(0.2)
        step = jax.jit(rule.update)
        for _ in range(2):
            update, state = step(w, state, w)
    assert step._cache_size() == 1
    types = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)  # noqa: E731
    assert types(update) == types(w)
    half = w["half"].astype(jnp.float32)
    plain = updates(from_memory(0.2, LONGHORN, retention=0.5), jnp.stack([half, half]))
    close(update["half"].astype(jnp.float32), plain[-1], 1e-2)


def test_what_is_no_memory_of_gradients_is_refused():
    for name in ("longhorn", "mesa", "ojanet", "swla", "delta_product"):
        with pytest.raises(ValueError, match="one key after another: use rows='seq"):
            from_memory(0.1, named.get(name).memory, rows="mean")
    with pytest.raises(ValueError, match="rows must be .* got 'all'"):
        from_memory(0.1, LINEAR, rows="all")
    with pytest.raises(ValueError, match="config is None.*attention_level"):
        from_memory(0.1, named.get("softmax_attention").memory)
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


def one_step(rule, w, x, g):
    def step(w, x, g):
        return rule.update(g, rule.init(w), w, inputs=x)[0]

    return jax.jit(step)(w, x, g)


def test_ggd_with_the_dot_product_is_gradient_descent(key):
    w, x, _, g = layer(key)
    close(one_step(ggd(ETA, matrix(bias="dot")), w, x, g), -ETA * g)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_ggd_with_l2_is_delta_gradient_descent(key, batch):
    w, x, _, g = layer(key, batch=batch)
    step = one_step(ggd(ETA), w, x, g)
    close(step, one_step(dgd(ETA), w, x, g), 1e-4)
    turned = ggd(ETA, input_axis=-2)
    close(one_step(turned, w.mT, x, g.mT), step.mT)


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


BIASES = [dict(bias=name, threshold=0.5) for name in bias.BIASES]
RETENTIONS = {
    "none": {},
    "decay": {},
    "channel": {"gradient": "exact"},
    "oja": {"gradient": "exact"},
    "lq": {"retention_power": 2.5},
    "kl": {"retention_scale": 2.0},
    "bregman": {},
    "elastic_net": {"retention_scale": 1e-2},
    "norm_clamp": {"retention_scale": 1.5},
}


def grid(name):
    """Every bias with a retention; `channel` and `oja` are defined for the linear."""
    fits = {"channel": ("dot", "l2"), "oja": ("dot",)}.get(name, bias.BIASES)
    return {
        one: compose.with_choices(
            matrix(), bias=one, threshold=0.5, retention=name, **RETENTIONS[name]
        )
        for one in fits
    }


def explicit(config, w, x, u, eta):
    """One step of Definition 5, by the formulas of the MIRAS files."""
    loss = functools.partial(compose.build_bias(config), value=u, threshold=0.5)
    slope = jax.grad(lambda w: loss(w @ x))(w)
    if config.retention == "none":
        return w - eta * slope
    if config.retention == "oja":
        return ALPHA * w - eta * (slope + jnp.outer(u, u @ w))
    kept = config.chosen.retention
    if kept.mirrors:
        link = kept.link(config)
        return link.primal(ALPHA * link.dual(w) - eta * slope)
    moved = ALPHA * w - eta * slope
    if kept.landing is not None:
        return kept.landing(config)(moved)
    return moved


@pytest.mark.parametrize("name", RETENTIONS)
def test_ggd_with_every_bias_and_retention(key, name):
    w, x, delta, g = layer(key)
    w = 2.0 * jax.nn.softmax(w) if name == "kl" else w

    @jax.jit
    def steps(w, x, delta, g):
        out = {}
        for one, config in grid(name).items():
            loss = functools.partial(compose.build_bias(config), threshold=0.5)
            ours = w + one_step(ggd(0.002, config, retention=ALPHA), w, x, g)
            still = explicit(config, w, x, -delta, 0.0)  # forgets, learns nothing
            expected = explicit(config, w, x, -delta, 0.002)
            out[one] = ours, expected, loss(ours @ x, -delta), loss(still @ x, -delta)
        return out

    for one, (ours, expected, after, before) in steps(w, x, delta, g).items():
        close(ours, expected, 1e-4, 1e-5)
        assert after < before, one


def distance(w, start):
    return 0.5 * np.sum((w - start) ** 2, axis=(-2, -1))


def hypentropy(w, start):
    """The divergence whose mirror is `retention.hypentropy`, of scale 1."""
    potential = lambda w: w * np.arcsinh(w) - np.sqrt(w**2 + 1)  # noqa: E731
    gap = potential(w) - potential(start) - np.arcsinh(start) * (w - start)
    return np.sum(gap, axis=(-2, -1))


DIVERGENCES = {
    "none": distance,
    "decay": distance,
    "kl": lambda w, start: np.sum(w * np.log(w / start), axis=(-2, -1)),
    "bregman": hypentropy,
    "elastic_net": lambda w, start: (
        distance(w, start) + 1e-2 * np.sum(np.abs(w), axis=(-2, -1))
    ),
    "norm_clamp": distance,
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_step_is_the_minimum_of_definition_5(key, name):
    """argmin <grad l(W_t), W> + Ret(W, W_t) / eta: nothing near it is lower."""
    w, x, delta, g = layer(key)
    w = 2.0 * jax.nn.softmax(w) if name == "kl" else w
    kept = 1.0 if name in ("none", "kl", "bregman") else ALPHA
    rule = ggd(ETA, grid(name)["huber"], retention=kept)
    best = np.asarray(w + one_step(rule, w, x, g))
    w, x, delta = map(np.asarray, (w, x, delta))
    slope = np.outer(np.clip(w @ x + delta, -0.5, 0.5), x)

    def objective(new):
        linear = np.sum(slope * new, axis=(-2, -1))
        return linear + DIVERGENCES[name](new, kept * w) / ETA

    near = best + 0.05 * np.random.default_rng(0).normal(size=(400, *w.shape))
    if name == "kl":
        near = np.maximum(near, 1e-3)
        near = 2.0 * near / np.sum(near, axis=-1, keepdims=True)
    if name == "norm_clamp":  # within the ball, whose border is reached
        np.testing.assert_allclose(np.linalg.norm(best), 1.5, rtol=1e-5)
        size = np.linalg.norm(near, axis=(-2, -1), keepdims=True)
        near = near * np.minimum(1.0, 1.5 / size)
    else:
        assert objective(w) > objective(best) + 1e-3
    assert objective(near).min() >= objective(best) - 1e-5


def test_more_steps_come_nearer_to_the_minimum(key):
    """Each retains nothing but the first: steps on one pair approach W x = u."""
    w, x, delta, g = layer(key, norm=1.0)
    for steps in (1, 2, 3):
        rule = ggd(ETA, matrix(steps=steps, retention="decay"), retention=ALPHA)
        new, expected = w + one_step(rule, w, x, g), w
        for i in range(steps):
            kept = ALPHA if i == 0 else 1.0
            expected = kept * expected - ETA * jnp.outer(expected @ x + delta, x)
        close(new, expected, 1e-4, 1e-5)


def test_a_window_descends_the_pairs_of_the_last_tokens(key):
    rule = ggd(ETA, matrix(window=2))
    update = jax.jit(rule.update)
    w, state, past = layer(key)[0], None, None
    for i in range(3):
        _, x, delta, g = layer(jax.random.fold_in(key, i))
        state = rule.init(w) if state is None else state
        step, state = update(g, state, w, inputs=x)
        expected = -ETA * jnp.outer(w @ x + delta, x)
        if past is not None:
            expected -= ETA * jnp.outer(w @ past[0] + past[1], past[0])
        close(step, expected, 1e-4, 1e-5)
        w, past = w + step, (x, delta)


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
