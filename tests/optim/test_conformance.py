"""What every optimizer promises, asked of all of them at once.

The members of `RULES` are found unasked; others join by a line in `TABLE`. All of them
move in one compiled program, as compiling is what tests spend their time on, and each
test looks at the part of one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hope_jax import optim
from hope_jax.core.level import LevelState
from hope_jax.data import stream
from hope_jax.memory.compose import MemoryConfig
from hope_jax.optim.adaptive import adagrad_memory, adam_memory
from hope_jax.optim.capture import dgd_gradients
from hope_jax.optim.generalised import from_memory, ggd
from hope_jax.optim.groups import on_clock
from hope_jax.optim.kronecker import shampoo, soap
from hope_jax.optim.levels import from_level
from hope_jax.optim.matrices import with_adamw
from hope_jax.optim.meta import LearnedConfig, init_learned, learned
from hope_jax.optim.momenta import (
    delta_level,
    delta_momentum,
    feature_map_momentum,
    hebbian_level,
    momentum,
    nonlinear_momentum,
    preconditioned_momentum,
)
from hope_jax.optim.orthogonal import adamuon, scale_by_adamuon
from hope_jax.optim.rules.deep_momentum import deep_momentum
from hope_jax.optim.rules.dgd import dgd
from hope_jax.optim.rules.m3 import m3, scale_by_m3
from hope_jax.train import checkpoint
from hope_jax.train.config import OptimizerConfig
from hope_jax.train.state import TrainState
from tests.chosen import asked
from tests.devices import saved_by
from tests.train import tiny

STEPS = 80


@dataclasses.dataclass(frozen=True)
class Entry:
    """One optimizer, and what is true of it.

    Attributes:
      rule: takes `learning_rate` and `settings`.
      rate: a learning rate that converges in `STEPS` steps of a cosine.
      degree: the power of c by which an update grows when gradients (where it takes
        `inputs`, weights too) are c times as large; None where it is no power.
      matrices: it takes leaves of two axes and more alone.
      inputs: what it needs besides gradients, "gram" or "vector".
      optax: it has parts of Optax, whose counts need standard promotion and whose
        averages have the type of the parameters.
      overflows: said not to survive large gradients.
      reaches: the part of the distance to the goal, and of a network's loss, that may
        be left in the end.
      static: settings that `optax.inject_hyperparams` must leave alone; None where a
        rate cannot be injected from outside.
      settings: the other arguments of `rule`.
    """

    rule: Callable
    rate: float = 0.1
    degree: int | None = 1
    matrices: bool = False
    inputs: str | None = None
    optax: bool = False
    overflows: bool = False
    reaches: tuple[float, float] = (0.1, 0.5)
    static: tuple[str, ...] | None = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def make(self, rate=None):
        return self.rule(learning_rate=rate or falling(self.rate), **self.settings)

    def promotion(self):
        return jax.numpy_dtype_promotion("standard" if self.optax else "strict")


_FIELDS = {field.name for field in dataclasses.fields(Entry)}


def entry(rule, **said) -> Entry:
    own = {name: value for name, value in said.items() if name in _FIELDS}
    settings = {name: value for name, value in said.items() if name not in _FIELDS}
    return Entry(rule, settings=settings, **own)


def falling(rate):
    """A cosine to 0 in `STEPS`; Optax's own asks for standard promotion."""

    def schedule(count):
        part = jnp.clip(count.astype(jnp.float32) / STEPS, 0.0, 1.0)
        return rate * 0.5 * (1.0 + jnp.cos(jnp.pi * part))

    return schedule


def as_level(level, learning_rate):
    """A level has no schedule: its reads, of the rate 0.1, are scaled."""
    return optax.chain(
        from_level(level(0.1)),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
    )


def m3_whole(learning_rate, periods):
    return with_adamw(scale_by_m3(periods=periods), learning_rate)


def adamuon_whole(learning_rate):
    return with_adamw(scale_by_adamuon(), learning_rate)


def slow(learning_rate):
    return on_clock(momentum(learning_rate), 3)


def by_name(name, rate, learning_rate):
    """As a run has it, with a schedule of its own."""
    del learning_rate
    config = OptimizerConfig(
        rule=name,
        learning_rate=rate,
        warmup_steps=0,
        final_fraction=0.0,
        weight_decay=0.0,
        clip_norm=None,
    )

    def built(params):
        layers = jax.tree_util.tree_map_with_path(is_kernel, params)
        periods = optim.one_clock(params)
        return optim.build(config, total_steps=STEPS, periods=periods, layers=layers)

    def init(params):
        return built(params).init(params)

    def update(updates, state, params, **extra):
        return built(params).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def is_kernel(path, leaf):
    del leaf
    return path[-1] == jax.tree_util.DictKey("kernel")


