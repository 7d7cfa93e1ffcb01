"""A small language model trained on a synthetic task: what its memory learns to do."""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax import optim
from hope_jax.core.level import Fast, Slow, hope_update
from hope_jax.data.synthetic import AnyTask, Task
from hope_jax.data.synthetic.recall import RecallConfig
from hope_jax.evaluate import answers
from hope_jax.evaluate.answers import Score
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.models.learning import Learning
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.base import MixerConfig
from hope_jax.stream.reader import reader_of
from hope_jax.train import state as state_lib
from hope_jax.train.config import OptimizerConfig

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
      evaluation: batches, never trained on, that a model is scored on.

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
    evaluation: int = 16

    @classmethod
    def migrated(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Recall was once the only task, and did not say so."""
        if "kind" in data.get("task", {"kind": ""}):
            return data
        return {**data, "task": {"kind": "recall", **data["task"]}}

    def __post_init__(self):
        for name in ("batch", "steps", "evaluation"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}.")
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
) -> dict[str, Any]:
    """Trains and scores one model.

    The parameters, the rows read and the rows scored depend on `seed` alone. Steps are
    compiled once and called several at a time; the rows are drawn in the step.

    Args:
      config: how.
      model: what, as of `model_for`.
      seed: of all that is drawn.
      learn: parts that do not learn while they read, in training and scoring.
      also: name -> another task that it is scored on, longer rows for example; of the
        same vocabulary, and within the model's context.

    Returns:
      `status` (`DONE`, or what stopped it), `accuracy`, `whole` and `loss` as of
      `Score` (None where it was not finite), with the names of `also` at their
      end for these, `steps` that were taken, `tokens_per_second` and `seconds`.
    """
    asked_of = {"": config.task, **{f"_{k}": v for k, v in (also or {}).items()}}
    init_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
    params = jax.jit(lambda key: lm.build(model, key)[1])(init_key)
    reader = reader_of(model)
    tx = optim.build(
        config.optimizer, total_steps=config.steps, periods=optim.one_clock(params)
    )

    def live(params, fast, asked):
        return reader.apply(params, asked.tokens, fast, True, learn)

    def objective(params, context):
        asked, logits = context
        return answers.score_batch(logits, asked).loss

    level = state_lib.outer_level(tx, objective)

    def step(i, carry):
        state, worst = carry
        key = jax.random.fold_in(state.key, state.step)
        asked = config.task.batch(key, config.batch)
        after = hope_update(asked, Slow(level, state.level), Fast(live))
        return state._replace(level=after.slow.state), jnp.maximum(worst, after.loss)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state, count):
        """`count` steps, and the largest of their losses."""
        return jax.lax.fori_loop(0, count, step, (state, jnp.float32(-jnp.inf)))

    @functools.partial(jax.jit, static_argnums=1)
    def score(params, task):
        return answers.score(
            lambda p, tokens: reader.apply(p, tokens, None, True, learn)[0],
            params,
            task,
            test_key,
            rows=config.batch,
            batches=config.evaluation,
        )

    state = state_lib.create(params, tx, train_key)
    compiled = advance.lower(state, 0).compile()
    steps, status, start = 0, DONE, time.perf_counter()
    seconds = 0.0
    while status == DONE and steps < config.steps and seconds < config.seconds:
        count = min(STRIDE, config.steps - steps)
        state, worst = compiled(state, count)
        steps += count
        if not math.isfinite(worst):
            status = f"{NOT_FINITE} by step {steps}"
        seconds = time.perf_counter() - start
    made = {"status": status, "steps": steps, "seconds": seconds}
    made["tokens_per_second"] = steps * config.batch * config.task.length / seconds
    for name, task in asked_of.items():
        found = score(state.params, task) if status == DONE else None
        if found is not None and not math.isfinite(found.loss):
            found = None
            if not name:
                made["status"] = f"{NOT_FINITE} by step {steps}"
        for field in Score._fields:
            value = None if found is None else float(getattr(found, field))
            made[f"{field}{name}"] = value
    return made


def tuned(
    config: ProbeConfig,
    model: ModelConfig,
    seed: int,
    rates: Sequence[float],
    also: Mapping[str, Task] | None = None,
) -> dict[str, float]:
    """Trains a model at every rate, and scores the one with the least loss on the task.

    Args:
      config, model, seed, also: as of `train`; what is asked in `also` chooses nothing.
      rates: learning rates tried.

    Returns:
      `finite`, whether any rate was; `rate`, the best; its scores, those that were not
      finite with accuracy and `whole` 0 and no loss; `rows` read in training; and of
      every rate `loss_at_RATE` (if finite) and `seconds_at_RATE`.
    """
    tried = {}
    for rate in rates:
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
        at = dataclasses.replace(config, optimizer=optimizer)
        tried[rate] = train(at, model, seed, also=also)
    made = {"rows": float(config.steps * config.batch)}
    for rate, found in tried.items():
        made[f"seconds_at_{rate:g}"] = round(found["seconds"], 1)
        if found["loss"] is not None:
            made[f"loss_at_{rate:g}"] = found["loss"]
    finite = {rate: t["loss"] for rate, t in tried.items() if t["loss"] is not None}
    made["finite"] = float(bool(finite))
    best = min(finite, key=lambda rate: finite[rate], default=None)
    made |= {} if best is None else {"rate": best}
    for name in ("", *(f"_{name}" for name in also or {})):
        score = (
            {} if best is None else {f: tried[best][f + name] for f in Score._fields}
        )
        if score.get("loss") is None:
            score = {"accuracy": 0.0, "whole": 0.0}
        made |= {f"{field}{name}": value for field, value in score.items()}
    return made
