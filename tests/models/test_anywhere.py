"""Rows that stand anywhere: read in blocks and chunks, and written token by token.

The definition is `apply` with one token a call, which `aligned=False` scans.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import lm, zoo
from tests import compare
from tests.models import small
from tests.models.test_promises import assert_same_state

close = compare.within_both(3e-5)

BEFORE, LENGTH = 5, 14  # of a base chunk of 4: to its end, two whole ones and a rest
MODELS = {
    "hope": small.HOPE,
    "two writes": small.TWO_WRITES,
    "hybrid": small.HYBRID,
    "attention": small.TRANSFORMER,
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Texts of a few tokens have whole chunks too."""
    monkeypatch.setattr(lm, "_AT_ONCE", 3)


@functools.cache
def programs(name, learn=True):
    """Reading anywhere and one by one, and writing, compiled once a model."""
    graphdef, params = small.built(MODELS[name])
    one = functools.partial(lm.apply, graphdef, params, learn=learn)

    def likeliest(logits, x):
        return jnp.where(x < 0, jnp.argmax(logits, axis=-1), x).astype(jnp.int32)

    def by_definition(state, logits, xs):
        def step(carry, x):
            state, logits = carry
            token = likeliest(logits, x)
            logits, state = one(token[:, None], state)
            return (state, logits[:, 0]), token

        (state, logits), tokens = jax.lax.scan(step, (state, logits), xs)
        return tokens.T, logits, state

    return {
        "anywhere": jax.jit(
            lambda tokens, state, count: one(tokens, state, count=count)
        ),
        "one by one": jax.jit(lambda tokens, state: one(tokens, state, aligned=False)),
        "write": jax.jit(
            lambda state, logits, xs: lm.write(
                graphdef, params, state, logits, likeliest, xs, learn=learn
            )
        ),
        "write, by definition": jax.jit(by_definition),
    }


def begun(name, tokens):
    """Rows that have read some tokens."""
    return small.read(MODELS[name], tokens)[1]


@pytest.mark.parametrize(
    "name, learn", [*((name, True) for name in MODELS), ("hope", False)]
)
def test_texts_of_any_length_are_read_at_any_place(name, learn):
    run = programs(name, learn)
    tokens = small.some_tokens(length=BEFORE + LENGTH)
    state = begun(name, tokens[:, :BEFORE])
    here = tokens[:, BEFORE:]
    expected, end = run["one by one"](here, state)
    logits, after = run["anywhere"](here, state, LENGTH)
    close(logits, expected)
    assert_same_state(after, end)

    some = LENGTH - 5
    padded = np.where(np.arange(LENGTH) < some, here, 0)
    logits, middle = run["anywhere"](padded, state, some)
    close(logits[:, :some], expected[:, :some])
    assert not np.any(logits[:, some:])
    rest, after = run["anywhere"](np.roll(here, -some, axis=1), middle, LENGTH - some)
    close(rest[:, : LENGTH - some], expected[:, some:])
    assert_same_state(after, end)


@pytest.mark.parametrize("name", MODELS)
def test_rows_at_places_of_their_own(name):
    """Each row is as if it had been alone, whatever boundary the other one meets."""
    run = programs(name)
    tokens = small.some_tokens(length=7 + LENGTH)
    states = [begun(name, tokens[i : i + 1, : 7 - 3 * i]) for i in (0, 1)]
    both = jax.tree.map(lambda *rows: jnp.concatenate(rows), *states)
    here = np.stack([tokens[i, 7 - 3 * i :][:LENGTH] for i in (0, 1)])
    expected, end = run["one by one"](here, both)
    logits, after = run["anywhere"](here, both, LENGTH)
    close(logits, expected)
    assert_same_state(after, end)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_before_the_next_token(name):
    """Known tokens and chosen ones, over several boundaries, rows apart."""
    run = programs(name)
    tokens = small.some_tokens(length=7)
    states = [begun(name, tokens[i : i + 1, : 7 - 3 * i]) for i in (0, 1)]
    state = jax.tree.map(lambda *rows: jnp.concatenate(rows), *states)
    logits = jax.random.normal(jax.random.key(3), (2, small.VOCAB))
    xs = np.full((LENGTH, 2), -1, np.int32)
    xs[:3] = 2
    expected = run["write, by definition"](state, logits, xs)
    made = run["write"](state, logits, xs)
    np.testing.assert_array_equal(made[0], expected[0])
    close(made[1], expected[1])
    assert_same_state(made[2], expected[2])


