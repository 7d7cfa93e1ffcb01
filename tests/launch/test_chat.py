"""A conversation, piped in: what is said, what memory did, and the commands."""

import dataclasses
import io
import re
import shlex

import pytest

from hope_jax.data.tokenizer import ByteTokenizer
from hope_jax.stream.reader import Opened, reader_of
from launch import chat
from tests.launch.test_evaluate import refusal
from tests.models import small
from tests.stream.test_session import BLOCK, CONFIG, SLOTS
from tests.train import tiny


@pytest.fixture
def talk(tmp_path, monkeypatch, capsys):
    """`talk(lines, flags) -> output`, with a small Hope in place of a checkpoint."""
    opened = Opened(
        dataclasses.replace(tiny.rows("smoke")["tiny"], model=CONFIG),
        reader_of(CONFIG),
        small.built(CONFIG)[1],
        ByteTokenizer(),
        1,
    )
    monkeypatch.setattr(chat, "open_given", lambda _: opened)
    monkeypatch.setattr(chat, "SLOTS", SLOTS)  # the program of tests/stream
    monkeypatch.setattr(chat, "BLOCK", BLOCK)

    def say(text, flags=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        where = f"--checkpoint=x --sessions={tmp_path} --tokens=6 --temperature=0"
        chat.main(shlex.split(f"{where} {flags}"))
        return capsys.readouterr().out

    return say


def test_what_memory_did_is_said_after_each_answer(talk):
    said = talk("hello there\n/diff\n\n/quit\nnever read\n")
    assert len(re.findall(r"\[read 13 tokens, \d\.\d\d bits each; wrote 6", said)) == 1
    assert re.search(r"\[CMS 1: 4 moves, [\d.]+ in all; [\d.]+ from its start \(", said)
    assert re.search(r"\[CMS 2: 2 moves, .*\n", said)
    assert len(re.findall(r"\[main memory: [\d.]+ from its start", said)) == 2
    assert "hello" not in said and "never" not in said  # it says what the model does


def test_a_session_is_saved_and_gone_on_with(talk, tmp_path):
    whole = talk("one\ntwo\n").split("[read")
    talk("one\n/save\n")
    again = talk("two\n", "--seed=7")
    assert "session first, as saved" in again
    assert again.split("[read")[1] == whole[2]
    assert [path.name for path in tmp_path.iterdir()] == ["first.safetensors"]


def test_sessions_are_forked_put_back_and_deleted(talk, tmp_path):
    said = talk(
        "one\n/fork second\n/freeze\ntwo\n/diff first\n/load first\n/save kept\n"
        "/reset CMS 1\n/sessions\n/reset\n/diff\n/delete second\n/delete kept\n"
        "/sessions\n"
    )
    assert "[session second, a copy of first]" in said
    assert "[frozen: it learns nothing]" in said and "; frozen]" in said
    assert "[CMS 1: 0 from first (0.0 % of it)]" in said  # frozen since it was forked
    assert "[at its start again: CMS 1]" in said and "[saved: kept]" in said
    assert "[open: first, 11 tokens" in said and "(this one)]" in said
    assert said.count("[main memory: 0 from its start (0.0 % of it)]") == 1
    assert "[nothing is left of second]" in said and "[nothing is left of kept]" in said
    assert "second" not in said.rpartition("nothing is left of kept")[2]
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_done_is_said_and_the_talk_goes_on(talk, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no session")
    said = talk(
        "/nothing\n/load ../up\n/load nobody\n/load broken\n/fork first\n/reset x\n"
        "/delete first\n/save a/b\n/help\n/sessions\n"
    )
    for message in (
        "There is no /nothing",
        "The name of a session must be",
        "No session at",
        f"The session in {tmp_path / 'broken.safetensors'} cannot be read",
        "an open session 'first' already",
        "has no 'x', only mixers, CMS 1, CMS 2",
        "the session that you talk to",
    ):
        assert f"[error: {message}" in said or message in said, message
    assert all(f"[/{name}" in said for name in (*chat.COMMANDS, "quit"))
    assert said.count("[open: ") == 1


def test_caps_and_bad_flags(talk, tmp_path):
    said = talk("hello there\n", "--moves=1 --longest_move=0.01")
    assert "[CMS 1: 1 moves, 0.01 in all" in said and "[CMS 2: 0 moves" in said
    assert "; frozen]" in talk("hello\n", "--frozen")
    for flag, message in (
        ("--tokens=0", "tokens must be at least 1, got 0"),
        ("--top_p=0", "top_p must be above 0"),
        ("--session=../up", "The name of a session must be"),
        ("--moves=-1", "moves must be 0 or more"),
    ):
        assert message in refusal(chat, "--checkpoint=x", flag)


def test_a_missing_checkpoint_is_named(tmp_path):
    assert "No checkpoint in" in refusal(chat, f"--checkpoint={tmp_path / 'nothing'}")
