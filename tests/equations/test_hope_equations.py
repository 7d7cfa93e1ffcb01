"""One test an equation of arXiv:2512.24695: self-modifying Titans and Hope.

The layer is read token by token, and every number of a token is worked out again in
NumPy from the memories that the layer returned before it. Rows, heads and convolutions
(of width 1, the identity at the start) are left out: one row, one head.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.core.level import begin, unroll
from hope_jax.memory.architecture import mlp
from hope_jax.memory.compose import MemoryConfig, Tokens, memory_level, with_choices
from hope_jax.models.block import Block
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.self_modifying import (
    SelfModifyingConfig,
    SelfModifyingTitans,
)
from hope_jax.models.reference import self_modifying_reference
from tests import compare

close = compare.within(1e-4, 1e-5)

D, T = 4, 4
NAMES = ("k", "v", "eta", "alpha", "main")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.sqrt(np.sum(x**2) + 1e-6)


def configured(chunk=1, **memory):
    """The layer of the equations: no momentum, free values, read before each write."""
    options = MemoryConfig(
        chunk=chunk, rule="gd", read="pre", expansion=1, activation="tanh"
    )
    return SelfModifyingConfig(
        memory=with_choices(options, **memory),
        projection_chunk=chunk,
        conv=1,
        conv_activation="none",
        inputs="slice",
        targets="all",
        rate=0.9,
        projection_rate=None,
        scale_free=False,
    )


def recall(memory, x):
    """M(x), equation 89 or a matrix."""
    if "w" in memory:
        return memory["w"] @ x
    return x + memory["w1"] @ np.tanh(memory["w2"] @ x)


def memories(state):
    """The layer's memories by name, as NumPy matrices."""
    named = {
        name: {n: np.asarray(w[0, 0, i]) for n, w in state.projection.weights.items()}
        for i, name in enumerate(NAMES[:-1])
    }
    return named | {
        "main": {n: np.asarray(w[0, 0]) for n, w in state.main.weights.items()}
    }


def slow_weights(layer):
    """What the outer level keeps: W_q, the read-outs, gate, norm and output."""
    return SimpleNamespace(
        q=np.asarray(layer.q.kernel[...]),
        gate=np.asarray(layer.gate.kernel[...]),
        norm=np.asarray(layer.norm.scale[...]),
        out=np.asarray(layer.out.kernel[...]),
        eta=(np.asarray(layer.read_eta[...][0]), float(layer.bias_eta[...][0])),
        alpha=(np.asarray(layer.read_alpha[...][0]), float(layer.bias_alpha[...][0])),
        rate=layer.config.rate_bound,
    )


@functools.cache
def life(config):
    """T tokens, the memories before and after each, and the output of each."""
    layer = SelfModifyingTitans(D, 1, config, jnp.float32, rngs=nnx.Rngs(0))
    for weights in (layer.projection_start, layer.main_start):
        for i, w in enumerate(weights.values()):
            w[...] = 0.6 * jax.random.normal(jax.random.key(i), w.shape)
    graphdef, params = nnx.split(layer, nnx.Param)
    step = jax.jit(lambda x, state: nnx.merge(graphdef, params)(x, state))
    # What a chunk has taught so far waits for its end.
    ended = jax.jit(lambda state: nnx.merge(graphdef, params).ended(state))
    x = jax.random.normal(jax.random.key(9), (T, D))
    state, states, reads = layer.initial_state(1), [], []
    for x_t in x:
        states.append(memories(ended(state)))
        y, state = step(x_t[None, None], state)
        reads.append(np.asarray(y[0, 0]))
    return SimpleNamespace(
        layer=layer,
        weights=slow_weights(layer),
        x=np.asarray(x),
        states=[*states, memories(ended(state))],
        reads=reads,
    )


def generate(weights, memory, x):
    """k, v, q, eta and alpha of one token from the memories it is read by."""
    gate = lambda name: sigmoid(  # noqa: E731
        weights.__dict__[name][0] @ recall(memory[name], x) + weights.__dict__[name][1]
    )
    return SimpleNamespace(
        k=unit(recall(memory["k"], x)),
        v=recall(memory["v"], x),
        q=unit(weights.q.T @ x),
        eta=weights.rate * gate("eta"),
        alpha=gate("alpha"),
    )


def output(weights, x, o):
    """The layer's way out: norm, gate and projection."""
    normed = o / np.sqrt(np.mean(o**2) + 1e-6) * weights.norm
    gate = x @ weights.gate
    return (normed * gate * sigmoid(gate)) @ weights.out


