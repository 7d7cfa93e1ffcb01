"""A text that ends in mid-chunk is read by the program of one that does not."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hope_jax.models import lm
from tests.conformance.test_mixers import ROWS, D, abstract, configured
from tests.models.small import HOPE

KINDS = ("self_modifying", "memory", "titans_mac", "tnt")


def lowered(kind, length):
    """The text of a loss's value and gradient, lowered; nothing is made or compiled."""
    graphdef, params = abstract(kind)
    x = jax.ShapeDtypeStruct((ROWS, length, D), jnp.float32)

    def loss(params, x):
        y, state = nnx.merge(graphdef, params)(x)
        return jnp.sum(y * y), state

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return step.lower(params, x).as_text()


@pytest.mark.parametrize("kind", KINDS)
def test_what_remains_has_no_body_of_its_own(kind):
    """Neither forward nor backward: as many products as of three whole spans, and a few
    lines that pad and cut."""
    span = configured(kind).span
    part, whole = (lowered(kind, n) for n in (2 * span + span // 2, 3 * span))
    products = [text.count("stablehlo.dot_general") for text in (part, whole)]
    lines = [len(text.splitlines()) for text in (part, whole)]
    assert products[0] <= products[1], products
    assert lines[0] <= 1.15 * lines[1], lines


def test_a_chunk_that_is_held_back_has_no_body_of_its_own():
    """The last base chunk, which teaches nothing while its last label is missing, is
    read by the products of the others, forward and backward."""
    graphdef, params = lm.abstract_model(HOPE)
    ids = jax.ShapeDtypeStruct((ROWS, 3 * HOPE.base_chunk), jnp.int32)
    after = jax.ShapeDtypeStruct((ROWS,), jnp.int32)

    def closed(params, tokens, labels):
        logits, _ = lm.apply(graphdef, params, tokens, labels=labels)
        return jnp.sum(lm.next_token_loss(logits, labels))

    def held(params, tokens, after):
        return jnp.sum(lm.apply(graphdef, params, tokens, after=after)[0])

    products = [
        jax.jit(jax.grad(loss))
        .lower(params, ids, given)
        .as_text()
        .count("stablehlo.dot_general")
        for loss, given in ((closed, ids), (held, after))
    ]
    assert products[1] <= products[0] + 2, products  # the head's, in its own loop
