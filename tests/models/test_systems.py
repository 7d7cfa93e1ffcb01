"""The systems of our models are no mere description: `core.live` runs them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hope_jax.core.clock import Clock
from hope_jax.core.level import Level
from hope_jax.core.system import Box, Edge, System, live, start
from hope_jax.memory.compose import Tokens, memory_level
from hope_jax.models import lm, systems
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.attention import SlidingWindowConfig
from hope_jax.models.mixers.self_modifying import SelfModifyingTitans
from hope_jax.optim.rules.m3 import M3
from tests.models import small
from tests.models.test_self_modifying import remembering

ROW = 12
CMS = CMSConfig(
    levels=(
        CMSLevel(period=2, rate=0.5),
        CMSLevel(period=4, rate=0.3),
        CMSLevel(period=32, rate=0.2),  # slower than the row
        CMSLevel(period=math.inf),
    ),
    hidden=6,
    pull=0.1,
)


def model(**changes):
    return ModelConfig(
        vocab=7,
        d_model=4,
        layers=1,
        heads=1,
        mixer=SlidingWindowConfig(window=5),
        cms=dataclasses.replace(CMS, **changes),
    )


def text(seed=3):
    tokens = jax.random.randint(jax.random.key(seed), (ROW + 1,), 0, 7)
    return tokens[:-1], tokens[1:]


def lived(graphdef, params, tokens, labels, change=lambda system: system):
    system, starts = systems.living(graphdef, params, ROW)
    system = change(system)
    _, answers = live(system, start(system, starts), (tokens, labels))
    last = system.edges[-1].target
    return jax.vmap(lambda x: systems.head(graphdef, params, x))(answers[last])


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient": "exact"},
        {"gradient": "first_order", "order": "slow_to_fast"},
        {"gradient": "first_order", "reduction": "sum", "rule": M3(), "pull": 0.0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())).split("(")[0],
)
def test_a_continuum_memory_lives_as_its_system_says(changes):
    """Logits, and what the outer level learns from them, of a whole model."""
    config = model(**changes)
    graphdef, params = lm.build(config, jax.random.key(0))
    tokens, labels = text()

    def applied(params):
        logits, _ = lm.apply(
            graphdef, params, tokens[None], labels=labels[None], horizon=ROW
        )
        return logits[0]

    def of(logits_of):
        loss = lambda p: lm.next_token_loss(logits_of(p), labels).mean()  # noqa: E731
        return jax.jit(lambda p: (logits_of(p), jax.grad(loss)(p)))(params)

    logits, gradients = of(lambda p: lived(graphdef, p, tokens, labels))
    expected, expected_gradients = of(applied)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5),
        gradients,
        expected_gradients,
    )

    def still(system):
        """As it is described, but that nothing moves."""
        none = lambda b: b.level._replace(flow=optax.set_to_zero())  # noqa: E731
        boxes = (dataclasses.replace(b, level=none(b)) for b in system.boxes)
        return dataclasses.replace(system, boxes=tuple(boxes))

    unmoved = lived(graphdef, params, tokens, labels, still)
    assert jnp.abs(unmoved - expected).max() > 1e-3


def test_what_lives_is_what_is_described():
    config = model()
    alive, starts = systems.living(*lm.build(config, jax.random.key(0)), ROW)
    described = systems.system(config, ROW)
    boxes = tuple(dataclasses.replace(box, level=None) for box in alive.boxes)
    edges = tuple(dataclasses.replace(edge, through=None) for edge in alive.edges)
    assert System(boxes, edges) == described
    counted = {b.name: b.parameters for b in described.boxes}
    for name in ("CMS 3", "CMS 4"):  # no fast copy inside the row
        assert sum(a.size for a in jax.tree.leaves(starts[name])) <= counted[name]


@pytest.mark.parametrize("config", [small.HOPE, small.HOPE_ATTENTION])
def test_models_that_do_not_live_token_by_token_are_refused(config):
    with pytest.raises(ValueError, match="layers must be 1, the mixer attention"):
        systems.living(*small.built(config), 64)


def test_a_self_modifying_layer_lives_as_its_system_says():
    """Projection memories write their own keys, values and rates, and generate what
    the main memory is told; two levels on two clocks. A convolution of one tap, so that
    what is generated depends on its own token alone."""
    config = remembering(conv=1, targets="projections")
    layer = SelfModifyingTitans(4, 1, config, jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, ROW, 4))
    projection, main = jax.tree.map(lambda w: w[0], layer.starts())  # the only head

    def unit(a):
        return a / jnp.sqrt(jnp.vdot(a, a) + 1e-6)

    def size(a):
        return jnp.sqrt(jnp.vdot(a, a) + 1e-6)

    own = dataclasses.replace(config.memory, chunk=config.projection_chunk)
    single, whole = memory_level(own, 4), memory_level(config.memory, 4)

    def recall(weights, x):
        return size(x) * single.read(weights, _query(x / size(x)))

    def generated(weights, item):
        """What the main memory is told, and what each projection learns."""
        asked = jnp.stack([item["k"], item["v"], item["gates"], item["gates"]])
        k, v, eta, alpha = jax.vmap(recall)(weights, asked)
        k, v, q = (
            jax.nn.silu(a * conv.kernel[0])
            for a, conv in (
                (k, layer.conv_k),
                (v, layer.conv_v),
                (item["q"], layer.conv_q),
            )
        )
        gate = lambda w, b, of: jax.nn.sigmoid(jnp.vdot(w[0], of) + b[0])  # noqa: E731
        eta = config.rate_bound * gate(layer.read_eta, layer.bias_eta, eta)
        alpha = gate(layer.read_alpha, layer.bias_alpha, alpha)
        token = _query(unit(q))._replace(k=unit(k), v=v, eta=eta, alpha=alpha)

        def task(weights, share):
            target = recall(weights, v)
            target = target * jnp.minimum(1.0, size(v) / size(target)) / size(v)
            return token._replace(v=target, eta=share * eta)

        shares = jax.nn.sigmoid(layer.shares[0])
        return token, jax.lax.stop_gradient(jax.vmap(task)(weights, shares))

    def inputs(weights, item):
        _, tasks = generated(weights, item)
        return jax.vmap(single.inputs)(weights, tasks), tasks

    def update(gradient, state, weights, *, context, inputs):
        del context  # the rates come from the memories themselves
        multiplied, tasks = inputs
        return jax.vmap(
            lambda g, s, w, x, t: single.flow.update(g, s, w, inputs=x, context=t)
        )(gradient, state, weights, multiplied, tasks)

    projections = Level(
        init=None,
        read=lambda weights, item: generated(weights, item)[0],
        objective=lambda weights, item: jnp.sum(
            jax.vmap(single.objective)(
                weights, generated(jax.lax.stop_gradient(weights), item)[1]
            )
        ),
        flow=optax.GradientTransformationExtraArgs(jax.vmap(single.flow.init), update),
        clock=Clock(anchor=config.projection_chunk),
        read_at="anchor",
        inputs=inputs,
    )

    def told(function):
        return lambda weights, item: function(weights, item[1]["projections"])

    memory = whole._replace(
        read=told(whole.read),
        objective=told(whole.objective),
        inputs=told(whole.inputs),
        flow=optax.GradientTransformationExtraArgs(
            whole.flow.init,
            lambda g, s, w, *, context, inputs: whole.flow.update(
                g, s, w, context=context[1]["projections"], inputs=inputs
            ),
        ),
    )
    system = System(
        (
            Box("projections", projections.clock, 0, level=projections),
            Box("main memory", memory.clock, 0, level=memory),
        ),
        (Edge("projections", "main memory", "generate"),),
    )
    items = {n: getattr(layer, n)(x)[0] for n in ("k", "v", "gates", "q")}
    states = start(system, {"projections": projection, "main memory": main})
    _, answers = jax.jit(lambda s, i: live(system, s, i))(states, items)
    y = layer.out(layer.norm(answers["main memory"]) * jax.nn.silu(layer.gate(x[0])))

    expected, _ = layer(x)
    np.testing.assert_allclose(y, expected[0], rtol=1e-4, atol=1e-5)


def _query(q):
    """A token that asks only."""
    one = jnp.zeros(())
    return Tokens(k=q, v=q, q=q, eta=one, alpha=one + 1.0, theta=one)


def test_what_a_step_says_of_each_level():
    """Norms of the parameters that are each level's, a rate and half-lives."""
    config = dataclasses.replace(small.HOPE, layers=1)
    _, params = small.built(config)
    gradient = jax.tree.map(jnp.zeros_like, params)
    change = jax.tree.map(jnp.zeros_like, params)

    def put(tree, *path, value):
        *path, last = path
        for name in path:
            tree = tree[name]
        leaf = tree[last]
        tree[last] = jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(value), leaf)

    mlp = ("blocks", "levels", 1, "mlp", "up", "kernel")
    put(gradient, *mlp, value=3.0)
    put(gradient, "blocks", "levels", 1, "norm", "scale", value=4.0)
    put(change, "blocks", "mixer", "main_start", "w1", value=2.0)
    put(change, "embed", "embedding", value=0.5)
    put(params := jax.tree.map(jnp.copy, params), "rates", value=0.0)
    bias = jnp.log(jnp.array([[0.5, 0.75]])) - jnp.log(jnp.array([[0.5, 0.25]]))
    params["blocks"]["mixer"]["bias_alpha"] = jax.tree.map(
        lambda a: bias, params["blocks"]["mixer"]["bias_alpha"]
    )
    said = jax.jit(functools.partial(systems.of_step, config))(gradient, change, params)
    expected = {
        "grad_norm/CMS 2": 5.0,
        "update_norm/memories": 2.0,
        "update_norm/slow weights": 0.5,
        "rate/CMS 1": 0.5,
        "rate/CMS 2": 0.5,
        "half_life/shortest": 1.0,
        "half_life/longest": math.log(0.5) / math.log(0.75),
    }
    parts = [f"CMS {i}" for i in (1, 2, 3)] + [systems.MEMORIES, systems.SLOW]
    zero = {f"{w}/{part}": 0.0 for w in ("grad_norm", "update_norm") for part in parts}
    expected = zero | {"rate/CMS 3": 0.1} | expected
    assert said.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(said[name], value, rtol=1e-4, err_msg=name)
