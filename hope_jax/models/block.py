"""Pre-norm residual blocks: a sequence mixer, then the chain of continuum memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree

from hope_jax.memory.compose import Tokens
from hope_jax.models.config import ModelConfig
from hope_jax.models.layers import DTYPES, GatedMLP, rms_norm
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.base import MixerConfig
from hope_jax.models.share import Share
from hope_jax.optim.leaves import wide


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
        dtype, cms = DTYPES[config.dtype], config.cms
        self.norm = rms_norm(config.d_model, dtype, rngs, config.norm_epsilon)
        self.mlp = GatedMLP(
            config.d_model, hidden, dtype, cms.activation, cms.bias, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B T D"], fast: PyTree | None = None
    ) -> Float[Array, "B T D"]:
        """`x` and what it adds; `fast` as of `says`."""
        return x + self.says(x, fast)

    def says(
        self, x: Float[Array, "B T D"], fast: PyTree | None = None
    ) -> Float[Array, "B T D"]:
        """`fast` are weights that lead with rows and stand for the learned ones."""
        h = self.norm(x)
        if fast is None:
            return self.mlp(h)
        graphdef = nnx.graphdef(self.mlp)
        return jax.vmap(lambda w, h: nnx.merge(graphdef, w)(h))(fast, h)


class Mix(nnx.Module):
    """What independent levels add together, of what each says (`CMSConfig.mixing`).

        mean(a) + Σᵢ dᵢ aᵢ         learned, d = 0 at the start
        a₁ + Σᵢ gᵢ(x) (aᵢ − a₁)    gated, routed: Σᵢ gᵢ = 1

    Equation 74 of arXiv:2512.24695, which leaves the weights open. In these forms equal
    levels add, to the bit, what one of them says: by any gates, and by weights that
    have not learned.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        cms, count = config.cms, len(config.cms.levels)
        self.mixing = cms.mixing
        self.top_k = cms.top_k if cms.mixing == "routed" else count
        self.epsilon = config.norm_epsilon
        if cms.mixing == "learned":
            self.shares = nnx.Param(jnp.zeros((count,), jnp.float32))
        elif cms.mixing != "mean":
            zeros = nnx.initializers.zeros_init()
            self.gate = nnx.Linear(config.d_model, count, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], said: list[Float[Array, "B T D"]]
    ) -> Float[Array, "B T D"]:
        """`x` is what the levels read, `said` what each of them says of it."""
        first, *others = said
        if self.mixing in ("gated", "routed"):
            gates, mixed = self.gates(x), wide(first)
            for i, a in enumerate(others, 1):
                mixed = mixed + gates[..., i, None] * (wide(a) - wide(first))
            return mixed.astype(first.dtype)
        # The mean, which of equal levels is to the bit what one says.
        mean = sum(((a - first) / len(said) for a in others), first)
        if self.mixing == "mean":
            return mean
        shares, more = self.shares[...], jnp.zeros_like(wide(mean))
        for i, a in enumerate(said):
            more = more + shares[i].astype(more.dtype) * wide(a)
        return mean + more.astype(mean.dtype)

    def gates(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K"]:
        """Of the K levels, by the direction of what they read."""
        x = wide(x)
        size = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        logits = self.gate(x * jax.lax.rsqrt(size + self.epsilon))
        count = logits.shape[-1]
        if self.top_k < count:
            _, best = jax.lax.top_k(logits, self.top_k)
            taken = jnp.any(jax.nn.one_hot(best, count, dtype=bool), axis=-2)
            # Not infinite: the gradient of a gradient would have no value there.
            logits = jnp.where(taken, logits, jnp.finfo(logits.dtype).min)
        return jax.nn.softmax(logits, axis=-1)


class Block(nnx.Module):
    """`y, state = block(x, state)`: mixer and CMS chain, both residual.

    Its mixer is by default that of a model with only one.
    """

    def __init__(
        self, config: ModelConfig, mixer: MixerConfig | None = None, *, rngs: nnx.Rngs
    ):
        dtype = DTYPES[config.dtype]
        self.config = config
        self.norm = rms_norm(config.d_model, dtype, rngs, config.norm_epsilon)
        if mixer is None:
            (mixer,) = config.pattern
        self.learns = bool(mixer.memories)
        self.modifies_itself = mixer.modifies_itself
        self.mixer: Any = mixer.build(config.d_model, config.heads, dtype, rngs=rngs)
        self.levels = nnx.List(
            [
                CMSBlock(config, level.hidden or config.cms.hidden, rngs=rngs)
                for level in config.cms.whole
            ]
        )
        if config.cms.order == "independent":
            self.mix = Mix(config, rngs=rngs)
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
        ends: bool = True,
        share: Share | None = None,
        first: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], BlockState]:
        """Any T >= 1; see the mixer for `aligned` and `learn`, and for `ends` and
        `share`, which are for those that have a `stride`, or let devices share rows.

        A fresh state reads the learned CMS weights themselves, without a copy a row.
        `first` is for gradients of `fast` alone: where it is true `x` is the embedding,
        which does not depend on them, and no pullback goes through the mixer.
        """
        aligned = state is None if aligned is None else aligned
        mixer = None if state is None else state.mixer
        fast = {}
        if state is not None:  # with a horizon, of the first levels alone
            fast = dict(zip(self.config.fast, state.fast, strict=False))
        own: dict[str, Any] = {} if ends else {"ends": False}
        own |= {} if share is None else {"share": share}
        own |= {"aligned": aligned, "learn": learn}
        if first is None:
            y, mixer = self.mixer(self.norm(x), mixer, **own)
        else:
            graphdef, params = nnx.split(self.mixer, nnx.Param)

            def mix(given, x):
                params, state = given
                return nnx.merge(graphdef, params)(x, state, **own)

            made: Any = _blamed_beyond(mix, first, (params, mixer), self.norm(x))
            y, mixer = made
        opened = None
        if self.config.cms.rates == "generated":
            opened = 2.0 * jax.nn.sigmoid(self.open(wide(y)))
        x = self._chain(x + y, fast)
        if state is None:
            state = self.initial_state(x.shape[0])
        return x, BlockState(mixer, state.fast, opened)

    def watch(
        self, x: Float[Array, "B T D"], state: BlockState, **how: Any
    ) -> tuple[Float[Array, "B T D"], tuple[Tokens, ...]]:
        """What a call says, and what the memories of the mixer were given
        (`MixerConfig.memories`)."""
        if not self.learns:
            return self(x, state, **how)[0], ()
        y, _, written = self.mixer.watch(self.norm(x), state.mixer, **how)
        fast = dict(zip(self.config.fast, state.fast, strict=False))
        return self._chain(x + y, fast), written

    def _chain(self, x, fast):
        chain = list(enumerate(self.levels))
        match self.config.cms.order:
            case "slow_to_fast":
                chain.reverse()
            case "independent":
                said = [level.says(x, fast.get(i)) for i, level in chain]
                return x + self.mix(x, said)
        for i, level in chain:
            x = level(x, fast.get(i))
        return x

    def end(self, mixer: PyTree, learn: bool | Learning = True) -> PyTree:
        """The state of the mixer once what is over has ended."""
        return self.mixer.end(mixer, learn)

    def over(self, mixer: PyTree) -> Bool[Array, " B"]:
        """Of which rows something has ended."""
        return self.mixer.over(mixer)

    def ended(self, mixer: PyTree) -> PyTree:
        """The state of the mixer if the chunks of its memories ended here."""
        return self.mixer.ended(mixer) if self.modifies_itself else mixer


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blamed_beyond(mix, first, given, x):
    """`mix(given, x)`, a value and a state, with a pullback of the value to `x` alone,
    which where it is `first` is zero and takes no time."""
    del first
    return mix(given, x)


