"""Several real processes on this machine: one run, stopped, killed and resumed."""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.reliability import lines
from hope_jax.core.config import override
from hope_jax.train import checkpoint, loop, metrics
from launch import distributed, local_cluster
from tests.launch.test_train import finish, mesh_of, stop_when
from tests.train import tiny

ROOT = Path(__file__).parents[2]
SETTINGS = [
    *("train.steps=60", "train.checkpoint_every=20"),
    *("train.validate_every=30", "train.validate_batches=1"),
]


def start(folder: Path, name: str, *more: str, processes: int = 2, devices: int = 1):
    cluster = [f"--processes={processes}", f"--devices={devices}"]
    cluster += [f"--logs={folder}/logs-{name}", "--grace=20"]
    run = ["-m", "launch.train", "--experiment=tests.train.tiny", "--row=tiny"]
    run += [f"--workdir={folder / name}", f"--compile_cache={folder}/programs"]
    run += ["--heartbeat_timeout=5", *(f"--set={s}" for s in SETTINGS), *more]
    python = [sys.executable]
    return subprocess.Popen(
        [*python, "-m", "launch.local_cluster", *cluster, "--", *python, *run],
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(process) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in found.read_text().split()]


def meta(workdir: Path, step: int):
    """Digests of all that a checkpoint holds, among other things."""
    with checkpoint.Checkpoints(workdir / "checkpoints", read_only=True) as saved:
        return saved._meta(saved.verify(step))


def is_alive(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_two_processes_are_one_run(tmp_path, monkeypatch):
    """As one process with two devices, but for the order of sums; killed once and asked
    to stop once. What is computed again is so byte for byte. One process can go on."""
    shared = tmp_path / "shared"
    process = start(tmp_path, "shared")
    stop_when(process, lambda: lines(shared) >= 45, 0)
    each = children(process)
    assert len(each) == 2
    os.kill(each[1], signal.SIGKILL)
    began = time.monotonic()
    finish(process, code=128 + signal.SIGKILL)
    assert time.monotonic() - began < 5 + 10
    assert not any(map(is_alive, each))
    said = [(tmp_path / f"logs-shared/process-{i}.log").read_text() for i in range(2)]
    assert "on 2 x cpu" in said[0] and "step 40/60" in said[0]
    assert "loss" not in said[1] and "Traceback" not in said[1]
    assert checkpoint.latest_verified_step(shared) == 40
    saved = meta(shared, 40)
    shutil.rmtree(shared / "checkpoints" / "40")  # as if it had been killed before
    before = (shared / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    before = [line for line in before if line.endswith(b"\n")]
    assert len(before) > 40

    process = start(tmp_path, "shared", "--resume")
    log = tmp_path / "logs-shared" / "process-0.log"
    again = lambda: log.read_text().partition("resumed at step")[2]  # noqa: E731
    stop_when(process, lambda: "step 43/60" in again(), 0)
    os.kill(children(process)[1], signal.SIGTERM)  # one of them: both stop
    finish(process, code=128 + signal.SIGTERM)
    stopped = checkpoint.latest_verified_step(shared)
    assert stopped == lines(shared) and 43 <= stopped < 60
    assert again().startswith(" 20 of 60")
    finish(start(tmp_path, "shared", "--resume"))
    after = (shared / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert len(after) == 60 and after[: len(before)] == before
    for what in ("params", "state", "data"):
        assert meta(shared, 40)[what] == saved[what]

    monkeypatch.setattr(loop.sharding, "make_mesh", functools.partial(mesh_of, 2))
    config = override(tiny.rows("full")["tiny"], SETTINGS)
    loop.train(config, tmp_path / "alone")
    longer = override(config, ["train.steps=63"])
    for name in ("alone", "shared"):  # which one process goes on with
        assert loop.train(longer, tmp_path / name, resume=True).finished
    one, two = (checkpoint.restore_params(tmp_path / n) for n in ("alone", "shared"))
    for a, b in zip(
        jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)
    alone, both = (
        metrics.read_log(tmp_path / name / "metrics.jsonl")
        for name in ("alone", "shared")
    )
    for line, other in zip(alone, both, strict=True):
        assert line.keys() == other.keys()
        np.testing.assert_allclose(line["loss"], other["loss"], rtol=1e-5)


def given(**flags):
    values = {"coordinator": None, "num_processes": None, "process_id": None}
    values |= {"start_timeout": 300, "heartbeat_timeout": 30}
    return distributed.SimpleNamespace(**values | flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"process_id": 1}, "--process_id=1 needs --coordinator=host:port"),
        ({"coordinator": "auto", "num_processes": 2}, "--num_processes=2 needs"),
        ({"coordinator": "here:1"}, "--coordinator=here:1 needs --num_processes"),
        ({"coordinator": "here"}, "--coordinator='here' must be host:port, or 'auto'"),
        ({"coordinator": "a b:80"}, "'a b:80' must be host:port"),
        ({"coordinator": "-x:80"}, "'-x:80' must be host:port"),
        ({"coordinator": "h:70000"}, "'h:70000' must be host:port"),
        (
            {"coordinator": "[::1]:80", "num_processes": 2, "process_id": 2},
            r"--process_id=2 must lie in \[0, --num_processes\), and that is 2",
        ),
        ({"heartbeat_timeout": 0}, "--heartbeat_timeout must be at least 1 second"),
    ],
)
def test_flags_of_processes_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        distributed.check(given(**flags))


def test_who_listens():
    assert distributed._bound("127.0.0.1:80") == "127.0.0.1:80"
    assert distributed._bound("[::1]:80") == "[::1]:80"
    assert distributed._bound("10.0.0.2:80") is None  # all must reach it
    assert distributed._bound("host-0.pod:80") is None


def test_a_program_alone_stays_alone():
    distributed.start(given())
    assert not jax.distributed.is_initialized()


def test_how_processes_are_joined(monkeypatch):
    called = []

    def initialize(*who, **how):
        called.append((who, how))
        if not who:
            raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *setting: called.append(setting))
    distributed.start(given(coordinator="h:80", num_processes=2, process_id=1))
    assert called[0] == ("jax_enable_preemption_service", False)
    who, how = called[1]
    assert who == ("h:80", 2, 1) and how["heartbeat_timeout_seconds"] == 30
    with pytest.raises(ValueError, match="--coordinator=auto: nothing here says"):
        distributed.start(given(coordinator="auto"))


def test_dry_run_prints_what_would_run(capsys):
    program = ["python", "-m", "launch.train", "--workdir=runs/my run; ls"]
    assert local_cluster.main(["--processes=2", "--dry_run", "--", *program]) == 0
    first, second = capsys.readouterr().out.splitlines()
    joined = r"--coordinator=127.0.0.1:\d+ --num_processes=2 --process_id="
    assert re.fullmatch(
        rf"python -m launch.train '--workdir=runs/my run; ls' {joined}0", first
    )
    assert first[:-1] == second[:-1] and second.endswith("=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=2"], "give the program after --"),
        (["--processes=0", "--", "true"], "--processes must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_run(arguments, message):
    with pytest.raises(SystemExit, match=message):
        local_cluster.main(arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_all_end_when_one_does(tmp_path):
    """The others are killed when their time is over, with what they have started."""
    program = (
        "import subprocess, sys, time\n"
        "if sys.argv[-1].endswith('=1'): sys.exit(3)\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    arguments = ["--processes=2", "--grace=1", f"--logs={tmp_path}", "--"]
    cluster = [sys.executable, "-m", "launch.local_cluster"]  # JAX does not like forks
    done = subprocess.run(
        [*cluster, *arguments, sys.executable, "-c", program], cwd=ROOT
    )
    assert done.returncode == 3
    assert not is_alive(int((tmp_path / "process-0.log").read_text()))
    done = subprocess.run(
        [*cluster, "--", "no-such-program"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "no-such-program" in done.stderr
    assert "Traceback" not in done.stderr


# What a test leaves behind that fails ends by itself.
WAIT = "for ((i = 0; i < 1000; i++)); do sleep 0.03; done"
# Writes down the signals that come, and so does what it has started.
NOTES = """
note() { echo "$1" >>"$2"; }
for n in TERM INT HUP; do trap "note $n $0${*: -1}" $n; done
(
  for n in TERM INT HUP; do trap "note $n $0child" $n; done
  WAIT
) &
touch "$0${*: -1}"
WAIT
""".replace("WAIT", WAIT)


@pytest.fixture
def cluster(tmp_path):
    """Starts clusters of two shells, which know where to write."""
    with contextlib.ExitStack() as stack:

        def start(script, *flags, by=()):
            program = [sys.executable, "-m", "launch.local_cluster", "--processes=2"]
            shell = [shutil.which("bash"), "-c", script, f"{tmp_path}/"]
            process = subprocess.Popen(
                [*by, *program, *flags, "--", *shell],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def noted(folder):
    """What each of the two has written; None of one that has not begun."""
    files = [folder / f"--process_id={i}" for i in range(2)]
    return [f.read_text().split() if f.exists() else None for f in files]


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("by", [[], ["nohup"]], ids=str)
def test_each_process_is_sent_a_signal_once(cluster, tmp_path, by):
    """And not what it has started, which is its own to end. Those that do not end are
    killed, with that; what the cluster is to ignore, none is sent."""
    process = cluster(NOTES, "--grace=1", by=by)
    wait_until(lambda: None not in noted(tmp_path))
    sent = ["INT", "TERM"] if by else ["HUP", "INT", "TERM"]
    for name in ("HUP", "INT", "TERM"):
        process.send_signal(signal.Signals[f"SIG{name}"])
        if name in sent:
            wait_until(lambda name=name: all(name in each for each in noted(tmp_path)))
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL, err
    assert out == "processes [0, 1] did not end in 1 s: killed\n"
    assert noted(tmp_path) == [sent, sent] and not (tmp_path / "child").exists()


def test_a_signal_while_they_start_reaches_all(cluster):
    """The first sends it, as soon as it is there, to what starts the others."""
    first = 'case "${*: -1}" in *=0) kill -TERM $PPID ;; esac'
    process = cluster(f"{first}\n{WAIT}", "--processes=8", "--grace=60")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, err


def test_it_ends_with_the_status_of_what_was_signalled(cluster, tmp_path):
    process = cluster("trap 'exit 143' INT\ntouch \"$0${*: -1}\"\n" + WAIT)
    wait_until(lambda: None not in noted(tmp_path))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 143


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_none_outlives_the_cluster():
    program = [sys.executable, "-c", "import time; time.sleep(100)"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.local_cluster", "--", *program], cwd=ROOT
    )
    wait_until(lambda: len(children(process)) == 2)
    each = children(process)
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_alive, each)))
