"""Folders that this program did not write: refused, and not a byte of them touched."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments import sweep
from hope_jax.train import checkpoint, loop
from hope_jax.train.folder import ForeignFolder, check_place, make_folder
from launch import evaluate, quickstart
from tests.train import tiny

RUN = tiny.rows("smoke")["tiny"]


def content(folder):
    """Every file below, and what links say."""
    return {
        str(p.relative_to(folder)): p.readlink() if p.is_symlink() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


def foreign(folder, *names, text="{}"):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


PROGRAMS = {
    "train": lambda folder: loop.train(RUN, folder),
    "resume": lambda folder: loop.train(RUN, folder, resume=True),
    "quickstart": lambda folder: quickstart.run(
        str(folder), scale="smoke", data=None, console=Console(quiet=True)
    ),
    "sweep": lambda folder: sweep.run(folder, sweep.GridConfig(), [], [0]),
}
programs = pytest.mark.parametrize("start", PROGRAMS.values(), ids=PROGRAMS)


@programs
@pytest.mark.parametrize(
    "names",
    [
        ("config.json", "tokenizer.json"),
        ("notes.txt",),
        ("tokenizer.json",),
        ("checkpoints/7/weights", "checkpoints/8.orbax-checkpoint-tmp-1/part"),
        ("hope/config.json", "results.json", "loss.png", "sweep.png"),
    ],
    ids=" ".join,
)
def test_refuses_a_foreign_folder(tmp_path, start, names):
    folder = foreign(tmp_path / "mine", *names)
    before = content(folder)
    with pytest.raises(ForeignFolder, match="mine.* has files that this program did"):
        start(folder)
    assert content(folder) == before


@programs
@pytest.mark.parametrize(
    "path, message",
    [("", "is empty"), ("http://x/y", "is a URL"), ("gs://b", "is a URL")],
)
def test_refuses_what_is_no_folder(tmp_path, monkeypatch, start, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForeignFolder, match=message):
        start(path)
    assert not list(tmp_path.iterdir())


@programs
def test_refuses_what_cannot_be_written(tmp_path, start):
    with pytest.raises(ForeignFolder, match="'/proc/none/run' cannot be written to: "):
        start("/proc/none/run")


def test_evaluations_try_their_output_first(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "open_given", lambda _: pytest.fail("too late"))
    (tmp_path / "file").touch()
    for place, said in (
        ("/proc/none", "cannot be written to"),
        (tmp_path / "file" / "below", "is no folder"),
        ("", "is empty"),
    ):
        with pytest.raises(SystemExit, match=f"--output=.*{said}"):
            evaluate.main([f"--checkpoint={tmp_path}", f"--output={place}"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ["null", "{", "[1]", '"x"'])
def test_seconds_that_say_nothing_are_none(tmp_path, text):
    (tmp_path / "seconds.json").write_text(text)
    assert quickstart._seconds(tmp_path / "seconds.json") == 0.0
    (tmp_path / "seconds.json").write_text("2.5")
    assert quickstart._seconds(tmp_path / "seconds.json") == 2.5


@programs
def test_refuses_a_file(tmp_path, start):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ForeignFolder, match="is no folder"):
            start(path)
    assert (tmp_path / "file").read_text() == "mine"


@programs
def test_refuses_a_link_to_nothing(tmp_path, start):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before = content(tmp_path)
    for path in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(
            ForeignFolder, match="link' is a link to '.*gone', where no"
        ):
            start(path)
    assert content(tmp_path) == before and not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("x" * 300, "cannot be written to: File name too long"), ("a\0b", "a zero byte")],
)
def test_refuses_what_is_no_name(tmp_path, name, said):
    for path in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(ForeignFolder, match=f"^--out='.*{said}"):
            check_place("--out", path)
    assert not list(tmp_path.iterdir())


def test_a_try_leaves_nothing_behind(tmp_path, monkeypatch):
    """Where a folder can be made and no file in it, as on a full disk."""

    def full(*_):
        raise OSError(28, "No space left on device")

    check_place("--out", tmp_path / "new")
    make_folder(tmp_path / "kept" / "a")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ForeignFolder, match="cannot be written to: No space left"):
        check_place("--out", tmp_path / "new" / "below")
    for path in (tmp_path / "new" / "below", tmp_path / "kept" / "a" / "b"):
        with pytest.raises(OSError, match="No space left"):
            make_folder(path)
    with pytest.raises(OSError, match="too long"):
        make_folder(tmp_path / "new" / ("x" * 300))
    assert {p.name for p in tmp_path.rglob("*")} == {"kept", "a"}


@pytest.mark.parametrize(
    "program, name",
    [
        *(("train", name) for name in loop._FILES),
        *(("quickstart", name) for name in ("hope", "results.json", "loss.png")),
        *(("sweep", name) for name in ("sweep.json", ".sweep.json", "sweep.png")),
    ],
)
@pytest.mark.parametrize("there", [True, False], ids=["there", "dangling"])
def test_refuses_links_that_lead_out(tmp_path, program, name, there):
    outside, folder = tmp_path / "outside", tmp_path / "run"
    if there:
        foreign(outside, "7/data")
    folder.mkdir()
    (folder / name).symlink_to(outside)
    before = content(tmp_path)
    with pytest.raises(ForeignFolder, match=f"{name!r} in it is a link"):
        PROGRAMS[program](folder)
    assert content(tmp_path) == before


@pytest.mark.parametrize("again", [False, True])
def test_nothing_is_written_before_the_data_is_accepted(tmp_path, again):
    """Nor in a folder that a run of this program was killed in before it saved."""
    folder = tmp_path / "run"
    if again:
        foreign(folder, "tokenizer.json", text="old")
        loop._write_config(folder, RUN)
    before = content(tmp_path)
    absent = dataclasses.replace(RUN.data, path=str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        loop.train(dataclasses.replace(RUN, data=absent), folder)
    with pytest.raises(ValueError, match="model.vocab"):
        small = dataclasses.replace(RUN.model, vocab=8)
        loop.train(dataclasses.replace(RUN, model=small), folder)
    assert content(tmp_path) == before
    assert folder.exists() == again


def test_a_run_killed_before_it_saved_is_ours(tmp_path):
    (tmp_path / loop._UNFINISHED).write_text("{")
    assert loop.check_workdir(tmp_path) == tmp_path
    loop._write_config(tmp_path, RUN)
    (tmp_path / checkpoint.TOKENIZER).write_text("half a")
    assert loop.check_workdir(tmp_path) == tmp_path
    (tmp_path / loop.CONFIG).write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ForeignFolder):
        loop.check_workdir(tmp_path)
