"""Who does the learning: the rows, the texts and facts, and what is counted of them."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from hope_jax.evaluate import ablation
from hope_jax.models import learning
from hope_jax.models.learning import Learning
from hope_jax.stream.reader import Reader, reader_of
from tests.models import small

HOPE = dataclasses.replace(small.HOPE, layers=1)
DELTA = dataclasses.replace(small.TRANSFORMER, mixer="gated_delta_net")
NAMES = [
    *("all learn", "main memory off", "projections off"),
    *("CMS 1 off", "CMS 2 off", "CMS 3 off"),
    *("all CMS off", "all memories off", "nothing learns"),
    *("control: sign of eta flipped", "control: q replaced by k"),
    *("control: 2 inner steps", "control: 4 inner steps"),
    *("control: half the chunk", "control: twice the chunk"),
]


def left_out(config):
    return {row.name: row.reason for row in ablation.rows(config) if not row.learn}


def test_the_table_has_every_row():
    assert [row.name for row in ablation.rows(HOPE)] == NAMES
    assert set(left_out(HOPE)) == {"control: twice the chunk"}
    assert "multiple" in left_out(HOPE)["control: twice the chunk"]
    *fast, slow = HOPE.cms.levels
    levels = (*fast, dataclasses.replace(slow, rate=0.0))
    still = dataclasses.replace(HOPE, cms=dataclasses.replace(HOPE.cms, levels=levels))
    assert set(left_out(still)) == {"CMS 3 off", "control: twice the chunk"}
    asked = [row.name for row in ablation.rows(HOPE) if row.facts]
    assert asked == ["all learn", "all CMS off", "all memories off", "nothing learns"]


def test_what_has_no_meaning_is_left_out_with_its_reason():
    for config, kept in (
        (small.TRANSFORMER, {"all learn", "nothing learns"}),
        (
            DELTA,
            {
                *("all learn", "main memory off", "all memories off", "nothing learns"),
                *("control: sign of eta flipped", "control: q replaced by k"),
            },
        ),
    ):
        rows = ablation.rows(config)
        assert {row.name for row in rows if row.learn} == kept
        assert all(row.reason for row in rows if not row.learn)
        for row in rows:
            if row.learn:
                learning.resolve(row.model, row.learn)  # refuses what it has not


def test_rows_switch_what_they_say():
    rows = {row.name: row.learn for row in ablation.rows(HOPE)}

    def on(name):
        found = learning.resolve(HOPE, rows[name])
        return found.main, found.projections, *found.levels[:2]

    assert on("all learn") == (True, True, True, True)
    assert on("main memory off") == (False, True, True, True)
    assert on("projections off") == (True, False, True, True)
    assert on("CMS 2 off") == (True, True, True, False)
    assert on("all CMS off") == (True, True, False, False)
    assert on("all memories off") == (False, False, True, True)
    assert learning.resolve(HOPE, rows["nothing learns"]) == learning.resolve(
        HOPE, False
    )


def test_other_chunks_keep_rates_and_shapes():
    changed = ablation.rechunked(HOPE, 0.5)
    assert (changed.mixer.memory.chunk, changed.mixer.projection_chunk) == (2, 2)
    free = dataclasses.replace(HOPE, mixer=dataclasses.replace(HOPE.mixer, rate=None))
    assert ablation.rechunked(free, 0.5).mixer.rate_bound == free.mixer.rate_bound
    shapes = [
        jax.tree.map(lambda x: x.shape, jax.eval_shape(build, jax.random.key(0)))
        for build in (
            lambda key: ablation.reader_of(HOPE).initial_state(small.built(HOPE)[1], 1),
            lambda key: ablation.reader_of(changed).initial_state(
                small.built(HOPE)[1], 1
            ),
        )
    ]
    # What waits for the end of a chunk is as long as that.
    one, other = (shape.blocks.mixer._replace(waiting=None) for shape in shapes)
    assert one == other


@pytest.mark.parametrize("distance", [1, 16])
def test_facts_lie_where_they_are_said_to(distance):
    text = np.arange(3 * 60).reshape(3, 60) % 100
    facts = ablation.plant(text, [distance, 2], 0, range(200, 300))
    size = ablation.CUE + ablation.ANSWER
    planted, asked = facts.planted[distance], 60 - size
    start = asked - distance - size
    first, again = planted[:, start : start + size], planted[:, asked:]
    np.testing.assert_array_equal(first, again)
    assert (first >= 200).all() and len(np.unique(first[:, 0])) > 1
    assert planted.shape == facts.absent.shape == (3, 60)
    changed = planted != facts.absent
    assert changed[:, start : start + size].all()
    assert changed.sum() == 3 * size
    np.testing.assert_array_equal(facts.absent[:, :asked], text[:, :asked])
    np.testing.assert_array_equal(facts.absent[:, asked:], again)
    assert set(facts.planted) == {distance, 2}


def test_refuses_what_cannot_be_read():
    text = np.zeros((2, 20), int)
    with pytest.raises(ValueError, match="distance of 16 .* rows of 48 tokens, got 20"):
        ablation.plant(text, [16], 0, range(5))
    with pytest.raises(ValueError, match="has 10 tokens, fewer than 2 rows of 8"):
        ablation.texts([np.zeros(10, int)], count=2, length=8)
    with pytest.raises(ValueError, match="more than 4 tokens a row, the span"):
        ablation.read_twice(
            reader_of(HOPE), small.built(HOPE)[1], text[:, :4], Learning()
        )


def seen_before(rate):
    """Token t + 1 costs less by `rate` nats where it was ever read, if that learns."""

    def apply(params, tokens, state, aligned, learn):
        import jax.numpy as jnp

        seen = jnp.cumsum(jax.nn.one_hot(tokens, 300), axis=1) > 0
        seen = seen | state[:, None]
        logits = jnp.where(seen, rate * params, 0.0)
        return logits, (seen[:, -1] if learning.of(learn).main else state)

    def start(params, rows):
        return jax.numpy.zeros((rows, 300), bool)

    return Reader(apply, start, 4, 300)


def test_gains_of_a_model_worked_by_hand():
    """One that knows which tokens it has read: a fact was, the text was."""
    reader, one = seen_before(2.0), jax.numpy.ones(())
    text = np.arange(200).reshape(4, 50)
    facts = ablation.plant(text, [16], 0, range(200, 300))
    gain = ablation.ask(reader, one, facts, Learning(), batch=3)[16]

    def normaliser(seen):
        return math.log(300 - seen + seen * math.e**2)

    # Without the fact, its cue and the answers before are new to the model.
    new = np.mean([normaliser(46 + i) - normaliser(42) for i in range(4)])
    assert gain.mean == pytest.approx(2 + new, abs=1e-4)
    assert gain.high - gain.low < 1e-4
    readings = ablation.read_twice(reader, one, text, Learning())
    # 48 tokens of 300 were seen, all that is read again among them, but the last.
    cost = math.log(252 + 48 * math.e**2)
    assert readings.other > cost > readings.again > cost - 2.2
    assert readings.gain > 1.5
    frozen = ablation.read_twice(reader, one, text, Learning(main=False))
    assert frozen.first == frozen.again and frozen.gain == pytest.approx(0, abs=1e-6)


def test_a_trained_model_is_measured_as_it_is(key):
    """`nothing learns` is the loss of `learn=False`; numbers have the table's names."""
    config = small.TRANSFORMER
    params = small.built(config)[1]
    text = np.asarray(jax.random.randint(key, (2, 18), 0, small.VOCAB))
    rows = {row.name: row for row in ablation.rows(config)}
    measured = [
        ablation.measure(row, params, text)
        for row in (rows["nothing learns"], rows["projections off"])
    ]
    frozen = ablation.read_twice(reader_of(config), params, text, False)
    assert measured[0].readings == frozen and measured[1].readings is None
    assert ablation.flat(measured) == {
        f"nothing learns/{what}": pytest.approx(value)
        for what, value in {**frozen._asdict(), "gain": frozen.gain}.items()
    }


def test_first_readings_are_those_of_each_switch():
    _, params = small.built(DELTA)
    text = np.random.default_rng(0).integers(0, DELTA.vocab, (2, DELTA.span + 1))
    found = ablation.first_readings(DELTA, params, text)
    assert set(found) == {"all learn", "main memory off", "nothing learns"}
    assert found["main memory off"] is found["nothing learns"]
    for name, learn in (("all learn", True), ("nothing learns", False)):
        first = ablation.read_twice(reader_of(DELTA), params, text, learn).first
        assert found[name].shape == (2, DELTA.span)
        assert found[name].mean() == pytest.approx(first, rel=1e-6)
    assert found["all learn"].mean() != found["nothing learns"].mean()
