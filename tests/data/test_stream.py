"""Streams: each token once, the same order for any workers and hosts, exact resume."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import grain
import numpy as np
import pytest
from absl import flags

from hope_jax.data import reading, stream, text, tokenizer
from hope_jax.data.stream import Rows, StreamConfig

_BOS = 256


def some_documents(*lengths: int) -> list[np.ndarray]:
    """Documents of `1 + length` ids whose texts never repeat one another."""
    rng = np.random.default_rng(sum(lengths))
    return [
        np.concatenate([[_BOS], rng.integers(0, 256, length)]).astype(np.int32)
        for length in lengths
    ]


def some_rows(count: int = 11, seq_len: int = 4) -> Rows:
    """Rows whose ids are their positions, so that a row names itself."""
    ids = np.arange(count * seq_len + 1, dtype=np.int32)
    return Rows([ids], seq_len=seq_len, vocab_size=ids.size)


def config(**changes) -> StreamConfig:
    return StreamConfig(**{"seq_len": 4, "batch": 2, "seed": 7} | changes)


def taken(dataset, count: int) -> np.ndarray:
    iterator = iter(dataset)
    try:
        return np.stack([next(iterator)["tokens"] for _ in range(count)])
    finally:
        iterator.close()


def test_rows_by_hand():
    rows = Rows(
        [np.array([9, 1, 2, 3]), np.array([9, 4, 5, 6, 7])], seq_len=3, vocab_size=10
    )
    assert [rows[i]["tokens"].tolist() for i in range(len(rows))] == [
        [9, 1, 2, 3],
        [3, 9, 4, 5],
    ]
    assert rows.dropped == 2
    assert rows[0]["tokens"].dtype == np.int32


def test_each_token_is_predicted_once():
    documents = some_documents(13, 1, 29)
    rows = Rows(documents, seq_len=5, vocab_size=257)
    predicted = np.concatenate([rows[i]["tokens"][1:] for i in range(len(rows))])
    ids = np.concatenate(documents)
    np.testing.assert_array_equal(predicted, ids[1 : 1 + predicted.size])
    assert 1 + predicted.size + rows.dropped == ids.size
    assert rows.dropped < 5
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_batches_have_the_shape_and_cover_each_epoch():
    rows = some_rows(count=12)
    tokens = taken(stream.batches(rows, config(batch=3)), 8)
    assert tokens.shape == (8, 3, 5) and tokens.dtype == np.int32
    first, second = tokens[:4].reshape(12, 5), tokens[4:].reshape(12, 5)
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(12) * 4)
        np.testing.assert_array_equal(epoch - epoch[:, :1], [list(range(5))] * 12)
    assert (first != second).any(), "an epoch must be shuffled anew"


def test_order_depends_on_the_seed_alone():
    rows = some_rows()
    same = [taken(stream.batches(rows, config()), 9) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert (taken(stream.batches(rows, config(seed=8)), 9) != same[0]).any()
    plain = taken(stream.batches(rows, config(shuffle=False)), 5)
    np.testing.assert_array_equal(plain[..., 0].ravel(), np.arange(10) * 4)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_each_batch(hosts):
    rows = some_rows()
    whole = taken(stream.batches(rows, config(batch=4)), 7)
    parts = [
        taken(
            stream.batches(
                rows, config(batch=4), process_index=host, process_count=hosts
            ),
            7,
        )
        for host in range(hosts)
    ]
    for host, part in enumerate(parts):
        np.testing.assert_array_equal(part, whole[:, host::hosts])


@pytest.mark.parametrize("changes", [{}, {"shuffle": False}], ids=str)
@pytest.mark.parametrize("hosts", [1, 2])
def test_resumes_at_the_exact_example(changes, hosts):
    dataset = stream.batches(some_rows(count=5), config(**changes), process_count=hosts)
    # Eight batches of two from five rows: over three ends of an epoch.
    grain.experimental.assert_equal_output_after_checkpoint(
        grain.experimental.LimitIterDataset(dataset, 8)
    )


def test_state_is_small_json_wherever_it_is_taken():
    iterator = iter(stream.batches(some_rows(), config()))
    for _ in range(50):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    assert len(json.dumps(state)) < 500
    expected = next(iterator)["tokens"]
    again = iter(stream.batches(some_rows(), config()))
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], expected)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 0), (0, 1)])
def test_workers_change_neither_order_nor_resume(before, after):
    rows = some_rows()
    expected = taken(stream.batches(rows, config()), 8)
    iterator = iter(stream.batches(rows, config(workers=before)))
    with contextlib.closing(iterator):
        first = [next(iterator)["tokens"] for _ in range(3)]
        state = iterator.get_state()
    np.testing.assert_array_equal(first, expected[:3])
    resumed = iter(stream.batches(rows, config(workers=after)))
    with contextlib.closing(resumed):
        next(resumed)  # what was read ahead by then is read again
        resumed.set_state(state)
        rest = [next(resumed)["tokens"] for _ in range(5)]
    np.testing.assert_array_equal(rest, expected[3:])


def test_states_of_earlier_versions_are_read():
    rows = some_rows()
    expected = taken(stream.batches(rows, config()), 4)[3]
    of_workers = {"iterators_in_use_states": [{"next_index": 3}, {"next_index": 3}]}
    for state in ({"next_index": 6}, of_workers):
        iterator = iter(stream.batches(rows, config()))
        iterator.set_state(state)
        np.testing.assert_array_equal(next(iterator)["tokens"], expected)


def test_fingerprint_names_every_difference():
    saved = stream.fingerprint(config(), "c" * 64, "t" * 64)
    stream.check_fingerprint(saved | {"workers": 2}, saved)  # an earlier version's
    assert json.loads(json.dumps(saved)) == saved
    stream.check_fingerprint(saved, dict(saved))
    changes = {"seq_len": 5, "batch": 3, "seed": 8, "shuffle": False}
    others = [
        stream.fingerprint(config(**{k: v}), "c" * 64, "t" * 64)
        for k, v in changes.items()
    ]
    others.append(stream.fingerprint(config(), "d" * 64, "t" * 64))
    others.append(stream.fingerprint(config(), "c" * 64, "u" * 64))
    others.append(stream.fingerprint(config(), "c" * 64, "t" * 64, process_count=2))
    fields = [*changes, "corpus", "tokenizer", "process_count"]
    assert set(fields) == set(saved)
    for field, other in zip(fields, others, strict=True):
        with pytest.raises(ValueError) as error:
            stream.check_fingerprint(saved, other)
        line = f"  {field}: saved {saved[field]!r}, now {other[field]!r}"
        assert [row for row in str(error.value).splitlines() if ":" in row[:20]] == [
            line
        ]
    with pytest.raises(ValueError, match=r"(?s)batch: saved 2, now 9.*seed: .*absent"):
        now = saved | {"batch": 9}
        del now["seed"]
        stream.check_fingerprint(saved, now)


@pytest.mark.parametrize("wrong", [257, -1])
def test_ids_outside_the_vocabulary_are_refused(wrong):
    documents = some_documents(9, 9)
    documents[1][3] = wrong
    with pytest.raises(
        ValueError, match=rf"Token {wrong} at position 3 of documents\[1\].*\[0, 257\)"
    ):
        Rows(documents, seq_len=4, vocab_size=257)


@pytest.mark.parametrize(
    "ids", [np.zeros(0, np.int32), np.ones(3), np.ones((2, 2), np.int32)], ids=repr
)
def test_documents_that_are_no_ids_are_refused(ids):
    with pytest.raises(ValueError, match=r"documents\[1\] must be whole numbers"):
        Rows([*some_documents(9), ids], seq_len=4, vocab_size=257)


def test_too_little_text_says_how_much():
    with pytest.raises(
        ValueError, match="2 documents hold 5 tokens.*seq_len=5 needs 6"
    ):
        Rows(some_documents(1, 2), seq_len=5, vocab_size=257)
    with pytest.raises(ValueError, match="0 documents hold 0 tokens"):
        Rows([], seq_len=5, vocab_size=257)
    assert len(Rows(some_documents(1, 2), seq_len=4, vocab_size=257)) == 1
    with pytest.raises(ValueError, match="3 rows.*one batch of 4"):
        stream.batches(some_rows(count=3), config(batch=4))


@pytest.mark.parametrize(
    "wrong", [{"seq_len": 0}, {"batch": 0}, {"workers": -1}, {"seed": -1}], ids=str
)
def test_config_refuses(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must .* got {wrong[name]}"):
        config(**wrong)


def test_batches_refuse_what_does_not_fit(monkeypatch):
    rows = some_rows()
    with pytest.raises(ValueError, match="seq_len=4, but config.seq_len is 8"):
        stream.batches(rows, config(seq_len=8))
    with pytest.raises(ValueError, match=r"process_index \(2\) .* is 2"):
        stream.batches(rows, config(), process_index=2, process_count=2)
    with pytest.raises(ValueError, match=r"batch \(2\) .* process_count \(3\)"):
        stream.batches(rows, config(), process_count=3)
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        Rows(some_documents(9), seq_len=0, vocab_size=257)
    monkeypatch.setattr(reading.flags, "FLAGS", flags.FlagValues())
    with pytest.raises(ValueError, match="workers=1 needs parsed absl flags"):
        stream.batches(rows, config(workers=1))


_LENGTHS = [(13, 1, 29, 0, 8, 8, 40), (5,), (3, 4, 2)]


@pytest.mark.parametrize("lengths", _LENGTHS, ids=str)
@pytest.mark.parametrize("window", [1, 4, 7, 64])
@pytest.mark.parametrize("carried", [False, True])
def test_each_document_is_scored_exactly_once(lengths, window, carried):
    documents = some_documents(*lengths)
    found = {index: [] for index in range(len(documents))}
    for group in stream.evaluation_windows(
        documents, window=window, batch=3, carried=carried
    ):
        for array in group:
            assert array.shape == group.tokens.shape
        assert group.tokens.shape[0] == 3 and group.tokens.shape[1] % window == 0
        np.testing.assert_array_equal(group.mask, group.document >= 0)
        assert group.tokens.dtype == group.targets.dtype == np.int32
        for b in range(3):
            for index in range(len(documents)):
                at = np.flatnonzero(group.document[b] == index)
                found[index] += group.targets[b, at].tolist()
                # What is read is the document itself, bos first, one step behind.
                np.testing.assert_array_equal(
                    group.tokens[b, at], documents[index][: at.size]
                )
                assert not at.size or at[-1] - at[0] + 1 == at.size
    for index, ids in enumerate(documents):
        np.testing.assert_array_equal(found[index], ids[1:])


def test_reset_gives_each_document_a_row_of_its_own():
    documents = some_documents(3, 39, 8, 40, 9)
    groups = list(
        stream.evaluation_windows(documents, window=4, batch=2, carried=False)
    )
    per_row = [
        {int(i) for i in row if i >= 0} for group in groups for row in group.document
    ]
    assert per_row == [{3}, {1}, {4}, {2}, {0}, set()]
    assert [group.tokens.shape for group in groups] == [(2, 40), (2, 12), (2, 4)]
    assert all((group.tokens[0, 0] == _BOS) for group in groups)


def test_carried_gives_balanced_streams_in_order():
    documents = some_documents(10, 3, 3, 8, 1)
    (group,) = stream.evaluation_windows(documents, window=4, batch=2, carried=True)
    # Streams by hand: 0 gets document 0 (11 ids); 1 gets 1, 2 (8 ids) and 3; 0 gets 4.
    expected = [[0, 4], [1, 2, 3]]
    for row, indices in zip(range(2), expected, strict=True):
        ids = np.concatenate([documents[i] for i in indices])
        np.testing.assert_array_equal(group.tokens[row, : ids.size - 1], ids[:-1])
        scored = group.mask[row, : ids.size - 1]
        np.testing.assert_array_equal(scored, ids[1:] != _BOS)
        assert not group.mask[row, ids.size - 1 :].any()


def test_evaluation_refuses():
    documents = some_documents(3)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        stream.evaluation_windows(documents, window=0, batch=1, carried=False)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        stream.evaluation_windows(documents, window=1, batch=0, carried=False)
    with pytest.raises(ValueError, match="None of 1 documents has a token after bos"):
        stream.evaluation_windows(some_documents(0), window=1, batch=1, carried=True)


def test_real_plays_from_file_to_batch():
    root = os.environ.get("HOPE_DATA_DIR", Path(__file__).parents[2] / "../shared/data")
    path = Path(root) / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip("needs tinyshakespeare under HOPE_DATA_DIR")
    corpus = text.from_path(path)
    tok = tokenizer.train_bpe([d.data for d in corpus.train], vocab_size=512)
    rows = Rows(
        tokenizer.encode_documents(tok, corpus.train),
        seq_len=64,
        vocab_size=tok.vocab_size,
    )
    plain = taken(
        stream.batches(rows, StreamConfig(seq_len=64, batch=4, seed=0, shuffle=False)),
        2,
    )
    read = tok.decode(
        np.concatenate(
            [plain.reshape(8, 65)[0, :1], plain.reshape(8, 65)[:, 1:].ravel()]
        )
    )
    assert read.startswith(b"First Citizen:\nBefore we proceed any further")
    assert corpus.train[0].data.startswith(read)
    documents = tokenizer.encode_documents(tok, corpus.validation)
    scored = sum(
        group.mask.sum()
        for group in stream.evaluation_windows(
            documents, window=128, batch=1, carried=False
        )
    )
    assert scored == documents[0].size - 1


def test_packed_documents_begin_at_stretches():
    documents = [np.array([9, 1, 2, 3, 4]), np.array([9, 5]), np.array([9, 6, 7, 8])]
    rows = stream.PackedRows(documents, seq_len=8, vocab_size=10, stretch=4)
    assert len(rows) == 1 and rows.dropped == 7
    row = rows[0]
    assert row["tokens"].tolist() == [9, 1, 2, 3, 4, 0, 0, 0, 9]
    assert row["document"].tolist() == [0] * 5 + [-1] * 3 + [1]
    longer = stream.rows_of(documents * 2, seq_len=8, vocab_size=10, stretch=4)
    assert longer[1]["document"].tolist() == [1, 1, -1, -1, 2, 2, 2, 2, 3]
    plain = stream.rows_of(documents, seq_len=4, vocab_size=10, stretch=0)
    assert type(plain) is stream.Rows
    config = stream.StreamConfig(seq_len=8, batch=1, seed=0, stretch=4)
    with contextlib.closing(iter(stream.batches(rows, config))) as batches:
        batch = next(batches)
    assert batch["document"].shape == batch["tokens"].shape == (1, 9)


def test_the_fingerprint_says_how_rows_are_packed():
    """And of rows that are not it is as it was before there were others."""
    plain = stream.StreamConfig(seq_len=8, batch=1, seed=0)
    packed = dataclasses.replace(plain, stretch=4)
    assert "stretch" not in stream.fingerprint(plain, "a", "b")
    assert stream.fingerprint(packed, "a", "b")["stretch"] == 4


def test_stretches_that_do_not_fit_rows_are_refused():
    documents = [np.arange(9)]
    for stretch in (3, -1):
        said = rf"seq_len \(8\) must be a multiple of stretch \({stretch}\)"
        with pytest.raises(ValueError, match=said):
            stream.PackedRows(documents, seq_len=8, vocab_size=10, stretch=stretch)
