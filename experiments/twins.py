"""Who recalls a planted fact? Hope beside twins that lack one thing each.

Run:     python -m experiments.twins --workdir=DIR  (some rows: --rows=hope,hope_still)
         python -m launch.train --experiment=twins --row=hope_attention --workdir=DIR
Smoke:   add --scale=smoke --out=DIR (two steps on bytes, minutes).
Expect:  experiments/README.md has the table.
Cost:    about an hour for all rows on one CPU core. What has a result file is not run
         again, and a training that was stopped goes on.

The models of the quickstart and their relatives, trained on as many tokens of the same
text in one order, with as many parameters:

  hope              the quickstart's
  hope_matrix       with matrix memories
  hope_learned      the moves of its CMS levels are as long as learned rates say alone,
                    not as its mixers say
  hope_matrix_learned   both of these
  hope_still        Hope whose CMS levels never move while it reads
  hope_attention    attention in place of the memories, CMS levels that move
  transformer       attention, and nothing that moves
  gated_delta_net   the gated delta rule, and nothing else that moves

Each is then asked what `hope_jax.evaluate.ablation` asks: texts read twice, and facts
planted 16, 96 and 1,000 tokens before they are asked for, as it is and with its CMS,
its memories or all of it stopped. Training rows have 256 tokens: a fact 1,000 tokens
back is farther than anything that any of them was trained on.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import lab, quickstart
from hope_jax.core import config as config_lib
from hope_jax.evaluate import ablation
from hope_jax.models import lm
from hope_jax.models.config import ModelConfig
from hope_jax.stream.reader import open_checkpoint
from hope_jax.train.config import RunConfig
from launch import command
from launch.evaluate import measure_parts

NAME = "twins"
MODELS = {
    "hope": "hope_tiny",
    "hope_matrix": "hope_matrix_tiny",
    "hope_learned": "hope_tiny",
    "hope_matrix_learned": "hope_matrix_tiny",
    "hope_still": "hope_tiny",
    "hope_attention": "hope_attention_tiny",
    "transformer": "transformer_tiny",
    "gated_delta_net": "gated_delta_net_tiny",
}
TEXTS, FACTS = {"full": 8, "smoke": 2}, {"full": 64, "smoke": 2}
LEAST = {"full": 1152, "smoke": 128}  # tokens of a text


def rows(scale: str) -> dict[str, RunConfig]:
    """One config a row; they differ in the model alone.

    Raises:
      ValueError: a scale that is not "full" or "smoke".
    """
    shared = quickstart.rows(scale)["hope"]
    vocab = shared.model.vocab
    made = {row: quickstart.model(n, vocab, scale) for row, n in MODELS.items()}
    for row in ("hope_learned", "hope_matrix_learned", "hope_still"):
        made[row] = config_lib.override(made[row], ["cms.rates=learned"])
    made["hope_still"] = _still(made["hope_still"])
    return {
        row: dataclasses.replace(shared, experiment=NAME, row=row, model=model)
        for row, model in made.items()
    }


def _still(model: ModelConfig) -> ModelConfig:
    """The same chain of MLPs, none of which has a clock of its own."""
    levels = tuple(
        dataclasses.replace(level, period=math.inf) for level in model.cms.levels
    )
    return dataclasses.replace(model, cms=dataclasses.replace(model.cms, levels=levels))


def measure(task: lab.Task) -> dict[str, float]:
    """Trains what is not trained yet, and asks it."""
    config, folder = task.config, Path(task.flags.workdir) / task.row
    log = lab.trained(config, folder)
    opened = open_checkpoint(folder)
    measured = measure_parts(
        opened,
        config.data.load().validation,
        rows=[row for row in ablation.rows(config.model) if row.facts and row.learn],
        count=TEXTS[config.scale],
        length=opened.reader.window(LEAST[config.scale]),
        facts=FACTS[config.scale],
        say=print,
    )
    return {
        **ablation.flat(measured),
        "parameters": lm.count_parameters(config.model),
        "training bits per byte": lab.training_bits(log, config.train.steps),
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """What there is, as Markdown."""
    distances = ablation.DISTANCES
    columns = ["model", "learns while reading", "first reading, nats"]
    columns += ["gain of a second", *(f"fact {d} tokens on" for d in distances)]
    lines = []
    for row, numbers in ((result["row"], result["metrics"]) for result in found):
        for name in ("all learn", "all CMS off", "all memories off", "nothing learns"):
            if f"{name}/first" not in numbers:
                continue
            line = [row, name]
            line += [f"{numbers[f'{name}/{what}']:.3f}" for what in ("first", "gain")]
            for at in (f"{name}/fact at {d}" for d in distances):
                if f"{at}/mean" in numbers:
                    mean, high = numbers[f"{at}/mean"], numbers[f"{at}/high"]
                    line.append(f"{mean:.2f} ± {high - mean:.2f}")
                else:
                    line.append("")
            lines.append(line)
    return lab.table(columns, lines, words=2)


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """What a fact saves far on."""
    return lab.compared(
        "Nats a token that a fact 1,000 tokens back saves, Hope",
        lab.values(found, "hope", "all learn/fact at 1000/mean"),
        form="{:.2f}",
        command=f"{NAME} --workdir=DIR",
    )


def _define(define) -> None:
    define.string("workdir", None, "folder of the trainings", required=True)


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
