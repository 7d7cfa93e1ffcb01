"""Attention in blocks, losses a few tokens at a time, layers that are recomputed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import lm
from hope_jax.models.mixers import attention
from tests import compare
from tests.models import small

close = compare.within_both(2e-5)


@pytest.mark.parametrize("length, kv_heads", [(7, 2), (8, 1), (9, 2), (40, 2)])
def test_blocks_are_causal_attention(monkeypatch, length, kv_heads):
    """Values and pullbacks; a last block that is shorter, and the most blocks; keys and
    values with heads of their own, or with one for all."""
    monkeypatch.setattr(attention, "_BLOCK", 3)
    rng = np.random.default_rng(0)
    q, k, v, cotangent = rng.standard_normal((4, 2, length, 2, 4)).astype(np.float32)
    k, v = k[:, :, :kv_heads], v[:, :, :kv_heads]

    def whole(q, k, v):
        k, v = (jnp.repeat(a, 2 // kv_heads, axis=2) for a in (k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    @jax.jit
    def both(q, k, v):
        return [
            (y, pullback(cotangent))
            for y, pullback in (
                jax.vjp(read, q, k, v) for read in (whole, attention.causal)
            )
        ]

    expected, made = both(q, k, v)
    close(made, expected)
    program = str(jax.make_jaxpr(attention.in_blocks)(q, k, v))
    assert program.count("prevent_cse") == min(-(-length // 3), 8)


@pytest.mark.parametrize("name", ["hope", "transformer"])
def test_losses_are_those_of_the_logits(monkeypatch, name):
    """Of the last token as well, and their gradient."""
    monkeypatch.setattr(lm, "_SAID", 3)
    graphdef, params = small.built(small.MODELS[name])
    text = jnp.asarray(small.some_tokens(length=small.LENGTH + 1))
    tokens, after = text[:, :-1], text[:, -1]

    def from_logits(params):
        logits, state = lm.apply(graphdef, params, tokens)
        losses = lm.next_token_loss(logits, text[:, 1:])
        return losses.sum(), (losses, state)

    def at_once(params):
        losses, state = lm.apply(graphdef, params, tokens, after=after)
        return losses.sum(), (losses, state)

    @jax.jit
    def both(params):
        return [
            jax.value_and_grad(f, has_aux=True)(params) for f in (from_logits, at_once)
        ]

    expected, made = both(params)
    close(made, expected, 1e-4)


def test_no_more_logits_are_held_than_those_of_some_tokens(monkeypatch):
    monkeypatch.setattr(lm, "_SAID", 4)
    config = dataclasses.replace(small.TRANSFORMER, vocab=101)
    graphdef, params = small.built(config)
    tokens = jnp.zeros((3, 16), jnp.int32)

    def loss(params, after):
        said, _ = lm.apply(graphdef, params, tokens, after=after)
        return said.mean()

    after = jnp.zeros((3,), jnp.int32)
    program = jax.jit(jax.grad(loss)).lower(params, after).as_text()
    assert "4x3x101xf32" in program
    for whole in ("16x101", "16x3x101", "3x16x101"):
        assert whole not in program


def test_the_token_after_needs_rows_that_stand_at_a_boundary():
    graphdef, params = small.built(small.HOPE)
    tokens = small.some_tokens()
    state = lm.initial_state(graphdef, params, 2)
    for flags in (
        dict(after=tokens[:, 0], state=state),
        dict(after=tokens[:1, 0]),
        dict(after=tokens[:, 0], labels=tokens),
    ):
        with pytest.raises(ValueError, match=r"after must be \[B\] for 2 rows"):
            lm.apply(graphdef, params, tokens, **flags)


def test_layers_that_are_recomputed_say_the_same():
    config = dataclasses.replace(small.TRANSFORMER, remat=True)
    graphdef, params = small.built(config)
    tokens = small.some_tokens()

    def loss(graphdef, params):
        said, _ = lm.apply(graphdef, params, tokens, after=tokens[:, 0])
        return said.mean()

    plain = small.built(small.TRANSFORMER)[0]
    both = jax.jit(
        lambda p: [jax.value_and_grad(loss, 1)(g, p) for g in (plain, graphdef)]
    )
    expected, made = both(params)
    close(made, expected)
    assert "prevent_cse" in str(jax.make_jaxpr(lambda p: loss(graphdef, p))(params))


def test_a_row_that_begins_looks_at_no_empty_window():
    """A window of keys before the first token would be as many scores again."""
    length = 24
    config = dataclasses.replace(
        small.TRANSFORMER, mixer=attention.AttentionConfig(context=length)
    )
    graphdef, params = small.built(config)
    tokens = jnp.asarray(small.some_tokens(length=length))
    scores = lambda keys: f",{length},{keys}]"  # noqa: E731

    def program(state):
        read = lambda p, t, s: lm.apply(graphdef, p, t, s, aligned=True)  # noqa: E731
        return str(jax.make_jaxpr(read)(params, tokens, state))

    assert scores(length) in program(None)
    assert scores(2 * length) not in program(None)
    assert scores(2 * length) in program(small.start(config, len(tokens)))


def test_kernels_of_other_devices_are_in_nobodys_way():
    """Half precision and more than a block: where flash attention would be taken."""
    length = attention._BLOCK + 8
    config = dataclasses.replace(
        small.TRANSFORMER,
        mixer=attention.AttentionConfig(context=length, head_dim=8),
        dtype="bfloat16",
    )
    graphdef, params = lm.abstract_model(config)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    read = lambda p, t: lm.apply(graphdef, p, t)  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix types
        logits, _ = jax.eval_shape(read, params, tokens)
    assert logits.shape == (1, length, config.vocab)
