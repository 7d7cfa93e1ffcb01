"""A small language model trained on a synthetic task: what its memory learns to do."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from hope_jax import optim
from hope_jax.core.config import at_least
from hope_jax.core.level import Fast, Slow, hope_update
from hope_jax.data.synthetic import AnyTask, Task
from hope_jax.data.synthetic.recall import RecallConfig
from hope_jax.evaluate import answers
from hope_jax.evaluate.answers import Score
from hope_jax.models import autoencoder, lm
from hope_jax.models.cms import CMSConfig
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.models.learning import Learning
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.base import MixerConfig
from hope_jax.train import state as state_lib
from hope_jax.train.config import OptimizerConfig
from hope_jax.train.state import TrainState

DONE, NOT_FINITE = "done", "not finite"
STRIDE = 20  # steps of one call of the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What all models that are compared share.

    Attributes:
      task: what is learned.
      d_model, layers, heads, hidden: sizes of the model and of its MLPs.
      optimizer: of the outermost level.
      batch: rows of a step.
      steps: most steps, over which the learning rate falls.
      seconds: most seconds, its compilation apart.
      enough: the task is learned, and training ends, when none of `STRIDE` steps in a
        row has a larger loss, of rows read for the first time; None trains for all
        `steps`.
      evaluation: batches, never trained on, that a model is scored on.
      examples: rows of training that there are, which are drawn again and again; None
        draws new ones at every step.

    Raises:
      ValueError: a field out of range.
    """

    task: AnyTask = RecallConfig(vocab=64, pairs=6, length=32)
    d_model: int = 32
    layers: int = 2
    heads: int = 2
    hidden: int = 32
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-2, warmup_steps=20, weight_decay=0.0
    )
    batch: int = 32
    steps: int = 400
    seconds: float = math.inf
    enough: float | None = None
    evaluation: int = 16
    examples: int | None = None

    @classmethod
    def migrated(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Recall was once the only task, and did not say so."""
        if "kind" in data.get("task", {"kind": ""}):
            return data
        return {**data, "task": {"kind": "recall", **data["task"]}}

    def __post_init__(self):
        at_least(self, batch=1, steps=1, evaluation=1, examples=1)
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}.")
        if self.enough is not None and self.examples is not None:
            raise ValueError(
                f"enough ({self.enough}) is a loss of new rows, and of examples="
                f"{self.examples} each is read again and again: leave one of them None."
            )
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) exceeds steps "
                f"({self.steps}); --set a shorter warm-up."
            )


def model_for(config: ProbeConfig, mixer: MixerConfig | str) -> ModelConfig:
    """The language model around a mixer, or its kind.

    Raises:
      ValueError: sizes or choices that do not go together.
    """
    made = ModelConfig(
        name="probe",
        vocab=config.task.vocab,
        d_model=config.d_model,
        layers=config.layers,
        heads=config.heads,
        mixer=MIXERS.of(mixer, "mixer"),
        cms=CMSConfig(hidden=config.hidden),
    )
    return with_context(made, config.task.length)


def train(
    config: ProbeConfig,
    model: ModelConfig,
    seed: int,
    learn: bool | Learning = True,
    also: Mapping[str, Task] | None = None,
    ask: Callable[[PyTree, Array], Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Trains and scores one model.

    The parameters, the rows read and the rows scored depend on `seed` alone. Steps are
    compiled once and called several at a time; the rows are drawn in the step. Called
    again with another seed or learning rate, it compiles nothing.

    Args:
      config: how.
      model: what, as of `model_for`.
      seed: of all that is drawn.
      learn: parts that do not learn while they read, in training and scoring.
      also: name -> another task that it is scored on, longer rows for example; of the
        same vocabulary, and within the model's context.
      ask: parameters, the key of the rows scored -> what else there is to say of them.

    Returns:
      `status` (`DONE`, or what stopped it), `accuracy`, `whole` and `loss` as of
      `Score` (None where it was not finite), on the task as it is `tested`, with the
      names of `also` at their end for these, `steps` that were taken, whether that was
      `enough`, `tokens_per_second` and `seconds`; `asked`, what `ask` says of
      parameters that are `DONE`.
    """
    asked_of = {"": config.task, **{f"_{k}": v for k, v in (also or {}).items()}}
    asked_of = {name: task.tested for name, task in asked_of.items()}
    rate = jnp.float32(config.optimizer.learning_rate)
    whatever = dataclasses.replace(config.optimizer, learning_rate=1.0)
    ends = {"seconds": math.inf, "enough": None}
    alike = dataclasses.replace(config, optimizer=whatever, **ends)
    programs = _programs(alike, model, learn)
    init_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
    state = programs.begin(init_key, train_key)
    steps, status, start = 0, DONE, time.perf_counter()
    seconds, enough = 0.0, False
    while status == DONE and steps < config.steps and seconds < config.seconds:
        count = min(STRIDE, config.steps - steps)
        state, worst = programs.advance(state, count, rate)
        steps += count
        if not math.isfinite(worst):
            status = f"{NOT_FINITE} by step {steps}"
        seconds = time.perf_counter() - start
        enough = config.enough is not None and float(worst) <= config.enough
        if enough:
            break
    made = {"status": status, "steps": steps, "enough": enough, "seconds": seconds}
    made["tokens_per_second"] = steps * config.batch * config.task.length / seconds
    for name, task in asked_of.items():
        found = None
        if status == DONE:
            found = programs.score(state.params, test_key, task)
        if found is not None and not math.isfinite(found.loss):
            found = None
            if not name:
                made["status"] = f"{NOT_FINITE} by step {steps}"
        for field in Score._fields:
            value = None if found is None else float(getattr(found, field))
            made[f"{field}{name}"] = value
    asked = {}
    if ask is not None and made["status"] == DONE:
        asked = dict(ask(state.params, test_key))
    return made | {"asked": asked}


class _Programs(NamedTuple):
    """What is compiled for a model and all seeds and learning rates.

    Attributes:
      begin: keys of the parameters and of the run -> the state before the first step.
      advance: state, steps, rate -> the state after these, and the largest loss.
      score: parameters, key of the rows, task -> `Score`.
    """

    begin: Callable[..., TrainState]
    advance: Callable[..., tuple[TrainState, Array]]
    score: Callable[..., Score]


@functools.lru_cache(maxsize=1)  # rates and seeds are tried one after another
def _programs(
    config: ProbeConfig, model: ModelConfig, learn: bool | Learning
) -> _Programs:
    built = _built(config.task, model, learn)

    def optimizer(params, peak=None):
        clocks = optim.one_clock(params)
        how = config.optimizer
        return optim.build(how, total_steps=config.steps, periods=clocks, peak=peak)

    @jax.jit
    def begin(init_key, train_key):
        params = built.init(init_key)
        return state_lib.create(params, optimizer(params), train_key)

    def drawn(key, step):
        """The rows of a step."""
        own = jax.random.fold_in(key, step)
        if config.examples is None:
            return config.task.batch(own, config.batch)
        numbers = jax.random.randint(own, (config.batch,), 0, config.examples)
        of_all = jax.random.fold_in(key, 2**32 - 1)  # the key of no step
        return config.task.numbered(of_all, numbers)

    def live(params, fast, asked):
        at, there = answers.questions(config.task, asked)
        return (built.read(params, asked.tokens, at), there), fast

    def objective(params, context):
        _, (logits, there) = context
        return answers.score_batch(logits, there).loss

    def advance(state, count, peak):
        tx = optimizer(state.params, peak)
        level = state_lib.outer_level(tx, objective)

        def step(i, carry):
            state, worst = carry
            asked = drawn(state.key, state.step)
            after = hope_update(asked, Slow(level, state.level), Fast(live))
            return state._replace(level=after.slow.state), jnp.maximum(
                worst, after.loss
            )

        return jax.lax.fori_loop(0, count, step, (state, jnp.float32(-jnp.inf)))

    @functools.partial(jax.jit, static_argnums=2)
    def score(params, key, task):
        return answers.score(
            *(built.read, params, task, key),
            rows=config.batch,
            batches=config.evaluation,
        )

    key, peak = jax.random.key(0), jnp.float32(0)
    state = jax.eval_shape(begin, key, key)
    compiled = jax.jit(advance, donate_argnums=0).lower(state, 0, peak).compile()
    return _Programs(begin, compiled, score)


class _Built(NamedTuple):
    """A model as the task needs it.

    Attributes:
      init: key -> parameters.
      read: as `hope_jax.evaluate.answers.Read`.
    """

    init: Callable[[Array], PyTree]
    read: answers.Read


def _built(task: Task, model: ModelConfig, learn: bool | Learning) -> _Built:
    kind = autoencoder if task.pooled else lm
    made = []

    def structure():
        graphdef, params = kind.build(model, jax.random.key(0))
        made.append(graphdef)
        return params

    jax.eval_shape(structure)  # no parameter is made
    (graphdef,) = made

    def read(params, tokens, at):
        if task.pooled:
            return autoencoder.apply(graphdef, params, tokens, learn=learn)
        return lm.apply(graphdef, params, tokens, at=at, learn=learn)[0]

    return _Built(lambda key: kind.build(model, key)[1], read)


def tuned(
    config: ProbeConfig,
    model: ModelConfig,
    seed: int,
    rates: Sequence[float],
    also: Mapping[str, Task] | None = None,
    ask: Callable[[PyTree, Array], Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Trains a model at some rates, and scores the one with the least loss on the task.

    Args:
      config, model, seed, also, ask: as of `train`; what is asked in `also` chooses
        nothing.
      rates: learning rates, tried in this order up to one that is `enough`.

    Returns:
      `finite`, whether any rate was; `rate`, the best; its scores, those that were not
      finite with accuracy and `whole` 0 and no loss; `rows` that it read in training;
      and of every rate tried `loss_at_RATE` (if finite) and `seconds_at_RATE`;
      and what `ask` says of the best.
    """
    tried = {}
    for rate in rates:
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
        at = dataclasses.replace(config, optimizer=optimizer)
        tried[rate] = train(at, model, seed, also=also, ask=ask)
        if tried[rate]["enough"]:
            break
    made: dict[str, float] = {}
    for rate, found in tried.items():
        made[f"seconds_at_{rate:g}"] = round(found["seconds"], 1)
        if found["loss"] is not None:
            made[f"loss_at_{rate:g}"] = found["loss"]
    finite = {rate: t["loss"] for rate, t in tried.items() if t["loss"] is not None}
    made["finite"] = float(bool(finite))
    best = min(finite, key=lambda rate: finite[rate], default=None)
    steps = max(t["steps"] for t in tried.values())
    if best is not None:
        made |= {"rate": best, **tried[best]["asked"]}
        steps = tried[best]["steps"]
    made["rows"] = float(steps * config.batch)
    for name in ("", *(f"_{name}" for name in also or {})):
        score = (
            {} if best is None else {f: tried[best][f + name] for f in Score._fields}
        )
        if score.get("loss") is None:
            score = {"accuracy": 0.0, "whole": 0.0}
        made |= {f"{field}{name}": value for field, value in score.items()}
    return made