def named(name) -> Entry:
    """A member of `RULES`, which says itself what is so of it."""
    member, said = optim.RULES.get(name), {"rate": 0.1} | SAID.get(name, {})
    return entry(
        functools.partial(by_name, name, said.pop("rate")),
        optax=True,
        static=None,
        degree=member.degree,
        inputs="gram" if member.inputs == "grams" else None,
        **said,
    )


# Of members for which a rate of 0.1, or how far it comes, is not what they need.
SAID = {
    "lion": dict(rate=0.2),
    "adafactor": dict(rate=0.2, reaches=(0.5, 0.5)),
    "muon": dict(rate=0.5),
    "adamuon": dict(rate=0.5),
    "m3": dict(rate=0.5),
    "shampoo": dict(rate=0.5),
    "soap": dict(rate=0.5),
    "nonlinear_momentum": dict(rate=0.2),
    "deep_momentum": dict(rate=0.15),
    "gradient_memory": dict(rate=0.2),
}


def learned_by(learning_rate, memory):
    """Parameters that listen to the memory: at the start of their training none do."""
    window = 3 if memory == "attention" else None
    config = LearnedConfig(memory=memory, width=2, hidden=3, window=window)
    key, meta = jax.random.key(0), init_learned(jax.random.key(1), config)
    w2 = 0.3 * jax.random.normal(key, meta.readout.w2.shape)
    meta = meta._replace(readout=meta.readout._replace(w2=w2))
    return learned(meta, config, learning_rate)


LINEAR = MemoryConfig(
    architecture="linear", bias="l2", rule="gd", dgd="none", gradient="exact"
)
MLP = MemoryConfig(architecture="mlp", expansion=2, rule="gd", chunk=1)
ONE_STEP = MemoryConfig(
    architecture="linear", bias="l2", rule="gd", dgd="none", chunk=1
)

delta = functools.partial(entry, delta_momentum, degree=None)
muons = functools.partial(
    entry,
    rate=0.7,
    reaches=(0.2, 0.5),
    matrices=True,
    optax=True,
    degree=0,
    static=("ns_steps", "periods"),
)

