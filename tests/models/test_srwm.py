"""The self-referential matrix: a loop in NumPy, and what it does not learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.models.mixers.lstm import LSTMConfig
from hope_jax.models.mixers.srwm import SRWMConfig
from tests import compare

close = compare.within_size(2e-5)
D, HEADS, ROWS, LENGTH = 6, 2, 2, 9


def text():
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, LENGTH, D)).astype(np.float32)


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_srwm_is_its_equations():
    layer = SRWMConfig(rate_start=0.3).build(D, HEADS, jnp.float32, rngs=nnx.Rngs(0))
    x, width = text(), D // HEADS
    expected = np.zeros_like(x)
    for row in range(ROWS):
        for head in range(HEADS):
            w = np.asarray(layer.matrix[...])[head].astype(np.float64)
            at = slice(head * width, (head + 1) * width)
            for t in range(LENGTH):
                y, k, q, rate = np.split(w @ softmax(x[row, t, at]), [3, 6, 9])
                k, q, rate = softmax(k), softmax(q), sigmoid(rate)
                each = np.concatenate(
                    [np.full(3, r) for r in rate[:3]] + [[rate[3]] * 4]
                )
                w = w + np.outer(each * (w @ q - w @ k), k)
                expected[row, t, at] = y
    expected = expected @ np.asarray(layer.out.kernel[...])
    y, state = layer(jnp.asarray(x))
    close(y, expected)
    assert np.abs(state.weights - layer.matrix[...][None]).max() > 1e-3


def test_srwm_begins_at_its_rate():
    layer = SRWMConfig(rate_start=0.2).build(128, 1, jnp.float32, rngs=nnx.Rngs(0))
    said = layer.matrix[...][0, -4:] @ jax.nn.softmax(jnp.ones(128))
    close(jax.nn.sigmoid(said), 0.2 * np.ones(4), 0.1)


def test_srwm_kept_still_changes_nothing():
    layer = SRWMConfig().build(D, HEADS, jnp.float32, rngs=nnx.Rngs(0))
    y, state = layer(jnp.asarray(text()), learn=False)
    np.testing.assert_array_equal(state.weights, layer.initial_state(ROWS).weights)
    first, _ = layer(jnp.asarray(text())[:, :1])
    close(y[:, :1], first)


def test_lstm_is_its_equations():
    layer = LSTMConfig(forget_start=2.0).build(D, 1, jnp.float32, rngs=nnx.Rngs(0))
    x = text()
    given, recurrent = (
        np.asarray(m.kernel[...]) for m in (layer.input, layer.recurrent)
    )
    h = c = np.zeros((ROWS, D))
    for t in range(LENGTH):
        i, f, o, z = np.split(x[:, t] @ given + h @ recurrent, 4, axis=1)
        c = sigmoid(f + 2.0) * c + sigmoid(i) * np.tanh(z)
        h = sigmoid(o) * np.tanh(c)
    y, state = layer(jnp.asarray(x))
    close(y[:, -1], h)
    close(state.cell, c)


def test_bad_rates_are_refused():
    with pytest.raises(ValueError, match=r"rate_start must lie in \(0, 1\), got 1.0"):
        SRWMConfig(rate_start=1.0)
