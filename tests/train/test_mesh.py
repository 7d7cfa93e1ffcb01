"""Meshes of every kind train the same model as one device does."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import optim
from hope_jax.core.config import override
from hope_jax.models import lm, zoo
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.optim.leaves import path_names
from hope_jax.train import checkpoint, loop, sharding
from hope_jax.train import state as state_lib
from hope_jax.train import step as step_lib
from hope_jax.train.config import OptimizerConfig
from tests.models import small
from tests.train import tiny

LEVELS = (CMSLevel(period=8, rate=0.5), CMSLevel(period=128))
HOPE = dataclasses.replace(
    small.HOPE, vocab=16, layers=1, cms=CMSConfig(levels=LEVELS, hidden=12)
)
SMOKE = tiny.rows("smoke")["tiny"]


def mesh_of(sizes: str, devices: int = 4):
    return sharding.make_mesh(jax.devices()[:devices], sharding.read_mesh(sizes))


def stepped(mesh, gather="layer"):
    """Hope after two steps, and what one does in its loops."""
    graphdef, params = small.built(HOPE)
    config = OptimizerConfig(rule="sgd", learning_rate=0.05, warmup_steps=0)
    tx = optim.build(config, total_steps=9, periods=optim.one_clock(params))
    apply = functools.partial(lm.apply, horizon=16)
    step = step_lib.make_step(
        graphdef, apply, tx, mesh=mesh, by_layer=gather == "layer"
    )
    start = state_lib.create(jax.tree.map(jnp.copy, params), tx, jax.random.key(3))
    state, program = sharding.place(start, params, mesh), None
    rng = np.random.default_rng(0)
    for _ in range(2):
        tokens = rng.integers(0, HOPE.vocab, (4, 17)).astype(np.int32)
        batch = sharding.shard_batch(tokens, mesh)
        if program is None:
            traced = sharding.jit_step(step, mesh, state).trace(state, batch)
            program = traced.lower().compile()
        state, metrics = program(state, batch)  # refused if anything lay elsewhere
        jax.block_until_ready(metrics)
    return state, float(metrics["loss"]), set(looped(traced.jaxpr.jaxpr))


def looped(jaxpr, inside=False):
    """The names of what a program does in its loops."""
    for eqn in jaxpr.eqns:
        if inside:
            yield eqn.primitive.name
        within = inside or eqn.primitive.name in ("scan", "while")
        for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from looped(getattr(inner, "jaxpr", inner), within)


def is_jaxpr(node):
    return hasattr(node, "eqns") or hasattr(getattr(node, "jaxpr", None), "eqns")


def assert_same(one, other, atol=1e-5):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=atol, err_msg=where)


@pytest.mark.slow
def test_meshes_equal_one_device():
    """Hope with its levels moving: heads apart, weights apart and gathered whenever a
    layer is read, or before the step."""
    one, loss, _ = stepped(mesh_of("", 1))
    for sizes, gather in (("fsdp:2,tensor:2", "layer"), ("data:2,fsdp:2", "step")):
        mesh = mesh_of(sizes)
        some, said, done = stepped(mesh, gather)
        np.testing.assert_allclose(said, loss, rtol=1e-5)
        assert_same(one.params, some.params)
        kernel = some.params["blocks"]["mixer"]["q"]["kernel"]
        share = kernel.addressable_shards[0].data.size / kernel.size
        assert share == mesh.shape["data"] / 4  # the other axes cut it
        by_layer = gather == "layer"
        assert ("all_gather" in done) == ("reduce_scatter" in done) == by_layer
        assert not {"psum", "psum_invariant"} & done  # the mean over rows comes after


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """From parameters and moments in parts; what a run computes is the same."""
    ends = {}
    for name, mesh in (("data", ""), ("parts", "fsdp:2,tensor:2")):
        config = override(SMOKE, [f"train.mesh={mesh}", "train.checkpoint_every=6"])
        loop.train(config, tmp_path / name)
        ends[name] = checkpoint.restore_params(tmp_path / name).params
    assert_same(ends["data"], ends["parts"], 2e-5)
    longer = [f"train.mesh={m}" for m in ("fsdp:4", "data:2,fsdp:2")]
    half = override(SMOKE, [longer[0], "train.checkpoint_every=6"])
    folder = tmp_path / "parts" / "checkpoints" / "12"
    shutil.rmtree(folder)
    assert loop.train(half, tmp_path / "parts", resume=True).finished
    assert_same(
        ends["data"], checkpoint.restore_params(tmp_path / "parts").params, 2e-5
    )


def test_pmap_equals_jit():
    """Rows of documents too, of which devices predict different numbers."""
    graphdef, params = lm.build(tiny.MODEL, jax.random.key(0))
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=0)
    tx = optim.build(config, total_steps=9, periods=optim.one_clock(params))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 257, (4, 17)).astype(np.int32)
    document = np.repeat([[0], [1], [2], [3]], 17, axis=1).astype(np.int32)
    document[0, 9:] = -1  # the first document is shorter
    batch = step_lib.Packed(tokens, document)
    mesh = mesh_of("data:2", 2)
    made = {"mesh": mesh, "stretch": 16}
    ends = []
    for axis in (None, "data"):
        how = {"stretch": 16, "axis": axis} if axis else made
        step = step_lib.make_step(graphdef, lm.apply, tx, **how)
        start = jax.tree.map(jnp.copy, params)  # the step donates them
        state = state_lib.create(start, tx, jax.random.key(3))
        if axis is None:
            state = sharding.place(state, params, mesh)
            run, rows = sharding.jit_step(step, mesh), sharding.shard_batch(batch, mesh)
        else:
            state = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
            run = sharding.pmap_step(step)
            rows = jax.tree.map(lambda leaf: leaf.reshape(2, 2, -1), batch)
        for _ in range(2):
            state, metrics = run(state, rows)
            jax.block_until_ready(metrics)
        ends.append((state.params, metrics))
    (one, said), (many, each) = ends
    assert_same(one, jax.tree.map(lambda leaf: leaf[1], many))
    assert each["tokens"].tolist() == [int(said["tokens"])] * 2 == [56, 56]
    for name in ("loss", "grad_norm", "update_norm"):
        np.testing.assert_allclose(each[name][0], said[name], rtol=1e-5)


def test_where_parameters_and_moments_lie():
    """By the table: of Hope every matrix is cut, of its layers almost all there is."""
    mesh = mesh_of("fsdp:2,tensor:2")
    params = lm.abstract(zoo.get("hope_760m"))
    size, cut = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(path_names(path))
        spec = tuple(sharding.spec_of(name, leaf.shape, mesh))
        parts = 2 ** sum(axis is not None for axis in spec)
        size, cut = size + leaf.size, cut + leaf.size / parts
        if leaf.ndim == 3 and name.endswith("kernel") and leaf.size > 10**6:
            assert {"fsdp", "tensor"} == {axis for axis in spec if axis}, name
    assert cut / size < 0.27  # a quarter on each of four
    tx = optim.build(OptimizerConfig(), total_steps=9, periods=optim.one_clock(params))
    state = state_lib.abstract(params, tx)
    lies = sharding.state_shardings(state, params, mesh)
    specs = [lies.params["embed"]["embedding"].spec]
    specs += [
        leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(lies.level.opt)
        if path_names(path)[-2:] == ("embed", "embedding")
    ]
    assert len(specs) == 3 and set(map(tuple, specs)) == {("tensor", "fsdp")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["train.mesh=rows:2"],
            "mesh='rows:2' must name each of data, fsdp, seq",
        ),
        (["train.mesh=fsdp:2,fsdp:2"], "'fsdp:2' does not"),
        (["train.mesh=fsdp:0"], "'fsdp:0' does not"),
        (["train.mesh=fsdp:3"], r"mesh \(fsdp 3\) is of 3 devices, but there are 4"),
        (["train.mesh=data:2"], r"mesh \(data 2\) is of 2 devices, but there are 4"),
        (["train.mesh=tensor:4"], r"model.heads \(2\) must be a multiple of .* \(4\)"),
        (
            ["train.mesh=fsdp:2", "train.batch=6"],
            r"batch \(6\) must be a multiple of the 4 shares of rows of the mesh "
            r"\(data 2 x fsdp 2\); the nearest are 4 and 8",
        ),
        (["train.batch=2"], r"batch \(2\) .* of the 4 devices; the least is 4"),
        (["train.gather=step"], "gather='step' is for a mesh with fsdp, got mesh=''"),
        (
            ["train.mesh=fsdp:2", "optimizer.rule=dgd"],
            r"optimizer.rule \(dgd\) learns from .* set train.gather=step",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        loop.train(override(SMOKE, settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
