"""Every optimizer moves parameters that lie in parts as it moves them whole.

A step is a gradient and a move. What a small Hope, whose levels move while it reads,
has as its gradient on a mesh is held to one device's; and two moves of every member of
`RULES` by the same gradients, with parameters, gradients and states where training has
them, to those of one device. By gradients of their own, moves of Adam and its like are
as near only where gradients are well above rounding errors: it divides each by its own
size, so that one of 1e-8, of which the last digits differ, is a step that does: two
steps of AdamW at a rate of 0.05 were up to 5e-5 apart, on rows alone (`data:4`) as on
`fsdp:2,tensor:2`, 1e-6 with an epsilon of 1e-3, and in float64 1e-13.

All rules of a mesh move in one program, and all meshes are of one process of eight
devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import optim
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.optim import groups
from hope_jax.optim.leaves import path_names
from hope_jax.train import sharding
from hope_jax.train import state as state_lib
from hope_jax.train import step as step_lib
from hope_jax.train.config import OptimizerConfig
from tests.devices import saved_by
from tests.models import small

LEVELS = (CMSLevel(period=8, rate=0.5), CMSLevel(period=128))
HOPE = dataclasses.replace(
    small.HOPE, vocab=16, layers=1, cms=CMSConfig(levels=LEVELS, hidden=8)
)
ONE, MIXED = "data:1", "data:2,fsdp:2,tensor:2"
MESHES = ("fsdp:8", "tensor:2", MIXED)  # on which parameters are cut
SPREAD = ("adamuon", "m3", "shampoo", "soap")  # rules whose work devices share
MORE = ("data:8", "fsdp:2,tensor:2")  # meshes for these
# Of the model's parameters, one of each kind of place and of each kind of optimizer.
SOME = (
    "embed.embedding",
    "blocks.mixer.q.kernel",
    "blocks.mixer.main_start.w1",
    "blocks.mixer.bias_eta",
    "blocks.levels.1.mlp.gate.kernel",
)
SLOW = "blocks.levels.1"  # moves at every second step
RATE = 0.05


def named(tree):
    """Its leaves by their dotted names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(path_names(path)): leaf for path, leaf in leaves}


def mesh_of(sizes):
    count = np.prod(list(sharding.read_mesh(sizes).values()), dtype=int)
    return sharding.make_mesh(jax.devices()[:count], sharding.read_mesh(sizes))


