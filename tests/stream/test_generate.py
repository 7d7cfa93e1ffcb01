"""Generation from models whose next token is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.data.tokenizer import ByteTokenizer, train_bpe
from hope_jax.stream import generate as g
from hope_jax.stream import reader as reader_lib
from hope_jax.stream.reader import Reader
from tests.models import small
from tests.stream import fakes

BYTES = ByteTokenizer()
ONE = jnp.ones(())
GREEDY = g.Sampling(temperature=0)


def made(reader, key, prompt=b"", tokens=20, sampling=GREEDY, **more):
    return list(
        g.generate(
            reader,
            ONE,
            BYTES,
            prompt,
            tokens=tokens,
            key=key,
            sampling=sampling,
            **more,
        )
    )


@pytest.mark.parametrize("prompt", [b"", b"abc", b"x" * 255, b"x" * 256, b"y" * 600])
@pytest.mark.parametrize("block", [1, 3, 8])
def test_goes_on_where_the_prompt_ends(key, prompt, block):
    text = b"0123456789"
    ids = made(fakes.reciting(257, text), key, prompt, tokens=15, block=block)
    expected = itertools.islice(itertools.cycle(text), len(prompt), len(prompt) + 15)
    assert ids == list(expected)


def test_the_prompt_is_read(key):
    # Counts say "b" once it was read more often than any other byte.
    ids = made(fakes.counting(257), key, b"abb", tokens=4)
    assert bytes(ids) == b"bbbb"
    assert made(fakes.counting(257), key, b"a" * 300 + b"b" * 320, tokens=2) == [98, 98]


def test_a_frozen_memory_does_not_learn_from_the_prompt(key):
    # Uniform logits: the first id is the likeliest.
    assert made(fakes.counting(257), key, b"abb", tokens=2, learn=False) == [0, 0]


def test_ends_where_the_model_starts_another_document(key):
    def apply(params, tokens, state, aligned, learn):
        said = jnp.where(state == 5, BYTES.bos, ord("a"))
        return jax.nn.one_hot(said, 257)[:, None], state + 1

    reader = Reader(apply, lambda params, batch: jnp.zeros(batch, jnp.int32), 1, 257)
    assert bytes(made(reader, key, tokens=50)) == b"aaaaa"


def test_one_key_one_text(key):
    sampling = g.Sampling(temperature=1.0)
    reader = fakes.uniform(257)
    first = made(reader, key, tokens=30, sampling=sampling)
    assert first == made(reader, key, tokens=30, sampling=sampling)
    assert first == made(reader, key, tokens=30, sampling=sampling, block=5)
    assert first[:10] == made(reader, key, tokens=10, sampling=sampling)
    assert first != made(reader, jax.random.key(1), tokens=30, sampling=sampling)


def test_greedy_does_not_depend_on_the_key(key):
    reader = fakes.counting(257)
    assert made(reader, key, b"hello") == made(reader, jax.random.key(7), b"hello")


@pytest.mark.parametrize("temperature", [1e-38, 1e-30, 1e-12])
def test_what_is_as_good_as_no_temperature_is_greedy(key, temperature):
    logits = jnp.array([[3.0, 9.0, 9.5, -20.0]])
    cold = g.Sampling(temperature=temperature)
    assert int(cold(logits[0], key)) == 2
    how = g.drawing([cold], 4)
    assert g.draw(logits, how, key[None]).tolist() == [2]


def test_top_k_draws_among_the_likeliest(key):
    logits = jnp.array([0.0, 3.0, 1.0, 2.0, -1.0])
    keys = jax.random.split(key, 200)

    def drawn(sampling):
        return set(jax.vmap(lambda k: sampling(logits, k))(keys).tolist())

    assert drawn(g.Sampling(temperature=5.0, top_k=2)) == {1, 3}
    assert drawn(g.Sampling(temperature=5.0, top_k=1)) == {1}
    assert drawn(g.Sampling(temperature=5.0, top_k=99)) == {0, 1, 2, 3, 4}
    assert drawn(g.Sampling(temperature=0.0)) == {1}


def test_unlikely_tokens_are_not_drawn(key):
    likely = np.array([0.1, 0.5, 0.25, 0.15])
    logits, keys = jnp.log(likely.astype(np.float32)), jax.random.split(key, 200)

    def drawn(**settings):
        sampling = g.Sampling(**{"temperature": 1.0, **settings})
        return set(jax.vmap(lambda k: sampling(logits, k))(keys).tolist())

    assert drawn(top_p=0.4) == {1} and drawn(top_p=0.6) == {1, 2}
    assert drawn(top_p=0.8) == {1, 2, 3} and drawn(top_p=1.0) == {0, 1, 2, 3}
    assert drawn(min_p=0.4) == {1, 2} and drawn(min_p=0.25) == {1, 2, 3}
    assert drawn(min_p=1.0) == {1} and drawn(min_p=0.0) == {0, 1, 2, 3}
    assert drawn(min_p=0.4, top_k=1) == {1}
    # Of the two likeliest, 2/3 and 1/3, the first alone has 0.6.
    assert drawn(top_p=0.6, top_k=2) == {1}
    assert drawn(min_p=0.4, temperature=2.0) == {0, 1, 2, 3}  # 0.1 is 0.45 of 0.5 now


def test_settings_of_rows_are_those_of_sampling(key):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 50)), jnp.float32)
    samplings = [
        g.Sampling(temperature=0),
        g.Sampling(temperature=1.3),
        g.Sampling(temperature=0.7, top_k=3),
        g.Sampling(temperature=2.0, top_p=0.8),
        g.Sampling(temperature=1.0, min_p=0.3),
        g.Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.1),
    ]
    draw = jax.jit(g.draw)
    for _ in range(5):
        key, own = jax.random.split(key)
        keys = jax.random.split(own, len(samplings))
        rows = zip(samplings, logits, keys, strict=True)
        expected = [int(one(row, k)) for one, row, k in rows]
        assert draw(logits, g.drawing(samplings, 50), keys).tolist() == expected
        plain = [samplings[1]] * len(samplings)  # nothing is cut in any row
        rows = zip(plain, logits, keys, strict=True)
        expected = [int(one(row, k)) for one, row, k in rows]
        assert draw(logits, g.drawing(plain, 50), keys).tolist() == expected
    assert draw._cache_size() == 1


def test_a_text_ends_with_what_stops_it(key):
    reader, text = fakes.reciting(257, b"0123456789"), {"tokens": 25}
    for stop, ids in (
        (("34",), b"01234"),
        (("567890", "9"), b"0123456789"),
        (("no",), b"0123456789012345678901234"),
    ):
        sampling = g.Sampling(temperature=0, stop=stop)
        assert bytes(made(reader, key, sampling=sampling, **text)) == ids
    before = g.decode._cache_size()
    made(reader, key, sampling=g.Sampling(temperature=0, stop=("7",)), **text)
    assert g.decode._cache_size() == before


def test_temperature_divides_the_logits(key):
    logits = jnp.array([0.0, 2.0])
    keys = jax.random.split(key, 4000)
    for temperature in (0.5, 2.0):
        sampling = g.Sampling(temperature=temperature)
        share = jax.vmap(lambda k, s=sampling: s(logits, k))(keys).mean()
        assert float(share) == pytest.approx(
            float(jax.nn.sigmoid(2.0 / temperature)), abs=0.03
        )


def test_ids_beyond_the_tokenizer_are_never_drawn(key):
    # The model has 400 rows and likes the last best; the tokenizer knows 257.
    def apply(params, tokens, state, aligned, learn):
        return jnp.broadcast_to(jnp.arange(400.0), (*tokens.shape, 400)), state

    reader = Reader(apply, lambda params, batch: jnp.zeros(batch), 1, 400)
    assert made(reader, key, tokens=3) == []  # bos is the likeliest of the 257


def test_the_state_has_one_size(key):
    reader = fakes.counting(257)
    arguments = reader, GREEDY, 257, True, ONE
    shapes = set()
    for length in (10, 200):
        state, logits = g.prefill(reader, ONE, np.zeros(length, np.int32))
        given, keys = np.full((1, 3), -1, np.int32), jax.random.split(key, 3)
        _, _, state = g.decode(*arguments, state, logits, given, keys)
        assert float(state.sum()) == length + 3  # it did read that much
        shapes.add(str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)))
    assert len(shapes) == 1


def test_it_is_compiled_once(key):
    programs = g.decode, g._read, g._read_some
    for program in programs:
        program.clear_cache()
    reader = fakes.counting(257)
    for prompt in (b"", b"abc", b"a longer prompt than that", b"x" * 300):
        made(reader, key, prompt)
    assert [program._cache_size() for program in programs] == [1, 1, 1]


def test_rows_are_drawn_apart(key):
    reader = fakes.uniform(257)
    sampling, keys = g.Sampling(temperature=1.0), jax.random.split(key, 30)
    state, given = reader.start(ONE, 2), np.full((2, 30), -1, np.int32)
    given[1, 4] = 7
    logits = jnp.zeros((2, 257))
    tokens, _, _ = g.decode(
        reader, sampling, 257, True, ONE, state, logits, given, keys
    )
    assert tokens[1, 4] == 7 and np.mean(tokens[0] == tokens[1]) < 0.2


def test_a_prompt_of_nothing():
    with pytest.raises(ValueError, match="prompt must have at least one token"):
        g.prefill(fakes.uniform(257), ONE, np.zeros(0, np.int32))


def test_text_comes_as_it_is_made(key):
    calls = []

    def ids():
        for token in "héllo".encode():
            calls.append(token)
            yield token

    text = g.as_text(BYTES, ids())
    assert next(text) == "h" and len(calls) == 1
    assert next(text) == "é" and len(calls) == 3


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "🌲🌳", ""])
def test_characters_are_held_back_until_complete(text):
    pieces = list(g.as_text(BYTES, text.encode()))
    assert pieces == list(text)


def test_characters_cut_by_bpe_come_back_whole():
    tokenizer = train_bpe(["日本語 日本 🌲".encode()] * 3, vocab_size=260)
    text = "日本語と🌲🌲 naïve"
    assert "".join(g.as_text(tokenizer, tokenizer.encode(text.encode()))) == text


def test_bytes_that_are_no_text_are_replaced():
    broken = b"a\xff\xe2\x82b\xe2\x82"
    assert "".join(g.as_text(BYTES, broken)) == broken.decode("utf-8", "replace")


def test_bad_arguments_are_named(key):
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"temperature must .* got {temperature}"):
            g.Sampling(temperature=temperature)
    for top_k in (0, -5, 2.5, True):
        with pytest.raises(ValueError, match=f"top_k must .* got {top_k}"):
            g.Sampling(top_k=top_k)
    for top_p in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"top_p must .* got {top_p}"):
            g.Sampling(top_p=top_p)
    for min_p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"min_p must .* got {min_p}"):
            g.Sampling(min_p=min_p)
    for stop in ("text", ("",), (b"x",)):
        with pytest.raises(ValueError, match="stop must be a tuple of texts"):
            g.Sampling(stop=stop)
    reader = fakes.uniform(257)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        g.generate(reader, ONE, BYTES, b"", tokens=0, key=key)
    with pytest.raises(ValueError, match="block must be at least 1 token, got 0"):
        g.generate(reader, ONE, BYTES, b"", tokens=5, key=key, block=0)
    with pytest.raises(ValueError, match=r"257 ids, more than .* vocab \(9\)"):
        g.generate(fakes.uniform(9), ONE, BYTES, b"", tokens=5, key=key)


def test_reading_with_other_chunks_is_told(caplog):
    changed = reader_lib._rechunked(small.HOPE, 0.5)
    assert changed.mixer.memory.chunk == small.HOPE.mixer.memory.chunk // 2
    assert "chunks 0.5 times as long as in training" in caplog.text
