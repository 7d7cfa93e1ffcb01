"""Flags and configs that nobody would give: each is accepted or refused in one line,
and nothing is computed, nor left behind, before that is known."""

import json
import os
import string
from typing import Any

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from hope_jax.core import config as config_lib
from hope_jax.core import show
from hope_jax.train import loop
from launch import train
from tests.train import tiny

TINY = ["--experiment=tests.train.tiny", "--row=tiny", "--scale=smoke"]
RUN = config_lib.to_json(tiny.rows("smoke")["tiny"])
FIELDS = [path for path, _ in config_lib._flat(RUN, "")]
PARTS = ["", "model", "model.mixer", "model.cms.levels", "optimizer.rule", "guard"]
FLAGS = ["experiment", "row", "scale", "config", "data", "mesh", "workdir", "resume"]
FLAGS += ["init_from", "profile", "wandb", "coordinator", "num_processes", "process_id"]
FLAGS += ["start_timeout", "heartbeat_timeout", "set", "none_such", ""]
ODD = ["", " ", "none", "null", "true", "-1", "0", "1", "2.5", "-0.0", "nan", "inf"]
ODD += ["-inf", "1e999", "1e-999", "9" * 40, "9" * 5000, "0x10", "1_000", "x" * 300]
ODD += ["[", "[]", "{}", "(1,", ",", '{"kind": "x"}', '{"kind": 3}', "[" * 5000]
STEERING = ["a\nb", "\x1b[31m", "\x9b", "\udcff"]  # what no terminal should see
ODD += [*STEERING, "\u202e", "é" * 200, "%s%n", "${HOME}", "~", "."]
ODD += ["data:2,fsdp:2", "tensor:99", "adamw", "attention", "memory", "hope", "bpe"]
ODD += ["words.json", "1:2", "h:80", "auto"]
texts = st.sampled_from(ODD) | st.integers().map(str) | st.floats().map(str)
texts |= st.text(string.printable, max_size=8).filter(lambda text: "/" not in text)
inner_names = st.sampled_from(["kind", "levels", "rate", "x"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(ODD),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(inner_names, inner, max_size=2)
    ),
    max_leaves=4,
)
few = hypothesis.settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


class Begun(BaseException):
    """All was accepted: now it would compute."""


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A folder with a text."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 99)
    return folder


@pytest.fixture
def judge(tmp_path, monkeypatch, capsys):
    """Whether flags are accepted; if not, that it was said as it should be."""

    def begun(*_, **__):
        raise Begun

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "_model", begun)
    monkeypatch.setattr(jax.distributed, "initialize", begun)

    def accepted(*flags):
        try:
            status: Any = train.main([*flags])
        except Begun:
            return True
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        said = status if isinstance(status, str) else err.removesuffix("\n")
        assert status != 0 and said, (status, out)
        assert said == show.printable(said), said
        assert not os.listdir(tmp_path)
        return False

    return accepted


def config(beside, **changes):
    data = json.loads(json.dumps(RUN))
    data["data"] |= {"path": str(beside / "text.txt"), "max_validation_bytes": 400}
    return data | changes


@few
@hypothesis.given(st.sampled_from([*FIELDS, *PARTS, "x", "train.steps.x"]), texts)
def test_any_setting(judge, beside, path, text):
    file = beside / "config.json"
    file.write_text(json.dumps(config(beside)))
    judge(f"--config={file}", "--workdir=run", f"--set={path}={text}")


@few
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(FLAGS), texts), min_size=1, max_size=3)
)
def test_any_flags(judge, beside, flags):
    known = [*TINY, "--workdir=run", f"--data={beside / 'text.txt'}"]
    judge(*known, *(f"--{name}={text}" for name, text in flags))


@few
@hypothesis.given(st.sampled_from([*FIELDS, "model", "train"]), values, st.data())
def test_any_config(judge, beside, path, value, data):
    """Of a file: another value, and then cut short or spoilt."""
    changed = at = config(beside)
    *way, last = path.split(".")
    for name in way:
        at = at[int(name) if isinstance(at, list) else name]
    at[int(last) if isinstance(at, list) else last] = value
    text = json.dumps(changed).encode()
    cut = data.draw(st.none() | st.integers(0, len(text)))
    if cut is not None:
        ends = st.sampled_from([b"", b"\xff", b"\0", b"{", b'"', b"}"])
        text = text[:cut] + data.draw(ends)
    file = beside / "fuzzed.json"
    file.write_bytes(text)
    judge(f"--config={file}", "--workdir=run")


def test_every_flag_and_field_with_what_steers_a_terminal(judge, beside):
    file = beside / "config.json"
    file.write_text(json.dumps(config(beside)))
    known = [*TINY, "--workdir=run", f"--data={beside / 'text.txt'}"]
    for text in STEERING:
        for name in FLAGS:
            judge(*known, f"--{name}={text}")
        for path in FIELDS:
            judge(f"--config={file}", "--workdir=run", f"--set={path}={text}")
        judge(f"--config={file}", "--workdir=run", f"--set={text}=1")
        judge(*known, f"--{text}", text)


def test_what_is_right_is_accepted(judge, beside):
    """Else all of the above would be refused for one other reason."""
    known = [*TINY, "--workdir=run", f"--data={beside / 'text.txt'}"]
    assert judge(*known, "--set=data.max_validation_bytes=400")
    assert judge(*known, "--set=train.steps=30", "--coordinator=auto")
    assert not judge(*known, "--set=train.steps=0")
