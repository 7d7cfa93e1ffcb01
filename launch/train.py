"""Trains one row of an experiment, or goes on with it.

    python -m launch.train --experiment=quickstart --row=hope --workdir=runs/hope

Any field of the row's config can be set: --set model.d_model=256 --set train.steps=100.
SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save and stop (status 128 + signal); --resume goes
on from there, also to more steps than the run had. --init_from=DIR begins another run
with the parameters of one, or of a release. Status 75: something hung and was shown;
try --resume. Started once on every host with --coordinator, it is one run over all
their devices.
"""

import importlib
import inspect
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import command, distributed

# LAPACK's own threads and JAX's stand in each other's way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def define_row(define) -> None:
    """The flags that say which config, for `config_of`."""
    define.string(
        "experiment",
        None,
        "module under experiments/ (or any importable module) with rows",
    )
    define.string("row", None, "row of the experiment; may be left out if one")
    define.string("scale", "full", "size of the experiment")
    define.string(
        "config",
        None,
        "a config.json (or a result with one) in place of --experiment, --row, --scale",
    )
    define.multi_string(
        "set", [], "field=value of the config, for example train.steps=100; repeatable"
    )
    define.string("data", None, "text file, folder or glob; sets data.path")
    define.string("mesh", None, "data:2,fsdp:4, also sequence, tensor; sets train.mesh")


def _define(define) -> None:
    define_row(define)
    define.string("workdir", None, "folder of this run alone")
    define.bool("resume", False, "go on from the newest checkpoint")
    define.string(
        "init_from",
        None,
        "the workdir of a run, or a release, whose newest parameters and tokenizer "
        "this one starts with; without --experiment and --config its config too",
    )
    define.string("profile", None, "steps first:last of which a trace is kept")
    define.string("wandb", None, "project of Weights & Biases that shows the run")
    distributed.define(define)
    define.bool(
        "describe", False, "print config, levels and how parameters move, and exit"
    )


def load_row(experiment: str, row: str | None, scale: str):
    """The config of one row.

    Raises:
      ValueError: no such experiment or row; lists those that exist.
    """
    from hope_jax.core.config import did_you_mean

    config = _rows(experiment, scale)
    if row is None and len(config) == 1:
        (row,) = config
    known = f"the rows of {experiment} are {', '.join(config)}."
    if row is None:
        raise ValueError(f"Give --row: {known}")
    if row not in config:
        raise ValueError(f"--row={row!r} is none: {known}" + did_you_mean(row, config))
    return config[row]


def experiments() -> list[str]:
    """Modules under experiments/ with rows to train; they are read, not imported."""
    import experiments as folder

    (root,) = map(Path, folder.__path__)
    has = "\ndef rows(scale: str) -> dict[str, RunConfig]:"
    return sorted(p.stem for p in root.glob("*.py") if has in p.read_text())


def _rows(experiment: str, scale: str):
    from hope_jax.core.config import did_you_mean

    if not all(part.isidentifier() for part in experiment.split(".")):
        raise ValueError(
            f"--experiment={experiment!r} is no name of a module; there are "
            f"{', '.join(experiments())}."
        )
    for name in (f"experiments.{experiment}", experiment):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the experiment exists; something that it imports does not
            continue
        found = _made(module, scale)
        if found is None:
            raise ValueError(
                f"--experiment={experiment!r} has no function rows(scale) of configs "
                f"to train; those that have are {', '.join(experiments())}. Run it by "
                f"itself: python -m {name}."
            )
        return found
    raise ValueError(
        f"--experiment={experiment!r} is neither a module under experiments/ nor "
        f"importable; there are {', '.join(experiments())}."
        + did_you_mean(experiment, experiments())
    )


def _made(module: Any, scale: str) -> dict[str, Any] | None:
    """The rows of an experiment, if it has any that can be trained."""
    from hope_jax.train.config import RunConfig

    try:
        inspect.signature(module.rows).bind(scale)
    except (AttributeError, TypeError):
        return None
    try:
        found = module.rows(scale)
    except KeyError as error:
        if error.args != (scale,):
            raise
        raise ValueError(
            f"--scale={scale!r} is no scale of {module.__name__}."
        ) from None
    of = found.values() if isinstance(found, dict) else [found]
    return found if all(isinstance(config, RunConfig) for config in of) else None


