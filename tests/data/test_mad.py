"""The tasks of MAD: what a row holds, by readers in plain Python, and what is asked."""

import functools
import hashlib

import jax
import numpy as np
import pytest

from hope_jax.data.synthetic import TASKS
from hope_jax.data.synthetic.compression import CompressionConfig
from hope_jax.data.synthetic.copying import CopyingConfig
from hope_jax.data.synthetic.fuzzy import FuzzyConfig
from hope_jax.data.synthetic.in_context import InContextConfig
from hope_jax.data.synthetic.memorisation import MemorisationConfig, mapped

NOISY = InContextConfig(vocab=32, noise_vocab=16, noise=0.2)
DIGESTS = {
    "in context": (InContextConfig(), "cde98cab30068659"),
    "in context, test": (InContextConfig().tested, "2d91117d0ed7e953"),
    "noisy, test": (NOISY.tested, "79767968a82acfac"),
    "fuzzy": (FuzzyConfig(), "0342948b600ea212"),
    "fuzzy, test": (FuzzyConfig().tested, "739861261bf78774"),
    "copying": (CopyingConfig(), "3e30cab913719a7f"),
    "compression": (CompressionConfig(), "e237f3cda41b4c37"),
    "memorisation": (MemorisationConfig(), "41d87dd694009968"),
}


@functools.cache
def rows(task, count=64, seed=0):
    made = jax.jit(task.batch, static_argnums=1)(jax.random.key(seed), count)
    return jax.tree.map(np.asarray, made)


@pytest.mark.parametrize("name", DIGESTS)
def test_a_key_makes_the_same_bytes_everywhere(name):
    task, digest = DIGESTS[name]
    made = hashlib.sha256(b"".join(a.tobytes() for a in rows(task, 8)))
    assert made.hexdigest()[:16] == digest


@pytest.mark.parametrize("name", DIGESTS)
def test_rows_are_of_their_task(name):
    task, _ = DIGESTS[name]
    tokens, labels, mask = rows(task)
    assert tokens.shape == labels.shape == mask.shape == (64, task.length)
    assert tokens.dtype == labels.dtype == np.int32 and mask.dtype == bool
    for ids in (tokens, labels):
        assert ids.min() >= 0 and ids.max() < task.vocab
    assert (labels[~mask] == 0).all() and mask.any(axis=1).all()
    assert mask.sum(axis=1).max() <= task.asked
    assert len({row.tobytes() for row in tokens}) == 64
    assert task.tested.tested == task.tested
    assert TASKS.get(task.kind).kind == task.kind


@pytest.mark.parametrize("task", [InContextConfig(), NOISY], ids=("plain", "noisy"))
def test_recall_asks_for_keys_that_come_again(task):
    half = (task.vocab - task.noise_vocab) // 2
    noise, last, counts = 0, [], np.zeros(half)
    for tokens, labels, mask in zip(*rows(task.tested), strict=True):
        known = {}
        for i, (k, v) in enumerate(tokens.reshape(-1, 2).tolist()):
            assert not mask[2 * i + 1]
            if k >= 2 * half:
                assert v >= 2 * half and not mask[2 * i]
                noise += 1
                continue
            assert k < half <= v < 2 * half
            assert mask[2 * i] == (k in known)
            if k in known:
                assert labels[2 * i] == v == known[k]
            known[k] = v
            counts[k] += 1
        last.append(tokens[-2])
        assert mask[-2]
    assert noise / (63 * 64) == pytest.approx(task.noise * 62 / 63, abs=0.02)
    np.testing.assert_allclose(counts / counts.sum(), 1 / half, atol=0.03)
    assert set(last) == set(range(half))


@pytest.mark.parametrize("task", [InContextConfig(), FuzzyConfig()])
def test_training_asks_for_every_next_token(task):
    tokens, labels, mask = rows(task)
    assert mask[:, :-1].all()
    np.testing.assert_array_equal(labels[:, :-1], tokens[:, 1:])
    assert mask[:, -1].all() == isinstance(
        task, FuzzyConfig
    )  # whose row is one shorter


def parts(tokens, keys, pad):
    """The motifs of a row whose keys are of full length: pairs of tuples."""
    row = [t for t in tokens if t != pad]
    pairs = []
    while row:
        k, row = tuple(row[:keys]), row[keys:]
        size = next((i for i, t in enumerate(row) if t < 7), len(row))
        pairs.append((k, tuple(row[:size])))
        row = row[size:]
    return pairs


