"""Which parameters are matrices, in trees of any library, and over which axes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hope_jax import optim
from hope_jax.models import lm, vit, zoo
from hope_jax.optim import groups, matrices
from hope_jax.optim.leaves import path_names


class Linear(NamedTuple):
    """As a library without Flax's names has it."""

    weight: jax.Array
    bias: jax.Array


@pytest.fixture(autouse=True)
def _optax_counts_in_integers():
    with jax.numpy_dtype_promotion("standard"):
        yield


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def found(tree):
    """Of each matrix its name and what it is cut to; of all else the kind."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    out = {}
    for (path, leaf), (kind, axes) in zip(paths, matrices.find(tree), strict=True):
        cut = axes and jax.eval_shape(functools.partial(matrices._cut, axes=axes), leaf)
        out[".".join(path_names(path))] = cut.shape if cut else kind
    return out


TREES = {
    "hand-written": (
        {"w": shape(3, 4), "w_out": shape(4, 2), "b": shape(4), "scale": shape(2, 4)},
        {"w": (3, 4), "w_out": (4, 2), "b": "others", "scale": "others"},
    ),
    "fields": (
        [Linear(shape(4, 3), shape(4)), {"embed": {"weight": shape(9, 4)}}],
        {"0.weight": (4, 3), "0.bias": "others", "1.embed.weight": "embeddings"},
    ),
    "outputs first": (
        {"stem": Linear(shape(8, 3, 2, 2), shape(8, 1, 1)), "b": shape(1)},
        {"stem.weight": (12, 8), "stem.bias": "others", "b": "others"},
    ),
    "a stack": (
        {"l": {"kernel": shape(2, 3, 4), "bias": shape(2, 4)}},
        {"l.kernel": (2, 3, 4), "l.bias": "others"},
    ),
    "beside kernels": (
        {"a": {"kernel": shape(3, 4)}, "w_out": shape(4, 2), "table": shape(9, 2)},
        {"a.kernel": (3, 4), "w_out": (4, 2), "table": "others"},
    ),
    "single channels": (
        {"mix": {"kernel": shape(4, 1, 8), "bias": shape(8)}, "w": shape(2, 2)},
        {"mix.kernel": "convolutions", "mix.bias": "others", "w": (2, 2)},
    ),
    "nothing in it": (
        {"w": shape(0, 4), "v": shape(2, 4)},
        {"w": "others", "v": (2, 4)},
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_matrices_are_told_by_shape_and_role(name):
    tree, expected = TREES[name]
    assert found(tree) == expected


@pytest.mark.parametrize("biased", [True, False])
def test_convolutions_and_attentions_of_flax_are_the_maps_they_are(biased):
    def made():
        rngs = nnx.Rngs(0)
        return nnx.state(
            {
                "stem": nnx.Conv(3, 8, (2, 2), use_bias=biased, rngs=rngs),
                "attention": nnx.MultiHeadAttention(
                    num_heads=2,
                    in_features=6,
                    qkv_features=8,
                    use_bias=biased,
                    rngs=rngs,
                ),
            },
            nnx.Param,
        )

    cuts = {n: c for n, c in found(nnx.eval_shape(made)).items() if c != "others"}
    assert cuts == {
        "stem.kernel": (12, 8),
        "attention.query.kernel": (6, 8),
        "attention.key.kernel": (6, 8),
        "attention.value.kernel": (6, 8),
        "attention.out.kernel": (8, 6),
    }


@pytest.mark.slow
def test_our_own_models_are_grouped_as_in_training():
    names = [name for name in zoo.names() if name.endswith("_tiny")]
    trees = [lm.abstract(zoo.get(name)) for name in names]
    for tree in [*trees, vit.abstract(vit.get("digits"))]:
        kinds = jax.tree.leaves(jax.tree_util.tree_map_with_path(groups.kind, tree))
        assert [kind == "matrices" for kind in kinds] == [
            kind == "matrices" for kind, _ in matrices.find(tree)
        ]
        for leaf, (kind, axes) in zip(
            jax.tree.leaves(tree), matrices.find(tree), strict=True
        ):
            assert kind != "matrices" or axes == (leaf.ndim - 2, leaf.ndim - 1)


RULES = {
    "m3": lambda: optim.scale_by_m3(variant="two_scale", periods=(1,)),
    "adamuon": optim.scale_by_adamuon,
    "shampoo": lambda: optim.scale_by_shampoo(frequency=1),
}


@pytest.mark.parametrize("name", RULES)
def test_a_weight_by_another_name_moves_as_a_kernel_does(key, name):
    """Bit for bit, and not as by Adam; a convolution as its matrix does."""
    tx = optim.with_adamw(RULES[name](), 0.1, weight_decay=0.1)
    draw = lambda *s: jax.random.normal(key, s)  # noqa: E731
    w, conv, b = draw(4, 6), draw(2, 2, 3, 8), draw(8)
    trees = {
        "kernel": {"kernel": w, "stem": {"kernel": conv.reshape(12, 8), "bias": b}},
        "weight": {"weight": w, "stem": {"w": conv, "b": b}},
    }

    @jax.jit
    def step(trees):
        return {n: tx.update(p, tx.init(p), p)[0] for n, p in trees.items()}

    moved = step(trees)
    ours, theirs = moved["kernel"], moved["weight"]
    np.testing.assert_array_equal(theirs["weight"], ours["kernel"])
    flat = theirs["stem"]["w"].reshape(12, 8)
    np.testing.assert_array_equal(flat, ours["stem"]["kernel"])
    adam = -0.1 * (jnp.sign(w) + 0.1 * w)
    assert np.abs(theirs["weight"] - adam).max() > 1e-2
    if name == "m3":
        values = jnp.linalg.svd(-flat / 0.1 - 0.1 * conv.reshape(12, 8))[1]
        assert values.max() / values.min() < 2.5


def test_axes_can_be_said():
    tree = {"odd": jnp.ones((2, 3, 4))}
    axes = {"odd": optax.contrib.MuonDimensionNumbers((0, 2), 1)}
    seen = []

    def look(updates, params):
        seen.append(updates["odd"])
        return updates

    rule = optim.for_matrices(optax.stateless(look), optax.identity(), axes=axes)
    given = {"odd": jnp.arange(24.0).reshape(2, 3, 4)}
    moved, _ = rule.update(given, rule.init(tree), tree)
    assert seen[0].shape == (8, 3)
    np.testing.assert_array_equal(moved["odd"], given["odd"])


@pytest.mark.parametrize("tree", [{"b": jnp.ones(3)}, {"scale": jnp.ones((2, 3))}])
def test_no_matrix_is_an_error(tree):
    with pytest.raises(ValueError, match=r"No matrix was found .* (b|scale) \("):
        optim.with_adamw(optim.scale_by_m3(), 0.1).init(tree)
