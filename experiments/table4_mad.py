"""Table 4: MAD, six small tasks that tell what an architecture can do.

Run:     python -m experiments.table4_mad  (some rows: --rows=recall_hope,recall_titans)
Smoke:   add --scale=smoke --out=DIR.
Expect:  experiments/README.md has the table.
Cost:    on one CPU core, Hope with MLPs and a seed: copying 21 minutes, recalls 11 to
         13, compression 8, memorisation 2; others a fifth to two thirds of it.

The tasks of Poli et al. (arXiv:2403.17844) at mad-lab's base sizes, a file each in
`data.synthetic`; compression is read by an autoencoder (`models.autoencoder`), the rest
by language models. Four layers in their sense, mixer, SwiGLU, mixer, SwiGLU, all with
as many parameters as Hope with MLP memories to within 2 %, and rates that are the same
for all. A task's number is the accuracy on new rows of the best rate, as there; over
all that is asked, where mad-lab takes the mean over tokens of the accuracy of each.

mad-lab reads 12,800 rows (256 of memorisation) 200 times in steps of 128, at six
settings, and averages over harder variants of each task; the paper does not say which
of that it did. Here as many rows are drawn from again and again, and only the base
sizes are measured: `rows` of a result over 2,560,000 is the share of the budget.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import lab
from experiments.table5_formal_languages import Row
from hope_jax.data.synthetic.compression import CompressionConfig
from hope_jax.data.synthetic.copying import CopyingConfig
from hope_jax.data.synthetic.fuzzy import FuzzyConfig
from hope_jax.data.synthetic.in_context import InContextConfig
from hope_jax.data.synthetic.memorisation import MemorisationConfig
from hope_jax.evaluate import probe
from hope_jax.evaluate.probe import ProbeConfig
from hope_jax.models import lm, zoo
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.self_modifying import MATRIX, MLP, SelfModifyingConfig
from hope_jax.train.config import OptimizerConfig
from launch import command

NAME = "table4_mad"
TASKS: dict[str, Any] = {
    "compression": CompressionConfig(),
    "recall": InContextConfig(),
    "noisy_recall": InContextConfig(vocab=32, noise_vocab=16, noise=0.2),
    "fuzzy_recall": FuzzyConfig(),
    "copying": CopyingConfig(),
    "memorisation": MemorisationConfig(),
}
SMOKE: dict[str, Any] = {
    "compression": CompressionConfig(vocab=4, length=8),
    "recall": InContextConfig(vocab=4, length=8),
    "noisy_recall": InContextConfig(vocab=6, noise_vocab=2, noise=0.2, length=8),
    "fuzzy_recall": FuzzyConfig(vocab=5, motif=1, length=8),
    "copying": CopyingConfig(vocab=4, copied=2, length=8),
    "memorisation": MemorisationConfig(vocab=8, length=8),
}
MODELS: dict[str, Any] = {
    "hope": SelfModifyingConfig(memory=dataclasses.replace(MLP, expansion=2)),
    "attention": MIXERS.get("attention"),
    "gated_delta_net": MIXERS.get("gated_delta_net"),
    "hope_matrix": SelfModifyingConfig(memory=MATRIX),
    "titans": MIXERS.get("titans"),
    "rwkv7": MIXERS.get("rwkv7"),
    "comba": MIXERS.get("comba"),
}
PAPER = {  # per cent; it has no noisy recall, and no Gated DeltaNet or matrices
    "attention": (49.4, 100, None, 47.9, 96.2, 83.7),
    "rwkv7": (45.1, 100, None, 32.8, 95.6, 82.2),
    "comba": (46.3, 100, None, 32.8, 96.4, 82.9),
    "titans": (49.8, 100, None, 50.0, 99.4, 83.4),
    "hope": (51.2, 100, None, 52.1, 99.7, 85.2),
}
EXAMPLES = {"memorisation": 256}  # rows of training, of the others 12,800
STEPS = {"compression": 3000}  # short rows, slow to be learned; of the others 600
RATES = (3e-3, 1e-2)
PROBE = ProbeConfig(
    d_model=64,
    layers=2,
    heads=2,
    hidden=64,
    optimizer=OptimizerConfig(warmup_steps=20, weight_decay=0.0),
    batch=32,
    steps=600,
)


def rows(flags: Any) -> dict[str, Row]:
    smoke, made = flags.scale == "smoke", {}
    for at, (name, mixer) in itertools.product(TASKS, MODELS.items()):
        task, examples = (SMOKE if smoke else TASKS)[at], EXAMPLES.get(at, 12_800)
        steps = STEPS.get(at, PROBE.steps)
        config = dataclasses.replace(PROBE, task=task, examples=examples, steps=steps)
        if smoke:
            few = {"steps": 2, "batch": 2, "evaluation": 1, "d_model": 16, "hidden": 16}
            optimizer = dataclasses.replace(PROBE.optimizer, warmup_steps=1)
            config = dataclasses.replace(config, optimizer=optimizer, **few)
        rates = RATES[: 1 if smoke else None]
        made[f"{at}_{name}"] = Row(mixer=mixer, probe=config, rates=rates)
    return made


def model(row: Row) -> ModelConfig:
    """That of a row, its MLPs as wide as it takes to be as large as Hope."""
    hope = probe.model_for(row.probe, MODELS["hope"])
    own = probe.model_for(row.probe, row.mixer)
    return zoo.matched(own, lm.count_parameters(hope))[0]


def measure(task: lab.Task) -> dict[str, float]:
    row = task.config
    made = model(row)
    return {
        "parameters": float(lm.count_parameters(made)),
        "state_bytes": float(lm.state_bytes(made)["all"]),
        **probe.tuned(row.probe, made, task.seed, row.rates),
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy in per cent, mean ± standard deviation over seeds (the best); in square
    brackets the paper's."""
    lines = []
    for name in MODELS:
        cells = []
        for column, at in enumerate(TASKS):
            of = lab.values(found, f"{at}_{name}", "accuracy")
            cell = lab.cell({seed: 100 * share for seed, share in of.items()}, "{:.1f}")
            paper = PAPER.get(name, (None,) * len(TASKS))[column]
            said = "" if paper is None else f" [{paper}]"
            cells.append((cell + said).lstrip())
        lines.append([name, *cells])
    return lab.table(["model", *(at.replace("_", " ") for at in TASKS)], lines)


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """Of each task that the paper has, and each model of its table."""
    lines = []
    for name, paper in PAPER.items():
        tasks = {}
        for column, at in enumerate(TASKS):
            ours = lab.values(found, f"{at}_{name}", "accuracy")
            ours = {seed: 100 * share for seed, share in ours.items()}
            if paper[column] is not None:
                told = lab.compared("", ours, paper[column], "{:.1f}")
                tasks[at.replace("_", " ")] = told
        lines += lab.abreast(f"Table 4, MAD, per cent, {name}", tasks)
    return lines


main = lab.Experiment(
    name=NAME, doc=__doc__, rows=rows, measure=measure, table=table, seeds=(0, 1, 2)
)

if __name__ == "__main__":
    command.run(main)