def test_rows_read_as_many_tokens_as_they_are_given():
    """Whatever the cuts and the other row, to the bit. Of Hope see tests/stream."""
    config = MODELS["hybrid"]
    graphdef, params = small.built(config)
    tokens, fast = small.some_tokens(length=LENGTH), len(config.fast)
    none = jnp.zeros((2, fast), jnp.int32)
    ledger = lm.Ledger(
        jnp.full(2, jnp.inf), jnp.full(2, 99), none, none, jnp.zeros((2, fast))
    )
    begin = small.start(config), jnp.zeros((2, small.VOCAB)), ledger
    known = lambda logits, x: x  # noqa: E731

    @jax.jit
    def serve(now, xs, counts):
        made = lm.serve(graphdef, params, *now, known, xs, counts)
        (read, losses), logits, ledger, state = made
        return read, losses, (state, logits, ledger)

    def read(*calls):
        now, at, total = begin, np.zeros(2, int), np.zeros(2)
        for counts in calls:
            xs = np.stack([np.roll(tokens[i], -at[i]) for i in (0, 1)], axis=1)
            made, losses, now = serve(now, xs, np.int32(counts))
            for i in (0, 1):
                np.testing.assert_array_equal(made[i, : counts[i]], xs[: counts[i], i])
                assert not np.any(made[i, counts[i] :] != 0)
            at, total = at + counts, total + np.sum(losses, axis=1)
        return now, total

    end, total = read((LENGTH, 5), (0, LENGTH - 5))
    again, _ = read((3, 5), (LENGTH - 3, 0), (0, LENGTH - 5))
    jax.tree.map(np.testing.assert_array_equal, end, again)
    expected, state = programs("hybrid")["one by one"](tokens, begin[0])
    close(end[1], expected[:, -1])
    assert_same_state(end[0], state)
    said = jnp.concatenate([begin[1][:, None], expected[:, :-1]], axis=1)
    losses = lm.next_token_loss(said, jnp.asarray(tokens))
    close(total, np.sum(losses, axis=1))
    np.testing.assert_array_equal(end[2].moves[:, 0], (LENGTH - 1) // 4)


def test_a_state_has_no_copies_of_itself():
    """Bytes of one row: of the projections what they are asked, of the main memory its
    anchor too, and nothing twice."""
    config = small.HOPE
    said = lm.state_bytes(config)
    graphdef, params = small.built(config)
    state = lm.initial_state(graphdef, params, 3)
    assert said["all"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // 3
    assert said["all"] == sum(said.values()) - said["all"] + 4  # the position
    weights = _bytes(state.held.mixers.memories.weights) // 3
    one, mixer = weights // 5, state.blocks.mixer
    assert _bytes((mixer.projection.weights, mixer.main.weights)) // 3 == weights
    assert said["mixers"] - _bytes(mixer.waiting) // 3 < 1.3 * weights + one
    assert said["held chunk"] < 1.3 * weights
    assert said["CMS 1 weights"] == said["CMS 1 learned"]
    kept = [
        said[f"CMS {i} {part}"] for i in (1, 2, 3) for part in ("weights", "learned")
    ]
    assert said["all"] - said["mixers"] < 1.1 * (weights + sum(kept))


def _bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_a_row_of_hope_100m_is_what_its_levels_are():
    """Weights and accumulators, and where the base chunk began whose loss is not known:
    at most a tenth more while it reads, a hundredth at rest."""
    config = zoo.get("hope_100m")
    said = lm.state_bytes(config)
    graphdef, params = lm.abstract_model(config)
    state = jax.eval_shape(lambda p: lm.initial_state(graphdef, p, 1), params)
    size = lambda tree: sum(4 * leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    weights = size(state.held.mixers.memories)
    levels = sum(said[f"CMS {i} {of}"] for i in range(1, 5) for of in _LEVEL)
    assert said["all"] < 1.1 * (levels + 2 * weights)
    assert said["all"] - said["mixers"] < 1.01 * (levels + weights)


_LEVEL = ("weights", "learned")


@pytest.mark.parametrize("name", ["hope", "hybrid"])
def test_rows_that_rest_need_no_running_mixers(name):
    """In mid-chunk, at its end before and after its levels moved, and fresh."""
    config, run = MODELS[name], programs(name)
    graphdef, params = small.built(config)
    tokens = small.some_tokens(length=8)
    ends = (0, 3, 4, 7, 8)
    states = [
        begun(name, tokens[:1, :end]) if end else small.start(config, 1) for end in ends
    ]
    state = jax.tree.map(lambda *rows: jnp.concatenate(rows), *states)
    rest = lm.fold(config, state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(rest))
    said = lm.state_bytes(config)
    assert size == (said["all"] - said["mixers"]) * len(ends)
    back = jax.jit(functools.partial(lm.unfold, graphdef))(params, rest)
    assert_same_state(back, state)
    after = jnp.asarray(np.repeat(tokens[:1], len(ends), axis=0))
    logits, end = run["one by one"](after, back)
    expected, expected_end = run["one by one"](after, state)
    close(logits, expected)
    assert_same_state(end, expected_end)
    with pytest.raises(ValueError, match="state is folded: give lm.unfold"):
        lm.apply(graphdef, params, after, rest)


def test_what_was_not_held_cannot_rest():
    state = small.start(small.HOPE)
    _, state = small.read(small.HOPE, small.some_tokens(length=3), state, learn=False)
    with pytest.raises(ValueError, match="without learning, got positions .3, 3."):
        lm.fold(small.HOPE, state)


def test_how_many_tokens_there_are_needs_a_state():
    graphdef, params = small.built(small.HOPE)
    with pytest.raises(ValueError, match="count needs a state, and aligned=None"):
        lm.apply(graphdef, params, small.some_tokens(), count=jnp.int32(3))
    state = small.start(small.HOPE)
    for count in (-1, small.LENGTH + 1):
        with pytest.raises(ValueError, match=f"count must be of the .* got {count}"):
            lm.apply(graphdef, params, small.some_tokens(), state, count=count)
