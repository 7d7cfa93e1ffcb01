"""In-Place TTT: the down projection of an MLP moves while the model reads.

arXiv:2604.06169. Of a gated MLP the last matrix is a fast weight, which every chunk i
of C tokens reads before it writes:

    Z = φ(W_gate x) ⊙ (W_up x)
    O_i = Z_i W_i
    W_{i+1} = W_i + η Z_iᵀ V_i,     V_i = Conv1D(X_i) W_target

This is gradient descent on −⟨Z W, V⟩ at the chunk's start. The convolution sees tokens
on both sides, inside the chunk alone, so that a value is about what comes next; no
token reads what it was written from. It starts at zero and with it every move: the
layer is then its static MLP.

Here it is a mixer, which needs no other to know of it: attention beside it, as in the
paper, is a pattern (`mixer=attention,in_place_ttt`), and the block's own MLPs follow
each as ever. So X is what the block reads, where the paper has the embeddings of the
tokens, which only the first layer sees here.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hope_jax.core.config import at_least, one_of
from hope_jax.kernels.select import scan_chunks
from hope_jax.models import learning
from hope_jax.models.layers import ACTIVATIONS, GatedMLP, dense, where_rows
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.base import MixerConfig, Part
from hope_jax.optim.leaves import wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class InPlaceTTTConfig(MixerConfig):
    """The layer.

    Attributes:
      kind: its name.
      chunk: tokens between two moves.
      expansion: hidden width over that of the model.
      activation: of the gate.
      rate: η, the same for all tokens.
      past, future: tokens on either side that a value is made of; the source has two.
      clip: bound on the Frobenius norm of a move; None is none. The paper clips when a
        model is asked, not when it is trained.
    """

    kind: Literal["in_place_ttt"] = "in_place_ttt"
    chunk: int = 64
    expansion: int = 2
    activation: str = "silu"
    rate: float = 0.3
    past: int = 2
    future: int = 2
    clip: float | None = None

    controlled: ClassVar[bool] = False

    def __post_init__(self):
        at_least(self, chunk=1, expansion=1, past=0, future=0)
        one_of(self, activation=ACTIVATIONS)
        if not self.rate > 0:
            raise ValueError(
                f"rate must be positive, got {self.rate}; use `attention` and the "
                "block's own MLPs for one that never moves."
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive or None, got {self.clip}.")

    def build(self, d_model, heads, dtype, *, rngs) -> "InPlaceTTT":
        del heads  # it has none
        return InPlaceTTT(d_model, self, dtype, rngs=rngs)

    @property
    def span(self) -> int:
        return self.chunk

    @property
    def parts(self) -> tuple[Part, ...]:
        objective = "dot product with what comes next"
        return (Part("in-place MLP", self.chunk, objective, "gd", "mlp.down"),)

    @property
    def learns(self) -> tuple[Part, ...]:
        return self.parts  # what it writes is no key and value of a memory


class InPlaceTTTState(NamedTuple):
    """Where a layer stands; its size does not depend on the tokens read.

    Attributes:
      weights: the down projection, float32.
      read: the chunk so far; later places are not read.
      position: tokens read, int32.
    """

    weights: Float[Array, "B F D"]
    read: Float[Array, "B C D"]
    position: Int[Array, " B"]


class InPlaceTTT(nnx.Module):
    """The layer: `y, state = layer(x, state)`."""

    def __init__(
        self, d_model: int, config: InPlaceTTTConfig, dtype, *, rngs: nnx.Rngs
    ):
        hidden = config.expansion * d_model
        self.config, self.dtype = config, dtype
        self.mlp = GatedMLP(d_model, hidden, dtype, config.activation, rngs=rngs)
        taps = config.past + 1 + config.future
        self.conv = nnx.Param(jnp.zeros((taps, d_model), jnp.float32))
        self.target = dense(d_model, d_model, dtype, rngs)

    def initial_state(self, rows: int) -> InPlaceTTTState:
        down = self.mlp.down.kernel[...]
        return InPlaceTTTState(
            weights=jnp.broadcast_to(down[None], (rows, *down.shape)),
            read=jnp.zeros((rows, self.config.chunk, down.shape[1]), self.dtype),
            position=jnp.zeros((rows,), jnp.int32),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: InPlaceTTTState | None = None,
        *,
        aligned: bool | None = None,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], InPlaceTTTState]:
        """Reads T >= 1 tokens a row.

        Args:
          x: the block's normalised input.
          state: where each row stands; None is `initial_state`.
          aligned: promises that every row stands at a multiple of `chunk`, and reads
            whole chunks; by default true for a fresh state only. Else the tokens are
            read one by one in a scan.
          learn: False keeps the weights at their state; what is read meanwhile teaches
            nothing later either.
        """
        aligned = state is None if aligned is None else aligned
        learns = learning.of(learn).main
        if state is None:
            state = self.initial_state(x.shape[0])
        read = self._chunk if aligned else self._token

        def run(state, tokens):
            return read(state, tokens, learns)

        size = self.config.chunk if aligned else 1
        both = (x, self.mlp.hidden(x))
        time_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), both)
        state, y = scan_chunks(run, run, size, state, time_first, remat=aligned)
        return jnp.moveaxis(y, 0, 1), state

    def _chunk(self, state, tokens, learns):
        """The tokens of a chunk from its start on, all or some."""
        x, hidden = (jnp.moveaxis(a, 0, 1) for a in tokens)
        length, chunk = x.shape[1], self.config.chunk
        y, weights = self._say(hidden, state.weights), state.weights
        kept = x if learns else jnp.zeros_like(x)
        kept = kept.astype(self.dtype)
        read = jnp.concatenate([kept, state.read[:, length:]], axis=1)
        if learns and length == chunk:
            weights = weights + self._move(x, hidden)
        state = InPlaceTTTState(weights, read, state.position + length)
        return state, jnp.moveaxis(y, 1, 0)

    def _token(self, state, token, learns):
        """One token a row, wherever each row stands in its chunk."""
        x, hidden = (jnp.moveaxis(a, 0, 1) for a in token)
        y, chunk = self._say(hidden, state.weights), self.config.chunk
        place = jnp.arange(chunk, dtype=jnp.int32)
        here = place[None] == (state.position % chunk)[:, None]
        kept = x if learns else jnp.zeros_like(x)
        read = jnp.where(here[:, :, None], kept.astype(self.dtype), state.read)
        position, weights = state.position + 1, state.weights
        if learns:
            ends = position % chunk == 0

            def move():
                moved = weights + self._move(read, self.mlp.hidden(read))
                return where_rows(ends, moved, weights)

            weights = jax.lax.cond(jnp.any(ends), move, lambda: weights)
        return InPlaceTTTState(weights, read, position), jnp.moveaxis(y, 1, 0)

    def _say(self, hidden, weights):
        with jax.default_matmul_precision("float32"):
            hidden = wide(hidden)
            y = jnp.einsum("btf,bfd->btd", hidden, weights.astype(hidden.dtype))
        return y.astype(self.dtype)

    def _move(self, x, hidden):
        """What a whole chunk adds to the weights, `[B, F, D]`."""
        config, kernel = self.config, self.conv[...]
        x = wide(x)
        length = x.shape[1]
        x = jnp.pad(x, ((0, 0), (config.past, config.future), (0, 0)))
        values = sum(
            x[:, i : i + length] * kernel[i][None, None] for i in range(len(kernel))
        )
        values = wide(self.target(values.astype(self.dtype)))
        with jax.default_matmul_precision("float32"):
            move = config.rate * jnp.einsum("btf,btd->bfd", wide(hidden), values)
        if config.clip is not None:
            norm = jnp.sqrt(jnp.sum(move**2, axis=(1, 2), keepdims=True))
            move = move * (config.clip / jnp.maximum(norm, config.clip))
        return move.astype(jnp.float32)
