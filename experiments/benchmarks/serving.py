"""Serving sessions: tokens a second and bytes a session, Hope beside Transformer++.

Run:     python -m experiments.benchmarks.serving --only=sessions
         (then --only=prefill; a part: --slots=8 --contexts=1024)
Smoke:   add --quick (small sizes); a test does so.
Expect:  experiments/README.md has the figures.
Cost:    half an hour of one CPU core; --memory bounds the caches.

Both models are of one size (`hope_tiny`, `transformer_tiny`) and are served by one
program, `stream.slots.step`; the Transformer's state is its cache of keys, of as many
tokens as its context. It is read and moved on whole at every token, however full it is:
a server made for it would do better. At each number of slots:

    decode    every slot draws tokens, greedily
    read      every slot reads tokens it is given, one by one, as sessions do
    prefill   (--only=prefill) every row reads a new text in parallel, as training does

`together` is one batch of all slots, `apart` one slot after another. Seconds are CPU
seconds of all threads, in interleaved rounds; of the clock are those marked so.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.benchmarks import timing
from hope_jax.models import lm, zoo
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.stream import slots as slots_lib
from hope_jax.stream.generate import Sampling, drawing
from hope_jax.train.metrics import write_benchmark
from launch import command

_METRICS = {"cpu": "tokens per CPU second", "wall": "tokens per second on the clock"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is timed.

    Attributes:
      slots: numbers of slots.
      contexts: tokens of the Transformer's cache.
      tokens: of each slot in one call, of decode and read.
      prefill: tokens of a row in one call.
      rounds: interleaved rounds.
      model: fields that both models have otherwise than in the zoo.
    """

    slots: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (1024, 8192, 65536)
    tokens: int = 16
    prefill: int = 256
    rounds: int = 7
    model: tuple[tuple[str, int], ...] = ()

    def get(self, name: str) -> ModelConfig:
        return dataclasses.replace(zoo.get(name), **dict(self.model))


QUICK = Sizes(
    slots=(1, 2),
    contexts=(8,),
    tokens=4,
    prefill=8,
    rounds=2,
    model=(("d_model", 16), ("heads", 1), ("layers", 1), ("vocab", 64)),
)


def bytes_of(config: ModelConfig) -> int:
    """Of one session."""
    return lm.state_bytes(config)["all"] + 4 * config.vocab


def served(config: ModelConfig, count: int, tokens: int, together: bool):
    """Programs by task, which are one: its turns differ."""
    params = lm.build(config, jax.random.key(0))[1]
    start = slots_lib.begin(config, params, count)
    rng = np.random.default_rng(0)
    texts = {
        "decode": np.full((count, tokens), -1),
        "read": rng.integers(0, config.vocab, (count, tokens)),
    }

    def turn(given):
        return slots_lib.Turn(
            np.int32(given),
            np.full(count, tokens, np.int32),
            drawing([Sampling(temperature=0)] * count, config.vocab),
            np.zeros((count, 2), np.uint32),
            np.tile(np.arange(tokens, dtype=np.int32), (count, 1)),
        )

    step = functools.partial(
        slots_lib.step, config, config.vocab, True, together, params, start
    )
    return {task: functools.partial(step, turn(given)) for task, given in texts.items()}


def prefilled(config: ModelConfig, count: int, tokens: int) -> Callable[[], Any]:
    """Reads new texts in parallel."""
    graphdef, params = lm.build(config, jax.random.key(0))
    text = np.random.default_rng(0).integers(0, config.vocab, (count, tokens))
    read = jax.jit(lambda params, tokens: lm.apply(graphdef, params, tokens)[0][:, -1])
    return functools.partial(read, params, jnp.asarray(text, jnp.int32))


def models(sizes: Sizes) -> dict[Any, ModelConfig]:
    """Hope, and the Transformer by its context."""
    twin = sizes.get("transformer_tiny")
    peers = {context: with_context(twin, context) for context in sizes.contexts}
    return {"hope": sizes.get("hope_tiny"), **peers}


def sessions(
    sizes: Sizes, memory: float, report: Callable[[str], Any] = print
) -> list[dict[str, Any]]:
    """Bytes of sessions, decode and read, as the workloads of a benchmark file."""
    per_gb = {name: 1e9 / bytes_of(config) for name, config in models(sizes).items()}
    found = [
        timing.workload(
            f"sessions, against a context of {name}",
            "sessions per GB",
            [per_gb["hope"]],
            [peer],
        )
        for name, peer in per_gb.items()
        if name != "hope"
    ]
    for count in sizes.slots:
        for together in (False, True) if count > 1 else (False,):
            how = "together" if together else "apart"
            programs = {}
            for name, config in models(sizes).items():
                if 3 * count * bytes_of(config) > memory * 1e9:
                    report(f"{count} slots, context {name}: left out, over --memory.")
                    continue
                made = served(config, count, sizes.tokens, together)
                programs |= {(name, task): program for task, program in made.items()}
            work = f"{count} slots, {how}", count * sizes.tokens
            found += _timed(programs, *work, sizes.rounds)
            jax.clear_caches()
    return found


def prefill(
    sizes: Sizes, memory: float, report: Callable[[str], Any] = print
) -> list[dict[str, Any]]:
    """The workloads of new texts that are read in parallel."""
    found = []
    for count in sizes.slots:
        programs = {}
        for name, config in models(sizes).items():
            if 3 * count * bytes_of(config) > memory * 1e9:
                report(f"{count} rows, context {name}: left out, over --memory.")
                continue
            programs[name, "prefill"] = prefilled(config, count, sizes.prefill)
        work = f"{count} rows", count * sizes.prefill
        found += _timed(programs, *work, sizes.rounds)
        jax.clear_caches()
    return found


PARTS = {"sessions": sessions, "prefill": prefill}


def _timed(programs, where, tokens, rounds):
    times = timing.interleave(programs, rounds)
    found = []
    for (name, task), of in times.items():
        if name == "hope" or ("hope", task) not in times:
            continue
        for clock, metric in _METRICS.items():
            ours, peer = (
                [tokens / seconds for seconds in getattr(each, clock)]
                for each in (times["hope", task], of)
            )
            what = f"{task}, {where}, against a context of {name}"
            found.append(timing.workload(what, metric, ours, peer))
    return found


def _define(define) -> None:
    define.enum("only", "sessions", tuple(PARTS), "what is timed")
    define.bool("quick", False, "small sizes")
    define.list("slots", [], "numbers of slots, instead of all")
    define.list("contexts", [], "contexts of the Transformer, instead of all")
    define.float("memory", 4.0, "GB that the states of one program may take")
    define.string("out", str(lab.RESULTS), "folder of the results")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the ratios and writes the file."""
    flags = command.parse(__doc__, _define, arguments)
    sizes = QUICK if flags.quick else Sizes()
    with command.fail_in_words():
        chosen = {
            name: tuple(int(one) for one in getattr(flags, name))
            for name in ("slots", "contexts")
            if getattr(flags, name)
        }
        if any(one < 1 for some in chosen.values() for one in some):
            raise ValueError(f"slots and contexts must be at least 1, got {chosen}.")
        if not flags.memory > 0:
            raise ValueError(f"memory must be above 0 GB, got {flags.memory}.")
    workloads = PARTS[flags.only](dataclasses.replace(sizes, **chosen), flags.memory)
    print(timing.table(workloads))
    name = f"serving_{flags.only}"
    print(write_benchmark(flags.out, name=name, workloads=workloads))


if __name__ == "__main__":
    command.run(main)
