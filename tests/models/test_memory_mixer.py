"""The layer that reads any memory keeps the promises of every layer, and its gates are
their formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.memory import features
from hope_jax.memory.compose import MemoryConfig, with_choices
from hope_jax.memory.gates import GateConfig
from hope_jax.models.layers import rotary
from hope_jax.models.mixers.memory import MemoryMixer, MemoryMixerConfig
from tests import compare
from tests.models import small
from tests.models.test_promises import mix

close = compare.within_size(1e-5)

D, HEADS, ROWS, LENGTH, CHUNK = 8, 2, 2, 10, 4


def configured(gates=None, conv=3, rank=2, **memory):
    plain = MemoryConfig(chunk=CHUNK, expansion=2, rule="gd", dgd="none")
    return MemoryMixerConfig(
        memory=with_choices(plain, **memory),
        gates=GateConfig(**(gates or {})),
        conv=conv,
        rank=rank,
    )


exact = functools.partial(
    configured, architecture="linear", gradient="exact", bias="dot"
)

# Each with other gates: together they make every parameter a mixer can have.
CONFIGS = {
    "mlp with momentum": configured(rule="momentum", dgd="both"),
    "mlp with a budget": configured(rate_law="budget"),
    "several writes a token": exact(dgd="both", recall="after", steps=2),
    "feedback, constant, rotary": exact(
        dict(erase="feedback", retention="constant", rotary=True, unit_values=True),
        dgd="both",
    ),
    "channels": exact(
        dict(rate="one", erase="channel"), dgd="both", retention="channel"
    ),
    "step": exact(dict(rate="step", unit_keys=False), features="elu", conv=1),
    "window, features, muon": configured(
        rule="muon", window=2, features="polynomial", architecture="linear"
    ),
    "threshold, read at the anchor, projection": configured(
        dict(threshold="token"),
        architecture="linear",
        bias="huber_norm",
        rule="nesterov",
        retention="elastic_net",
        retention_scale=1e-4,
        read="anchor",
    ),
    "mirror": configured(architecture="linear", retention="kl"),
}


@functools.cache
def build(name):
    """A layer none of whose parameters is at a special value, as pure functions."""
    layer = MemoryMixer(D, HEADS, CONFIGS[name], jnp.float32, rngs=nnx.Rngs(0))
    return small.shaken(layer)


@functools.cache
def compiled(name, aligned, learn):
    graphdef, _ = build(name)
    return jax.jit(
        lambda params, x, state: nnx.merge(graphdef, params)(
            x, state, aligned=aligned, learn=learn
        )
    )


@functools.cache
def start(name):
    return small.begun(*build(name), ROWS)


def read(name, x, state=None, aligned=False, learn=True):
    state = start(name) if state is None else state
    params, x = build(name)[1], jnp.asarray(x)
    y, state = compiled(name, aligned, learn)(params, x, state)
    return np.asarray(y), state


def tokens_of(name, x, **changes):
    """What the layer gives its memories, with some parameters set to a number."""
    graphdef, params = build(name)
    params = params | {
        n: params[n].replace(jnp.float32(np.full(params[n].shape, v)))
        for n, v in changes.items()
    }

    @jax.jit
    def make(params, x, state):
        return nnx.merge(graphdef, params).tokens(x, state)[0]

    made = jax.device_get(make(params, x, start(name)))
    return nnx.merge(graphdef, params), made


def texts(length=LENGTH, seed=2):
    return small.drawn(ROWS, length, D, seed=seed)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_make_the_whole(name):
    """Of 1, 3 and 7 tokens, with a save between them, each length compiled once."""
    x = texts()
    expected, end = read(name, x, aligned=True)
    assert np.isfinite(expected).all()
    for count, size in enumerate((1, 3, 7)):
        state, reads = start(name), []
        for begin in range(0, LENGTH, size):
            y, state = read(name, x[:, begin : begin + size], state)
            state = jax.device_put(jax.device_get(state))
            reads.append(y)
        close(np.concatenate(reads, axis=1), expected)
        close(state, end)
        assert compiled(name, False, True)._cache_size() == count + 1


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_see_neither_the_future_nor_other_rows(name):
    x = texts()
    for length, aligned in ((LENGTH, True), (7, False)):
        y, state = read(name, x[:, :length], aligned=aligned)
        for token in (3, 4, length - 1):
            changed = x[:, :length].copy()
            changed[1, token] += 1.0
            z, other = read(name, changed, aligned=aligned)
            equal(z[1, :token], y[1, :token])
            assert np.any(z[1, token] != y[1, token])
            first = lambda s: jax.tree.map(lambda a: np.asarray(a)[0], s)  # noqa: E731
            equal(first((z, other)), first((y, state)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns(name):
    graphdef, params = build(name)
    x = jnp.asarray(texts(2 * CHUNK))

    def loss(params):
        y, _ = nnx.merge(graphdef, params)(x)
        return jnp.sum(y * np.cos(np.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(params)):
        gradient = gradient[...]
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient != 0), path


@pytest.mark.parametrize("name", CONFIGS)
def test_without_learning_the_memory_stays(name):
    """Bit by bit, also over the end of a chunk, where only the anchor moves on."""
    x = texts(14)
    _, state = read(name, x[:, :7])
    y, after = read(name, x[:, 7:], state, learn=False)
    equal(*(s.memory._replace(anchor=None, left=None) for s in (after, state)))
    if state.memory.anchor is not None:
        equal(after.memory.anchor, state.memory.weights)
    assert np.isfinite(y).all()
    assert after.position.tolist() == [14, 14]


def test_reading_without_learning_is_reading_at_a_rate_of_zero():
    """From its start, a memory whose tokens write and forget nothing."""
    name = "mlp with momentum"
    _, params = build(name)
    for gate, value in (("eta", -1e9), ("alpha", 1e9)):
        bias = params[gate]["up"]["bias"]
        params = params | {
            gate: params[gate]
            | {
                "up": params[gate]["up"]
                | {"bias": bias.replace(jnp.float32(np.full(bias.shape, value)))}
            }
        }
    x = texts()
    still, _ = compiled(name, True, True)(params, x, start(name))
    frozen, _ = compiled(name, False, False)(params, x, start(name))
    learning, _ = read(name, x, aligned=True)
    close(frozen, still)
    assert np.abs(learning - still).max() > 1e-3


def test_a_frozen_anchor_moves_where_the_chunk_ends():
    """Tokens before the boundary see the anchor, as they would while learning; those
    after it the last weights, read at once or in pieces."""
    name = "threshold, read at the anchor, projection"
    x = texts(13)
    _, state = read(name, x[:, :6])
    whole, end = read(name, x[:, 6:], state, learn=False)
    learning, _ = read(name, x[:, 6:], state)
    close(whole[:, :2], learning[:, :2])
    assert np.abs(whole - learning)[:, 2:].max() > 1e-3
    y, state = read(name, x[:, 6:9], state, learn=False)
    z, state = read(name, x[:, 9:], state, learn=False)
    close(np.concatenate([y, z], axis=1), whole)
    equal(state, end)


@pytest.mark.parametrize("name", ["mlp with momentum", "feedback, constant, rotary"])
def test_rows_stand_where_they_stand(name):
    """Rows at different places of their chunks go on as each would by itself."""
    x = texts()
    _, behind = read(name, x[:, :3])
    _, ahead = read(name, x[:, 3:6], behind)
    mixed = mix(ahead, behind)
    y, _ = read(name, np.stack([x[0, 6:9], x[1, 3:6]]), mixed)
    expected, _ = read(name, x, aligned=True)
    close(y, np.stack([expected[0, 6:9], expected[1, 3:6]]))


@pytest.mark.parametrize("name", ["mlp with momentum", "channels"])
def test_a_state_between_chunks_goes_on_in_parallel(name):
    x = texts(8)
    expected, end = read(name, x, aligned=True)
    y, state = read(name, x[:, :4], aligned=True)
    z, state = read(name, x[:, 4:], state, aligned=True)
    close(np.concatenate([y, z], axis=1), expected)
    close(state, end)


@pytest.mark.parametrize("name", CONFIGS)
def test_memories_and_rates_stay_in_float32(name):

    def run(x):
        layer = MemoryMixer(D, HEADS, CONFIGS[name], jnp.bfloat16, rngs=nnx.Rngs(0))
        y, state = layer(x)
        return y, state, layer(x, state)[1], layer.tokens(x, state)[0]

    x = texts().astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # for the library's own norm
        y, state, again, rates = jax.eval_shape(run, x)
    assert y.dtype == jnp.bfloat16
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, again, state)
    assert jax.tree.all(same)
    floats = {a.dtype for a in jax.tree.leaves((state.memory, state.tails, rates))}
    assert floats - {jnp.dtype("int32")} == {jnp.dtype("float32")}


def heads_first(x):
    return np.moveaxis(np.asarray(x), 2, 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(x, 0)


def made(gate, x):
    """The affine map of a gate, written out: [B, T, D] -> [B, H, T, ...]."""
    x = np.asarray(x)
    if gate.down is not None:
        x = x @ np.asarray(gate.down.kernel[...])
    x = x @ np.asarray(gate.up.kernel[...]) + np.asarray(gate.up.bias[...])
    return heads_first(x.reshape(*x.shape[:2], *gate.shape))


def test_token_rates_are_bounded_sigmoids():
    layer, tokens = tokens_of("mlp with momentum", texts())
    theta = sigmoid(made(layer.theta, texts()))
    eta = sigmoid(made(layer.eta, texts())) / CHUNK
    close(tokens.theta, theta)
    close(tokens.eta, eta * (1.0 - theta))
    close(tokens.alpha, sigmoid(made(layer.alpha, texts())))


def test_constant_retention_is_retnets():
    _, tokens = tokens_of("feedback, constant, rotary", texts())
    for head, alpha in enumerate((1 - 2.0**-5, 1 - 2.0**-6)):
        equal(tokens.alpha[:, head], np.full((ROWS, LENGTH), alpha, np.float32))


def test_a_step_is_mamba_2s():
    layer, tokens = tokens_of("step", texts())
    step = softplus(made(layer.eta, texts()))
    decay = np.exp(np.asarray(layer.log_decay[...]))
    close(tokens.eta, step)
    close(tokens.alpha, np.exp(-decay[None, :, None] * step))


def test_channels_are_rwkv_7s():
    name = "channels"
    layer, tokens = tokens_of(name, texts())
    a = sigmoid(made(layer.erase, texts()))
    assert a.shape == (ROWS, HEADS, LENGTH, D // HEADS)
    key = tokens_of(name, texts(), replacement=0.0)[1].k
    each = lambda p: np.asarray(p[...])[None, :, None]  # noqa: E731
    gone = key * each(layer.removal)
    gone = gone / np.linalg.norm(gone, axis=-1, keepdims=True)
    close(tokens.erase_rate, a)
    close(tokens.erase_key, gone)
    close(tokens.k, key * (1.0 + (a - 1.0) * each(layer.replacement)))
    close(tokens.alpha, sigmoid(made(layer.alpha, texts())))
    equal(tokens.eta, np.ones((ROWS, HEADS, LENGTH)))


def test_feedback_is_combas():
    name = "feedback, constant, rotary"
    layer, tokens = tokens_of(name, texts())
    q = tokens_of(name, texts(), correction=0.0)[1].q
    each = lambda p: np.asarray(p[...])[None, :, None]  # noqa: E731
    close(tokens.q, q - each(layer.correction)[..., None] * tokens.k)
    close(tokens.erase_rate, sigmoid(each(layer.feedback)) * tokens.eta)
    close(np.linalg.norm(tokens.k, axis=-1), np.ones_like(tokens.eta))
    close(np.linalg.norm(tokens.v, axis=-1), np.ones_like(tokens.eta))


def test_rotary_keys_turn_with_the_rows_position():
    layer, tokens = tokens_of("feedback, constant, rotary", texts())
    position = np.int32([5, 9])
    later = start("feedback, constant, rotary")._replace(position=position)
    moved, _ = jax.jit(lambda x, state: layer.tokens(x, state))(texts(), later)
    turn = np.broadcast_to(position[:, None], (ROWS, LENGTH))
    close(moved.k, heads_first(jax.jit(rotary)(heads_first(tokens.k), turn)))


def test_several_writes_have_their_own_keys_values_and_rates():
    _, tokens = tokens_of("several writes a token", texts())
    shape = (ROWS, HEADS, LENGTH, 2)
    assert tokens.k.shape == tokens.v.shape == (*shape, D // HEADS)
    assert tokens.eta.shape == shape and tokens.alpha.shape == shape[:-1]
    for one in (tokens.k, tokens.v, tokens.eta):
        assert np.abs(one[:, :, :, 0] - one[:, :, :, 1]).min() > 0


def test_windows_and_thresholds_are_made_of_the_token():
    layer, tokens = tokens_of("window, features, muon", texts())
    close(tokens.weights, sigmoid(made(layer.weights, texts())))
    layer, tokens = tokens_of("threshold, read at the anchor, projection", texts())
    close(tokens.threshold, softplus(made(layer.threshold, texts())))


def test_each_head_maps_its_keys_by_its_own_coefficients():
    name = "window, features, muon"
    layer, tokens = tokens_of(name, texts())
    memory = layer.config.memory
    width = features.width("polynomial", memory.degree, D // HEADS)
    assert tokens.k.shape == (ROWS, HEADS, LENGTH, width)
    for head, coefficients in enumerate(np.asarray(layer.coefficients[...])):
        constant = np.broadcast_to(coefficients[0], (ROWS, LENGTH))
        close(tokens.k[:, head, :, 0], constant)  # the monomial of degree 0
        close(tokens.q[:, head, :, 0], constant)


@pytest.mark.parametrize(
    "gates, memory, met",
    [
        ({}, dict(features="polynomial", bias="l2"), "k"),
        (dict(unit_keys=False), dict(dgd="both"), "k"),
        ({}, dict(retention="oja"), "v"),
    ],
)
def test_rates_shrink_where_a_step_erases_along_a_long_vector(gates, memory, met):
    """A step is at most one along any key, or any value where values erase."""
    layer = MemoryMixer(D, HEADS, exact(gates, **memory), jnp.float32, rngs=nnx.Rngs(0))
    layer.k.kernel[...] = jnp.asarray(5.0 * np.asarray(layer.k.kernel[...]))
    layer.v.kernel[...] = jnp.asarray(5.0 * np.asarray(layer.v.kernel[...]))
    make = jax.jit(lambda x: layer.tokens(x, layer.initial_state(ROWS))[0])
    tokens = jax.device_get(make(texts()))
    square = np.sum(getattr(tokens, met) ** 2, axis=-1)
    assert square.max() > 2.0
    eta = sigmoid(made(layer.eta, texts()))
    close(tokens.eta, eta / np.maximum(1.0, square))


@pytest.mark.parametrize("retention", ["constant", "token"])
def test_a_rate_that_may_turn_falls_with_what_is_retained(retention):
    gates = dict(rate_bound=2.0, retention=retention)
    layer = MemoryMixer(
        D, HEADS, exact(gates, dgd="both"), jnp.float32, rngs=nnx.Rngs(0)
    )
    make = jax.jit(lambda x: layer.tokens(x, layer.initial_state(ROWS))[0])
    tokens = jax.device_get(make(texts()))
    assert 0 < tokens.alpha.min() and tokens.alpha.max() < 1
    close(tokens.eta, sigmoid(made(layer.eta, texts())) * (1.0 + tokens.alpha))


@pytest.mark.parametrize(
    "bound, config",
    [
        (1.0, exact(dgd="both")),
        (1.0, exact(bias="l2")),
        (0.5, exact(bias="l2", dgd="both")),
        (1 / CHUNK, configured()),
        (1 / (3 * CHUNK), configured(window=3)),
        (0.7, configured(dict(rate_bound=0.7))),
    ],
)
def test_rates_are_bounded_by_construction(bound, config):
    assert config.rate_bound == pytest.approx(bound)


@pytest.mark.parametrize(
    "gates, memory",
    [
        ({}, {}),
        ({}, dict(retention="channel")),
        (dict(rate="step"), {}),
        (dict(rate="step"), dict(retention="channel")),
    ],
)
def test_at_the_start_a_memory_outlives_its_chunk(gates, memory):
    config = exact(gates, chunk=16, rank=8, **memory)
    half_life = half_lives(dataclasses.replace(config, half_life_start=32.0))
    assert half_life.min() >= 16
    assert half_life.max() <= 100 * 16


def half_lives(config):
    """In tokens, of a fresh layer."""

    @jax.jit
    def of(x):
        layer = MemoryMixer(32, 4, config, jnp.float32, rngs=nnx.Rngs(0))
        tokens, _ = layer.tokens(x, layer.initial_state(1))
        return -1.0 / jnp.log2(tokens.alpha)

    return of(small.drawn(1, 256, 32))


def test_the_first_half_life_is_what_is_asked_for_whatever_an_exact_chunk():
    config = exact(chunk=16, retention="decay")
    for asked in (40.0, 640.0):
        of = half_lives(dataclasses.replace(config, half_life_start=asked))
        quickest = float(jnp.median(of[0, 0]))
        assert 0.8 * asked < quickest < 1.2 * asked
    other = exact(chunk=64, retention="decay")
    np.testing.assert_array_equal(half_lives(config), half_lives(other))


def test_an_anchored_memory_outlives_two_chunks():
    config = configured(chunk=64, retention="decay")
    half_life = half_lives(dataclasses.replace(config, half_life_start=8.0))
    assert 0.8 * 128 < float(jnp.median(half_life[0, 0])) < 1.2 * 128


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: configured(conv=0), "conv must be at least 1, got 0"),
        (lambda: configured(rank=0), "rank must be at least 1, got 0"),
        (
            lambda: MemoryMixerConfig(half_life_start=float("inf")),
            "half_life_start must be a number of tokens, at least 1, got inf",
        ),
        (
            lambda: dataclasses.replace(exact(retention="none"), half_life_start=128.0),
            "half_life_start=128.0 .*memory.retention='none' .* 'decay' or",
        ),
        (
            lambda: MemoryMixerConfig(
                gates=GateConfig(retention="one"), half_life_start=128.0
            ),
            "half_life_start=128.0 .*gates.retention='one' .* 'token' would",
        ),
        (
            lambda: configured(dict(rate="step")),
            "rate='step' has no bound.* got 'l2', 'none', 'gd'. Use gates.rate='token'",
        ),
        (
            lambda: exact(dict(rate="step"), steps=2),
            "rate='step' needs memory.steps=1, got 2",
        ),
        (
            lambda: exact(dict(rate="one", rate_bound=0.5)),
            r"rate_bound \(0.5\) bounds gates.rate='token', got 'one'",
        ),
        (
            lambda: exact(dict(rate_bound=1.5), bias="l2", dgd="both"),
            r"rate_bound \(1.5\) must be at most 1: this memory erases 2 times",
        ),
        (
            lambda: exact(dict(retention="constant"), retention="channel"),
            "retention='channel' needs .* got 'constant'",
        ),
        (
            lambda: exact(dict(erase="feedback")),
            "erase='feedback' .* got 'none' and 1",
        ),
        (
            lambda: exact(dict(erase="feedback"), dgd="both", steps=2),
            "erase='feedback' .* got 'both' and 2",
        ),
        (
            lambda: configured(dict(erase="channel"), dgd="both"),
            "erase='channel' .* got 'mlp', 'anchored', 'none', 'l2', 'gd'",
        ),
        (
            lambda: configured(dict(threshold="token")),
            "threshold='token' needs memory.bias .* got 'l2'",
        ),
        (
            lambda: configured(dict(threshold="token"), bias="huber", window=2),
            "threshold='token' needs .* window=1, got .* 2",
        ),
        (
            lambda: MemoryMixer(9, 2, exact(), jnp.float32, rngs=nnx.Rngs(0)),
            r"d_model \(9\) must be a multiple of heads \(2\)",
        ),
        (
            lambda: MemoryMixer(
                6, 2, exact(dict(rotary=True)), jnp.float32, rngs=nnx.Rngs(0)
            ),
            "must be even for gates.rotary=True, got 6 / 2 = 3",
        ),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