def keeps():
    """Moves nothing, and has as its state the gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda g, state, params=None: (jax.tree.map(jnp.zeros_like, g), g),
    )


def gradient(sizes):
    """Of the model on a mesh, for eight rows whose last token reads a moved level."""
    mesh, tx = mesh_of(sizes), keeps()
    graphdef, params = small.built(HOPE)
    apply = functools.partial(lm.apply, horizon=9)
    step = step_lib.make_step(graphdef, apply, tx, mesh=mesh, by_layer=True)
    start = state_lib.create(jax.tree.map(jnp.copy, params), tx, jax.random.key(3))
    state = sharding.place(start, params, mesh)
    tokens = np.random.default_rng(0).integers(0, HOPE.vocab, (8, 10))
    batch = sharding.shard_batch(tokens.astype(np.int32), mesh)
    state, _ = sharding.jit_step(step, mesh, state)(state, batch)
    return jax.tree.map(np.asarray, named(state.level.opt))


def chosen(tree):
    """`SOME` of a tree, as one."""
    return {name.replace(".", "/"): named(tree)[name] for name in SOME}


def moved(sizes, gradients, kinds=tuple(optim.RULES)):
    """The parameters after two moves of each rule on a mesh."""
    mesh = mesh_of(sizes)
    params = nested(chosen(small.built(HOPE)[1]))
    periods = jax.tree_util.tree_map_with_path(
        lambda path, _: 2 if ".".join(path_names(path)).startswith(SLOW) else 1, params
    )
    layers = jax.tree_util.tree_map_with_path(
        lambda path, leaf: groups.kind(path, leaf) == "matrices", params
    )
    rules, inputs = {}, {}
    for kind in kinds:
        decay = {"weight_decay": 0.0} if kind == "adam" else {}
        config = OptimizerConfig(rule=kind, learning_rate=RATE, warmup_steps=0, **decay)
        over = mesh if mesh.size > 1 else None
        rules[kind] = optim.build(
            config, total_steps=9, periods=periods, layers=layers, mesh=over
        )
        inputs[kind] = {}
        if config.rule.inputs == "grams":
            inputs[kind] = {"inputs": jax.tree.map(gram, params, layers)}

    lies = sharding.state_shardings(params, params, mesh)
    states = {kind: tx.init(params) for kind, tx in rules.items()}
    there = {
        kind: sharding.state_shardings(state, params, mesh)
        for kind, state in states.items()
    }

    def step(all_params, states, gradients):
        made, after = {}, {}
        for kind, tx in rules.items():
            own = all_params[kind]
            updates, after[kind] = tx.update(
                gradients, states[kind], own, **inputs[kind]
            )
            made[kind] = optax.apply_updates(own, updates)
        return made, after

    whole = dict.fromkeys(rules, lies)
    step = jax.jit(
        step, in_shardings=(whole, there, lies), out_shardings=(whole, there)
    )
    made, states = jax.device_put(
        (dict.fromkeys(rules, params), states), (whole, there)
    )
    for one in gradients:
        made, states = step(made, states, jax.device_put(nested(one), lies))
        jax.block_until_ready(states)
    cut = {
        kind: any(
            not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree)
        )
        for kind, tree in made.items()
    }
    return {kind: named(tree) for kind, tree in made.items()}, cut


def nested(flat):
    """A tree of leaves whose names have slashes between their parts."""
    tree = {}
    for name, leaf in flat.items():
        *above, last = name.split("/")
        at = tree
        for part in above:
            at = at.setdefault(part, {})
        at[last] = leaf
    return tree


def gram(leaf, is_matrix):
    """Of some inputs of a matrix."""
    if not is_matrix:
        return None
    x = np.random.default_rng(5).normal(size=(*leaf.shape[:-2], 6, leaf.shape[-2]))
    return jnp.asarray(np.einsum("...ni,...nj->...ij", x, x) / 6, jnp.float32)


def compare(file):
    """How far meshes are from one device, by name, to `file`."""
    assert len(jax.devices()) == 8
    found = {}
    expected = gradient(ONE)
    for sizes in MESHES[1:]:
        other = gradient(sizes)
        for name, g in expected.items():
            scale = max(np.abs(g).max(), 1e-3)
            found[f"gradient {sizes} {name}"] = np.abs(other[name] - g).max() / scale
    rng = np.random.default_rng(1)
    first = {name.replace(".", "/"): expected[name] for name in SOME}
    second = {
        name: g + np.float32(0.3 * g.std() * rng.normal(size=g.shape))
        for name, g in first.items()
    }
    second = {name: np.float32(g) for name, g in second.items()}
    one, _ = moved(ONE, (first, second))
    start = named(nested(chosen(small.built(HOPE)[1])))
    every = dict.fromkeys(MESHES, tuple(optim.RULES)) | dict.fromkeys(MORE, SPREAD)
    for sizes, kinds in every.items():
        many, cut = moved(sizes, (first, second), kinds)
        for kind in kinds:
            far = [
                np.abs(np.asarray(many[kind][name]) - leaf).max()
                for name, leaf in one[kind].items()
            ]
            found[f"{kind} {sizes}"] = max(far)
            found[f"cut {kind} {sizes}"] = cut[kind]
    for kind, leaves in one.items():
        way = [np.abs(np.asarray(w) - start[n]).max() for n, w in leaves.items()]
        found[f"way {kind}"] = min(way)
    np.savez(file, **found)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("meshes") / "found.npz"
    return saved_by(__name__, f"compare({str(file)!r})", file)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES[1:])
def test_gradients_are_those_of_one_device(found, sizes):
    names = [name for name in found if name.startswith(f"gradient {sizes} ")]
    assert len(names) > 20
    assert {name: found[name] for name in names if not found[name] < 1e-5} == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", optim.RULES)
def test_moves_are_those_of_one_device(found, kind):
    assert found[f"way {kind}"] > 1e-5  # every parameter has moved
    meshes = MESHES + (MORE if kind in SPREAD else ())
    far = {sizes: float(found[f"{kind} {sizes}"]) for sizes in meshes}
    assert max(far.values()) < 1e-5, far
    assert all(found[f"cut {kind} {sizes}"] for sizes in MESHES)  # lies in parts
