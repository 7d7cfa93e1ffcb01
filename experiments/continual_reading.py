"""What does each level of Hope learn from real text, and how long does it last?

Run:     python -m experiments.continual_reading --workdir=DIR --data_dir=DATA
         (a part: --rows=hope_1,transformer, --seeds=1)
Full:    add --scale=large: two layers of width 128, 2,000 steps, 64 facts.
Smoke:   add --scale=smoke --out=DIR.
Expect:  experiments/README.md has the tables and the picture.
Cost:    20 minutes a seed for all rows on one CPU core; large was not run.

DATA is a folder with `tinyshakespeare/input.txt` and
`us-presidential-addresses/state_union.zip` (by default that of the environment's
HOPE_DATA_DIR). Models read bytes and are trained on the plays, 256 at a time:

  hope_1 .. hope_4   CMS levels of 128, of 128 and 512, .. 2,048, .. 8,192 bytes
  hope_rates_0       four levels, none of which moves while it reads
  hope_matrix        four levels, memories that are matrices
  .._consolidated    hope_4 and hope_matrix, whose memories return to starts that are a
                     level of period 64: the same weights, trained without, for it has
                     no parameter, and read with it
  transformer        attention over 256 bytes, one MLP

All have as many parameters. Then they read what they have not seen, A, the last plays,
and B, addresses, in windows of 4,224 bytes:

  position   bits a byte of A and of B by how much of the text was read before
  lasting    bits a byte of A read first, at once again, and again after B; and after B
             alone. What is left of the first reading is the last less the third
  facts      8 random letters planted in plays and begun again 1, 4 and 16 half-lives of
             the fastest memory later: bits a byte that having read them saves in their
             second half, for hope_4 with each part switched off

The half-life is the one at which the fastest head's gate starts, 256 bytes.
"""

import dataclasses
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import lab
from hope_jax.data.tokenizer import ByteTokenizer
from hope_jax.evaluate import ablation
from hope_jax.memory.consolidation import Consolidation
from hope_jax.models import learning, lm, zoo
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.models.mixers.self_modifying import MATRIX, MLP, SelfModifyingConfig
from hope_jax.plot import COLOURS, Figure
from hope_jax.stream.reader import Opened, open_checkpoint, reader_of
from hope_jax.train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from launch import command

