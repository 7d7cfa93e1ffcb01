"""Every named memory, and a sample of the grid of choices, against its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.select import memory_scan
from hope_jax.memory import named
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_architecture,
    key_width,
    with_choices,
)
from hope_jax.memory.state import begin_memory

WIDTH, CHUNK, LENGTH = 4, 4, 10

POINTS = {
    name: make().memory
    for name, make in named.POINTS.items()
    if make().memory is not None
}

_ANCHORED = dict(rule="gd", dgd="none", retention="none")
_EXACT = dict(architecture="linear", gradient="exact", dgd="none")
GRID = {
    "vector exact": _EXACT | dict(architecture="vector", rule="gd"),
    "vector momentum": _EXACT | dict(architecture="vector"),
    "vector nesterov dgd": _EXACT
    | dict(architecture="vector", rule="nesterov", dgd="both", bias="dot"),
    "vector anchored huber": dict(architecture="vector", bias="huber", dgd="none"),
    "matrix nesterov": _EXACT | dict(rule="nesterov", dgd="both"),
    "matrix two equal steps": _EXACT | dict(rule="gd", steps=2),
    "matrix channel l2 dgd": _EXACT | dict(rule="gd", retention="channel", dgd="both"),
    "gated dgd momentum": dict(architecture="gated_mlp"),
    "deep nesterov": dict(architecture="deep_mlp", depth=3, rule="nesterov"),
    "implicit huber_norm": _ANCHORED | dict(rule="implicit", bias="huber_norm"),
    "value_shift elastic": _ANCHORED
    | dict(bias="value_shift", retention="elastic_net", retention_scale=1e-3),
    "kl clamp": dict(
        bias="kl", retention="norm_clamp", retention_scale=1.2, dgd="none"
    ),
    "bregman momentum": _ANCHORED | dict(retention="bregman", rule="momentum"),
    "window nesterov": dict(rule="nesterov", dgd="none", window=3),
    "window clamp": _ANCHORED | dict(window=2, retention="norm_clamp"),
    "adam dgd": dict(rule="adam", dgd="input"),
    "muon matrix": dict(architecture="linear", rule="muon", dgd="none", bias="lp"),
    "muon clamp": dict(rule="muon", dgd="none", retention="norm_clamp"),
    "optax rmsprop": dict(rule="optax.rmsprop", dgd="none"),
    "optax adagrad lq": dict(rule="optax.adagrad", dgd="none", retention="lq"),
    "steps of an mlp": _ANCHORED | dict(steps=3, chunk=1),
    "pre": dict(read="pre"),
    "pre states": dict(read="pre", rule="adam", dgd="none"),
    "anchor states": dict(read="anchor", rule="muon", dgd="none"),
}
MEMORIES = POINTS | {
    name: MemoryConfig(**dict(chunk=CHUNK) | choices) for name, choices in GRID.items()
}


def small(name):
    config = MEMORIES[name]
    return with_choices(config, chunk=min(config.chunk, CHUNK), expansion=2)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def some_tokens(config, length, seed=0):
    rng = np.random.default_rng(seed)
    wide = key_width(config, WIDTH)
    several = config.steps > 1 and config.gradient == "exact" and config.dgd != "none"
    steps = (config.steps,) if several else ()

    def normal(*shape):
        return rng.normal(size=(length, *shape))

    def uniform(*shape):
        return rng.uniform(size=(length, *shape))

    channels = (wide,) if config.retention == "channel" else ()
    tokens = Tokens(
        k=unit(normal(*steps, wide)),
        v=unit(normal(*steps, WIDTH)),
        q=unit(normal(wide)),
        eta=0.2 * uniform(),
        alpha=0.6 + 0.4 * uniform(*channels),
        theta=0.8 * uniform(),
        threshold=0.5 + uniform() if config.window == 1 else None,
        weights=uniform(config.window) if config.window > 1 else None,
    )
    return jax.tree.map(np.float32, tokens)


def some_start(config, seed=6):
    """Weights away from zero, where every gradient has something to see."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(build_architecture(config, WIDTH).init, jax.random.key(0))
    return {
        name: np.float32(0.7 * rng.normal(size=w.shape)) for name, w in shapes.items()
    }


def scan(config, impl):
    def run(start, tokens):
        return memory_scan(config, begin_memory(config, start), tokens, impl=impl)

    return run


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def value_and_pullback(run, *args):
    out, pullback = jax.vjp(run, *args)

    def wave(x):
        if not is_float(x):
            return np.zeros(x.shape, jax.dtypes.float0)
        return np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    return out, pullback(jax.tree.map(wave, out))


@pytest.mark.parametrize("name", MEMORIES)
def test_chunks_are_the_level(name):
    """Values and pullbacks in the start and in every leaf of the tokens."""
    config = small(name)
    args = some_start(config), some_tokens(config, LENGTH)
    forms = [scan(config, impl) for impl in ("chunk", "reference")]
    both = jax.jit(lambda *args: [value_and_pullback(form, *args) for form in forms])
    fast, reference = jax.device_get(both(*args))
    # Newton-Schulz stretches what is small up to 484 times, and layer normalisation
    # what hardly varies: rounding errors with it.
    tolerance = 1e-4 if config.rule == "muon" else 3e-5 if config.norm else 1e-5

    def close(path, a, b):
        if b.dtype == jax.dtypes.float0:
            return
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.all(np.isfinite(b)), path
        scale = 1.0 + np.max(np.abs(b))
        np.testing.assert_allclose(
            a / scale, b / scale, atol=tolerance, rtol=0, err_msg=f"{name} {path}"
        )

    jax.tree_util.tree_map_with_path(close, fast, reference)

    both(some_start(config, 2), some_tokens(config, LENGTH, 3))
    assert both._cache_size() == 1


