"""A run small enough for tests: a byte-level Transformer of one layer on some text."""

import dataclasses

from hope_jax.models import zoo
from hope_jax.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig


def rows(scale: str) -> dict[str, RunConfig]:
    steps = {"smoke": 12, "full": 90}[scale]
    model = dataclasses.replace(
        zoo.get("transformer_tiny"), vocab=257, d_model=16, layers=1, heads=2
    )
    return {
        "tiny": RunConfig(
            experiment="tiny",
            row="tiny",
            scale=scale,
            model=model,
            data=DataConfig(max_train_bytes=20_000, max_validation_bytes=4_000),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
            train=TrainConfig(
                steps=steps, batch=4, seq_len=16, log_every=1, checkpoint_every=9
            ),
        )
    }
