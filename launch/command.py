"""The command line of every program: absl's flags, each program's its own.

A program defines its flags when its `main` is called, in a set of its own. So programs
can import each other, and a `main` can be called with arguments as often as one likes.
`--flagfile`, `--helpshort`, `--verbosity` and what else absl has for its logging work
everywhere.
"""

import contextlib
import functools
import logging
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import filelock
from absl import app, flags
from absl import logging as absl_logging

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("hope_jax", "launch", "experiments")  # there may be an environment beside
# Of absl: `DEFINE_` is before each name.
_KINDS = ("string", "integer", "float", "bool", "enum", "list", "multi_string", "alias")


def parse(
    doc: str | None,
    define: Callable[[types.SimpleNamespace], None],
    arguments: Sequence[str] | None = None,
    *,
    compiles: bool = True,
) -> Any:
    """The flags of a program, read.

    Args:
      doc: the docstring of its module, which `--helpshort` shows.
      define: is called with absl's functions: `define.string(name, default, help)` is
        `flags.DEFINE_string` for this program, and so are `integer`, `float`, `bool`,
        `enum`, `list`, `multi_string` and `alias`.
      arguments: those of the process by default.
      compiles: whether the program compiles anything. It then has a flag
        `compile_cache`, the folder in which compiled programs are kept from run to run.

    Returns:
      Their values, as attributes.

    Raises:
      SystemExit: help was asked for, or a flag is wrong; that message is one line.
    """
    doc = (doc or "").strip()
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # a word may stand between flags
    made = (getattr(flags, f"DEFINE_{kind}") for kind in _KINDS)
    made = (functools.partial(each, flag_values=values) for each in made)
    made = types.SimpleNamespace(**dict(zip(_KINDS, made, strict=True)))
    define(made)
    if compiles:
        made.string(
            "compile_cache",
            "",
            "folder that keeps compiled programs for the next run, or 'none'; by "
            "default $JAX_COMPILATION_CACHE_DIR, else hope_jax in the user's cache",
        )
    short = f"{doc.strip()}\n\nflags:\n{values.get_help()}"
    for flag in flags.FLAGS.flags_by_module_dict()["absl.logging"]:
        if flag.name not in values:
            values[flag.name] = flag
            values.register_flag_by_module("absl.logging", flag)
    full = f"{doc}\n\nflags:\n{values.get_help()}"
    for name, text in (("help", short), ("helpshort", short), ("helpfull", full)):
        flags.DEFINE_flag(_Help(name, text), flag_values=values)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        rest = values([sys.argv[0], *arguments])[1:]
        if rest:
            raise flags.Error(f"not a flag: {' '.join(rest)}")
    except flags.Error as error:
        from hope_jax.core import show

        said = re.sub(r"flag (--\w+)=None: Flag .*", r"\1 is needed.", str(error))
        said = show.printable(" ".join(said.split()))
        fail(f"{said} (--helpshort lists the flags.)")
    if not values["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells all at INFO
    if compiles:
        try:
            keep_programs(values.compile_cache)
        except OSError as error:
            fail(
                f"compile_cache ({values.compile_cache}) is no folder that can be "
                f"written to: {error.strerror}. Give another, or 'none'."
            )
    return values


def keep_programs(folder: str = "") -> Path | None:
    """Lets JAX keep compiled programs, so that the next run need not compile them.

    JAX names a program by all that it is made of: its code, its shapes, the device, the
    flags of XLA and JAX's own version. At most 4 GiB are kept, the last used.

    Args:
      folder: where; `none` for nowhere. Empty is where JAX already keeps them, or
        `$JAX_COMPILATION_CACHE_DIR`, else `hope_jax` in the user's cache folder if that
        can be written to.

    Returns:
      Where they are kept.

    Raises:
      OSError: `folder` cannot be made or written to.
    """
    import jax  # after --help

    from hope_jax.train.folder import make_folder

    if folder == "none":
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    kept = jax.config.values["jax_compilation_cache_dir"]
    if not folder and kept is not None:
        return Path(kept)
    chosen = Path(folder).expanduser() if folder else _user_cache()
    try:
        make_folder(chosen)
    except OSError:
        if folder:
            raise
        return None
    _mend(chosen)
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_compilation_cache_max_size", 4 * 1024**3)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return chosen


def _mend(folder: Path) -> None:
    """Removes programs that a killed process had not finished writing.

    JAX writes the time of use last, and could neither read such a program nor write any
    more beside it.
    """
    with filelock.FileLock(folder / ".lockfile"):  # as JAX does
        for program in folder.glob("*-cache"):
            if not program.with_name(f"{program.name[:-6]}-atime").exists():
                program.unlink()


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hope_jax" / "programs"


class _Help(flags.BooleanFlag):
    """A flag that prints and ends the program, with absl's status for it."""

    def __init__(self, name: str, text: str):
        super().__init__(name, False, "show this help")
        self._text = text

    def parse(self, argument):
        if self._parse(argument):
            print(self._text)
            sys.exit(1)


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Runs a program, as the last line of its module.

    Args:
      main: is called with the arguments. If it returns a number, that is the exit
        status.
    """

    def started(argv):
        try:
            with fail_in_words():
                code = main(argv[1:])
        except KeyboardInterrupt:  # of a person, who knows
            sys.exit(130)
        return code if isinstance(code, int) else 0

    def parser(argv):
        flags.FLAGS.mark_as_parsed()  # `main` reads them; grain's workers ask for this
        return argv

    app.run(started, flags_parser=parser)


def fail(message: object, status: int = 1) -> None:
    """Ends the program with a message to its user, and a status."""
    if status == 1:
        sys.exit(f"error: {message}")
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def fail_in_words(*errors: type[Exception]) -> Iterator[None]:
    """Ends the program with the message of an error that its user can mend.

    Args:
      errors: which ones, besides those of `in_words`.
    """
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, errors) else in_words(error)
        if said is None:
            raise
        fail(said, status_of(error))


def in_words(error: Exception) -> str | None:
    """What to tell the user who can mend an error; None for one of the program.

    With `--verbosity=1` the traceback is printed as well.
    """
    if isinstance(error, MemoryError):
        said = f"Out of memory. {error}".strip()
    elif isinstance(error, RecursionError):
        said = f"Something is nested too deeply: {error}."
    elif type(error).__name__ == "JaxRuntimeError" and _OUT_OF_MEMORY in str(error):
        said = (
            f"{str(error).splitlines()[0]} Use a smaller batch, more of "
            "train.accumulate, shorter rows or a smaller model."
        )
    elif isinstance(error, _mendable()):
        said = str(error)
    else:
        return None
    if absl_logging.level_info():
        traceback.print_exception(error)
    elif not _ours(error):
        said += " (--verbosity=1 shows where.)"
    return said


def status_of(error: Exception) -> int:
    """With which the program ends: 1, or what the error says."""
    return getattr(error, "status", 1)


_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def _mendable() -> tuple[type[BaseException], ...]:
    known = (ValueError, OSError, FloatingPointError)
    if "hope_jax.train.loop" not in sys.modules:  # then nothing has raised these
        return known
    from hope_jax.data import workers
    from hope_jax.train import checkpoint, lock, watchdog

    more = (checkpoint.Damaged, checkpoint.SaveFailed, lock.InUse, watchdog.Stalled)
    return (*known, *more, workers.Died)


def _ours(error: BaseException) -> bool:
    """Whether this program has raised it, whose messages say what to do."""
    if isinstance(error, OSError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised = Path(frame.f_code.co_filename).resolve()
    return any(raised.is_relative_to(_ROOT / package) for package in _PACKAGES)


def printable(text: str, stream: TextIO) -> str:
    """What may be written to `stream` of a text that anybody, or a model, wrote: to a
    terminal nothing that steers it, and nowhere what no encoding holds."""
    from hope_jax.core import show  # after --help

    if stream.isatty():
        return show.printable(text, "\n\t")
    return text.encode("utf-8", "backslashreplace").decode()


def quiet_libraries() -> None:
    """Keeps to itself what Orbax says of each file of a save that failed: the error
    says it once."""
    logging.getLogger("absl").addFilter(_not_orbax)
    if sys.unraisablehook is not _but_for_closed_loops:
        _hooks.append(sys.unraisablehook)
        sys.unraisablehook = _but_for_closed_loops


_hooks: list[Callable[[Any], Any]] = []


def _but_for_closed_loops(what: Any) -> None:
    """Files that are still written when a save has failed find nobody to tell."""
    if str(what.exc_value) != "Event loop is closed":
        _hooks[-1](what)


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname
