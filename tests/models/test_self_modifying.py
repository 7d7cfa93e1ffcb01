"""The self-modifying layer is its definition, and keeps the promises of every layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.core import config as config_lib
from hope_jax.memory.compose import MemoryConfig, build_architecture, with_choices
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.self_modifying import (
    MATRIX,
    MLP,
    Seen,
    SelfModifyingConfig,
    SelfModifyingTitans,
)
from hope_jax.models.reference import self_modifying_reference
from tests import compare
from tests.models import small

close = compare.within_size(1e-5)

D, HEADS, ROWS = 8, 2, 2


EXACT = dict(architecture="linear", gradient="exact", rule="gd", bias="dot")
TURNING = dict(
    architecture="linear",
    gradient="exact",
    rate_law="token",
    bias="dot",
    dgd="both",
    recall="after",
    erases="written",
)
BEFORE = dict(recall="before", erases="all")
LITERAL = dict(
    inputs="slice",
    conv_activation="none",
    targets="all",
    projection_rate=None,
    scale_free=False,
    unit_values=True,
)


def configured(chunk=2, projection_chunk=4, memory=None, **layer):
    """A small layer: the equations to the letter, but for what is given."""
    return SelfModifyingConfig(
        memory=with_choices(MemoryConfig(chunk=chunk, expansion=2), **memory or {}),
        projection_chunk=projection_chunk,
        **LITERAL | dict(conv=3) | layer,
    )


def remembering(chunk=2, projection_chunk=4, memory=None, **layer):
    """A small layer with the defaults that remember, all targets its own."""
    choices = MemoryConfig(
        chunk=chunk,
        expansion=2,
        rule="gd",
        dgd="none",
        toward="start",
        rate_law="output",
    )
    layer = dict(targets="all") | layer
    return SelfModifyingConfig(
        memory=with_choices(choices, **memory or {}),
        projection_chunk=projection_chunk,
        **dict(conv=3) | layer,
    )


@functools.cache
def build(config, dtype=jnp.float32):
    """A layer none of whose parameters is at a special value, as pure functions."""
    layer = SelfModifyingTitans(D, HEADS, config, dtype, rngs=nnx.Rngs(0))
    return small.shaken(layer)


@functools.cache
def initial_state(config):
    return small.begun(*build(config), ROWS)


def tokens(length, seed=2):
    return small.drawn(ROWS, length, D, seed=seed)


def call(graphdef, params, x, state=None, **options):
    return nnx.merge(graphdef, params)(x, state, **options)


def fast(graphdef, params, x):
    """Outputs, and the memories with what unfinished chunks have taught them."""
    layer = nnx.merge(graphdef, params)
    y, state = layer(x)
    now = layer.ended(state)
    memories = now.projection, now.main
    return y, tuple((m.weights, m.momentum or {}) for m in memories)


def slow(graphdef, params, x):
    y, memories = self_modifying_reference(nnx.merge(graphdef, params), x)
    momentum = nnx.merge(graphdef, params).config.memory.inertia
    return y, tuple((m.params, m.opt[1] if momentum else {}) for m in memories[:2])


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


LAYERS = {
    "both clocks, remainder": (11, configured()),
    "token recurrence": (
        4,
        configured(1, 1, rate=0.3, unit_values=False),
    ),
    "no momentum, adaptive query": (
        6,
        configured(3, 3, dict(rule="gd"), adaptive_q=True),
    ),
    "static keys": (5, configured(2, 4, adaptive_k=False)),
    "static values, matrix, momentum": (
        6,
        remembering(
            memory=TURNING | dict(rule="momentum"),
            adaptive_v=False,
            adaptive_q=True,
        ),
    ),
    "dot, read before, delta on the input": (
        4,
        configured(2, 2, dict(bias="dot", read="pre", dgd="input")),
    ),
    "read at the anchor, no delta, no retention": (
        4,
        configured(2, 2, dict(read="anchor", dgd="none", retention="none")),
    ),
    "linear": (5, configured(2, 2, dict(architecture="linear"))),
    "linear, dot": (
        4,
        configured(
            2,
            2,
            dict(architecture="linear", bias="dot", rule="gd", dgd="none"),
            unit_values=False,
        ),
    ),
    "defaults": (11, remembering()),
    "defaults, adaptive query, what was written": (
        6,
        remembering(memory=dict(dgd="both", erases="written"), adaptive_q=True),
    ),
    "main memory stores values, momentum": (
        6,
        remembering(
            memory=dict(rule="momentum", rate_law="energy", dgd="both"),
            targets="projections",
            unit_values=True,
        ),
    ),
    "budget, delta": (11, remembering(memory=dict(rate_law="budget", dgd="both"))),
    "no targets of their own": (5, remembering(targets="none", inputs="slice")),
    "matrix": (
        11,
        remembering(memory=TURNING),
    ),
    "matrix that turns round what it stores": (
        7,
        remembering(4, 4, TURNING, rate=2.0, rate_start=0.9, half_life_start=64.0),
    ),
    "the same, token by token": (
        4,
        remembering(1, 1, TURNING, rate=2.0, rate_start=0.9, half_life_start=64.0),
    ),
    "matrix that erases by a gate": (7, remembering(memory=TURNING, erase="gate")),
    "the same, one clock, toward a start": (
        6,
        remembering(4, 4, TURNING | BEFORE, erase="gate", rate=2.0),
    ),
    "the same, token by token, momentum": (
        4,
        remembering(1, 1, TURNING | dict(rule="momentum"), erase="gate"),
    ),
    "matrix, l2, chunks of one clock": (
        6,
        remembering(
            4, 4, dict(architecture="linear", gradient="exact", rate_law="token")
        ),
    ),
    "two writes a token, both clocks, remainder": (
        11,
        remembering(memory=TURNING | dict(steps=2), rate=2.0, rate_start=0.9),
    ),
    "two writes, one clock, momentum, remainder": (
        6,
        remembering(
            4,
            4,
            EXACT | dict(rate_law="token", rule="momentum", steps=2),
            rate=2.0,
        ),
    ),
    "three writes, momentum, adaptive query, static keys": (
        4,
        remembering(
            1,
            1,
            TURNING | dict(rule="momentum", steps=3),
            adaptive_k=False,
            adaptive_q=True,
        ),
    ),
    "two writes of an mlp, each with a gradient of its own": (
        4,
        configured(1, 1, dict(steps=2), inputs="dense", projection_rate=0.1),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_its_definition(name):
    """Outputs, memories, and the pullback of both in every parameter and input."""
    length, config = LAYERS[name]
    graphdef, params = build(config)
    x = tokens(length)

    @jax.jit
    def both(*args):
        runs = [functools.partial(run, graphdef) for run in (fast, slow)]
        return [small.value_and_pullback(run, *args) for run in runs]

    ours, theirs = jax.device_get(both(params, x))
    close(ours, theirs)
    unused = {"read_theta", "bias_theta"} if not config.memory.inertia else set()
    if config.memory.retention == "none":
        unused |= {"read_alpha", "bias_alpha"}
    for path, gradient in nnx.to_flat_state(ours[1][0]):
        assert np.any(gradient[...] != 0) == (path[0] not in unused), path


@pytest.fixture(scope="module")
def layer():
    """A layer with two chunk sizes, read from a state, compiled once a length."""
    graphdef, params = build(configured())
    run = jax.jit(
        lambda x, state, aligned, learn: call(
            graphdef, params, x, state, aligned=aligned, learn=learn
        ),
        static_argnums=(2, 3),
    )
    start = initial_state(configured())

    def read(x, state=start, aligned=False, learn=True):
        y, state = run(x, state, aligned, learn)
        return np.asarray(y), state

    return read


@pytest.mark.parametrize("other", [1, 0])
def test_a_write_whose_rate_is_nothing_is_none(other):
    """Two writes a token, of which one is shut, are the other alone: the layer of one
    write with its maps, channels and gates, in values and for good."""
    two = remembering(memory=TURNING | dict(steps=2), targets="projections")
    one = dataclasses.replace(two, memory=dataclasses.replace(two.memory, steps=1))
    graphdef, params = build(two)
    params = nnx.clone(params)
    bias = params["bias_eta"][...].at[:, other].set(-jnp.inf)
    params["bias_eta"] = params["bias_eta"].replace(bias)

    def kept(path, leaf):
        """Of maps and channels `[.., H N K]` and of read-outs `[H, N, ..]`."""
        if path[0].key in ("k", "v", "conv_k", "conv_v"):
            split = leaf.reshape(leaf.shape[0], HEADS, 2, D // HEADS)
            return split[:, :, 1 - other].reshape(leaf.shape[0], D)
        return leaf[:, 1 - other] if path[0].key in ("read_eta", "bias_eta") else leaf

    single = jax.tree_util.tree_map_with_path(kept, params)
    x = tokens(11)
    ours, _ = jax.jit(functools.partial(fast, graphdef))(params, x)
    theirs, _ = jax.jit(functools.partial(fast, build(one)[0]))(single, x)
    close(ours, theirs)
    changed, _ = jax.jit(functools.partial(fast, graphdef))(build(two)[1], x)
    assert np.max(np.abs(changed - ours)) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_two_writes_of_a_token_are_a_rotation(steps):
    """At the highest rate each is a reflection, so that what was stored keeps its
    length; one of them is symmetric, and turns nothing by an angle."""
    memory = TURNING | dict(steps=steps)
    config = remembering(memory=memory, rate=2.0, targets="projections")
    graphdef, params = build(config)
    params = nnx.clone(params)
    for name in ("bias_eta", "bias_alpha"):
        params[name] = jax.tree.map(lambda b: b + 40.0, params[name])

    @jax.jit
    def after(stored):
        layer = nnx.merge(graphdef, params)
        state = layer.initial_state(ROWS)
        weights = {"w": jnp.broadcast_to(stored, state.main.weights["w"].shape)}
        state = state._replace(main=state.main._replace(weights=weights))
        return layer(jnp.asarray(tokens(1)), state)[1].main.weights["w"]

    one = jnp.eye(D // HEADS)[None, None]
    turn = np.asarray(after(one) - after(jnp.zeros_like(one)), np.float64)
    turned_back = np.swapaxes(turn, -1, -2) @ turn
    close(turned_back, np.broadcast_to(one, turn.shape), 1e-3)  # of keys nearly unit
    np.testing.assert_allclose(np.linalg.det(turn), (-1.0) ** steps, rtol=1e-3)
    askew = np.abs(turn - np.swapaxes(turn, -1, -2)).max(axis=(-2, -1))
    assert np.all(askew < 1e-5 if steps == 1 else askew > 1e-2)


@pytest.mark.parametrize(
    "config",
    [
        remembering(memory=dict(rate_law="budget")),
        remembering(memory=TURNING, erase="gate"),
    ],
    ids=["a budget", "a gate"],
)
def test_pieces_are_read_as_their_chunk(config):
    """Rows cut anywhere: what a chunk has left of its budget is kept, and whole again
    in the next; a gate erases alike."""
    graphdef, params = build(config)
    run = jax.jit(lambda x, state: call(graphdef, params, x, state, aligned=False))
    x = tokens(12)
    expected, end = jax.jit(lambda x: call(graphdef, params, x))(x)
    state, reads = initial_state(config), []
    for start in range(0, 12, 3):
        y, state = run(x[:, start : start + 3], state)
        reads.append(y)
    close(np.concatenate(reads, axis=1), expected)
    close(state, end)


def test_a_state_between_chunks_goes_on_in_parallel(layer):
    x = tokens(12)
    expected, end = layer(x, aligned=True)
    y, state = layer(x[:, :8], aligned=True)
    rest, state = layer(x[:, 8:], state, aligned=True)
    close(np.concatenate([y, rest], axis=1), expected)
    close(state, end)


def test_reading_changes_the_memory(layer):
    """And not by decay alone, which keeps the direction of every matrix."""
    start = layer(tokens(1), learn=False)[1]
    _, after = layer(tokens(12), aligned=True)

    def turned(new, old):
        new, old = np.asarray(new), np.asarray(old)
        dot = lambda a, b: np.sum(a * b, axis=(-2, -1), keepdims=True)  # noqa: E731
        rest = new - old * dot(new, old) / dot(old, old)
        return np.min(np.max(np.abs(rest), axis=(-2, -1)))

    for memory in ("projection", "main"):
        new, old = (getattr(state, memory).weights for state in (after, start))
        assert min(jax.tree.leaves(jax.tree.map(turned, new, old))) > 1e-3


def test_the_second_text_is_learned_by_what_the_first_made(layer):
    """update(AB) != update(A) + update(B)."""
    x = tokens(8)
    weights = lambda state: np.asarray(state.main.weights["w1"])  # noqa: E731
    start = weights(layer(x[:, :1], learn=False)[1])
    change = lambda x: weights(layer(x, aligned=True)[1]) - start  # noqa: E731
    both, apart = change(x), change(x[:, :4]) + change(x[:, 4:])
    assert np.max(np.abs(both - apart)) > 1e-3


@pytest.mark.parametrize("aligned, read", [(True, 8), (False, 7)])
def test_without_learning_the_memory_stays(layer, aligned, read):
    x = tokens(13)
    _, state = layer(x[:, :read], aligned=aligned)
    _, after = layer(x[:, read:], state, aligned=aligned, learn=False)
    graphdef, params = build(configured())
    ended = jax.jit(lambda state: nnx.merge(graphdef, params).ended(state))
    now, then = ended(after), ended(state)  # what was waiting to be learned included
    close((now.projection, now.main), (then.projection, then.main))
    equal(after.main.weights, state.main.weights)
    equal(after.main.momentum, state.main.momentum)
    assert int(after.position[0]) == 13


def test_a_gate_erases_nothing_without_learning():
    config = remembering(2, 2, TURNING, erase="gate")
    graphdef, params = build(config)
    run = jax.jit(
        lambda x, state, learn: call(graphdef, params, x, state, learn=learn),
        static_argnums=2,
    )
    _, state = run(tokens(5), initial_state(config), True)
    _, after = run(tokens(3), state, False)
    equal(after.main.weights, state.main.weights)


def test_an_open_gate_that_never_erases_adds_what_it_is_given():
    """The same token again and again: its answer grows by as much each time."""
    config = remembering(
        1,
        1,
        EXACT | dict(rate_law="token", retention="none", toward="zero", dgd="both"),
        erase="gate",
        targets="projections",
        conv=1,
    )
    graphdef, params = build(config)
    never = jax.tree.map(lambda b: jnp.full_like(b, -40.0), params["bias_erase"])
    params = params | {"bias_erase": never}
    alone = Learning(projections=False)  # which make the rate
    run = jax.jit(lambda x, state: call(graphdef, params, x, state, learn=alone))
    x, state, sums = tokens(1), initial_state(config), []
    for _ in range(6):
        sums.append(np.asarray(state.main.weights["w"]))
        _, state = run(x, state)
    steps = np.diff(np.stack(sums), axis=0)
    assert np.abs(steps[0]).max() > 1e-2
    close(steps, np.broadcast_to(steps[0], steps.shape))


@pytest.mark.parametrize("erase", ["rate", "gate"])
def test_no_memory_turns_what_it_stores_round_and_makes_it_longer(erase):
    """However wide gates and rates are open, and however much a token forgets."""
    config = remembering(
        4, 4, TURNING | BEFORE, erase=erase, rate=2.0, projection_rate=None
    )
    graphdef, params = build(config)
    for name, bias in (("eta", 9.0), ("erase", 9.0), ("alpha", 0.0)):
        if f"bias_{name}" in params:
            params = params | {
                f"bias_{name}": jax.tree.map(
                    functools.partial(jnp.full_like, fill_value=bias),
                    params[f"bias_{name}"],
                )
            }

    @jax.jit
    def watch(x, state):
        return nnx.merge(graphdef, params).watch(x, state, aligned=True)[2]

    for given in watch(tokens(8), initial_state(config)):
        rate = given.eta if given.erase_rate is None else given.erase_rate
        kept = np.asarray(given.alpha - rate)
        assert np.all(kept >= -1 - 1e-6) and np.all(kept < 0)


@pytest.mark.parametrize("asked, given", [(2.0, 128), (256.0, 256), (1024.0, 1024)])
def test_at_the_start_a_memory_outlives_its_chunk(asked, given):
    """The half-life that a fresh layer gives every token is at least its chunk; that
    of the head that forgets most quickly is about what the config says."""
    config = SelfModifyingConfig(half_life_start=asked, projection_chunk=64)

    @jax.jit
    def half_lives(x):
        layer = SelfModifyingTitans(32, 4, config, jnp.float32, rngs=nnx.Rngs(0))
        made = layer.gates(x).reshape(1, -1, 4, 8)[0]  # a fresh memory passes it on
        logit = jnp.einsum("thk,hk->ht", made, layer.read_alpha[...])
        logit = logit + layer.bias_alpha[...][:, None]
        return -1.0 / jnp.log2(jax.nn.sigmoid(logit))

    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 4 * config.projection_chunk, 32))
    half_life = np.asarray(half_lives(np.float32(x)))
    assert np.min(half_life) >= config.projection_chunk
    assert np.median(half_life[-1]) >= 1000
    assert np.max(half_life) <= 50 * given
    assert 0.7 * given < float(np.median(half_life[0])) < 1.4 * given


def test_fresh_memories_pass_their_input_on():
    for memory in (MLP, MATRIX):
        config = SelfModifyingConfig(memory=memory)

        @jax.jit
        def answer(x, config=config, memory=memory):
            layer = SelfModifyingTitans(32, 4, config, jnp.float32, rngs=nnx.Rngs(0))
            main = {n: w[2] for n, w in layer.starts()[1].items()}
            return build_architecture(memory, 8).apply(main, x)

        x = np.float32(np.random.default_rng(1).normal(size=(5, 8)))
        close(answer(x), x, 1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(chunk=3), r"projection_chunk \(4\) must be a multiple of .* \(3\)"),
        (dict(chunk=8), r"projection_chunk \(4\) must be a multiple of .* \(8\)"),
        (dict(rate=0.0), r"rate must lie in \(0, 1\], got 0.0"),
        (dict(rate=1.5), r"rate must lie in \(0, 1\], got 1.5"),
        (dict(rate=2.1, memory=EXACT), r"rate must lie in \(0, 2\], got 2.1"),
        (
            dict(memory=dict(retention="channel", **EXACT)),
            "memory must be a matrix or an mlp",
        ),
        (dict(inputs="all"), "inputs must be one of dense, slice, got 'all'"),
        (dict(targets="k"), "targets must be one of all, projections, none, got 'k'"),
        (dict(projection_rate=1.0), "projection_rate must lie strictly .* got 1.0"),
        (dict(erase="key"), "erase must be one of rate, gate, got 'key'"),
        (dict(erase="gate"), "erase='gate' is .* got 'anchored'"),
        (
            dict(erase="gate", memory=EXACT | dict(dgd="none")),
            "erase='gate' is .* 'dot', 'none' and 1",
        ),
        (
            dict(erase="gate", memory=EXACT | dict(bias="l2", dgd="both")),
            "erase='gate' is .* 'l2', 'both' and 1",
        ),
        (
            dict(
                erase="gate",
                memory=EXACT | dict(dgd="both", steps=2),
                inputs="dense",
            ),
            "erase='gate' is .* 'both' and 2",
        ),
        (dict(erase_start=(0.9, 0.5)), "erase_start=.* is read by nothing"),
        (
            dict(memory=EXACT | dict(steps=2)),
            r"inputs must be 'dense' for memory.steps=2, got 'slice'",
        ),
        (
            dict(chunk=1, memory=dict(steps=3), inputs="dense"),
            r"projection_chunk must be 1 for memory.steps=3 .*'anchored', got 4",
        ),
    ],
)
def test_configs_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        configured(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(conv=0), "conv must be at least 1, got 0"),
        (dict(rate_start=1.0), "rate_start must lie strictly .* got 1.0"),
        (dict(half_life_start=0.5), "half_life_start must be a number of tokens"),
        (dict(half_life_start=float("inf")), "got inf; retention 'none' forgets"),
        (dict(momentum_start=0.0), "momentum_start must lie strictly .* got 0.0"),
        (dict(erase_start=(0.5, 1.0)), r"erase_start\[1\] must .* got 1.0"),
        (dict(erase_start=(0.5,)), r"erase_start must have two .* got \(0.5,\)"),
    ],
)
def test_starts_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        SelfModifyingConfig(**options)


def test_what_bounds_a_rate():
    assert configured(projection_chunk=4).rate_bound == 0.25
    assert configured(rate=0.3).rate_bound == 0.3
    assert remembering().rate_bound == 1.0
    assert SelfModifyingConfig(memory=MATRIX).rate_bound == 1.0
    twice = MemoryConfig(architecture="linear", gradient="exact")  # L2 and delta term
    assert SelfModifyingConfig(memory=twice).rate_bound == 0.5


def test_a_memory_that_turns_and_forgets_at_once_stays_bounded():
    """A thousand equal tokens at the highest rate and the least retention."""
    config = remembering(1, 1, TURNING, rate=2.0, rate_start=0.99)
    graphdef, params = build(config)
    layer = nnx.merge(graphdef, params)
    layer.bias_alpha[...] = jnp.full_like(layer.bias_alpha[...], -10.0)
    layer.bias_eta[...] = jnp.full_like(layer.bias_eta[...], 10.0)
    x = jnp.broadcast_to(tokens(1)[:, :1], (tokens(1).shape[0], 1000, D))
    _, state = jax.jit(lambda x: layer(x))(x)
    every = (*state.projection.weights.values(), *state.main.weights.values())
    assert max(float(jnp.abs(w).max()) for w in every) < 20.0


def test_one_write_can_be_read_at_once():
    """Gates wide open: the main memory answers the key it has read with its value.

    With enough features, that is: of short ones, and of hidden layers that move at the
    same time, it keeps a part of the error.
    """
    config = remembering(8, 8, targets="projections")
    config = dataclasses.replace(
        config, memory=dataclasses.replace(config.memory, expansion=4)
    )
    graphdef, params = build(config)
    params = nnx.clone(params)
    params["bias_eta"] = jax.tree.map(lambda b: b + 20.0, params["bias_eta"])
    params["bias_alpha"] = jax.tree.map(lambda b: b + 20.0, params["bias_alpha"])

    @jax.jit
    def share_left(params, x):
        model = nnx.merge(graphdef, params)
        start = model.initial_state(ROWS)
        _, state = model(x)
        seen, _, _ = model._static(x, start.tails.q)
        seen = Seen(*(jnp.swapaxes(a, 1, 2) for a in seen))
        generated, _ = model._generate(start, seen)
        apply = jax.vmap(jax.vmap(build_architecture(config.memory, model.width).apply))
        k, v = generated.tokens.k, generated.tokens.v

        def error(state):
            return jnp.linalg.norm(apply(state.main.weights, k) - v, axis=-1)

        return error(state) / error(start)

    assert np.max(share_left(params, tokens(1))) < 0.1


@pytest.mark.parametrize(
    "config",
    [
        configured(chunk=8, projection_chunk=16),
        remembering(chunk=8, projection_chunk=16),
        remembering(8, 16, dict(rate_law="energy")),
        remembering(8, 16, dict(rate_law="budget")),
        SelfModifyingConfig(
            memory=dataclasses.replace(MATRIX, chunk=8), projection_chunk=16
        ),
    ],
    ids=["literal", "output", "energy", "budget", "matrix"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_long_monotonous_texts_stay_bounded(seed, config):
    """4,096 tokens of nearly one direction at the highest rate: chunks add up there.

    Of layers and texts like these, but for their draws, the `output` law takes three in
    ten beyond this bound, one to 168.
    """
    layer = SelfModifyingTitans(D, HEADS, config, jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer, nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    params = jax.tree.unflatten(structure, moved)
    params["bias_eta"] = jax.tree.map(lambda b: b + 20.0, params["bias_eta"])
    noise = jax.random.normal(jax.random.key(seed), (ROWS, 4096, D))
    x = 3.0 * noise[:, :1] + 0.3 * noise
    y, state = jax.device_get(_long(graphdef, params, x))
    assert np.isfinite(y).all()
    for memory in (state.projection, state.main):
        for weights in memory.weights.values():
            assert np.abs(weights).max() < 50.0


_long = jax.jit(call, static_argnums=0)


@pytest.mark.parametrize("adaptive_q", [False, True])
def test_parallel_pieces_carry_every_convolution(adaptive_q):
    config = configured(adaptive_q=adaptive_q)
    graphdef, params = build(config)
    x = tokens(8)
    run = jax.jit(lambda x, state: call(graphdef, params, x, state, aligned=True))
    head, state = run(x[:, :4], initial_state(config))
    tail, state = run(x[:, 4:], state)
    whole, end = jax.jit(lambda x: call(graphdef, params, x))(x)
    close(np.concatenate([head, tail], axis=1), whole)
    close(state, end)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(momentum_start=0.9), "momentum_start=0.9 .*rule='gd' .* or 'nesterov'"),
        (
            dict(half_life_start=16.0, memory=dict(retention="none")),
            "half_life_start=16.0 .*retention='none' .* 'decay' would",
        ),
        (
            dict(memory=dict(features="elu")),
            "memory.features must be 'none', got 'elu'",
        ),
    ],
)
def test_what_no_memory_reads_is_refused_but_of_earlier_versions(options, message):
    memory = MemoryConfig(rule="gd", dgd="none") if "memory" in options else MLP
    memory = dataclasses.replace(memory, **options.get("memory", {}))
    with pytest.raises(ValueError, match=message):
        SelfModifyingConfig(**options | dict(memory=memory))
    saved = config_lib.to_json(SelfModifyingConfig(memory=MLP))
    saved |= options | dict(memory=config_lib.to_json(memory))
    found = config_lib.from_json(SelfModifyingConfig, saved)
    plain = dataclasses.replace(memory, features="none")
    assert found == SelfModifyingConfig(memory=plain)


def test_what_a_memory_reads_is_set():
    memory = MemoryConfig(rule="nesterov")
    config = SelfModifyingConfig(
        memory=memory, momentum_start=0.9, half_life_start=512.0
    )
    assert config_lib.from_json(SelfModifyingConfig, config_lib.to_json(config)) == (
        config
    )
