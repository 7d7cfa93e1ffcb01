"""What is written down: the log of a run, the result of a run, the result of a race.

Everything measured on purpose is one JSON file, written and read by this module alone.

    experiments/results/<experiment>/<row>-s<seed>.json
    experiments/results/benchmarks/<name>-<device>.json
"""

import contextlib
import importlib.metadata
import json
import math
import numbers
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from hope_jax.core import config as config_lib

RESULT_KEYS = (
    "experiment",
    "row",
    "scale",
    "seed",
    "config",
    "commit",
    "versions",
    "device",
    "metrics",
)
BENCHMARK_KEYS = ("name", "commit", "versions", "device", "workloads")
WORKLOAD_KEYS = ("workload", "ours", "peer", "metric", "ratio", "ratios")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "hope_jax")

_ROOT = Path(__file__).parents[2]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BENCHMARKS = "benchmarks"


def write_result(
    directory: str | os.PathLike,
    *,
    experiment: str,
    row: str,
    scale: str,
    seed: int,
    config: Any,
    metrics: Mapping[str, float],
) -> Path:
    """Writes `directory/<experiment>/<row>-s<seed>.json` and returns its path.

    Commit, versions and device are those of this process. An older file of the same
    name is replaced as a whole.

    Args:
      directory: usually `experiments/results`.
      experiment, row, scale, seed: what was run.
      config: its config, a dataclass or JSON.
      metrics: flat: name to finite number.

    Raises:
      ValueError: a name that is no file name, or a metric that is no finite number.
    """
    result = {
        "experiment": check_name("experiment", experiment),
        "row": check_name("row", row),
        "scale": scale,
        "seed": seed,
        "config": config_lib.to_json(config),
        **_provenance(),
        "metrics": finite(metrics, "the metrics of this result"),
    }
    if experiment == _BENCHMARKS:
        raise ValueError(
            f"experiment must not be {experiment!r}: that folder holds benchmarks."
        )
    _check_result(result, "this result")
    return write_json(Path(directory) / experiment / f"{row}-s{seed}.json", result)


def read_result(path: str | os.PathLike) -> dict[str, Any]:
    """One result file, checked.

    Raises:
      ValueError: not a result file; the message names the path and what is wrong.
    """
    result = _read(path)
    _check_result(result, str(path))
    return result


def read_results(
    directory: str | os.PathLike, experiment: str | None = None
) -> list[dict[str, Any]]:
    """All results below `directory`, or those of one experiment, in order of path."""
    directory = Path(directory)
    pattern = f"{check_name('experiment', experiment)}/*.json" if experiment else None
    paths = sorted(directory.glob(pattern or "*/*.json"))
    return [read_result(path) for path in paths if path.parent.name != _BENCHMARKS]


def write_benchmark(
    directory: str | os.PathLike, *, name: str, workloads: Sequence[Mapping[str, Any]]
) -> Path:
    """Writes `directory/benchmarks/<name>-<device>.json` and returns its path.

    Args:
      directory: usually `experiments/results`.
      name: of the benchmark.
      workloads: each `{workload, ours, peer, metric, ratio, ratios}`. `ratios` come
        from interleaved pairs, `ratio` is their median; above 1 means ours is better.

    Raises:
      ValueError: a key too many or too few, or a number that is not finite.
    """
    benchmark = {
        "name": check_name("name", name),
        **_provenance(),
        "workloads": [dict(w) for w in workloads],
    }
    _check_benchmark(benchmark, "this benchmark")
    slug = re.sub(r"[^a-z0-9]+", "-", benchmark["device"].lower()).strip("-")
    path = Path(directory) / _BENCHMARKS / f"{name}-{slug}.json"
    return write_json(path, benchmark)


def read_benchmark(path: str | os.PathLike) -> dict[str, Any]:
    """One benchmark file, checked as `read_result` checks."""
    benchmark = _read(path)
    _check_benchmark(benchmark, str(path))
    return benchmark


def commit() -> str:
    """The commit of the source tree, "-dirty" when it was changed; else "unknown"."""

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _ROOT.resolve():
            return "unknown"  # installed inside somebody else's repository
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the packages a result depends on and of `more`."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"  # run from a source tree
    return found


def device() -> str:
    """The devices in words: `4 x cpu`, `1 x NVIDIA H100 80GB HBM3`."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def check_name(what: str, name: str) -> str:
    """`name`, if it can be a file's name and nothing else.

    Raises:
      ValueError: it could lead out of its folder, or hide.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} must be letters, digits, '.', '_' and '-', starting with a letter "
            f"or digit; got {name!r}."
        )
    return name


def finite(values: Mapping[str, Any], what: str) -> dict[str, float]:
    """`values` as a flat dict of Python numbers.

    Raises:
      ValueError: something that is no number, or not finite; named.
    """
    plain: dict[str, float] = {}
    for name, value in values.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"A name in {what} must be text, got {name!r}.")
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name} in {what} must be a number, got {value!r}.")
        if not math.isfinite(value):
            raise ValueError(f"{name} in {what} must be finite, got {value!r}.")
        is_whole = isinstance(value, numbers.Integral)
        plain[name] = int(value) if is_whole else float(value)
    return plain


