"""Starts of memories as levels: their definition, and that they make a fact last."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtyping import Array

from hope_jax.core.level import Level, LevelState, unroll
from hope_jax.kernels.select import memory_scan
from hope_jax.memory.compose import MemoryConfig, Tokens
from hope_jax.memory.consolidation import Consolidation, consolidate, with_starts
from hope_jax.memory.retention import decay
from hope_jax.memory.state import MemoryState, begin_memory
from hope_jax.models.mixers.memory import MemoryMixerConfig
from hope_jax.models.mixers.self_modifying import SelfModifyingConfig
from tests import compare

close = compare.within_size(1e-6)
MATRIX = MemoryConfig(
    architecture="linear",
    bias="dot",
    rule="gd",
    gradient="exact",
    toward="start",
    chunk=8,
)


class Item(NamedTuple):
    """What the level of a start meets at its clock."""

    alpha: Array
    memory: Array


def test_a_start_is_a_level_whose_context_is_the_faster_one():
    """Gradient descent on ½‖S − M‖² with a decay to the slower start."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    slow = Consolidation(period=3, rate=0.4, half_life=5.0)
    memories, begun, learned = draw(7, 2, 2), draw(2, 2), draw(2, 2)
    level = Level(
        init=lambda key: begun,
        read=lambda start, item: start,
        objective=lambda start, item: 0.5 * jnp.sum((start - item.memory) ** 2),
        flow=optax.chain(optax.sgd(slow.rate), decay(toward_start=True)),
    )
    met = memories[2::3]
    items = Item(jnp.full((len(met),), 0.5 ** (3 / 5)), met)
    opt = level.flow.init(learned)
    state = LevelState(begun, opt, None, None, jnp.zeros((), jnp.int32))
    after, _ = unroll(level, state, items)

    row = MemoryState({"w": begun[None]}, None, None, starts=({"w": begun[None]},))
    for t in range(7):
        row = row._replace(weights={"w": memories[t][None]})
        at = jnp.array([t + 1], jnp.int32)
        row = consolidate((slow,), row, {"w": learned}, at)
    close(row.starts[0]["w"][0], after.params)


def test_two_starts_by_hand():
    """The slower one moves to where the faster one stood, each at its own clock."""
    levels = (
        Consolidation(period=1, rate=0.5, half_life=1.0),
        Consolidation(period=2, rate=0.25, half_life=float("inf")),
    )
    one = lambda *values: {"w": jnp.array(values, jnp.float32)[:, None, None]}  # noqa: E731
    memory = MemoryState(
        one(8.0, 8.0), None, None, starts=(one(4.0, 4.0), one(2.0, 2.0))
    )
    learned = {"w": jnp.zeros((1, 1))}
    after = consolidate(levels, memory, learned, jnp.array([1, 2], jnp.int32))
    first, second = (start["w"].ravel().tolist() for start in after.starts)
    assert first == [4 + 2 - 1, 4 + 2 - 1]  # halfway to 8, half of the way to 2
    assert second == [2.0, 2 + 0.5]
    assert after.weights is memory.weights


def test_a_fact_outlives_the_memory_in_its_start():
    """Written once, asked after 1, 4 and 16 half-lives, each of which is a period: a
    start has r ½ Σ ((1 − r) ½)ⁱ of it, of which a rate of ½ makes a third."""
    period, width = 8, 4
    kept = jnp.full((period,), 0.5 ** (1 / period))
    nothing = jnp.zeros((period, width))
    tokens = Tokens(nothing, nothing, nothing, kept * 0, kept, kept * 0)
    k, v = jnp.eye(width)[1], jnp.eye(width)[2]
    start = {"w": 0.1 * jnp.ones((width, width))}

    def asked(*levels):
        @jax.jit
        def live(memory, position):
            memory, _ = memory_scan(MATRIX, memory, tokens, start=start)
            row = jax.tree.map(lambda a: a[None], memory)
            row = consolidate(levels, row, start, position[None])
            return jax.tree.map(lambda a: a[0], row)

        memory = with_starts(levels, begin_memory(MATRIX, start))
        fact = {"w": memory.weights["w"] + jnp.outer(v, k)}
        memory, found = memory._replace(weights=fact), {}
        for life in range(1, 17):
            memory = live(memory, jnp.asarray(period * life, jnp.int32))
            found[life] = float(v @ (memory.weights["w"] - start["w"]) @ k)
        return [found[life] for life in (1, 4, 16)]

    forever = Consolidation(period=period, rate=0.5, half_life=float("inf"))
    with_start, without = asked(forever), asked()
    np.testing.assert_allclose(without, [0.5, 0.5**4, 0.5**16], atol=1e-6)
    share = [sum(0.25 * 0.25**i for i in range(n)) for n in (1, 4, 16)]
    left = [0.25**n for n in (1, 4, 16)]
    np.testing.assert_allclose(with_start, np.add(share, left), atol=1e-6)


