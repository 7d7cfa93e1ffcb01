"""What `memory_scan` cannot read is refused, and types are reconciled at its door."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.kernels.select import memory_scan
from hope_jax.memory.compose import MemoryConfig
from hope_jax.memory.state import commit
from tests.kernels.test_select import some_state, some_tokens

CONFIG = MemoryConfig(chunk=4, expansion=2)
MESA = MemoryConfig(
    architecture="linear", gradient="exact", rule="newton", dgd="none", chunk=4
)


@pytest.mark.parametrize("config", [CONFIG, MESA], ids=["mlp", "mesa"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_tokens_are_read_in_the_type_of_the_weights(config, dtype):
    state, tokens = some_state(0, config), some_tokens(0, 6)
    narrow = tokens._replace(
        **{name: getattr(tokens, name).astype(dtype) for name in "kvq"}
    )
    same = narrow._replace(
        **{name: getattr(narrow, name).astype(jnp.float32) for name in "kvq"}
    )
    run = jax.jit(lambda tokens: memory_scan(config, state, tokens))
    (end, y), (expected, y_expected) = run(narrow), run(same)
    assert y.dtype == jnp.float32
    # To the last digit or the one before: a cast may be joined to what follows it.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)
    close(y, y_expected)
    jax.tree.map(close, end, expected)


@pytest.mark.parametrize("config", [CONFIG, MESA], ids=["mlp", "mesa"])
def test_wide_tokens_too(config):
    state, tokens = some_state(0, config), some_tokens(0, 6)
    run = jax.jit(lambda tokens: memory_scan(config, state, tokens))
    expected = run(tokens)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tokens)
        found = run(wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found,
        expected,
    )


def but_third(tokens, retained):
    alpha = np.array(tokens.alpha)
    alpha[2] = retained
    return tokens._replace(alpha=alpha)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: jax.tree.map(lambda a: np.asarray(a)[:0], t),
            "T >= 1, .* k \\(0,\\)",
        ),
        (lambda t: t._replace(v=np.asarray(t.v)[:3]), "one time T >= 1"),
        (lambda t: t._replace(eta=jnp.float32(0.1)), "one time T >= 1"),
        (lambda t: t._replace(k=np.asarray(t.k)[:, 0]), "k must be"),
        (lambda t: but_third(t, 1.5), r"\[0, 1\], got 1.5"),
        (lambda t: but_third(t, -0.5), r"\[0, 1\], got -0.5"),
        (lambda t: but_third(t, np.nan), "got nan"),
        (lambda t: t._replace(v=np.asarray(t.v)[:, 0]), r"v must be \[T, V\]"),
        (lambda t: t._replace(eta=np.asarray(t.k)), r"eta must be \[T\] of one"),
        (lambda t: t._replace(alpha=np.ones_like(t.k)), r"alpha must be \[T\] of"),
        (lambda t: t._replace(theta=np.zeros_like(t.k)), r"theta must be \[T\] of"),
        (lambda t: jax.tree.map(lambda a: np.asarray(a)[:, None], t), "k must be"),
        (lambda t: t._replace(k=np.asarray(t.k)[:, 1:]), "k must be . wide"),
        (lambda t: t._replace(q=np.asarray(t.q)[:, 1:]), "q must be . wide"),
    ],
)
def test_tokens_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        memory_scan(CONFIG, some_state(0, CONFIG), change(some_tokens(0, 6)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t._replace(alpha=np.ones_like(t.eta)), r"alpha must be \[T\] of"),
        (lambda t: t._replace(v=np.asarray(t.v)[:, :1]), "v must bring 2 steps each"),
    ],
)
def test_writes_of_a_token_that_make_no_sense(change, message):
    """Retention acts once a token, so it has no number for each write."""
    config = MemoryConfig(architecture="linear", gradient="exact", steps=2, chunk=4)
    tokens = some_tokens(0, 6)
    twice = {n: np.stack([getattr(tokens, n)] * 2, axis=1) for n in ("k", "v", "eta")}
    tokens = tokens._replace(**twice)
    memory_scan(config, some_state(0, config), tokens)
    with pytest.raises(ValueError, match=message):
        memory_scan(config, some_state(0, config), change(tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tuple, "must be a MemoryState, .* got tuple"),
        (lambda s: jax.tree.map(lambda a: np.stack([a, a]), s), "of one memory of"),
        (lambda s: jax.tree.map(lambda a: np.asarray(a)[1:], s), "of one memory of"),
    ],
)
def test_states_of_no_memory_of_this_kind(change, message):
    with pytest.raises(ValueError, match=message):
        memory_scan(CONFIG, change(some_state(0, CONFIG)), some_tokens(0, 6))


@pytest.mark.parametrize("count", [0, 7])
def test_no_more_tokens_than_there_are(count):
    with pytest.raises(ValueError, match=f"count must be of the 6 tokens, got {count}"):
        memory_scan(CONFIG, some_state(0, CONFIG), some_tokens(0, 6), count=count)


def test_a_state_in_the_middle_of_a_chunk_is_refused():
    read = jax.jit(functools.partial(memory_scan, CONFIG))
    state, _ = read(some_state(0, CONFIG), some_tokens(0, 6))
    with pytest.raises(ValueError, match="state is in the middle of a chunk"):
        memory_scan(CONFIG, state, some_tokens(0, 6))
    _, y = read(commit(state), some_tokens(0, 6))
    assert np.isfinite(y).all()