def gradient(memory, k, target):
    """Of |M(k) - target|^2 / 2 in each matrix."""
    error = recall(memory, k) - target
    if "w" in memory:
        return {"w": np.outer(error, k)}
    hidden = np.tanh(memory["w2"] @ k)
    back = (memory["w1"].T @ error) * (1 - hidden**2)
    return {"w1": np.outer(error, hidden), "w2": np.outer(back, k)}


def forget(memory, k, eta, alpha):
    """M (alpha I - eta k k^T) by layer: W1 along its own input, proximal rate."""

    def factor(x, rate):
        return alpha * np.eye(len(x)) - rate * np.outer(x, x)

    if "w" in memory:
        return {"w": memory["w"] @ factor(k, eta)}
    hidden = np.tanh(memory["w2"] @ k)
    rate = eta / (1 + eta * hidden @ hidden)
    return {
        "w1": memory["w1"] @ factor(hidden, rate),
        "w2": memory["w2"] @ factor(k, eta),
    }


def test_equation_83_every_projection_is_read_from_its_memory():
    """k_t, v_t, eta_t, alpha_t = M_{., t-1}(x_t); y_t = M_{mem, t-1}(W_q x_t).

    Implements: hope_jax.models.mixers.self_modifying.SelfModifyingTitans
    """
    seen = life(configured())
    for t, x in enumerate(seen.x):
        made = generate(seen.weights, seen.states[t], x)
        o = recall(seen.states[t]["main"], made.q)
        close(seen.reads[t], output(seen.weights, x, o))


def test_equation_84_a_memory_makes_its_own_values():
    """v^_t = M_{., t-1}(v_t): seen in what a matrix without decay stores for k_t.

    Implements: hope_jax.models.mixers.self_modifying.SelfModifyingTitans
    """
    seen = life(
        configured(architecture="linear", bias="dot", dgd="none", retention="none")
    )
    for t, x in enumerate(seen.x):
        before, after = seen.states[t], seen.states[t + 1]
        made = generate(seen.weights, before, x)
        for name in NAMES:
            stored = (after[name]["w"] - before[name]["w"]) @ made.k
            value = stored / (made.eta * made.k @ made.k)
            close(value, recall(before[name], made.v))


def test_equation_85_each_memory_descends_on_its_own_objective():
    """min L(M; k_t, v^_t): one step of size eta_t lowers it, and is its gradient's.

    Implements: hope_jax.models.reference.self_modifying_reference
    """
    config = configured(dgd="none", retention="none")
    seen = life(config)
    run = jax.jit(lambda x: self_modifying_reference(seen.layer, x)[1])
    made_by_level = run(jnp.asarray(seen.x[None, :1]))
    made = generate(seen.weights, seen.states[0], seen.x[0])
    for i, name in enumerate(NAMES):
        memory = seen.states[0][name]
        target = recall(memory, made.v)
        slope = gradient(memory, made.k, target)
        moved = {n: memory[n] - made.eta * slope[n] for n in memory}
        after = (
            made_by_level.main.params
            if name == "main"
            else {n: w[:, :, i] for n, w in made_by_level.projection.params.items()}
        )
        for n in memory:
            close(after[n][0, 0], moved[n])
            close(seen.states[1][name][n], moved[n])


def test_equation_86_the_memory_answers_before_it_writes():
    """y_t = M_{mem, t-1}(q_t), and the state after the write is another answer.

    Implements: hope_jax.memory.compose.memory_level
    """
    config = configured().memory
    level = memory_level(config, D)
    seen = life(configured())
    made = generate(seen.weights, seen.states[0], seen.x[0])
    memory = seen.states[0]["main"]
    token = Tokens(made.k, recall(memory, made.v), made.q, made.eta, made.alpha, 0.0)
    context = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32)[None], token)
    state = begin(level, jax.tree.map(jnp.asarray, memory))
    _, before = unroll(level, state, context)
    _, after = unroll(level._replace(read_at="post"), state, context)
    close(before[0], recall(memory, made.q))
    close(after[0], recall(seen.states[1]["main"], made.q))
    assert np.max(np.abs(after - before)) > 1e-2


def test_equation_87_the_objective_is_the_squared_error():
    """L(M; k, v^) = |M(k) - v^|^2, here with the half that its gradient absorbs.

    Implements: hope_jax.memory.compose.memory_level
    """
    level = memory_level(configured().memory, D)
    rng = np.random.default_rng(0)
    memory = {n: rng.normal(size=(D, D)).astype("f") for n in ("w1", "w2")}
    k, v = rng.normal(size=(2, D)).astype("f")
    given = jax.tree.map(jnp.asarray, (memory, Tokens(k, v, k, 0.1, 1.0, 0.0)))
    close(level.objective(*given), np.sum((recall(memory, k) - v) ** 2) / 2)
    slope = jax.grad(level.objective)(*given)
    for n, expected in gradient(memory, k, v).items():
        close(slope[n], expected)


