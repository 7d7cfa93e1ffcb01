"""Corpora: what is found, in which order, on which side; what is said of the rest."""

import os
import zipfile
from pathlib import Path

import pytest

from hope_jax.data import text

_REAL = Path(
    os.environ.get("HOPE_DATA_DIR", Path(__file__).parents[2] / "../shared/data")
)


def real(name: str) -> Path:
    path = _REAL / name
    if not path.exists():
        pytest.skip(f"needs {name} under HOPE_DATA_DIR")
    return path


def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    root = tmp_path / "texts"
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def numbered(count: int) -> dict[str, bytes]:
    return {f"{i:02d}.txt": b"text %d\n" % i for i in range(count)}


def names(documents) -> list[str]:
    return [document.name for document in documents]


def test_standard_library_is_split_by_name_alone():
    whole = text.standard_library(max_validation_bytes=None)
    part = text.standard_library(max_train_bytes=300_000, max_validation_bytes=50_000)
    train, validation = set(names(whole.train)), set(names(whole.validation))
    assert not train & validation
    assert 0.02 < len(validation) / len(train | validation) < 0.1
    assert {"argparse.py", "json/decoder.py"} <= train | validation
    for corpus in (whole, part):
        for split in (corpus.train, corpus.validation):
            assert names(split) == sorted(names(split))
            assert all(document.data for document in split)
    assert set(names(part.train)) < train
    assert set(names(part.validation)) < validation
    assert 250_000 < part.train_bytes <= 300_000
    assert 40_000 < part.validation_bytes <= 50_000
    assert "over max_validation_bytes=50,000" in part.summary()


def test_standard_library_has_no_tests_and_no_installed_packages():
    corpus = text.standard_library(max_validation_bytes=None)
    parts = {
        part
        for document in (*corpus.train, *corpus.validation)
        for part in document.name.split("/")
    }
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any(part.startswith("_sysconfigdata") for part in parts)
    assert all(name.endswith(".py") for name in names(corpus.train))


def test_default_validation_fits_a_minute():
    corpus = text.load(None)
    assert corpus == text.load("stdlib")
    assert 150_000 < corpus.validation_bytes <= 250_000


def test_folder_is_read_whole_and_split_by_file(tmp_path):
    files = numbered(39) | {"deep/er/last.md": "ünïcode".encode()}
    corpus = text.from_path(folder(tmp_path, files))
    assert len(corpus.validation) == 2  # 5 % of 40
    documents = {d.name: d.data for d in (*corpus.train, *corpus.validation)}
    assert documents == files
    assert names(corpus.train) == sorted(names(corpus.train))
    assert corpus.train_bytes + corpus.validation_bytes == sum(map(len, files.values()))


@pytest.mark.parametrize("big", ["a", "b"])
def test_two_files_give_one_for_validation_never_the_bigger(tmp_path, big):
    files = {"a": b"short\n", "b": b"short\n"} | {big: b"long text\n" * 9}
    corpus = text.from_path(folder(tmp_path, files))
    assert names(corpus.train) == [big]
    assert len(corpus.validation) == 1


def test_single_file_is_cut_at_a_line(tmp_path):
    data = b"".join(b"line %d\n" % i for i in range(1000))
    path = tmp_path / "one.txt"
    path.write_bytes(data)
    corpus = text.from_path(path)
    (train,), (validation,) = corpus.train, corpus.validation
    assert train.data + validation.data == data
    assert train.data.endswith(b"\n") and validation.data.startswith(b"line ")
    assert 0.04 < len(validation.data) / len(data) <= 0.05
    assert (train.name, validation.name) == (
        f"one.txt[:{len(train.data)}]",
        f"one.txt[{len(train.data)}:]",
    )
    small = text.from_path(path, max_validation_bytes=100)
    assert 50 <= small.validation_bytes <= 100


