"""A run small enough for tests: a byte-level model of one layer on a little text."""

from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig

# The MLP is a slow level: it moves every three steps of 16 tokens, so a run is mostly
# stopped in the middle of its period. It learns between rows alone.
MODEL = ModelConfig(
    d_model=16,
    layers=1,
    heads=2,
    mixer=AttentionConfig(context=16),
    cms=CMSConfig(levels=(CMSLevel(period=48, rate=0.0),), hidden=16),
)


def rows(scale: str) -> dict[str, RunConfig]:
    steps = {"smoke": 12, "full": 90}[scale]
    return {
        "tiny": RunConfig(
            experiment="tiny",
            row="tiny",
            scale=scale,
            model=MODEL,
            data=DataConfig(max_train_bytes=20_000, max_validation_bytes=4_000),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
            train=TrainConfig(
                steps=steps, batch=4, seq_len=16, log_every=1, checkpoint_every=9
            ),
        )
    }
