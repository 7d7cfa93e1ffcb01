"""Logits of some places alone, and texts that are told from one vector."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.data.synthetic.in_context import InContextConfig
from hope_jax.data.synthetic.recall import RecallConfig
from hope_jax.evaluate import answers
from hope_jax.models import autoencoder, lm
from tests import compare
from tests.models import small

close = compare.within_both(2e-5)
TOKENS = small.some_tokens()


@pytest.mark.parametrize("name", ["hope_attention", "transformer"])
def test_some_logits_are_those_of_all(name):
    """With levels that move, by the loss of every token, and without."""
    graphdef, params = small.built(small.MODELS[name])
    at = jnp.array([[3, 0, 20], [5, 5, 19]])

    def both(params):
        every, _ = lm.apply(graphdef, params, TOKENS)
        some, _ = lm.apply(graphdef, params, TOKENS, at=at)
        return jnp.take_along_axis(every, at[..., None], axis=1), some

    expected, made = jax.jit(both)(params)
    assert made.shape == (2, 3, small.VOCAB)
    np.testing.assert_array_equal(made, expected)


def test_other_logits_are_not_made():
    graphdef, params = small.built(small.TRANSFORMER)
    at = jnp.zeros((2, 3), jnp.int32)
    made = jax.make_jaxpr(lambda p: lm.apply(graphdef, p, TOKENS, at=at)[0])(params)
    assert "f32[2,3,13]" in str(made) and "f32[2,21,13]" not in str(made)


def test_most_tasks_ask_of_few_places(key):
    task = RecallConfig(vocab=32, pairs=2, length=12)
    at, there = answers.questions(task, task.batch(key, 3))
    assert at is not None and at.shape == there.mask.shape == (3, task.asked)
    assert task.asked < 12 and there.mask.all()
    task = InContextConfig(length=12)  # of all
    assert answers.questions(task, task.batch(key, 3))[0] is None


def test_places_are_of_rows_that_stand_at_a_boundary():
    graphdef, params = small.built(small.TRANSFORMER)
    at = jnp.zeros((2, 3), jnp.int32)
    for flags in (
        dict(at=at[0][None]),
        dict(at=at, after=TOKENS[:, 0]),
        dict(at=at, aligned=False),
    ):
        with pytest.raises(ValueError, match=r"at must be \[B, Q\] for 2 rows, with"):
            lm.apply(graphdef, params, TOKENS, **flags)


def test_vectors_are_what_the_head_reads():
    graphdef, params = small.built(small.TRANSFORMER)

    def both(params):
        logits, _ = lm.apply(graphdef, params, TOKENS)
        x = lm.hidden_states(graphdef, params, TOKENS)
        return logits, x @ params["embed"]["embedding"][...].T

    close(*jax.jit(both)(params))
    graphdef, params = small.built(small.HOPE)
    with pytest.raises(ValueError, match="'hope' has CMS levels of periods 4, 8"):
        lm.hidden_states(graphdef, params, TOKENS)


def test_a_text_is_told_from_its_last_vector():
    """That holds what tokens there are, and where; the decoder sees nothing else."""
    config = dataclasses.replace(small.TRANSFORMER, mixer="softmax_attention")
    graphdef, params = autoencoder.build(config, jax.random.key(0))
    tokens = jnp.asarray(TOKENS)

    @jax.jit
    def read(tokens):
        def one(params):
            logits = autoencoder.apply(graphdef, params, tokens)
            return logits[0, 3, 2], logits

        (_, logits), gradient = jax.value_and_grad(one, has_aux=True)(params)
        return logits, gradient

    logits, gradient = read(tokens)
    assert logits.shape == (2, 21, small.VOCAB) and logits.dtype == jnp.float32
    for place in (0, 11):
        other, _ = read(tokens.at[0, place].set((tokens[0, place] + 1) % small.VOCAB))
        assert (np.abs(other[0] - logits[0]).max(axis=-1) > 0).all()  # everywhere
        np.testing.assert_array_equal(other[1], logits[1])
    encoder = gradient["encoder"]
    assert float(jnp.abs(encoder["embed"]["embedding"][...]).max()) > 0
    assert (np.abs(logits[0, 1:] - logits[0, :-1]).max(axis=-1) > 0).all()


def test_places_are_told_apart():
    """Each is nearest to itself, and to its neighbours next."""
    made = autoencoder.sinusoids(32, 16)
    assert made.shape == (32, 16)
    alike = np.asarray(made @ made.T)
    np.testing.assert_allclose(np.diag(alike), 8.0, rtol=1e-6)
    assert (alike.argmax(axis=1) == np.arange(32)).all()
    assert (np.diag(alike, 1) > np.diag(alike, 2)[0]).all()
