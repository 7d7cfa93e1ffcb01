"""Is anything lost on the way? Runs that are killed, restores that leave something out,
and checkpoints of which a bit flips.

Run:     python -m experiments.reliability  (in pieces: --rows=kills --seeds=0)
Smoke:   add --scale=smoke --out=DIR.
Expect:  every run that was killed ends byte for byte as one that was not; every restore
         that leaves something out ends elsewhere; no flipped bit goes unnoticed.
Cost:    of each seed two minutes for the kills, half a minute for the others, on one
         CPU core.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from hope_jax.core import config as config_lib
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.train import checkpoint, loop
from hope_jax.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from launch import command

NAME = "reliability"
ROOT = Path(__file__).parents[1]
# A run may not notice a process that is stopped: it is killed a moment later.
HOW = {
    "TERM": (signal.SIGTERM,),
    "KILL": (signal.SIGKILL,),
    "STOP and KILL": (signal.SIGSTOP, signal.SIGKILL),
}
LEFT_OUT = ("the key", "what carries over", "the place in the data", "the steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kills:
    """Of one of the processes of a run, at random steps.

    Attributes:
      kills: how many.
      processes: of the run, on this machine.
      steps: of the run.
      chain: most kills of one run.
    """

    kills: int
    processes: int = 2
    steps: int = 120
    chain: int = 5
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """A run is gone on with from half of its steps, with a part left out each time.

    Attributes:
      steps: of the run.
    """

    steps: int = 20
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flips:
    """Of one bit of any file of a checkpoint, and back.

    Attributes:
      flips: how many.
    """

    flips: int
    seed: int = 0


Settings = Kills | Controls | Flips
SCALES: Mapping[str, Mapping[str, Settings]] = {
    "full": {
        "kills": Kills(kills=5),
        "kills_of_four": Kills(kills=5, processes=4),
        "controls": Controls(),
        "bit_flips": Flips(flips=200),
    },
    "smoke": {
        "kills": Kills(kills=1, processes=1, steps=40, chain=1),
        "controls": Controls(steps=4),
        "bit_flips": Flips(flips=12),
    },
}


def run(steps: int, seed: int, **train: Any) -> RunConfig:
    """A model of one layer on a little text, whose MLP moves every three steps: a run
    is mostly stopped in the middle of its period."""
    level = CMSLevel(period=48, rate=0.0)
    return RunConfig(
        experiment=NAME,
        row="run",
        seed=seed,
        model=ModelConfig(
            d_model=16,
            layers=1,
            heads=2,
            mixer=AttentionConfig(context=16),
            cms=CMSConfig(levels=(level,), hidden=16),
        ),
        data=DataConfig(max_train_bytes=20_000, max_validation_bytes=4_000),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(steps=steps, batch=4, seq_len=16, log_every=1, **train),
    )


def end(folder: Path) -> tuple[Any, ...]:
    """Where a run stands, byte for byte: a digest of every array of its last checkpoint
    and of its place in the data, its log, its config."""
    with checkpoint.Checkpoints(folder / checkpoint.FOLDER, read_only=True) as saved:
        meta = saved._meta(saved.verify(saved.steps()[-1]))
    names = ("metrics.jsonl", loop.CONFIG, checkpoint.TOKENIZER)
    files = [(folder / name).read_bytes() for name in names]
    return meta["step"], meta["params"], meta["state"], meta["data"], *files


def lines(folder: Path) -> int:
    """Lines of the log of a run."""
    log = folder / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def start(folder: Path, config: Path, processes: int) -> subprocess.Popen:
    """A run as several processes of this machine, or what is left to do of it."""
    cluster = [f"--processes={processes}", "--devices=1", "--grace=30"]
    flags = [f"--config={config}", f"--workdir={folder}", "--resume"]
    flags += [
        f"--compile_cache={config.with_name('programs')}",
        "--heartbeat_timeout=5",
    ]
    python = [sys.executable, "-m"]
    return subprocess.Popen(
        [
            *python,
            "launch.local_cluster",
            *cluster,
            "--",
            *python,
            "launch.train",
            *flags,
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(
    process: subprocess.Popen, ready: Callable[[], bool], draw: random.Random
) -> bool:
    """Whether a run was ended by what one of its processes was sent, once `ready`."""
    while not ready() and process.poll() is None:
        time.sleep(0.002)
    if process.returncode:
        raise RuntimeError("A run ended before it was killed.")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with contextlib.suppress(OSError, IndexError):  # it has just ended
        one = int(draw.choice(children.read_text().split()))
        first, *then = HOW[draw.choice(list(HOW))]
        os.kill(one, first)
        for number in then:
            time.sleep(draw.random())
            os.kill(one, number)
    return process.wait() != 0


def kills(config: Kills, folder: Path) -> dict[str, float]:
    """How many kills, and how many of them were of runs that ended as if there had been
    none."""
    draw, of = random.Random(config.seed), config.processes
    file = folder / "run.json"
    trained = run(config.steps, config.seed, checkpoint_every=10)
    file.write_text(json.dumps(config_lib.to_json(trained)))
    whole, broken = folder / "whole", folder / "broken"
    if start(whole, file, of).wait():
        raise RuntimeError("The run that nobody kills did not end well.")
    done = same = 0
    while done < config.kills:
        shutil.rmtree(broken, ignore_errors=True)
        most = min(config.chain, config.kills - done)
        moments = sorted(draw.sample(range(1, config.steps - 10), most))
        came = sum(
            kill(start(broken, file, of), lambda at=at: lines(broken) >= at, draw)
            for at in moments
        )
        if start(broken, file, of).wait():
            raise RuntimeError("A run that was killed could not be gone on with.")
        done, same = done + came, same + came * (end(broken) == end(whole))
    return {"kills": float(done), "byte_equal": float(same)}


def leaving_out(what: str) -> Callable:
    """`Checkpoints.restore` that leaves out one of `LEFT_OUT`, or nothing."""
    whole = checkpoint.Checkpoints.restore

    def restore(self, like, *, iterator, **more):
        if what == "the place in the data":
            iterator = None
        found = whole(self, like, iterator=iterator, **more)
        assert found is not None
        state, step = found
        level, key = state.level, state.key
        if what == "the key":
            key = jax.random.fold_in(key, 1)
        kind = {"what carries over": jnp.floating, "the steps": jnp.integer}.get(what)
        if kind is not None:
            again = lambda a: jnp.zeros_like(a) if jnp.issubdtype(a.dtype, kind) else a  # noqa: E731
            level = level._replace(opt=jax.tree.map(again, level.opt))
        if what == "the steps":
            level = level._replace(count=jnp.zeros_like(level.count))
        return state._replace(level=level, key=key), step

    return restore


def controls(config: Controls, folder: Path) -> dict[str, float]:
    """Of how many restores that leave something out the run ends elsewhere; and whether
    it ends at the same place of one that leaves nothing out."""
    half = config.steps // 2
    trained = run(config.steps, config.seed, checkpoint_every=half)
    whole, found = folder / "whole", {}
    loop.train(trained, whole)
    for what in ("nothing", *LEFT_OUT):
        copy = Path(shutil.copytree(whole, folder / what))
        shutil.rmtree(copy / checkpoint.FOLDER / str(config.steps))  # killed before it
        with mock.patch.object(checkpoint.Checkpoints, "restore", leaving_out(what)):
            loop.train(trained, copy, resume=True)
        found[what] = end(copy) == end(whole)
    return {
        "same_with_all": float(found.pop("nothing")),
        "left_out": float(len(found)),
        "elsewhere": float(sum(not same for same in found.values())),
    }


def bit_flips(config: Flips, folder: Path) -> dict[str, float]:
    """How many were noticed, did no harm, and were neither."""
    draw = random.Random(config.seed)
    trained = run(4, config.seed, checkpoint_every=2)
    loop.train(trained, folder / "run")
    saved = folder / "run" / checkpoint.FOLDER
    files = sorted(p for p in (saved / "4").rglob("*") if p.is_file())
    files = [path for path in files if path.stat().st_size]
    restored = _restorer(trained, saved)
    step, *right = restored()
    if step != 4:
        raise RuntimeError("The checkpoint that nobody touches cannot be restored.")
    noticed = harmless = 0
    for _ in range(config.flips):
        path = draw.choice(files)
        data = path.read_bytes()
        at = draw.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            step, *found = restored()
            noticed += step != 4
            harmless += step == 4 and found == right
        except (checkpoint.Damaged, checkpoint.ConfigMismatch):
            noticed += 1
        path.write_bytes(data)
    silent = config.flips - noticed - harmless
    numbers = {"flips": config.flips, "noticed": noticed, "harmless": harmless}
    return {name: float(n) for name, n in (numbers | {"silent": silent}).items()}


def _restorer(config: RunConfig, saved: Path) -> Callable[[], tuple[Any, ...]]:
    """Gives the step, the bytes of every array and the place in the data that a run
    would go on from."""
    mesh = loop.make_mesh(config)
    like = jax.tree.map(loop._spec, loop._model(config, mesh)[1])
    source = loop.load_source(config, saved.parent)

    def restored():
        iterator, fingerprint = loop._data(config, source, mesh)
        with checkpoint.Checkpoints(saved, read_only=True) as checkpoints:
            found = checkpoints.restore(
                like, iterator=iterator, config=config, fingerprint=fingerprint
            )
        assert found is not None
        state, step = found
        arrays = checkpoint._arrays(state.params, "params")
        arrays |= checkpoint._arrays(checkpoint._rest(state), "state")
        said = {name: np.asarray(a).tobytes() for name, a in arrays.items()}
        return step, said, iterator.get_state()

    return restored


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hope_jax-") as folder:
        yield Path(folder)


MEASURES = {
    "kills": kills,
    "kills_of_four": kills,
    "controls": controls,
    "bit_flips": bit_flips,
}


def measure(task: lab.Task) -> dict[str, float]:
    """What the row says, in a folder that is gone afterwards."""
    with _folder() as folder:
        return MEASURES[task.row](task.config, folder)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The sums over seeds, as Markdown."""
    made = []
    for row, of in itertools.groupby(found, key=lambda result: result["row"]):
        sums: dict[str, float] = {}
        for result in of:
            for name, number in result["metrics"].items():
                sums[name] = sums.get(name, 0.0) + number
        said = ", ".join(f"{name} {number:.0f}" for name, number in sums.items())
        made.append([row, said])
    return lab.table(["row", "over all seeds"], made, words=2)


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=lambda flags: SCALES[flags.scale],
    measure=measure,
    table=table,
    scales=tuple(SCALES),
    seeds=(0, 1, 2, 3, 4),
)

if __name__ == "__main__":
    command.run(main)
