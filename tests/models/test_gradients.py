"""What the outer level learns of the inner ones, against finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.core.level import Collected
from hope_jax.models import cms, learning, lm
from tests.models import small

LENGTH = 17


def with_gradient(gradient, **changes):
    """With a momentum in its memories, so that every parameter is in use."""
    layer = small.HOPE.mixer
    layer = dataclasses.replace(
        layer, memory=dataclasses.replace(layer.memory, rule="momentum")
    )
    config = dataclasses.replace(small.HOPE, layers=1, mixer=layer, **changes)
    return dataclasses.replace(
        config, cms=dataclasses.replace(config.cms, gradient=gradient)
    )


def start():
    """Parameters of `with_gradient`, the same whatever the gradient."""
    with jax.enable_x64(False):
        return small.built(with_gradient("first_order"))[1]


def loss_of(config):
    """Of the tokens after the first moves, so that the levels' lives matter."""
    graphdef = small.graph(config)

    def loss(params, tokens):
        logits, _ = lm.apply(graphdef, params, tokens[:, :-1], labels=tokens[:, 1:])
        return lm.next_token_loss(logits, tokens[:, 1:])[:, 4:].mean()

    return loss


@functools.cache
def in_float64():
    """Loss and gradient in `exact` mode, compiled in float64, and their arguments."""
    # Flax's RMSNorm mixes its own float32 with float64, which strict promotion refuses.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        config = with_gradient("exact", dtype="float64")
        rng = np.random.default_rng(1)

        def given(path, w):
            # A fresh memory answers with its input, as long as a target may be: a kink.
            start = "_start" in jax.tree_util.keystr(path)
            w = np.asarray(w, np.float64)
            return jnp.asarray(w + 0.1 * rng.standard_normal(w.shape) if start else w)

        params = jax.tree_util.tree_map_with_path(given, start())
        tokens = jnp.asarray(small.some_tokens(length=LENGTH))
        both = jax.jit(jax.value_and_grad(loss_of(config)))
        both = both.lower(params, tokens).compile()
        gradient = jax.device_get(both(params, tokens)[1])
        return lambda *at: both(*at)[0], gradient, jax.device_get(params), tokens


STARTS = {
    **{f"{name} memory": i for i, name in enumerate(("k", "v", "eta", "alpha"))},
    "main memory": None,
    "cms 0": None,
    "cms 1": None,
    "cms 2": None,
    "inner rates": None,
}


def chosen(name, path, leaf):
    """Ones where `leaf` belongs to the initial state called `name`, else zeros."""
    keys = [str(getattr(p, "key", getattr(p, "name", p))) for p in path]
    if name.endswith(" memory") and name != "main memory":
        if "projection_start" not in keys:
            return np.zeros(leaf.shape)
        mask = np.zeros(leaf.shape)
        mask[:, :, STARTS[name]] = 1.0  # layers, heads, memories
        return mask
    mark = {
        "main memory": lambda: "main_start" in keys,
        "inner rates": lambda: "rates" in keys,
    }
    if name.startswith("cms"):
        level = name.split()[1]
        mine = "levels" in keys and keys[keys.index("levels") + 1] == level
    else:
        mine = mark[name]()
    return np.full(leaf.shape, float(mine))


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_every_initial_state_learns_by_finite_differences(float64, name):
    loss, grad, params, tokens = in_float64()
    rng = np.random.default_rng(0)
    direction = jax.tree_util.tree_map_with_path(
        lambda path, w: chosen(name, path, w) * rng.standard_normal(w.shape), params
    )
    step = 1e-5
    at = lambda e: float(  # noqa: E731
        loss(jax.tree.map(lambda w, d: w + e * d, params, direction), tokens)
    )
    numeric = (at(step) - at(-step)) / (2 * step)
    exact = sum(
        float(np.vdot(g, d))
        for g, d in zip(jax.tree.leaves(grad), jax.tree.leaves(direction), strict=True)
    )
    assert abs(exact) > 1e-7
    noise = 2e-10  # of a difference of losses, over twice the step
    np.testing.assert_allclose(exact, numeric, rtol=1e-5, atol=noise)


