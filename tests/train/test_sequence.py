"""Devices that share the tokens of rows train the same model as one device does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.core.config import override
from hope_jax.memory.compose import MemoryConfig
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.attention import AttentionConfig, SlidingWindowConfig
from hope_jax.models.mixers.memory import MemoryMixerConfig, NamedConfig
from hope_jax.models.mixers.tnt import TNTConfig
from hope_jax.optim.leaves import path_names
from hope_jax.train import loop, sharding
from hope_jax.train import step as step_lib
from hope_jax.train.config import OptimizerConfig, RunConfig, TrainConfig
from tests.train import tiny

SMOKE = tiny.rows("smoke")["tiny"]
LENGTH = 16
RETURNING = MemoryConfig(
    architecture="linear", gradient="exact", toward="start", erases="written", chunk=2
)
PACKED = (
    NamedConfig(kind="gated_delta_net", chunk=2),
    NamedConfig(kind="kda", chunk=2),
    NamedConfig(kind="swla", chunk=2),
    MemoryMixerConfig(memory=RETURNING),
    AttentionConfig(context=LENGTH),
    SlidingWindowConfig(window=7),
)
PLAIN = (
    TNTConfig(global_chunk=16, shard=4, local_chunks=(2,)),
    NamedConfig(kind="retnet", chunk=4),
    AttentionConfig(context=LENGTH),
)


def run_of(mixers, stretch=0, **changes):
    model = ModelConfig(
        vocab=16,
        d_model=8,
        heads=2,
        layers=len(mixers),
        mixer=mixers,
        cms=CMSConfig(hidden=8),
    )
    optimizer = OptimizerConfig(
        rule="sgd", learning_rate=1.0, warmup_steps=0, clip_norm=None, weight_decay=0.0
    )
    train = TrainConfig(steps=2, batch=2, seq_len=LENGTH, stretch=stretch, **changes)
    return RunConfig(
        experiment="shared",
        row="shared",
        model=model,
        optimizer=optimizer,
        train=train,
    )


@functools.cache
def rows(stretch):
    """Rows of documents that begin inside stretches of two and of four devices, and
    where these do; one ends early."""
    rng = np.random.default_rng(0)
    tokens = np.int32(rng.integers(0, 16, (2, LENGTH + 1)))
    if not stretch:
        return tokens
    document = np.zeros((2, LENGTH + 1), np.int32)
    document[0, 6:], document[0, 8:], document[0, 14:] = 1, 2, 3
    document[1, 4:], document[1, 13:] = 1, -1
    return step_lib.Packed(tokens, document)


@functools.cache
def started(config):
    """The model of a run, none of whose parameters is at a special value."""
    graphdef, params = lm.build(config.model, jax.random.key(0))
    rng = np.random.default_rng(1)
    moved = lambda w: np.asarray(w + 0.1 * rng.normal(size=w.shape), w.dtype)  # noqa: E731
    return graphdef, jax.tree.map(moved, jax.device_get(params))


@functools.cache
def stepped(config, mesh):
    """Parameters and metrics after a step of a run on a mesh, as `loop.train` has it."""
    config = override(config, [f"train.mesh={mesh}"])
    sizes = sharding.read_mesh(mesh)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = loop.make_mesh(config, devices)
    graphdef, params = started(dataclasses.replace(config, train=SMOKE.train))
    _, state, tx, layers = loop._model(config, mesh, params)
    step = loop.make_step(config, graphdef, tx, layers, mesh)
    step = sharding.jit_step(step, mesh, state)
    batch = sharding.shard_batch(rows(config.train.stretch), mesh)
    state, metrics = step(state, batch)
    return jax.device_get((state.params, metrics))


def assert_same(one, other, atol=1e-5):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        where = ".".join(path_names(path))
        np.testing.assert_allclose(a, b, atol=atol, err_msg=where)


@pytest.mark.parametrize("mesh", ["sequence:2", "sequence:4", "data:2,sequence:2"])
def test_packed(mesh):
    """Documents that begin inside a device's stretch and go on across the cut."""
    config = run_of(PACKED, stretch=2)
    params, metrics = stepped(config, mesh)
    one, said = stepped(config, "data:1")
    np.testing.assert_allclose(metrics["loss"], said["loss"], rtol=1e-6)
    assert metrics["tokens"] == said["tokens"] < 2 * LENGTH
    assert_same(params, one)


@pytest.mark.parametrize("mesh", ["sequence:4", "data:2,sequence:2"])
def test_whole_rows(mesh):
    config = run_of(PLAIN)
    params, metrics = stepped(config, mesh)
    one, said = stepped(config, "data:1")
    np.testing.assert_allclose(metrics["loss"], said["loss"], rtol=1e-6)
    assert_same(params, one)
