"""Bits per byte against numbers worked by hand and against a plain Python reader."""

import gzip
import lzma
import math
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.data.text import Document
from hope_jax.data.tokenizer import ByteTokenizer, train_bpe
from hope_jax.evaluate import language_model
from hope_jax.stream.reader import Reader
from tests.models import small
from tests.stream import fakes

BYTES = ByteTokenizer()
ONE = jnp.ones(())
DOCUMENTS = [
    Document("short", b"ab"),
    Document("long", b"the cat sat on the mat, and the rat sat on the cat" * 3),
    Document("one byte", b"z"),
    Document("accents", "déjà vu, déjà lu".encode()),
]


def bits(nats, size):
    return nats / math.log(2) / size


def count_by_hand(runs, learn=True):
    """The costs in nats of `fakes.counting` for runs of documents, one token a time."""
    costs = {}
    for run in runs:
        counts = np.zeros(BYTES.vocab_size)
        for document in run:
            counts[BYTES.bos] += learn
            total = 0.0
            for byte in document.data:
                weights = counts + 1
                total -= math.log(weights[byte] / weights.sum())
                counts[byte] += learn
            costs[document.name] = total
    return [costs[document.name] for document in DOCUMENTS]


@pytest.mark.parametrize("mode", language_model.MODES)
def test_a_uniform_model_costs_log2_of_the_vocabulary_a_token(mode):
    tokenizer = train_bpe([b"the cat sat on the mat"], vocab_size=262)
    assert tokenizer.vocab_size == 262
    result = language_model.score(
        fakes.uniform(262), ONE, tokenizer, DOCUMENTS, mode=mode, rows=2, window=16
    )
    tokens = sum(len(tokenizer.encode(document.data)) for document in DOCUMENTS)
    size = sum(len(document.data) for document in DOCUMENTS)
    assert tokens < size  # so that bits per byte is not bits per token
    assert result.tokens.sum() == tokens and result.bytes.sum() == size
    assert result.bits_per_byte == pytest.approx(math.log2(262) * tokens / size)
    for cost, document in zip(result.per_document, DOCUMENTS, strict=True):
        alone = len(tokenizer.encode(document.data)) / len(document.data)
        assert cost == pytest.approx(math.log2(262) * alone)


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize("window", [1, 16, 200])
def test_reset_is_each_document_by_itself(rows, window):
    result = language_model.score(
        fakes.counting(257, span=4),
        ONE,
        BYTES,
        DOCUMENTS,
        mode="reset",
        rows=rows,
        window=window,
    )
    expected = count_by_hand([[document] for document in DOCUMENTS])
    np.testing.assert_allclose(result.nats, expected, rtol=1e-5)
    assert result.names == ("short", "long", "one byte", "accents")


@pytest.mark.parametrize("window", [4, 64, 1000])
def test_carried_reads_on_from_document_to_document(window):
    result = language_model.score(
        fakes.counting(257),
        ONE,
        BYTES,
        DOCUMENTS,
        mode="carried",
        rows=1,
        window=window,
    )
    np.testing.assert_allclose(result.nats, count_by_hand([DOCUMENTS]), rtol=1e-5)
    alone = count_by_hand([[document] for document in DOCUMENTS])
    assert result.nats[0] == pytest.approx(alone[0])  # nothing was read before it
    assert np.all(np.abs(result.nats[1:] - alone[1:]) > 0.01)


def test_carried_streams_do_not_read_each_other():
    short, long, byte, accents = DOCUMENTS
    result = language_model.score(
        fakes.counting(257), ONE, BYTES, DOCUMENTS, mode="carried", rows=2, window=8
    )
    # Each document in turn goes to the shorter stream.
    expected = count_by_hand([[short, byte, accents], [long]])
    np.testing.assert_allclose(result.nats, expected, rtol=1e-5)


def test_carried_leaves_no_stream_with_one_document():
    carried, one = (
        language_model.score(
            fakes.counting(257), ONE, BYTES, DOCUMENTS[:3], mode="carried", rows=rows
        )
        for rows in (8, 1)
    )
    np.testing.assert_array_equal(carried.nats, one.nats)


def test_frozen_neither_learns_nor_carries():
    result = language_model.score(
        fakes.counting(257), ONE, BYTES, DOCUMENTS, mode="frozen", rows=2, window=8
    )
    expected = count_by_hand([[document] for document in DOCUMENTS], learn=False)
    np.testing.assert_allclose(result.nats, expected, rtol=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(257))


