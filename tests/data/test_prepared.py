"""Prepared data: the same rows as from memory, the same bytes however it was made."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import grain
import numpy as np
import pytest

from hope_jax.data import prepare, prepared, sources, stream
from hope_jax.data.stream import StreamConfig
from hope_jax.data.tokenizer import ByteTokenizer, train_bpe

BYTES = ByteTokenizer()


def some_texts(count: int = 40) -> list[str]:
    """No two alike, of 1 to 60 bytes, each line a text."""
    rng = np.random.default_rng(count)
    return [
        f"{i} " + "".join(rng.choice(list("abcde "), rng.integers(0, 57)))
        for i in range(count)
    ]


def lines(path: Path, texts, field="text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({field: text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def plan(*given, how=None, **changes) -> prepare.Plan:
    fields = dict(
        sources=tuple(map(str, given)),
        how=how or sources.Reading(),
        held_out=0.2,
        shard_bytes=500,
        tokenizer="bytes",
        fingerprint=BYTES.fingerprint,
    )
    return prepare.Plan(**fields | changes)


@pytest.fixture(scope="module")
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "PIECE", 7)
        patch.setattr(prepared, "_BLOCK", 4)
        patch.setattr(prepared, "_PASS", 8)
        patch.setattr(prepared, "_KEPT", 2)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, small_pieces):
    """A folder of several shards, made of two files."""
    root = tmp_path_factory.mktemp("made")
    texts = some_texts()
    for i in range(2):
        lines(root / "in" / f"{i}.jsonl.gz", texts[20 * i : 20 * i + 20])
    return prepare.prepare(root / "out", plan(root / "in"), BYTES)


def documents(made, split="train") -> list[np.ndarray]:
    found = made.documents(split)
    return [found[i] for i in range(len(found))]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_document_is_there_once(made):
    texts = [
        made.tokenizer.decode(ids).decode()
        for split in prepared.SPLITS
        for ids in documents(made, split)
    ]
    assert sorted(texts) == sorted(some_texts())
    assert len(made.manifest["shards"]) == 2
    assert 0 < len(documents(made, "validation")) < 20
    assert all(ids[0] == BYTES.bos for ids in documents(made))
    for split in prepared.SPLITS:
        ids = documents(made, split)
        assert made.total(split, "tokens") == sum(map(len, ids))
        assert made.total(split, "bytes") == sum(len(i) - 1 for i in ids)


@pytest.mark.parametrize("least", [0, 30])
@pytest.mark.parametrize(("seq_len", "stretch"), [(5, 0), (64, 0), (12, 4), (60, 20)])
def test_rows_are_those_of_documents_in_memory(made, seq_len, stretch, least):
    rows = made.rows("train", seq_len=seq_len, stretch=stretch, least=least)
    kept = [ids for ids in documents(made) if len(ids) >= least]
    expected = stream.rows_of(kept, seq_len=seq_len, vocab_size=257, stretch=stretch)
    assert (len(rows), rows.dropped) == (len(expected), expected.dropped)
    for i in range(len(rows)):
        assert rows[i]["tokens"].dtype == np.int32
        np.testing.assert_array_equal(rows[i]["tokens"], expected[i]["tokens"])
        if stretch:
            owner, wanted = rows[i]["document"], expected[i]["document"]
            np.testing.assert_array_equal(owner < 0, wanted < 0)
            changes = np.diff(owner) != 0
            np.testing.assert_array_equal(changes, np.diff(wanted) != 0)
    with pytest.raises(IndexError):
        rows[len(rows)]


def config(**changes) -> StreamConfig:
    return StreamConfig(**{"seq_len": 12, "batch": 3, "seed": 7} | changes)


def mixture(made) -> stream.Mixture:
    rows = [made.rows("train", seq_len=12, least=least) for least in (0, 40)]
    return stream.Mixture([(rows[0], 0.75), (rows[1], 0.25)])


@pytest.mark.parametrize("kind", ["rows", "packed", "mixture"])
def test_resumes_at_the_exact_example(made, kind):
    rows = {
        "rows": lambda: made.rows("train", seq_len=12),
        "packed": lambda: made.rows("train", seq_len=12, stretch=4),
        "mixture": lambda: mixture(made),
    }[kind]()
    dataset = stream.batches(rows, config())
    grain.experimental.assert_equal_output_after_checkpoint(
        grain.experimental.LimitIterDataset(dataset, 6)
    )


@pytest.mark.slow
def test_any_number_of_workers_gives_one_order(made):
    found = []
    for workers in (0, 2):
        iterator = iter(stream.batches(mixture(made), config(workers=workers)))
        found.append([next(iterator)["tokens"] for _ in range(5)])
        iterator.close()
    np.testing.assert_array_equal(*found)


def test_a_mixture_keeps_its_shares_in_every_stretch():
    def constant(value):
        return stream.Rows([np.full(41, value)], seq_len=4, vocab_size=9)

    mixed = stream.Mixture([(constant(1), 0.7), (constant(2), 0.3)])
    batches = iter(stream.batches(mixed, config(seq_len=4, batch=10)))
    for _ in range(8):  # beyond the end of both
        assert (next(batches)["tokens"] == 2).sum() == 3 * 5
    with pytest.raises(ValueError, match="share must be above 0, got 0"):
        stream.Mixture([(constant(1), 0.0)])


def test_hosts_share_a_mixture(made):
    whole = iter(stream.batches(mixture(made), config(batch=4)))
    half = iter(
        stream.batches(mixture(made), config(batch=4), process_index=1, process_count=2)
    )
    for _ in range(4):
        np.testing.assert_array_equal(next(half)["tokens"], next(whole)["tokens"][1::2])


def test_a_stopped_preparation_goes_on_to_the_same_bytes(tmp_path):
    for i in range(4):
        lines(tmp_path / "in" / f"{i}.jsonl", some_texts(30 + i))
    wanted = prepare.prepare(tmp_path / "whole", plan(tmp_path / "in"), BYTES)
    assert len(wanted.manifest["shards"]) >= 4

    class Stopped(Exception):
        pass

    def stop(done, total):
        if done > total / 3:
            raise Stopped

    out = tmp_path / "out"
    out.mkdir()
    with (
        filelock.FileLock(out / ".lock"),
        pytest.raises(prepare.Preparing, match="Another program prepares"),
    ):
        prepare.prepare(out, plan(tmp_path / "in"), BYTES)
    with pytest.raises(Stopped):
        prepare.prepare(out, plan(tmp_path / "in"), BYTES, told=stop)
    with pytest.raises(prepared.Unprepared, match="has no manifest.json: its prep"):
        prepared.load(out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    (out / ".train-00003.array_record").write_bytes(b"half of a shard")
    with pytest.raises(prepare.Preparing, match="was begun otherwise: held_out"):
        prepare.prepare(out, plan(tmp_path / "in", held_out=0.3), BYTES)
    prepare.prepare(out, plan(tmp_path / "in"), BYTES)
    assert contents(out) == contents(tmp_path / "whole")
    assert kept and all(p.stat().st_mtime_ns == when for p, when in kept.items())
    # A file that is lost is made again.
    (out / "train-00001.lengths").unlink()
    with pytest.raises(prepared.Unprepared, match="train-00001.lengths.* is gone"):
        prepared.load(out)
    prepare.prepare(out, plan(tmp_path / "in"), BYTES)
    assert contents(out) == contents(tmp_path / "whole")
    lines(tmp_path / "in" / "0.jsonl", some_texts(5))
    with pytest.raises(prepare.Preparing, match="files of its sources have changed"):
        prepare.prepare(out, plan(tmp_path / "in"), BYTES)


@pytest.mark.slow
def test_killed_and_given_again_with_other_processes(tmp_path):
    for i in range(6):
        lines(tmp_path / "in" / f"{i}.jsonl.gz", some_texts(2000 + i))
    whole, out = tmp_path / "whole", tmp_path / "out"

    def command(folder, processes):
        return [
            *(sys.executable, "-m", "launch.prepare_data", f"--out={folder}"),
            *(f"--source={tmp_path / 'in'}", "--vocab=300", "--held_out=0.1"),
            *("--shard_bytes=20000", f"--processes={processes}"),
        ]

    subprocess.run(command(whole, 1), check=True, capture_output=True)
    killed = subprocess.Popen(command(out, 1), stdout=subprocess.DEVNULL)
    while not any((out / "shards").glob("*.json")):
        assert killed.poll() is None
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (out / prepared.MANIFEST).exists()
    subprocess.run(command(out, 2), check=True, capture_output=True)
    assert contents(out) == contents(whole)


def copied(made, to: Path) -> Path:
    for name, data in contents(made.folder).items():
        (to / name).parent.mkdir(exist_ok=True)
        (to / name).write_bytes(data)
    return to


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "manifest.json",
            lambda data: data.replace(b'"vocab_size": 257', b'"vocab_size": 258'),
            "manifest.json' is damaged",
        ),
        (
            "tokenizer.json",
            lambda data: (
                train_bpe([b"hello hello"], 259).to_library().to_str().encode()
            ),
            "is not the tokenizer that its data was made with",
        ),
        (
            "train-00000.lengths",
            lambda data: data[4:8] + data[:4] + data[8:],
            "train-00000.lengths is damaged",
        ),
        (
            "train-00001.array_record",
            lambda data: data[:-1],
            "train-00001.array_record' should have",
        ),
    ],
)
def test_damage_is_named(made, tmp_path, file, change, message):
    path = copied(made, tmp_path) / file
    assert change(path.read_bytes()) != path.read_bytes()
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(prepared.Unprepared, match=message):
        prepared.load(tmp_path).rows("train", seq_len=5)


def test_no_flipped_byte_is_read(made, tmp_path):
    path = copied(made, tmp_path) / "train-00000.array_record"
    good, wanted = path.read_bytes(), documents(made)
    found = 0
    for at in np.random.default_rng(0).integers(0, len(good) // 50, 25).tolist():
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            read = documents(prepared.load(tmp_path))
        except prepared.Unprepared as error:
            assert "train-00000.array_record" in str(error)
            found += 1
        else:  # between records
            np.testing.assert_equal(read, wanted)
    assert found > 0


def test_all_kinds_of_files_hold_the_same_documents(tmp_path):
    import pyarrow
    from pyarrow import parquet

    texts = some_texts(9)
    data = "".join(json.dumps({"body": text}) + "\n" for text in texts).encode()
    table = pyarrow.table({"body": texts, "id": list(range(9))})
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    with pyarrow.output_stream(tmp_path / "a.json.zst", compression="zstd") as file:
        file.write(data)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    (tmp_path / "a.txt").write_text("<end>".join(texts))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("<end>".join(texts).encode()))
    how = sources.Reading(field="body", separator="<end>")
    for path in sorted(tmp_path.glob("a.*")):
        units = sources.units(str(path), how)
        assert len(units) == (3 if path.suffix == ".parquet" else 1)
        found = [d.decode() for unit in units for d in sources.documents(unit, how, {})]
        assert found == texts, path


def test_lines_of_a_large_file_are_each_in_one_unit(tmp_path, monkeypatch):
    texts = some_texts(50)
    path = lines(tmp_path / "a.jsonl", texts)
    for size in (1, 40, 97, 10_000):
        monkeypatch.setattr(sources, "_LINES", size)
        units = sources.units(str(path), sources.Reading())
        assert len(units) == -(-path.stat().st_size // size)
        found = []
        for unit in units:
            found += sources.documents(unit, sources.Reading(), {})
        assert [data.decode() for data in found] == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 5}', "'text' must be text, got int"),
        (b'{"body": "x"}', "has no 'text': it has body. Use --field"),
        (b'{"text": "x"', "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"text": "\\ud800"}', "holds half a character"),
    ],
)
def test_lines_that_hold_no_text_are_named_or_skipped(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": ""}\n')
    (unit,) = sources.units(str(path), sources.Reading())
    with pytest.raises(sources.Unreadable, match=f"a.jsonl:17.*{message}"):
        list(sources.documents(unit, sources.Reading(), {}))
    skipped: dict[str, list[str]] = {}
    how = sources.Reading(undecodable="skip")
    assert list(sources.documents(unit, how, skipped)) == [b"good"]
    assert [len(skipped[reason]) for reason in ("no text", "empty")] == [1, 1]


def test_text_that_is_no_utf8(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    (unit,) = sources.units(str(path), sources.Reading())
    with pytest.raises(sources.Unreadable, match="byte 3 is 0xe9"):
        list(sources.documents(unit, sources.Reading(), {}))
    keep = sources.Reading(undecodable="keep")
    assert list(sources.documents(unit, keep, {})) == [b"caf\xe9"]


class Datasets:
    """What of Hugging Face's `datasets` is used."""

    def load_dataset(self, name, config, *, split, cache_dir):
        assert (name, config, split, cache_dir) == ("some/thing", "en", "train", None)
        return [{"text": text} for text in some_texts(7)]


