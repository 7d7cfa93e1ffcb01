"""Who can follow the product of a group's elements, four times as far as it learned?

Run:     python -m experiments.state_tracking  (some: --rows=s3_hope_to_2,s3_lstm)
Smoke:   add --scale=smoke --out=DIR.
Expect:  experiments/README.md has the table.
Cost:    on one CPU core, a row and seed, at each rate at most: `hope_2` 12 minutes,
         `hope` 5, others one to two.

S3, A5 and S5, words of 128 elements, scored on 128 and on 512 (the protocol of
DeltaProduct, arXiv:2502.10297, which reads 100,000 words 100 times: `rows` of a result
over 10,000,000 is the share of that). One layer of width 64, four heads; two learning
rates are tried in turn, up to one with which the words are learned: 20 steps in a row
have a loss of at most 0.001 nats. Accuracy is over all places; chance is 1/6, 1/60 and
1/120.

A memory that writes one key a token with rates up to 1 can only forget or keep along
it; up to 2 it can reflect, and two reflections make a rotation: the rows turn both.
That is so of keys that depend on the token alone: `hope_2_static` has such, Hope's come
of memories that move as it reads.
DeltaProduct and `hope_2` write two keys a token, the gated delta net and `hope` one.
All forget, the fastest head at first half in 64 tokens, Hope's in 256; `kept` ones do
not.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import lab
from experiments.table5_formal_languages import Row, hope
from hope_jax.data.synthetic.words import WordsConfig
from hope_jax.evaluate import probe
from hope_jax.evaluate.probe import ProbeConfig
from hope_jax.memory import named
from hope_jax.models.config import with_context
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.memory import MemoryMixerConfig
from hope_jax.train.config import OptimizerConfig
from launch import command

NAME = "state_tracking"
GROUPS = ("s3", "a5", "s5")
LONGER = 4  # times the words of the training
RATES = (1e-2, 3e-3)
PROBE = ProbeConfig(
    d_model=64,
    layers=1,
    heads=4,
    hidden=128,
    batch=16,
    steps=3200,
    enough=1e-3,
    evaluation=16,
)


KEPT = {"retention": "none", "toward": "zero"}  # of a memory that forgets nothing


def _mixer(name: str, rate: float, **changes: str) -> MemoryMixerConfig:
    """A published memory with rates up to `rate`, but for `changes`."""
    point = named.get(name)
    gates = dataclasses.replace(point.gates, rate_bound=rate)
    assert point.memory is not None
    memory = dataclasses.replace(point.memory, **changes)
    return MemoryMixerConfig(memory=memory, gates=gates)


MODELS: dict[str, Any] = {
    "lstm": MIXERS.get("lstm"),
    "gated_delta_net_to_1": _mixer("gated_delta_net", 1.0),
    "gated_delta_net_to_2": _mixer("gated_delta_net", 2.0),
    "delta_product_to_1": _mixer("delta_product", 1.0),
    "delta_product_to_2": _mixer("delta_product", 2.0),
    "delta_product_kept_to_2": _mixer("delta_product", 2.0, recall="before", **KEPT),
    "hope_to_1": hope(rate=1.0),
    "hope_to_2": hope(),
    "hope_2_to_1": hope(rate=1.0, steps=2),
    "hope_2_static_to_1": dataclasses.replace(
        hope(rate=1.0, steps=2), adaptive_k=False, adaptive_v=False
    ),
    "hope_2_to_2": hope(steps=2),
    "hope_2_kept_to_2": hope(steps=2, **KEPT),
}

SHOWN = {  # on the first page
    "lstm": "LSTM",
    "hope_to_2": "Hope with one key a token",
    "hope_2_to_1": "Hope with two keys a token and rates to 1",
    "hope_2_static_to_1": "the same, its keys and values of slow maps",
    "hope_2_to_2": "Hope with two keys a token",
    "delta_product_to_1": "DeltaProduct with rates to 1",
    "delta_product_kept_to_2": "DeltaProduct that forgets nothing",
}


def rows(flags: Any) -> dict[str, Row]:
    smoke = flags.scale == "smoke"
    made = {}
    for group, (name, mixer) in itertools.product(GROUPS, MODELS.items()):
        optimizer = OptimizerConfig(warmup_steps=20, weight_decay=0.0)
        task = WordsConfig(group=group)
        config = dataclasses.replace(PROBE, task=task, optimizer=optimizer)
        if smoke:
            few = {"steps": 2, "batch": 2, "evaluation": 1, "d_model": 8, "hidden": 8}
            optimizer = dataclasses.replace(optimizer, warmup_steps=1)
            config = dataclasses.replace(
                config,
                task=WordsConfig(group="s3", length=8),
                optimizer=optimizer,
                **few,
            )
        rates = RATES[: 1 if smoke else None]
        made[f"{group}_{name}"] = Row(mixer=mixer, probe=config, rates=rates)
    return made


def measure(task: lab.Task) -> dict[str, float]:
    row = task.config
    length = LONGER * row.probe.task.length
    longer = {"longer": dataclasses.replace(row.probe.task, length=length)}
    model = with_context(probe.model_for(row.probe, row.mixer), length)
    return probe.tuned(row.probe, model, task.seed, row.rates, longer)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy over all places, mean ± standard deviation over seeds (the best)."""
    there = {result["row"] for result in found}
    groups = [g for g in GROUPS if any(row.startswith(f"{g}_") for row in there)]
    lengths = {"accuracy": "as trained", "accuracy_longer": "four times as long"}
    lines = []
    for name in MODELS:
        rows = [f"{group}_{name}" for group in groups]
        of = [lab.values(found, row, m) for row in rows for m in lengths]
        if any(of):
            seeds = "/".join(str(len(each)) for each in of[:: len(lengths)])
            lines.append([name, seeds, *map(lab.cell, of)])
    columns = [f"{g.upper()} {words}" for g in groups for words in lengths.values()]
    return lab.table(["model", "seeds", *columns], lines)


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """Some models as trained and four times as long."""
    lengths = {"of 128": "accuracy", "of 512": "accuracy_longer"}
    return [
        line
        for group, (name, words) in itertools.product(GROUPS, SHOWN.items())
        for line in lab.abreast(
            f"State tracking, {group.upper()}, accuracy over elements, {words}",
            {
                length: lab.compared("", lab.values(found, f"{group}_{name}", metric))
                for length, metric in lengths.items()
            },
        )
    ]


main = lab.Experiment(
    name=NAME, doc=__doc__, rows=rows, measure=measure, table=table, seeds=(0, 1, 2)
)

if __name__ == "__main__":
    command.run(main)