@pytest.mark.parametrize("architecture", ["mlp", "linear"])
def test_equation_88_delta_gradient_descent_with_decay(architecture):
    """M_t = M_{t-1} (alpha_t I - eta_t k_t k_t^T) - eta_t grad L(M_{t-1}; k_t, v^_t).

    Implements: hope_jax.models.mixers.self_modifying.SelfModifyingTitans
    """
    seen = life(configured(architecture=architecture))
    for t, x in enumerate(seen.x):
        before, after = seen.states[t], seen.states[t + 1]
        made = generate(seen.weights, before, x)
        for name in NAMES:
            kept = forget(before[name], made.k, made.eta, made.alpha)
            slope = gradient(before[name], made.k, recall(before[name], made.v))
            for n in kept:
                close(after[name][n], kept[n] - made.eta * slope[n])


def test_equation_89_a_residual_memory_of_two_layers():
    """M(x) = x + W_1 sigma(W_2 x).

    Implements: hope_jax.memory.architecture.mlp
    """
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(3, 5)).astype("f"), rng.normal(size=(5, 3)).astype("f")
    x = rng.normal(size=3).astype("f")
    weights = {"w1": jnp.asarray(w1), "w2": jnp.asarray(w2)}
    made = mlp(3, 5, "tanh").apply(weights, jnp.asarray(x))
    close(made, x + w1 @ np.tanh(w2 @ x))


def chunk_by_chunk(seen, chunk, write):
    """Every memory along the tokens, generated by its state at each chunk's start.

    `write` is `(running, start, made, target) -> running`, for one memory.
    """
    running = dict(seen.states[0])
    for t, x in enumerate(seen.x):
        if t % chunk == 0:
            start = dict(running)
        made = generate(seen.weights, start, x)
        for name in NAMES:
            target = recall(start[name], made.v)
            running[name] = write(running[name], start[name], made, target)
        yield made, start, running


def test_equation_90_a_chunk_is_generated_at_its_start():
    """All reads and gradients at M_xi, xi = C floor((t - 1) / C); decay token by token.

    Printed as C ceil(t / C), the end of the present chunk, which is not causal.

    Implements: hope_jax.models.mixers.self_modifying.SelfModifyingTitans
    """
    seen = life(configured(chunk=2, read="anchor"))

    def write(running, start, made, target):
        # A hidden layer's own input too is that of the chunk's start.
        hidden = np.tanh(start["w2"] @ made.k)
        rate = made.eta / (1 + made.eta * hidden @ hidden)
        slope = gradient(start, made.k, target)
        along = {"w1": (hidden, rate), "w2": (made.k, made.eta)}
        return {
            n: running[n] @ (made.alpha * np.eye(D) - b * np.outer(a, a))
            - made.eta * slope[n]
            for n, (a, b) in along.items()
        }

    for t, (made, start, running) in enumerate(chunk_by_chunk(seen, 2, write)):
        o = recall(start["main"], made.q)
        close(seen.reads[t], output(seen.weights, seen.x[t], o))
        for name in NAMES:
            for n in running[name]:
                close(seen.states[t + 1][name][n], running[name][n])


def linear_write(error):
    """M (alpha I - eta k k^T) - eta error k^T, with `error` of (start, k, target)."""

    def write(running, start, made, target):
        kept = forget(running, made.k, made.eta, made.alpha)["w"]
        e = error(start["w"], made.k, target)
        return {"w": kept - made.eta * np.outer(e, made.k)}

    return write


def holds_for_matrices(bias, error):
    seen = life(configured(chunk=2, architecture="linear", bias=bias))
    for t, (_, _, running) in enumerate(chunk_by_chunk(seen, 2, linear_write(error))):
        for name in NAMES:
            close(seen.states[t + 1][name]["w"], running[name]["w"])


@pytest.mark.parametrize("bias", ["dot", "l2"])
def test_equation_91_memories_that_are_matrices(bias):
    """M_t = M_{t-1} (alpha_t I - eta_t k_t k_t^T) - eta_t grad L(M_xi; k_t, v^_t).

    Implements: hope_jax.models.mixers.self_modifying.SelfModifyingTitans
    """
    losses = {
        "dot": lambda m, k, v: -jnp.vdot(m @ k, v),
        "l2": lambda m, k, v: jnp.sum((m @ k - v) ** 2) / 2,
    }

    def error(m, k, v):  # the gradient is error k^T, so its product with k / |k|^2
        return np.asarray(jax.grad(losses[bias])(m, k, v)) @ k / (k @ k)

    holds_for_matrices(bias, error)


