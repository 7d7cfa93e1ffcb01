"""The language models of the paper's Table 2, at its sizes, on machines that hold them.

Run:     python -m launch.train --experiment=paper --row=hope_760m --scale=v5e-64
             --data=... --workdir=DIR --coordinator=auto
Plan:    python -m launch.plan --experiment=paper --row=hope_760m --scale=v5e-64
Smoke:   --scale=smoke (two steps of the smallest model, on one device)
Expect:  experiments/README.md does not list it: nobody here has run it to its end.
Cost:    what the plan says.

Context 4,096, batches of 0.5M tokens, a vocabulary of 32,000, AdamW with weight decay
0.1 and a cosine: what arXiv:2512.24695 takes over from Titans. Peak rates and tokens of
each size are those of ATLAS (arXiv:2505.23735, Table 6): 1.25e-3 and 30B at 760M, 7e-4
and 100B at 1.3B. Meshes, and in how many parts a batch is read, are ours.
"""

import dataclasses
from typing import Literal, NamedTuple

from hope_jax.models import zoo
from hope_jax.models.config import ModelConfig
from hope_jax.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig

NAME = "paper"
ROWS = 128  # of 4,096 tokens: 524,288 a step
LENGTH = 4096


class Size(NamedTuple):
    """What a size of model is trained with."""

    rate: float
    tokens: float


SIZES = {"760m": Size(1.25e-3, 30e9), "1b3": Size(7e-4, 100e9)}
FAMILIES = ("hope", "hope_attention", "transformer")


class Shared(NamedTuple):
    """How devices share the work.

    Attributes:
      mesh: its axes.
      parts: in which each reads its rows, one row in each.
      gather: when weights are made whole.
    """

    mesh: str
    parts: int
    gather: Literal["layer", "step"] = "layer"


# Of every row a backward pass keeps its memories and fast weights at each base chunk:
# 17 GB at 760M, which a device of 16 GB has to share. Weights without them fit.
MESHES = {
    "v5e-64": Shared("fsdp:8,tensor:8", 16, "step"),
    "v5p-128": Shared("data:8,fsdp:8", 2, "step"),
    "8xH100": Shared("fsdp:8", 16),
}
STILL = {"v5e-64": Shared("data:8,fsdp:8", 2)}  # of models without them


def rows(scale: str) -> dict[str, RunConfig]:
    """One config a model.

    Raises:
      ValueError: a scale that is no machine, "full" (v5p-128) or "smoke".
    """
    if scale == "smoke":
        return {"hope_tiny": _smoke()}
    machine = "v5p-128" if scale == "full" else scale
    if machine not in MESHES:
        raise ValueError(
            f"scale must be smoke, full, {', '.join(MESHES)}; got {scale!r}."
        )
    made = {}
    for size, trained in SIZES.items():
        for family in FAMILIES:
            # Of the layers of a self-modifying model too, for want of memory.
            model = dataclasses.replace(zoo.get(f"{family}_{size}"), remat=True)
            steps = round(trained.tokens / (ROWS * LENGTH))
            shared = MESHES[machine]
            if not model.fast:
                shared = STILL.get(machine, shared)
            made[model.name] = _run(model, scale, trained.rate, steps, shared)
    return made


def _run(
    model: ModelConfig, scale: str, rate: float, steps: int, shared: Shared
) -> RunConfig:
    return RunConfig(
        experiment=NAME,
        row=model.name,
        scale=scale,
        model=model,
        data=DataConfig(tokenizer="bpe", vocab=32_000),
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=1000),
        train=TrainConfig(
            steps=steps,
            batch=ROWS,
            seq_len=LENGTH,
            mesh=shared.mesh,
            accumulate=shared.parts,
            gather=shared.gather,
            checkpoint_every=500,
        ),
    )


def _smoke() -> RunConfig:
    return RunConfig(
        experiment=NAME,
        row="hope_tiny",
        scale="smoke",
        model=zoo.get("hope_tiny"),
        data=DataConfig(max_train_bytes=20_000, max_validation_bytes=4_000),
        train=TrainConfig(steps=2, batch=4, seq_len=256, log_every=1),
        optimizer=OptimizerConfig(warmup_steps=1),
    )
