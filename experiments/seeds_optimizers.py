"""Do the paper's optimizers learn faster, forget less and bear noise, task after task?

Run:     python -m experiments.seeds_optimizers  (a part: --rows=split)
Smoke:   add --scale=smoke --out=DIR.
Expect:  experiments/README.md says which of the claims hold.
Cost:    13 minutes of one CPU core.

An article about Nested Learning says of its optimizers: "15 to 20 % faster", "30 % less
forgetting" and "robust to noise". Each sentence is tried on a network of one hidden
layer that learns scikit-learn's digits in five tasks, one after another:

  permuted  all ten classes, the pixels in another order in every task
  split     two classes a task; all that were shown compete
  noisy     permuted, a fifth of the training labels replaced for good

beside AdamW with the same tasks, starts and batches. `replay` (AdamW; ten images of
each class of each past task make half of every batch), `ewc` (AdamW, consolidated) and
`joint` (AdamW on all tasks at once: the ceiling) say what forgetting costs; the rules
alone, one task after another, are the floor.

All try each rate of one grid (`ewc` with four strengths, so four times as much), and
no decay, warm-up or fall: they do not know when a task ends. Tuning seeds (of tasks,
starts and batches), scored on `valid`, choose; numbers are of as many other seeds, on
`test`. A rate that learns little forgets little, so there are three choices:

  own    the best accuracy over all tasks after the last
  equal  the same, of rates that learn each task as well as AdamW does at its own
  fast   the fewest steps of a task until ten batches have a mean loss at the target

"Faster" is asked at `fast`, "less forgetting" (F) at `own` and `equal`, "robust" by the
accuracy in noise at `own`. A claim holds if all of its 95 % interval over seeds does,
which are paired with AdamW's, and fails if nothing of it does. Steps are counted, not
time: `experiments/benchmarks/optimizers.py` says what a step costs. Noise in gradients
is a subject of its own: `experiments/noisy_gradients.py`.
"""

import dataclasses
import functools
import os

# LAPACK dead-locks a pool of two of XLA's threads, and its own threads stand in the way
# of XLA's. Both are read when JAX starts.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from hope_jax.data.synthetic import incremental as tasks_lib
from hope_jax.evaluate import incremental, noise
from hope_jax.evaluate.incremental import Lesson, Life
from hope_jax.optim import RULES
from hope_jax.plot import Figure
from hope_jax.train import images
from hope_jax.train.config import OptimizerConfig
from launch import command

