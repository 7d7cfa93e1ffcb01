"""In-Place TTT is its definition, and at the start a static MLP."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.models import lm
from hope_jax.models.mixers.in_place_ttt import InPlaceTTTConfig
from tests import compare

close = compare.within_size(2e-5)
D, ROWS, LENGTH = 6, 2, 11
CONFIG = InPlaceTTTConfig(chunk=4, expansion=2, past=2, future=1, clip=2.0)


def layer(config=CONFIG, moved=0.3):
    made = config.build(D, 1, jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(made, nnx.Param)
    rng = np.random.default_rng(1)
    noise = lambda w: jnp.asarray(w + moved * np.float32(rng.normal(size=w.shape)))  # noqa: E731
    return graphdef, jax.tree.map(noise, jax.device_get(params))


def text(seed=2):
    return jax.random.normal(jax.random.key(seed), (ROWS, LENGTH, D))


def definition(config, params, x):
    """One row, token by token and value by value, as the equations have it."""
    kernel, w = params["conv"][...], params["mlp"]["down"]["kernel"][...]
    target = params["target"]["kernel"][...]
    gate, up = (params["mlp"][name]["kernel"][...] for name in ("gate", "up"))
    y = []
    for start in range(0, LENGTH, config.chunk):
        chunk = x[start : start + config.chunk]
        hidden = [jax.nn.silu(token @ gate) * (token @ up) for token in chunk]
        y += [h @ w for h in hidden]
        if len(chunk) < config.chunk:
            break
        move = jnp.zeros_like(w)
        for t, h in enumerate(hidden):
            value = jnp.zeros(D)
            for tap, weight in enumerate(kernel):
                at = t + tap - config.past
                if 0 <= at < config.chunk:
                    value = value + weight * chunk[at]
            move = move + config.rate * jnp.outer(h, value @ target)
        if config.clip is not None:
            norm = jnp.sqrt(jnp.sum(move**2))
            move = move * jnp.minimum(1.0, config.clip / norm)
        w = w + move
    return jnp.stack(y)


@pytest.mark.parametrize("clip", [None, 2.0])  # that one of two moves exceeds
def test_chunks_are_the_definition(clip):
    """Values, and gradients in parameters and text."""
    config = dataclasses.replace(CONFIG, clip=clip)
    graphdef, params = layer(config)

    def fast(params, x):
        return nnx.merge(graphdef, params)(x)[0]

    def slow(params, x):
        params = nnx.to_pure_dict(params)
        return jnp.stack([definition(config, params, row) for row in x])

    def value_and_pullback(run):
        y, pull = jax.vjp(run, params, text())
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    close(jax.jit(lambda: value_and_pullback(fast))(), value_and_pullback(slow))


def test_it_starts_as_its_static_self_and_learns_to_move():
    config = dataclasses.replace(CONFIG, clip=None)
    graphdef, params = nnx.split(
        config.build(D, 1, jnp.float32, rngs=nnx.Rngs(0)), nnx.Param
    )
    made, x = nnx.merge(graphdef, params), text()
    close(made(x)[0], made.mlp(x))
    slope = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x)[0] ** 2))(params)
    assert np.any(slope["conv"][...])


def test_what_is_read_without_learning_teaches_nothing():
    graphdef, params = layer()
    made, x = nnx.merge(graphdef, params), text()
    _, state = made(x[:, :6], learn=False)
    np.testing.assert_array_equal(state.weights, made.initial_state(ROWS).weights)
    _, on = made(x[:, 6:8], state, aligned=False)  # the last half of a chunk
    _, other = made(-x[:, :6], learn=False)
    _, same = made(x[:, 6:8], other, aligned=False)
    np.testing.assert_array_equal(on.weights, same.weights)
    assert np.any(on.weights != state.weights)


def test_beside_attention_it_is_a_model():
    """The paper's layers: a pattern, which trains and reads on."""
    config = lm.ModelConfig(
        vocab=11, d_model=8, layers=2, heads=2, mixer="attention,in_place_ttt"
    )
    assert [m.kind for m in config.pattern] == ["attention", "in_place_ttt"]
    assert config.mixer_chunk == 64


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"clip": -1.0}, "clip must be positive or None, got -1.0"),
        ({"activation": "rely"}, "activation must be one of"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        InPlaceTTTConfig(**changes)
