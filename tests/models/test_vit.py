"""The vision transformer: its sizes, what it knows of places, every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import vit
from hope_jax.models.capture import dense_kernels
from hope_jax.models.vit import ViTConfig
from hope_jax.optim.capture import value_and_dgd_gradients
from hope_jax.optim.groups import path_names

TINY = ViTConfig(
    image=4, channels=3, patch=2, classes=5, d_model=8, layers=2, heads=2, hidden=12
)


@functools.cache
def model(config=TINY):
    """With a head and places of some size, unlike at the start."""
    graphdef, params = vit.build(config, jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return graphdef, jax.tree.unflatten(tree, moved)


@functools.cache
def reader(config=TINY):
    return jax.jit(functools.partial(vit.apply, model(config)[0]))


def pictures(rows=3, config=TINY):
    shape = (rows, config.image, config.image, config.channels)
    return jax.random.uniform(jax.random.key(3), shape)


def by_name(params):
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(path_names(path)): leaf for path, leaf in flat}


def expected_count(c):
    norm, places = 2 * c.d_model, (c.image // c.patch) ** 2 * c.d_model
    attention = 4 * c.d_model**2 + 4 * c.d_model
    mlp = 2 * c.d_model * c.hidden + c.hidden + c.d_model
    embed = c.patch**2 * c.channels * c.d_model + c.d_model
    head = c.d_model * c.classes + c.classes
    places = places if c.position == "learned" else 0
    return embed + places + c.layers * (2 * norm + attention + mlp) + norm + head


@pytest.mark.parametrize("config", [TINY, *vit.SIZES.values()], ids=lambda c: c.d_model)
def test_parameters_are_as_many_as_the_formula_says(config):
    assert vit.count_parameters(config) == expected_count(config)


def test_sizes_are_those_of_the_paper():
    """Weights before the head: the paper prints 86M for patches of 16, MLPs of 3072."""
    for name, hidden, millions in (("s16", 1536, 21.6), ("b16", 3072, 85.6)):
        config = vit.get(name, classes=1)
        assert config.hidden == hidden and config.patch == 16
        assert vit.count_parameters(config) / 1e6 == pytest.approx(millions, abs=0.1)
    assert vit.get("s16", classes=10_450).classes == 10_450


def test_logits_are_small_at_the_start():
    graphdef, params = vit.build(TINY, jax.random.key(0))
    assert 0 < np.abs(reader()(params, pictures())).max() < 0.5
    logits = reader()(model()[1], pictures())
    assert logits.shape == (3, 5) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all() and np.std(logits) > 0.01


def test_patches_are_squares_row_by_row():
    image = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 4, 3)
    found = vit.patches(image, 2)
    np.testing.assert_array_equal(found[1, 2], image[1, 2:, :2].ravel())
    np.testing.assert_array_equal(found[0, 1], image[0, :2, 2:].ravel())


def shuffled(images):
    """The same patches in other places."""
    quarters = images.reshape(-1, 2, 2, 2, 2, 3)
    return quarters[:, ::-1, :, ::-1].reshape(images.shape)


def test_only_positions_tell_where_a_patch_is():
    _, params = model()
    placed = reader()(params, pictures()) - reader()(params, shuffled(pictures()))
    assert np.abs(placed).max() > 1e-3
    blank = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0.0 * leaf if "position" in path_names(path) else leaf,
        params,
    )
    np.testing.assert_allclose(
        reader()(blank, pictures()), reader()(blank, shuffled(pictures())), atol=1e-5
    )


def test_sincos_tells_every_place_apart():
    table = np.asarray(vit.sincos(4, 16))
    near = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert near[~np.eye(16, dtype=bool)].min() > 0.1
    np.testing.assert_allclose(table[1, :8], table[0, :8])  # one row, two columns
    np.testing.assert_allclose(table[4, 8:], table[0, 8:])
    config = dataclasses.replace(TINY, position="sincos")
    _, params = model(config)
    assert not any("position" in name for name in by_name(params))
    logits = reader(config)(params, pictures())
    assert np.abs(logits - reader(config)(params, shuffled(pictures()))).max() > 1e-3


def test_a_row_does_not_see_the_others():
    _, params = model()
    images = pictures()
    changed = images.at[1].set(0.0)
    before, after = reader()(params, images), reader()(params, changed)
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-3


def loss(graphdef, params, images, labels):
    logits = vit.apply(graphdef, params, images)
    return -jnp.mean(
        jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
    )


def test_every_parameter_learns_and_dgd_sees_the_inputs_of_every_layer():
    graphdef, params = model()
    layers = dense_kernels(graphdef, params)
    chosen = {name for name, is_dense in by_name(layers).items() if is_dense}
    assert chosen == {name for name in by_name(params) if name.endswith("kernel")}
    labels = jnp.array([0, 1, 2])

    @jax.jit
    def both(params):
        objective = functools.partial(loss, graphdef)
        args = (params, pictures(), labels)
        _, gradients, inputs = value_and_dgd_gradients(objective, *args, layers=layers)
        return jax.grad(objective)(*args), gradients, inputs

    plain, gradients, inputs = map(by_name, both(params))
    for name, gradient in plain.items():
        assert np.abs(gradient).max() > 1e-5, name
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-6, err_msg=name)
        if not name.startswith(("embed", "head", "norm", "position")):
            by_layer = np.abs(gradient).reshape(TINY.layers, -1).max(axis=1)
            assert (by_layer > 1e-6).all(), name
    flat = np.asarray(vit.patches(2 * pictures() - 1, 2)).reshape(-1, 12)
    np.testing.assert_allclose(
        inputs["embed.kernel"], flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5
    )
    assert inputs["blocks.up.kernel"].shape == (2, 8, 8)


def test_bfloat16_computes_the_same_and_keeps_float32_outside():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    graphdef, params = model(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention needs it
        args = (params, pictures(), jnp.array([0, 1, 2]))
        jaxpr = str(jax.make_jaxpr(functools.partial(loss, graphdef))(*args))
        gradients = jax.jit(jax.grad(functools.partial(loss, graphdef)))(*args)
        logits = reader(config)(params, pictures())
    assert "bf16[" in jaxpr and logits.dtype == jnp.float32
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    np.testing.assert_allclose(logits, reader()(model()[1], pictures()), atol=0.2)


def test_compiles_once():
    run = jax.jit(functools.partial(vit.apply, model()[0]))
    for seed in range(2):
        run(vit.build(TINY, jax.random.key(seed))[1], pictures() + seed)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"patch": 3}, r"image \(4\) must be a multiple of patch \(3\)"),
        ({"heads": 3}, r"d_model \(8\) must be a multiple of heads \(3\)"),
        ({"position": "rotary"}, "position must be"),
        ({"position": "sincos", "d_model": 6}, "multiple of 4"),
        ({"dtype": "float16"}, "dtype must be one of"),
    ],
)
def test_a_bad_config_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(TINY, **changes)


def test_a_wrong_image_and_a_wrong_name_are_named():
    graphdef, params = model()
    with pytest.raises(ValueError, match=r"\[B, 4, 4, 3\].*got \[2, 5, 5, 3\]"):
        vit.apply(graphdef, params, jnp.zeros((2, 5, 5, 3)))
    with pytest.raises(ValueError, match="Did you mean 's16'"):
        vit.get("s-16")
