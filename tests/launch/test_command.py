"""One way to give flags: every program beside every other, and their help."""

import importlib
import io
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from hope_jax.train import checkpoint, lock, loop, watchdog  # noqa: F401 loop raises them
from launch import command

ROOT = Path(__file__).parents[2]
PROGRAMS = (
    *(f"launch.{n}" for n in ("train", "evaluate", "generate", "chat", "quickstart")),
    "launch.table",
    *(f"experiments.{n}" for n in ("fig4_toy", "orthogonal_tasks", "noisy_gradients")),
    *(f"experiments.{n}" for n in ("learned_optimizers", "fig11_vit", "memory")),
    *(f"experiments.{n}" for n in ("twins", "stability", "long_text", "sweep")),
    *(f"experiments.{n}" for n in ("accumulators", "sessions", "stream_10m")),
    "experiments.continual_reading",
)


def define(define):
    define.string("name", None, "its name", required=True)
    define.integer("count_all", 3, "how many")
    define.alias("count-all", "count_all")
    define.multi_string("set", [], "field=value")
    define.bool("loud", False, "louder")


def parsed(*arguments):
    return command.parse("What it does.", define, arguments)


@pytest.mark.parametrize("file, ours", [("launch/x.py", True), ("env/lib/x.py", False)])
def test_an_error_of_a_library_says_how_to_see_where(file, ours):
    """Of one in an environment in the repository too."""
    code = compile("raise ValueError('too deep')", str(ROOT / file), "exec")
    with pytest.raises(ValueError) as raised:
        exec(code)
    said = command.in_words(raised.value)
    assert said == "too deep" + ("" if ours else " (--verbosity=1 shows where.)")


def test_flags_are_read_as_absl_reads_them(tmp_path):
    given = parsed("--name=a", "--set=x=1", "--set", "y=2", "--loud")
    assert (given.name, given.count_all, given.loud) == ("a", 3, True)
    assert given.set == ["x=1", "y=2"]
    assert parsed("--name=a", "--count-all=5").count_all == 5
    file = tmp_path / "flags"
    file.write_text("--name=b\n# a remark\n--count_all=7\n")
    given = parsed(f"--flagfile={file}", "--noloud")
    assert (given.name, given.count_all, given.loud) == ("b", 7, False)
    assert parsed("--name=a").count_all == 3  # nothing is left of the call before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --name is needed. "),
        (["--name=a", "--cuont_all=1"], "flag 'cuont_all'. Did you mean: count_all"),
        (["--name=a", "--count_all=x"], "flag --count_all=x: invalid literal"),
        (["--name=a", "b", "--loud"], r"error: not a flag: b \("),
        (["--flagfile=/no/such/file"], "Unable to open flagfile"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        parsed(*arguments)
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize("flag", ["--help", "--helpshort", "--helpfull"])
def test_help_shows_the_docstring_and_the_flags(flag, capsys):
    with pytest.raises(SystemExit):
        parsed(flag)
    said = capsys.readouterr().out
    assert said.startswith("What it does.\n") and "--[no]loud: louder" in said
    assert ("--verbosity" in said) == (flag == "--helpfull")


def test_only_the_errors_of_users_are_told_in_words():
    with pytest.raises(SystemExit, match="error: so"):
        with command.fail_in_words():
            raise ValueError("so")
    with pytest.raises(SystemExit, match="error: so"):
        with command.fail_in_words(ArithmeticError):
            raise ZeroDivisionError("so")
    with pytest.raises(ZeroDivisionError):
        with command.fail_in_words():
            raise ZeroDivisionError("so")


def test_orbax_is_kept_quiet_and_nothing_else():
    command.quiet_libraries()
    logger = logging.getLogger("absl")
    made = [logger.makeRecord("absl", 30, p, 1, "", (), None) for p in ("orbax", "jax")]
    assert [bool(logger.filter(record)) for record in made] == [False, True]


def test_what_nobody_waits_for_any_more_is_not_told(monkeypatch):
    told = []
    monkeypatch.setattr(command, "_hooks", [told.append])
    for words in ("Event loop is closed", "another"):
        what = types.SimpleNamespace(exc_value=RuntimeError(words))
        command._but_for_closed_loops(what)
    assert [str(what.exc_value) for what in told] == ["another"]


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError(), "Out of memory."),
        (RecursionError("maximum depth"), "nested too deeply: maximum depth"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: '/x'"),
        (watchdog.Stalled("a batch has not ended"), "a batch has not ended"),
        (checkpoint.SaveFailed("no room"), "no room"),
        (lock.InUse("in use"), "in use"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nat"), "batch"),
        (TypeError("of the program"), None),
        (jax.errors.JaxRuntimeError("INTERNAL: of the program"), None),
    ],
)
def test_errors_in_words(error, said):
    try:
        raise error
    except Exception as raised:
        found = command.in_words(raised)
    if said is None:
        assert found is None
    else:
        assert said in found and "\n" not in found
    status = 75 if isinstance(error, watchdog.Stalled) else 1
    assert command.status_of(error) == status
    if said is not None:
        with pytest.raises(SystemExit) as end, command.fail_in_words():
            raise error
        assert end.value.code == (75 if status == 75 else f"error: {found}")


