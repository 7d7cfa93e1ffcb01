"""Small models with every clock at work, and one compiled reading of each."""

import dataclasses
import functools

import jax

from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.attention import AttentionConfig, SlidingWindowConfig
from hope_jax.models.mixers.memory import NamedConfig
from hope_jax.models.mixers.self_modifying import MLP, SelfModifyingConfig

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
    graphdef, params = lm.build(config, jax.random.key(1))

    def shaken(path, leaf):
        if "['open']['kernel']" not in jax.tree_util.keystr(path):
            return leaf
        return jax.random.normal(jax.random.key(7), leaf.shape)

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


def read(config, tokens, state=None, **flags):
    return reading(config, **flags)(built(config)[1], tokens, state)


def some_tokens(seed=0, rows=2, length=LENGTH):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, VOCAB)


def drop_rates(params):
    """The parameters of a model of the same weights without fast CMS levels."""
    return type(params)({k: v for k, v in params.items() if k != "rates"})


def without_rates(config: ModelConfig) -> ModelConfig:
    """The same model with CMS levels that never move inside a sequence."""
    levels = tuple(dataclasses.replace(v, rate=0.0) for v in config.cms.levels)
    return dataclasses.replace(
        config, cms=dataclasses.replace(config.cms, levels=levels)
    )
