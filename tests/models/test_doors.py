"""What a model cannot read is refused at its door, and named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.data.tokenizer import ByteTokenizer
from hope_jax.models import lm
from hope_jax.stream import generate
from hope_jax.stream.reader import reader_of
from tests.models import small

CONFIG = dataclasses.replace(small.HOPE, layers=1)
TOKENS = np.arange(8).reshape(2, 4)


def read(tokens, state=None, **options):
    return lm.apply(*small.built(CONFIG), tokens, state, **options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([[1, -1]]), r"tokens must be ids in \[0, 13\), .* got -1"),
        (np.array([[1, 13]]), "got 13"),
        (np.array([[1, 2**32 + 5]]), "got 4294967301"),
        (np.array([[200]], np.uint8).view(np.int8), "got -56"),
        (np.array([[1.0]]), "tokens must be integers, got float64"),
        (np.zeros((2, 0), int), r"B >= 1 and T >= 1, got \(2, 0\)"),
        (np.zeros((0, 2), int), r"B >= 1 and T >= 1, got \(0, 2\)"),
        (np.zeros(3, int), r"got \(3,\)"),
    ],
)
def test_tokens_that_the_model_has_no_row_for(tokens, message):
    with pytest.raises(ValueError, match=message):
        read(tokens)


def test_labels_and_prompts_too():
    with pytest.raises(ValueError, match=r"labels must be ids in \[0, 13\), .* got 92"):
        read(TOKENS, labels=TOKENS + 92)
    reader, (_, params) = reader_of(CONFIG), small.built(CONFIG)
    with pytest.raises(ValueError, match="prompt must be ids in .* got 13"):
        generate.prefill(reader, params, np.array([1, 13]))


@pytest.mark.parametrize("tokens", [np.zeros((2, 0), int), np.zeros(3, int)])
def test_hidden_states_are_of_rows_of_tokens(tokens):
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\] with B >= 1"):
        lm.hidden_states(*small.built(small.TRANSFORMER), tokens)


def test_no_rows_and_no_tokens_are_asked_for():
    graphdef, params = small.built(CONFIG)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        lm.initial_state(graphdef, params, 0)
    given = small.start(CONFIG), jnp.zeros((2, 13)), lambda logits, x: logits
    with pytest.raises(ValueError, match="xs must lead with at least one token, got 0"):
        lm.write(graphdef, params, *given, jnp.zeros((0,)))


def test_any_integers_are_tokens():
    expected, _ = read(TOKENS)
    for dtype in (np.int64, np.int8, np.uint8):
        logits, _ = read(TOKENS.astype(dtype))
        np.testing.assert_array_equal(logits, expected)


def test_states_of_others():
    state = small.start(CONFIG)
    with pytest.raises(ValueError, match="state is of 2 rows, tokens of 3"):
        read(np.zeros((3, 1), int), state)
    with pytest.raises(ValueError, match="must be an LMState, .* got BlockState"):
        read(TOKENS, state.blocks)
    wider = dataclasses.replace(CONFIG, d_model=16)
    other = lm.initial_state(*small.built(wider), 2)
    with pytest.raises(ValueError, match=r"of another model: at state\.blocks\S* it"):
        read(TOKENS, other)
    other = lm.initial_state(*small.built(small.TRANSFORMER), 2)
    with pytest.raises(ValueError, match="of another model: at state"):
        read(TOKENS, other)


def test_a_state_of_a_row_with_a_horizon_reads_on():
    """It has fewer fast levels, and is still this model's."""
    _, state = read(TOKENS, labels=TOKENS, horizon=4)
    logits, _ = read(TOKENS, state, aligned=True)
    assert np.isfinite(logits).all()


def test_a_promise_of_alignment_is_checked():
    state = small.start(CONFIG)
    for t in range(5):
        state = one_by_one(TOKENS[:, t % 4, None], state)[1]
    with pytest.raises(ValueError, match=r"multiple of 4 tokens, .* is \[5, 5\]"):
        read(TOKENS, state, aligned=True)
    graphdef, params = small.built(CONFIG)
    inside = jax.jit(lambda s: lm.apply(graphdef, params, TOKENS, s, aligned=True)[0])
    assert np.isnan(inside(state)).all()
    _, state = one_by_one(TOKENS[:, :3], state)
    expected, _ = one_by_one(TOKENS, state)
    np.testing.assert_allclose(inside(state), expected, atol=1e-5)


def one_by_one(tokens, state):
    logits = []
    for t in range(tokens.shape[1]):
        y, state = small.read(CONFIG, tokens[:, t : t + 1], state, aligned=False)
        logits.append(np.asarray(y))
    return np.concatenate(logits, axis=1), state


def test_generation_says_when_there_is_nothing_to_draw_from():
    config = dataclasses.replace(CONFIG, vocab=ByteTokenizer().vocab_size)
    graphdef, params = small.built(config)
    broken = jax.tree.map(
        lambda w: jnp.asarray(np.full(w.shape, np.nan), w.dtype), params
    )
    made = generate.generate(
        reader_of(config), broken, ByteTokenizer(), b"", tokens=3, key=jax.random.key(0)
    )
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        next(made)


def without(params, *path):
    params = jax.tree.map(lambda a: a, params)
    *path, last = path
    inside = params
    for name in path:
        inside = inside[name]
    del inside[last]
    return params


def test_parameters_that_are_none_or_not_all():
    graphdef, params = small.built(CONFIG)
    state = small.start(CONFIG)
    doors = {
        "apply": lambda params: lm.apply(graphdef, params, TOKENS),
        "initial_state": lambda params: lm.initial_state(graphdef, params, 2),
        "watch": lambda params: lm.watch(graphdef, params, TOKENS, TOKENS, state),
        "unfold": lambda params: lm.unfold(graphdef, params, state),
    }
    for door in doors.values():
        with pytest.raises(ValueError, match="of build, got LMState; a state is an"):
            door(state)
        lacking = without(params, "blocks", "levels", 1, "mlp", "up", "kernel")
        with pytest.raises(ValueError, match="lack blocks.levels.1.mlp.up.kernel."):
            door(lacking)
    more = jax.tree.map(lambda a: a, params)
    more["again"] = more["rates"]
    with pytest.raises(ValueError, match="others: nothing asks for again."):
        doors["apply"](more)
    with pytest.raises(ValueError, match="graphdef must be that of build, got State"):
        lm.apply(params, params, TOKENS)