def _describe(config) -> str:
    import json

    from hope_jax.core import config as config_lib
    from hope_jax.core import system
    from hope_jax.models import lm, systems
    from hope_jax.train import loop

    return "\n".join(
        [
            json.dumps(config_lib.to_json(config), indent=2),
            f"\n{lm.count_parameters(config.model):,} parameters\n",
            system.describe(systems.system(config.model, config.train.seq_len)),
            "\nThe state of a row that reads, in bytes:\n",
            "\n".join(
                f"| {part:<14} | {size:>13,} |"
                for part, size in lm.state_bytes(config.model).items()
            ),
            "\nThe outer optimizer:\n",
            loop.describe(config),
        ]
    )


def _resume_command(arguments: Sequence[str]) -> str:
    kept = [a for a in arguments if a not in ("--resume", "--noresume")]
    return shlex.join(["python", "-m", "launch.train", *kept, "--resume"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; the exit status is 0 at the end, and 128 + signal when stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = command.parse(__doc__, _define, arguments)
    command.quiet_libraries()
    try:
        return _train(given, arguments)
    except Exception as error:  # the message says what to do; a traceback would hide it
        said = command.in_words(error)
        if said is None:
            raise
        print(f"{type(error).__name__}: {said}", file=sys.stderr)
        return command.status_of(error)


def _train(given: Any, arguments: Sequence[str]) -> int:
    distributed.start(given)
    config = _config(given)
    if given.describe:
        print(_describe(config))
        return 0
    if _waits(config):
        os.environ.setdefault("NPROC", "32")  # read when jax starts

    from hope_jax.train import loop, watching

    outcome = loop.train(
        config,
        given.workdir,
        resume=given.resume,
        init_from=given.init_from,
        profile=watching.profiled(given.profile) if given.profile else None,
        wandb=given.wandb,
    )
    if outcome.finished or outcome.stopped_by is None:
        print(f"done: step {outcome.step}, in {given.workdir}")
        return 0
    print(f"stopped and saved at step {outcome.step}. To go on:")
    print(f"  {_resume_command(arguments)}")
    return 128 + outcome.stopped_by


def _config(given: Any):
    """The config that the flags describe."""
    known = _names_config(given) or given.init_from
    if known and given.workdir is None and not given.describe:
        raise ValueError("Give --workdir, a folder for this run alone.")
    resumed = given.workdir if given.resume else ""
    return config_of(given, given.init_from or resumed or "")


def _names_config(given: Any) -> bool:
    return given.experiment is not None or given.config is not None


def config_of(given: Any, from_run: str = ""):
    """The config of the flags of `define_row`.

    Args:
      given: the flags.
      from_run: the workdir of a run, or a release, that has it where they name none.

    Raises:
      ValueError: no such row, or settings that do not fit it.
    """
    if given.experiment is not None and given.config is not None:
        raise ValueError("--experiment and --config both name a config; give one.")
    if not _names_config(given) and not from_run:
        raise ValueError(
            f"Give --experiment, one of {', '.join(experiments())}, or --config."
        )
    if given.experiment is None:
        for flag in ("row", "scale"):
            if given[flag].present:
                raise ValueError(f"--{flag} is of an --experiment; give that too.")

    from hope_jax.core import config as config_lib
    from hope_jax.train import checkpoint, release
    from hope_jax.train.config import RunConfig, check_rows, read_config

    if given.experiment is not None:
        config = load_row(given.experiment, given.row, given.scale)
    elif given.config is not None:
        config = read_config(RunConfig, given.config)
    elif release.is_release(from_run):
        config = release.read_config(from_run)
    else:
        config = checkpoint.saved_config(from_run)
    settings = list(given.set)
    if given.data is not None:
        settings.append(f"data.path={given.data}")
    if given.mesh is not None:
        settings.append(f"train.mesh={given.mesh}")
    config = config_lib.override(config, settings)
    check_rows(config)
    return config


def _waits(config: Any) -> bool:
    """Whether a rule calls LAPACK, which a small pool of threads can wait for for ever.
    A large one costs a third of the speed."""
    levels = (level.rule for level in config.model.cms.whole)
    return any(rule.lapack for rule in (config.optimizer.rule, *levels))


if __name__ == "__main__":
    command.run(main)