def test_all_programs_can_be_imported_together():
    """Also what a program imports as it runs; none of them has defined a flag then."""
    from absl import flags

    modules = [importlib.import_module(name) for name in PROGRAMS]
    for module in modules:
        assert callable(module.main)
    owners = " ".join(flags.FLAGS.flags_by_module_dict())
    assert "launch" not in owners and "experiments" not in owners


# Runs programs one after another as `python -m` does, and prints what each has said.
ONE_BY_ONE = """
import contextlib, io, json, runpy, sys
said = {}
for name in sys.argv[1:]:
    sys.argv = [name, "--helpshort"]
    sys.modules.pop(name, None)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = runpy.run_module(name, run_name="__main__", alter_sys=True) and 0
        except SystemExit as end:
            status = end.code
    said[name] = status, out.getvalue(), err.getvalue()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def helped():
    """Status, output and errors of each program, of a process that runs them all."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, *PROGRAMS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PROGRAMS)
def test_helpshort_of_every_program(name, helped):
    status, out, err = helped[name]
    module = importlib.import_module(name)
    assert status == 1 and err == ""
    assert out.startswith(module.__doc__.strip())
    flags = out.partition("\nflags:\n")[2]
    assert "--flagfile" in flags and flags.count("\n  --") >= 4


def test_programs_end_with_their_status(tmp_path):
    """As absl runs them: flags that are wrong, flags in a file, a number returned."""
    script = tmp_path / "program.py"
    script.write_text(
        '"""Adds."""\n'
        "from launch import command\n"
        "def main(arguments=None):\n"
        "    define = lambda define: define.integer('n', 1, 'a number')\n"
        "    given = command.parse(__doc__, define, arguments)\n"
        "    print(given.n)\n"
        "    return given.n if given.n else 'a table'\n"
        "command.run(main)\n"
    )
    (tmp_path / "flags").write_text("--n=5\n")
    for arguments, status, out in (
        ([f"--flagfile={tmp_path / 'flags'}"], 5, "5\n"),
        (["--n=0"], 0, "0\n"),
        (["--m=0"], 1, ""),
    ):
        done = subprocess.run(
            [sys.executable, script, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (status, out), done.stderr
        assert "Traceback" not in done.stderr


_COMPILES = """
import sys
from launch import command
flags = command.parse("Compiles.", lambda define: None, sys.argv[1:])
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_explain_cache_misses", True)
print(jax.jit(lambda x: x * 2)(3.0), jax.config.jax_compilation_cache_dir)
"""


def test_compiled_programs_are_kept_where_the_user_says(tmp_path):
    def run(*arguments, **variables):
        unset = ("JAX_ENABLE_COMPILATION_CACHE", "XDG_CACHE_HOME")
        env = {k: v for k, v in os.environ.items() if k not in unset}
        done = subprocess.run(
            [sys.executable, "-c", _COMPILES, *arguments],
            cwd=ROOT,
            env=env | {"HOME": str(tmp_path / "home")} | variables,
            capture_output=True,
            text=True,
        )
        return done.stdout.split(), done.stderr

    def programs(folder):
        return sorted(folder.glob("*-cache"))

    chosen = tmp_path / "chosen"
    missed = "PERSISTENT COMPILATION CACHE MISS"
    (value, folder), said = run(f"--compile_cache={chosen}")
    assert value == "6.0" and folder == str(chosen) and missed in said
    made = programs(chosen)
    assert made
    _, said = run(f"--compile_cache={chosen}")
    assert programs(chosen) == made and missed not in said

    (torn := made[0]).write_bytes(b"torn")  # by a process that was killed
    torn.with_name(torn.name.replace("-cache", "-atime")).unlink()
    (value, _), said = run(f"--compile_cache={chosen}")
    assert value == "6.0" and "Error" not in said and programs(chosen) == made
    assert torn.read_bytes() != b"torn"

    (_, folder), _ = run()
    assert programs(tmp_path / "home/.cache/hope_jax/programs") and "home" in folder
    (_, folder), _ = run(XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert folder == str(tmp_path / "xdg/hope_jax/programs")
    (_, folder), _ = run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert folder == str(tmp_path / "own")
    (_, folder), _ = run("--compile_cache=none")
    assert folder == "None"
    file = tmp_path / "file"
    file.touch()
    _, said = run(f"--compile_cache={file}")
    assert f"error: compile_cache ({file}) is no folder" in said
    (value, folder), _ = run(XDG_CACHE_HOME=str(file))  # nowhere to keep them: so be it
    assert (value, folder) == ("6.0", "None")


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_nothing_steers_a_terminal():
    wild = "a\x1b[31m\tb\n\udcff\x9b"
    said = command.printable(wild, _Terminal())
    assert said == "a\\x1b[31m\tb\n\\udcff\\x9b"
    assert command.printable(wild, io.StringIO()) == "a\x1b[31m\tb\n\\udcff\x9b"
