"""What do sums of gradients lose in bfloat16?

Run:     python -m experiments.accumulators --checkpoint=DIR  (a run of the quickstart)
Smoke:   add --chunks=4 --out=DIR.
Expect:  sums that are 2^-9 apart after one chunk, and more with every one: 4 % after
         1,024 (experiments/results/accumulators/).
Cost:    two minutes on one CPU core.

One row reads the training text, its slowest level so slow that it gathers and never
moves, once with `cms.accumulator` float32 and once with bfloat16; the faster levels
move, and keep their sums in the same type. After 1, 4, 16, ... base chunks: how far the
slowest level's sums are apart, as a share of their norm, and the mean loss of both.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from hope_jax.data.tokenizer import encode_documents
from hope_jax.models import lm
from hope_jax.models.config import ModelConfig
from hope_jax.stream.reader import Opened, open_checkpoint, reader_of
from hope_jax.train import metrics
from launch import command

NAME = "accumulators"


def slowest_gathers(model: ModelConfig, accumulator: str) -> ModelConfig:
    *faster, slowest = model.cms.levels
    levels = (*faster, dataclasses.replace(slowest, period=2**30))
    cms = dataclasses.replace(model.cms, levels=levels, accumulator=accumulator)
    return dataclasses.replace(model, cms=cms)


def sums(
    opened: Opened, accumulator: str, text: np.ndarray
) -> Iterator[tuple[int, np.ndarray, float]]:
    """Base chunks read, the slowest level's sums then, and the mean loss so far."""
    model = slowest_gathers(opened.config.model, accumulator)
    reader, chunk = reader_of(model), reader_of(model).span

    @functools.partial(jax.jit, donate_argnums=1)
    def read(params, state, tokens):
        said, state = reader.apply(params, tokens[:, :-1], state, True, True)
        return state, jnp.mean(lm.next_token_loss(said, tokens[:, 1:]))

    state, losses = reader.start(opened.params, 1), []
    for i in range(len(text) // chunk):
        part = text[i * chunk : (i + 1) * chunk + 1]
        state, loss = read(opened.params, state, jnp.asarray(part[None], jnp.int32))
        losses.append(float(loss))
        # A chunk is gathered when the token after it has come: with the next one.
        if i and np.log2(i) % 2 == 0:
            leaves = jax.tree.leaves(state.levels[-1].learned)
            flat = [np.asarray(a, np.float32).ravel() for a in leaves]
            yield i, np.concatenate(flat), float(np.mean(losses))


def measure(opened: Opened, chunks: int) -> dict[str, float]:
    span = opened.reader.span
    documents, size = [], 0
    for document in opened.config.data.load().train:
        (ids,) = encode_documents(opened.tokenizer, [document])
        documents.append(ids)
        size += len(ids)
        if size > (chunks + 2) * span:
            break
    text = np.concatenate(documents)[: (chunks + 2) * span + 1]
    both = (sums(opened, kind, text) for kind in ("float32", "bfloat16"))
    made = {}
    for (i, whole, loss), (_, narrow, narrow_loss) in zip(*both, strict=True):
        apart = np.linalg.norm(narrow - whole) / np.linalg.norm(whole)
        at = f"after {i} chunks"
        made[f"{at}/apart"] = float(apart)
        made |= {f"{at}/nats": loss, f"{at}/nats in bfloat16": narrow_loss}
        print(f"{at}: apart {apart:.4f}, {loss:.4f} and {narrow_loss:.4f} nats")
    return made


def _define(define) -> None:
    define.string("checkpoint", None, "the workdir of a run", required=True)
    define.integer("chunks", 1024, "base chunks to read", lower_bound=1)
    define.string("out", None, "folder of the result; a file there is replaced")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Reads and writes the result, whatever there was, for runs share their names."""
    given = command.parse(__doc__, _define, arguments)
    command.quiet_libraries()
    with command.fail_in_words():
        opened = open_checkpoint(given.checkpoint)
        made = measure(opened, given.chunks)
    metrics.write_result(
        given.out or lab.RESULTS,
        experiment=NAME,
        row=opened.config.row,
        scale=opened.config.scale,
        seed=opened.config.seed,
        config=opened.config,
        metrics=made | {"chunks": given.chunks},
    )
    return made


if __name__ == "__main__":
    command.run(main)
