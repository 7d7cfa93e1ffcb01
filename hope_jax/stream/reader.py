"""A language model as its readers see it: functions of its parameters, and a state."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.core import config as config_lib
from hope_jax.data.tokenizer import Tokenizer
from hope_jax.models import lm
from hope_jax.models.config import rechunked
from hope_jax.models.learning import Learning
from hope_jax.train import checkpoint, loop, release
from hope_jax.train.config import RunConfig, read_config

_CONTEXT = re.compile(r"model\.mixer(\.\d+)?\.context")


class Reader(NamedTuple):
    """What evaluation and generation need of a model. Hashable, so `jit` keys on it.

    Attributes:
      apply: `(params, tokens, state, aligned, learn) -> (logits, state)`, with tokens
        int32[B, T], logits float32[B, T, vocab] and the two flags static. `aligned`
        promises that every row has read a multiple of `span` tokens; `learn=False`
        freezes the levels that move while they read.
      initial_state: `(params, batch) -> state`; every leaf leads with the batch.
      span: tokens between two points at which a row may be read in parallel.
      vocab: ids the model knows.
      anywhere: `(params, tokens, state, count, learn) -> (logits, state)`: the first
        `count` of some tokens, wherever the rows stand; None is `apply` one by one.
      writes: `(params, state, logits, choose, xs, learn) -> (tokens, logits, state)`,
        as `hope_jax.models.lm.write`; None is `apply` one by one.
      check_room: `(what, tokens)`, which refuses a row of more tokens than the model
        has room for (`ModelConfig.check_room`).
    """

    apply: Callable[
        [PyTree, Array, PyTree, bool, bool | Learning], tuple[Array, PyTree]
    ]
    initial_state: Callable[[PyTree, int], PyTree]
    span: int
    vocab: int
    anywhere: Callable[..., tuple[Array, PyTree]] | None = None
    writes: Callable[..., tuple[Array, Array, PyTree]] | None = None
    check_room: Callable[[str, int], None] = lambda what, tokens: None

    def read(
        self,
        params: PyTree,
        tokens: Int[Array, "B T"],
        state: PyTree,
        count: Int[Array, ""],
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T N"], PyTree]:
        """The first `count` tokens of each row; logits after them mean nothing."""
        if self.anywhere is not None:
            return self.anywhere(params, tokens, state, count, learn)

        def step(carry, token):
            i, state = carry
            logits, after = self.apply(params, token[:, None], state, False, learn)
            kept = jax.tree.map(lambda a, b: jnp.where(i < count, a, b), after, state)
            return (i + 1, kept), logits[:, 0]

        start = jnp.zeros((), jnp.int32), state
        (_, state), logits = jax.lax.scan(step, start, tokens.T)
        return jnp.moveaxis(logits, 0, 1), state

    def write(
        self,
        params: PyTree,
        state: PyTree,
        logits: Float[Array, "B N"],
        choose: Callable[[Array, PyTree], Int[Array, " B"]],
        xs: PyTree,
        learn: bool | Learning = True,
    ) -> tuple[Int[Array, "B T"], Float[Array, "B N"], PyTree]:
        """T tokens a row, each read before the next is chosen from the logits."""
        if self.writes is not None:
            return self.writes(params, state, logits, choose, xs, learn)

        def step(carry, x):
            state, logits = carry
            token = choose(logits, x)
            after, state = self.apply(params, token[:, None], state, False, learn)
            return (state, after[:, 0].astype(logits.dtype)), token

        (state, logits), tokens = jax.lax.scan(step, (state, logits), xs)
        return tokens.T, logits, state

    def window(self, at_least: int) -> int:
        """The fewest tokens, `at_least` or more, that are a multiple of `span`."""
        if at_least < 1:
            raise ValueError(f"window must be at least 1 token, got {at_least}.")
        return -(-at_least // self.span) * self.span

    def start(self, params: PyTree, batch: int) -> PyTree:
        """The initial state in buffers of its own, so that it may be donated."""
        return jax.tree.map(jnp.copy, self.initial_state(params, batch))


def check_tokenizer(reader: Reader, tokenizer: Tokenizer) -> None:
    """Refuses ids that the model has no row for.

    Raises:
      ValueError: the tokenizer has more ids than the model.
    """
    if tokenizer.vocab_size > reader.vocab:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab"
            f" ({reader.vocab}). Use the tokenizer that the model was trained with."
        )


@functools.lru_cache(maxsize=16)
def reader_of(config: lm.ModelConfig) -> Reader:
    """The reader of the model that `config` describes; one object a config.

    The parameters stay outside: every function of a reader takes them.
    """
    made = []

    def build():
        graphdef, params = lm.build(config, jax.random.key(0))
        made.append(graphdef)
        return params

    jax.eval_shape(build)  # the structure alone; no parameter is made
    (graphdef,) = made

    def apply(params, tokens, state, aligned, learn):
        return lm.apply(
            graphdef, params, tokens, state=state, aligned=aligned, learn=learn
        )

    def initial_state(params, batch):
        return lm.initial_state(graphdef, params, batch)

    def anywhere(params, tokens, state, count, learn):
        return lm.apply(graphdef, params, tokens, state, count=count, learn=learn)

    def writes(params, state, logits, choose, xs, learn):
        return lm.write(graphdef, params, state, logits, choose, xs, learn=learn)

    return Reader(
        apply,
        initial_state,
        config.span,
        config.vocab,
        anywhere,
        writes,
        config.check_room,
    )


class Opened(NamedTuple):
    """A trained model, ready to read: what `open_checkpoint` found."""

    config: RunConfig
    reader: Reader
    params: PyTree
    tokenizer: Tokenizer
    step: int


def open_checkpoint(
    directory: str | os.PathLike,
    settings: Sequence[str] = (),
    rechunk: float = 1.0,
    config: RunConfig | None = None,
) -> Opened:
    """The newest intact model of a run, or a released one.

    Args:
      directory: a workdir, or its `checkpoints` folder, or a folder that
        `launch.release` made.
      settings: `"path=value"`, fields that the run's config must have. They change
        nothing, for a model is what it was trained to be, but for the `context` of
        attention (`model.mixer.context`): no parameter has its shape, so it may look
        back over more than in training.
      rechunk: reads with chunks of the memories so many times as long as in training. A
        memory then takes its gradients elsewhere and answers otherwise, so a warning
        is logged.
      config: one that the run's must be.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: the checkpoint, the `config.json` and the tokenizer beside it,
        `config` and `settings` do not belong together; the message names each field.
      hope_jax.train.checkpoint.Damaged: no checkpoint is intact, or a released file is
        not what it was.
    """
    if release.is_release(directory):
        found = release.read(directory)
        params, tokenizer, step = found.params, found.tokenizer, found.about["step"]
        _check_same(directory, found.config, config or found.config)
        config = found.config
    else:
        config, params, step = _restored(directory, config)
        tokenizer = checkpoint.restore_tokenizer(directory)
    free = [one for one in settings if _CONTEXT.fullmatch(one.partition("=")[0])]
    config = config_lib.override(config, free)
    _check_same(directory, config, config_lib.override(config, settings))
    if rechunk != 1.0:
        config = dataclasses.replace(config, model=_rechunked(config.model, rechunk))
    reader = reader_of(config.model)
    check_tokenizer(reader, tokenizer)
    return Opened(config, reader, params, tokenizer, step)


def _restored(directory, config) -> checkpoint.Restored:
    """The newest checkpoint, which must be of `config` and the `config.json` there."""
    written = checkpoint.find(directory).parent / loop.CONFIG
    expected = [] if config is None else [config]
    if written.exists():  # beside the checkpoints, where anyone can edit it
        try:
            expected.append(read_config(RunConfig, written))
        except ValueError as error:
            logging.warning("%s The config is that of the checkpoint.", error)
    return checkpoint.restore_params(directory, expected)


def _check_same(directory, saved: RunConfig, wanted: RunConfig) -> None:
    differing = config_lib.differences(saved, wanted)
    if differing:
        raise checkpoint.ConfigMismatch(
            f"The checkpoint in {str(directory)!r} is of another config:\n  "
            + "\n  ".join(differing)
            + "\nLeave these settings out, or train a model with them."
        )


def _rechunked(config: lm.ModelConfig, factor: float) -> lm.ModelConfig:
    try:
        changed = rechunked(config, factor)
    except ValueError as error:
        raise ValueError(f"rechunk ({factor:g}) does not fit: {error}") from None
    logging.warning(
        "Reading with chunks %g times as long as in training: memories answer "
        "otherwise than they learned to.",
        factor,
    )
    return changed
