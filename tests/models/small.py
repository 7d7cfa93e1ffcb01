"""Small models with every clock at work, and one compiled reading of each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.attention import AttentionConfig, SlidingWindowConfig
from hope_jax.models.mixers.memory import NamedConfig
from hope_jax.models.mixers.self_modifying import MATRIX, MLP, SelfModifyingConfig

VOCAB, LENGTH = 13, 21

HOPE = ModelConfig(
    name="hope",
    vocab=VOCAB,
    d_model=8,
    layers=2,
    heads=2,
    mixer=SelfModifyingConfig(
        memory=dataclasses.replace(MLP, chunk=4, expansion=2), projection_chunk=4
    ),
    cms=CMSConfig(
        levels=(
            CMSLevel(period=4, rate=0.5),
            CMSLevel(period=8, rate=0.5),
            CMSLevel(period=128),
        ),
        hidden=12,
    ),
)
TWO_WRITES = dataclasses.replace(
    HOPE,
    name="two_writes",
    layers=1,
    mixer=SelfModifyingConfig(
        memory=dataclasses.replace(MATRIX, chunk=2, steps=2),
        projection_chunk=4,
        rate=2.0,
    ),
)
HOPE_ATTENTION = dataclasses.replace(
    HOPE, name="hope_attention", mixer=AttentionConfig(context=64)
)
TRANSFORMER = dataclasses.replace(
    HOPE_ATTENTION, name="transformer", cms=CMSConfig(hidden=24)
)
HYBRID = dataclasses.replace(
    HOPE,
    name="hybrid",
    mixer=(NamedConfig(kind="titans", chunk=2), SlidingWindowConfig(window=5)),
    layers=4,
    cms=CMSConfig(
        levels=(CMSLevel(period=4, rate=0.5), CMSLevel(period=128)), hidden=8
    ),
)
MODELS = {config.name: config for config in (HOPE, HOPE_ATTENTION, TRANSFORMER)}


@functools.cache
def built(config: ModelConfig):
    """With the kernels that open CMS moves away from the zeros at which they start."""
    with jax.ensure_compile_time_eval():  # kept, even if what asks first is traced
        graphdef, params = lm.build(config, jax.random.key(1))
    rng = np.random.default_rng(7)

    def shaken(path, leaf):
        if "['open']['kernel']" not in jax.tree_util.keystr(path):
            return leaf
        return jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)

    return graphdef, jax.tree_util.tree_map_with_path(shaken, params)


@functools.cache
def graph(config: ModelConfig):
    """The graph definition of `built`, without making the parameters."""
    return lm.abstract_model(config)[0]


@functools.cache
def reading(
    config: ModelConfig, aligned: bool | None = None, learn: bool | Learning = True
):
    """`(params, tokens, state) -> (logits, state)`, compiled once a shape."""
    graphdef = graph(config)
    return jax.jit(
        lambda params, tokens, state: lm.apply(
            graphdef, params, tokens, state, aligned=aligned, learn=learn
        )
    )


@functools.cache
def start(config: ModelConfig, rows: int = 2):
    """The state before the first token of `built`."""
    begin = jax.jit(lambda params: lm.initial_state(graph(config), params, rows))
    return begin(built(config)[1])


def read(config, tokens, state=None, **flags):
    return reading(config, **flags)(built(config)[1], tokens, state)


def some_tokens(seed=0, rows=2, length=LENGTH):
    rng = np.random.default_rng(seed)
    return np.int32(rng.integers(0, VOCAB, (rows, length)))


def drop_rates(params):
    """The parameters of a model of the same weights without fast CMS levels."""
    return type(params)({k: v for k, v in params.items() if k != "rates"})


def without_rates(config: ModelConfig) -> ModelConfig:
    """The same model with CMS levels that never move inside a sequence."""
    levels = tuple(dataclasses.replace(v, rate=0.0) for v in config.cms.levels)
    return dataclasses.replace(
        config, cms=dataclasses.replace(config.cms, levels=levels)
    )


def drawn(*shape, seed=2):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def shaken(layer: nnx.Module):
    """A layer none of whose parameters is at a special value, as pure functions."""
    graphdef, params = nnx.split(layer, nnx.Param)
    rng = np.random.default_rng(1)
    moved = lambda w: jnp.asarray(w + 0.2 * rng.normal(size=w.shape), w.dtype)  # noqa: E731
    return graphdef, jax.tree.map(moved, jax.device_get(params))


def begun(graphdef, params, rows):
    """The state of a layer before its first token."""
    return jax.jit(lambda p: nnx.merge(graphdef, p).initial_state(rows))(params)


def value_and_pullback(run, *args):
    """Of `run`, for cotangents that are always the same."""
    out, pullback = jax.vjp(run, *args)
    rng = np.random.default_rng(3)
    cotangents = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), out)
    return out, pullback(cotangents)
