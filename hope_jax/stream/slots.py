"""Readers side by side in the rows of one program, as pure functions.

A slot is a row of every array. In one step each slot reads what it is given, draws what
it says, or keeps still; which of these, how long and with what settings are arrays, so
one compiled program serves them all. No bit of a slot depends on another one, on which
slot it is, or on how what it reads is cut into steps.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from hope_jax.memory.consolidation import restarted, starts_of
from hope_jax.memory.state import MemoryState
from hope_jax.models import cms, learning, lm
from hope_jax.models.config import ModelConfig
from hope_jax.models.learning import Learning
from hope_jax.models.mixers.in_place_ttt import InPlaceTTTState
from hope_jax.models.mixers.srwm import SRWMState
from hope_jax.stream.generate import Drawing, draw

NO_BOUND = 2**31 - 1  # moves


class Slots(NamedTuple):
    """Where readers stand; every leaf leads with slots, B.

    Attributes:
      state: of the model.
      logits: what it says next; zeros before the first token.
      ledger: what its CMS levels may do and did.
    """

    state: lm.LMState
    logits: Float[Array, "B N"]
    ledger: lm.Ledger


class Turn(NamedTuple):
    """What each slot does in one step of at most T tokens.

    Attributes:
      given: a token id where the text is known, -1 where one is drawn.
      counts: how many of the T are there; 0 keeps the slot as it is.
      drawing: how tokens are drawn.
      keys: the data of a key of JAX's default kind.
      order: token t is drawn with `fold_in(key, order[t])`.
    """

    given: Int[Array | np.ndarray, "B T"]
    counts: Int[Array | np.ndarray, " B"]
    drawing: Drawing
    keys: UInt32[Array | np.ndarray, "B S"]
    order: Int[Array | np.ndarray, "B T"]


class Said(NamedTuple):
    """What came of a step.

    Attributes:
      tokens: given or drawn, 0 beyond the counts.
      losses: of each in nats, under what was said before it; 0 beyond the counts.
      finite: whether every number of the slot is.
    """

    tokens: Int[Array, "B T"]
    losses: Float[Array, "B T"]
    finite: Bool[Array, " B"]


@functools.lru_cache(maxsize=16)
def graph(config: ModelConfig) -> nnx.GraphDef:
    """The structure of a model, without its parameters."""
    return lm.abstract_model(config)[0]


@functools.partial(jax.jit, static_argnames=("config", "rows"))
def begin(config: ModelConfig, params: PyTree, rows: int = 1) -> Slots:
    """Slots before their first token, with a ledger that bounds nothing."""
    fast = len(config.fast)
    ledger = lm.Ledger(
        longest=jnp.full((rows,), jnp.inf),
        most=jnp.full((rows,), NO_BOUND, jnp.int32),
        moves=jnp.zeros((rows, fast), jnp.int32),
        shortened=jnp.zeros((rows, fast), jnp.int32),
        way=jnp.zeros((rows, fast)),
    )
    state = lm.initial_state(graph(config), params, rows)
    return Slots(state, jnp.zeros((rows, config.vocab)), ledger)


@functools.partial(jax.jit, static_argnames=("config", "vocab", "learn", "together"))
def step(
    config: ModelConfig,
    vocab: int,
    learn: bool | Learning,
    together: bool,
    params: PyTree,
    slots: Slots,
    turn: Turn,
) -> tuple[Said, Slots]:
    """Lets every slot have its turn.

    Args:
      config: of the model.
      vocab: ids from here on are never drawn.
      learn: whether memories move; of all slots that have a turn.
      together: whether slots are rows of one batch, for accelerators that have room for
        more than one. A compiler may round the last rows of a batch otherwise, so what
        slot a reader has may then show in the last bit; what others do does not. Else
        one slot after another goes through the same code, and those that keep still
        cost nothing.
      params: of the model; they never change.
      slots: where the readers stand.
      turn: what each does.
    """
    turns = functools.partial(_turns, config, vocab, learn, params)
    if together:
        return turns(slots, turn)

    def one(both):
        made = turns(*jax.tree.map(lambda a: a[None], both))
        return jax.tree.map(lambda a: a[0], made)

    return jax.lax.map(one, (slots, turn))


def _turns(config, vocab, learn, params, slots, turn):
    own = jax.random.wrap_key_data(jnp.asarray(turn.keys))

    def choose(logits, x):
        given, order = x
        known = jnp.arange(logits.shape[1]) < vocab
        keys = jax.vmap(jax.random.fold_in)(own, order)
        drawn = draw(jnp.where(known, logits, -jnp.inf), turn.drawing, keys)
        return jnp.where(given < 0, drawn, given)

    (tokens, losses), logits, ledger, state = lm.serve(
        graph(config),
        params,
        slots.state,
        slots.logits,
        slots.ledger,
        choose,
        (turn.given.T, turn.order.T),
        jnp.asarray(turn.counts),
        learn=learn,
    )
    finite = _finite((state, logits))
    return Said(tokens, losses, finite), Slots(state, logits, ledger)


def _finite(tree):
    """Of each row, which leads every leaf."""
    checks = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return functools.reduce(jnp.logical_and, checks)


@jax.jit
def _sound(slots):
    ledger = slots.ledger._replace(longest=jnp.zeros_like(slots.ledger.longest))
    counted = jnp.all(jnp.stack([jnp.all(leaf >= 0) for leaf in ledger]))
    return jnp.all(_finite(slots._replace(ledger=ledger))) & counted


def sound(slots: Slots) -> bool:
    """Whether all numbers are such as a step leaves, as far as one can see."""
    return bool(_sound(slots))


@jax.jit
def take(slots: Slots, i: int) -> Slots:
    """Slot `i` alone."""
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=True), slots
    )


@functools.partial(jax.jit, donate_argnames=("slots",))
def put(slots: Slots, one: Slots, i: int) -> Slots:
    """`slots`, whose buffers are used, with what stands in slot `i` replaced."""
    return jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, axis=0), slots, one
    )


def bounded(one: Slots, longest: float = np.inf, most: int = NO_BOUND) -> Slots:
    """A slot whose levels may make so long moves, and so many, those made included."""
    ledger = one.ledger._replace(
        longest=np.full((1,), longest, np.float32), most=np.full((1,), most, np.int32)
    )
    return one._replace(ledger=ledger)


@functools.partial(jax.jit, static_argnames=("config", "levels"))
def reset(
    config: ModelConfig, params: PyTree, one: Slots, levels: tuple[str, ...]
) -> Slots:
    """A slot some of whose `parts` are at their start again; the ledger stays.

    Without the mixers its text goes on. With them a new text begins, so levels that
    are kept have their weights and what their rule carries, and lose what they had
    learned since their last move. Where levels nest, a start belongs to the slower
    level that owns it: if that is kept, the faster one begins again there. So do
    memories whose `starts` are kept, the levels of `memory.consolidation`.
    """
    fresh, state = begin(config, params, 1), one.state
    put_back = [f"CMS {place + 1}" in levels for place in config.fast]
    new_text = "mixers" in levels

    def level(i):
        """Weights and the rest of a fast level."""
        new, old = fresh.state.levels[i], state.levels[i]
        weights, owned = fresh.state.blocks.fast[i], new.owned
        if owned is not None and not put_back[i + 1]:
            # What they have read is no longer what has moved them.
            if any(put_back[: i + 1]):
                old = cms.spoiled(old, jnp.ones((1,), bool))
            owned = old.owned
            assert owned is not None and new.owned is not None
            weights = owned.start
            if new_text:
                owned = owned._replace(learned=new.owned.learned)
        if put_back[i]:
            return weights, new._replace(owned=owned)
        kept = new._replace(opt=old.opt) if new_text else old
        return state.blocks.fast[i], kept._replace(owned=owned)

    made = [level(i) for i in range(len(put_back))]
    base = fresh if new_text else one
    mixers, held = base.state.blocks.mixer, base.state.held
    if new_text != ("starts" in levels):
        again = functools.partial(restarted, learned_again=not new_text)
        mixers = again(fresh.state.blocks.mixer, state.blocks.mixer)
        if held is not None:
            there = again(fresh.state.held.mixers, held.mixers)
            there = config.bare(mixers) if new_text else there
            held = held._replace(mixers=there)
    return Slots(
        base.state._replace(
            blocks=base.state.blocks._replace(
                mixer=mixers, fast=tuple(w for w, _ in made)
            ),
            levels=tuple(rest for _, rest in made),
            held=held,
        ),
        base.logits,
        one.ledger,
    )


def parts(config: ModelConfig) -> tuple[str, ...]:
    """What `reset` can put back: the mixers of all layers together, the starts to which
    their memories return, if these are levels, and each level of the chain."""
    starts = ("starts",) * learning.consolidates(config)
    return ("mixers", *starts, *(f"CMS {place + 1}" for place in config.fast))


def merged(
    config: ModelConfig, params: PyTree, slots: Sequence[Slots], shares: Sequence[float]
) -> Slots:
    """The start of a text with the fast weights of several readers, averaged.

    Fast weights are what their start has become by sums of moves, so of readers that
    share a start, with shares that sum to 1,

        Σᵢ shareᵢ Wᵢ = W₀ + Σᵢ shareᵢ (Wᵢ − W₀)

    adds up what each has learned. All else belongs to the text that each was reading:
    places in chunks, keys of attention, momenta, what was learned since a level's last
    move. It begins anew, so it does not matter where the readers stand.

    Args:
      config, params: of the model, which all readers share.
      slots: one slot each.
      shares: positive; they are divided by their sum.

    Raises:
      ValueError: the model has no fast weights, or a memory whose rule keeps more than
        weights, which such a sum is no average of.
    """
    if not names(config):
        raise ValueError(
            f"{config.name!r} has nothing to merge: none of its levels learns while it "
            "reads."
        )
    nodes = jax.tree.leaves(slots[0].state.blocks.mixer, is_leaf=_is_memory)
    if any(isinstance(n, MemoryState) and n.rule is not None for n in nodes):
        raise ValueError(
            f"{config.name!r} ({config.kinds}) cannot be merged: the rule of its "
            "memory keeps more than weights, of which a weighted sum means nothing."
        )
    share = np.asarray(shares, np.float64) / np.sum(shares)
    return _merged(config, params, tuple(slots), np.float32(share))


@functools.partial(jax.jit, static_argnames=("config",))
def _merged(config, params, slots, shares):
    fresh = begin(config, params, 1)

    def mean(*weights):
        return sum(share * w for share, w in zip(shares, weights, strict=True))

    def memory(new, *olds):
        if not _is_memory(new):
            return new
        weights = jax.tree.map(mean, *(old.weights for old in olds))
        new = new._replace(weights=weights)
        if not isinstance(new, MemoryState):
            return new
        starts = jax.tree.map(mean, *(old.starts for old in olds))
        anchor = None if new.anchor is None else weights
        return new._replace(anchor=anchor, starts=starts)

    blocks = [one.state.blocks for one in slots]
    mixer = jax.tree.map(
        memory,
        fresh.state.blocks.mixer,
        *(lm.learned(graph(config), params, one.state) for one in slots),
        is_leaf=_is_memory,
    )
    fast = jax.tree.map(mean, *(block.fast for block in blocks))
    blocks = fresh.state.blocks._replace(mixer=mixer, fast=fast)

    def level(new, *olds):
        if new.owned is None:
            return new
        start = jax.tree.map(mean, *(old.owned.start for old in olds))
        return new._replace(owned=new.owned._replace(start=start))

    each = zip(fresh.state.levels, *(one.state.levels for one in slots), strict=True)
    levels = tuple(level(*those) for those in each)
    held = fresh.state.held
    if held is not None:
        held = held._replace(mixers=config.bare(mixer))
    state = fresh.state._replace(blocks=blocks, levels=levels, held=held)
    return fresh._replace(state=state)


@functools.partial(jax.jit, static_argnames=("config",))
def changed(
    config: ModelConfig, params: PyTree, one: Slots, start: Slots
) -> Float[Array, "2 M"]:
    """Norms of what each level of `names` has learned, and of where it started."""

    def norms(levels):
        return jnp.stack([optax.tree.norm(level) for level in levels])

    now, before = (memories(config, params, s.state) for s in (one, start))
    learned = jax.tree.map(jnp.subtract, now, before)
    return jnp.stack([norms(learned), norms(before)])


def names(config: ModelConfig) -> tuple[str, ...]:
    """The levels that learn while the model reads: its memories by the names of their
    parts and the starts that consolidate them, after their mixers' where there are
    several, and `CMS 1`, ... of the chain.
    """
    found = []
    for i, mixer in enumerate(config.pattern):
        before = f"{mixer.kind} {i + 1}: " if len(config.pattern) > 1 else ""
        found += [before + part.name for part in (*mixer.learns, *mixer.starts)]
    return (*found, *(f"CMS {place + 1}" for place in config.fast))


def memories(
    config: ModelConfig, params: PyTree, state: lm.LMState
) -> tuple[PyTree, ...]:
    """The fast weights of each level of `names`, all that was read included."""
    mixers = lm.learned(graph(config), params, state)
    found = []
    for mixer, where in zip(
        config.pattern, mixers if len(config.pattern) > 1 else (mixers,), strict=True
    ):
        own = _weights(where)
        if mixer.modifies_itself:  # those of its projections are one batch
            batch, main = own
            count = jax.tree.leaves(batch)[0].shape[-3]
            own = [{n: w[..., i, :, :] for n, w in batch.items()} for i in range(count)]
            own.append(main)
        found += own
        found += zip(*starts_of(where), strict=True)  # of a level in all memories
    return (*found, *state.blocks.fast)


def _is_memory(node):
    return isinstance(node, MemoryState | InPlaceTTTState | SRWMState)


def _weights(mixer):
    nodes = jax.tree.leaves(mixer, is_leaf=_is_memory)
    return [node.weights for node in nodes if _is_memory(node)]
