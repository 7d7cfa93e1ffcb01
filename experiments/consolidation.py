"""How long does a memory keep a fact, with and without slower starts?

Run:     python -m experiments.consolidation
Smoke:   add --scale=smoke --out=DIR.
Expect:  experiments/README.md has the table.
Cost:    two minutes a seed on one CPU core.

No model and no training: the main memory of Hope's layer, as an MLP and as a matrix,
reads a stream of random pairs of unit vectors at a low inner rate and forgets by a half
in 256 tokens. Into it one pair, the fact, is written at an open gate. After 1, 4 and 16
half-lives it is asked for, as is a pair that was written 64 tokens before:

  fact/n     share of the fact's value that a memory that was told it recalls beyond one
             that was not
  fresh      the same of the new pair, at the end: what slower starts cost
  distance   norm of the memory minus where it began, at the end

A setting is the period in tokens, rate and half-life of a `Consolidation`; `off` is
none.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from hope_jax.kernels.select import memory_scan
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_architecture,
    half_life_to_retention,
)
from hope_jax.memory.consolidation import Consolidation, consolidate, with_starts
from hope_jax.memory.state import begin_memory
from hope_jax.models.mixers.self_modifying import MATRIX, MLP
from launch import command

HALF_LIFE, LIVES = 256, (1, 4, 16)
SETTINGS = {
    f"{period}/{rate:g}/{half_life:g}": Consolidation(
        period=period, rate=rate, half_life=half_life
    )
    for period, rate, half_life in (
        *((p, r, math.inf) for p in (64, 256, 1024) for r in (0.1, 0.5, 1.0)),
        *((p, 0.5, h) for p in (64, 256) for h in (4096.0, 16384.0)),
        (64, 0.1, 16384.0),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """One row of the table.

    Attributes:
      memory: which one.
      width: of keys and values.
      facts: streams with a fact each.
      before: tokens before the fact.
      lives: half-lives after which it is asked.
      rate: inner rate of the pairs that are no fact, of 1.
      settings: of `SETTINGS`; all beside `off`.
    """

    memory: MemoryConfig
    width: int = 32
    facts: int = 16
    before: int = 1024
    lives: tuple[int, ...] = LIVES
    rate: float = 0.02
    settings: tuple[str, ...] = tuple(SETTINGS)


def rows(scale: str) -> dict[str, Stream]:
    small = {}
    if scale == "smoke":
        small = dict(width=4, facts=2, before=64, lives=(1,), settings=("64/0.5/inf",))
    memories = {"mlp": MLP, "matrix": MATRIX}
    return {
        name: Stream(memory=dataclasses.replace(memory, chunk=64), **small)
        for name, memory in memories.items()
    }


def streams(config: Stream, seed: int) -> tuple[Tokens, int, int]:
    """Tokens `[S, T, ...]`, and the places of the fact and of the fresh pair."""
    chunk = config.memory.chunk
    place = config.before, config.before + max(config.lives) * HALF_LIFE - chunk
    length = place[1] + chunk
    rng = np.random.default_rng(seed)

    def unit(*shape):
        drawn = rng.normal(size=shape)
        return np.float32(drawn / np.linalg.norm(drawn, axis=-1, keepdims=True))

    k, v = (unit(config.facts, length, config.width) for _ in "kv")
    eta = np.full((config.facts, length), config.rate, np.float32)
    alpha = float(half_life_to_retention(jnp.float32(HALF_LIFE)))
    return Tokens(k, v, k, eta, np.full_like(eta, alpha), 0 * eta), *map(int, place)


def life(config: Stream, levels: tuple[Consolidation, ...], seed: int):
    """`tokens -> memories`, weights after every chunk `[S, N, ...]`, and the start."""
    memory, chunk = config.memory, config.memory.chunk
    start = build_architecture(memory, config.width).init(jax.random.key(seed))
    if "w1" in start:  # as of Hope's layer, whose first write is like any other
        start = start | {"w1": jnp.zeros_like(start["w1"])}
    live = jax.vmap(lambda s, t: memory_scan(memory, s, t, start=start)[0])

    def whole(carry, tokens):
        state, position = carry
        tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), tokens)
        position = position + chunk
        state = consolidate(levels, live(state, tokens), start, position)
        return (state, position), state.weights

    @jax.jit
    def run(tokens):
        spread = {
            n: jnp.broadcast_to(w[None], (config.facts, *w.shape))
            for n, w in start.items()
        }
        state = with_starts(
            levels, jax.vmap(functools.partial(begin_memory, memory))(spread)
        )
        carry = state, jnp.zeros((config.facts,), jnp.int32)
        by_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens)
        count = by_time.k.shape[0] // chunk
        cut = jax.tree.map(lambda a: a.reshape(count, chunk, *a.shape[1:]), by_time)
        return jax.lax.scan(whole, carry, cut)[1]

    return run, start


def measure(task: lab.Task) -> dict[str, float]:
    config: Stream = task.config
    tokens, told, new = streams(config, task.seed)
    chunk, apply = (
        config.memory.chunk,
        build_architecture(config.memory, config.width).apply,
    )
    made = {}

    def written(at):
        """The stream with an open gate there."""
        eta = tokens.eta.copy()
        eta[:, at] = 1.0
        return jax.tree.map(jnp.asarray, tokens._replace(eta=eta))

    ask = jax.jit(jax.vmap(lambda w, k: apply(w, k[None])[0]))
    for name in ("off", *config.settings):
        levels = () if name == "off" else (SETTINGS[name],)
        run, start = life(config, levels, task.seed)
        without = run(jax.tree.map(jnp.asarray, tokens))

        def recalled(memories, at, after, without=without):
            """Of the pair at a place, at the end of a chunk."""
            end = (at + after) // chunk - 1
            k, v = tokens.k[:, at], tokens.v[:, at]
            here = lambda tree: jax.tree.map(lambda w: w[end], tree)  # noqa: E731
            more = ask(here(memories), k) - ask(here(without), k)
            return float(np.mean(np.sum(more * v, axis=-1)))

        fact = run(written(told))
        for lives in config.lives:
            made[f"{name}/fact/{lives}"] = recalled(fact, told, lives * HALF_LIFE)
        made[f"{name}/fresh"] = recalled(run(written(new)), new, chunk)
        away = jax.tree.map(lambda w, s: w[-1] - s[None], fact, start)
        squares = [np.sum(np.square(a)) for a in jax.tree.leaves(jax.device_get(away))]
        made[f"{name}/distance"] = float(np.sqrt(sum(squares) / config.facts))
    return made


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds."""
    lines, lives = [], ()
    for row in dict.fromkeys(result["row"] for result in found):
        of = [r["metrics"] for r in found if r["row"] == row]
        mean = {k: float(np.mean([m[k] for m in of])) for k in of[0]}
        lives = [k.split("/")[-1] for k in mean if k.startswith("off/fact/")]
        for name in dict.fromkeys(
            k.rpartition("/fact/")[0] for k in mean if "/fact/" in k
        ):
            numbers = [mean[f"{name}/fact/{n}"] for n in lives]
            numbers += [mean[f"{name}/fresh"], mean[f"{name}/distance"]]
            lines.append([row, name, *(f"{x:.3f}" for x in numbers)])
    head = ["memory", "period/rate/half-life", *(f"{n} half-lives" for n in lives)]
    return lab.table([*head, "fresh pair", "distance"], lines, words=2)


main = lab.Experiment(
    name="consolidation",
    doc=__doc__,
    rows=lambda flags: rows(flags.scale),
    measure=measure,
    table=table,
    seeds=(0, 1, 2),
)

if __name__ == "__main__":
    command.run(main)
