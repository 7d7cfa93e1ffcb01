"""DGD in networks: what each matrix was multiplied with, against loops over tokens."""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from hope_jax.models import lm
from hope_jax.models.capture import dense_kernels
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.layers import Dense
from hope_jax.optim import capture
from hope_jax.optim.capture import dgd_gradients, value_and_dgd_gradients
from hope_jax.optim.rules.dgd import dgd
from tests.models import small

ETA = 0.7


def network(key):
    """Two layers, biases, and 2 rows of 3 tokens with their targets."""
    keys = jax.random.split(key, 4)
    params = {
        "first": jax.random.normal(keys[0], (4, 5)),
        "bias": jnp.full((5,), 0.1, jnp.float32),
        "second": jax.random.normal(keys[1], (5, 2)),
    }
    x = jax.random.normal(keys[2], (2, 3, 4))
    return params, (x, jax.random.normal(keys[3], (2, 3, 2)))


def squares(params, batch):
    x, target = batch
    hidden = jnp.tanh(x @ params["first"] + params["bias"][None, None])
    return 0.5 * jnp.mean(jnp.sum((hidden @ params["second"] - target) ** 2, axis=-1))


# One program instead of one for each of their many small operations.
captured = jax.jit(
    functools.partial(value_and_dgd_gradients, squares), static_argnames="reduce"
)


