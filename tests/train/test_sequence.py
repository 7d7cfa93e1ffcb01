"""Devices that share the tokens of rows train the same model as one device does."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hope_jax.core.config import override
from hope_jax.memory.compose import MemoryConfig
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.attention import AttentionConfig, SlidingWindowConfig
from hope_jax.models.mixers.memory import MemoryMixerConfig, NamedConfig
from hope_jax.models.mixers.tnt import TNTConfig
from hope_jax.optim.leaves import path_names
from hope_jax.optim.rules import RULES
from hope_jax.train import checkpoint, loop, sharding
from hope_jax.train import step as step_lib
from hope_jax.train.config import OptimizerConfig, RunConfig, TrainConfig
from tests.train import tiny

SMOKE = tiny.rows("smoke")["tiny"]
LENGTH = 16
RETURNING = MemoryConfig(
    architecture="linear", gradient="exact", toward="start", erases="written", chunk=4
)
MIXED = (  # a kind of everything that is handed on
    NamedConfig(kind="gated_delta_net", chunk=2),
    NamedConfig(kind="swla", chunk=2),
    MemoryMixerConfig(memory=RETURNING),
    AttentionConfig(context=LENGTH),
    SlidingWindowConfig(window=7),
)
WHOLE = (
    TNTConfig(global_chunk=16, shard=4, local_chunks=(2,)),
    NamedConfig(kind="retnet", chunk=4),
)


def run_of(mixers, stretch=0):
    model = ModelConfig(
        vocab=16,
        d_model=8,
        heads=2,
        layers=len(mixers),
        mixer=mixers,
        cms=CMSConfig(hidden=8),
    )
    # A step then moves every parameter by its gradient.
    optimizer = OptimizerConfig(
        rule=RULES.get("sgd"),
        learning_rate=1.0,
        warmup_steps=0,
        clip_norm=None,
        weight_decay=0.0,
    )
    train = TrainConfig(steps=2, batch=2, seq_len=LENGTH, stretch=stretch)
    return RunConfig(
        experiment="shared", row="shared", model=model, optimizer=optimizer, train=train
    )


def some_rows(stretch) -> Any:
    """Rows, or documents in them: inside the stretch of a device of two or of four, at
    the start of one, over several, and one that ends early."""
    rng = np.random.default_rng(0)
    tokens: Any = rng.integers(0, 16, (2, LENGTH + 1)).astype(np.int32)
    if not stretch:
        return tokens
    document: Any = np.zeros((2, LENGTH + 1), np.int32)
    document[0, 6:], document[0, 8:], document[0, 14:] = 1, 2, 3
    document[1, 4:], document[1, 13:] = 1, -1
    return step_lib.Packed(tokens, document)


@functools.cache
def started(model):
    """A model none of whose parameters is at a special value."""
    graphdef, params = lm.build(model, jax.random.key(0))
    rng = np.random.default_rng(1)
    moved = lambda w: np.asarray(w + 0.1 * rng.normal(size=w.shape), w.dtype)  # noqa: E731
    return graphdef, jax.tree.map(moved, jax.device_get(params))


@functools.cache
def stepped(config, mesh):
    """Parameters and metrics after a step on a mesh, as `loop.train` takes it."""
    config = override(config, [f"train.mesh={mesh}"])
    devices = math.prod(sharding.read_mesh(mesh).values())
    mesh = loop.make_mesh(config, jax.devices()[:devices])
    graphdef, params = started(config.model)
    _, state, tx, layers = loop._model(config, mesh, params)
    step = loop.make_step(config, graphdef, tx, layers, mesh)
    batch = sharding.shard_batch(some_rows(config.train.stretch), mesh)
    state, metrics = sharding.jit_step(step, mesh, state)(state, batch)
    return jax.device_get((state.params, metrics))


def assert_same(one, other, atol=1e-5):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        where = ".".join(path_names(path))
        np.testing.assert_allclose(a, b, atol=atol, err_msg=where)


@pytest.mark.parametrize(
    ("mixers", "stretch", "mesh"),
    [
        (MIXED, 2, "sequence:4"),
        (MIXED, 2, "data:2,sequence:2"),
        (WHOLE, 0, "sequence:2"),
    ],
)
def test_shared_rows_equal_one_device(mixers, stretch, mesh):
    """Of documents across the cut too: losses, and the gradient of every parameter."""
    config = run_of(mixers, stretch)
    params, metrics = stepped(config, mesh)
    one, said = stepped(config, "data:1")
    np.testing.assert_allclose(metrics["loss"], said["loss"], rtol=1e-6)
    assert metrics["tokens"] == said["tokens"]
    assert_same(params, one)


def test_a_run_with_shared_rows(tmp_path):
    """Packed by the loader, and validated on the mesh."""
    ends = []
    for mesh in ("data:4", "data:2,sequence:2"):
        settings = ["train.steps=2", "train.validate_every=2", "train.stretch=4"]
        folder = tmp_path / mesh
        loop.train(override(SMOKE, [*settings, f"train.mesh={mesh}"]), folder)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        said = list(map(json.loads, lines))
        ends.append((checkpoint.restore_params(folder).params, said))
    (one, said), (other, also) = ends
    assert "validation_loss" in str(said)
    assert [line.keys() for line in said] == [line.keys() for line in also]
    for a, b in zip(said, also, strict=True):
        for name in a.keys() & {"loss", "grad_norm", "tokens", "validation_loss"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    assert_same(one, other, 2e-5)


def of_mixer(kind, **options):
    mixer = dataclasses.replace(MIXERS.get(kind), **options)
    levels = CMSConfig(hidden=8)
    return dataclasses.replace(
        SMOKE, model=dataclasses.replace(SMOKE.model, mixer=mixer, cms=levels)
    )


MOVING = dataclasses.replace(
    SMOKE,
    model=dataclasses.replace(
        SMOKE.model, cms=CMSConfig(levels=(CMSLevel(period=8, rate=0.1),), hidden=8)
    ),
)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (
            SMOKE,
            ["train.seq_len=18", "model.mixer.context=18"],
            "sequence:4 of train.mesh cuts rows of 18 tokens, but 4 must divide them: "
            "set train.seq_len=16 or 20",
        ),
        (SMOKE, ["train.stretch=8"], r"train.stretch \(8\) must divide the 4 tokens"),
        (MOVING, [], "model.cms.levels of periods 8 move inside a row"),
        (
            of_mixer("titans"),
            [],
            r"model.mixer \(titans\) has a memory \(MLP.*whose mo",
        ),
        (
            of_mixer("lstm"),
            [],
            r"model.mixer \(lstm\) reads .* one after another: use a",
        ),
        (
            of_mixer("self_modifying"),
            [],
            r"model.mixer \(self_modifying\) reads a row's",
        ),
        (
            of_mixer("tnt", global_chunk=8, shard=8, local_chunks=(4,)),
            [],
            "has a global memory, which moves inside a row of 16 tokens: use a mesh "
            "without sequence, or a global_chunk of 16 or more, got 8",
        ),
        (
            of_mixer("tnt", global_chunk=16, shard=8, local_chunks=(4,)),
            [],
            "has shards of 8 tokens, which must divide a device's 4 tokens",
        ),
        (
            of_mixer("swla"),
            [],
            "has chunks of 16 tokens, which must divide a device's 4",
        ),
        (
            of_mixer("memory", memory=RETURNING, truncate=4),
            [],
            "has truncate, which counts tokens of a whole row: leave it, or",
        ),
    ],
)
def test_rows_that_cannot_be_cut_are_refused(tmp_path, config, settings, message):
    with pytest.raises(ValueError, match=message):
        loop.train(
            override(config, ["train.mesh=sequence:4", *settings]), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_shared_rows_are_fresh_and_learn():
    graphdef, params = started(run_of(WHOLE).model)
    with pytest.raises(
        ValueError, match="shared='sequence' is for fresh rows in which"
    ):
        lm.apply(graphdef, params, some_rows(0)[:, 1:], learn=False, shared="sequence")


def test_the_table_of_what_can_be_cut():
    """That of the page, of the sizes of the zoo."""
    page = Path(loop.__file__).with_name("README.md").read_text(encoding="utf-8")
    table = page[page.index("| rows can be cut |") :].split("\n\n")[0]
    listed = {
        line.split("|")[1].strip(): set(
            re.findall("`([a-z0-9_]+)`", line.split("|")[2])
        )
        for line in table.splitlines()[2:]
    }
    yes = {kind for kind in MIXERS if not MIXERS.get(kind).unshared(4096, 4)}
    assert listed["yes"] == yes
    assert set().union(*listed.values()) == {*MIXERS}
