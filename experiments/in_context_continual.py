"""Does a model that learns in context keep the first of two tasks, if it is paid to?

Run:     python -m experiments.in_context_continual --data_dir=DATA
         (some rows: --rows=acl_hope,plain_hope --seeds=0)
Smoke:   add --scale=smoke --out=DIR.
Expect:  experiments/README.md has the table.
Cost:    on one CPU core, a row and seed: Hope 10 minutes, with matrices 2.5, others
         half a minute to two (`srwm` and `lstm` were not timed).

The two-task test of "Metalearning Continual Learning Algorithms" (Irie et al.,
arXiv:2312.00276; github.com/IDSIA/automated-cl). A row shows five images of each of
five classes with their labels, asks five others without, shows five more classes under
the same labels, asks these, and then asks the first five again
(`data.synthetic.episodes`). Rows:

  acl_..    task 1 after task 2 is in the outer loss, beside the other two places
  plain_..  it is not: there is no reason to keep task 1

Characters of Omniglot's two small sets, 14 x 14, in four turns: those of four alphabets
train, those of three are asked; then scikit-learn's digits, of which no model has seen
one, split into two tasks of five. No encoder was trained before: an image goes through
one matrix. There is one learning rate; of several the loss that was trained would
choose, on the characters of one more alphabet.

All have two layers of width 64, four heads, an MLP each, and as many parameters within
2 %; `hope` and `hope_matrix` are self-modifying layers with one MLP, for moves of a
continuum memory need a next token. `nearest` answers with the label of the nearest of
the images shown for a task, and is told which task is asked. Chance is 0.2.

The original reads 15 images of each class with a convolutional encoder, width 256 and
16 heads, up to 600,000 steps of 16 to 32 rows, and 1,028 characters; its figures (84.5,
96.0 and 84.3 % on Split-MNIST) are of two to five tasks of two classes or five.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import lab
from hope_jax.data.synthetic.episodes import ASKED, EpisodeConfig
from hope_jax.evaluate import in_context
from hope_jax.evaluate.in_context import InContextConfig
from hope_jax.models import lm, vectors, zoo
from hope_jax.models.mixers import MIXERS, Mixer
from hope_jax.models.mixers.self_modifying import MATRIX, MLP, SelfModifyingConfig
from launch import command

NAME = "in_context_continual"
CHUNK = 16
RATES = (2e-3,)
TOLERANCE = 0.02  # of parameters
KINDS = ("omniglot", "digits")


def _hope(memory) -> SelfModifyingConfig:
    memory = dataclasses.replace(memory, chunk=CHUNK)
    return SelfModifyingConfig(memory=memory, projection_chunk=CHUNK)


MODELS: dict[str, Any] = {
    "hope": _hope(dataclasses.replace(MLP, expansion=2)),
    "hope_matrix": _hope(MATRIX),
    **{
        name: MIXERS.get(name)
        for name in ("srwm", "delta_net", "gated_delta_net", "lstm")
    },
    "transformer": MIXERS.get("attention"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model and what it is paid for.

    Attributes:
      mixer: of the model; None for the nearest image.
      backward: whether task 1 after task 2 is in the outer loss.
      config: rows, sizes, training.
      rates: learning rates tried.
    """

    mixer: Mixer | None
    backward: bool
    config: InContextConfig
    rates: tuple[float, ...] = RATES


def rows(flags: Any) -> dict[str, Row]:
    config = InContextConfig(hidden=64, batch=8, steps=3000)
    if flags.scale == "smoke":
        config = InContextConfig(
            episode=EpisodeConfig(ways=2, shots=2, queries=2),
            **dict(size=4, d_model=8, layers=1, heads=1, hidden=16),
            **dict(batch=2, steps=2, evaluation=4),
            optimizer=dataclasses.replace(config.optimizer, warmup_steps=1),
        )
    made = {
        f"{'acl' if backward else 'plain'}_{name}": Row(
            mixer=mixer, backward=backward, config=config
        )
        for name, mixer in MODELS.items()
        for backward in (True, False)
    }
    return made | {"nearest": Row(mixer=None, backward=False, config=config)}


