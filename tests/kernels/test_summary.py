"""What a stretch does to a memory, held to the memory that lives through it."""

import jax
import numpy as np
import pytest

from hope_jax.kernels import summary
from hope_jax.kernels.select import memory_end
from hope_jax.memory.compose import MemoryConfig
from hope_jax.memory.state import begin_memory, next_recent
from tests.kernels.test_named import (
    POINTS,
    is_float,
    small,
    some_start,
    some_tokens,
    value_and_pullback,
)

LENGTH, CUT = 14, 8  # the second stretch ends inside a chunk, where it may
AFFINE = (
    *("linear_attention", "retnet", "gla", "mamba2", "swla", "ojanet", "delta_net"),
    *("gated_delta_net", "delta_product", "kda", "rwkv7", "comba", "longhorn", "mesa"),
)
ANCHORED = MemoryConfig(
    architecture="linear", rule="nesterov", toward="start", dgd="both", chunk=4
)
FORMS = {
    name: small(name)
    for name in ("swla", "ojanet", "delta_product", "kda", "mesa")
    + ("matrix nesterov", "vector nesterov dgd")
} | {"anchored": ANCHORED}


def test_which_memories_move_by_an_affine_map():
    assert {name for name in POINTS if summary.affine(small(name))} == {*AFFINE}


@pytest.mark.parametrize("name", FORMS)
def test_stretches_compose(name):
    """Two of them, summed up apart: values, and pullbacks in start and tokens."""
    config = FORMS[name]
    length = LENGTH + (config.gradient == "anchored") * -LENGTH % config.chunk
    start, tokens = some_start(config), some_tokens(config, length)

    def lived(start, tokens):
        state = memory_end(config, begin_memory(config, start), tokens, start=start)
        return summary.rows(config, state), state

    def summed(start, tokens):
        state = begin_memory(config, start)
        x = summary.rows(config, state)
        for at in (slice(CUT), slice(CUT, None)):
            stretch = jax.tree.map(lambda a, at=at: a[at], tokens)
            made = summary.summarise(config, state, stretch, start)
            x = x @ made.kept + made.added
            state = state._replace(recent=next_recent(config, state.recent, stretch))
        return x, summary.with_rows(config, state, x)

    both = jax.jit(
        lambda *args: [value_and_pullback(run, *args) for run in (lived, summed)]
    )
    one, other = (jax.tree.leaves(made) for made in jax.device_get(both(start, tokens)))
    for a, b in zip(one, other, strict=True):
        if is_float(a):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(a).max()))
