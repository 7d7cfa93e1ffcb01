"""Rows of several documents: each is read as if there were no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import lm
from hope_jax.models.config import with_context
from tests import compare
from tests.models import small
from tests.models.test_promises import assert_same_state

close = compare.within_both(2e-5)

STRETCH, SPLIT, LENGTH = 8, 16, 32  # a document of two stretches, and one of two


MODELS = {
    "hope": small.HOPE,
    "two writes": small.TWO_WRITES,
    "hybrid": small.HYBRID,
    "transformer": with_context(small.TRANSFORMER, 20),
}


@functools.cache
def reading(name, stretches=LENGTH // STRETCH, labelled=False):
    graphdef, params = small.built(MODELS[name])

    def read(tokens, begins, state=None):
        labels = jnp.roll(tokens, -1, axis=1) if labelled else None
        flags = dict(labels=labels, aligned=True, horizon=None)
        return lm.apply(graphdef, params, tokens, state, begins=begins, **flags)

    return jax.jit(read)


@functools.cache
def alone(name, labelled):
    """Reading without any other document."""
    graphdef, params = small.built(MODELS[name])

    def read(tokens, after):
        return lm.apply(graphdef, params, tokens, labels=after if labelled else None)

    return jax.jit(read)


def beginning(*places):
    """Where documents of two rows begin, in stretches."""
    flags = np.zeros((2, LENGTH // STRETCH), bool)
    for row, place in places:
        flags[row, place] = True
    return flags


@pytest.mark.parametrize("labelled", [False, True], ids=["text", "labelled"])
@pytest.mark.parametrize("name", MODELS)
def test_a_document_is_read_as_if_it_were_alone(name, labelled):
    tokens = small.some_tokens(length=LENGTH)
    begins = beginning((0, 0), (0, 2))  # the other row is one document
    after = np.roll(tokens, -1, axis=1)
    logits, state = reading(name, labelled=labelled)(tokens, begins)
    expected, end = alone(name, labelled)(tokens[:, SPLIT:], after[:, SPLIT:])
    whole = alone(name, labelled)(tokens, after)
    close(logits[0, SPLIT:], expected[0])
    close(logits[1], whole[0][1])
    row = lambda tree, i: jax.tree.map(lambda a: a[i : i + 1], tree)  # noqa: E731
    assert_same_state(row(state, 0), row(end, 0))
    assert_same_state(row(state, 1), row(whole[1], 1))


@pytest.mark.parametrize("name", MODELS)
def test_what_one_document_says_never_reaches_the_next(name):
    """Within a document it does."""
    tokens = small.some_tokens(length=LENGTH)
    changed = tokens.copy()
    changed[:, SPLIT - 1] = (tokens[:, SPLIT - 1] + 1) % small.VOCAB
    begins = beginning((0, 2))
    read = reading(name)
    logits, others = read(tokens, begins)[0], read(changed, begins)[0]
    np.testing.assert_array_equal(logits[0, SPLIT:], others[0, SPLIT:])
    assert np.max(np.abs(logits[1, SPLIT:] - others[1, SPLIT:])) > 1e-4


def test_a_row_that_goes_on_may_meet_another_document():
    tokens = small.some_tokens(length=LENGTH)
    read = reading("hope")
    none = beginning()
    whole, _ = read(tokens, beginning((1, 3)))
    first, state = small.read(small.HOPE, tokens[:, :STRETCH])
    rest, _ = reading("hope", 3)(tokens[:, STRETCH:], beginning((1, 3))[:, 1:], state)
    close(jnp.concatenate([first, rest], axis=1), whole)
    assert np.max(np.abs(whole[1] - read(tokens, none)[0][1])) > 1e-4


def test_documents_begin_where_all_clocks_may():
    tokens = small.some_tokens(length=LENGTH)
    for begins, said in (
        (np.zeros((2, 16), bool), "stretches of a multiple of 4 tokens"),
        (np.zeros((2, 5), bool), r"S a divisor of these, got \(2, 5\)"),
        (np.zeros((1, 4), bool), r"begins must be \[B, S\] for 2 rows"),
    ):
        with pytest.raises(ValueError, match=said):
            lm.apply(*small.built(small.HOPE), tokens, begins=begins)
    state = lm.initial_state(*small.built(small.HOPE), 2)
    with pytest.raises(ValueError, match="begins needs aligned=True"):
        lm.apply(*small.built(small.HOPE), tokens, state, begins=beginning())