def _blamed_beyond_forward(mix, first, given, x):
    y, pullback, state = jax.vjp(functools.partial(mix, given), x, has_aux=True)
    return (y, state), (first, pullback)


def _blamed_beyond_backward(mix, residuals, cotangents):
    del mix
    (first, pullback), (y, _) = residuals, cotangents
    zeros = lambda y: jax.tree.map(jnp.zeros_like, jax.eval_shape(pullback, y))  # noqa: E731
    (x,) = jax.lax.cond(first, zeros, pullback, y)
    return None, None, x


_blamed_beyond.defvjp(_blamed_beyond_forward, _blamed_beyond_backward)


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
        ends: bool = True,
        share: Share | None = None,
        first: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], BlockState]:
        """As `Block`."""
        states, own = [], {"aligned": aligned, "learn": learn, "ends": ends}
        for part, mine in zip(self.parts, self._states(state), strict=True):
            x, mine = part(x, mine, share=share, first=first, **own)
            first = None  # what follows reads what levels say
            states.append(mine)
        return x, _join(states)

    def watch(
        self, x: Float[Array, "B T D"], state: BlockState, **how: Any
    ) -> tuple[Float[Array, "B T D"], tuple[Tokens, ...]]:
        """As `Block`, of one block after the other."""
        made = ()
        for part, mine in zip(self.parts, self._states(state), strict=True):
            x, written = part.watch(x, mine, **how)
            made += written
        return x, made

    def _states(self, state):
        """That of each block."""
        return [
            state
            and BlockState(
                state.mixer and state.mixer[i], tuple(level[i] for level in state.fast)
            )
            for i in range(len(self.parts))
        ]

    def end(self, mixer: PyTree, learn: bool | Learning = True) -> PyTree:
        """As `Block`."""
        return tuple(p.end(m, learn) for p, m in zip(self.parts, mixer, strict=True))

    def over(self, mixer: PyTree) -> Bool[Array, " B"]:
        """As `Block`."""
        made = (p.over(m) for p, m in zip(self.parts, mixer, strict=True))
        return functools.reduce(jnp.logical_or, made)

    def ended(self, mixer: PyTree) -> PyTree:
        """As `Block`."""
        return tuple(p.ended(m) for p, m in zip(self.parts, mixer, strict=True))


def _join(states: list[BlockState]) -> BlockState:
    return BlockState(
        mixer=tuple(state.mixer for state in states),
        fast=tuple(zip(*(state.fast for state in states), strict=True)),
        opened=None if states[0].opened is None else tuple(s.opened for s in states),
    )


def repeated(config: ModelConfig, *, rngs: nnx.Rngs) -> Block | Group:
    """What the model repeats: one block, or a group of one block a mixer."""
    if len(config.pattern) == 1:
        return Block(config, rngs=rngs)
    return Group(config, rngs=rngs)


def stacked(config: ModelConfig, *, rngs: nnx.Rngs) -> Block | Group:
    """What is repeated, with parameters that lead with its repetitions."""
    keys = jax.random.split(rngs.params(), config.layers // len(config.pattern))
    graphdef = nnx.graphdef(repeated(config, rngs=nnx.Rngs(0)))
    each = jax.vmap(
        lambda key: nnx.state(repeated(config, rngs=nnx.Rngs(key)), nnx.Param)
    )(keys)
    return nnx.merge(graphdef, each)
