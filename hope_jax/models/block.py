"""Pre-norm residual blocks: a sequence mixer, then the chain of continuum memory."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from hope_jax.models import mixers
from hope_jax.models.cms import CMSConfig
from hope_jax.models.layers import DTYPES, SwiGLU, full_precision
from hope_jax.models.learning import Learning
from hope_jax.models.memory_mixer import MemoryMixerConfig
from hope_jax.models.self_modifying import SelfModifyingConfig
from hope_jax.models.titans import TitansConfig
from hope_jax.models.tnt import TNTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model, complete in one place.

    Attributes:
      name: what the zoo calls it.
      vocab: entries of its vocabulary.
      d_model: width of the residual stream, a multiple of `heads`.
      layers: number of blocks.
      heads: heads of the mixer.
      mixer: a name of `mixers.names()`: `self_modifying` (Hope), `attention`
        (Transformer++, Hope-Attention) or a memory; or several, separated by commas,
        which the layers repeat (`gated_delta_net,sliding_window`).
      context: tokens that attention looks back over: those of a training row. No
        parameter has its shape, so it may be raised on a trained model.
      window: tokens that `sliding_window` looks back over.
      chunk: tokens per chunk of the named memories among the mixers; None is each
        one's own. It is part of the function where they are anchored.
      memory: the mixer `self_modifying`.
      associative: the mixer `memory`.
      titans: the mixers `titans_mac`, `titans_mag` and `titans_mal`.
      tnt: the mixer `tnt`.
      cms: the chain of MLPs; one level of infinite period is a Transformer block.
      dtype: compute type of projections and MLPs; memories stay in float32.
    """

    name: str = "custom"
    vocab: int = 257
    d_model: int = 128
    layers: int = 2
    heads: int = 4
    mixer: str = "self_modifying"
    context: int = 256
    window: int = 64
    chunk: int | None = None
    memory: SelfModifyingConfig = SelfModifyingConfig()
    associative: MemoryMixerConfig = MemoryMixerConfig()
    titans: TitansConfig = TitansConfig()
    tnt: TNTConfig = TNTConfig()
    cms: CMSConfig = CMSConfig()
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("vocab", "d_model", "layers", "heads", "context", "window"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of heads ({self.heads})."
            )
        if self.layers % len(self.pattern):
            raise ValueError(
                f"layers ({self.layers}) must be a multiple of the {len(self.pattern)} "
                f"mixers of the pattern {self.mixer!r}."
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}."
            )
        if self.chunk is not None and not any(map(mixers.takes_chunk, self.pattern)):
            raise ValueError(
                f"chunk ({self.chunk}) is that of named memories, and {self.mixer!r} "
                "has none; leave it None."
            )
        for name in self.pattern:
            even = mixers.get(name, self).even
            if even and (self.d_model // self.heads) % 2:
                raise ValueError(
                    f"d_model / heads must be even for the rotary positions of {name}, "
                    f"got {self.d_model // self.heads}."
                )
        chunks = [self.mixer_chunk] + [int(p) for p in self.fast_periods]
        for inner, outer in zip(chunks, chunks[1:], strict=False):
            if outer % inner:
                raise ValueError(
                    f"cms.levels: a period ({outer}) must be a multiple of the next "
                    f"faster chunk ({inner}), so that clocks nest; a level of rate 0 "
                    "never moves while reading and needs no clock."
                )

    @property
    def pattern(self) -> tuple[str, ...]:
        """The mixers of consecutive layers, repeated over them all."""
        return tuple(name.strip() for name in self.mixer.split(","))

    @property
    def mixer_chunk(self) -> int:
        """Tokens after which every clock of the mixers stands at a boundary."""
        return math.lcm(*(mixers.get(name, self).chunk for name in self.pattern))

    @property
    def fast(self) -> tuple[int, ...]:
        """Indices of the CMS levels that move while reading, fast first."""
        return self.cms.fast

    def within(self, horizon: int | None) -> tuple[int, ...]:
        """Those of `fast` that move before `horizon` tokens are read; None for all."""
        periods = (self.cms.levels[i].period for i in self.fast)
        count = sum(horizon is None or period < horizon for period in periods)
        return self.fast[:count]

    @property
    def fast_periods(self) -> tuple[int, ...]:
        return tuple(int(self.cms.levels[i].period) for i in self.fast)

    @property
    def base_chunk(self) -> int | None:
        """Tokens between two moves of the fastest CMS level; None without one."""
        return self.fast_periods[0] if self.fast else None

    @property
    def span(self) -> int:
        """Tokens after which the mixers and the fastest CMS level are at a boundary:
        there a row may be read in parallel."""
        return self.base_chunk or self.mixer_chunk  # which divides the former


class BlockState(NamedTuple):
    """A block's state.

    Attributes:
      mixer: the mixer's state; of a group, its blocks' in a tuple.
      fast: the weights of each fast CMS level, one copy a row; the block reads them,
        the model moves them, for only it knows the task loss. With a horizon, of those
        that move within it, the first of `ModelConfig.fast`. Of a group, the weights
        of a level are its blocks' in a tuple.
      opened: of what a call returns, the factor that each token gives to the moves of
        each fast level, `[B, T, F]`, where `CMSConfig.rates` are generated; of a group
        its blocks' in a tuple.
    """

    mixer: PyTree
    fast: tuple[PyTree, ...]
    opened: PyTree | None = None


class CMSBlock(nnx.Module):
    """One MLP of the chain with its norm."""

    def __init__(self, config: ModelConfig, hidden: int, *, rngs: nnx.Rngs):
        dtype = DTYPES[config.dtype]
        self.norm = nnx.RMSNorm(config.d_model, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(config.d_model, hidden, dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], fast: PyTree | None = None
    ) -> Float[Array, "B T D"]:
        """`fast` are weights that lead with rows and stand for the learned ones."""
        h = self.norm(x)
        if fast is None:
            return x + self.mlp(h)
        graphdef = nnx.graphdef(self.mlp)
        return x + jax.vmap(lambda w, h: nnx.merge(graphdef, w)(h))(fast, h)


class Block(nnx.Module):
    """`y, state = block(x, state)`: mixer and CMS chain, both residual.

    `mixer` names its mixer; by default it is that of a model with only one.
    """

    def __init__(
        self, config: ModelConfig, mixer: str | None = None, *, rngs: nnx.Rngs
    ):
        dtype = DTYPES[config.dtype]
        self.config = config
        self.norm = nnx.RMSNorm(config.d_model, dtype=dtype, rngs=rngs)
        self.mixer = mixers.get(mixer or config.mixer, config).build(rngs)
        self.levels = nnx.List(
            [CMSBlock(config, level.hidden, rngs=rngs) for level in config.cms.whole]
        )
        if config.cms.rates == "generated":
            zeros = nnx.initializers.zeros_init()  # every factor is 1 at the start
            self.open = nnx.Linear(
                config.d_model, len(config.fast), kernel_init=zeros, rngs=rngs
            )

    def starts(self, horizon: int | None = None) -> tuple[PyTree, ...]:
        """The learned weights at which the levels within `horizon` start."""
        return tuple(
            nnx.state(self.levels[i].mlp, nnx.Param)
            for i in self.config.within(horizon)
        )

    def initial_state(self, rows: int, horizon: int | None = None) -> BlockState:
        """`rows` rows, with fast copies of the levels that move within `horizon`."""
        fast = jax.tree.map(
            lambda w: jnp.broadcast_to(w[None], (rows, *w.shape)), self.starts(horizon)
        )
        return BlockState(self.mixer.initial_state(rows), fast)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: BlockState | None = None,
        *,
        aligned: bool | None = None,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], BlockState]:
        """Any T >= 1; see the mixer for `aligned` and `learn`.

        A fresh state reads the learned CMS weights themselves, without a copy a row.
        """
        aligned = state is None if aligned is None else aligned
        mixer = None if state is None else state.mixer
        fast = {}
        if state is not None:  # with a horizon, of the first levels alone
            fast = dict(zip(self.config.fast, state.fast, strict=False))
        y, mixer = self.mixer(self.norm(x), mixer, aligned=aligned, learn=learn)
        opened = None
        if self.config.cms.rates == "generated":
            opened = 2.0 * jax.nn.sigmoid(self.open(full_precision(y)))
        x = x + y
        chain = range(len(self.levels))
        if self.config.cms.order == "slow_to_fast":
            chain = reversed(chain)
        for i in chain:
            x = self.levels[i](x, fast.get(i))
        if state is None:
            state = self.initial_state(x.shape[0])
        return x, BlockState(mixer, state.fast, opened)


