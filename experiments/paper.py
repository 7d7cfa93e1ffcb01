"""The language models of the paper, at its sizes, on machines that hold them.

Run:     python -m launch.train --experiment=paper --row=hope_760m --scale=v5e-64
             --data=... --workdir=DIR --coordinator=auto
Plan:    python -m launch.plan --experiment=paper --row=hope_760m --scale=v5e-64
Smoke:   --scale=smoke (two steps of the smallest model, on one device)
Expect:  experiments/README.md does not list it: nobody here has run it to its end.
Cost:    what the plan says.

Table 2: context 4,096, batches of 0.5M tokens, a vocabulary of 32,000, AdamW with
weight decay 0.1 and a cosine: what arXiv:2512.24695 takes over from Titans. Peak rates
and tokens of each size are those of ATLAS (arXiv:2505.23735, Table 6): 1.25e-3 and 30B
at 760M, 7e-4 and 100B at 1.3B. Meshes, and in how many parts a batch is read, are ours:
`experiments.fits` asks the compiler whether a row fits.

Section 9.1: Llama-3 8B with levels on its MLPs (section 7.3), trained on 15B tokens
more. Both readings of where levels begin are rows: `stacked`, each layer's MLP is one
level of a chain, and `copied`, all levels of a layer begin at it. Periods are the
lowest frequencies of Figure 7; the rate is ours. Weights and tokenizer of the FOLDER of
a checkpoint are given in Python:

    config = paper.rows("v5p-128")["llama3_8b_stacked"]
    config = override(config, [f"data.tokenizer={FOLDER}/tokenizer.json"])
    llama, params = pretrained.read_pretrained(FOLDER, context=paper.LENGTH)
    _, params = convert.stack_levels(llama, params, paper.LEVELS)
    loop.train(config, DIR, params=params)
"""

import dataclasses
from typing import Literal, NamedTuple

from hope_jax.models import zoo
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.models.rotary import Plain
from hope_jax.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig

NAME = "paper"
ROWS = 128  # of 4,096 tokens: 524,288 a step
LENGTH = 4096


class Size(NamedTuple):
    """What a size of model is trained with: the highest rate, and so many tokens."""

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


# Llama-3 8B as `pretrained.read_pretrained` has it.
LLAMA = ModelConfig(
    name="llama3_8b",
    vocab=128_256,
    d_model=4096,
    layers=32,
    heads=32,
    mixer=AttentionConfig(context=LENGTH, kv_heads=8, rotary=Plain(base=500_000.0)),
    cms=CMSConfig(hidden=14_336),
    scaled_embedding=False,
    tied_embedding=False,
    norm_epsilon=1e-5,
    dtype="bfloat16",
    remat=True,
)
LEVELS = tuple(CMSLevel(period=period) for period in (512, 2048, 8192))
READINGS: dict[str, Literal["fast_to_slow", "independent"]] = {
    "stacked": "fast_to_slow",
    "copied": "independent",
}
CONTINUED = Size(1e-4, 15e9)

# Of every row a backward pass keeps its memories and fast weights at each base chunk: a
# device without a tensor axis needs 59 GiB at 760M and 114 at 1.3B.
MESHES = {
    "v5e-64": Shared("fsdp:8,tensor:8", 16, "step"),
    "v5p-128": Shared("data:8,fsdp:8", 2, "step"),
    "8xH100": Shared("fsdp:8", 16),
}
LARGE = {  # at 1.3B it is twice as much
    "v5e-64": Shared("fsdp:8,tensor:8", 16, "step"),
    "v5p-128": Shared("data:4,fsdp:8,tensor:2", 4, "step"),
    "8xH100": Shared("fsdp:4,tensor:2", 32),
}
STILL = {  # of models without them
    "v5e-64": Shared("data:8,fsdp:8", 2),
    "v5p-128": Shared("data:8,fsdp:8", 2),
    "8xH100": Shared("fsdp:8", 16),
}
LEVELED = {"v5p-128": Shared("fsdp:4,tensor:16", 32)}  # of Llama


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
            shared = (LARGE if size == "1b3" else MESHES)[machine]
            if not model.fast:
                shared = STILL[machine]
            made[model.name] = _run(model, scale, trained.rate, steps, shared)
    if machine in LEVELED:
        steps = round(CONTINUED.tokens / (ROWS * LENGTH))
        for reading in READINGS:
            model = leveled(reading)
            shared = LEVELED[machine]
            made[model.name] = _run(model, scale, CONTINUED.rate, steps, shared)
    return made


def leveled(reading: str) -> ModelConfig:
    """Llama with levels, as `convert.stack_levels` or `copy_levels` makes it."""
    cms = dataclasses.replace(LLAMA.cms, levels=LEVELS, order=READINGS[reading])
    return dataclasses.replace(LLAMA, name=f"{LLAMA.name}_{reading}", cms=cms)


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
