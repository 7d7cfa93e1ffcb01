"""Multi-query recall: what a row holds, and what it takes to answer it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.data.synthetic.recall import FILLER, RecallConfig
from hope_jax.evaluate import answers

CONFIGS = [
    RecallConfig(vocab=32, pairs=4, length=24),
    RecallConfig(vocab=32, pairs=4, queries=2, length=20),
    RecallConfig(vocab=11, pairs=4, length=16),  # the fewest tokens, and no free slot
    RecallConfig(vocab=32, pairs=4, length=24, random_filler=True),
    RecallConfig(vocab=32, pairs=1, length=4, gap_power=1.0),
    RecallConfig(vocab=32, pairs=4, length=24, ordered=True),
]
ROWS = 64

every = pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))


@functools.cache
def rows(config, seed=0):
    made = jax.jit(config.batch, static_argnums=1)(jax.random.key(seed), ROWS)
    return jax.tree.map(np.asarray, made)


def shown(config, tokens):
    """The pairs of a row as a dict."""
    context = tokens[: 2 * config.pairs].tolist()
    return dict(zip(context[::2], context[1::2], strict=True))


def oracle(config, asked, drop=0):
    """Logits of one who reads the pairs, the first `drop` left out, and looks up."""
    logits = np.zeros((*asked.tokens.shape, config.vocab), np.float32)
    for row, tokens in enumerate(asked.tokens):
        known = dict(list(shown(config, tokens).items())[drop:])
        for t, token in enumerate(tokens.tolist()):
            logits[row, t, known.get(token, FILLER)] = 10.0
    return jnp.asarray(logits)


@every
def test_rows_are_as_described(config):
    tokens, labels, mask = rows(config)
    half = config.vocab // 2
    assert tokens.shape == labels.shape == mask.shape == (ROWS, config.length)
    assert tokens.dtype == labels.dtype == np.int32 and mask.dtype == bool
    assert tokens.min() >= 0 and tokens.max() < config.vocab
    assert (labels[~mask] == 0).all()
    for row in range(ROWS):
        pairs = shown(config, tokens[row])
        assert len(pairs) == len(set(pairs.values())) == config.pairs
        assert all(0 < k < half <= v < config.vocab for k, v in pairs.items())
        at = np.flatnonzero(mask[row])
        assert len(at) == config.asked and at[0] >= 2 * config.pairs
        assert (at % 2 == 0).all()
        asked = tokens[row, at].tolist()
        assert len(set(asked)) == config.asked
        assert labels[row, at].tolist() == [pairs[k] for k in asked]
        between = np.delete(tokens[row], at)[2 * config.pairs :]
        assert config.random_filler or (between == FILLER).all()


def test_every_key_and_value_is_used():
    config = CONFIGS[0]
    pairs = rows(config).tokens[:, :8].reshape(-1, 2)
    assert set(pairs[:, 0].tolist()) == set(range(1, 16))
    assert set(pairs[:, 1].tolist()) == set(range(16, 32))


def test_filler_can_be_any_token():
    config = CONFIGS[3]
    tokens, _, mask = rows(config)
    free = np.ones_like(mask)
    free[:, : 2 * config.pairs] = False
    assert set(tokens[free & ~mask].tolist()) == set(range(config.vocab))


@pytest.mark.parametrize("config", CONFIGS[:2], ids=("all", "some"))
def test_a_place_does_not_tell_its_answer(config):
    """In the first slot, which is asked most, any of the pairs is as likely."""
    tokens, _, mask = jax.tree.map(np.asarray, config.batch(jax.random.key(2), 2000))
    first = 2 * config.pairs
    there = tokens[mask[:, first]]
    places = (there[:, :first:2] == there[:, first, None]).mean(0)
    assert len(there) > 400
    np.testing.assert_allclose(places, 1 / config.pairs, atol=0.07)


def test_in_order_the_first_draw_is_the_first_pair_s():
    """As in Zoology's code: the place of pair 1 follows the law as if it were alone,
    and that of pair 2 what it leaves."""
    config = RecallConfig(vocab=16, pairs=2, length=12, ordered=True, gap_power=0.5)
    tokens, _, mask = jax.tree.map(np.asarray, config.batch(jax.random.key(1), 4000))
    law = np.arange(1.0, 5.0) ** -0.5
    law /= law.sum()
    left = law[:, None] * law[None] / (1 - law[:, None])
    np.fill_diagonal(left, 0.0)
    at = tokens[:, 4::2] * mask[:, 4::2]
    for pair, expected in ((0, law), (2, left.sum(axis=0))):
        seen = (at == tokens[:, pair, None]).mean(0)
        np.testing.assert_allclose(seen, expected, atol=0.03)


def test_gaps_follow_their_law():
    """The place of a single question: P(i) is proportional to i^(power - 1)."""
    for power in (0.01, 1.0, 2.0):
        config = RecallConfig(vocab=8, pairs=1, length=12, gap_power=power)
        _, _, mask = config.batch(jax.random.key(1), 4000)
        seen = np.asarray(mask)[:, 2::2].mean(0)
        law = np.arange(1.0, 6.0) ** (power - 1)
        np.testing.assert_allclose(seen, law / law.sum(), atol=0.03)


def test_the_key_decides_the_rows():
    config = CONFIGS[3]
    again = config.batch(jax.random.key(0), ROWS)
    jax.tree.map(np.testing.assert_array_equal, again, rows(config))
    other = rows(config, seed=1)
    assert (other.tokens[:, :8] != again.tokens[:, :8]).any(1).all()
    assert len({row.tobytes() for row in again.tokens}) == ROWS


@every
def test_a_look_up_answers_all(config):
    asked = rows(config)
    found = answers.score_batch(oracle(config, asked), asked)
    assert found.accuracy == found.whole == 1.0
    assert found.loss == pytest.approx(
        np.log1p((config.vocab - 1) * np.exp(-10)), rel=1e-3
    )


def test_a_look_up_without_one_pair_does_not():
    config = CONFIGS[0]
    asked = rows(config)
    found = answers.score_batch(oracle(config, asked, drop=1), asked)
    assert found.accuracy == pytest.approx(0.75) and found.whole == 0.0


def test_chance():
    """Who knows the values but not the keys is at chance; who knows neither, below."""
    config = CONFIGS[0]
    asked = rows(config)
    generator = np.random.default_rng(0)

    def accuracy(guess):
        logits = jax.nn.one_hot(jnp.asarray(guess), config.vocab)
        return float(answers.score_batch(logits, asked).accuracy)

    shape = asked.tokens.shape
    own = asked.tokens[:, 1 : 2 * config.pairs : 2]
    picks = generator.integers(0, config.pairs, shape)
    assert config.chance == 0.25
    assert accuracy(np.take_along_axis(own, picks, 1)) == pytest.approx(0.25, abs=0.08)
    assert accuracy(generator.integers(16, 32, shape)) == pytest.approx(
        1 / 16, abs=0.05
    )
    assert accuracy(np.zeros(shape, int)) == 0.0


def test_only_questions_count():
    """Other logits change neither number, and get no gradient."""
    asked = rows(CONFIGS[0])
    logits = oracle(CONFIGS[0], asked)
    elsewhere = jnp.where(asked.mask[..., None], logits, -logits + 3.0)
    jax.tree.map(
        np.testing.assert_array_equal,
        answers.score_batch(logits, asked),
        answers.score_batch(elsewhere, asked),
    )
    gradient = jax.grad(lambda x: answers.score_batch(x, asked).loss)(logits)
    assert (np.abs(gradient).max(-1) > 0).astype(bool).tolist() == asked.mask.tolist()


@every
def test_questions_are_all_that_is_asked(config):
    """Their places alone, in order: the same score from a part of the logits."""
    asked = jax.tree.map(jnp.asarray, rows(config))
    at, there = answers.questions(config, asked)
    assert at.shape == there.labels.shape == (ROWS, config.asked)
    assert there.mask.all() and (np.diff(at, axis=1) > 0).all()
    logits = oracle(config, asked, drop=1)
    some = jnp.take_along_axis(logits, at[..., None], axis=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        *(answers.score_batch(logits, asked), answers.score_batch(some, there)),
    )


def test_score_is_the_mean_over_batches():
    config, key = CONFIGS[1], jax.random.key(3)
    table = jax.random.normal(jax.random.key(4), (config.vocab, config.vocab))

    def read(params, tokens, at):
        logits = params[tokens]
        return logits if at is None else jnp.take_along_axis(logits, at[..., None], 1)

    found = answers.score(read, table, config, key, rows=5, batches=3)
    each = [config.batch(k, 5) for k in jax.random.split(key, 3)]
    one = jax.tree.map(lambda *rows: jnp.concatenate(rows), *each)
    expected = answers.score_batch(read(table, one.tokens, None), one)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"queries": 5}, r"queries must lie between 1 and pairs \(4\), got 5"),
        ({"queries": 0}, r"queries must lie between 1 and pairs \(4\), got 0"),
        ({"vocab": 9}, r"vocab must be at least 2 \(pairs \+ 1\) = 10.*got 9"),
        ({"length": 15}, "length must be even and at least .* = 16, got 15"),
        ({"length": 14}, "length must be even and at least .* = 16, got 14"),
        ({"gap_power": 0.0}, "gap_power must be above 0, got 0.0"),
        (
            {"ordered": True, "queries": 2},
            "ordered asks every pair, got queries=2",
        ),
    ],
)
def test_bad_tasks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RecallConfig(**fields)


def test_bad_calls_are_refused():
    config = CONFIGS[0]
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        config.batch(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="batches must be at least 1, got 0"):
        answers.score(lambda p, t: t, None, config, jax.random.key(0), batches=0)
    with pytest.raises(
        ValueError, match=r"logits must be .* = \(64, 24\), got \(64, 2"
    ):
        answers.score_batch(jnp.zeros((64, 23, 32)), rows(config))