def test_a_mode_is_compiled_once():
    language_model._read.clear_cache()
    reader = fakes.counting(257)
    for documents in (DOCUMENTS, DOCUMENTS[::-1]):
        language_model.score(
            reader, ONE, BYTES, documents, mode="reset", rows=2, window=16
        )
    assert language_model._read._cache_size() == 1


def test_evaluate_names_the_mode_in_every_metric():
    metrics = language_model.evaluate(
        fakes.counting(257), ONE, BYTES, DOCUMENTS, rows=1
    )
    assert set(metrics) == {
        f"{name}_{mode}"
        for name in ("bits_per_byte", "nats_per_token", "seconds")
        for mode in ("reset", "carried", "frozen")
    }
    assert all(isinstance(value, float) for value in metrics.values())
    size = sum(len(document.data) for document in DOCUMENTS)
    runs = {"reset": [[d] for d in DOCUMENTS], "carried": [DOCUMENTS]}
    for mode, run in runs.items():
        nats = sum(count_by_hand(run))
        assert metrics[f"bits_per_byte_{mode}"] == pytest.approx(bits(nats, size))
        assert metrics[f"nats_per_token_{mode}"] == pytest.approx(nats / size)
    assert metrics["bits_per_byte_frozen"] == pytest.approx(math.log2(257))


def test_compressed_sizes_are_those_of_each_file_by_itself():
    sizes = language_model.compression(DOCUMENTS)
    data = [document.data for document in DOCUMENTS]
    assert sizes.gzip.tolist() == [len(gzip.compress(d, 9)) for d in data]
    assert sizes.xz.tolist() == [len(lzma.compress(d, preset=9)) for d in data]
    total = sum(map(len, data))
    assert sizes.gzip_bits_per_byte == 8 * sum(sizes.gzip) / total
    assert sizes.xz_bits_per_byte == 8 * sum(sizes.xz) / total


def test_compressed_sizes_are_those_of_the_programs():
    text = b"".join(b"line %d of a file to pack\n" % i for i in range(5000))
    sizes = language_model.compression([Document("lines", text)])
    for size, command in ((sizes.gzip, "gzip"), (sizes.xz, "xz")):
        if shutil.which(command):
            packed = subprocess.run(
                [command, "-9", "-c"], input=text, capture_output=True, check=True
            )
            assert size.tolist() == [len(packed.stdout)]


def test_bad_arguments_are_named():
    def score(**changes):
        arguments = dict(mode="reset", rows=2, window=8)
        documents = changes.pop("documents", DOCUMENTS)
        reader = changes.pop("reader", fakes.uniform(257))
        return language_model.score(
            reader, ONE, BYTES, documents, **(arguments | changes)
        )

    with pytest.raises(ValueError, match="mode must be one of .*, got 'warm'"):
        score(mode="warm")
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        score(rows=0)
    with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
        score(window=0)
    with pytest.raises(ValueError, match="documents is empty"):
        score(documents=[])
    with pytest.raises(ValueError, match="'hollow' has no bytes"):
        score(documents=[*DOCUMENTS, Document("hollow", b"")])
    with pytest.raises(ValueError, match=r"257 ids, more than the model's vocab \(9\)"):
        score(reader=fakes.uniform(9))


def test_a_score_that_is_not_finite_names_the_document():
    def apply(params, tokens, state, aligned, learn):
        poisoned = jnp.cumsum(tokens == ord("z"), axis=1)[..., None] > 0
        return jnp.where(poisoned, jnp.nan, jnp.zeros((1, 1, 257))), state

    reader = Reader(apply, lambda params, batch: jnp.zeros(batch), 1, 257)
    documents = [Document("good", b"abc"), Document("bad", b"xyz.")]
    with pytest.raises(FloatingPointError, match="'bad' is not finite in mode 'reset'"):
        language_model.score(reader, ONE, BYTES, documents, mode="reset")


def test_modes_that_differ():
    one, two = DOCUMENTS[:1], DOCUMENTS[:2]
    assert language_model.modes_of(small.TRANSFORMER, one) == ("reset",)
    assert language_model.modes_of(small.TRANSFORMER, two) == ("reset", "carried")
    assert language_model.modes_of(small.HOPE, one) == ("reset", "frozen")
