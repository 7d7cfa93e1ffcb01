"""Models whose memories return to starts of their own: what sessions, switches and
telemetry make of these."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import hope_jax
from hope_jax.evaluate import ablation, telemetry
from hope_jax.memory.consolidation import Consolidation
from hope_jax.models import learning, lm, systems
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.memory import MemoryMixerConfig
from hope_jax.stream import slots
from tests import compare
from tests.memory.test_consolidation import MATRIX
from tests.models import small

close = compare.within_size(1e-5)
PERIOD, PIECE = 8, 4
CONFIG = dataclasses.replace(
    small.HOPE,
    layers=1,
    mixer=MemoryMixerConfig(
        memory=dataclasses.replace(MATRIX, chunk=4),
        consolidate=(Consolidation(period=PERIOD, rate=0.5),),
    ),
    cms=CMSConfig(levels=(CMSLevel(period=PIECE, rate=0.5),), hidden=8),
)
TEXT = small.some_tokens(rows=1, length=4 * PIECE + 2)


@functools.cache
def read(length, learn=True):
    graphdef, params = small.built(CONFIG)
    run = jax.jit(functools.partial(lm.apply, graphdef, learn=learn))
    return run(params, TEXT[:, :length])


def memory_of(state):
    return state.blocks.mixer.memory


def test_a_state_at_rest_has_its_starts():
    """Where the held chunk began: they move again as it is read again."""
    graphdef, params = small.built(CONFIG)
    _, end = read(16)
    state = lm.unfold(graphdef, params, lm.fold(CONFIG, end))
    close(memory_of(state), memory_of(end))
    assert not np.allclose(
        memory_of(end).starts[0]["w"], memory_of(small.start(CONFIG, 1)).starts[0]["w"]
    )


def test_starts_have_a_switch_of_their_own():
    begun, (all_on, on) = small.start(CONFIG, 1), read(12)
    off_said, off = read(12, Learning(consolidation=False))
    _, still = read(12, False)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    for state in (off, still):
        same(memory_of(state).starts, memory_of(begun).starts)
    assert np.any(memory_of(off).weights["w"] != memory_of(still).weights["w"])
    assert np.any(memory_of(on).starts[0]["w"] != memory_of(begun).starts[0]["w"])
    same(all_on[:, :PERIOD], off_said[:, :PERIOD])  # the first move is after these
    assert np.any(all_on[:, PERIOD:] != off_said[:, PERIOD:])
    with pytest.raises(ValueError, match="learn.consolidation is False, but 'hope'"):
        learning.resolve(small.HOPE, Learning(consolidation=False))
    names = [row.name for row in ablation.rows(CONFIG)]
    assert "consolidation off" in names
    assert "consolidation off" not in [r.name for r in ablation.rows(small.HOPE)]


def test_a_session_keeps_the_starts_of_memories_that_begin_again():
    params = small.built(CONFIG)[1]
    fresh = slots.begin(CONFIG, params)
    assert slots.parts(CONFIG) == ("mixers", "starts", "CMS 1")
    assert slots.names(CONFIG) == ("memory", "consolidated start", "CMS 1")
    add = lambda tree, by: jax.tree.map(lambda w: w + by, tree)  # noqa: E731

    def lived(memory):
        return memory._replace(
            weights=add(memory.weights, 2.0), starts=add(memory.starts, 1.0)
        )

    mixer, held = fresh.state.blocks.mixer, fresh.state.held
    blocks = fresh.state.blocks._replace(
        mixer=mixer._replace(memory=lived(mixer.memory), position=mixer.position + 3)
    )
    held = held._replace(mixers=held.mixers._replace(memory=lived(held.mixers.memory)))
    one = fresh._replace(state=fresh.state._replace(blocks=blocks, held=held))
    put_back = lambda *levels: slots.reset(CONFIG, params, one, levels).state  # noqa: E731
    start = mixer.memory.weights

    again = put_back("mixers")
    for there in (again.blocks.mixer, again.held.mixers):
        close(there.memory.weights, add(start, 1.0))
        close(there.memory.starts, (add(start, 1.0),))
        assert there.position == 0
    again = put_back("starts")
    for there in (again.blocks.mixer, again.held.mixers):
        close(there.memory.weights, add(start, 2.0))
        close(there.memory.starts, (start,))
    assert again.blocks.mixer.position == 3
    for levels in (("mixers", "starts"), slots.parts(CONFIG)):
        close(put_back(*levels).blocks.mixer.memory, mixer.memory)
    same = slots.merged(CONFIG, params, [one, fresh], [1.0, 1.0]).state
    close(memory_of(same).starts, (add(start, 0.5),))


def test_telemetry_follows_starts():
    line = telemetry.follow(CONFIG, small.built(CONFIG)[1], TEXT[0])
    cms, start = line.levels
    assert (cms.name, start.name, start.period) == ("CMS 1", "consolidated start", 8)
    assert start.moved.tolist() == [False, True, False, True]
    end = memory_of(read(16)[1])
    away = end.starts[0]["w"] - memory_of(small.start(CONFIG, 1)).starts[0]["w"]
    close(start.distance[-1, 0], np.linalg.norm(away))
    assert np.all((start.move[:, 0] > 0) == start.moved)
    np.testing.assert_allclose(start.move[1], 0.5 * start.gradient[1], rtol=1e-4)


def test_it_is_described():
    made = systems.system(CONFIG, 64)
    assert lm.state_bytes(CONFIG)["starts"] == 4 * 2 * 4 * 4
    assert "consolidated start" in [box.name for box in made.boxes]
    edges = {(e.source, e.target) for e in made.edges if e.kind == "initialise"}
    assert ("slow weights", "consolidated start") in edges
    assert ("consolidated start", "memory") in edges
    assert ("slow weights", "memory") not in edges
    assert "consolidated start" in hope_jax.describe(made)
