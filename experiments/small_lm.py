"""Language models of a million parameters: Hope, its parts taken away, its peers.

Run:     python -m experiments.small_lm --workdir=DIR  (a part: --rows=library_hope)
         python -m experiments.small_lm --group=plays --data_dir=DATA --workdir=DIR
         python -m experiments.small_lm --group=why --workdir=DIR
Larger:  --scale=4m or 10m with --out=DIR, for accelerators.
Smoke:   add --scale=smoke --out=DIR.
Goal:    Hope's perplexity at most 1.05 of Gated DeltaNet's, then below it.
Expect:  experiments/README.md has the tables.
Cost:    by what steps take, of a text and seed 0 two hours of one CPU core: Hope 15
         minutes, a row with matrices 9, peers 4; of other seeds, with one rate, half.

Two texts: `library`, the Python standard library, files of code, and `plays`, which is
DATA/tinyshakespeare/input.txt (by default in the environment's HOPE_DATA_DIR), whose
end is one long validation document. Tokens are a BPE of the training text. Every row
reads as many tokens in one order and has as many parameters (within 2 %, checked before
anything is computed). Two learning rates are tried with seed 0, of which the loss on
the last 50 steps of training chooses for all seeds: validation text chooses nothing.

  hope, hope_matrix   MLP and matrix memories, three CMS levels that move while reading
  hope_attention      attention in place of the memories, the same levels
  hope_delta          the gated delta rule in place of the memories, the same levels
  titans, gated_delta_net, transformer   one memory, or attention, and one MLP
  transformer_115     Transformer++ with 15 % more parameters
  whole               what Table 6 takes parts away from: `hope_matrix` with momentum
                      and queries that are a memory, for our Hope has neither
  whole_no_dgd        matrices that descend the dot product and erase nothing
  whole_no_momentum, whole_no_retention   as they say
  whole_no_cms        one MLP in place of the levels
  whole_no_k, _v, _q  keys, values or queries by slow maps alone

The group `why` has what may set Hope apart from `hope_delta`, on `library`:

  delta_narrow        `hope_delta`, its levels as narrow as Hope's: fewer parameters
  hope_wide, matrix_wide   Hope's levels as wide as `hope_delta`'s: more parameters
  hope_expansion_1    MLP memories half as wide, levels wider for it
  matrix_static       memories make the gates alone, not keys and values
  matrix_slice        what they read is a slice of x, not slow maps of it

Table 6 is done with matrices, for they cost half of MLP memories, and because a delta
term helps them and harms MLPs (`experiments/memory.py`). Measured: bits a byte and
perplexity a token of validation text with the memory reset before each document,
carried on and frozen; of longer rows of it the loss by position (what Figure 10 asks),
and with each part of the model not learning. Sizes, tokens and steps are those of the
quickstart: no row is near convergence, each reads 0.43 tokens a parameter.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import lab
from hope_jax.data.tokenizer import encode_documents
from hope_jax.evaluate import ablation, language_model
from hope_jax.models import lm, zoo
from hope_jax.models.cms import CMSConfig
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.models.mixers.self_modifying import SelfModifyingConfig
from hope_jax.stream.reader import open_checkpoint
from hope_jax.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from launch import command

NAME = "small_lm"
GROUPS = ("library", "plays", "why")
PEERS = ("hope_attention", "titans", "gated_delta_net", "transformer")
MORE = 1.15  # times the parameters of the others
EDGES = (0, 64, 256, 512, 1024)  # of positions in a row
# Table 6, perplexity without the part over the whole, 12.24, at 1.3B parameters.
PAPER = {"dgd": 13.41, "momentum": 13.58, "retention": 13.71, "cms": 13.04}
PAPER |= {"k": 13.77, "v": 13.90, "q": 12.19}
WHOLE = 12.24
PEERS_OF_PAPER = {  # Table 2, Wikitext, but for the last two: Hope over it, and where
    "gated_delta_net": ("Gated DeltaNet's", 18.68 / 24.52, "over DeltaNet's, 760M"),
    "transformer": ("Transformer++'s", 18.68 / 24.18, "760M"),
    "transformer_115": ("a larger Transformer++'s (15 %)", 1.0, "an article"),
    "hope_delta": ("Gated DeltaNet's with Hope's levels", None, ""),
}
SEEN = (0, 256)  # positions that rows of training have, two of EDGES
POSITION = "position/all learn/"
STILL = ("all CMS off", "nothing learns")
ALIKE = {  # where the levels of both are as wide, whatever memories take
    "as narrow as Hope's": ("library_hope", "why_delta_narrow"),
    "as wide as the other's": ("why_hope_wide", "library_hope_delta"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of models, trainings and questions.

    Attributes:
      model: widths and vocabulary, as fields of `ModelConfig`.
      parameters: of every row but `transformer_115`.
      data: limits and tokenizer of either text.
      train: of every row.
      rates: learning rates tried.
      texts: rows of validation text, each of `length` tokens.
    """

    model: Mapping[str, int]
    parameters: int
    data: DataConfig
    train: TrainConfig
    rates: tuple[float, ...] = (8e-3, 4e-3)
    texts: int = 8
    length: int = EDGES[-1]