NAME = "seeds_optimizers"
CLAIMED = ("m3", "delta_momentum", "deep_momentum", "dgd")
METHODS: dict[str, dict[str, Any]] = {  # what a lesson has beside the rule
    **dict.fromkeys(("adamw", "momentum", "muon", *CLAIMED), {}),
    "replay": {"replay": 10},
    "ewc": {"consolidate": True},
    "joint": {"joint": True},
}
CHOICES = ("own", "equal", "fast")
CLAIMS = {  # the choice and the measure, and by which share it is said to be less
    "fewer steps": ("fast", "steps", 0.15),
    "forgets less": ("own", "forgotten", 0.3),
    "forgets less, learns as much": ("equal", "forgotten", 0.3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(lab.Grid):
    """What is run.

    Attributes:
      stream: `permuted` or `split`.
      labels: the share of training labels that is replaced.
      tasks: one after another.
      lesson: of each.
      strengths: of consolidation.
      target: training loss, the steps to which are counted.
      seeds: for tuning, and as many others for the numbers.
    """

    stream: str
    labels: float = 0.0
    tasks: int = 5
    lesson: Lesson = Lesson()
    low: float = 1e-4
    high: float = 10.0
    rates: int = 21
    strengths: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    target: float = 0.3
    seeds: int = 5


def rows(flags: Any) -> dict[str, Settings]:
    made = {
        "permuted": Settings(stream="permuted"),
        "split": Settings(stream="split"),
        "noisy": Settings(stream="permuted", labels=0.2),
    }
    if flags.scale == "smoke":
        few = {"rates": 2, "low": 1e-3, "high": 1e-2, "seeds": 2, "strengths": (1.0,)}
        few |= {"lesson": Lesson(hidden=8, steps=20, batch=8, points=2), "target": 2.0}
        made = {row: dataclasses.replace(s, **few) for row, s in made.items()}
    return made


class Found(NamedTuple):
    """A method: rates and strengths it tried, which of them each choice is, scores
    `[trials, seeds]` and lives of the seeds that count."""

    trials: np.ndarray
    chosen: dict[str, int]
    scores: dict[str, np.ndarray]
    lives: Life


@functools.cache
def program(
    method: str, stream: str, tasks: int, lesson: Lesson
) -> Callable[..., Life]:
    """A method compiled once for all rows of the same tasks."""
    more = METHODS[method]
    config = OptimizerConfig(
        rule=RULES.get("adamw" if more else method),
        warmup_steps=0,
        final_fraction=1.0,
        weight_decay=0.0,
        clip_norm=None,
    )
    return incremental.program(
        lambda rate: images.optimizer(config, rate, 0.0, tasks * lesson.steps),
        tasks_lib.STREAMS[stream],
        tasks,
        dataclasses.replace(lesson, **more),
        inputs=config.rule.inputs is not None,
    )


def scored(life: Life, target: float) -> dict[str, np.ndarray]:
    """All that is told of lives; steps are means over tasks."""
    steps = incremental.arrival(life, target)
    arrived = (steps < life.losses.shape[-1]).mean(-1)
    measures = incremental.measures(life)
    error = 1.0 - measures["acc"]
    return measures | {"error": error, "steps": steps.mean(-1), "arrived": arrived}


def choose(
    s: Settings, scores: Mapping[str, np.ndarray], learned: float | None
) -> tuple[dict[str, int], float]:
    """The trial of each choice, by means over tuning seeds, and what AdamW learns.

    Args:
      s: of the grid.
      scores: as of `scored`, `[trials, seeds]`.
      learned: by AdamW at its own; None of itself.
    """
    mean = {name: values.mean(-1) for name, values in scores.items()}
    best = lambda values: int(s.best(values, len(values)))  # noqa: E731
    own = best(mean["error"])
    learned = float(mean["learned"][own]) if learned is None else learned
    enough = mean["learned"] >= learned
    equal = (
        np.where(enough, mean["error"], np.inf) if enough.any() else -mean["learned"]
    )
    fast = best(mean["steps"] + 1e-3 * mean["error"])  # where none arrives, the best
    return {"own": own, "equal": best(equal), "fast": fast}, learned


def compare(s: Settings) -> dict[str, Found]:
    """Every method, at the trials that tuning chose; AdamW is the first."""
    digits, found, learned = noise.load(), {}, None
    of = tasks_lib.pool(*digits["train"], 10)
    keys = jax.random.split(jax.random.key(0), 2 * s.seeds)
    most = max(len(digits[part].y) for part in ("valid", "test"))  # share a program
    for method, more in METHODS.items():
        strengths = s.strengths if "consolidate" in more else (0.0,)
        pairs = [(rate, a) for rate in s.tried().tolist() for a in strengths]
        trials = np.array(pairs, np.float32)
        run = program(method, s.stream, s.tasks, s.lesson)

        def lives(keys, part, run=run, trials=trials):
            held = padded(digits[part], most)
            made = run(*trials.T, keys, jnp.float32(s.labels), of, held)
            return jax.tree.map(np.asarray, made)

        tuning = scored(lives(keys[: s.seeds], "valid"), s.target)
        chosen, learned = choose(s, tuning, learned)
        made = lives(keys[s.seeds :], "test")
        found[method] = Found(trials, chosen, scored(made, s.target), made)
    return found


def padded(digits: noise.Digits, length: int) -> noise.Digits:
    """With images of no class behind them."""
    more = length - len(digits.y)
    x = jnp.pad(digits.x, ((0, more), (0, 0)))
    return noise.Digits(x, jnp.pad(digits.y, (0, more), constant_values=-1))


def summary(s: Settings, found: Mapping[str, Found]) -> dict[str, float]:
    """The numbers of a result file."""
    numbers: dict[str, dict[str, float]] = {}

    def of(method, choice, measure):
        return found[method].scores[measure][found[method].chosen[choice]]

    for method, (trials, chosen, scores, _) in found.items():
        for choice, at in chosen.items():
            rate, strength = map(float, trials[at])
            edge = float(rate in (trials[0, 0], trials[-1, 0]))
            own = {"rate": rate, "strength": strength, "edge": edge}
            for name in scores:
                own |= lab.spread(name, of(method, choice, name), ddof=1)
            numbers[f"{method}_{choice}"] = own
        for claim, (choice, measure, _) in CLAIMS.items():
            pair = (of(name, choice, measure) for name in (method, "adamw"))
            by, half = lab.below(*pair)
            numbers[f"{method}_{claim}"] = {"by": by, "half": half}
        gain = of(method, "own", "acc") - of("adamw", "own", "acc")
        by, half = lab.interval(gain)
        numbers[f"{method}_more accurate"] = {"by": by, "half": half}
    return lab.flat(numbers)


def verdict(by: float, half: float, least: float) -> str:
    """Whether a claim of at least so much holds.

    >>> verdict(0.4, 0.05, 0.3), verdict(0.1, 0.05, 0.3), verdict(0.3, 0.05, 0.3)
    ('holds', 'fails', 'open')
    """
    if by - half >= least:
        return "holds"
    return "fails" if by + half < least else "open"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Numbers at every choice, then what becomes of the claims."""
    columns = {
        "accuracy": "{acc:.3f} ({acc_sd:.3f})",
        "AIA": "{aia:.3f}",
        "learned": "{learned:.3f}",
        "F": "{forgotten:.3f} ({forgotten_sd:.3f})",
        "BWT": "{bwt:.3f}",
        "min-ACC": "{least:.3f}",
        "steps": "{steps:.0f} ({steps_sd:.0f})",
        "arrived": "{arrived:.2f}",
        "rate": "{rate:.2g}",
        "at edge": "{edge:g}",
    }
    parts, lines = [], []
    for result in found:
        head = (
            f"{result['row']}: means (standard deviations) of {{seeds}} unseen seeds."
        )
        places = CHOICES[: 2 if result["config"]["labels"] else 3]  # none arrives
        more = {"by": "error", "head": head, "places": lambda config, at=places: at}
        parts.append(lab.ranked([result], METHODS, columns, **more))
        claims = {claim: least for claim, (*_, least) in CLAIMS.items()}
        if result["config"]["labels"]:
            claims = {"more accurate": 0.0}
        for method in [m for m in METHODS if m not in ("adamw", "joint")]:
            cells = []
            for claim, least in claims.items():
                at = f"{method}_{claim}"
                by, half = (result["metrics"].get(f"{at}_{k}") for k in ("by", "half"))
                if by is None or half is None:
                    continue
                said = f" {verdict(by, half, least)}" if method in CLAIMED else ""
                cells.append(f"{claim} {by:+.1%} ± {half:.1%}{said}")
            lines.append([result["row"], method, "; ".join(cells)])
    return "\n\n".join([*parts, lab.table(["tasks", "rule", "than AdamW"], lines, 3)])


def draw(s: Settings, found: Mapping[str, Found]) -> Figure:
    """The first task as others follow, and what is forgotten by what is learned."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    after = np.arange(1, s.tasks * s.lesson.points + 1) / s.lesson.points
    for i, (method, of) in enumerate(found.items()):
        line = lab.style(i, method)
        first = np.asarray(of.lives.accuracy)[of.chosen["own"], ..., 0]
        lab.band(left, after, first.reshape(s.seeds, -1), **line)
        if method not in ("joint", "ewc"):
            mean = [of.scores[name].mean(-1) for name in ("learned", "forgotten")]
            right.plot(*mean, marker="o", ms=3, lw=0.8, **line)
    left.set(xlabel="tasks", ylabel="accuracy on the first", title="at its own rate")
    right.set(xlabel="learned", ylabel="forgotten", title="a point for each rate")
    lab.legend(figure, left, columns=5)
    return figure


def measure(task: lab.Task) -> dict[str, float]:
    found = compare(task.config)
    lab.save(draw(task.config, found), task.picture.with_stem(f"{NAME}_{task.row}"))
    return summary(task.config, found)


def evidence(found: Sequence[Mapping[str, Any]]) -> list[lab.Evidence]:
    """For how many rules two claims of an article hold, where labels are right."""
    lines = []
    for result in found:
        for claim in ("fewer steps", "forgets less"):
            if result["config"]["labels"]:
                continue
            *_, least = CLAIMS[claim]
            held = said = 0
            for rule in CLAIMED:
                by = result["metrics"].get(f"{rule}_{claim}_by")
                if by is None:
                    continue
                half = result["metrics"][f"{rule}_{claim}_half"]
                held, said = held + (verdict(by, half, least) == "holds"), said + 1
            if said:
                what = f"Optimizers of section 4, {claim} than AdamW, {result['row']}"
                claimed = f"{least:.0%} (an article)"
                lines.append(
                    lab.Evidence(what, f"so for {held} of {said} rules", claimed)
                )
    return lines


main = lab.Experiment(name=NAME, doc=__doc__, rows=rows, measure=measure, table=table)

if __name__ == "__main__":
    command.run(main)