def first_order_by_definition(config, params, tokens):
    """Moves are constants: found by one reading, then added to the learned weights."""
    graphdef, chunk = small.graph(config), config.base_chunk

    @jax.jit
    def begin(params):
        return lm._begin(nnx.merge(graphdef, params), tokens.shape[0])

    @jax.jit
    def read(params, mixers, fast, tokens, labels):
        model = nnx.merge(graphdef, params)
        logits, mixers, _ = lm._read(
            model, tokens, mixers, fast, aligned=True, learn=True
        )
        return lm.next_token_loss(logits, labels), mixers

    @jax.jit
    def slopes(params, mixers, fast, tokens, labels):
        def objective(fast):
            losses, after = read(params, mixers, fast, tokens, labels)
            return losses.sum(), after

        return jax.grad(objective, has_aux=True)(fast)

    @functools.partial(jax.jit, static_argnums=0)
    def move(i, params, weights, level):
        model, whole = nnx.merge(graphdef, params), config.cms.whole[i]
        rate, start = model.inner_rates()[i], model.blocks.starts()[i]
        return cms.move(config.cms, whole, rate, start, weights, level, axis=1)

    def part(n):
        at = slice(n * chunk, (n + 1) * chunk)
        return tokens[:, at], tokens[:, at.start + 1 : at.stop + 1]

    begun = begin(params)
    mixers, start, _ = begun.blocks
    fast, levels, moves = start, list(begun.levels), []
    for n in range((LENGTH - 2) // chunk):
        gradient, mixers = slopes(params, mixers, fast, *part(n))
        for i, g in enumerate(gradient):
            more = jax.tree.map(jnp.add, levels[i].learned, Collected(g, None))
            levels[i] = levels[i]._replace(learned=more)
        for i, period in enumerate(config.fast_periods):
            if (n + 1) * chunk % period == 0:
                weights, levels[i] = move(i, params, fast[i], levels[i])
                fast = (*fast[:i], weights, *fast[i + 1 :])
        moves.append(jax.tree.map(jnp.subtract, fast, start))

    def loss(params):
        mixers, start, _ = begin(params).blocks
        losses = []
        for n in range((LENGTH - 1) // chunk):
            fast = start
            if n:
                fast = jax.tree.map(jnp.add, start, moves[n - 1])
            some, mixers = read(params, mixers, fast, *part(n))
            losses.append(some)
        return jnp.concatenate(losses, axis=1)[:, 4:].mean()

    return jax.grad(loss)(params)


@pytest.mark.slow
def test_first_order_is_its_definition():
    config = with_gradient("first_order")
    params, tokens = start(), jnp.asarray(small.some_tokens(length=LENGTH))
    grad = jax.jit(jax.grad(loss_of(config)))(params, tokens)
    want = first_order_by_definition(config, params, tokens)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grad), jax.tree.leaves(want), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if "rates" in name:  # a constant move still has a rate: d move = -g d rate
            assert np.abs(a).max() > 0
            continue
        assert np.abs(a).max() > 0, name
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["hope", "hybrid"])
def test_a_chunk_blames_levels_through_every_mixer_but_the_first(name):
    """A gradient of the fast weights alone takes no pullback through the mixer that
    reads the embedding, and all through those that read what levels say."""
    config = small.HOPE if name == "hope" else small.HYBRID
    graphdef, params = small.built(config)
    blocks = jax.jit(lm._layers_first)(small.start(config)).blocks
    tokens = jnp.asarray(small.some_tokens(length=config.base_chunk + 1))
    chunk = lm._Chunk(
        tokens[:, :-1], tokens[:, 1:], config.bare(blocks.mixer), blocks.fast
    )

    @jax.jit
    def both(params, chunk):
        model = nnx.merge(graphdef, params)
        model.learning, model.losses = learning.resolve(config, True), False
        learned, _ = lm._blame(*nnx.split(model, nnx.Param), chunk)

        def objective(fast):
            mixers, how = config.full(chunk.mixers), {"aligned": config.nests}
            read = lm._read(
                model, chunk.tokens, mixers, fast, learn=model.learning, **how
            )
            return lm.next_token_loss(read.said, chunk.labels).sum()

        return [one.gradient for one in learned], jax.grad(objective)(chunk.fast)

    found, want = both(params, chunk)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(want), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert np.abs(b).max() > 0, where
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=where)


@pytest.mark.slow
def test_none_gives_the_fast_levels_nothing():
    config = with_gradient("none")
    grad = jax.jit(jax.grad(loss_of(config)))
    grad = grad(start(), jnp.asarray(small.some_tokens(length=LENGTH)))
    for path, g in jax.tree_util.tree_leaves_with_path(grad):
        keys = [str(getattr(p, "key", getattr(p, "name", p))) for p in path]
        inside = "rates" in keys or (
            "mlp" in keys and keys[keys.index("levels") + 1] in ("0", "1", "2")
        )
        assert (np.abs(g).max() == 0) == inside, keys