def test_equation_92_with_the_dot_product_this_is_the_gated_delta_rule():
    """M_t = M_{t-1} (alpha_t I - eta_t k_t k_t^T) + eta_t v^_t k_t^T (printed with -).

    Implements: hope_jax.models.mixers.self_modifying.SelfModifyingTitans
    """
    holds_for_matrices("dot", lambda m, k, v: -v)


def test_equation_93_with_the_squared_error():
    """M_t = M_{t-1} (alpha_t I - eta_t k_t k_t^T) - eta_t (M_xi k_t - v^_t) k_t^T.

    Implements: hope_jax.models.mixers.self_modifying.SelfModifyingTitans
    """
    holds_for_matrices("l2", lambda m, k, v: m @ k - v)


@functools.cache
def hope():
    """A Hope block, token by token: what its mixer reads, and its memories."""
    levels = tuple(CMSLevel(period=p) for p in (8, 16))
    config = ModelConfig(
        d_model=D,
        heads=1,
        mixer=configured(),
        cms=CMSConfig(levels=levels, hidden=3),
    )
    block = Block(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(block, nnx.Param)
    step = jax.jit(lambda x, state: nnx.merge(graphdef, params)(x, state))
    x = jax.random.normal(jax.random.key(9), (T, D))
    state, states, reads = block.initial_state(1), [], []
    for x_t in x:
        states.append(memories(state.mixer))
        y, state = step(x_t[None, None], state)
        reads.append(np.asarray(y[0, 0]))
    x = np.asarray(x)
    h = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6)
    return SimpleNamespace(
        block=block,
        weights=slow_weights(block.mixer),
        x=x,
        h=h * np.asarray(block.norm.scale[...]),
        states=[*states, memories(state.mixer)],
        reads=reads,
    )


def chain(block, x):
    """x through the CMS levels, each x + MLP(norm(x))."""
    for level in block.levels:
        h = x / np.sqrt(np.mean(x**2) + 1e-6) * np.asarray(level.norm.scale[...])
        gate, up, down = (
            np.asarray(w.kernel[...])
            for w in (level.mlp.gate, level.mlp.up, level.mlp.down)
        )
        inner = h @ gate
        x = x + (inner * sigmoid(inner) * (h @ up)) @ down
    return x


def test_equation_94_hope_reads_its_memories():
    """o_t = M_{mem, t-1}(q_t), with k_t, v_t, eta_t, alpha_t = M_{., t-1}(x_t).

    Implements: hope_jax.models.block.Block
    """
    seen = hope()
    for t, h in enumerate(seen.h):
        made = generate(seen.weights, seen.states[t], h)
        o = output(seen.weights, h, recall(seen.states[t]["main"], made.q))
        assert np.max(np.abs(o)) > 1e-2
        close(seen.reads[t], chain(seen.block, seen.x[t] + o))


def test_equation_95_hope_makes_its_own_values():
    """v^_t = M_{., t-1}(v_t): with any other target, W_2 moves elsewhere.

    Implements: hope_jax.models.block.Block
    """
    seen = hope()
    made = generate(seen.weights, seen.states[0], seen.h[0])
    for name in NAMES:
        memory, after = seen.states[0][name], seen.states[1][name]
        kept = forget(memory, made.k, made.eta, made.alpha)
        hidden = np.tanh(memory["w2"] @ made.k)
        # W_1 moves by -eta (M(k) - v^) a^T: solve for v^.
        error = (kept["w1"] - after["w1"]) @ hidden / (made.eta * hidden @ hidden)
        close(recall(memory, made.k) - error, recall(memory, made.v))


def test_equation_96_hope_writes_by_delta_gradient_descent():
    """M_t = M_{t-1} (alpha_t I - eta_t k_t k_t^T) - eta_t grad L(M_{t-1}; k_t, v^_t).

    Implements: hope_jax.models.block.Block
    """
    seen = hope()
    for t, h in enumerate(seen.h):
        before, after = seen.states[t], seen.states[t + 1]
        made = generate(seen.weights, before, h)
        for name in NAMES:
            kept = forget(before[name], made.k, made.eta, made.alpha)
            slope = gradient(before[name], made.k, recall(before[name], made.v))
            for n in kept:
                close(after[name][n], kept[n] - made.eta * slope[n])


def test_equation_97_then_the_chain_of_continuum_memory():
    """y_t = MLP_fk(... MLP_f1(o_t)), from fast to slow; blocks are residual.

    Implements: hope_jax.models.block.Block
    """
    seen = hope()
    x = jnp.asarray(seen.x[None])
    mixed, _ = seen.block.mixer(seen.block.norm(x))
    y, _ = seen.block(x)
    for t in range(T):
        close(y[0, t], chain(seen.block, np.asarray(x + mixed)[0, t]))
        close(y[0, t], seen.reads[t])
