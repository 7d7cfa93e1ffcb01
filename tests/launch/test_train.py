"""The command line; in processes of its own killed and resumed for real."""

import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from absl import logging

from experiments import reliability
from experiments.reliability import lines
from hope_jax.core.config import override
from hope_jax.train import checkpoint, loop, metrics, sharding
from hope_jax.train.config import RunConfig
from tests.train import tiny

ROOT = Path(__file__).parents[2]
TINY = ["--experiment=tests.train.tiny", "--row=tiny"]


def start(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.train", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, f"{out}\n{err}"
    return out, err


def stop_when(process, ready, *numbers):
    while not ready():
        assert process.poll() is None, finish(process, code=None)
        time.sleep(0.001)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.02)


make_mesh = sharding.make_mesh


def mesh_of(count, devices, sizes):
    """As if there were so many devices."""
    return make_mesh(jax.devices()[:count], sizes)


@pytest.mark.slow
def test_killed_twice_equals_unbroken(tmp_path, monkeypatch):
    """Asked to stop before the first step, and killed later: no byte differs from a run
    in this process."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    with monkeypatch.context() as patched:
        patched.setattr(loop.sharding, "make_mesh", functools.partial(mesh_of, 1))
        loop.train(override(tiny.rows("full")["tiny"], []), unbroken)  # as read

    launch = functools.partial(start, *TINY, f"--workdir={broken}")
    moments = [
        (lambda: (broken / "config.json").exists(), signal.SIGTERM, signal.SIGTERM),
        (lambda: lines(broken) >= 41, signal.SIGKILL),
    ]
    for i, (ready, number, *more) in enumerate(moments):
        process = launch(*(["--resume"] if i else []))
        stop_when(process, ready, number, *more)
        if number == signal.SIGKILL:
            finish(process, code=-number)
            continue
        out, _ = finish(process, code=128 + number)
        assert "--resume" in out
        stopped = int(out.split("stopped and saved at step ")[1].split(".")[0])
        assert checkpoint.latest_verified_step(broken) == stopped
        assert lines(broken) == stopped  # the step at hand was finished, and none lost

    saved = checkpoint.latest_verified_step(broken)
    assert lines(broken) - 9 <= saved < 90  # an interval
    out, _ = finish(launch("--resume"))
    assert f"resumed at step {saved} of 90" in out
    assert reliability.end(broken) == reliability.end(unbroken)


def test_help_is_fast():
    """It must not import jax: that alone takes seconds on a busy machine."""
    code = (
        "import sys; from launch import train; "
        "assert 'jax' not in sys.modules and 'hope_jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    out, _ = finish(start("--helpshort"), code=1)
    for flag in ("experiment", "row", "scale", "workdir", "set", "data", "resume"):
        assert f"--{flag}" in out or f"--[no]{flag}" in out


def test_describe_prints_and_exits(capsys):
    from launch import train

    assert train.main([*TINY, "--describe", "--set=model.d_model=32"]) == 0
    out = capsys.readouterr().out
    config = json.loads(out[: out.index("\n}") + 2])
    assert config["model"]["d_model"] == 32
    assert " parameters\n" in out
    assert "| level " in out
    assert "| matrices   | adamw | every 3 steps" in out
    assert re.search(r"\| mixers +\| +4,100 \|\n\| all", out)  # 16 x 32 pairs; a place


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment=quikstart"], "there are .*quickstart.* Did you mean 'quick"),
        (["--experiment=launch.train"], "has no function rows"),
        (
            ["--experiment=fig4_toy"],
            "those that have are .*: python -m experiments.fig",
        ),
        (["--experiment=../../x"], "is no name of a module; there are .*quickstart"),
        ([*TINY, "--set=row=../.."], "row must be letters, .* got '../..'"),
        (
            ["--experiment=tests.train.tiny", "--row=tinny"],
            "--row='tinny' is none: the rows of tests.train.tiny are tiny. Did",
        ),
        (["--experiment=quickstart"], "Give --row: the rows of quickstart are hope, "),
        ([*TINY, "--set=model.d_modle=3"], "no field 'd_modle'. Did you mean 'd_mod"),
        ([*TINY, "--set=train.steps=many"], "train.steps must be a whole number"),
        ([*TINY, "--set=optimizer.rule.b1=2"], "^ValueError: b1 must be at least 0"),
        ([], "Give --experiment, one of .*quickstart"),
    ],
)
def test_wrong_flags_name_what_exists(arguments, message, capsys):
    from launch import train

    assert train.main(["--workdir=unused", *arguments]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1


@pytest.mark.parametrize("where", ["optimizer", "model.cms"])
def test_the_pool_of_threads_is_widened_for_lapack_alone(where):
    from launch import train

    config = train.load_row("quickstart", "hope", "smoke")
    rule = [f"{where}.rule=adagrad_memory"]
    assert not train._waits(override(config, rule))
    assert train._waits(override(config, [*rule, f"{where}.rule.form=outer"]))


def test_experiments_are_those_with_rows_to_train():
    from launch import train

    found = train.experiments()
    assert {"quickstart", "twins", "stability"} <= set(found)
    for name in found:
        assert all(
            isinstance(c, RunConfig) for c in train._rows(name, "smoke").values()
        )
    others = {"lab", "sweep", "memory", "fig4_toy", "sessions", "continual_reading"}
    assert not others & set(found)
    for name in ("sessions", "continual_reading"):
        with pytest.raises(ValueError, match="has no function rows.scale. of configs"):
            train._rows(name, "smoke")


def test_what_is_wrong_with_files_is_one_line_too(tmp_path, capsys):
    """Nothing is made of it, and no traceback shown; `--verbosity=1` shows it."""
    from launch import train

    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 \n" * 3000)
    (tmp_path / "short.txt").write_text("hi")
    line = [*TINY, "--scale=smoke", f"--workdir={tmp_path / 'run'}"]
    for flags, said in (
        ([f"--data={tmp_path / 'latin1.txt'}"], "latin1.txt' is not UTF-8: byte 3"),
        ([f"--data={tmp_path / 'short.txt'}"], "one row of seq_len=16 needs 17"),
        (["--data=/nonexistent"], "No file or folder at '/nonexistent'"),
        (["--set=train.batch=1000000"], "fewer than one batch of 1000000"),
        (["--set=model.vocab=256"], "set model.vocab=257"),
        (["--workdir=/proc/none"], "--workdir='/proc/none' cannot be written to: "),
        ([f"--workdir={tmp_path / 'short.txt'}"], "short.txt' is no folder"),
    ):
        assert train.main([*line, *flags]) == 1
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()
    shown = logging.get_verbosity()
    try:
        assert train.main([*line, "--data=/nonexistent", "--verbosity=1"]) == 1
    finally:
        logging.set_verbosity(shown)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_data_flag_sets_the_path(tmp_path, capsys):
    from launch import train

    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 200)
    workdir = tmp_path / "run"
    arguments = [*TINY, f"--workdir={workdir}", "--set=train.steps=2"]
    assert train.main([*arguments, f"--data={text}"]) == 0
    assert "text.txt" in capsys.readouterr().out
    assert len(metrics.read_log(workdir / "metrics.jsonl")) == 2
    digest = hashlib.sha256((workdir / "config.json").read_bytes()).hexdigest()
    assert train.main(arguments) == 1
    assert "pass --resume" in capsys.readouterr().err
    after = hashlib.sha256((workdir / "config.json").read_bytes()).hexdigest()
    assert digest == after