def test_a_data_set_of_hugging_face_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", Datasets())
    monkeypatch.setattr(sources, "_EXAMPLES", 3)
    how = sources.Reading(config="en")
    units = sources.units("hf:some/thing", how)
    assert len(units) == 3
    found = [d.decode() for unit in units for d in sources.documents(unit, how, {})]
    assert found == some_texts(7)
    with pytest.raises(sources.Unreadable, match="has no 'body': it has text"):
        list(
            sources.documents(units[0], sources.Reading(field="body", config="en"), {})
        )


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets is needed.*hope_jax\[data\]"):
        sources.units("hf:some/thing", sources.Reading())


def test_a_data_set_of_tensorflow_by_name(tmp_path):
    import tensorflow_datasets as tfds

    class SomeTexts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, text in enumerate(some_texts(8)):
                yield i, {"text": text}

    SomeTexts(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    how = sources.Reading(folder=str(tmp_path))
    (unit,) = sources.units("tfds:some_texts", how)
    found = [data.decode() for data in sources.documents(unit, how, {})]
    assert sorted(found) == sorted(some_texts(8))


def test_a_tokenizer_learns_from_every_unit(tmp_path):
    lines(tmp_path / "a.jsonl", ["abab " * 200] * 4)
    lines(tmp_path / "b.jsonl", ["cdcd " * 200] * 4)
    made = prepare.train_tokenizer([str(tmp_path)], sources.Reading(), 262, 400)
    assert len(made.encode("abab cdcd")) < 7


def test_what_cannot_be_prepared_is_refused_before_anything_is_touched(tmp_path):
    path = lines(tmp_path / "in.jsonl", some_texts(4))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(prepare.Preparing, match="holds something else already"):
        prepare.prepare(tmp_path / "full", plan(path), BYTES)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
    with pytest.raises(prepare.Preparing, match="is no folder"):
        prepare.prepare(path, plan(path), BYTES)
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        prepare.prepare(tmp_path / "out", plan(tmp_path / "none.jsonl"), BYTES)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="held_out must lie between 0 and 1, got 1"):
        plan(path, held_out=1)
    with pytest.raises(ValueError, match="None of 4 documents is for validation"):
        prepare.prepare(tmp_path / "out", plan(path, held_out=1e-9), BYTES)


