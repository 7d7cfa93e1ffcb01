"""`launch.prepare_data` as its user meets it: one line on what is wrong, at once."""

import gzip
import json
import os

import pytest

from hope_jax.data import prepare, prepared
from launch import prepare_data
from tests.launch.test_evaluate import refusal


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = (json.dumps({"text": f"{i} " + "a word " * 9}) + "\n" for i in range(60))
    path.write_text("".join(lines))
    return path


@pytest.fixture
def no_training(monkeypatch):
    def train(*_):
        raise AssertionError("a tokenizer was trained first")

    monkeypatch.setattr(prepare, "train_tokenizer", train)


def test_prepares_and_says_how_to_use_it(source, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [f"--source={source}", "--tokenizer=bytes", "--held_out=0.2"]
    prepare_data.main([*flags, f"--out={out}", "--processes=1"])
    assert f"--data={out} --set data.tokenizer=" in capsys.readouterr().out
    assert prepared.load(out).manifest["vocab_size"] == 257


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    "flags, said",
    [
        (["--out=full"], "'full' holds something else already"),
        (["--out=file"], "'file' is no folder"),
        (["--out=gs://bucket/x"], "'gs://bucket/x' is a URL"),
        (["--out=/proc/x"], "'/proc/x' cannot be written to"),
        (["--out=listed"], "'listed' holds something else already"),
        (["--out=new", "--held_out=2"], "held_out must lie between 0 and 1"),
        (["--out=new", "--shard_bytes=0"], "shard_bytes must be at least 1"),
        (["--out=new", "--processes=0"], "--processes must be at least 1, got 0"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_refused_before_a_tokenizer_is_trained(
    source, tmp_path, monkeypatch, flags, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / prepare.PLAN).write_text("[]")
    before = sorted(os.walk(tmp_path))
    assert said in refusal(prepare_data, f"--source={source}", *flags)
    assert sorted(os.walk(tmp_path)) == before


@pytest.mark.usefixtures("no_training")
def test_some_source_is_needed(tmp_path):
    said = refusal(prepare_data, f"--out={tmp_path / 'out'}")
    assert "Give a source: a path, hf:NAME or tfds:NAME." in said


@pytest.mark.parametrize("vocab, said", [(10, "at least 257"), (10**9, "4,194,304")])
def test_a_vocabulary_that_no_tokenizer_has(source, tmp_path, vocab, said):
    flags = [f"--source={source}", f"--out={tmp_path / 'out'}", f"--vocab={vocab}"]
    assert said in refusal(prepare_data, *flags)


def flipped(data: bytes) -> bytes:
    return data[:30] + bytes([data[30] ^ 255]) + data[31:]


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("cut.jsonl.gz", lambda data: data[: len(data) // 2]),
        ("flipped.jsonl.gz", flipped),
        ("none.jsonl.gz", lambda data: b"hello"),
        ("none.jsonl.zst", lambda data: b"hello"),
        ("none.parquet", lambda data: b"hello"),
    ],
)
def test_a_file_that_is_damaged_is_named(source, tmp_path, name, spoil):
    if not name.endswith(".gz"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(spoil(gzip.compress(source.read_bytes(), mtime=0)))
    flags = [f"--source={path}", f"--out={tmp_path / 'out'}", "--tokenizer=bytes"]
    said = refusal(prepare_data, *flags, "--processes=1")
    assert f"{path} cannot be read: " in said and "\n" not in said


def test_a_data_set_that_is_not_there_is_one_line(tmp_path):
    """TensorFlow's list of those that there are has three hundred."""
    flags = ["--source=tfds:no_such_thing", f"--out={tmp_path / 'out'}"]
    said = refusal(prepare_data, *flags, "--tokenizer=bytes")
    assert "no_such_thing not found" in said and "\n" not in said