NAME = "continual_reading"
PERIODS = (128, 512, 2048, 8192)
HALF_LIFE, LIVES = 256, (1, 4, 16)
CONSOLIDATED = "_consolidated"  # rows that are read with the weights of another
PARTS = ("hope_4", "hope_rates_0", "hope_4_consolidated")  # asked part by part
LETTERS = np.arange(ord("a"), ord("z") + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of models, trainings and questions.

    Attributes:
      model: what all models share.
      chunk: of the memories.
      hidden: width of an MLP of hope_4.
      steps: of the training.
      window: bytes of a reading, a multiple of the fastest period.
      texts: read side by side.
      facts: planted at each distance.
    """

    model: lm.ModelConfig
    chunk: int
    hidden: int
    steps: int
    window: int
    texts: int
    facts: int


SCALES = {
    "full": Scale(
        model=lm.ModelConfig(d_model=32, layers=1, heads=2),
        chunk=64,
        hidden=32,
        steps=300,
        window=4224,
        texts=6,
        facts=12,
    ),
    "large": Scale(
        model=lm.ModelConfig(d_model=128, layers=2, heads=4),
        chunk=64,
        hidden=80,
        steps=2000,
        window=4224,
        texts=6,
        facts=64,
    ),
    "smoke": Scale(
        model=lm.ModelConfig(d_model=16, layers=1, heads=1),
        chunk=64,
        hidden=8,
        steps=2,
        window=384,
        texts=2,
        facts=2,
    ),
}


def models(scale: str) -> dict[str, lm.ModelConfig]:
    """All rows, with as many parameters as hope_4."""
    s = SCALES[scale]

    def hope(memory, count=None, rate=0.1, rates="generated"):
        levels = tuple(CMSLevel(period=p, rate=rate) for p in PERIODS[:count])
        memory = dataclasses.replace(memory, chunk=s.chunk)
        return dataclasses.replace(
            s.model,
            mixer=SelfModifyingConfig(memory=memory, projection_chunk=s.chunk),
            cms=CMSConfig(levels=levels, hidden=s.hidden, rates=rates),
        )

    mlp = dataclasses.replace(MLP, expansion=2)
    made = {f"hope_{n}": hope(mlp, n) for n in range(1, len(PERIODS) + 1)}
    parameters = lm.count_parameters(made[f"hope_{len(PERIODS)}"])
    made["hope_rates_0"] = hope(mlp, rate=0.0, rates="learned")
    made["hope_matrix"] = hope(MATRIX)
    made["transformer"] = dataclasses.replace(
        s.model, mixer=AttentionConfig(context=256), cms=CMSConfig(hidden=s.hidden)
    )
    made = {row: zoo.matched(m, parameters, 0.03)[0] for row, m in made.items()}
    for row in ("hope_4", "hope_matrix"):
        mixer = made[row].mixer
        assert isinstance(mixer, SelfModifyingConfig)
        mixer = dataclasses.replace(mixer, consolidate=(Consolidation(),))
        made[row + CONSOLIDATED] = dataclasses.replace(made[row], mixer=mixer)
    return made


def rows(scale: str, data_dir: str | None) -> dict[str, RunConfig]:
    """One config a row; they differ in the model alone."""
    steps, folder = SCALES[scale].steps, Path(data_dir or "")
    limit = {"max_train_bytes": 20_000} if scale == "smoke" else {}
    return {
        row: RunConfig(
            experiment=NAME,
            row=row,
            scale=scale,
            model=model,
            data=DataConfig(path=str(folder / "tinyshakespeare/input.txt"), **limit),
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=steps // 10),
            train=TrainConfig(steps=steps, batch=4, seq_len=256, checkpoint_every=400),
        )
        for row, model in models(scale).items()
    }


def addresses(data_dir: str | None) -> np.ndarray:
    """The bytes of B: annual addresses, by year."""
    path = Path(data_dir or "") / "us-presidential-addresses/state_union.zip"
    with zipfile.ZipFile(path) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".txt"))
        return np.frombuffer(b"".join(files.read(n) for n in names), np.uint8)


def switches(config: lm.ModelConfig) -> dict[str, Learning | bool]:
    """Who learns while facts are read and asked: all, all but one part, nothing."""
    count = len(config.cms.levels)
    made: dict[str, Learning | bool] = {"all": True}
    for i in config.fast:
        levels = tuple(n != i for n in range(count))
        made[f"CMS {PERIODS[i]} off"] = Learning(levels=levels)
    if learning.has_memories(config):
        off = learning.off(config)
        made["memories off"] = dataclasses.replace(off, levels=None)
    if learning.consolidates(config):
        made["consolidation off"] = Learning(consolidation=False)
    if len(config.fast) > 1:
        levels = tuple(n not in config.fast for n in range(count))
        made["CMS off"] = Learning(levels=levels)
    return made | ({"nothing": False} if len(made) > 1 else {})


def measure(task: lab.Task) -> dict[str, float]:
    """Trains what is not trained yet, and asks it."""
    config, s = task.config, SCALES[task.config.scale]
    opened, log = _trained(task)
    reader, params = reader_of(config.model), opened.params
    (held_out,) = opened.config.data.load().validation
    a = ByteTokenizer().encode(held_out.data)
    both = 2 * s.window + 1
    text = {
        name: ablation.texts([ids.astype(np.int32)], count=s.texts, length=both)
        for name, ids in (("A", a), ("B", addresses(task.flags.data_dir)))
    }
    costs, first = {}, {}

    def read(rows, state, learn=True):
        made, state = ablation.costs(reader, learn, params, jnp.asarray(rows), state)
        return np.asarray(made, np.float64) / np.log(2), state

    start = reader.initial_state(params, s.texts)
    for name, rows in text.items():
        one, after = read(rows[:, : s.window + 1], start)
        two, _ = read(rows[:, s.window :], after)
        costs[name], first[name] = np.concatenate([one, two], axis=1), (one, after)
    made = {}
    edges = [0, *(n for n in (128, 512, 2048) if n < s.window), s.window, 2 * s.window]
    for name, bits in costs.items():
        for low, high in zip(edges, edges[1:], strict=False):
            made[f"position/{name}/{low}-{high}"] = float(bits[:, low:high].mean())

    here, there = (text[name][:, : s.window + 1] for name in "AB")
    _, learned = read(there, first["A"][1])
    for name, state in (
        ("again", first["A"][1]),
        ("after B", learned),
        ("B alone", first["B"][1]),
    ):
        made[f"lasting/{name}"] = float(read(here, state)[0].mean())
    made["lasting/first"] = float(first["A"][0].mean())
    made["lasting/left"] = made["lasting/B alone"] - made["lasting/after B"]

    lives = [n * HALF_LIFE for n in LIVES if ablation.room(n * HALF_LIFE) <= s.window]
    plays = opened.config.data.load().train  # the letters are in no text
    asked = [ByteTokenizer().encode(document.data) for document in plays]
    asked = ablation.texts(asked, count=s.facts, length=s.window + 1)
    facts = ablation.plant(asked, lives, task.seed, LETTERS)
    for name, learn in switches(config.model).items():
        if task.row not in PARTS and name not in ("all", "nothing"):
            continue
        found = ablation.ask(reader, params, facts, learn, batch=4 * s.texts)
        for distance, gain in found.items():
            at = f"facts/{name}/{distance // HALF_LIFE}"
            made[at] = gain.mean / np.log(2)
            made[f"{at}/half interval"] = (gain.high - gain.mean) / np.log(2)
    made["parameters"] = lm.count_parameters(config.model)
    made["training bits per byte"] = lab.training_bits(log, config.train.steps)
    return made


def _trained(task: lab.Task) -> tuple[Opened, list[dict[str, Any]]]:
    """The weights that a row is read with, and the log of their training."""
    row = task.row.removesuffix(CONSOLIDATED)
    config = rows(task.config.scale, task.flags.data_dir)[row]
    folder = Path(task.flags.workdir) / f"{row}-{task.seed}"
    log = lab.trained(dataclasses.replace(config, seed=task.seed), folder)
    return open_checkpoint(folder), log


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Three tables, as Markdown: means over seeds."""
    means: dict[str, dict[str, float]] = {}
    for row in dict.fromkeys(result["row"] for result in found):
        of = [r["metrics"] for r in found if r["row"] == row]
        means[row] = {k: float(np.mean([m[k] for m in of])) for k in of[0]}
    parts = []
    for title, head in (("position", "bits of"), ("lasting", "bits of A")):
        found_names = [k for m in means.values() for k in m]
        names = [k for k in dict.fromkeys(found_names) if k.startswith(f"{title}/")]
        columns = [head, *(name.partition("/")[2] for name in names)]
        lines = [[r, *(f"{m[n]:.3f}" for n in names)] for r, m in means.items()]
        parts.append(lab.table(columns, lines))
    lines = []
    for row, m in means.items():
        for name in dict.fromkeys(k.split("/")[1] for k in m if k.startswith("facts/")):
            gains = (
                f"{m[at]:.2f} ± {m[f'{at}/half interval']:.2f}"
                for at in (f"facts/{name}/{n}" for n in LIVES)
                if at in m
            )
            lines.append([row, name, *gains])
    columns = ["model", "learns"]
    columns += [f"{n} half-lives" for n in LIVES][: max(len(v) for v in lines) - 2]
    return "\n\n".join([*parts, lab.table(columns, lines, words=2)])


def draw(found: Sequence[Mapping[str, Any]]) -> Figure:
    """Bits a byte by position, of both texts; means over seeds."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, "AB", strict=True):
        for number, row in enumerate(dict.fromkeys(r["row"] for r in found)):
            of = [r["metrics"] for r in found if r["row"] == row]
            at = [k for k in of[0] if k.startswith(f"position/{name}")]
            ends = [int(k.rpartition("-")[2]) for k in at]
            values = np.array([[metrics[k] for k in at] for metrics in of])
            again, colour = divmod(number, len(COLOURS))
            look = {"color": COLOURS[colour], "ls": ("-", "--", ":")[again]}
            look["label"] = row.replace("_", " ")
            axes.plot(ends, values.mean(0), marker="o", ms=3, lw=1.4, **look)
        axes.set_xscale("log", base=2)
        title = {"A": "plays, as in training", "B": "addresses"}[name]
        axes.set_title(title, loc="left")
        axes.set_xlabel("bytes read, to the end of the bin")
    panels[0].set_ylabel("bits a byte")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center")
    return figure


def _define(define) -> None:
    define.string("workdir", None, "folder of the trainings", required=True)
    define.string("data_dir", os.environ.get("HOPE_DATA_DIR"), "folder of the texts")


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=lambda flags: rows(flags.scale, flags.data_dir),
    measure=measure,
    table=table,
    scales=tuple(SCALES),
    seeds=(0, 1, 2),
    define=_define,
    saved=lambda task: dataclasses.replace(
        task.config, data=dataclasses.replace(task.config.data, path="plays")
    ),
    draw=draw,
)

if __name__ == "__main__":
    command.run(main)