class Group(nnx.Module):
    """The blocks of a whole pattern in a row, with the interface of one `Block`.

    A move of CMS level i moves it in all of them, so one clock serves the group.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.parts = nnx.List([Block(config, m, rngs=rngs) for m in config.pattern])

    def starts(self, horizon: int | None = None) -> tuple[PyTree, ...]:
        """As `Block`; of a level its blocks' in a tuple."""
        return tuple(zip(*(part.starts(horizon) for part in self.parts), strict=True))

    def initial_state(self, rows: int, horizon: int | None = None) -> BlockState:
        return _join([part.initial_state(rows, horizon) for part in self.parts])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: BlockState | None = None,
        *,
        aligned: bool | None = None,
        learn: bool | Learning = True,
    ) -> tuple[Float[Array, "B T D"], BlockState]:
        """As `Block`."""
        states = []
        for i, part in enumerate(self.parts):
            mine = state and BlockState(
                state.mixer[i], tuple(level[i] for level in state.fast)
            )
            x, mine = part(x, mine, aligned=aligned, learn=learn)
            states.append(mine)
        return x, _join(states)


def _join(states: list[BlockState]) -> BlockState:
    return BlockState(
        mixer=tuple(state.mixer for state in states),
        fast=tuple(zip(*(state.fast for state in states), strict=True)),
        opened=None if states[0].opened is None else tuple(s.opened for s in states),
    )


def unit(config: ModelConfig, *, rngs: nnx.Rngs) -> Block | Group:
    """What the model repeats: one block, or a group of one block a mixer."""
    if len(config.pattern) == 1:
        return Block(config, rngs=rngs)
    return Group(config, rngs=rngs)