TABLE = {
    "momentum": entry(momentum),
    "delta": delta(),
    "delta_clip": delta(stability="clip"),
    "delta_literal": delta(stability="literal", overflows=True),
    "delta_matrix": delta(form="matrix"),
    "delta_matrix_clip": delta(form="matrix", stability="clip"),
    "delta_matrix_literal": delta(form="matrix", stability="literal", overflows=True),
    "preconditioned": entry(
        preconditioned_momentum,
        precondition=lambda g: 2.0 * g,
        static=("precondition",),
    ),
    "features": entry(
        feature_map_momentum,
        feature_map=jnp.tanh,
        static=("feature_map",),
        degree=None,
    ),
    "nonlinear": entry(nonlinear_momentum, rate=0.2, degree=0),
    "hebbian_level": entry(functools.partial(as_level, hebbian_level), rate=1.0),
    "delta_level": entry(
        functools.partial(as_level, delta_level), rate=1.0, degree=None, overflows=True
    ),
    "linear_memory": entry(from_memory, rate=0.2, config=LINEAR, static=("seed",)),
    "mlp_memory": entry(from_memory, config=MLP, static=("seed",)),
    "ggd": entry(ggd, rate=1.0, inputs="vector", input_axis=-2, static=("input_axis",)),
    "ggd_explicit": entry(
        ggd,
        config=ONE_STEP,
        reaches=(0.6, 0.6),
        rate=0.15,
        inputs="vector",
        input_axis=-2,
        static=("input_axis",),
    ),
    "dgd": entry(dgd, inputs="gram", input_axis=-2, static=("input_axis",)),
    "dgd_explicit": entry(
        dgd, explicit=True, inputs="gram", input_axis=-2, static=("input_axis",)
    ),
    "deep": entry(deep_momentum, rate=0.15, hidden=4, static=("hidden", "seed")),
    "deep_dot": entry(
        deep_momentum, objective="dot", hidden=4, static=("hidden", "seed")
    ),
    "deep_huber": entry(
        deep_momentum,
        rate=0.1,
        objective="huber",
        target=optax.scale_by_rms(),
        hidden=4,
        degree=0,
        optax=True,
        static=("hidden", "seed", "target"),
    ),
    "adam_memory": entry(adam_memory, degree=0),
    "adam_square": entry(adam_memory, target="square"),
    "adam_ridge": entry(adam_memory, ridge=1e-4, degree=None),
    "adam_literal": entry(
        adam_memory,
        rate=0.3,
        literal=True,
        b1=1.0,
        b2=1.0,
        degree=0,
        reaches=(0.5, 0.5),
    ),
    "adagrad_memory": entry(adagrad_memory, rate=0.5, degree=0),
    "adagrad_momentum": entry(adagrad_memory, rate=0.2, decay=0.5, degree=0),
    "adagrad_outer": entry(
        adagrad_memory, rate=0.9, form="outer", degree=0, static=("max_width",)
    ),
    "adamuon": muons(adamuon, static=("ns_steps",)),
    "m3": muons(m3, periods=(1, 4)),
    "m3_scales": muons(m3, periods=(1, 2, 4), spread=True),
    "m3_two_scale": muons(m3, variant="two_scale", periods=(1, 4)),
    "m3_literal": muons(
        m3, variant="literal", rate=0.1, periods=(1, 4), degree=-1, reaches=(0.9, 0.5)
    ),
    "m3_whole": entry(
        m3_whole,
        rate=0.7,
        reaches=(0.2, 0.5),
        optax=True,
        degree=0,
        periods=(1, 4),
        static=("periods",),
    ),
    "adamuon_whole": entry(
        adamuon_whole, rate=0.7, reaches=(0.2, 0.5), optax=True, degree=0
    ),
    "shampoo": muons(
        shampoo, frequency=3, static=("frequency", "root", "max_size", "eps")
    ),
    "soap": muons(soap, frequency=3, static=("frequency", "max_size")),
    "learned_recurrent": entry(learned_by, memory="recurrent", degree=0),
    "learned_attention": entry(learned_by, memory="attention", degree=0),
    "on_clock": entry(slow, static=None),  # whose schedule counts moves, not steps
}

NAMES = {name: named(name) for name in optim.RULES}

ALL = {**TABLE, **{f"name_{name}": one for name, one in NAMES.items()}}


@pytest.fixture(autouse=True, scope="module")
def _those_that_are_asked_for(request):
    for name in ALL.keys() - asked(request, "name"):
        del ALL[name]


def some_tree(seed):
    """A network of two layers, a scale, a stack in bfloat16, a matrix in float16."""
    draw = np.random.default_rng(seed).normal

    def leaf(*shape, dtype=jnp.float32):
        return jnp.asarray(draw(size=shape), dtype)

    return {
        "first": {"kernel": leaf(4, 8), "bias": leaf(8)},
        "second": {"kernel": leaf(8, 4)},
        "scale": leaf(),
        "stack": {"kernel": leaf(2, 4, 8, dtype=jnp.bfloat16)},
        "small": {"kernel": leaf(4, 8, dtype=jnp.float16)},
    }


def matrices(tree):
    kept = {k: v for k, v in tree.items() if isinstance(v, dict)}
    return {k: {"kernel": v["kernel"]} for k, v in kept.items()}


def to_each(tree):
    """The tree, its matrices, or for optimizers by name all but small leaves."""

    def part(name):
        if ALL[name].matrices:
            return matrices(tree)
        left_out = ("scale", "small") if name.startswith("name_") else ()
        return {k: v for k, v in tree.items() if k not in left_out}

    return {name: part(name) for name in ALL}


def inputs_of(kind, tree, t):
    """Unit vectors in turn, or the Gram matrix of all; None for what is no matrix."""

    def one(path, leaf):
        if not is_kernel(path, leaf):
            return None
        eye = jnp.eye(leaf.shape[-2], dtype=leaf.dtype)
        x = eye if kind == "gram" else eye[t % len(eye)]
        return jnp.broadcast_to(x, leaf.shape[:-2] + x.shape)

    return jax.tree_util.tree_map_with_path(one, tree)


