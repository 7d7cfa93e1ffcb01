"""Table 5: who learns formal languages from short words, and reads longer ones?

Run:     python -m experiments.table5_formal_languages  (some: --rows=parity_hope,..)
         python -m experiments.table5_formal_languages --group=chunks  (or longer)
Smoke:   add --scale=smoke --out=DIR.
Expect:  experiments/README.md has the tables.
Cost:    of each seed an hour of one CPU core: Hope 2.5 to 4 minutes a row, others half
         a minute to one.

After every letter a model says which may come next (`data.synthetic.formal`); a word
counts if all of that is right. It is trained on words of 2 to 50 letters, and scored on
others of 2 to 50, of 51 to 100, and of 101 to 150, of which nothing is ever chosen. All
have two layers of width 32, two heads, MLPs and no positions, as many words, and two
learning rates, of which the loss on words of 2 to 50 chooses. Where Hope's rates start,
0.95 of their bound, was chosen on (abab)* of 51 to 100 letters and one seed, 0: from
0.5, the default, 92 % of its words were right there (one layer). `hope_gate` erases by
a gate of its own, and what makes its keys and values learns at a fiftieth of the usual
share: chosen on aⁿbⁿ of 51 to 100 letters, seed 0 (experiments/log.md has the looks).

The paper's protocol reads 10,000 words of each language 300 times, tunes more and stops
when the second number is 100 %. Here every word is new and the steps are fixed:
`rows` of a result over 3,000,000 is the share of that budget.

Groups:
  table5  the paper's rows, and Hope with matrices that are one gradient step a token
  longer  languages that count, from four times as many words, at the larger rate
  chunks  parity and (aa)* by Hope's chunk, with exact gradients and with those of the
          chunk's start, what its rates may reach, and which of them and of retentions
          it gives (`eta_least` to `alpha_most`, main memory, words of 51 to 100)
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import lab
from hope_jax.data.synthetic.formal import LANGUAGES, FormalConfig
from hope_jax.evaluate import probe, telemetry
from hope_jax.evaluate.probe import ProbeConfig
from hope_jax.models.config import with_context
from hope_jax.models.mixers import MIXERS, Mixer
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.models.mixers.self_modifying import MATRIX, SelfModifyingConfig
from hope_jax.models.rotary import NoPositions
from hope_jax.plot import Figure
from hope_jax.train.config import OptimizerConfig
from launch import command

NAME = "table5_formal_languages"
BINS = {"bin1": (51, 100), "bin2": (101, 150)}
RATES = (1e-2, 3e-3)
CHUNKED = ("parity", "aa_star")
COUNTING = ("anbn", "anbncn", "shuffle_2")
ENDS = {"least": 0.0, "median": 0.5, "most": 1.0}  # of what gates give
LONGER = 4  # times the steps of a longer training
PROBE = ProbeConfig(
    d_model=32, layers=2, heads=2, hidden=64, batch=16, steps=1600, evaluation=32
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model and a language.

    Attributes:
      mixer: of the model.
      probe: language, sizes, training.
      rates: learning rates tried.
    """

    mixer: Mixer
    probe: ProbeConfig
    rates: tuple[float, ...] = RATES


def hope(chunk: int = 1, rate: float | None = 2.0, **memory) -> SelfModifyingConfig:
    """Matrices, of which a token may turn what is stored along its key round, as they
    nearly do at the start."""
    return SelfModifyingConfig(
        memory=dataclasses.replace(MATRIX, chunk=chunk, **memory),
        projection_chunk=chunk,
        rate=rate,
        rate_start=0.95,
    )


# One head starts by turning round what it stores, the other by adding to it, and what
# makes their keys and values hardly moves: a count is of equal terms.
COUNTS = dataclasses.replace(
    hope(rate=1.0),
    rate_start=0.5,
    erase="gate",
    projection_rate=0.002,
    half_life_start=1024.0,
)
MODELS: dict[str, Any] = {
    "lstm": MIXERS.get("lstm"),
    "transformer": AttentionConfig(rotary=NoPositions()),
    "linear_attention": MIXERS.get("linear_attention"),
    "delta_net": MIXERS.get("delta_net"),
    "srwm": MIXERS.get("srwm"),
    "hope": hope(),
    "hope_gate": COUNTS,
}


