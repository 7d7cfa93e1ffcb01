"""Trains one row of an experiment, or goes on with it.

    python -m launch.train --experiment=quickstart --row=hope --workdir=runs/hope

Any field of the row's config can be set: --set model.d_model=256 --set train.steps=100.
SIGTERM and Ctrl-C save and stop (exit code 128 + signal); --resume goes on from there.
"""

import importlib
import os
import pkgutil
import shlex
import sys

from absl import app, flags, logging

# What jax <= 0.11.2 needs so that collectives of virtual CPU devices cannot dead-lock;
# read when jax starts.
os.environ.setdefault("NPROC", "32")
# LAPACK's own threads and JAX's stand in each other's way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_EXPERIMENT = flags.DEFINE_string(
    "experiment",
    None,
    "Module under experiments/ (or any importable module) with rows.",
)
_ROW = flags.DEFINE_string(
    "row", None, "Row of the experiment; may be left out if one."
)
_SCALE = flags.DEFINE_string("scale", "full", "Size of the experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run alone.")
_SET = flags.DEFINE_multi_string(
    "set", [], "field=value of the config, for example train.steps=100; repeatable."
)
_DATA = flags.DEFINE_string("data", None, "Text file, folder or glob; sets data.path.")
_RESUME = flags.DEFINE_bool("resume", False, "Go on from the newest checkpoint.")
_DESCRIBE = flags.DEFINE_bool(
    "describe", False, "Print the config, the levels and how parameters move, and exit."
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
    if row not in config:
        raise ValueError(
            f"--row={row} is no row of {experiment}; its rows are {', '.join(config)}."
            + did_you_mean(row, config)
        )
    return config[row]


def experiments() -> list[str]:
    """Modules under experiments/ that have rows."""
    import experiments as folder

    names = [m.name for m in pkgutil.iter_modules(folder.__path__) if not m.ispkg]
    return sorted(names)


def _rows(experiment: str, scale: str):
    from hope_jax.core.config import did_you_mean

    for name in (f"experiments.{experiment}", experiment):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the experiment exists; something that it imports does not
            continue
        if not hasattr(module, "rows"):
            raise ValueError(f"--experiment={experiment} has no function rows(scale).")
        return module.rows(scale)
    raise ValueError(
        f"--experiment={experiment} is neither a module under experiments/ nor "
        f"importable; there are {', '.join(experiments())}."
        + did_you_mean(experiment, experiments())
    )


def _describe(config) -> str:
    import json

    from hope_jax.core import config as config_lib
    from hope_jax.core import system
    from hope_jax.models import lm
    from hope_jax.train import loop

    return "\n".join(
        [
            json.dumps(config_lib.to_json(config), indent=2),
            f"\n{lm.count_parameters(config.model):,} parameters\n",
            system.describe(lm.system(config.model, config.train.seq_len)),
            "\nThe outer optimizer:\n",
            loop.describe(config),
        ]
    )


def _resume_command() -> str:
    arguments = [a for a in sys.argv[1:] if a not in ("--resume", "--noresume")]
    return shlex.join(["python", "-m", "launch.train", *arguments, "--resume"])


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Not a flag: {' '.join(argv[1:])}")
    try:
        config = _config()
    except ValueError as error:
        return _fail(error)
    if _DESCRIBE.value:
        print(_describe(config))
        return 0

    from hope_jax.train import checkpoint, folder, loop

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells everything at INFO
    try:
        outcome = loop.train(config, _WORKDIR.value, resume=_RESUME.value)
    except (
        FileExistsError,
        FileNotFoundError,
        checkpoint.ConfigMismatch,
        checkpoint.Damaged,
        checkpoint.SaveFailed,
        folder.ForeignFolder,
        loop.NonFinite,
    ) as error:  # the message says what to do; a traceback would only hide it
        return _fail(error)
    if outcome.finished:
        print(f"done: step {outcome.step}, in {_WORKDIR.value}")
        return 0
    print(f"stopped and saved at step {outcome.step}. To go on:\n  {_resume_command()}")
    return 128 + outcome.stopped_by


def _config():
    """The config that the flags describe."""
    if _EXPERIMENT.value is None:
        raise ValueError(f"Give --experiment, one of {', '.join(experiments())}.")
    if _WORKDIR.value is None and not _DESCRIBE.value:
        raise ValueError("Give --workdir, a folder for this run alone.")

    from hope_jax.core import config as config_lib
    from hope_jax.train.config import check_rows

    config = load_row(_EXPERIMENT.value, _ROW.value, _SCALE.value)
    settings = list(_SET.value)
    if _DATA.value is not None:
        settings.append(f"data.path={_DATA.value}")
    config = config_lib.override(config, settings)
    check_rows(config)
    return config


def _fail(error: Exception) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    app.run(main)