@functools.cache
def characters(folder: str | None, size: int) -> dict[str, np.ndarray]:
    """To train on, to choose by, and to be asked of."""
    root = Path(folder or "") / "omniglot-small"

    def omniglot(split, turned=False):
        return in_context.characters("omniglot", split, size, root, turned=turned)

    return {
        "train": omniglot("train", turned=True),
        "valid": omniglot("valid"),
        "omniglot": omniglot("test"),
        "digits": in_context.characters("digits", "train", size),
    }


def model_of(row: Row) -> lm.ModelConfig | None:
    """The model of a row, with as many parameters as Hope."""
    if row.mixer is None:
        return None
    hope = in_context.model_for(row.config, MODELS["hope"])
    model = in_context.model_for(row.config, row.mixer)
    return zoo.matched(model, lm.count_parameters(hope), TOLERANCE)[0]


def measure(task: lab.Task) -> dict[str, float]:
    """Accuracy at each place, and half of the 95 % interval over rows."""
    row, model = task.config, model_of(task.config)
    images = characters(task.flags.data_dir, row.config.size)
    asked = {kind: images[kind] for kind in KINDS}
    params, made = None, {}
    if model is not None:
        made["parameters"] = float(vectors.count_parameters(model, row.config.inputs))
        best = np.inf
        for rate in row.rates:
            optimizer = dataclasses.replace(row.config.optimizer, learning_rate=rate)
            at = dataclasses.replace(row.config, optimizer=optimizer)
            given = (model, task.seed, images["train"])
            try:
                tried, log = in_context.train(at, *given, backward=row.backward)
            except FloatingPointError as error:
                print(error)
                continue
            valid = {"valid": images["valid"]}
            told = in_context.score(at, model, tried, task.seed, valid)["valid"]
            loss = float(told.loss[:, : 3 if row.backward else 2].mean())
            made |= {f"loss_at_{rate:g}": loss, f"seconds_at_{rate:g}": log["seconds"]}
            if loss < best:
                best, params, made["rate"] = loss, tried, rate
        if params is None:
            raise ValueError(f"{task.row}: no rate of {row.rates} gave a finite loss.")
    for kind, told in in_context.score(
        row.config, model, params, task.seed, asked
    ).items():
        for place, name in enumerate(ASKED):
            mean, half = lab.interval(np.asarray(told.accuracy, np.float64)[:, place])
            made |= {f"{kind}/{name}": mean, f"{kind}/{name}/half": half}
    return made


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds, with the mean of their half intervals, and what is kept."""
    lines = []
    for row, of in itertools.groupby(found, key=lambda result: result["row"]):
        metrics = [result["metrics"] for result in of]
        mean = {name: np.mean([m[name] for m in metrics]) for name in metrics[0]}
        cells = []
        for kind in KINDS:
            at = [f"{kind}/{name}" for name in ASKED]
            cells += [f"{mean[name]:.3f} ± {mean[f'{name}/half']:.3f}" for name in at]
            last = [m[at[-1]] for m in metrics]
            cells.append(f"{min(last):.3f} to {max(last):.3f}")
        lines.append([row, *cells])
    heads = [f"{kind}: {name}" for kind in KINDS for name in (*ASKED, "seeds")]
    return lab.table(["row", *heads], lines)


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """Whether task 1 is kept by who is paid for it, and by who is not."""
    lines = []
    paid = {"in the loss": "acl", "not in the loss": "plain"}
    for kind in KINDS:
        kept = {
            how: lab.compared(
                "", lab.values(found, f"{pay}_hope_matrix", f"{kind}/{ASKED[-1]}")
            )
            for how, pay in paid.items()
        }
        what = f"Two tasks in context, {kind}, task 1 after task 2, Hope with matrices"
        lines += lab.abreast(what, kept)
    return lines


def _define(define) -> None:
    define.string("data_dir", os.environ.get("HOPE_DATA_DIR"), "folder of omniglot")


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=rows,
    measure=measure,
    table=table,
    seeds=(0, 1, 2),
    define=_define,
)

if __name__ == "__main__":
    command.run(main)