class Fleet:
    """Optimizers in one program. What fails while it is traced is kept by name."""

    def __init__(self, make, params, standard=False):
        self.standard = standard
        self.failed: dict[str, Exception] = {}
        self.rules = self._each(
            params, lambda n: optax.with_extra_args_support(make(n))
        )
        self.move = jax.jit(self._move)
        self.states = jax.jit(self._begin)(params)

    def _each(self, names, function):
        out = {}
        for name in names:
            try:
                entry = ALL[name]
                if self.standard:
                    entry = dataclasses.replace(entry, optax=True)
                with entry.promotion():
                    out[name] = function(name)
            except Exception as error:
                self.failed[name] = error
        return out

    def _begin(self, params):
        return self._each(self.rules, lambda n: self.rules[n].init(params[n]))

    def _move(self, gradients, states, params, inputs, extra):
        def one(name):
            given = {"inputs": inputs[name]} if name in inputs else {}
            updates, state = self.rules[name].update(
                gradients[name], states[name], params[name], **given, **extra
            )
            return updates, state, optax.apply_updates(params[name], updates)

        moved = self._each(states, one)
        return tuple({n: out[i] for n, out in moved.items()} for i in range(3))


def extra_args(value=0.0):
    return {"value": jnp.asarray(value), "unknown": {"a": jnp.asarray(value)}}


@functools.cache
def fleet():
    return Fleet(lambda name: ALL[name].make(), to_each(some_tree(0)))


@pytest.fixture(params=ALL)
def name(request):
    if request.param in (failed := fleet().failed):
        raise failed[request.param]
    return request.param


def live(gradients, states=None, params=None, extra=None):
    """Updates at each of `gradients`, and states, at parameters that stand still."""
    params = to_each(some_tree(0)) if params is None else params
    states = fleet().states if states is None else states
    extra = extra_args() if extra is None else extra
    all_updates, all_states = [], []
    for t, each in enumerate(gradients):
        inputs = {
            n: inputs_of(e.inputs, params[n], t) for n, e in ALL.items() if e.inputs
        }
        updates, states, _ = fleet().move(each, states, params, inputs, extra)
        all_updates.append(updates)
        all_states.append(states)
    return all_updates, all_states


def leaves_of(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(tree)}