def _row(mixer: Any, language: str, smoke: bool) -> Row:
    task = FormalConfig(language=language)
    optimizer = OptimizerConfig(warmup_steps=20, weight_decay=0.0)
    made = dataclasses.replace(PROBE, task=task, optimizer=optimizer)
    if smoke:
        short = FormalConfig(language=language, shortest=4, longest=8)
        few = {"steps": 2, "batch": 2, "evaluation": 1, "d_model": 8, "hidden": 8}
        optimizer = dataclasses.replace(optimizer, warmup_steps=1)
        made = dataclasses.replace(made, task=short, optimizer=optimizer, **few)
    return Row(mixer=mixer, probe=made, rates=RATES[: 1 if smoke else None])


def _chunks() -> dict[str, Any]:
    """Hope by chunk, of either gradient, each up to what its rates may reach."""
    made = {}
    for gradient, chunk in itertools.product(("exact", "anchored"), (1, 2, 4, 8, 16)):
        most = (1.0, 2.0) if gradient == "exact" else (None,)
        for rate in most:
            name = f"{gradient}_{chunk}" + (f"_rate_{rate:g}" if rate else "")
            made[name] = hope(chunk, rate, gradient=gradient)
    return made


def rows(flags: Any) -> dict[str, Row]:
    smoke = flags.scale == "smoke"
    models, languages = MODELS, tuple(LANGUAGES)
    if flags.group == "chunks":
        models, languages = _chunks(), CHUNKED
    if flags.group == "longer":
        languages = COUNTING
    pairs = itertools.product(languages, models.items())
    made = {f"{at}_{name}": _row(model, at, smoke) for at, (name, model) in pairs}
    if flags.group == "longer":
        return {f"{name}_{LONGER}x": _longer(row) for name, row in made.items()}
    return made


def _longer(row: Row) -> Row:
    probe = dataclasses.replace(row.probe, steps=LONGER * row.probe.steps)
    return dataclasses.replace(row, probe=probe, rates=row.rates[:1])


def measure(task: lab.Task) -> dict[str, float]:
    row = task.config
    longer = {
        name: dataclasses.replace(row.probe.task, shortest=low, longest=high)
        for name, (low, high) in BINS.items()
    }
    model = with_context(probe.model_for(row.probe, row.mixer), BINS["bin2"][1])

    def ranges(params, key):
        """Of what the main memory's gates give letters of words of 51 to 100."""
        asked = longer["bin1"].batch(key, row.probe.batch)
        made = {}
        gates = telemetry.gates(model, params, asked.tokens)["main memory"]
        for name, values in gates._asdict().items():
            letters = np.moveaxis(np.asarray(values), 3, 1)[np.asarray(asked.mask)]
            made |= {
                f"{name}_{n}": float(np.quantile(letters, q)) for n, q in ENDS.items()
            }
        return made

    ask = ranges if isinstance(row.mixer, SelfModifyingConfig) else None
    return probe.tuned(row.probe, model, task.seed, row.rates, longer, ask)


