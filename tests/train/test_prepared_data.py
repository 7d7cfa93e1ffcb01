"""Runs on prepared data: the same door, the same numbers, resumed to the example."""

import json
import shutil

import numpy as np
import pytest

from hope_jax.core import config as config_lib
from hope_jax.data import prepare, prepared, sources, stream
from hope_jax.data.tokenizer import ByteTokenizer, train_bpe
from hope_jax.train import checkpoint, loop, metrics
from launch import evaluate
from tests.train import tiny

SMOKE = tiny.rows("smoke")["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Some documents, the long ones at the end of the alphabet."""
    root = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd \n"), 200)) for _ in range(60)]
    texts += ["".join(rng.choice(list("wxyz \n"), 600)) for _ in range(10)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (root / "in.jsonl").write_text(data)
    return _prepared(root, root / "out", ByteTokenizer())


def _prepared(root, out, tokens):
    plan = prepare.Plan(
        sources=(str(root / "in.jsonl"),),
        how=sources.Reading(),
        held_out=0.2,
        shard_bytes=1 << 20,
        tokenizer="",
        fingerprint=tokens.fingerprint,
    )
    return prepare.prepare(out, plan, tokens).folder


def config(folder, *settings):
    removed = ["data.max_train_bytes=none", f"data.path={folder}"]
    return config_lib.override(SMOKE, [*removed, *settings])


def test_trained_resumed_and_evaluated(folder, tmp_path, capsys):
    short = "train.steps=6", "train.checkpoint_every=3", "train.validate_every=3"
    run = config(folder, *short, "train.validate_batches=2")
    whole = loop.train(run, tmp_path / "whole")
    assert whole.finished
    log = metrics.read_log(tmp_path / "whole" / "metrics.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
    assert 1 < log[-1]["bits_per_byte"] / (log[-1]["loss"] / np.log(2)) < 1.01
    assert "validation_bits_per_byte" in log[-1]
    # As if it had been killed after the save of step 3.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    assert loop.train(run, tmp_path / "again", resume=True).finished
    logs = [
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "again")
    ]
    assert logs[0] == logs[1]
    capsys.readouterr()
    evaluate.main([f"--checkpoint={tmp_path / 'whole'}", "--compile_cache=none"])
    said = capsys.readouterr().out
    assert f"prepared {folder}" in said and "reset" in said


def test_the_rows_of_a_run_are_those_of_its_documents(folder):
    source = loop.load_source(config(folder, "train.validate_every=3"), None)
    documents = prepared.load(folder).documents("train")
    ids = [documents[i] for i in range(len(documents))]
    rows = stream.Rows(ids, seq_len=16, vocab_size=257)
    assert len(source.rows) == len(rows)
    np.testing.assert_array_equal(source.rows[9]["tokens"], rows[9]["tokens"])
    assert source.validation is not None and source.validation[0].shape == (4, 17)


@pytest.mark.parametrize("door", ["prepared", "text"])
def test_long_documents_get_their_share(folder, door, tmp_path):
    path = folder
    if door == "text":
        for i, line in enumerate((folder.parent / "in.jsonl").read_text().splitlines()):
            (tmp_path / f"{i:02}.txt").write_text(json.loads(line)["text"])
        path = tmp_path
    settings = "data.long_tokens=500", "data.max_validation_bytes=2000"
    only = loop.load_source(config(path, *settings), None).rows
    assert _long(only, 40) == 40
    half = loop.load_source(config(path, *settings, "data.long_share=0.5"), None).rows
    assert 20 <= _long(half, 40) <= 34  # some of all documents are long
    with pytest.raises(ValueError, match=r"long_share \(0.5\) needs long_tokens"):
        config(path, "data.long_share=0.5")


def _long(rows, count):
    """Rows of the first ones that are of long documents."""
    return sum(np.isin(rows[i]["tokens"], list(b"wxyz")).any() for i in range(count))


def test_data_is_bound_to_its_tokenizer(folder, tmp_path):
    learned = train_bpe([b"abcd abcd wxyz wxyz"], 262)
    other = _prepared(folder.parent, tmp_path / "other", learned)
    with pytest.raises(ValueError, match="data.tokenizer .bytes.* is not the one that"):
        loop.load_source(config(other), None)
    with pytest.raises(ValueError, match="data.tokenizer .bpe, data.vocab 300"):
        loop.load_source(config(other, "data.tokenizer=bpe", "data.vocab=300"), None)
    by_path = f"data.tokenizer={other / 'tokenizer.json'}"
    with pytest.raises(ValueError, match=r"model.vocab \(257\) must be at least"):
        loop.load_source(config(other, by_path), None)
    vocab = f"model.vocab={learned.vocab_size}"
    found = loop.load_source(config(other, by_path, vocab), None)
    assert found.tokenizer == learned
    ByteTokenizer().save(tmp_path / checkpoint.TOKENIZER)
    for origin in (tmp_path, tmp_path / checkpoint.FOLDER):
        with pytest.raises(checkpoint.ConfigMismatch, match="with another tokenizer"):
            loop.load_source(config(other, by_path, vocab), origin)


@pytest.mark.parametrize(
    "setting", ["data.max_train_bytes=1000", "data.undecodable=skip"]
)
def test_what_was_decided_in_preparing_cannot_be_set(folder, setting):
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]} .* is for text"):
        loop.load_source(config(folder, setting), None)


def test_a_mixture_is_trained_on(folder):
    source = loop.load_source(config(f"{folder}:1,{folder}:3"), None)
    assert isinstance(source.rows, stream.Mixture)
    assert source.bytes_per_token == pytest.approx(
        prepared.corpus(folder).bytes_per_token("train")
    )