def test_a_mixture_on_the_command_line(made, tmp_path):
    assert prepared.corpus(None) is None
    assert prepared.corpus(tmp_path) is None
    assert prepared.corpus(f"{tmp_path}/a.txt") is None
    path = made.folder
    mixed = prepared.corpus(f"{path}:3,{path}:1")
    assert mixed is not None
    assert [share for _, share in mixed.parts] == [0.75, 0.25]
    assert mixed.sha256 not in (
        made.sha256,
        prepared.corpus(f"{path}:1,{path}:1").sha256,
    )
    with pytest.raises(prepared.Unprepared, match="is a part of a mixture, but no"):
        prepared.corpus(f"{path}:0.5,{tmp_path}:0.5")
    with pytest.raises(ValueError, match="share of .* must be above 0, got 0"):
        prepared.corpus(f"{path}:1,{path}:0")
    other = train_bpe([b"hello hello hello"], 260)
    file = lines(tmp_path / "in.jsonl", some_texts(30))
    fingerprint = other.fingerprint
    prepare.prepare(tmp_path / "bpe", plan(file, fingerprint=fingerprint), other)
    with pytest.raises(ValueError, match="A mixture needs one tokenizer"):
        prepared.corpus(f"{path}:1,{tmp_path / 'bpe'}:1")


def test_what_it_is_does_not_depend_on_where_it_was(made, tmp_path):
    texts = some_texts()
    for i in range(2):
        lines(tmp_path / "in" / f"{i}.jsonl.gz", texts[20 * i : 20 * i + 20])
    again = prepare.prepare(tmp_path / "out", plan(tmp_path / "in"), BYTES)
    assert again.sha256 == made.sha256
    assert os.fspath(tmp_path) not in made.summary()


def test_validation_text_fits_its_limit(made):
    whole = prepared.corpus(made.folder)
    some = prepared.corpus(made.folder, 60)
    assert whole is not None and some is not None
    assert len(whole.validation) == len(made.documents("validation"))
    assert 0 < some.validation_bytes <= 60 < whole.validation_bytes
    assert set(some.validation) < set(whole.validation)
    assert whole.train[3] == whole.train[2:5][1]
