"""An autoencoder: of a whole text one vector, of that vector the text.

The blocks of a language model read the tokens. What they make of the last one has to
tell every token of the row, by the decoder of MAD's compression (Poli et al.,
arXiv:2403.17844), which is given the vector x and a place, a sinusoid pᵢ, and no more:

    hᵢ = f(W₂ norm(f(W₁ norm(x + pᵢ))))      logitsᵢ = W norm(hᵢ)       f = gelu

So what is measured is how much of a row goes into one vector. There x is what the last
block leaves; here it is normed as for the head of the language model, so that x and p
are of one size whatever the depth.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from hope_jax.models import lm
from hope_jax.models.config import ModelConfig
from hope_jax.models.layers import DTYPES, dense, rms_norm
from hope_jax.models.learning import Learning
from hope_jax.optim.leaves import wide


class AutoEncoder(nnx.Module):
    """What the outermost level learns: a language model, whose head is not read, and
    the decoder."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, dtype = config.d_model, DTYPES[config.dtype]
        self.encoder = lm.LanguageModel(config, rngs=rngs)
        norms = (rms_norm(width, dtype, rngs, config.norm_epsilon) for _ in range(3))
        self.norms = nnx.List(norms)
        self.layers = nnx.List([dense(width, width, dtype, rngs) for _ in range(2)])
        self.out = dense(width, config.vocab, dtype, rngs)

    def decode(self, x: Float[Array, "B D"], length: int) -> Float[Array, "B T N"]:
        """Float32 logits of the token at each of `length` places."""
        places = sinusoids(length, x.shape[-1]).astype(x.dtype)
        h = x[:, None] + places[None]
        for norm, layer in zip(self.norms, self.layers, strict=False):
            h = jax.nn.gelu(layer(norm(h)))
        return wide(self.out(self.norms[-1](h)))


def sinusoids(length: int, width: int) -> Float[Array, "T D"]:
    """Places as sines and cosines of periods from 2π to 20,000π tokens."""
    half = -(-width // 2)
    turns = 1e-4 ** (jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1))
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * turns[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)[:, :width]


def build(config: ModelConfig, key: Array) -> tuple[nnx.GraphDef, nnx.State]:
    """A new model as `(graphdef, params)`; after this only `apply`."""
    return nnx.split(AutoEncoder(config, rngs=nnx.Rngs(key)), nnx.Param)


def apply(
    graphdef: nnx.GraphDef,
    params: PyTree,
    tokens: Array | np.ndarray,
    *,
    learn: bool | Learning = True,
) -> Float[Array, "B T N"]:
    """Logits of the tokens themselves, read off what is made of the last of each row.

    Args:
      graphdef, params: of `build`.
      tokens: `[B, T]`, ids in `[0, vocab)` of fresh rows.
      learn: static; as of `hope_jax.models.lm.apply`.

    Raises:
      ValueError: as `hope_jax.models.lm.hidden_states`.
    """
    model = nnx.merge(graphdef, params)
    x = lm.hidden_states(*nnx.split(model.encoder, nnx.Param), tokens, learn=learn)
    return model.decode(x[:, -1], tokens.shape[1])