# Table 5, % of words of 51 to 100 letters, in the order of `LANGUAGES`.
PAPER = {
    "lstm": (100.0, 100.0, 100.0, 100.0, 100.0, 100.0),
    "transformer": (0.0, 0.0, 0.0, 100.0, 100.0, 100.0),
    "linear_attention": (0.0, 0.0, 0.0, 100.0, 100.0, 100.0),
    "delta_net": (10.1, 0.0, 0.0, 100.0, 100.0, 100.0),
    "srwm": (100.0, 100.0, 100.0, 100.0, 100.0, 100.0),
    "hope": (100.0, 100.0, 100.0, 100.0, 100.0, 100.0),
}
PAPER["hope_gate"] = PAPER["hope"]
LENGTHS = {"whole": "2 to 50", "whole_bin1": "51 to 100", "whole_bin2": "101 to 150"}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Per cent of words, of each length a table, mean ± standard deviation over seeds
    (the best), and in square brackets the paper's; then Hope by chunk."""
    rows: dict[str, dict[str, str]] = {}  # of a model by language
    for result in found:
        for language in LANGUAGES:
            if result["row"].startswith(f"{language}_"):
                model = result["row"].removeprefix(f"{language}_")
                rows.setdefault(model, {})[language] = result["row"]
    chunks = {model: rows.pop(model) for model in _chunks() if model in rows}

    def shares(row: str | None, metric: str) -> dict[int, float]:
        of = lab.values(found, row, metric) if row else {}
        return {seed: 100 * share for seed, share in of.items()}

    parts = []
    for metric, letters in LENGTHS.items() if rows else ():
        lines = []
        for model in sorted(rows, key=lambda name: [*MODELS, name].index(name)):
            of = [shares(rows[model].get(at), metric) for at in LANGUAGES]
            cells = [lab.cell(each, "{:.1f}") for each in of]
            if metric == "whole_bin1" and model in PAPER:
                theirs = zip(cells, PAPER[model], strict=True)
                cells = [f"{cell} [{paper:g}]".lstrip() for cell, paper in theirs]
            lines.append([model, max(map(len, of)), *cells])
        columns = [f"words of {letters} letters", "seeds", *LANGUAGES]
        parts.append(lab.table(columns, lines))
    lines = []
    for model, own in chunks.items():
        each = itertools.product(CHUNKED, LENGTHS)
        cells = [lab.cell(shares(own.get(at), m), "{:.1f}") for at, m in each]
        for gate in ("eta", "alpha"):
            least, middle, most = (
                [v for row in own.values() for v in lab.values(found, row, at).values()]
                for at in (f"{gate}_{end}" for end in ENDS)
            )
            if not least:  # nothing was finite
                cells.append("")
                continue
            ends = f"{min(least):.3g} to {max(most):.3g}"
            cells.append(f"{ends} ({np.median(middle):.3g})")
        lines.append([model, *cells])
    if lines:
        columns = [f"{at}, {n}" for at in CHUNKED for n in LENGTHS.values()]
        gates = ["η (median)", "α (median)"]
        parts.append(lab.table(["Hope by chunk", *columns, *gates], lines))
    return "\n\n".join(parts)


def draw(found: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Words of 51 to 100 letters by Hope's chunk, a panel a language, a dot a seed."""
    curves: dict[str, dict[int, str]] = {}  # gradient and rates -> chunk -> row
    for name, layer in _chunks().items():
        gradient, chunk = layer.memory.gradient, layer.memory.chunk
        most = "" if layer.rate is None else f", rates to {layer.rate:g}"
        curves.setdefault(f"{gradient} gradients{most}", {})[chunk] = name
    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    drawn = False
    for axes, language in zip(figure.subplots(1, len(CHUNKED)), CHUNKED, strict=True):
        for number, (label, rows) in enumerate(curves.items()):
            of = {
                chunk: [*lab.values(found, f"{language}_{name}", "whole_bin1").values()]
                for chunk, name in rows.items()
            }
            at = [chunk for chunk, shares in of.items() if shares]
            means = [100 * np.mean(of[chunk]) for chunk in at]
            dashes = {"ls": ("-", "--", ":")[number]}  # where curves lie on each other
            (line,) = axes.plot(at, means, **lab.style(number, label) | dashes)
            for chunk in at:
                shares = [100 * share for share in of[chunk]]
                axes.plot([chunk] * len(shares), shares, "o", ms=4, c=line.get_color())
            drawn |= bool(at)
        axes.set_title(language.replace("_", " "), loc="left")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda chunk, _: f"{chunk:g}")
        axes.set_xlabel("tokens of a chunk")
        axes.set_ylim(-4, 104)
    figure.axes[0].set_ylabel("words of 51 to 100 letters, %")
    lab.legend(figure, figure.axes[0], len(curves))
    return figure if drawn else None


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """Of each model that has read all languages, their mean."""
    lines = []
    for model, paper in PAPER.items():
        each = [lab.values(found, f"{at}_{model}", "whole_bin1") for at in LANGUAGES]
        seeds = set.intersection(*map(set, each))
        lines += lab.compared(
            f"Table 5, words of 51 to 100 letters, mean of six languages, {model}",
            {s: 100 * float(np.mean([of[s] for of in each])) for s in sorted(seeds)},
            float(np.mean(paper)),
            "{:.1f} %",
        )
    return lines


def _define(define) -> None:
    define.enum("group", "table5", ("table5", "chunks", "longer"), "whose rows")


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=rows,
    measure=measure,
    table=table,
    draw=draw,
    seeds=(0, 1, 2, 3, 4),
    define=_define,
)

if __name__ == "__main__":
    command.run(main)
