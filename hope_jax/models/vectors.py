"""A model that reads vectors, not tokens: the blocks of a language model between two
projections.

Frames of a sound, images, measurements. Its `ModelConfig` is that of a language model,
with answers for a vocabulary: of each vector it says, by logits, which answer it wants.
Levels of a continuum memory that move while they read do so by the loss of the next
token, which vectors do not have; their mixers' memories need no loss but their own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from hope_jax.models.block import BlockState, stacked
from hope_jax.models.config import ModelConfig
from hope_jax.models.layers import DTYPES, dense, rms_norm


class VectorModel(nnx.Module):
    """What the outermost level learns: two projections, blocks between them, a norm."""

    def __init__(self, config: ModelConfig, inputs: int, *, rngs: nnx.Rngs):
        width, dtype = config.d_model, DTYPES[config.dtype]
        self.embed = dense(inputs, width, dtype, rngs, bias=True)
        self.blocks = stacked(config, rngs=rngs)
        self.norm = rms_norm(width, dtype, rngs, config.norm_epsilon)
        self.head = dense(width, config.vocab, jnp.float32, rngs, scale=0.1, bias=True)


def build(
    config: ModelConfig, inputs: int, key: Array
) -> tuple[nnx.GraphDef, nnx.State]:
    """A new model as `(graphdef, params)`; after this only pure functions.

    Args:
      config: of the blocks; `vocab` is the number of answers.
      inputs: numbers of a vector.
      key: of the parameters.

    Raises:
      ValueError: no inputs, or CMS levels that move while they read.
    """
    if inputs < 1:
        raise ValueError(f"inputs must be at least 1, got {inputs}.")
    if config.fast:
        periods = [config.cms.levels[i].period for i in config.fast]
        raise ValueError(
            f"cms.levels of periods {periods} move by the loss of the next token, "
            "which vectors do not have: use levels of rate 0, or of infinite period."
        )
    return nnx.split(VectorModel(config, inputs, rngs=nnx.Rngs(key)), nnx.Param)


def count_parameters(config: ModelConfig, inputs: int) -> int:
    shapes = jax.eval_shape(
        lambda key: build(config, inputs, key)[1], jax.random.key(0)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def apply(
    graphdef: nnx.GraphDef,
    params: PyTree,
    x: Float[Array, "B T F"],
    state: PyTree | None = None,
) -> tuple[Float[Array, "B T N"], PyTree]:
    """Reads vectors, in parallel; with a state one after another, from where it stands.

    Args:
      graphdef, params: of `build`.
      x: any number of them, at least one a row.
      state: where each row stands; None begins.

    Returns:
      Float32 logits at every vector, of what was read up to it, and the new state,
      whose leaves lead with rows.

    Raises:
      ValueError: vectors of another length than the model's.
    """
    model: Any = nnx.merge(graphdef, params)
    inputs = model.embed.in_features
    if x.ndim != 3 or x.shape[-1] != inputs or min(x.shape) < 1:
        raise ValueError(
            f"x must be [B, T, {inputs}] with B and T at least 1, got {list(x.shape)}."
        )
    blocks, layers = nnx.split(model.blocks, nnx.Param)

    def layer(x, given):
        params, mixer = given
        block = nnx.merge(blocks, params)
        before = None if mixer is None else BlockState(mixer, ())
        x, after = block(x, before)
        return x, after.mixer

    mixers = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), state)
    y, mixers = jax.lax.scan(layer, model.embed(x), (layers, mixers))
    said = model.head(model.norm(y).astype(jnp.float32))
    return said, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), mixers)
