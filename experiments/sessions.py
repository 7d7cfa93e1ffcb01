"""Does anything of one session reach another? Ten thousand requests, interleaved.

Run:     python -m experiments.sessions  (some rows: --rows=hope)
Smoke:   add --scale=smoke --out=DIR (seconds, most of them to compile).
Expect:  0 of 64 sessions differ, by any bit, from what each was alone.
Cost:    six minutes a row on one CPU core.

Sessions ask, in an order of no meaning, to read random bytes and to go on from them,
each with its own settings; they are more than the slots, so they are parked and come
back elsewhere. Then each asks the same of a server of as many slots on which it is
alone. Compared are all replies, what it says next and its whole memory, as hashes.
"""

import dataclasses
import hashlib
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import lab
from hope_jax.data.tokenizer import ByteTokenizer
from hope_jax.models import lm, zoo
from hope_jax.models.config import ModelConfig
from hope_jax.stream import session, slots
from hope_jax.stream.generate import Sampling
from launch import command

NAME = "sessions"
COLUMNS = ("requests", "tokens", "sessions that differ", "programs", "growth MB")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, and what is asked of it."""

    model: ModelConfig
    sessions: int = 64
    slots: int = 8
    block: int = 16
    requests: int = 10_000


def rows(scale: str) -> dict[str, Setting]:
    """Hope with memories of either kind, and a mixer of another kind."""
    how: dict[str, int] = {}
    width, heads = 64, 2
    if scale == "smoke":
        how, width, heads = {"sessions": 5, "slots": 2, "requests": 30}, 16, 1
    return {
        row: Setting(
            model=dataclasses.replace(
                zoo.get(f"{row}_tiny"), vocab=257, d_model=width, heads=heads
            ),
            **how,
        )
        for row in ("hope", "hope_matrix", "gated_delta_net")
    }


def wish(seed: int, number: int, of: int) -> dict[str, Any]:
    """Request `of` of a session."""
    rng = np.random.default_rng([seed, number, of])
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_k=rng.choice([None, 4, 100]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.02]),
        stop=("e",) if rng.random() < 0.3 else (),
    )
    return {
        "text": rng.integers(0, 256, rng.integers(1, 24)),
        "tokens": int(rng.integers(0, 12)),
        "key": jax.random.key(int(rng.integers(2**31))),
        "sampling": sampling,
    }


def measure(task: lab.Task) -> dict[str, float]:
    """Serves all together, then each alone."""
    config, rng = task.config, np.random.default_rng(task.seed)
    params = lm.build(config.model, jax.random.key(task.seed))[1]
    before = session.weights_hash(config.model, params)
    order = rng.integers(0, config.sessions, config.requests).tolist()
    programs = slots.step._cache_size()

    def server(*numbers):
        limits = session.Limits(slots=config.slots)
        more = {"limits": limits, "block": config.block}
        made = session.Sessions(config.model, params, ByteTokenizer(), **more)
        for number in numbers:
            made.open(f"s{number}")
        return made

    def digest(made, number, replies):
        arrays = jax.tree.leaves(made.row(f"s{number}"))
        said = hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays))
        said.update(repr(replies[number]).encode())
        return said.hexdigest()

    everyone = range(config.sessions)
    together, asked = server(*everyone), [0] * config.sessions
    replies = {number: [] for number in everyone}
    resident = 0
    for place, number in enumerate(order):
        while together.info(f"s{number}").busy:
            for name, reply in together.tick().items():
                replies[int(name[1:])].append(reply)
        together.ask(f"s{number}", **wish(task.seed, number, asked[number]))
        asked[number] += 1
        if place == config.requests // 10:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, reply in together.run().items():
        replies[int(name[1:])].append(reply)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident

    differ, alone = 0, {}
    for number in everyone:
        one, alone[number] = server(number), []
        for of in range(asked[number]):
            one.ask(f"s{number}", **wish(task.seed, number, of))
            alone[number].append(one.run()[f"s{number}"])
        differ += digest(one, number, alone) != digest(together, number, replies)
    after = session.weights_hash(config.model, params)
    return {
        "requests": float(sum(map(len, replies.values()))),
        "tokens": float(sum(together.info(name).tokens for name in together)),
        "sessions that differ": float(differ),
        "weights that changed": float(before != after),
        "programs": float(slots.step._cache_size() - programs),
        "growth MB": grown / 1024,
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """What there is, as Markdown."""
    made = [[r["row"], *(f"{r['metrics'][c]:,.0f}" for c in COLUMNS)] for r in found]
    return lab.table(["model", *COLUMNS], made)


main = lab.Experiment(
    name=NAME,
    doc=__doc__ or "",
    rows=lambda flags: rows(flags.scale),
    measure=measure,
    table=table,
    seeds=(0,),
)

if __name__ == "__main__":
    command.run(main)
