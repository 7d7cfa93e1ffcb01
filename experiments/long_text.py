"""Does Hope live through a million tokens of text?

Run:     python -m experiments.long_text --checkpoint=DIR  (a run of the quickstart)
Smoke:   add --tokens=2048 --out=DIR.
Expect:  experiments/README.md has the numbers.
Cost:    ten minutes for MLP memories on one CPU core, a third of that for matrices.

One row reads the training text from its first file on, its memories and CMS levels
never reset. At every tenth of the way: the loss in nats a token, and how far each
layer's weights stand from where they started, as a share of their start's norm.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from hope_jax.data.tokenizer import encode_documents
from hope_jax.models import lm
from hope_jax.stream.reader import open_checkpoint
from hope_jax.train import metrics
from launch import command

NAME = "long_text"
PARTS, WINDOW = 10, 1024


def measure(checkpoint: str, tokens: int) -> tuple[object, dict[str, float]]:
    """The run's config, and what was measured of it."""
    opened = open_checkpoint(checkpoint)
    reader = opened.reader
    documents, size = [], 0
    for document in opened.config.data.load().train:
        (ids,) = encode_documents(opened.tokenizer, [document])
        documents.append(ids)
        size += len(ids)
        if size > tokens:
            break
    window = reader.window(WINDOW)
    steps = tokens // window
    stream = np.concatenate(documents)
    if len(stream) <= steps * window:
        raise ValueError(f"the training text has {size} tokens, fewer than {tokens}.")

    @functools.partial(jax.jit, donate_argnums=1)
    def read(params, state, tokens):
        logits, state = reader.apply(params, tokens[:, :-1], state, True, True)
        return state, jnp.mean(lm.next_token_loss(logits, tokens[:, 1:]))

    start = reader.initial_state(opened.params, 1)
    state = jax.tree.map(jnp.copy, start)
    losses, made = [], {}
    for step in range(steps):
        part = stream[step * window : (step + 1) * window + 1]
        state, loss = read(opened.params, state, jnp.asarray(part[None], jnp.int32))
        losses.append(float(loss))
        if (step + 1) % max(1, steps // PARTS) == 0:
            at = f"after {(step + 1) * window} tokens"
            made[f"{at}/nats"] = float(np.mean(losses[-max(1, steps // PARTS) :]))
            made |= {f"{at}/{k}": v for k, v in moved(state, start).items()}
            print(at, {k: round(v, 3) for k, v in made.items() if k.startswith(at)})
    return opened.config, made


def moved(state: lm.LMState, start: lm.LMState) -> dict[str, float]:
    """Norms of what has moved, over those of the start."""

    def share(now, then):
        norm = lambda tree: np.sqrt(  # noqa: E731
            sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree))
        )
        return float(norm(jax.tree.map(jnp.subtract, now, then)) / norm(then))

    now, then = state.blocks, start.blocks
    pairs = zip(now.fast, then.fast, strict=True)
    made = {f"CMS {i + 1}": share(*pair) for i, pair in enumerate(pairs)}
    for name in ("main", "projection"):
        pair = (getattr(side.mixer, name).weights for side in (now, then))
        made[name] = share(*pair)
    return made


def _define(define) -> None:
    define.string("checkpoint", None, "the workdir of a run", required=True)
    define.integer("tokens", 1_000_000, "to read", lower_bound=WINDOW)
    define.string("out", None, "folder of the result; a file there is replaced")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Reads and writes the result, whatever there was, for runs share their names."""
    given = command.parse(__doc__, _define, arguments)
    command.quiet_libraries()
    with command.fail_in_words():
        config, made = measure(given.checkpoint, given.tokens)
    metrics.write_result(
        given.out or lab.RESULTS,
        experiment=NAME,
        row=config.row,
        scale=config.scale,
        seed=config.seed,
        config=config,
        metrics=made | {"tokens": given.tokens},
    )
    return made


if __name__ == "__main__":
    command.run(main)