def inexact(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def as_bytes(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# Types, and one program for all steps.


@functools.cache
def drawn():
    """Six steps on gradients that are drawn, and the programs that were compiled."""
    updates, states = live([to_each(some_tree(i)) for i in range(1, 7)])
    return updates, states, fleet().move._cache_size()


def test_updates_have_the_types_of_gradients(name):
    for update in drawn()[0]:
        assert jax.tree.map(lambda u: (u.shape, u.dtype), update[name]) == jax.tree.map(
            lambda g: (g.shape, g.dtype), to_each(some_tree(1))[name]
        )
    if ALL[name].optax:
        return
    # Of the gradients, not of the parameters.
    params = to_each(some_tree(0))[name]
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    extra = {}
    if ALL[name].inputs:
        extra["inputs"] = inputs_of(ALL[name].inputs, params, 0)
    rule, state = ALL[name].make(), fleet().states[name]
    update, _ = jax.eval_shape(rule.update, half, state, params, **extra)
    assert {u.dtype for u in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}


def test_states_add_up_in_float32(name):
    """Whatever the type of the parameters, of which some are in 16 bits."""
    types = {x.dtype for x in inexact(drawn()[1][-1][name])}
    if ALL[name].optax:
        types -= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}
    assert types <= {jnp.dtype(jnp.float32)}


def test_one_program_serves_every_step(name):
    """A state comes out as it went in: another type or shape would compile again."""

    def kind(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    for state in drawn()[1]:
        assert kind(state[name]) == kind(fleet().states[name])


def test_one_program_served_every_step():
    assert drawn()[2] == 1


def test_arguments_that_it_does_not_know_change_nothing(name):
    updates, states = other_extra()
    assert as_bytes(updates[name]) == as_bytes(drawn()[0][0][name])
    assert as_bytes(states[name]) == as_bytes(drawn()[1][0][name])


@functools.cache
def other_extra():
    updates, states = live([to_each(some_tree(1))], extra=extra_args(np.nan))
    return updates[0], states[0]


# The scale of gradients.


def times(tree, c):
    """c times as large; float16, which has no such numbers, within its range."""

    def one(leaf):
        most = 1e4 if leaf.dtype == jnp.float16 else np.inf
        factor = np.clip(np.asarray(c, np.float64), -most, most)
        rows = np.resize(factor, (leaf.shape or (1,))[0])
        factor = rows.reshape((-1,) + (1,) * (leaf.ndim - 1))
        wide = np.asarray(leaf, np.float64) * (factor if leaf.ndim else rows[0])
        return jnp.asarray(wide, leaf.dtype)

    return jax.tree.map(one, tree)


SIZES = {
    "zero": (0.0, 0.0, 0.0),
    "tiny": (1e-20, 1e-20, 1e-20),
    "huge": (1e20, 1e20, 1e20),
    "in turn": (0.0, 1e-20, 1e20, 0.0, 1.0),
    "in rows": ((0.0, 1e20, 1e-20), (1e-20, 0.0, 1e20), (1.0, 1e20, 0.0)),
}


@functools.cache
def sized(kind):
    return live([to_each(times(some_tree(2), c)) for c in SIZES[kind]])


@pytest.mark.parametrize("kind", SIZES)
def test_finite_on_gradients_of_any_size(name, kind):
    if ALL[name].overflows and kind not in ("zero", "tiny"):
        return
    updates, states = sized(kind)
    for update, state in zip(updates, states, strict=True):
        for where, leaf in leaves_of(update[name]).items():
            assert np.isfinite(np.asarray(leaf, np.float64)).all(), where
        if not ALL[name].optax:  # whose second moments are infinite then
            for where, leaf in leaves_of(state[name]).items():
                assert np.isfinite(np.asarray(leaf, np.float64)).all(), where


def test_stands_still_on_gradients_of_zero(name):
    if ALL[name].inputs:  # by which it forgets
        return
    for update in sized("zero")[0]:
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(update[name]))


@functools.cache
def grown(c):
    """Three steps on gradients c times as large, where asked for at weights so too."""
    params = to_each(some_tree(0))
    for n, e in ALL.items():
        params[n] = times(params[n], c) if e.inputs else params[n]
    return live([to_each(times(some_tree(i), c)) for i in (1, 2, 3)], params=params)[0]


def grows_by(name, c, degree):
    """Whether all updates of float32 grow by `c ** degree`."""
    same = True
    for one, other in zip(grown(1.0), grown(c), strict=True):
        for u, v in zip(*map(jax.tree.leaves, (one[name], other[name])), strict=True):
            if u.dtype == jnp.float32:
                expected = np.asarray(u) * c**degree
                atol = 1e-3 * np.abs(expected).max()
                same &= np.allclose(v, expected, rtol=1e-3, atol=atol)
    return same


def test_the_degree_in_the_size_of_gradients(name):
    degree = ALL[name].degree
    if degree is None:
        assert not any(grows_by(name, 8.0, degree) for degree in (-1, 0, 1))
        return
    assert grows_by(name, 8.0, degree)
    if not ALL[name].optax:
        assert grows_by(name, 2.0**60, degree)


# Convergence.


def network(params, x):
    first = params["first"]
    h = jnp.tanh(x @ first["kernel"] + first.get("bias", jnp.zeros(8))[None])
    return h @ params["second"]["kernel"]


def some_data():
    x = np.random.default_rng(5).normal(size=(16, 4))
    x = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
    return x, network(some_tree(6), x)


def loss(params, x, y):
    return 0.5 * jnp.mean(jnp.sum((network(params, x) - y) ** 2, axis=-1))


def to_the_goal(name, params, t):
    """Of |p - goal|^2 / 2; of -<W x, goal x> for what forgets W x by itself."""
    goal, kind = some_tree(9), ALL[name].inputs
    inputs = inputs_of(kind, params, t) if kind else None

    def pull(path, p):
        g, x = leaf_at(goal, path), leaf_at(inputs, path) if kind else None
        if x is None:
            return p - g
        gram = x if kind == "gram" else x[..., :, None] * x[..., None, :]
        return -(gram @ g)

    return jax.tree_util.tree_map_with_path(pull, params), inputs


def leaf_at(tree, path):
    return functools.reduce(lambda node, key: node[key.key], path, tree)


def all_to_the_goal(params, t):
    each = {name: to_the_goal(name, own, t) for name, own in params.items()}
    inputs = {name: one[1] for name, one in each.items() if ALL[name].inputs}
    return {name: one[0] for name, one in each.items()}, inputs


def all_of_the_network(params, t):
    """Of a regression, and of the goal for what is no part of the network."""
    gradients, inputs = all_to_the_goal(params, t)
    x, y = some_data()

    def biased(own):
        first = {"bias": jnp.zeros(8)} | own["first"]
        return {"first": first, "second": own["second"]}

    plain = [name for name in params if not ALL[name].inputs]
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *(biased(params[n]) for n in plain))
    slopes = jax.vmap(jax.grad(loss), (0, None, None))(stacked, x, y)
    for i, name in enumerate(plain):
        for layer, slope in slopes.items():
            given = params[name][layer]
            gradients[name][layer] = {leaf: slope[leaf][i] for leaf in given}

    for name in inputs:
        own = {layer: params[name][layer] for layer in slopes}
        if ALL[name].inputs == "gram":
            slope, seen = dgd_gradients(loss, own, x, y)
        else:  # of one token at a time
            slope = jax.grad(loss)(own, x[t % 16][None], y[t % 16][None])
            h = jnp.tanh(x[t % 16] @ own["first"]["kernel"] + own["first"]["bias"])
            seen = {"first": {"kernel": x[t % 16], "bias": None}}
            seen["second"] = {"kernel": h}
        gradients[name] |= slope
        inputs[name] |= seen
    return gradients, inputs


