"""What a worker of `experiments.benchmarks.models` times: programs of whole models.

It uses what every version of `hope_jax` has had, so that an older checkout can be timed
beside this one. A program is asked for by a spec:

    model     a name of the zoo
    task      compile, training, forward, prefill or decode; a step of training is that
              of `launch.train` (`lm.apply(after=)`) where the checkout has it. Or layer
              or layer training, of the self-modifying layer with chunks of 64
    rows, T   of the tokens; of decode, as many are read one after another
    turns     parts in which the rows of a training step are read, one after another,
              where the checkout knows how; 1 by default
    set       {name: value} of the model's config
"""

import dataclasses
import functools
import importlib.metadata
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hope_jax.core.config import override
from hope_jax.models import lm, zoo
from hope_jax.train import sharding


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax")
    return {name: importlib.metadata.version(name) for name in names}


def reset() -> None:
    jax.clear_caches()


def build(spec: dict[str, Any], arrays: dict[str, np.ndarray]):
    """`(program, collect)` of a spec."""
    del arrays
    config = zoo.get(spec["model"])
    if spec.get("set"):
        config = override(config, [f"{k}={v}" for k, v in spec["set"].items()])
    more = [spec["turns"]] if spec["task"] == "training" else []
    return _TASKS[spec["task"]](config, spec["rows"], spec["T"], *more)


def _parts(config, rows, length):
    graphdef, params = lm.build(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, config.vocab)
    return graphdef, params, tokens


def _training_step(config, rows, length, turns=1):
    graphdef, params, tokens = _parts(config, rows, length)
    tx = optax.adam(1e-3, eps=np.float32(1e-8))

    def losses(params, tokens):
        before = graphdef, params, tokens[:, :-1]
        read = functools.partial(lm.apply, *before, horizon=length)
        if "after" in inspect.signature(lm.apply).parameters:  # as training does
            return read(after=tokens[:, -1])[0]
        logits, _ = read(labels=tokens[:, 1:])
        return lm.next_token_loss(logits, tokens[:, 1:])

    def loss(params, tokens):
        return losses(params, tokens).mean(), ()

    differentiate = jax.value_and_grad(loss, has_aux=True)
    if turns > 1 and hasattr(sharding, "in_turn"):
        parts = sharding.in_turn(None, turns)
        differentiate = lambda params, tokens: parts(loss, params, tokens)[:2]  # noqa: E731

    def step(params, opt, tokens):
        (value, _), gradient = differentiate(params, tokens)
        updates, opt = tx.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return step, (params, tx.init(params), tokens)


def _compile(config, rows, length):
    """Tracing, lowering and compiling a training step, from nothing."""
    step, arguments = _training_step(config, rows, length)

    def program():
        jax.clear_caches()
        lowered = jax.jit(step).lower(*arguments)
        lowered.compile()
        return lowered

    def collect(lowered):
        text = lowered.as_text()
        return {
            "lines": np.asarray(len(text.splitlines())),
            "products": np.asarray(text.count("stablehlo.dot_general")),
        }

    return program, collect


def _called(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def _training(config, rows, length, turns):
    step, arguments = _training_step(config, rows, length, turns)
    return _called(step, *arguments), lambda out: {"loss": np.asarray(out[2])}


def _forward(config, rows, length):
    graphdef, params, tokens = _parts(config, rows, length)
    read = functools.partial(lm.apply, graphdef)
    run = _called(lambda params, tokens: read(params, tokens)[0], params, tokens)
    return run, lambda out: {"logits": np.asarray(out[:, -1])}


def _decode(config, rows, length):
    """The model's own choices, one token after another, in one program."""
    graphdef, params, tokens = _parts(config, rows, length)

    def likeliest(logits, _=None):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def one_by_one(params, state, logits):
        def step(carry, _):
            state, token = carry
            logits, state = lm.apply(graphdef, params, token[:, None], state)
            return (state, likeliest(logits[:, -1])), token

        carry = state, likeliest(logits)
        return jax.lax.scan(step, carry, None, length)[1].T

    def in_blocks(params, state, logits):
        xs = jnp.zeros((length,))
        return lm.write(graphdef, params, state, logits, likeliest, xs)[0]

    state = jax.jit(lambda p: lm.initial_state(graphdef, p, rows))(params)
    logits = jax.nn.one_hot(tokens[:, 0], config.vocab)
    write = in_blocks if hasattr(lm, "write") else one_by_one
    return _called(write, params, state, logits), lambda out: {
        "tokens": np.asarray(out)
    }


def _layer(config, rows, length, training=False):
    """One self-modifying layer as wide as the model, forward or with its gradient."""
    from hope_jax.models.mixers.self_modifying import (  # not there in every checkout
        MLP,
        SelfModifyingConfig,
        SelfModifyingTitans,
    )

    memory = dataclasses.replace(MLP, chunk=64)
    layer = SelfModifyingTitans(
        *(config.d_model, config.heads),
        SelfModifyingConfig(memory=memory, projection_chunk=64),
        jnp.float32,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(layer, nnx.Param)
    x = jax.random.normal(jax.random.key(0), (rows, length, config.d_model))

    def forward(params, x):
        return nnx.merge(graphdef, params)(x)[0]

    def loss(params, x):
        return jnp.vdot(forward(params, x), jnp.flip(x, axis=1))

    program = jax.grad(loss, argnums=(0, 1)) if training else forward
    return _called(program, params, x), lambda out: {
        "mean square": np.mean([np.mean(np.square(a)) for a in jax.tree.leaves(out)])
    }


_TASKS = {
    "compile": _compile,
    "training": _training,
    "forward": _forward,
    "decode": _decode,
    "layer": _layer,
    "layer training": functools.partial(_layer, training=True),
}
