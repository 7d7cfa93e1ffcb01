"""Products with a memory in bfloat16: which they are, and what they cost in digits."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.kernels.chunk import piece
from hope_jax.memory.architecture import narrow_product
from hope_jax.memory.compose import MemoryConfig
from hope_jax.memory.state import begin_memory
from hope_jax.models.mixers.self_modifying import MLP, SelfModifyingConfig
from tests.kernels.test_select import some_tokens, some_weights, value_and_pullback

WIDTH, CHUNK = 6, 8  # no product of the memory has the shape of one of keys with keys
MEMORIES = {
    "output law": vars(MLP),
    "mlp, momentum, delta": dict(architecture="mlp", toward="start"),
    "matrix, exact, momentum": dict(architecture="linear", gradient="exact"),
    "matrix, dot": dict(
        architecture="linear", gradient="exact", bias="dot", rule="gd", toward="start"
    ),
    "gated mlp, window": dict(architecture="gated_mlp", window=2, dgd="none"),
}


def of(name, products):
    return MemoryConfig(**{**MEMORIES[name], "products": products, "chunk": CHUNK})


def life(config):
    def live(start, tokens):
        state, y = piece(config, begin_memory(config, start), tokens, start=start)
        return state.weights, state.momentum, y

    return live


def products(jaxpr):
    """The types of the factors, and the shapes of these and of the product."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            avals = [v.aval for v in (*equation.invars, *equation.outvars)]
            yield {a.dtype.name for a in avals[:2]}, [a.shape[-2:] for a in avals]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_percent_of_values_and_pullbacks(name):
    config = of(name, "bfloat16")
    given = some_weights(0, config), some_tokens(0, CHUNK)
    narrow, whole = (
        jax.jit(functools.partial(value_and_pullback, life(of(name, p))))(*given)
        for p in ("bfloat16", "float32")
    )
    sizes = jax.tree.map(
        lambda a, b: np.linalg.norm(a - b) / (1e-3 + np.linalg.norm(b)), narrow, whole
    )
    value, pullback = map(jax.tree.leaves, sizes)
    assert 1e-4 < max(value) < 1e-2
    assert 1e-4 < max(pullback) < 2e-2


@pytest.mark.parametrize("name", MEMORIES)
def test_products_of_tokens_with_tokens_alone_are_float32(name):
    config = of(name, "bfloat16")
    start, tokens = some_weights(0, config), some_tokens(0, CHUNK)
    made = list(products(jax.make_jaxpr(life(config))(start, tokens).jaxpr))
    pairs = CHUNK + config.window - 1
    tokenwise = lambda shape: set(shape) <= {CHUNK, pairs}  # noqa: E731
    for types, shapes in made:
        among = any(map(tokenwise, shapes))
        assert types == {"float32" if among else "bfloat16"}, shapes
    ends = [product for _, (*_, product) in made]
    assert all(w.shape in ends for w in start.values())


def test_what_is_generated_has_the_precision_of_what_is_learned():
    """A layer whose every product with its memories, `[*, 24]` or `[*, 6]`, is one."""
    memory = MemoryConfig(**{**vars(MLP), "products": "bfloat16", "chunk": 4})
    config = SelfModifyingConfig(memory=memory, projection_chunk=4)
    layer = config.build(WIDTH, 1, jnp.float32, rngs=nnx.Rngs(0))
    seen = jnp.zeros((1, 1, 4, WIDTH))
    weights = layer.initial_state(1).main.weights
    recall = jax.make_jaxpr(jax.vmap(jax.vmap(layer._recall)))(weights, seen)
    assert [types for types, _ in products(recall.jaxpr)] == [{"bfloat16"}] * 2


def test_gradients_of_a_narrow_product():
    w, x = jax.random.normal(jax.random.key(0), (2, 5, 5))
    w, x, error = w[:3], x[None], jnp.ones((1, 5, 3))
    narrow = jax.vjp(narrow_product, w, x)[1](error)
    whole = jax.vjp(lambda w, x: jnp.einsum("...k,vk->...v", x, w), w, x)[1](error)
    for a, b in zip(narrow, whole, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "changes",
    [
        dict(architecture="vector"),
        dict(rule="adam", dgd="none"),
        dict(retention="norm_clamp", dgd="none"),
        dict(rule="newton", architecture="linear", dgd="none", gradient="exact"),
    ],
)
def test_memories_that_would_not_read_it_refuse_it(changes):
    with pytest.raises(ValueError, match="products='bfloat16' is about"):
        MemoryConfig(**changes, products="bfloat16")