def by_token(params, batch):
    """For each matrix a list of (x_t, delta_t), the gradient of a token's own loss."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    pairs = {"first": [], "second": []}
    x, target = (np.asarray(a, np.float64).reshape(6, -1) for a in batch)
    for x_t, target_t in zip(x, target, strict=True):
        h = np.tanh(x_t @ params["first"] + params["bias"])
        delta = h @ params["second"] - target_t
        pairs["second"].append((h, delta))
        pairs["first"].append((x_t, (params["second"] @ delta) * (1 - h**2)))
    return pairs


def one_step(rule, params, gradients, inputs):
    updates, _ = rule.update(gradients, rule.init(params), params, inputs=inputs)
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_inputs_are_outer_products_summed_over_tokens(key, reduce):
    params, batch = network(key)
    loss, gradients, inputs = captured(params, batch, reduce=reduce)
    assert inputs["bias"] is None
    for name, pairs in by_token(params, batch).items():
        gram = sum(np.outer(x_t, x_t) for x_t, _ in pairs)
        gram = gram / len(pairs) if reduce == "mean" else gram
        np.testing.assert_allclose(inputs[name], gram, rtol=1e-4, atol=1e-5)
    expected, plain = jax.value_and_grad(squares)(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        gradients,
        plain,
    )


@pytest.mark.parametrize("retention", [1.0, 0.8])
def test_a_step_on_a_network_is_the_sum_over_tokens(key, retention):
    params, batch = network(key)
    _, gradients, inputs = captured(params, batch, reduce="mean")

    @jax.jit
    def moves(*args):
        rules = {
            explicit: dgd(ETA, explicit=explicit, retention=retention, input_axis=-2)
            for explicit in (True, False)
        }
        return {explicit: one_step(rule, *args) for explicit, rule in rules.items()}

    moved = moves(params, gradients, inputs)
    for name, pairs in by_token(params, batch).items():
        w = np.asarray(params[name], np.float64)
        step = retention * w
        left, right = np.eye(len(w)), retention * w  # of the minimum over W
        for x_t, delta_t in pairs:
            step = step - ETA / 6 * np.outer(x_t, x_t @ w + delta_t)
            left = left + ETA / 6 * np.outer(x_t, x_t)
            right = right - ETA / 6 * np.outer(x_t, delta_t)
        np.testing.assert_allclose(moved[True][name], step, rtol=1e-4, atol=1e-5)
        solved = np.linalg.solve(left, right)
        np.testing.assert_allclose(moved[False][name], solved, rtol=1e-4, atol=1e-5)
    for explicit in (True, False):  # no inputs: a plain step
        expected = params["bias"] - ETA * gradients["bias"]
        np.testing.assert_allclose(moved[explicit]["bias"], expected, rtol=1e-6)


def test_token_rate_is_the_mean_of_each_tokens_own_step(key):
    """Equation 57 for each token by itself, its step normed by its own input."""
    params, batch = network(key)
    _, gradients, inputs = captured(params, batch, reduce="mean", token_rate=ETA)
    rule = dgd(ETA, explicit=True, input_axis=-2)
    moved = one_step(rule, params, gradients, inputs)
    for name, pairs in by_token(params, batch).items():
        w = np.asarray(params[name], np.float64)
        steps = []
        for x_t, delta_t in pairs:
            eta = ETA / (1 + ETA * x_t @ x_t)
            steps.append(w - eta * np.outer(x_t, x_t @ w + delta_t))
        np.testing.assert_allclose(moved[name], np.mean(steps, 0), rtol=1e-4, atol=1e-5)


def test_one_token_by_its_matrix_is_one_token_by_its_vector(key):
    x = jax.random.normal(key, (4,))
    w, g = jnp.ones((3, 4)), jnp.outer(jnp.arange(3.0), x)
    for explicit in (True, False):
        rule = dgd(2.0, explicit=explicit, retention=0.9)
        vector = one_step(rule, w, g, x)
        matrix = one_step(rule, w, g, jnp.outer(x, x))
        np.testing.assert_allclose(matrix, vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e20])
def test_finite_at_any_scale_of_gradients_and_many_inputs(key, size):
    x = jax.random.normal(key, (64, 8)) * 1e3
    w = jnp.ones((8, 3))
    rule = dgd(10.0, input_axis=-2)
    moved = one_step(rule, w, jnp.full_like(w, size), x.T @ x)
    assert jnp.all(jnp.isfinite(moved))
    # Of rank one and large: positive up to rounding only.
    square = 1e9 * jnp.ones((8, 8))
    assert jnp.all(jnp.isfinite(one_step(rule, w, jnp.full_like(w, size), square)))


def test_proximal_steps_are_stable_where_explicit_ones_are_not(key):
    x = 5.0 * jax.random.normal(key, (32, 6))
    w = jnp.ones((6, 2))
    reached = {}
    for explicit in (False, True):
        rule, moved = dgd(1.0, explicit=explicit, input_axis=-2), w
        step = jax.jit(functools.partial(one_step, rule))
        for _ in range(20):
            moved = step(moved, jnp.zeros_like(w), x.T @ x / 32)
        reached[explicit] = float(jnp.abs(moved).max())
    assert reached[False] < 1.0 < 1e6 < reached[True]


def test_layers_of_ones_own(key):
    """`w @ x` under vmap, a scan over layers, recomputation, a shared matrix."""
    w = jax.random.normal(key, (3, 4, 4))
    x = jax.random.normal(jax.random.key(1), (5, 4))

    def own(w, x):
        @jax.checkpoint
        def layer(x, w):
            return jnp.tanh(jax.vmap(lambda x_t: w @ x_t)(x)), x

        x, seen = jax.lax.scan(layer, x, w)
        return jnp.sum(x), seen

    rule = dict(input_axis=-1, has_aux=True)
    run = jax.jit(lambda w, x: value_and_dgd_gradients(own, w, x, **rule))
    (_, seen), gradients, inputs = run(w, x)
    mean = np.einsum("lti,ltj->lij", seen, seen) / 5
    np.testing.assert_allclose(inputs, mean, rtol=1e-4, atol=1e-5)
    plain, _ = jax.jit(jax.grad(own, has_aux=True))(w, x)
    np.testing.assert_allclose(gradients, plain, rtol=1e-4, atol=1e-6)

    def twice(w, x):
        return jnp.sum(capture.dot(jnp.tanh(capture.dot(x, w)), w))

    _, inputs = dgd_gradients(twice, w[0], x, reduce="sum")
    h = np.tanh(x @ w[0])
    np.testing.assert_allclose(inputs, x.T @ x + h.T @ h, rtol=1e-4, atol=1e-5)
    with_columns = dgd_gradients(lambda w, x: jnp.sum(w @ x.T), w[0], x, input_axis=-1)
    np.testing.assert_allclose(with_columns[1], x.T @ x / 5, rtol=1e-4, atol=1e-5)


def test_a_gradient_inside_the_loss_hides_nothing(key):
    """Inputs of the forward pass, though an inner level differentiates through it."""
    w = jax.random.normal(key, (4, 3))
    x = jax.random.normal(jax.random.key(1), (5, 4))

    def loss(w, x):
        def inner(fast):
            return jnp.sum(jnp.tanh((x * fast[None]) @ w) ** 2)

        fast = jnp.ones((4,))
        return inner(fast) + jnp.sum(jax.grad(inner)(fast) ** 2)

    @jax.jit
    def both(w, x):
        return *dgd_gradients(loss, w, x, reduce="sum"), jax.grad(loss)(w, x)

    gradients, inputs, plain = both(w, x)
    np.testing.assert_allclose(inputs, 2 * x.T @ x, rtol=1e-4, atol=1e-4)  # two calls
    np.testing.assert_allclose(gradients, plain, rtol=1e-3, atol=1e-3)


def test_bfloat16_adds_up_in_float32():
    x = jnp.ones((1000, 2), jnp.bfloat16)
    w = jnp.ones((2, 2), jnp.bfloat16)
    gradients, inputs = dgd_gradients(
        lambda w: jnp.sum((x @ w).astype(jnp.float32)), w, reduce="sum"
    )
    assert inputs.dtype == jnp.float32 and gradients.dtype == jnp.bfloat16
    np.testing.assert_array_equal(inputs, np.full((2, 2), 1000.0))
    for given in (inputs, x[0]):
        rule = dgd(0.1, input_axis=-2)
        update, _ = rule.update(gradients, rule.init(w), w, inputs=given)
        assert update.dtype == jnp.bfloat16 and jnp.all(jnp.isfinite(update))


def lm_loss(graphdef, horizon=None):
    def loss(params, tokens):
        given, labels = tokens[:, :-1], tokens[:, 1:]
        logits, _ = lm.apply(graphdef, params, given, labels=labels, horizon=horizon)
        return jnp.mean(lm.next_token_loss(logits, labels))

    return loss


def layer_inputs(graphdef, params, tokens):
    """What each nnx.Linear of each layer is called with, layers one after another."""
    model, seen = nnx.merge(graphdef, params), {}

    def noting(x, kernel, dimensions, *, where, **options):
        seen.setdefault(where, []).append(x.reshape(-1, x.shape[-1]))
        return jax.lax.dot_general(x, kernel, dimensions, **options)

    structure, stacked = nnx.split(model.blocks, nnx.Param)
    x = model.embed(tokens) * model.config.d_model**0.5
    for i in range(model.config.layers):
        block = nnx.merge(structure, jax.tree.map(lambda a, i=i: a[i], stacked))
        for path, module in nnx.iter_modules(block):
            if isinstance(module, nnx.Linear):
                where = (*map(str, path), "kernel")
                module.dot_general = functools.partial(noting, where=where)
        x, _ = block(x)
    return {".".join(where): jnp.stack(layers) for where, layers in seen.items()}


@pytest.mark.slow
def test_every_dense_layer_of_a_transformer(key):
    graphdef, params = small.built(small.TRANSFORMER)
    tokens = small.some_tokens(length=6)
    layers = dense_kernels(graphdef, params)
    rule = dgd(0.1, input_axis=-2)

    @jax.jit
    def everything(params, tokens):
        loss = lm_loss(graphdef)
        gradients, inputs = dgd_gradients(loss, params, tokens, layers=layers)
        moved = one_step(rule, params, gradients, inputs)
        seen = layer_inputs(graphdef, params, tokens[:, :-1])
        return gradients, jax.grad(loss)(params, tokens), inputs, moved, seen

    gradients, plain, inputs, moved, seen = everything(params, tokens)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradients,
        plain,
    )
    assert len(seen) == 5  # qkv, out, gate, up, down
    for where, x in seen.items():
        leaf, after, w, g = (t["blocks"] for t in (inputs, moved, params, gradients))
        for name in where.split("."):
            name = int(name) if name.isdigit() else name
            leaf, after, w, g = leaf[name], after[name], w[name], g[name]
        gram = np.einsum("lti,ltj->lij", x, x) / x.shape[1]
        np.testing.assert_allclose(leaf[...], gram, rtol=1e-3, atol=1e-4)
        forgotten = np.eye(gram.shape[-1]) + 0.1 * gram
        expected = np.linalg.solve(forgotten, w[...] - 0.1 * g[...])
        np.testing.assert_allclose(after[...], expected, rtol=1e-3, atol=1e-4)
    assert len(jax.tree.leaves(inputs)) == 5  # norms and the embedding have none


@pytest.mark.slow
def test_a_model_that_learns_while_it_reads(key):
    """Through scans and gradients of its own; levels that move in a row have none."""
    levels = (CMSLevel(period=4, rate=0.5), CMSLevel(period=128))
    config = dataclasses.replace(
        small.HOPE_ATTENTION, layers=1, cms=CMSConfig(levels=levels, hidden=6)
    )
    graphdef, params = small.built(config)
    tokens = small.some_tokens(length=9)
    layers = dense_kernels(graphdef, lm.abstract(config), horizon=8)
    loss = lm_loss(graphdef, horizon=8)

    @jax.jit
    def both(params, tokens):
        captured = dgd_gradients(loss, params, tokens, layers=layers)
        return *captured, jax.grad(loss)(params, tokens)

    gradients, inputs, plain = both(params, tokens)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        gradients,
        plain,
    )
    chain, mixer = inputs["blocks"]["levels"], inputs["blocks"]["mixer"]
    assert jax.tree.leaves(chain[0]) == []  # it moves inside
    assert len(jax.tree.leaves(chain[1])) == 3
    x = nnx.merge(graphdef, params).embed(tokens[:, :-1]) * config.d_model**0.5
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)  # scale 1 at first
    expected = np.einsum("bti,btj->ij", x, x) / 16
    np.testing.assert_allclose(mixer["qkv"]["kernel"][...][0], expected, 1e-3, 1e-4)


def test_a_dense_layer_with_a_bias_is_linear(key):
    layer = Dense(3, 2, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.array([1.0, -2.0])
    graphdef, params = nnx.split(layer, nnx.Param)
    x = jax.random.normal(key, (4, 3))
    taken = capture.capture(params, dense_kernels(graphdef, params))
    np.testing.assert_allclose(nnx.merge(graphdef, taken)(x), layer(x), rtol=1e-6)


def test_misuse_is_named(key):
    params, batch = network(key)
    with pytest.raises(ValueError, match="reduce must be .* got 'max'"):
        dgd_gradients(squares, params, batch, reduce="max")
    with pytest.raises(ValueError, match="input_axis must be .* got 1"):
        dgd_gradients(squares, params, batch, input_axis=1)
    with pytest.raises(TypeError, match="asked for of axis -1"):
        dgd_gradients(squares, params, batch, input_axis=-1)
    with pytest.raises(ValueError, match=r"leaf of shape \(5,\), which is no matrix"):
        dgd_gradients(
            squares,
            params,
            batch,
            layers=lambda p: jax.tree.map(bool, dict.fromkeys(p, 1)),
        )
    w = params["first"]
    with pytest.raises(TypeError, match="asked for of axis -2"):
        dgd_gradients(lambda w: jnp.sum(w @ jnp.ones((5,))), w)
    with pytest.raises(TypeError, match="can only be multiplied.*indexed with 0"):
        dgd_gradients(lambda w: jnp.sum(w[0]), w)
    with pytest.raises(AttributeError, match="can only be multiplied.*'mean'"):
        dgd_gradients(lambda w: w.mean(), w)
    with pytest.raises(TypeError, match=r"must have 2 axes .* shape \(1, 4, 5\)"):
        dgd_gradients(lambda w: jnp.sum(jnp.ones((4,)) @ w), w[None])
    with pytest.raises(TypeError, match="a vector or columns"):
        dgd_gradients(lambda w: jnp.sum(w @ batch[0]), w.T, input_axis=-1)
    with pytest.raises(ValueError, match=r"or the square matrix of several"):
        one_step(dgd(0.1), w, w, jnp.ones((4, 4)))


def test_a_loss_may_also_use_the_plain_matrix(key):
    params, batch = network(key)

    def loss(params, batch):
        decay = sum(jnp.sum(w**2) for w in jax.tree.leaves(capture.plain(params)))
        return squares(params, batch) + decay

    gradients, _ = dgd_gradients(loss, params, batch)
    expected = jax.grad(loss)(params, batch)
    np.testing.assert_allclose(gradients["first"], expected["first"], rtol=1e-4)


def test_examples_in_docstrings():
    results = doctest.testmod(capture)
    assert results.attempted > 0 and results.failed == 0


class Foreign(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x)


def foreign(kind):
    """A layer of Flax as `(loss, params)`."""
    x = jnp.ones((2, 4))
    if kind == "linen.Dense":
        params = Foreign().init(jax.random.key(0), x)
        return lambda params: jnp.sum(Foreign().apply(params, x)), params
    if kind == "nnx.Embed":
        layer, x = nnx.Embed(5, 4, rngs=nnx.Rngs(0)), jnp.arange(3)
    else:
        layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer, nnx.Param)
    return lambda params: jnp.sum(nnx.merge(graph, params)(x)), params


@pytest.mark.parametrize("kind", ["nnx.Linear", "nnx.Embed", "linen.Dense"])
def test_layers_that_cannot_be_captured_say_what_can(kind):
    loss, params = foreign(kind)
    with pytest.raises((TypeError, AttributeError), match="capture.dot.*layers.Dense"):
        dgd_gradients(loss, params)