MIXERS = {
    "self_modifying": lambda levels: SelfModifyingConfig(
        memory=dataclasses.replace(SelfModifyingConfig().memory, chunk=2, expansion=1),
        projection_chunk=4,
        consolidate=levels,
    ),
    "memory": lambda levels: MemoryMixerConfig(memory=MATRIX, consolidate=levels),
}


@pytest.mark.parametrize("kind", MIXERS)
def test_a_level_of_rate_zero_is_not_there(kind):
    """The same program, and so the same bits."""
    x = jnp.zeros((2, 16, 8))

    def program(levels):
        layer = MIXERS[kind](levels).build(8, 2, jnp.float32, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(layer, nnx.Param)
        run = lambda p, x: nnx.merge(graphdef, p)(x)  # noqa: E731
        return str(jax.make_jaxpr(run)(params, x))

    still = Consolidation(period=8, rate=0.0)
    assert program((still,)) == program(())
    assert program((dataclasses.replace(still, rate=0.5),)) != program(())


def test_the_outer_gradient_is_that_of_finite_differences(float64):
    """In float64: of where memories start, and of what writes to them, through moves
    of two starts, asked by tokens after them."""
    memory = MemoryConfig(
        rule="gd", dgd="none", toward="start", expansion=1, chunk=2, rate_law="output"
    )
    levels = (
        Consolidation(period=4, rate=0.5, half_life=16.0),
        Consolidation(period=8, rate=0.3, half_life=32.0),
    )
    config = MemoryMixerConfig(memory=memory, conv=1, consolidate=levels)
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    x, weight = draw(2, 14, 4), draw(2, 4, 4)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix float32 in
        layer = config.build(4, 1, jnp.float64, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(layer, nnx.Param)
        params = jax.tree.map(lambda w: w + 0.3 * draw(*w.shape), params)

        def loss(params):
            y, _ = nnx.merge(graphdef, params)(x)
            return jnp.sum(weight * y[:, -4:])

        run = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    gradient = run(params)[1]
    for part in ("start", "v", "alpha"):
        direction = jax.tree_util.tree_map_with_path(
            lambda path, w, part=part: draw(*w.shape) * float(path[0].key == part),
            params,
        )
        moved = lambda e, d=direction: jax.tree.map(  # noqa: E731
            lambda w, d: w + e * d, params, d
        )
        numeric = float(run(moved(1e-5))[0] - run(moved(-1e-5))[0]) / 2e-5
        exact = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
        assert abs(exact) > 1e-4
        np.testing.assert_allclose(exact, numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(period=6), r"period \(6\) must be a multiple of memory.chunk \(8\)"),
        (dict(rate=1.5), r"rate must lie in \[0, 1\], got 1.5"),
        (dict(rate=0.9, half_life=8.0), "must not exceed 1 together"),
        (dict(half_life=0.0), "half_life must be"),
        (dict(period=0), "period must be at least 1"),
        (dict(memory=MemoryConfig(chunk=8)), "needs memory.toward='start', got 'zero'"),
        (dict(truncate=8), r"truncate \(8\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    mixer = {n: v for n, v in changes.items() if n in ("memory", "truncate")}
    level = {"period": 8} | {n: v for n, v in changes.items() if n not in mixer}
    with pytest.raises(ValueError, match=message):
        MemoryMixerConfig(
            **({"memory": MATRIX} | mixer), consolidate=(Consolidation(**level),)
        )


def test_levels_are_listed_from_fast_to_slow():
    levels = (Consolidation(period=16), Consolidation(period=8))
    with pytest.raises(ValueError, match="from fast to slow, got periods 16 before 8"):
        MemoryMixerConfig(memory=MATRIX, consolidate=levels)