@pytest.mark.parametrize("name", MEMORIES)
def test_the_state_is_float32(name):
    config = small(name)
    tokens = some_tokens(config, CHUNK)
    shapes = jax.eval_shape(scan(config, "chunk"), some_start(config), tokens)[0]
    for leaf in jax.tree.leaves(shapes):
        assert leaf.dtype in (jnp.float32, jnp.int32), leaf


def bounded(config, tokens):
    """Rates as layers bound them: a chunk's anchored gradients add up."""
    exact = config.gradient == "exact"
    eta = tokens.eta if exact else tokens.eta / config.chunk
    return tokens._replace(eta=eta * (1.0 - tokens.theta))


@pytest.mark.parametrize("name", MEMORIES)
def test_finite_after_100k_tokens_of_correlated_keys(name):
    """Keys at a mutual cosine of 0.9, at high rates, with a half-life of 700 tokens."""
    config = with_choices(MEMORIES[name], expansion=2)
    length, pieces = 25_600, 4
    some = some_tokens(config, length)
    k = unit(some.k + 3.0 * some.k[:1])
    tokens = some._replace(
        k=k,
        q=k.reshape(k.shape[0], -1, k.shape[-1])[:, 0],
        eta=np.full_like(some.eta, 0.9),
        alpha=np.full_like(some.alpha, 0.999),
        theta=np.full_like(some.theta, 0.5),
    )
    tokens = bounded(config, tokens)

    @jax.jit
    def read(state, tokens):
        state, y = memory_scan(config, state, tokens, remat=False)
        return state, jnp.max(jnp.abs(y))

    state = jax.jit(functools.partial(begin_memory, config))(some_start(config))
    for _ in range(pieces):
        state, largest = read(state, tokens)
        assert np.isfinite(largest), largest
    for leaf in jax.tree.leaves(state):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("dgd", ["input", "both"])
def test_an_erase_rate_is_that_of_the_matrices_that_forget(dgd):
    config = MemoryConfig(rule="gd", dgd=dgd, expansion=2, chunk=CHUNK)
    tokens = some_tokens(config, LENGTH)._replace(
        erase_rate=np.full(LENGTH, 0.3, np.float32)
    )
    start = some_start(config)
    fast, reference = (
        jax.jit(scan(config, impl))(start, tokens) for impl in ("chunk", "reference")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), fast, reference
    )


def test_an_erase_key_of_its_own_is_read_or_refused():
    exact = dict(architecture="linear", gradient="exact", bias="dot", chunk=CHUNK)
    config = MemoryConfig(rule="gd", **exact)
    tokens = some_tokens(config, LENGTH)
    tokens = tokens._replace(erase_key=tokens.q)
    start = some_start(config)
    _, y = jax.jit(scan(config, "chunk"))(start, tokens)
    _, expected = jax.jit(scan(config, "reference"))(start, tokens)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for choices in (
        exact | dict(rule="momentum"),
        exact | dict(rule="gd", architecture="vector"),
        dict(rule="gd"),
    ):
        config = MemoryConfig(**choices)
        with pytest.raises(ValueError, match="erase_key .* need architecture='linear'"):
            jax.eval_shape(scan(config, "chunk"), some_start(config), tokens)


# Rules that write a pair so that its key answers with its value, when no two keys
# overlap: a full step of each.
RECALL = [
    "linear_attention",
    "gla",
    "swla",
    "ojanet",
    "delta_net",
    "gated_delta_net",
    "delta_product",
    "kda",
    "comba",
    "mesa",
]


@pytest.mark.parametrize("name", RECALL)
def test_orthogonal_pairs_are_recalled_exactly(name):
    config = dataclasses.replace(small(name), features="none")
    tokens = some_tokens(config, WIDTH)
    ones = np.ones(WIDTH)
    k, v = np.eye(WIDTH), unit(tokens.v)
    if config.retention == "oja":
        v = np.eye(WIDTH)[::-1]  # it erases along values: these must not overlap
    if config.steps > 1:  # the second step of a token writes nothing
        k = np.stack([k, np.zeros_like(k)], 1)
        v = np.stack([v[:, 0], np.zeros_like(v[:, 0])], 1)
    tokens = Tokens(
        k=k,
        v=v,
        q=np.eye(WIDTH),
        eta=ones,
        alpha=np.ones_like(tokens.alpha),
        theta=0 * ones,
        weights=None if config.window == 1 else np.eye(config.window)[:1].repeat(4, 0),
    )
    config = with_choices(config, ridge=1e-6)
    start = {"w": np.zeros((WIDTH, WIDTH), np.float32)}
    run = jax.jit(scan(config, "auto"))
    state, _ = run(start, jax.tree.map(np.float32, tokens))
    values = v if v.ndim == 2 else v[:, 0]
    np.testing.assert_allclose(np.asarray(state.weights["w"]).T, values, atol=1e-5)