def test_fuzzy_recall_asks_for_values_that_come_again():
    task, sizes, places = FuzzyConfig().tested, [], []
    for tokens, labels, mask in zip(*rows(task, 256), strict=True):
        text = [*tokens.tolist(), int(labels[-1])]  # the last value's last token
        filler = text.index(next(t for t in text if t != 15))
        assert 2 <= filler and 15 not in text[filler:]
        expected, known, at = np.zeros(task.length, bool), {}, filler
        pairs = parts(text, 3, 15)
        for k, v in pairs:
            assert len(set(k)) == 3 and max(k) < 7
            assert 1 <= len(set(v)) == len(v) <= 3 and min(v) >= 7
            assert known.get(k, v) == v
            if k in known:
                places_of_v = np.arange(at + 2, at + 2 + len(v))
                expected[places_of_v] = True
                assert labels[places_of_v].tolist() == list(v)
            known[k] = v
            sizes.append(len(v))
            at += 3 + len(v)
        np.testing.assert_array_equal(mask, expected)
        probe = pairs[-1]
        assert probe in pairs[:-1]
        places.append(pairs.index(probe) / len(pairs))
        limit = task.length - 3 - len(probe[1]) - 6
        begun = sum(len(k) + len(v) for k, v in pairs[:-2])
        assert begun < limit <= begun + sum(map(len, pairs[-2]))
    np.testing.assert_allclose(np.bincount(sizes)[1:] / len(sizes), 1 / 3, atol=0.04)
    assert np.mean(places) == pytest.approx(0.5, abs=0.06)


def test_fuzzy_keys_are_of_any_length_in_training():
    """Runs of keys' tokens: 1 to 3, mixed, and values' between them too."""
    tokens = rows(FuzzyConfig(), 256).tokens
    runs = {"keys": [], "values": []}
    for row in tokens.tolist():
        kinds = ["" if t == 15 else "keys" if t < 7 else "values" for t in row]
        start = 0
        for i in range(1, len(row) + 1):
            if i == len(row) or kinds[i] != kinds[start]:
                if kinds[start]:
                    runs[kinds[start]].append(i - start)
                start = i
    for found in runs.values():
        shares = np.bincount(found)[1:] / len(found)
        np.testing.assert_allclose(shares, 1 / 3, atol=0.03)


def test_copying_says_again_what_was_not_blank():
    task = CopyingConfig()
    gaps = []
    for tokens, labels, mask in zip(*rows(task), strict=True):
        before, now, after = tokens[:239], tokens[239], tokens[240:]
        said = before[before != 14]
        assert len(said) == 16 and said.max() < 14
        assert now == 15 and (after == 14).all()
        assert np.flatnonzero(mask).tolist() == list(range(240, 256))
        np.testing.assert_array_equal(labels[mask], said)
        assert before[-1] != 14  # every blank stands before a token
        at = np.flatnonzero(before != 14)
        gaps.append(np.diff(at, prepend=-1) - 1)
    gaps = np.array(gaps)
    assert (gaps.sum(axis=1) == 223).all()
    np.testing.assert_allclose(gaps.mean(axis=0), 223 / 16, atol=2.5)


def test_compression_asks_for_all_that_was_read():
    task = CompressionConfig()
    tokens, labels, mask = rows(task)
    np.testing.assert_array_equal(labels, tokens)
    assert mask.all() and (tokens[:, -1] == 15).all()
    shares = np.bincount(tokens[:, :-1].ravel(), minlength=16) / tokens[:, :-1].size
    np.testing.assert_allclose(shares, [*[1 / 15] * 15, 0], atol=0.02)


def test_memorisation_has_one_map_for_all_rows():
    task = MemorisationConfig()
    values = mapped(task.vocab, task.seed)
    assert len(values) == 127 == len(set(values.tolist()))
    assert values.min() >= 127 and values.max() < 255
    assert values[:4].tolist() == [
        239,
        241,
        146,
        166,
    ]  # of mad-lab's generate_kv_map, seed 12345
    for seed in (0, 1):
        tokens, labels, mask = rows(task, 256, seed)
        assert (tokens[:, 1::2] == 255).all() and not mask[:, ::2].any()
        np.testing.assert_array_equal(labels[:, 1::2], values[tokens[:, ::2]])
        assert set(tokens[:, ::2].ravel().tolist()) == set(range(127))
    assert (mapped(task.vocab, 1) != values).mean() > 0.9


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (InContextConfig, {"length": 9}, "length must be even and at least 4, got 9"),
        (InContextConfig, {"noise": 0.1}, r"noise \(0.1\) and noise_vocab \(0\) go to"),
        (InContextConfig, {"noise": 1.0}, r"noise must lie in \[0, 1\), got 1.0"),
        (InContextConfig, {"vocab": 1}, "vocab must be at least noise_vocab"),
        (
            FuzzyConfig,
            {"vocab": 6},
            r"vocab must be at least 2 motif \+ 1 = 7",
        ),
        (
            FuzzyConfig,
            {"length": 17},
            "length must be at least 6 motif = 18, ",
        ),
        (FuzzyConfig, {"motif": 0}, "motif must be at least 1, got 0"),
        (CopyingConfig, {"length": 32}, r"at least 2 copied \+ 1 = 33, got 32"),
        (CopyingConfig, {"vocab": 2}, "vocab must be at least 3, got 2"),
        (CompressionConfig, {"length": 1}, "length must be at least 2, got 1"),
        (MemorisationConfig, {"length": 7}, "length must be even, got 7"),
    ],
)
def test_bad_tasks_are_refused(task, fields, message):
    with pytest.raises(ValueError, match=message):
        task(**fields)
