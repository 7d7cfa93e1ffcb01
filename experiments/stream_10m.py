"""Does a memory live through ten million tokens?

Run:     python -m experiments.stream_10m --workdir=DIR  (one row: --rows=titans)
Smoke:   add --scale=smoke --out=DIR (two training steps and 5,120 bytes, a minute).
Expect:  experiments/README.md has the numbers.
Cost:    under an hour for both rows on one CPU core. A run that was stopped goes on
         from the last tenth of the way.

A small Hope and a twin whose only memory is Titans', with as many parameters, are
trained alike for a few hundred steps. Then one row each reads the training text, whose
files come in another order at every pass, and nothing is ever reset. Of each tenth of
the way: the loss in nats a byte and the norms of all that moves. Of the whole: how
often each CMS level really moved (its weights after a base chunk are not those before
it), how often it had to, and the bytes of the state and of the process.
"""

import dataclasses
import functools
import json
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from hope_jax.data.tokenizer import ByteTokenizer, encode_documents
from hope_jax.models import lm, zoo
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.mixers.memory import NamedConfig
from hope_jax.models.mixers.self_modifying import MATRIX, MLP, SelfModifyingConfig
from hope_jax.stream.reader import open_checkpoint
from hope_jax.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from launch import command

NAME = "stream_10m"
PARTS, CHUNK, AT_ONCE = 10, 128, 640  # AT_ONCE: most chunks of a call
TOKENS = {"full": 10_000_000, "smoke": 5_120}
PERIODS = {"full": (CHUNK, 2048, 32_768), "smoke": (CHUNK, 256, 1024)}
DATA = {"full": DataConfig(), "smoke": DataConfig(max_train_bytes=40_000)}
STEPS = {"full": 400, "smoke": 2}


def rows(scale: str) -> dict[str, RunConfig]:
    """Hope and its twin; they differ in the model alone."""
    memory = dataclasses.replace(MLP if scale == "full" else MATRIX, chunk=64)
    if scale == "full":
        memory = dataclasses.replace(memory, expansion=2)
    hope = lm.ModelConfig(
        d_model=32,
        layers=1,
        heads=2,
        mixer=SelfModifyingConfig(memory=memory, projection_chunk=64),
        cms=CMSConfig(
            levels=tuple(CMSLevel(period=p) for p in PERIODS[scale]),
            hidden=32,
            rates="generated",
        ),
    )
    titans = dataclasses.replace(hope, mixer=NamedConfig(kind="titans"))
    titans = dataclasses.replace(titans, cms=CMSConfig(hidden=96))
    titans, _ = zoo.matched(titans, lm.count_parameters(hope))
    steps = STEPS[scale]
    return {
        row: RunConfig(
            experiment=NAME,
            row=row,
            scale=scale,
            model=model,
            data=DATA[scale],
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=steps // 10),
            train=TrainConfig(steps=steps, batch=4, seq_len=256, checkpoint_every=200),
        )
        for row, model in {"hope": hope, "titans": titans}.items()
    }


def text(config: RunConfig, tokens: int) -> np.ndarray:
    """`tokens` + 1 ids: the training files, shuffled anew at every pass."""
    documents = encode_documents(ByteTokenizer(), config.data.load().train)
    rng, size, parts = np.random.default_rng(config.seed), 0, []
    while size <= tokens:
        parts += [documents[i] for i in rng.permutation(len(documents))]
        size += sum(map(len, documents))
    return np.concatenate(parts)[: tokens + 1]


def moving(state: lm.LMState) -> dict[str, Any]:
    """The weights that move while a row is read."""
    mixer = state.blocks.mixer
    names = [n for n in ("main", "projection", "memory") if hasattr(mixer, n)]
    made = {name: getattr(mixer, name).weights for name in names}
    return made | {f"CMS {i + 1}": w for i, w in enumerate(state.blocks.fast)}


def norms(state: lm.LMState) -> dict[str, float]:
    def norm(tree):
        return sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree)) ** 0.5

    return {name: norm(weights) for name, weights in moving(state).items()}


@functools.cache
def reads(config: lm.ModelConfig):
    """`(params, state, tokens[N, C + 1]) -> state, loss, moves`: N base chunks, and in
    how many of them each of `moving` changed."""
    graphdef, _ = lm.abstract_model(config)

    def chunk(params, state, tokens):
        tokens, labels = tokens[None, :-1], tokens[None, 1:]
        said, after = lm.apply(
            graphdef, params, tokens, state, labels=labels, aligned=True
        )
        pairs = zip(moving(state).values(), moving(after).values(), strict=True)
        moved = jnp.stack([differs(*pair) for pair in pairs])
        return after, (jnp.mean(lm.next_token_loss(said, labels)), moved)

    def differs(a, b):
        leaves = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.any(a != b), a, b))
        return jnp.any(jnp.stack(leaves))

    @jax.jit
    def read(params, state, tokens):
        state, (losses, changed) = jax.lax.scan(
            lambda state, tokens: chunk(params, state, tokens), state, tokens
        )
        return state, jnp.mean(losses), jnp.sum(changed, axis=0, dtype=jnp.int32)

    return read