def test_single_file_without_lines_is_cut_between_characters(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("é€𝄞" * 21, encoding="utf-8")  # 2, 3 and 4 bytes
    for limit in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        corpus = text.from_path(path, max_validation_bytes=limit)
        whole = b"".join(d.data for d in (*corpus.train, *corpus.validation))
        assert whole == path.read_bytes()
        assert corpus.validation[0].data.decode("utf-8")


def test_single_file_goes_back_to_a_line_where_the_limit_allows(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"x" * 70 + b"\n" + b"y" * 29)
    assert text.from_path(path).validation[0].data == b"y" * 29
    bounded = text.from_path(path, max_validation_bytes=20)
    assert bounded.validation[0].data == b"y" * 5


def test_glob_names_only_what_matches(tmp_path):
    root = folder(tmp_path, numbered(3) | {"sub/x.txt": b"x", "sub/y.md": b"y"})
    corpus = text.from_path(f"{root}/**/*.txt")
    found = {*names(corpus.train), *names(corpus.validation)}
    assert found == {"00.txt", "01.txt", "02.txt", "sub/x.txt"}
    assert text.load(str(root / "0*")).train_bytes > 0
    whole = text.from_path(root / "*")  # names the folder `sub` too, which is no file
    assert len(whole.train) + len(whole.validation) == 3 and not whole.skipped


def test_a_real_name_with_brackets_is_no_glob(tmp_path):
    path = tmp_path / "notes[1].txt"
    path.write_bytes(b"some text\n" * 10)
    assert text.from_path(path).train_bytes == 90


def test_empty_hidden_and_linked_files_are_left_out_and_counted(tmp_path):
    files = numbered(4) | {"no.txt": b"", "none.txt": b"", ".git/config": b"hidden"}
    root = folder(tmp_path, files)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_bytes(b"secret")
    (root / "way_out").symlink_to(outside)
    (root / "secret.txt").symlink_to(outside / "secret.txt")
    (root / "twice.txt").symlink_to(root / "00.txt")
    expected = {
        "empty": ("no.txt", "none.txt"),
        "hidden": (".git/config",),
        "symbolic link": ("secret.txt", "twice.txt", "way_out"),
    }
    corpus = text.from_path(root)
    assert dict(corpus.skipped) == expected
    assert len(corpus.train) + len(corpus.validation) == 4
    for line in ("2 empty: no.txt, none.txt", "3 symbolic link", "1 hidden"):
        assert line in corpus.summary()
    globbed = text.from_path(f"{root}/**")
    assert len(globbed.train) + len(globbed.validation) == 4
    assert "way_out/secret.txt" not in names(globbed.train + globbed.validation)
    (tmp_path / "link").symlink_to(root)  # a link that the user names is followed
    assert text.from_path(tmp_path / "link").sha256 == corpus.sha256


def test_undecodable_files_are_refused_by_name_and_offset(tmp_path):
    root = folder(tmp_path, numbered(5) | {"bad.txt": b"caf\xe9 au lait"})
    with pytest.raises(ValueError, match=r"bad\.txt.*byte 3 is 0xe9.*'skip'.*'keep'"):
        text.from_path(root)
    skipping = text.load(root, undecodable="skip")
    assert skipping.skipped == (("not UTF-8", ("bad.txt",)),)
    assert "1 not UTF-8: bad.txt" in skipping.summary()
    keeping = text.from_path(root, undecodable="keep")
    assert any(b"\xe9" in d.data for d in (*keeping.train, *keeping.validation))
    assert keeping.skipped == ()


def test_missing_empty_and_wrong_arguments_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file or folder at .*nowhere"):
        text.from_path(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"No files to read at .*\*\.none"):
        text.from_path(tmp_path / "*.none")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(FileNotFoundError, match="No files to read at .*hollow"):
        text.from_path(tmp_path / "hollow")
    root = folder(tmp_path, {"a": b"", "b": b""})
    with pytest.raises(ValueError, match=r"(?s)No text in the 2 files.*2 empty: a, b"):
        text.from_path(root)
    (root / "a").write_bytes(b"x")
    with pytest.raises(ValueError, match="1 byte"):
        text.from_path(root / "a")
    with pytest.raises(ValueError, match="undecodable must be one of .* got 'drop'"):
        text.from_path(root, undecodable="drop")
    for wrong in ({"max_train_bytes": 0}, {"max_validation_bytes": -1}):
        (name,) = wrong
        for spec in (None, root):
            with pytest.raises(ValueError, match=f"{name} must be at least 1"):
                text.load(spec, **wrong)
    with pytest.raises(ValueError, match="validation of corpus 'x' holds no bytes"):
        text.Corpus("x", (text.Document("a", b"a"),), ())


def test_unreadable_folder_stops_the_walk(tmp_path, monkeypatch):
    root = folder(tmp_path, numbered(3))
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(root):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="texts"):
        text.from_path(root)


def test_a_limit_below_every_file_keeps_the_smallest_whole(tmp_path):
    files = {f"{i}": b"x" * (100 + i) for i in range(60)}
    corpus = text.from_path(folder(tmp_path, files), max_validation_bytes=1)
    (kept,) = corpus.validation
    left = dict(corpus.skipped)["over max_validation_bytes=1"]
    assert len(left) == 2 and all(len(files[n]) > len(kept.data) for n in left)


def test_sha256_sees_names_bytes_order_and_split():
    a, b, c = (text.Document(name, name.encode() * 3) for name in "abc")
    corpora = [
        text.Corpus("x", (a, b), (c,)),
        text.Corpus("x", (b, a), (c,)),
        text.Corpus("x", (a,), (b, c)),
        text.Corpus("x", (a, text.Document("b", b"bbB")), (c,)),
        text.Corpus("x", (a, text.Document("B", b"bbb")), (c,)),
        text.Corpus("x", (text.Document("aa", b"aa"), b), (c,)),
    ]
    assert len({corpus.sha256 for corpus in corpora}) == len(corpora)
    assert text.Corpus("other name", (a, b), (c,)).sha256 == corpora[0].sha256
    assert corpora[0].sha256 in corpora[0].summary()


def test_real_plays():
    corpus = text.from_path(real("tinyshakespeare") / "input.txt")
    assert corpus.train_bytes + corpus.validation_bytes == 1_115_394
    assert 50_000 < corpus.validation_bytes < 60_000


def test_real_addresses_are_not_all_utf8(tmp_path):
    with zipfile.ZipFile(real("us-presidential-addresses") / "inaugural.zip") as file:
        file.extractall(tmp_path)
    with zipfile.ZipFile(real("us-presidential-addresses") / "state_union.zip") as file:
        file.extractall(tmp_path)
    with pytest.raises(ValueError, match="is not UTF-8: byte"):
        text.from_path(f"{tmp_path}/**/*.txt")
    skipping = text.from_path(f"{tmp_path}/**/*.txt", undecodable="skip")
    assert len(dict(skipping.skipped)["not UTF-8"]) == 7
    keeping = text.from_path(
        f"{tmp_path}/**/*.txt", undecodable="keep", max_validation_bytes=None
    )
    assert len(keeping.train) + len(keeping.validation) == 124


def test_names_that_are_no_text_are_said_escaped(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("some text\n" * 9)
    (tmp_path / os.fsdecode(b"\xff\x1b[31m.txt")).write_bytes(b"")
    said = text.from_path(tmp_path).summary()
    assert "\\udcff\\x1b[31m.txt" in said and "\x1b" not in said
    said.encode()
