"""The loader: tokens a second from prepared data, beside what a training step consumes.

Run:     python -m experiments.benchmarks.loader
Smoke:   add --quick --out=DIR (small sizes); a test does so.
Expect:  at least 5 times what the fastest model consumes, on the cores that it has.
Cost:    three minutes on one CPU core.

The model is the smallest Transformer++ of the zoo, whose steps are the fastest here.
Data is a prepared folder of random ids (`hope_jax.data.prepared`), in documents of
lengths as of web text, read from the disk's cache. Both are timed in turn on the clock,
each alone; `batch` is made in this process, by threads, as with `train.workers=0`.

    rows      documents end to end
    packed    each at a multiple of 64 tokens
    mixture   two folders, 0.7 and 0.3, a tenth of the rows from long documents alone
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import lab
from experiments.benchmarks import timing
from hope_jax import optim
from hope_jax.data import prepare, prepared, sources, stream
from hope_jax.data.tokenizer import ByteTokenizer
from hope_jax.models import lm, zoo
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.train import state as state_lib
from hope_jax.train import step as step_lib
from hope_jax.train.config import OptimizerConfig
from hope_jax.train.metrics import write_benchmark
from launch import command

METRIC = "tokens per second on the clock"
TARGET = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is timed.

    Attributes:
      documents: of a folder.
      seq_len: tokens of a row.
      batch: rows.
      batches: taken in one call.
      rounds: interleaved rounds.
      model: fields that the model has otherwise than in the zoo.
    """

    documents: int = 4000
    seq_len: int = 256
    batch: int = 8
    batches: int = 50
    rounds: int = 7
    model: tuple[tuple[str, int], ...] = ()


QUICK = Sizes(
    documents=60,
    seq_len=64,
    batch=2,
    batches=2,
    rounds=2,
    model=(("d_model", 16), ("heads", 1), ("layers", 1), ("vocab", 257)),
)


def folder(path: Path, count: int, seed: int) -> prepared.Prepared:
    """Documents of random bytes, a few hundred to many thousand long."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(7.0, 1.2, count), 50, 200_000).astype(int)
    path.mkdir()
    texts = [rng.integers(97, 123, n, dtype=np.uint8).tobytes() for n in lengths]
    (path / "in.txt").write_bytes(b"\0".join(texts))
    plan = prepare.Plan(
        sources=(str(path / "in.txt"),),
        how=sources.Reading(separator="\0"),
        held_out=0.05,
        shard_bytes=1 << 26,
        tokenizer="bytes",
        fingerprint=ByteTokenizer().fingerprint,
    )
    return prepare.prepare(path / "out", plan, ByteTokenizer())


def loaders(sizes: Sizes, root: Path) -> dict[str, Callable[[], Any]]:
    """Programs that take `batches` batches each."""
    first = folder(root / "a", sizes.documents, 0)
    second = folder(root / "b", sizes.documents, 1)
    rows = functools.partial(first.rows, "train", seq_len=sizes.seq_len)
    others = second.rows("train", seq_len=sizes.seq_len)
    kinds = {
        "rows": (rows(), 0),
        "packed": (rows(stretch=64), 64),
        "mixture": (
            stream.Mixture([(rows(), 0.6), (rows(least=4096), 0.1), (others, 0.3)]),
            0,
        ),
    }
    made = {}
    for kind, (source, stretch) in kinds.items():
        config = stream.StreamConfig(
            seq_len=sizes.seq_len, batch=sizes.batch, seed=0, stretch=stretch
        )
        iterator = iter(stream.batches(source, config))
        made[kind] = functools.partial(_take, iterator, sizes.batches)
    return made


def _take(iterator, count):
    for _ in range(count):
        batch = next(iterator)
    return batch["tokens"]


def trained(config: ModelConfig, sizes: Sizes) -> Callable[[], Any]:
    """One step of training."""
    graphdef, params = lm.build(config, jax.random.key(0))
    tx = optim.build(
        OptimizerConfig(warmup_steps=0),
        total_steps=1000,
        periods=lm.periods(config, params, sizes.seq_len),
        layers=None,
    )
    state = state_lib.create(params, tx, jax.random.key(1))
    step = jax.jit(step_lib.make_step(graphdef, lm.apply, tx))
    tokens = np.zeros((sizes.batch, sizes.seq_len + 1), np.int32)
    return functools.partial(step, state, jax.numpy.asarray(tokens))


def run(sizes: Sizes) -> list[dict[str, Any]]:
    """Times everything and returns the workloads of a benchmark file."""
    config = dataclasses.replace(zoo.get("transformer_tiny"), **dict(sizes.model))
    config = with_context(config, sizes.seq_len)
    with tempfile.TemporaryDirectory() as root:
        programs: dict[Hashable, Any] = {**loaders(sizes, Path(root))}
        programs["step"] = trained(config, sizes)
        times = timing.interleave(programs, sizes.rounds)
    tokens = sizes.batch * sizes.seq_len
    consumed = [tokens / seconds for seconds in times.pop("step").wall]
    return [
        timing.workload(
            f"{kind} of {sizes.seq_len}, against a step of transformer_tiny",
            METRIC,
            [tokens * sizes.batches / seconds for seconds in of.wall],
            consumed,
        )
        for kind, of in times.items()
    ]


def _define(define) -> None:
    define.bool("quick", False, "small sizes")
    define.string("out", str(lab.RESULTS), "folder of the results")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the ratios and writes the file."""
    flags = command.parse(__doc__, _define, arguments)
    workloads = run(QUICK if flags.quick else Sizes())
    targets = {(work["workload"], METRIC): TARGET for work in workloads}
    print(timing.table(workloads, targets))
    print(write_benchmark(flags.out, name="loader", workloads=workloads))


if __name__ == "__main__":
    command.run(main)
