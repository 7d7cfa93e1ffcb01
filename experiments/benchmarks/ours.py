"""Our memories as programs of a `worker`: the counterparts of `peers`, and every named
point by itself."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hope_jax.kernels.chunk import piece
from hope_jax.kernels.select import memory_scan, scan_chunks
from hope_jax.memory import named
from hope_jax.memory.compose import MemoryConfig, Tokens, build_architecture
from hope_jax.memory.state import begin_memory, commit
from hope_jax.models.mixers.memory import MemoryMixer, MemoryMixerConfig
from hope_jax.train import metrics, sharding

Arrays = dict[str, Any]


class Ours(NamedTuple):
    """One program, for one row and one head: `(learned, context) -> y`.

    Attributes:
      run: the memory's life; leaves of `context` lead with time.
      learned: what the level above learns, leaves `[H, ...]`.
      context: what each row brings, leaves `[B, H, T, ...]`.
    """

    run: Callable[[Any, Any], jax.Array]
    learned: Any
    context: Any


def versions() -> dict[str, str]:
    return metrics.versions()


def reset() -> None:
    """Forgets what was compiled."""
    jax.clear_caches()
    gc.collect()


def build(spec: dict[str, Any], arrays: Arrays):
    """A program, and what makes NumPy arrays of its outputs.

    Args:
      spec: `program`, `canary` or one of `PROGRAMS`; its settings; `task`, `forward`,
        `training` or `decode`. Rows are spread over the devices there are.
      arrays: its inputs and the `cotangent` of its output.
    """
    if spec["program"] == "canary":
        a = jax.random.normal(jax.random.key(0), (spec["size"],) * 2)
        return _compiled(jnp.matmul, a, a), lambda found: {}

    ours = PROGRAMS[spec["program"]](spec, arrays)
    mesh = sharding.make_mesh()
    rows_apart = sharding.by_rows(mesh)
    on_each_device = jax.shard_map(
        jax.vmap(jax.vmap(ours.run)),
        mesh=mesh,
        in_specs=rows_apart.spec,
        out_specs=rows_apart.spec,
        check_vma=False,  # nothing passes between rows
    )

    def forward(learned, context):
        rows = jax.tree.leaves(context)[0].shape[0]
        spread = lambda w: jnp.broadcast_to(w[None], (rows, *w.shape))  # noqa: E731
        return on_each_device(jax.tree.map(spread, learned), context)

    inputs = (
        jax.device_put(ours.learned, sharding.replicated(mesh)),
        jax.device_put(ours.context, rows_apart),
    )
    if spec["task"] != "training":
        return _compiled(forward, *inputs), lambda y: {"y": np.asarray(y)}

    def loss(learned, context, cotangent):
        return jnp.vdot(forward(learned, context), cotangent)

    cotangent = jax.device_put(arrays["cotangent"], rows_apart)
    program = _compiled(jax.value_and_grad(loss, argnums=(0, 1)), *inputs, cotangent)
    return program, _gradients


def _compiled(function: Callable, *arguments: Any) -> Callable[[], Any]:
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def _gradients(found) -> dict[str, np.ndarray]:
    _, (learned, context) = found
    named_leaves = {**learned, **context}
    return {name: np.asarray(x) for name, x in named_leaves.items()}


def titans(spec: dict[str, Any], arrays: Arrays) -> Ours:
    """Titans' two-layer memory with momentum for every token.

    `store` tokens share a gate: the decay falls on the first of them, which is what a
    decay once a chunk comes to. Gradients are taken at the start of the chunk, or of
    the sequence where `anchor` is None: then no chunk is committed, and reads of a
    chunk's start come from the running weights.
    """
    config = MemoryConfig(
        rule="momentum", dgd="none", read=spec["read"], chunk=spec["chunk"]
    )
    apply = build_architecture(config, spec["width"]).apply
    store = spec["store"]

    def run(weights, context):
        decay, theta = (
            jnp.repeat(jax.nn.sigmoid(context[name]), store)
            for name in ("decay", "momentum")
        )
        first = jnp.arange(decay.shape[0]) % store == 0
        tokens = Tokens(
            *(context[name] for name in ("k", "v", "q", "eta")),
            alpha=jnp.where(first, 1.0 - decay, 1.0),
            theta=theta,
        )
        state = begin_memory(config, weights)
        if spec["task"] == "decode":
            return _decode(config, state, tokens)
        if spec["anchor"] is not None:
            return memory_scan(config, state, tokens)[1]
        return scan_chunks(chunk, chunk, config.chunk, state, tokens, remat=True)[1]

    def chunk(state, tokens):
        if config.read != "anchor":
            return piece(config, state, tokens)
        y = apply(state.weights, tokens.q)
        return piece(config, state, tokens, reads=False)[0], y

    context = {n: arrays[n] for n in ("k", "v", "q", "eta", "decay", "momentum")}
    return Ours(run, {n: arrays[n] for n in ("w1", "w2")}, context)


def gated_delta(spec: dict[str, Any], arrays: Arrays) -> Ours:
    """`decay` is the logarithm of the retained fraction."""
    config = named.get("gated_delta_net", spec["chunk"]).memory

    def run(weights, context):
        tokens = Tokens(
            *(context[name] for name in ("k", "v", "q", "eta")),
            alpha=jnp.exp(context["decay"]),
            theta=jnp.zeros_like(context["eta"]),
        )
        state = begin_memory(config, weights)
        if spec["task"] == "decode":
            return _decode(config, state, tokens)
        return memory_scan(config, state, tokens)[1]

    context = {n: arrays[n] for n in ("k", "v", "q", "eta", "decay")}
    return Ours(run, {"w": arrays["w"]}, context)


def point(spec: dict[str, Any], arrays: Arrays) -> Ours:
    """The memory of a named point, its tokens made by its own layer from `x`; `impl`
    says how it is computed."""
    named_point = named.get(spec["point"])
    config = named_point.memory
    mixer = MemoryMixer(
        arrays["x"].shape[-1],
        spec["heads"],
        MemoryMixerConfig(memory=config, gates=named_point.gates),
        jnp.float32,
        rngs=nnx.Rngs(0),
    )
    tokens, _ = mixer.tokens(arrays["x"], mixer.initial_state(arrays["x"].shape[0]))

    def run(weights, context):
        state = begin_memory(config, weights)
        return memory_scan(config, state, Tokens(**context), impl=spec["impl"])[1]

    learned = {name: start[...] for name, start in mixer.start.items()}
    present = {n: x for n, x in tokens._asdict().items() if x is not None}
    return Ours(run, learned, present)


def _decode(config: MemoryConfig, state, tokens: Tokens):
    """One token a step of a scan, as when tokens are generated."""

    def step(carry, token):
        state, position = carry
        one = jax.tree.map(lambda x: x[None], token)
        state, y = piece(config, state, one)
        ended = (position + 1) % config.chunk == 0
        state = jax.tree.map(
            lambda new, old: jnp.where(ended, new, old), commit(state), state
        )
        return (state, position + 1), y[0]

    return jax.lax.scan(step, (state, jnp.int32(0)), tokens)[1]


PROGRAMS = {"titans": titans, "gated_delta": gated_delta, "point": point}
