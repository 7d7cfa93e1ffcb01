"""The four choices of a memory, by numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.core.level import begin, unroll
from hope_jax.kernels.select import memory_scan
from hope_jax.memory import architecture, bias, named, rule
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_architecture,
    delta_rates,
    half_life_to_retention,
    memory_level,
    with_choices,
)
from hope_jax.memory.state import begin_memory
from tests import compare

close = compare.within()

PLAIN = dict(
    architecture="linear",
    bias="dot",
    rule="gd",
    dgd="none",
    retention="none",
    gradient="exact",
)
K, V = [1.0, 0.0], [2.0, 4.0]


def tokens(*keys, v=V, eta=0.5, alpha=0.25, theta=0.5):
    k = jnp.array(keys)
    full = lambda a: jnp.full((len(keys),), a)  # noqa: E731
    values = jnp.broadcast_to(jnp.array(v)[None], k.shape)
    return Tokens(k, values, k, full(eta), full(alpha), full(theta))


def after(config, weights, tokens):
    level = memory_level(config, tokens.k.shape[-1])
    weights = jax.tree.map(jnp.asarray, weights)
    return unroll(level, begin(level, weights), tokens)[0].params


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [[3.0, 0.0], [2.0, 2.0]]),  # M + 0.5 v k'
        (dict(bias="l2"), [[2.0, 0.0], [2.0, 2.0]]),  # M - 0.5 (M k - v) k'
        (dict(dgd="both"), [[2.0, 0.0], [2.0, 2.0]]),  # M (I - 0.5 k k') + 0.5 v k'
        (dict(dgd="both", bias="l2"), [[1.0, 0.0], [2.0, 2.0]]),
        (dict(retention="decay"), [[1.5, 0.0], [2.0, 0.5]]),  # 0.25 M + 0.5 v k'
        (dict(dgd="both", retention="decay"), [[0.5, 0.0], [2.0, 0.5]]),
        (dict(rule="momentum"), [[3.0, 0.0], [2.0, 2.0]]),  # its first step is plain
    ],
    ids=str,
)
def test_one_write(changes, expected):
    config = MemoryConfig(**PLAIN | changes)
    close(after(config, {"w": 2.0 * jnp.eye(2)}, tokens(K))["w"], expected)


def test_momentum_goes_on_with_what_was_written_before():
    """S1 = 0.5 v k1', S2 = 0.5 S1 + 0.5 v k2'; M2 = S1 + S2."""
    config = MemoryConfig(**PLAIN | dict(rule="momentum"))
    m = after(config, {"w": jnp.zeros((2, 2))}, tokens(K, [0.0, 1.0]))["w"]
    close(m, [[1.5, 1.0], [3.0, 2.0]])


def test_retention_lets_go_of_the_memory_and_not_of_its_momentum():
    """M2 = 0.25 M1 + S2, M1 = S1."""
    config = MemoryConfig(**PLAIN | dict(rule="momentum", retention="decay"))
    m = after(config, {"w": jnp.zeros((2, 2))}, tokens(K, [0.0, 1.0]))["w"]
    close(m, [[0.75, 1.0], [1.5, 2.0]])


@pytest.mark.parametrize(
    "changes, recalled",
    [
        (dict(bias="l2", dgd="none"), 1.0),
        (dict(bias="dot", dgd="both"), 1.0),
        (dict(bias="l2", dgd="both"), 0.5),
    ],
    ids=str,
)
def test_what_a_key_recalls_in_the_end(changes, recalled):
    """The delta rule keeps v; delta gradient descent on an L2 loss keeps v / 2."""
    config = MemoryConfig(**PLAIN | changes)
    m = after(config, {"w": jnp.ones((2, 2))}, tokens(*[K] * 40, eta=0.3))["w"]
    close(m @ jnp.array(K), recalled * np.array(V))


@pytest.mark.parametrize(
    "changes, multiplier",
    [
        (dict(gradient="exact"), (1 - 0.6) ** 4),
        (dict(gradient="anchored"), 1 - 4 * 0.6),
        (dict(gradient="anchored", dgd="both"), 2 * (1 - 0.6) ** 4 - 1),
    ],
    ids=str,
)
def test_how_one_key_forgets_over_a_chunk(changes, multiplier):
    """Anchored descent diverges once eta C > 2; the delta term keeps it bounded."""
    config = MemoryConfig(**PLAIN | dict(bias="l2", chunk=4) | changes)
    stream = tokens(*[K] * 4, v=[0.0, 0.0], eta=0.6)
    m = after(config, {"w": jnp.eye(2)}, stream)["w"]
    close(m, [[multiplier, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize("x, expected", [([1.0, 0.0], 1 / 3), ([2.0, 0.0], 1 / 6)])
def test_corrected_rate(x, expected):
    close(rule.corrected_rate(jnp.array(0.5), jnp.array(x)), expected)


def test_corrected_rate_never_overshoots():
    """The direction of the input keeps the fraction 1 - b |x|^2, in (0, 1)."""
    x = jnp.array([30.0, 40.0])
    kept = 1.0 - rule.corrected_rate(jnp.array(10.0), x) * jnp.vdot(x, x)
    assert 0.0 < float(kept) < 1e-3


@pytest.mark.parametrize(
    "architecture_, dgd, expected",
    [
        ("mlp", "both", {"w1": 1 / 6, "w2": 0.5}),
        ("mlp", "input", {"w2": 0.5}),
        ("mlp", "none", {}),
        ("linear", "both", {"w": 0.5}),
        ("linear", "input", {"w": 0.5}),
        ("linear", "none", {}),
    ],
)
def test_which_matrix_has_a_delta_term(architecture_, dgd, expected):
    config = MemoryConfig(architecture=architecture_, dgd=dgd)
    long = jnp.array([2.0, 0.0])
    inputs = {"w": long} if architecture_ == "linear" else {"w1": long, "w2": long}
    rates = delta_rates(config, jnp.array(0.5), inputs)
    assert rates.keys() == expected.keys()
    for name, rate in rates.items():
        close(rate, expected[name])


SMALL = dict(expansion=1, activation="tanh", rule="gd", retention="none", chunk=1)


def test_the_first_step_of_an_mlp_memory():
    """x + w1 tanh(w2 x) at w1 = 1, w2 = 0, k = 1: error -1, so w2 gains 0.5 alone."""
    config = MemoryConfig(**SMALL)
    weights = {"w1": jnp.ones((1, 1)), "w2": jnp.zeros((1, 1))}
    moved = after(config, weights, tokens([1.0], v=[2.0]))
    close(moved["w1"], [[1.0]])
    close(moved["w2"], [[0.5]])


@pytest.mark.parametrize(
    "dgd, w1, w2", [("both", 8 / 9, 0.5), ("input", 1.0, 0.5), ("none", 1.0, 1.0)]
)
def test_an_mlp_memory_without_error_only_forgets(dgd, w1, w2):
    """tanh(w2) = 1/2 and v = 1.5 is recalled: b2 = 1/2; b1 |a|^2 = (4/9) / 4 = 1/9."""
    config = MemoryConfig(**SMALL, dgd=dgd)
    start = float(np.arctanh(0.5))
    weights = {"w1": jnp.ones((1, 1)), "w2": jnp.full((1, 1), start)}
    moved = after(config, weights, tokens([1.0], v=[1.5]))
    close(moved["w1"], [[w1]])
    close(moved["w2"], [[w2 * start]])


def test_two_layers_read():
    memory = architecture.mlp(2, 1, "tanh")
    weights = {"w1": jnp.array([[3.0], [4.0]]), "w2": jnp.array([[1.0, -1.0]])}
    x = jnp.array([2.0, 1.5])
    close(memory.apply(weights, x), x + np.array([3.0, 4.0]) * np.tanh(0.5))
    inputs = memory.inputs(weights, x)
    close(inputs["w1"], [np.tanh(0.5)])
    close(inputs["w2"], x)


@pytest.mark.parametrize(
    "kind, shapes",
    [("linear", {"w": (6, 6)}), ("mlp", {"w1": (6, 18), "w2": (18, 6)})],
)
def test_shapes(kind, shapes, key):
    config = with_choices(MemoryConfig(expansion=3), architecture=kind)
    made = build_architecture(config, 6)
    weights = made.init(key)
    assert {name: w.shape for name, w in weights.items()} == shapes
    assert {w.dtype for w in weights.values()} == {jnp.dtype("float32")}
    inputs = made.inputs(weights, jnp.ones(6))
    assert {n: x.shape[0] for n, x in inputs.items()} == {
        n: shape[1] for n, shape in shapes.items()
    }


def test_biases():
    output, value = jnp.array([1.0, 3.0]), jnp.array([2.0, 1.0])
    close(bias.l2(output, value), 2.5)
    close(bias.dot(output, value), -5.0)
    close(jax.grad(bias.l2)(output, value), output - value)


def test_half_life():
    alpha = half_life_to_retention(jnp.array([1.0, 10.0]))
    close(alpha ** jnp.array([1.0, 10.0]), [0.5, 0.5])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(architecture="cnn"), "architecture must be one of vector, .* got 'cnn'"),
        (dict(features="rff"), "features must be one of none, .* got 'rff'"),
        (dict(dgd="hidden"), "dgd must be one of both, input, none, got 'hidden'"),
        (dict(recall="now"), "recall must be one of before, after, got 'now'"),
        (dict(retention="drop"), "retention must be one of none, .* got 'drop'"),
        (dict(gradient="true"), "gradient must be one of anchored, exact, got 'true'"),
        (dict(read="now"), "read must be one of post, pre, anchor, got 'now'"),
        (dict(activation="relu"), "activation must be one of gelu, silu, tanh, got"),
        (dict(chunk=0), "chunk must be at least 1, got 0"),
        (dict(expansion=0), "expansion must be at least 1, got 0"),
    ],
    ids=str,
)
def test_memories_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**options)


EXACT = dict(architecture="linear", gradient="exact", rule="gd", dgd="none")


@pytest.mark.parametrize(
    "choices, message",
    [
        (dict(architecture="vector", features="polynomial"), "features='polynomial'"),
        (dict(architecture="vector", norm=True), "norm=True needs a matrix"),
        (dict(gradient="exact"), "gradient='exact' needs architecture"),
        (EXACT | dict(bias="huber"), "linear in the memory.*bias='huber'"),
        (EXACT | dict(norm=True), "linear in the memory.*norm=True"),
        (EXACT | dict(window=2), "linear in the memory.*window=2"),
        (EXACT | dict(read="anchor"), "read='anchor' needs gradient='anchored'"),
        (EXACT | dict(rule="adam"), "needs rule 'gd', .* got 'adam'"),
        (EXACT | dict(retention="kl"), "retention='kl' is not linear"),
        (EXACT | dict(retention="elastic_net"), "retention='elastic_net' is not"),
        (dict(retention="channel"), "retention='channel' decays each key channel"),
        (EXACT | dict(retention="channel", rule="momentum"), "rule 'gd' or 'implicit'"),
        (EXACT | dict(retention="oja"), "retention='oja' .* got 'linear', 'l2'"),
        (EXACT | dict(retention="oja", bias="dot", read="pre"), "'exact', 'pre'"),
        (EXACT | dict(rule="newton", bias="dot"), "rule='newton' solves a ridge"),
        (EXACT | dict(rule="newton", retention="channel"), "retention='channel'"),
        (dict(window=2), "erases along one token's key.* window=2"),
        (dict(retention="lq"), "erases along one token's key.* retention='lq'"),
        (dict(window=2, dgd="none", rule="implicit"), "one pair at a time"),
        (
            EXACT | dict(retention="channel", dgd="both", recall="after"),
            "transition of rank two",
        ),
        (dict(recall="after", dgd="none"), "recall='after' is about a delta term"),
        (dict(recall="after", retention="none"), "got dgd='both', retention='none'"),
        (dict(steps=2), "steps=2 needs window=1.* chunk=16"),
        (dict(power=0.5), "power must be at least 1, got 0.5"),
        (dict(threshold=0.0), "threshold must be positive, got 0.0"),
        (dict(retention_power=2.0), "retention_power must be above 2"),
        (dict(depth=1), "depth must be at least 2, got 1"),
        (dict(rule="sgdm"), "rule must be one of gd, .* got 'sgdm'"),
        (dict(rule="optax.adamm"), "adam"),
        (dict(bias="l1"), "bias must be one of dot, .* got 'l1'"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused_with_the_reason(choices, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**choices)


def test_any_optax_transformation_is_a_rule():
    """As an object it stands for the whole flow; by name its step is times eta."""
    some = tokens(K, [0.0, 1.0])
    by_name = MemoryConfig(**PLAIN | dict(gradient="anchored", rule="optax.sgd"))
    named_level = memory_level(by_name, 2)
    plain = memory_level(MemoryConfig(**PLAIN), 2, flow=optax.sgd(0.5))
    start = jnp.eye(2)
    for level in (named_level, plain):
        end, _ = unroll(level, begin(level, {"w": start}), some)
        close(end.params["w"], [[2.0, 1.0], [2.0, 3.0]])


def test_a_plain_rule_repeats_its_step():
    """Two steps of half the way leave a quarter of the error; retention acts once."""
    config = MemoryConfig(**PLAIN | dict(bias="l2", retention="decay", steps=2))
    some = tokens(K, eta=0.5, alpha=0.5)
    start = begin_memory(config, {"w": jnp.zeros((2, 2))})
    state, _ = memory_scan(config, start, some)
    close(state.weights["w"], [[1.5, 0.0], [3.0, 0.0]])


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_truncation_stops_the_outer_gradient(impl):
    """Reads beyond the first stretch no longer depend on the start; values stay."""
    config = MemoryConfig(**PLAIN | dict(bias="l2", chunk=2))
    some = tokens(*[K, [0.6, 0.8]] * 4)

    def read(w, truncate):
        state = begin_memory(config, {"w": w})
        return memory_scan(config, state, some, impl=impl, truncate=truncate)[1]

    whole, cut = (read(jnp.eye(2), truncate) for truncate in (None, 4))
    close(cut, whole)

    def slope(at, truncate):
        return jax.grad(lambda w: jnp.sum(read(w, truncate)[at]))(jnp.eye(2))

    for at in (0, 3):
        close(slope(at, 4), slope(at, None))
    for at in (4, 7):
        assert np.any(slope(at, None) != 0.0)
        close(slope(at, 4), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"truncate \(3\) must be a multiple"):
        read(jnp.eye(2), 3)


@pytest.mark.parametrize("name", named.POINTS)
def test_a_point_says_its_recurrence_its_chunk_and_its_source(name):
    point, text = named.get(name), named.POINTS[name].__doc__
    assert "`" in text.splitlines()[0]
    if point.memory is not None:
        assert f"{point.chunk.capitalize()}." in text.split("\n\n")[0]
        assert point.source in text


def test_a_point_takes_another_chunk_and_an_unknown_one_is_refused():
    assert named.get("titans", chunk=8).memory.chunk == 8
    with pytest.raises(ValueError, match="Did you mean 'titans'"):
        named.get("titan")
    with pytest.raises(ValueError, match=r"chunk \(8\) does not apply"):
        named.get("softmax_attention", chunk=8)