_BPE = DataConfig(tokenizer="bpe", max_train_bytes=4_000_000)
_BYTES = DataConfig(max_train_bytes=60_000, max_validation_bytes=4_000)
SCALES = {
    "full": Scale(
        model={"d_model": 128, "layers": 2, "heads": 4, "vocab": 4096},
        parameters=1_080_000,
        data=dataclasses.replace(_BPE, max_validation_bytes=60_000),
        train=TrainConfig(steps=450, batch=4, checkpoint_every=150),
    ),
    "4m": Scale(
        model={"d_model": 192, "layers": 4, "heads": 6, "vocab": 4096},
        parameters=4_000_000,
        data=dataclasses.replace(_BPE, max_train_bytes=None),
        train=TrainConfig(steps=5000, batch=16, checkpoint_every=1000),
        rates=(4e-3, 2e-3),
    ),
    "10m": Scale(
        model={"d_model": 256, "layers": 6, "heads": 8, "vocab": 8192},
        parameters=10_000_000,
        data=dataclasses.replace(_BPE, max_train_bytes=None, vocab=8192),
        train=TrainConfig(steps=10_000, batch=32, checkpoint_every=1000),
        rates=(4e-3, 2e-3),
    ),
    "smoke": Scale(
        model={"d_model": 32, "layers": 1, "heads": 2, "vocab": 257},
        parameters=46_000,
        data=_BYTES,
        train=TrainConfig(steps=2, batch=4, seq_len=160, log_every=1),
        rates=(1e-3,),
        texts=2,
        length=256,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model on a text.

    Attributes:
      run: its training; seed and rate are those of a task.
      rates: learning rates tried.
    """

    run: RunConfig
    rates: tuple[float, ...]


@functools.cache
def models(scale: str) -> dict[str, ModelConfig]:
    """All models, of one size but the last of `PEERS`' larger twin."""
    s = SCALES[scale]
    names = ("hope", "hope_matrix", *PEERS)
    made = {name: zoo.get(f"{name}_tiny") for name in names}
    made["transformer_115"] = made["transformer"]
    delta = made["gated_delta_net"].mixer
    made["hope_delta"] = dataclasses.replace(made["hope"], mixer=delta)
    made |= _table_6(made["hope_matrix"])
    found = {}
    for name, model in made.items():
        sized = with_context(dataclasses.replace(model, **s.model), s.train.seq_len)
        more = MORE if name == "transformer_115" else 1.0
        found[name], _ = zoo.matched(sized, round(more * s.parameters))
    return found


@functools.cache
def controls(scale: str) -> dict[str, ModelConfig]:
    """Models between Hope and `hope_delta`, of one size but for the first three."""
    made, size = models(scale), SCALES[scale].parameters
    hope, matrix, delta = (made[n] for n in ("hope", "hope_matrix", "hope_delta"))

    def like(model, other):
        cms = dataclasses.replace(model.cms, hidden=other.cms.hidden)
        return dataclasses.replace(model, cms=cms)

    def mixer(model, **changes):
        changed = dataclasses.replace(model.mixer, **changes)
        return zoo.matched(dataclasses.replace(model, mixer=changed), size)[0]

    return {
        "delta_narrow": like(delta, hope),
        "hope_wide": like(hope, delta),
        "matrix_wide": like(matrix, delta),
        "hope_expansion_1": mixer(
            hope, memory=dataclasses.replace(hope.mixer.memory, expansion=1)
        ),
        "matrix_static": mixer(matrix, adaptive_k=False, adaptive_v=False),
        "matrix_slice": mixer(matrix, inputs="slice"),
    }


def _table_6(hope: ModelConfig) -> dict[str, ModelConfig]:
    """The whole, and it without each part."""
    assert isinstance(hope.mixer, SelfModifyingConfig)
    memory = dataclasses.replace(hope.mixer.memory, rule="momentum")

    def model(adaptive=(), **changes):
        mixer = dataclasses.replace(
            hope.mixer,
            memory=dataclasses.replace(memory, **changes),
            **{"adaptive_q": True} | dict(adaptive),
        )
        return dataclasses.replace(hope, mixer=mixer)

    made = {
        "whole": model(),
        "whole_no_dgd": model(dgd="none"),
        "whole_no_momentum": model(rule="gd"),
        "whole_no_retention": model(retention="none", toward="zero"),
        "whole_no_cms": dataclasses.replace(model(), cms=CMSConfig()),
    }
    for name in "kvq":
        made[f"whole_no_{name}"] = model({f"adaptive_{name}": False})
    return made


def rows(scale: str) -> dict[str, RunConfig]:
    """The trainings of the first group; rows differ in the model alone."""
    return {name: row.run for name, row in _rows(scale, "library", None).items()}


def _rows(scale: str, group: str, data_dir: str | None) -> dict[str, Row]:
    s, data = SCALES[scale], SCALES[scale].data
    if group == "plays":
        path = Path(data_dir or "") / "tinyshakespeare/input.txt"
        data = dataclasses.replace(data, path=str(path))
    optimizer = OptimizerConfig(
        learning_rate=s.rates[0], warmup_steps=max(1, s.train.steps // 10)
    )
    made = {}
    of = controls if group == "why" else models
    for name, model in of(scale).items():
        row = f"{group}_{name}"
        run = RunConfig(
            experiment=NAME,
            row=row,
            scale=scale,
            model=model,
            data=data,
            optimizer=optimizer,
            train=s.train,
        )
        made[row] = Row(run=run, rates=s.rates)
    return made


def measure(task: lab.Task) -> dict[str, float]:
    """Trains what is not trained yet, and asks it."""
    path = task.config.run.data.path
    if path is not None and not Path(path).is_file():
        raise ValueError(
            f"--data_dir={task.flags.data_dir} has no tinyshakespeare/input.txt: give "
            "the folder that has, or set HOPE_DATA_DIR."
        )
    run, s, began = task.config.run, SCALES[task.config.run.scale], time.process_time()
    made, folder = _trained(task, 0, task.config.rates)
    if folder is not None and task.seed:
        made, folder = _trained(task, task.seed, (made["rate"],))
    if folder is None:
        return made | {"finite": 0.0}
    opened = open_checkpoint(folder)
    reader, params, tokens = opened.reader, opened.params, opened.tokenizer
    documents = run.data.load().validation
    modes = language_model.modes_of(run.model, documents)
    for mode in modes:
        how = {"modes": (mode,)}
        try:
            asked = language_model.evaluate(reader, params, tokens, documents, **how)
        except FloatingPointError:  # a result too: it does not stand so much text
            made[f"overflow/{mode}"] = 1.0
            continue
        made[f"bits/{mode}"] = asked[f"bits_per_byte_{mode}"]
        made[f"perplexity/{mode}"] = math.exp(asked[f"nats_per_token_{mode}"])
    ids = encode_documents(tokens, documents)
    text = ablation.texts(ids, count=s.texts, length=s.length + 1)
    for name, costs in ablation.first_readings(run.model, params, text).items():
        if not np.isfinite(costs).all():
            made[f"overflow/{name}"] = 1.0
            continue
        made[f"part/{name}"] = float(costs.mean())
        for low, high in zip(EDGES, EDGES[1:], strict=False):
            if high <= s.length and name in ("all learn", "nothing learns"):
                made[f"position/{name}/{low}-{high}"] = float(costs[:, low:high].mean())
    made["parameters"] = lm.count_parameters(run.model)
    made["CPU seconds"] = round(time.process_time() - began, 1)
    return made | {"finite": 1.0}


def _trained(task: lab.Task, seed: int, rates: Sequence[float]):
    folder = Path(task.flags.workdir) / f"{task.row}-s{seed}"
    return lab.best_rate(dataclasses.replace(task.config.run, seed=seed), folder, rates)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A table a text: perplexity on whole documents by mode, nats a token of longer
    rows by position, and of all of them with parts still; mean ± standard deviation
    over seeds (the best)."""
    rows = dict.fromkeys(result["row"] for result in found)
    longest = max(
        (int(m.rpartition("-")[2]) for r in found for m in _positions(r)), default=0
    )
    edges = sorted({edge for edge in (*SEEN, longest) if edge <= longest})
    spans = list(zip(edges, edges[1:], strict=False))
    heads = [f"nats, {low} to {high}" for low, high in spans]
    heads += [f"nats, {part}" for part in STILL]
    parts = []
    for group in GROUPS:
        lines = []
        for row in (row for row in rows if row.startswith(f"{group}_")):
            whole = [
                _cell(found, row, f"perplexity/{mode}", "{:.1f}")
                for mode in language_model.MODES
            ]
            spanned = [
                lab.cell(_nats(found, row, *span), "{:.2f}", min) for span in spans
            ]
            still = [_cell(found, row, f"part/{part}", "{:.2f}") for part in STILL]
            sizes = lab.values(found, row, "parameters")
            size = f"{max(sizes.values(), default=0):,}"
            cells = [len(sizes), size, *whole, *spanned, *still]
            lines.append([row.removeprefix(f"{group}_"), *cells])
        if lines:
            modes = [f"perplexity, {mode}" for mode in language_model.MODES]
            columns = [group, "seeds", "parameters", *modes, *heads]
            parts.append(lab.table(columns, lines))
    return "\n\n".join(parts)


def _cell(found, row, name, form) -> str:
    if of := lab.values(found, row, name):
        return lab.cell(of, form, min)
    mode = name.partition("/")[2]
    return "overflow" if lab.values(found, row, f"overflow/{mode}") else ""


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """Hope against its peers, and what each part is worth, as far as they are run."""
    lines, options = [], {"library": "", "plays": "--group=plays --data_dir=DATA "}
    for group, more in options.items():

        def over(a, b, group=group):
            rows = (f"{group}_{name}" for name in (a, b))
            return lab.quotient(
                *(lab.values(found, row, "perplexity/reset") for row in rows)
            )

        command = f"{NAME} {more}--workdir=DIR"
        for name, (words, paper, where) in PEERS_OF_PAPER.items():
            what = f"Table 2, perplexity of Hope over {words}: 1M parameters, {group}"
            how = {"form": "{:.2f}", "command": command}
            ours, theirs = (_nats(found, f"{group}_{m}", *SEEN) for m in ("hope", name))
            ratio = {s: math.exp(ours[s] - theirs[s]) for s in ours if s in theirs}
            whole = lab.compared("", over("hope", name), paper, where=where, **how)
            first = lab.compared("", ratio, **how)
            parts = {"whole": whole, f"first {SEEN[-1]} tokens": first}
            lines += lab.abreast(what, parts)
        each = {part: over(f"whole_no_{part}", "whole") for part in PAPER}
        if all(each.values()):
            ours = {part: np.mean([*of.values()]) for part, of in each.items()}
            theirs = {part: value / WHOLE for part, value in PAPER.items()}
            away = np.mean([abs(ours[part] - theirs[part]) for part in PAPER])
            result, paper = (
                ", ".join(f"{part} {v:.2f}" for part, v in of.items())
                for of in (ours, theirs)
            )
            what = f"Table 6, perplexity without a part over the whole's, {group}"
            away = f"{away:.2f} on average"
            lines.append(lab.Evidence(what, result, paper, away, command))
    words, _, _ = PEERS_OF_PAPER["hope_delta"]
    for width, pair in ALIKE.items():
        ratio = lab.quotient(
            *(lab.values(found, row, "perplexity/reset") for row in pair)
        )
        what = f"Perplexity of Hope over {words}, the levels of both {width}, library"
        command = f"{NAME} --group=why --workdir=DIR"
        lines += lab.compared(what, ratio, form="{:.2f}", command=command)
    return lines


def _positions(result: Mapping[str, Any]) -> list[str]:
    return [name for name in result["metrics"] if name.startswith(POSITION)]


def _nats(found, row: str, low: int, high: int) -> dict[int, float]:
    """Nats a token over positions from `low` to `high`, two of `EDGES`, by seed."""
    parts = [
        (b - a, lab.values(found, row, f"{POSITION}{a}-{b}"))
        for a, b in zip(EDGES, EDGES[1:], strict=False)
        if low <= a and b <= high
    ]
    return {
        seed: sum(tokens * of[seed] for tokens, of in parts) / (high - low)
        for seed in parts[0][1]
    }


def _define(define) -> None:
    define.enum("group", "library", GROUPS, "which text")
    define.string("workdir", None, "folder of the trainings", required=True)
    define.string("data_dir", os.environ.get("HOPE_DATA_DIR"), "folder of the texts")


def _saved(task: lab.Task) -> Row:
    """A text by its name: where it lay says nothing."""
    run = dataclasses.replace(task.config.run, seed=task.seed)
    if run.data.path:
        data = dataclasses.replace(run.data, path="plays")
        run = dataclasses.replace(run, data=data)
    return dataclasses.replace(task.config, run=run)


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=lambda flags: _rows(flags.scale, flags.group, flags.data_dir),
    measure=measure,
    table=table,
    scales=tuple(SCALES),
    seeds=(0, 1, 2),
    define=_define,
    saved=_saved,
)

if __name__ == "__main__":
    command.run(main)
