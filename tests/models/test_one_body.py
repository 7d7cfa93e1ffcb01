"""A text that ends in mid-chunk is read by the program of one that does not."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.conformance.test_mixers import ROWS, D, abstract, configured

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
