"""Every optimizer in the training loops of others: the conformance suite's members.

Each loop moves a small network by all of them, in one program, and must come to where a
loop over plain dictionaries comes. What fails while it is traced is kept by name.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

from hope_jax import optim
from tests.chosen import asked
from tests.optim.test_conformance import TABLE

STEPS = 3
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)


def standard(function):
    """With JAX as its users have it, not as strict as it is in other tests."""

    @functools.wraps(function)
    def wrapped(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args)

    return wrapped


def rule_of(name):
    """The member, for a whole network."""
    rule = TABLE[name].make()
    if TABLE[name].matrices:
        return optim.for_matrices(rule, optax.sgd(0.1))
    return rule


def start():
    draw = np.random.default_rng(0).normal

    def leaf(*shape):
        return jnp.asarray(draw(size=shape), jnp.float32)

    first = {"bias": leaf(6), "kernel": leaf(4, 6)}
    return {"first": first, "second": {"kernel": leaf(6, 4)}}


def loss(bias, first, second):
    return jnp.mean((jnp.tanh(X @ first + bias) @ second) ** 2)


def extra(name, tree):
    """What the member takes besides gradients, for a tree of plain arrays."""
    kind = TABLE[name].inputs
    if kind is None:
        return {}

    def one(leaf):
        if leaf.ndim < 2:
            return None
        eye = jnp.eye(leaf.shape[-2], dtype=jnp.float32)
        x = eye if kind == "gram" else jnp.sum(eye[:1], axis=0)
        return jnp.broadcast_to(x, leaf.shape[:-2] + x.shape)

    return {"inputs": jax.tree.map(one, tree)}


class Loop(NamedTuple):
    """A training loop as others write it.

    Attributes:
      begin: `rule -> state`.
      advance: `(name, state) -> state`, one step.
      read: `state -> parameters`, whose first leaves are those of `start`.
      extra: it hands on what a rule takes besides gradients.
      plain: its states are arrays alone, which one program begins for all members.
    """

    begin: Callable[[Any], Any]
    advance: Callable[[str, Any], Any]
    read: Callable[[Any], Any]
    extra: bool = True
    plain: bool = False


def by_hand(params, loss_of):
    """`jax.grad`, `update` and `apply_updates`, over any tree."""

    def begin(rule):
        return params, rule.init(params)

    def advance(name, state):
        params, opt = state
        gradients = jax.grad(loss_of)(params)
        updates, opt = rule_of(name).update(
            gradients, opt, params, **extra(name, params)
        )
        return optax.apply_updates(params, updates), opt

    return Loop(begin, advance, lambda state: state[0], plain=True)


def dicts():
    return by_hand(start(), dicts_loss)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("bias", "weight"), meta_fields=()
)
@dataclasses.dataclass
class Layer:
    """A module that is a tree, as Equinox has them."""

    bias: jax.Array | None
    weight: jax.Array


def modules():
    p = start()
    net = [
        Layer(p["first"]["bias"], p["first"]["kernel"]),
        Layer(None, p["second"]["kernel"]),
    ]
    return by_hand(net, lambda n: loss(n[0].bias, n[0].weight, n[1].weight))


def odd():
    """Beside the network a leaf of size 0, one in bfloat16, a convolution."""
    more = {
        "z_empty": {"kernel": jnp.zeros((4, 0)), "bias": jnp.zeros(0)},
        "z_none": {"kernel": jnp.zeros((0, 4))},
        "z_small": {"kernel": jnp.ones((4, 6), jnp.bfloat16)},
        "z_stem": {"kernel": jnp.ones((2, 2, 3, 8)), "bias": jnp.ones(8)},
    }

    def loss_of(p):
        rest = (jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(p)[3:])
        return sum(rest) + dicts_loss(p)

    return by_hand(start() | more, loss_of)


def dicts_loss(p):
    return loss(p["first"]["bias"], p["first"]["kernel"], p["second"]["kernel"])


class Net(nnx.Module):
    def __init__(self):
        p, rngs = start(), nnx.Rngs(0)
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.second = nnx.Linear(6, 4, use_bias=False, rngs=rngs)
        self.first.kernel[...] = p["first"]["kernel"]
        self.first.bias[...] = p["first"]["bias"]
        self.second.kernel[...] = p["second"]["kernel"]

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def flax_nnx():
    """`nnx.Optimizer`, split before `jax.jit` and merged in it."""

    def begin(rule):
        model = Net()
        graph, state = nnx.split((model, nnx.Optimizer(model, rule, wrt=nnx.Param)))
        return graph, state

    def advance(name, state):
        graph, state = state
        model, optimizer = nnx.merge(graph, state)
        gradients = nnx.grad(lambda m: jnp.mean(m(X) ** 2))(model)
        plain = nnx.as_pure(nnx.state(model, nnx.Param))
        optimizer.update(model, gradients, **extra(name, plain))
        return nnx.split((model, optimizer))

    def read(state):
        return nnx.as_pure(nnx.state(nnx.merge(*state)[0], nnx.Param))

    return Loop(begin, advance, read)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(6, name="first")(x))
        return linen.Dense(4, use_bias=False, name="second")(x)


def flax_linen():
    """`TrainState`, whose `apply_gradients` hands nothing else on."""

    def begin(rule):
        state = TrainState.create(apply_fn=Linen().apply, params=start(), tx=rule)
        return state.replace(step=jnp.asarray(state.step))

    def advance(name, state):
        def mean(params):
            return jnp.mean(state.apply_fn({"params": params}, X) ** 2)

        return state.apply_gradients(grads=jax.grad(mean)(state.params))

    return Loop(begin, advance, lambda state: state.params, extra=False)


LOOPS = {
    "dicts": dicts,
    "modules": modules,
    "odd": odd,
    "nnx.Optimizer": flax_nnx,
    "linen.TrainState": flax_linen,
}


def members(loop):
    return [n for n, entry in TABLE.items() if LOOPS[loop]().extra or not entry.inputs]


ASKED = set(TABLE)


@pytest.fixture(autouse=True, scope="module")
def _those_that_are_asked_for(request):
    ASKED.intersection_update(asked(request, "name"))


@functools.cache
@standard
def ends(loop):
    """Where each member comes to, the errors of those that do not, and how many
    programs it took."""
    how, states, failed = LOOPS[loop](), {}, {}

    def each(names, function):
        out = {}
        for name in names:
            try:
                out[name] = function(name)
            except Exception as error:
                failed[name] = error
        return out

    @jax.jit
    def step(states):
        return each(states, lambda name: how.advance(name, states[name]))

    names = [name for name in members(loop) if name in ASKED]
    begin = lambda: each(names, lambda name: how.begin(rule_of(name)))  # noqa: E731
    states = jax.jit(begin)() if how.plain else begin()
    for _ in range(STEPS):
        states = step(states)
    programs = step._cache_size()
    return (
        {name: jax.tree.leaves(how.read(s)) for name, s in states.items()},
        failed,
        programs,
    )


CASES = [(loop, name) for loop in LOOPS for name in members(loop)]


@pytest.mark.parametrize(("loop", "name"), CASES)
def test_it_moves_a_network_in_the_loops_of_others(loop, name):
    reached, failed, programs = ends(loop)
    assert programs == 1
    if name in failed:
        raise failed[name]
    for leaf, was in zip(reached[name], jax.tree.leaves(start()), strict=False):
        assert np.isfinite(leaf).all() and np.abs(leaf - was).max() > 1e-5
    if loop == "odd" and TABLE[name].settings.get("spread"):
        return  # which leaf has its turn when depends on how many there are
    there = ends("dicts")[0][name]
    for leaf, expected in zip(reached[name], there, strict=loop != "odd"):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TABLE)
def test_odd_leaves_are_moved_or_left(name):
    """Those of size 0 keep it, and their types are theirs."""
    before = odd().read(odd().begin(optax.identity()))
    for leaf, was in zip(ends("odd")[0][name], jax.tree.leaves(before), strict=True):
        assert (leaf.shape, leaf.dtype) == (was.shape, was.dtype)
        assert not leaf.size or np.abs(np.asarray(leaf - was, np.float32)).max() > 0


# `on_clock` moves by momentum, too.
@pytest.mark.parametrize("name", sorted(TABLE.keys() - {"on_clock"}))
def test_complex_leaves_are_right_or_refused_by_name(name):
    params = {"first": {"kernel": jnp.ones((4, 6), jnp.complex64)}}
    if name == "momentum":
        rule, theirs = optim.momentum(0.1), optax.sgd(0.1, momentum=0.9)
        state, other = rule.init(params), theirs.init(params)
        for factor in (1.0, 2.0j):
            gradients = jax.tree.map(lambda p, f=factor: f * p, params)
            ours, state = rule.update(gradients, state, params)
            expected, other = theirs.update(gradients, other, params)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        jax.tree.map(close, ours, expected)
        return
    with pytest.raises(ValueError, match="moves real numbers, and first.kernel is"):
        rule_of(name).init(params)