@functools.cache
def ends(problem):
    """Where every optimizer comes to in `STEPS` steps."""
    slopes = jax.jit(problem)
    states, params = fleet().states, to_each(some_tree(0))
    for t in range(STEPS):
        gradients, inputs = slopes(params, jnp.asarray(t))
        _, states, params = fleet().move(
            gradients, states, params, inputs, extra_args()
        )
    return jax.device_get(params)


def test_it_comes_to_the_minimum_of_a_quadratic(name):
    at, start, goal = ends(all_to_the_goal)[name], some_tree(0), some_tree(9)

    def left(path, p):
        far, near = leaf_at(start, path), leaf_at(goal, path)
        near = np.asarray(near, np.float64)
        return np.linalg.norm(p - near) / np.linalg.norm(np.asarray(far) - near)

    parts = leaves_of(jax.tree_util.tree_map_with_path(left, at))
    assert max(parts.values()) < ALL[name].reaches[0], parts


def test_it_trains_a_network(name):
    start, end = to_each(some_tree(0))[name], ends(all_of_the_network)[name]
    before, after = (float(loss(params, *some_data())) for params in (start, end))
    assert after < ALL[name].reaches[1] * before, (before, after)


# Checkpoints.


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """States of five steps, in the middle of the slow periods, saved and read."""

    def iterator():
        rows = stream.Rows([np.arange(50, dtype=np.int32)], seq_len=4, vocab_size=257)
        return iter(
            stream.batches(rows, stream.StreamConfig(seq_len=4, batch=2, seed=1))
        )

    states, count = drawn()[1][4], jnp.asarray(5, jnp.int32)
    level = LevelState(some_tree(0), states, None, None, count)
    state = TrainState(level, jax.random.key(0))
    run = dict(config=tiny.rows("smoke")["tiny"], fingerprint={"corpus": "abc"})
    with checkpoint.Checkpoints(tmp_path_factory.mktemp("run")) as checkpoints:
        checkpoints.save(5, state, iterator=iterator(), **run)
        checkpoints.wait()
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        again, _ = checkpoints.restore(like, iterator=iterator(), **run)
    # Through the host: bound to a device they would compile all of the program again.
    again = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), again.level.opt)
    after = [to_each(some_tree(i)) for i in range(6, 10)]
    return live(after, states)[0], live(after, again)[0]


def test_it_goes_on_from_a_checkpoint_in_mid_period(name, restored):
    """To the last bit, over the next move of every slow memory."""
    unbroken, resumed = restored
    for one, other in zip(unbroken, resumed, strict=True):
        assert as_bytes(one[name]) == as_bytes(other[name])


# With Optax's transformations, and on many devices.


def part(tree):
    """A layer, or all matrices: what moves there as it does in the whole tree."""
    of_matrices = matrices(tree)
    return {n: of_matrices if e.matrices else first(tree) for n, e in ALL.items()}


def first(tree):
    return {"first": tree["first"]}


def composed(entry, tree):
    """The optimizer inside of all that Optax offers, beside another one.

    Its gradients are halved and its rate is injected; it is masked into one part of a
    partition, of which SGD moves the other.
    """
    rule = optax.inject_hyperparams(entry.rule, static_args=entry.static)
    injected = rule(learning_rate=falling(entry.rate), **entry.settings)
    masked = optax.masked(injected, lambda tree: jax.tree.map(lambda _: True, tree))
    labels = jax.tree.map(lambda _: "ours", tree) | {"other": "sgd"}
    parts = optax.partition({"ours": masked, "sgd": optax.sgd(1.0)}, labels)
    return optax.chain(optax.scale(0.5), parts)


