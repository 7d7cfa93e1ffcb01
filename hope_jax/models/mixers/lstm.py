"""LSTM: what is remembered is a vector, and how it changes depends on it.

Hochreiter and Schmidhuber (1997), with the forget gate of Gers et al. (2000):

    i, f, o = σ(W x_t + U h_{t−1} + b)     z = tanh(W x_t + U h_{t−1} + b)
    c_t = f ⊙ c_{t−1} + i ⊙ z              h_t = o ⊙ tanh(c_t)

No parameter moves while it reads, and no two tokens can be read at once. Beside the
memories it is what a recurrence that is not linear in its state can do.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hope_jax.models.layers import dense
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.base import MixerConfig, Part
from hope_jax.optim.leaves import wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMConfig(MixerConfig):
    """The layer.

    Attributes:
      kind: its name.
      forget_start: of the bias of the forget gate; above 0 it remembers at first.
    """

    kind: Literal["lstm"] = "lstm"
    forget_start: float = 1.0

    controlled: ClassVar[bool] = False

    def build(self, d_model, heads, dtype, *, rngs) -> "LSTM":
        del heads  # it has none
        return LSTM(d_model, self, dtype, rngs=rngs)

    @property
    def span(self) -> int:
        return 1

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("LSTM", 0, "none", "gates"),)


class LSTMState(NamedTuple):
    """What a row remembers, float32.

    Attributes:
      cell: `c`.
      said: `h`.
    """

    cell: Float[Array, "B D"]
    said: Float[Array, "B D"]


class LSTM(nnx.Module):
    """The layer: `y, state = layer(x, state)`."""

    def __init__(self, d_model: int, config: LSTMConfig, dtype, *, rngs: nnx.Rngs):
        self.dtype = dtype
        self.input = dense(d_model, 4 * d_model, dtype, rngs)
        self.recurrent = dense(d_model, 4 * d_model, jnp.float32, rngs)
        start = jnp.zeros((4, d_model), jnp.float32).at[1].set(config.forget_start)
        self.bias = nnx.Param(start.reshape(4 * d_model))

    def initial_state(self, rows: int) -> LSTMState:
        nothing = jnp.zeros((rows, self.bias.shape[0] // 4), jnp.float32)
        return LSTMState(nothing, nothing)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LSTMState | None = None,
        *,
        aligned: bool | None = None,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], LSTMState]:
        """Reads T >= 1 tokens a row, one after another.

        Args:
          x: the block's normalised input.
          state: where each row stands; None is `initial_state`.
          aligned: has no meaning here.
          learn: neither: nothing of it learns while it reads.
        """
        del aligned, learn
        state = self.initial_state(x.shape[0]) if state is None else state
        given = wide(self.input(x)) + self.bias[...][None, None]
        weights = self.recurrent.kernel[...]

        def step(state, given):
            with jax.default_matmul_precision("float32"):
                gates = given + state.said @ weights
            i, f, o, z = jnp.split(gates, 4, axis=-1)
            cell = jax.nn.sigmoid(f) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(z)
            said = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return LSTMState(cell, said), said

        state, y = jax.lax.scan(step, state, jnp.moveaxis(given, 1, 0))
        return jnp.moveaxis(y, 0, 1).astype(self.dtype), state
