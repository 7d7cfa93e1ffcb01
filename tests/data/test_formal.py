"""Formal languages: words by hand, sets against every word there is, and lengths."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.data.synthetic.formal import LANGUAGES, FormalConfig
from hope_jax.evaluate import answers

each = pytest.mark.parametrize("language", LANGUAGES)
LETTERS = {"shuffle_2": "()[]"}
WORDS = {  # what the others are, as patterns
    "aa_star": re.compile("(aa)*"),
    "abab_star": re.compile("(abab)*"),
}
END = "."


@functools.cache
def rows(language, shortest=2, longest=12, count=256):
    config = FormalConfig(language=language, shortest=shortest, longest=longest)
    made = jax.jit(config.batch, static_argnums=1)(jax.random.key(0), count)
    return config, jax.tree.map(np.asarray, made)


def spoken(language, asked, row):
    """A word in letters, and after each the symbols that may follow."""
    letters = LETTERS.get(language, "abcd")
    symbols = letters[: LANGUAGES[language].symbols - 1] + END
    length = asked.mask[row].sum()
    word = "".join(letters[i] for i in asked.tokens[row, :length])
    sets = asked.labels[row, :length]
    return word, [
        "".join(s for s, m in zip(symbols, r, strict=True) if m) for r in sets
    ]


def is_word(language, word):
    if language in WORDS:
        return WORDS[language].fullmatch(word) is not None
    if language == "shuffle_2":
        return _balanced(word, "()") and _balanced(word, "[]")
    letters = "ab" if language == "anbn" else "abc"
    n = len(word) // len(letters)
    return n > 0 and word == "".join(letter * n for letter in letters)


def _balanced(word, brackets):
    height = 0
    for letter in word:
        if letter in brackets:
            height += 1 if letter == brackets[0] else -1
        if height < 0:
            return False
    return height == 0


@pytest.mark.parametrize(
    ("language", "word", "follow"),
    [
        ("aa_star", "aaaa", ["a", "a.", "a", "a."]),
        ("abab_star", "abab", ["b", "a", "b", "a."]),
        ("anbn", "aabb", ["ab", "ab", "b", "."]),
        ("anbncn", "abc", ["ab", "c", "."]),
        ("anbncn", "aabbcc", ["ab", "ab", "b", "c", "c", "."]),
        ("shuffle_2", "([)]", ["()[", "()[]", "([]", "([."]),
    ],
)
def test_words_by_hand(language, word, follow):
    _, asked = rows(language, len(word), len(word))
    made = [spoken(language, asked, row) for row in range(256)]
    assert (word, follow) in made


@pytest.mark.parametrize("language", [n for n in LANGUAGES if n != "parity"])
def test_what_may_follow_is_what_words_say(language):
    """Against all words of up to 12 letters (8 for brackets): a letter may follow what
    was read if some word goes on with it. What could only follow in longer words is
    asked of the first half."""
    most = 8 if language == "shuffle_2" else 12
    letters = LETTERS.get(language, "abcd")[: LANGUAGES[language].symbols - 1]
    words = {
        word
        for length in range(1, most + 1)
        for word in map("".join, itertools.product(letters, repeat=length))
        if is_word(language, word)
    }
    starts = {word[:i] for word in words for i in range(len(word) + 1)}
    _, asked = rows(language, 1, most)
    seen = set()
    for row in range(256):
        word, follow = spoken(language, asked, row)
        assert word in words
        seen.add(word)
        for i, found in enumerate(follow, start=1):
            assert (END in found) == (word[:i] in words)
            if i < most // len(letters):
                true = {letter for letter in letters if word[:i] + letter in starts}
                assert set(found) - {END} == true
    assert len(seen) > 1 or len(words) == 1
    if language != "shuffle_2":
        assert seen == words


def test_parity_is_of_the_bits_so_far():
    _, asked = rows("parity")
    odd = np.cumsum(asked.tokens, axis=1) % 2
    told = np.stack([1 - odd, odd], -1) * asked.mask[..., None]
    np.testing.assert_array_equal(asked.labels, told.astype(bool))
    assert 0.4 < asked.tokens[asked.mask].mean() < 0.6


@each
def test_lengths_are_even_in_the_window(language):
    config, asked = rows(language, 4, 24, 2000)
    unit = LANGUAGES[language].unit
    counts = np.bincount(asked.mask.sum(1), minlength=25)
    own = [n for n in range(4, 25) if n % unit == 0]
    assert set(np.flatnonzero(counts)) == set(own)
    np.testing.assert_allclose(counts[own] / 2000, 1 / len(own), atol=0.04)
    assert (asked.mask[:, 1:] <= asked.mask[:, :-1]).all()
    assert not asked.tokens[~asked.mask].any() and not asked.labels[~asked.mask].any()
    assert asked.tokens.max() < config.vocab == asked.labels.shape[-1]


@each
def test_the_key_decides_the_rows(language):
    config, asked = rows(language)
    again = config.batch(jax.random.key(0), 256)
    jax.tree.map(np.testing.assert_array_equal, again, asked)


def test_a_set_is_right_as_a_whole_and_a_word_throughout():
    _, asked = rows("anbn", 4, 8)
    logits = np.where(asked.labels, 1.0, -1.0).astype(np.float32)
    found = answers.score_batch(jnp.asarray(logits), asked)
    assert found.accuracy == found.whole == 1.0
    assert found.loss == pytest.approx(np.log1p(np.exp(-1.0)), rel=1e-5)
    logits[0, 2, 0] *= -1  # one member of one set of one word
    found = answers.score_batch(jnp.asarray(logits), asked)
    assert found.accuracy == pytest.approx(1 - 1 / asked.mask.sum())
    assert found.whole == pytest.approx(1 - 1 / 256)
    logits[0, -1] = 5.0  # after the end, or of a word of 8 letters its last
    silent = answers.score_batch(jnp.asarray(logits), asked)
    assert silent.accuracy == found.accuracy or asked.mask[0, -1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language": "anb"}, "language must be one of parity, .*got 'anb'"),
        ({"shortest": 0}, r"shortest \(0\) must be at least 1"),
        ({"shortest": 9, "longest": 8}, r"shortest \(9\) must be .* longest \(8\)"),
        (
            {"language": "abab_star", "shortest": 5, "longest": 7},
            "abab_star has no word of 5 to 7 letters: its lengths are multiples of 4",
        ),
    ],
)
def test_bad_tasks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FormalConfig(**fields)