@functools.cache
def composites():
    """Four steps of those that are composed, as `drawn` has them, and the rates."""
    chosen = [n for n, e in ALL.items() if e.static is not None]

    def doubled(seed):
        tree = jax.tree.map(lambda x: 2 * x, part(some_tree(seed)))
        return {n: tree[n] | {"other": jnp.ones(2)} for n in chosen}

    params = doubled(0)
    for n in chosen:
        params[n] |= part(some_tree(0))[n]
    whole = part(some_tree(0))
    group = Fleet(lambda n: composed(ALL[n], whole[n]), params, standard=True)
    states, all_updates = group.states, []
    for t in range(4):
        inputs = {
            n: inputs_of(ALL[n].inputs, params[n], t) for n in chosen if ALL[n].inputs
        }
        updates, states, _ = group.move(
            doubled(t + 1), states, params, inputs, extra_args()
        )
        all_updates.append(updates)
    return group.failed, all_updates


@pytest.mark.parametrize("name", [n for n, e in ALL.items() if e.static is not None])
def test_it_joins_chains_masks_partitions_and_injected_rates(name):
    failed, updates = composites()
    if name in failed:
        raise failed[name]
    assert np.asarray(updates[2][name]["first"]["kernel"]).any()
    for t, update in enumerate(updates):
        ours = dict(update[name])
        np.testing.assert_array_equal(ours.pop("other"), -0.5)
        assert_close(ours, drawn()[0][t][name], 1e-5)


def assert_close(some, whole, tolerance):
    """Of every leaf, relative to its largest entry; looser in 16 bits."""
    for path, u in jax.tree_util.tree_leaves_with_path(some):
        expected = leaf_at(whole, path)
        loose = tolerance if expected.dtype == jnp.float32 else 2e-2
        u, expected = (np.asarray(x, np.float64) for x in (u, expected))
        atol = loose * np.abs(expected).max()
        np.testing.assert_allclose(u, expected, rtol=loose, atol=atol)


# By name are the same again, but for Optax's own.
CUT = [*TABLE, "name_adamw", "name_lion", "name_adafactor", "name_muon"]


def move_on_eight_devices(chosen, file):
    """Six steps with parameters, gradients and states cut in eight, to `file`."""
    assert len(jax.devices()) == 8
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))

    def cut(leaf):
        axes = ["x" if size == 8 else None for size in leaf.shape]
        axes = axes[: axes.index("x") + 1] if "x" in axes else []
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    params = {n: jax.tree.map(cut, part(some_tree(0))[n]) for n in chosen}
    group = Fleet(lambda name: ALL[name].make(), params)
    states = jax.tree.map(cut, group.states)
    for t in range(6):
        kinds = {n: ALL[n].inputs for n in chosen if ALL[n].inputs}
        inputs = {n: inputs_of(kind, params[n], t) for n, kind in kinds.items()}
        gradients = {n: jax.tree.map(cut, part(some_tree(t + 1))[n]) for n in chosen}
        updates, states, _ = group.move(gradients, states, params, inputs, extra_args())
        jax.block_until_ready(states)  # one step at a time: each waits for the others
    kept = {
        name + where: np.asarray(leaf, np.float64)
        for name, update in updates.items()
        for where, leaf in leaves_of(update).items()
    }
    failed = {f"failed {name}": repr(error) for name, error in group.failed.items()}
    np.savez(file, **kept, **failed)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    file = tmp_path_factory.mktemp("sharded") / "updates.npz"
    here = [n for n in CUT if n in ALL]
    call = f"move_on_eight_devices({here}, {str(file)!r})"
    return saved_by(__name__, call, file)


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_cut_over_eight_devices_it_is_the_same(name, sharded):
    assert f"failed {name}" not in sharded, sharded[f"failed {name}"]
    found = jax.tree_util.tree_map_with_path(
        lambda path, _: sharded[name + jax.tree_util.keystr(path)],
        part(some_tree(0))[name],
    )
    assert_close(found, drawn()[0][5][name], 1e-4)
    assert any(leaf.any() for leaf in jax.tree.leaves(found))
