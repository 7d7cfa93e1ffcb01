"""Memory Caching is its equations, token by token; a row has room for its context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.data.text import Document
from hope_jax.data.tokenizer import ByteTokenizer
from hope_jax.evaluate import ablation, language_model, telemetry
from hope_jax.memory.compose import MemoryConfig, build_architecture
from hope_jax.models import lm
from hope_jax.models.mixers.memory import MemoryMixer
from hope_jax.models.mixers.memory_caching import MemoryCachingConfig
from hope_jax.stream import generate
from hope_jax.stream.reader import reader_of
from hope_jax.stream.session import Limits, Sessions
from hope_jax.train.config import RunConfig, TrainConfig, check_rows
from tests import compare

close = compare.within_size(5e-5)
D, HEADS, ROWS, LENGTH = 8, 2, 2, 10
CONFIG = MemoryCachingConfig(
    memory=MemoryConfig(
        architecture="mlp", expansion=1, rule="gd", dgd="none", chunk=2
    ),
    conv=1,
    segment=4,
    context=16,
)
WAYS = {
    "residual": {"aggregate": "residual"},
    "gated": {"aggregate": "gated"},
    "sparse": {"aggregate": "sparse", "top": 1, "writes": "independent"},
}


def layer(config=CONFIG):
    made = config.build(D, HEADS, jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(made, nnx.Param)
    rng = np.random.default_rng(1)
    noise = lambda w: jnp.asarray(w + 0.2 * np.float32(rng.normal(size=w.shape)))  # noqa: E731
    return graphdef, jax.tree.map(noise, jax.device_get(params))


def text(seed=2, length=LENGTH):
    return jax.random.normal(jax.random.key(seed), (ROWS, length, D))


@functools.cache
def one_token():
    """The memory alone reads a token; its layer is that of all ways."""
    graphdef, _ = nnx.split(
        MemoryMixer(D, HEADS, CONFIG.layer(), jnp.float32, rngs=nnx.Rngs(0)), nnx.Param
    )

    @jax.jit
    def read(params, x, state):
        tokens, y, state = nnx.merge(graphdef, params).lives(x, state, False, True)
        return tokens.q[:, :, 0], y[:, :, 0], state

    return graphdef, read


def definition(config, params, x):
    """The equations with Python lists of what is kept."""
    graphdef, read = one_token()
    memory = nnx.merge(graphdef, params["memory"])
    state = memory.initial_state(ROWS)
    ask = jax.vmap(jax.vmap(build_architecture(config.memory, D // HEADS).apply))
    kept, means, segment, said = [], [], [], []
    for t in range(x.shape[1]):
        if config.writes == "independent" and t % config.segment == 0:
            state = state._replace(memory=memory.initial_state(ROWS).memory)
        token = x[:, t]
        q, live, state = read(params["memory"], token[:, None], state)
        segment.append(token)
        answers = [ask(weights, q) for weights in kept] + [live]
        if config.aggregate == "residual":
            y = sum(answers)
        else:
            u = token @ params["asks"]["kernel"][...]
            pools = [*means, sum(segment) / len(segment)]
            scores = jnp.stack([jnp.sum(u * pool, axis=-1) for pool in pools], axis=-1)
            if config.aggregate == "sparse" and len(kept) > config.top:
                rank = jnp.argsort(jnp.argsort(-scores[:, :-1], axis=-1), axis=-1)
                left = jnp.pad(rank >= config.top, ((0, 0), (0, 1)))
                scores = jnp.where(left, -jnp.inf, scores)
            gates = jax.nn.softmax(scores, axis=-1)
            y = sum(gates[:, i, None, None] * a for i, a in enumerate(answers))
        said.append(memory.said(token[:, None], y[:, :, None])[:, 0])
        if len(segment) == config.segment:
            kept.append(state.memory.weights)
            means.append(sum(segment) / len(segment))
            segment = []
    return jnp.stack(said, axis=1)


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_is_read_as_the_equations_say(way):
    """Values, and gradients in parameters and text, also through what is kept."""
    config = dataclasses.replace(CONFIG, **WAYS[way])
    graphdef, params = layer(config)

    def value_and_slope(run):
        def loss(params, x):
            y = run(params, x)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, text())

    fast = jax.jit(lambda: value_and_slope(lambda p, x: nnx.merge(graphdef, p)(x)[0]))()
    slow = value_and_slope(lambda p, x: definition(config, p, x))
    close(fast[0][1], slow[0][1])
    close(fast[1], slow[1])


def test_in_its_first_segment_it_is_the_memory_alone():
    graphdef, params = layer()
    made, x = nnx.merge(graphdef, params), text(length=4)
    close(made(x)[0], made.memory(x)[0])
    _, state = made(x, learn=False)
    assert not np.any(state.filled)
    assert np.any(made(x)[1].filled)


def test_a_row_longer_than_its_context_is_refused():
    graphdef, params = layer()
    made = nnx.merge(graphdef, params)
    with pytest.raises(ValueError, match=r"a row of 17 tokens .* context \(16\)"):
        made(text(length=17))
    _, state = made(text(length=12))
    with pytest.raises(ValueError, match="a row of 17 tokens"):
        made(text(length=5), state)
    y, _ = jax.jit(lambda x, state: made(x, state, aligned=False))(
        text(length=5), state
    )
    assert np.all(np.isfinite(y[:, :4])) and np.all(np.isnan(y[:, 4]))
    config = RunConfig(
        experiment="rows",
        row="long",
        model=lm.ModelConfig(d_model=8, heads=2, mixer=CONFIG),
        train=TrainConfig(steps=100, seq_len=32),
    )
    with pytest.raises(ValueError, match=r"seq_len \(32\) must be at most model.mixer"):
        check_rows(config)


def test_no_door_lets_a_row_grow_longer_than_its_room():
    """Where inside a program its logits would be NaN; nothing is lost."""
    model = lm.ModelConfig(d_model=D, heads=HEADS, layers=1, mixer=CONFIG)
    graphdef, params = lm.build(model, jax.random.key(0))
    reader, tokenizer = reader_of(model), ByteTokenizer()
    room = rf"longer than the {CONFIG.context} that memory_caching has room for"

    state = lm.initial_state(graphdef, params, 1)
    state = state._replace(position=jnp.full((1,), 12, jnp.int32))
    with pytest.raises(ValueError, match=r"a row \(17 tokens\) is " + room):
        lm.apply(graphdef, params, np.zeros((1, 5), np.int32), state)
    with pytest.raises(ValueError, match=r"what follows \(19 tokens\) is " + room):
        draws = dict(tokens=9, block=8, key=jax.random.key(0))
        generate.generate(reader, params, tokenizer, b"ab", **draws)
    for mode in ("reset", "carried"):
        documents = [Document("long", b"x" * 20)]
        with pytest.raises(ValueError, match=rf"mode '{mode}' .* is " + room):
            asked = dict(mode=mode, window=4, rows=1)
            language_model.score(reader, params, tokenizer, documents, **asked)
    with pytest.raises(ValueError, match=room):
        ablation.read_twice(reader, params, np.zeros((1, 13), np.int32), True)
    with pytest.raises(ValueError, match=room):
        telemetry.follow(model, params, np.zeros(70, np.int32))

    made = Sessions(model, params, tokenizer, limits=Limits(slots=1))
    made.open("ann")
    with pytest.raises(ValueError, match=r"'ann' \(17 tokens\) is " + room):
        made.ask("ann", "x" * 10, tokens=6, key=jax.random.key(0))
    made.ask("ann", "x" * 9, tokens=6, key=jax.random.key(0))  # and bos


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"segment": 3}, r"segment \(3\) must be a multiple of memory.chunk \(2\)"),
        (
            {"context": 4},
            r"context \(4\) must be a multiple of segment \(4\), at least",
        ),
        ({"top": 2}, "top=2 is read by nothing"),
        ({"aggregate": "sparse", "top": 4}, r"top \(4\) must be at most the 3"),
        ({"aggregate": "soup"}, "aggregate must be one of"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
