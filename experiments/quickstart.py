"""Quickstart: a small Hope and its Transformer++ twin on the Python standard library.

Run:     bash launch/quickstart.sh (environment, data, both rows, numbers, pictures)
         python -m launch.train --experiment=quickstart --row=hope --workdir=DIR
Smoke:   add --scale=smoke (two steps on bytes, CPU, a minute); a test runs it so.
Expect:  Hope below `gzip -9` in bits per byte on the validation files, with its memory
         reset before each file; see experiments/README.md for the last measured number.
Cost:    at most 10 minutes on 2 CPU cores, after the installation.

Both rows read as many tokens of the same text in one order; only the model differs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import lab
from hope_jax.models import zoo
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.train.config import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

MODELS = {"hope": "hope_tiny", "transformer": "transformer_tiny"}

# What to tune: the length of a run, the size of a step and model, the learning rate.
DATA = {
    "full": DataConfig(tokenizer="bpe", vocab=4096, max_validation_bytes=150_000),
    "smoke": DataConfig(
        tokenizer="bytes", max_train_bytes=60_000, max_validation_bytes=4_000
    ),
}
TRAIN = {
    "full": TrainConfig(
        steps=450, batch=4, seq_len=256, log_every=5, checkpoint_every=150
    ),
    "smoke": TrainConfig(
        steps=2, batch=4, seq_len=160, checkpoint_every=1, log_every=1
    ),  # rows in which the fastest level, of period 128, moves
}
SIZE = {"full": {}, "smoke": {"d_model": 32, "heads": 2, "layers": 1}}
OPTIMIZER = {
    "full": OptimizerConfig(learning_rate=4e-3, warmup_steps=40),
    "smoke": OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
}


def model(name: str, vocab: int, scale: str) -> ModelConfig:
    """The model that the zoo calls so, in the size and for the rows of a scale."""
    sized = dataclasses.replace(zoo.get(name), vocab=vocab, **SIZE[scale])
    return with_context(sized, TRAIN[scale].seq_len)


def rows(scale: str) -> dict[str, RunConfig]:
    """One config a row; rows differ in the model alone.

    Raises:
      ValueError: a scale that is not "full" or "smoke".
    """
    if scale not in TRAIN:
        raise ValueError(f"scale must be one of {', '.join(TRAIN)}, got {scale!r}.")
    vocab = DATA[scale].vocab if DATA[scale].tokenizer == "bpe" else 257
    return {
        row: RunConfig(
            experiment="quickstart",
            row=row,
            scale=scale,
            model=model(name, vocab, scale),
            data=DATA[scale],
            optimizer=OPTIMIZER[scale],
            train=TRAIN[scale],
        )
        for row, name in MODELS.items()
    }


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """Perplexity of Hope over its twin's, on files longer than what it was trained on;
    on rows as in training the two are level."""
    hope, twin = (lab.values(found, row, "nats_per_token_reset") for row in MODELS)
    return lab.compared(
        "Table 2, perplexity of Hope over Transformer++'s: here 1M parameters, 0.5M "
        "tokens of code, on files longer than its rows (on rows the two are level)",
        {seed: math.exp(hope[seed] - twin[seed]) for seed in hope if seed in twin},
        18.68 / 24.18,
        "{:.2f}",
        where="760M, 30B",
        command="bash launch/quickstart.sh",
    )