def measure(task: lab.Task) -> dict[str, float]:
    """Trains what is not trained yet, and reads on from where it was stopped."""
    config, folder = task.config, Path(task.flags.workdir) / task.row
    log = lab.trained(config, folder)
    opened = open_checkpoint(folder)
    part = -(-TOKENS[config.scale] // (PARTS * CHUNK))  # chunks of a tenth
    size = max(n for n in range(1, AT_ONCE + 1) if part % n == 0)
    stream = text(config, PARTS * part * CHUNK)
    read = reads(config.model)
    state = opened.reader.start(opened.params, 1)
    made: dict[str, Any] = {f"norm at 0/{k}": v for k, v in norms(state).items()}
    names, moves, done = tuple(moving(state)), np.zeros(len(moving(state)), int), 0
    kept = folder / "read.npz"
    if kept.exists():
        with np.load(kept) as saved:
            leaves = [jnp.asarray(saved[f"{i}"]) for i in range(len(saved.files) - 2)]
            state = jax.tree.unflatten(jax.tree.structure(state), leaves)
            made, moves = json.loads(str(saved["made"])), saved["moves"]
        done = int(made["tokens"]) // (part * CHUNK)
    for index in range(done, PARTS):
        losses = []
        for start in range(index * part, (index + 1) * part, size):
            at = CHUNK * np.arange(start, start + size)[:, None]
            tokens = stream[at + np.arange(CHUNK + 1)[None]]
            state, loss, changed = read(opened.params, state, jnp.asarray(tokens))
            losses.append(float(loss))
            moves = moves + np.asarray(changed)
        tokens = (index + 1) * part * CHUNK
        if not np.isfinite(losses).all():
            return _summary(config, log, made | {"not finite after": tokens})
        made[f"loss at {tokens}"] = float(np.mean(losses))
        made |= {f"norm at {tokens}/{k}": v for k, v in norms(state).items()}
        made |= {f"moves/{k}": int(n) for k, n in zip(names, moves, strict=True)}
        made |= {"tokens": tokens, f"resident at {tokens}": _resident()}
        made["state_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        leaves = {str(i): np.asarray(a) for i, a in enumerate(jax.tree.leaves(state))}
        beside = kept.with_name("reading.npz")
        np.savez(beside, made=json.dumps(made), moves=moves, **leaves)
        beside.replace(kept)
        print({k: v for k, v in made.items() if f" at {tokens}" in k}, flush=True)
    return _summary(config, log, made)


def _summary(config, log, made) -> dict[str, float]:
    made = dict(made)
    losses = [v for k, v in made.items() if k.startswith("loss at ")]
    if losses:
        first = min(int(k.split(" at ")[1]) for k in made if k.startswith("loss at "))
        ends = {k.split("/")[1]: v for k, v in made.items() if "norm at 0/" in k}
        made["loss_first"], made["loss_last"] = losses[0], losses[-1]
        # Of what has moved farthest, after all against after a tenth and the start.
        for name, at in (("norm_ratio", first), ("norm_ratio_start", 0)):
            made[name] = max(
                made[f"norm at {made['tokens']}/{part}"] / made[f"norm at {at}/{part}"]
                for part in ends
            )
    for i, level in zip(config.model.fast, config.model.cms.levels, strict=False):
        made[f"due/CMS {i + 1}"] = made.get("tokens", 0) // int(level.period)
    made["parameters"] = lm.count_parameters(config.model)
    made["training bits per byte"] = lab.training_bits(log, config.train.steps)
    return made


def _resident() -> int:
    """Most memory that the process has had, in kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(found: Sequence[Mapping[str, Any]]) -> str:
    columns = ["row", "tokens", "first tenth, nats", "last tenth", "norms, last over"]
    columns += ["moves of CMS levels", "due", "state, bytes"]
    lines = []
    for row, m in ((result["row"], result["metrics"]) for result in found):
        moves, due = (
            " / ".join(f"{v:,}" for k, v in m.items() if k.startswith(f"{what}/CMS"))
            for what in ("moves", "due")
        )
        line = [row, f"{m['tokens']:,}"]
        line += [f"{m[k]:.3f}" for k in ("loss_first", "loss_last", "norm_ratio")]
        lines.append([*line, moves, due, f"{m['state_bytes']:,}"])
    return lab.table(columns, lines, words=1)


def _define(define) -> None:
    define.string("workdir", None, "folder of the trainings", required=True)


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """The last of ten parts over the first."""
    whole = [r for r in found if r["metrics"].get("tokens", 0) >= TOKENS["full"]]
    last, first = (lab.values(whole, "hope", f"loss_{at}") for at in ("last", "first"))
    lines = lab.compared(
        "Figure 9, loss in the tenth million tokens over the first's, Hope",
        lab.quotient(last, first),
        command=f"{NAME} --workdir=DIR",
    )
    said = {"paper": "answers at 10M (curves)", "distance": "another task"}
    return [line._replace(**said) for line in lines]


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=lambda flags: rows(flags.scale),
    measure=measure,
    table=table,
    define=_define,
)

if __name__ == "__main__":
    command.run(main)