class MetricLog:
    """The log of a run: `metrics.jsonl`, and the same scalars for TensorBoard.

    A line holds what the run computed and never a time, so that the file of a run that
    was stopped and resumed equals, byte for byte, that of one that was not. Speeds go
    to TensorBoard alone.

    Args:
      workdir: an existing folder.
      step: the step that the run goes on from. Lines of later steps, written after the
        checkpoint it goes on from, are dropped.
    """

    def __init__(self, workdir: str | os.PathLike, step: int = 0):
        from tensorboardX import SummaryWriter

        workdir = Path(workdir)
        self.path = workdir / "metrics.jsonl"
        kept = [] if step == 0 else _lines_up_to(self.path, step)
        replace(self.path, "".join(_line(record) for record in kept))
        self._board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1 if step else None
        )
        self._file = self.path.open("a", encoding="utf-8")

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        speeds: Mapping[str, float] | None = None,
    ) -> None:
        """Appends one line.

        Raises:
          ValueError: a value that is no finite number.
          OSError: it cannot be written; names the file.
        """
        metrics = finite(metrics, f"the metrics of step {step}")
        with _named(self.path):
            self._file.write(_line({"step": step, **metrics}))
            self._file.flush()
        with _named(self.path.with_name("tensorboard")):
            for name, value in {**metrics, **(speeds or {})}.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Brings everything written so far to the disk."""
        with _named(self.path):
            os.fsync(self._file.fileno())
        with _named(self.path.with_name("tensorboard")):
            self._board.flush()

    def close(self) -> None:
        """Lets go of the files. What cannot be written any more is given up: `sync` has
        said so of what matters."""
        for closing in (self._file, self._board):
            try:
                closing.close()
            except (OSError, ValueError) as error:
                logging.warning("The log could not be closed: %s", error)


def _lines_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines that a run goes on from; a damaged file is kept beside."""
    if not path.exists():
        logging.warning("%s is gone: the log begins again after step %d.", path, step)
        return []
    try:
        return [record for record in read_log(path) if record["step"] <= step]
    except ValueError as error:
        beside = path.with_name(f"{path.name}.damaged")
        logging.warning("%s It is kept as %s, its other lines here.", error, beside)
        shutil.copyfile(path, beside)
    return [r for r in read_log(path, skip_damaged=True) if r["step"] <= step]


def read_log(
    path: str | os.PathLike, *, skip_damaged: bool = False
) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last line that was cut while written.

    Args:
      path: the file.
      skip_damaged: leaves out other lines that are damaged.

    Raises:
      ValueError: any other line is no JSON object with a step; names file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("it has no step")
        except (ValueError, RecursionError) as error:
            if skip_damaged:
                continue
            raise ValueError(
                f"Line {number} of {path} is no line of a log: {error}."
            ) from None
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _provenance() -> dict[str, Any]:
    return {"commit": commit(), "versions": versions(), "device": device()}


def _check_result(result: Any, where: str) -> None:
    _check_keys(result, RESULT_KEYS, where)
    for key in ("experiment", "row"):
        check_name(f"{key} of {where}", result[key])
    for key in ("scale", "commit", "device"):
        _check_type(result, key, str, where)
    for key in ("config", "versions", "metrics"):
        _check_type(result, key, dict, where)
    _check_type(result, "seed", int, where)
    finite(result["metrics"], f"the metrics of {where}")


def _check_benchmark(benchmark: Any, where: str) -> None:
    _check_keys(benchmark, BENCHMARK_KEYS, where)
    check_name(f"name of {where}", benchmark["name"])
    for key in ("commit", "device"):
        _check_type(benchmark, key, str, where)
    _check_type(benchmark, "versions", dict, where)
    _check_type(benchmark, "workloads", list, where)
    for i, workload in enumerate(benchmark["workloads"]):
        at = f"workload {i} of {where}"
        _check_keys(workload, WORKLOAD_KEYS, at)
        for key in ("workload", "metric"):
            _check_type(workload, key, str, at)
        finite({k: workload[k] for k in ("ours", "peer", "ratio")}, at)
        _check_type(workload, "ratios", list, at)
        finite({f"ratios[{j}]": r for j, r in enumerate(workload["ratios"])}, at)
        _check_median(workload, at)


def _check_median(workload: Mapping[str, Any], where: str) -> None:
    ratios = sorted(workload["ratios"])
    if not ratios:
        raise ValueError(f"ratios of {where} is empty; measure at least one pair.")
    middle = ratios[(len(ratios) - 1) // 2], ratios[len(ratios) // 2]
    if not math.isclose(sum(middle) / 2, workload["ratio"], rel_tol=1e-6):
        raise ValueError(
            f"ratio of {where} must be the median of ratios, {sum(middle) / 2}; "
            f"got {workload['ratio']}."
        )


def _check_keys(data: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must hold {', '.join(keys)}; got {data!r}.")
    missing = [key for key in keys if key not in data]
    extra = [key for key in data if key not in keys]
    if missing or extra:
        raise ValueError(
            f"{where} must hold exactly {', '.join(keys)}; missing {missing}, "
            f"unknown {extra}."
        )


def _check_type(data: Mapping, key: str, kind: type, where: str) -> None:
    value = data[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key} of {where} must be a {kind.__name__}, got {value!r}.")


def _read(path: str | os.PathLike) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None


def write_json(path: str | os.PathLike, data: Any) -> Path:
    """Writes beside, as `.NAME`, then renames: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
    return path


def replace(path: Path, text: str) -> None:
    """Writes beside, as `.NAME`, then renames."""
    beside = path.with_name(f".{path.name}")
    with _named(path):
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """A write that fails does not say of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
