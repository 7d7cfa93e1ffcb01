"""The language model: blocks scanned over layers, read chunk by chunk of its clocks.

`apply` is training, prefill and decoding. Without fast CMS levels it is one pass over
the tokens. With them the sequence is scanned over base chunks: forward with the current
fast weights, next-token loss, one backward pass for all fast levels, each of which
moves when its own period ends (equation 71 of arXiv:2512.24695): after as many tokens,
however they were cut into calls. The loss of a chunk's
last token needs the first token of the next chunk, so a chunk is held until that token
arrives: then the levels move, and that token is the first to see it. Nothing reads what
it should not.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from hope_jax.core import show
from hope_jax.core.clock import Clock
from hope_jax.core.level import collect
from hope_jax.kernels.select import scan_chunks, scan_padded
from hope_jax.memory.compose import Tokens
from hope_jax.memory.consolidation import starts_of
from hope_jax.models import cms, learning
from hope_jax.models.block import BlockState, stacked
from hope_jax.models.config import ModelConfig
from hope_jax.models.layers import DTYPES, rms_norm
from hope_jax.models.learning import Learning
from hope_jax.models.parts import NOT_KEPT, Parts
from hope_jax.models.share import Share
from hope_jax.optim.leaves import path_names, wide_type

__all__ = [
    "LMState",
    "LanguageModel",
    "Ledger",
    "ModelConfig",
    "Watched",
    "abstract",
    "apply",
    "build",
    "count_parameters",
    "fold",
    "hidden_states",
    "ids",
    "initial_state",
    "learned",
    "periods",
    "serve",
    "state_bytes",
    "unfold",
    "watch",
    "write",
]


class Held(NamedTuple):
    """The base chunk whose loss is not yet complete.

    Attributes:
      mixers: the mixers' states at its start, without what can be found again there
        (`ModelConfig.bare`), leaves `[B, L, ...]`.
      tokens: its tokens so far; what follows them is left from before.
      count: how many they are; all, and only the label of the last is missing. A chunk
        that was read in part without learning is not held, and teaches nothing.
    """

    mixers: PyTree
    tokens: Int[Array, "B C"]
    count: Int[Array, " B"]


class LMState(NamedTuple):
    """Where a model stands in the text of each row; its size does not grow with it.

    Every leaf leads with rows, B, then layers, L, where it belongs to the blocks (of a
    pattern of mixers: its repetitions).

    Attributes:
      blocks: mixers and fast CMS weights.
      levels: gradients, factors and rule states of the fast CMS levels.
      held: the unfinished chunk; None without fast levels.
      position: tokens read.
    """

    blocks: BlockState
    levels: tuple[cms.FastLevel, ...]
    held: Held | None
    position: Int[Array, " B"]

    _repr_html_ = show.state


class Ledger(NamedTuple):
    """What the F fast CMS levels of each row may do, and what they did.

    Attributes:
      longest: bound on the norm of one move of a level, over its whole stack; inf is
        none.
      most: moves that all levels together may make; what is learned for one beyond
        them is dropped.
      moves: that they made.
      shortened: of these, how many were longer.
      way: the sum of their norms.
    """

    longest: Float[Array, " B"]
    most: Int[Array, " B"]
    moves: Int[Array, "B F"]
    shortened: Int[Array, "B F"]
    way: Float[Array, "B F"]


class LanguageModel(nnx.Module):
    """What the outermost level learns: embedding, blocks, norm and inner rates, and the
    head where it is not the embedding.

    `blocks` is one `Block` whose parameters lead with layers, L; with a pattern of
    mixers one `Group`, whose parameters lead with its repetitions.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.d_model, DTYPES[config.dtype]
        self.embed = nnx.Embed(
            config.vocab,
            width,
            embedding_init=nnx.initializers.normal(width**-0.5),
            dtype=dtype,
            rngs=rngs,
        )
        self.blocks = stacked(config, rngs=rngs)
        self.norm = rms_norm(width, dtype, rngs, config.norm_epsilon)
        if not config.tied_embedding:
            init = nnx.initializers.normal(width**-0.5)
            self.head = nnx.Embed(
                config.vocab, width, embedding_init=init, dtype=dtype, rngs=rngs
            )
        if config.fast:
            self.rates = nnx.Param(first_rates(config))

    def inner_rates(self) -> Float[Array, " F"]:
        """The learned rates of the fast CMS levels, in (0, rate_bound)."""
        return self.config.cms.rate_bound * jax.nn.sigmoid(self.rates[...])

    def embedded(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """What the first block reads."""
        x = self.embed(tokens)
        return x * self.config.d_model**0.5 if self.config.scaled_embedding else x

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B N"]:
        """Of the next token, from the last block: products of the model's type that are
        summed in float32 or wider."""
        x = self.norm(x)
        head = self.embed if self.config.tied_embedding else self.head
        table = head.embedding[...].astype(x.dtype)
        return jnp.einsum(
            "...d,nd->...n", x, table, preferred_element_type=wide_type(x.dtype)
        )


def first_rates(config: ModelConfig) -> Float[Array, " F"]:
    """The parameter `rates` at the start: logits of shares of the bound."""
    start = [config.cms.levels[i].rate for i in config.fast]
    share = jnp.array(start, jnp.float32) / config.cms.rate_bound
    return jnp.log(share) - jnp.log1p(-share)


def build(config: ModelConfig, key: Array) -> tuple[nnx.GraphDef, nnx.State]:
    """A new model as `(graphdef, params)`; after this only pure functions."""
    return nnx.split(LanguageModel(config, rngs=nnx.Rngs(key)), nnx.Param)


def abstract(config: ModelConfig) -> nnx.State:
    """Shapes and dtypes of the parameters, without making them."""
    return abstract_model(config)[1]


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """`build` with shapes and dtypes in place of parameters."""
    return jax.eval_shape(lambda key: build(config, key), jax.random.key(0))


def count_parameters(config: ModelConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))


def periods(config: ModelConfig, params: PyTree, seq_len: int) -> PyTree:
    """After how many optimizer steps each parameter moves.

    A step reads `seq_len` tokens of each stream, so a CMS level that does not move
    inside them moves every `period / seq_len` steps; all else moves at every step.
    """
    inside = config.within(seq_len)

    def steps(path, leaf):
        del leaf
        keys = path_names(path)
        if "mixer" in keys or "levels" not in keys:
            return 1
        index = int(keys[keys.index("levels") + 1])
        level = config.cms.levels[index]
        if index in inside or level.period == float("inf"):
            return 1
        return max(1, round(level.period / seq_len))

    return jax.tree_util.tree_map_with_path(steps, params)


def initial_state(graphdef: nnx.GraphDef, params: PyTree, batch: int) -> LMState:
    """`batch` rows, one at least, at the learned initial states, before their first
    token."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}.")
    model = _merged(graphdef, params)
    return _rows_first(_begin(model, batch))


def apply(
    graphdef: nnx.GraphDef,
    params: PyTree,
    tokens: Array | np.ndarray,
    state: LMState | None = None,
    *,
    labels: Array | np.ndarray | None = None,
    after: Array | np.ndarray | None = None,
    at: Int[Array, "B Q"] | None = None,
    aligned: bool | None = None,
    count: Int[Array, ""] | None = None,
    begins: Bool[Array, "B S"] | None = None,
    learn: bool | Learning = True,
    horizon: int | None = None,
    parts: Parts | None = None,
    shared: str | None = None,
) -> tuple[Float[Array, "B T N"] | Float[Array, "B T"], LMState]:
    """Reads tokens, lets every fast level live through them, predicts the next ones.

    Args:
      graphdef, params: of `build`.
      tokens: `[B, T]`, ids in `[0, vocab)`, at least one a row.
      state: where each row stands; None starts fresh rows.
      labels: the next token of every position, where the text after `tokens` is known,
        as in training. They complete a last chunk that is full, which is then not held
        back. Logits are the same with and without. Needs `aligned`.
      after: `[B]`, the token after the last of `tokens`. With it the losses of all next
        tokens are returned in place of logits, which are made and given up a few
        hundred tokens at a time. Needs `aligned`, and no labels.
      at: places of each row, from 0; with them its logits there are returned, `[B, Q,
        N]`, and others are made only where a level that moves while reading learns from
        them. Needs `aligned`, no `after` and no `begins`.
      aligned: static; True promises that every row has read a multiple of
        `config.span` tokens, and reads chunks in parallel. A promise that is not kept
        is refused, or inside `jit`, where it cannot be looked at, the logits of that
        row are NaN. False reads one token after another, wherever each row stands.
        None does either, as the state says: fresh rows in parallel; others one by one
        to the next boundary and from there, where all rows stand at one, in parallel.
        Gradients of a state that was given need True or False.
      count: how many of the tokens are there, the same in every row; what follows is
        padding, so that texts of any length share a program, and its logits are 0. For
        a state that is given, with `aligned` None.
      begins: of S stretches of T / S tokens each, a multiple of `config.span`, those
        where another document begins. There the row is as fresh as a new one: nothing
        of the document before it is seen again, by any level. Needs `aligned`.
      learn: static; False leaves every fast level at its state: nothing is learned
        while reading. A `Learning` says so part by part.
      horizon: static, for fresh rows; promises that none of them reads more tokens than
        these, as in a step of training. Levels that would not move before then hold no
        fast copy: the parameters are read themselves. Logits are the same with and
        without. By default rows may read on for ever.
      parts: static, for fresh rows inside `jax.shard_map`; which parts of `params` this
        device holds. By default it holds all.
      shared: static, for fresh rows inside `jax.shard_map`; the axis of the mesh whose
        devices share the tokens of every row, in order, a stretch of T each, of which
        these are this device's (`ModelConfig.check_shared`). `after` and `begins` are
        of its stretch too. The state that is returned is that of the rows' start.

    Returns:
      Float32 logits, those of position t predicting token t + 1, or losses in nats,
      and the new state.

    Raises:
      ValueError: no `[B, T]` ids of the vocabulary, a state of other rows or of another
        model, more tokens than `config.most` (inside `jit`, logits beyond it are NaN),
        or arguments that do not go together.
    """
    _check_rows(tokens)
    anywhere = state is not None and aligned is None
    if count is not None and not anywhere:
        raise ValueError("count needs a state, and aligned=None.")
    if count is not None and not isinstance(count, Tracer):
        if not 0 <= int(count) <= tokens.shape[1]:
            raise ValueError(
                f"count must be of the {tokens.shape[1]} tokens of a row, got {count}."
            )
    aligned = state is None if aligned is None else aligned
    if parts is not None:
        if state is not None:
            raise ValueError("parts are for fresh rows: leave state out.")
        params = parts.outside(params)
    model = _merged(graphdef, params)
    if parts is not None:
        model.parts = parts
    tokens = ids("tokens", tokens, model.config.vocab)
    if labels is not None:
        labels = ids("labels", labels, model.config.vocab)
    model.learning = learn = learning.resolve(model.config, learn)
    if labels is not None and (not aligned or labels.shape != tokens.shape):
        raise ValueError(
            "labels need aligned=True and the shape of tokens, got "
            f"aligned={aligned} and {labels.shape} for {tokens.shape}."
        )
    targets = None
    if after is not None:
        after = ids("after", after, model.config.vocab)
        if not aligned or labels is not None or after.shape != tokens.shape[:1]:
            raise ValueError(
                f"after must be [B] for {tokens.shape[0]} rows, with aligned=True and "
                f"no labels; got {after.shape} and aligned={aligned}."
            )
        targets = jnp.concatenate([tokens[:, 1:], after[:, None]], axis=1)
    if at is not None:
        others = {"after": after, "begins": begins, "shared": shared}
        given = [name for name, value in others.items() if value is not None]
        if not aligned or given or at.ndim != 2 or len(at) != len(tokens):
            raise ValueError(
                f"at must be [B, Q] for {tokens.shape[0]} rows, with aligned=True and "
                f"without {', '.join(others)}; got {at.shape}, aligned={aligned} and "
                f"{', '.join(given) or 'none of these'}."
            )
    model.losses = targets is not None
    if shared is not None:
        if (
            state is not None
            or labels is not None
            or learn != learning.resolve(model.config, True)
        ):
            raise ValueError(
                f"shared={shared!r} is for fresh rows in which everything learns: "
                "leave state, labels and learn out."
            )
        whole = tokens.shape[1] * jax.lax.axis_size(shared)
        model.config.check_shared(whole, whole // tokens.shape[1])
        return _read_shared(model, tokens, targets, begins, shared)
    if horizon is not None and tokens.shape[1] > horizon:
        raise ValueError(
            f"horizon ({horizon}) must be at least the tokens of a row "
            f"({tokens.shape[1]}): leave it None for rows that read on."
        )
    fresh = state is None
    if begins is not None:
        _check_begins(begins, tokens, aligned, model.config.span)
    if fresh:
        state = _begin(model, tokens.shape[0], horizon)
    else:
        _check_state(model, state, tokens.shape[0], aligned)
        position = state.position
        looked_at = not isinstance(position, Tracer) and not isinstance(count, Tracer)
        if model.config.most is not None and looked_at:
            more = tokens.shape[1] if count is None else int(count)
            model.config.check_room("a row", int(jnp.max(position)) + more)
        state = _layers_first(state)
    if not aligned:
        if anywhere and (tokens.shape[1] > 1 or count is not None):
            logits, state = _read_anywhere(model, tokens, state, count, learn)
            return logits, _rows_first(state)
        step = functools.partial(_step, model, learn=learn)
        if tokens.shape[1] == 1:
            state, logits = step(state, tokens[:, 0])
            return logits[:, None], _rows_first(state)
        state, logits = jax.lax.scan(step, state, tokens.T)
        return jnp.moveaxis(logits, 0, 1), _rows_first(state)
    if begins is not None:
        start = _begin(model, tokens.shape[0], horizon)
        said, state = _read_documents(
            model, tokens, labels, targets, state, begins, start, learn
        )
    else:
        said, state = _read_aligned(
            model, tokens, labels, state, fresh, learn, targets=targets, at=at
        )
    if not fresh:
        kept = position % model.config.span == 0
        said = jnp.where(kept.reshape(-1, *[1] * (said.ndim - 1)), said, jnp.nan)
    return said, _rows_first(state)


def hidden_states(
    graphdef: nnx.GraphDef,
    params: PyTree,
    tokens: Array | np.ndarray,
    *,
    learn: bool | Learning = True,
) -> Float[Array, "B T D"]:
    """What the blocks make of the tokens of fresh rows, normed, as the head reads it.

    Args:
      graphdef, params: of `build`.
      tokens: `[B, T]`, ids in `[0, vocab)`.
      learn: static; as of `apply`.

    Raises:
      ValueError: no `[B, T]` ids of the vocabulary; CMS levels move while the model
        reads, by the loss of its logits.
    """
    _check_rows(tokens)
    model = _merged(graphdef, params)
    config = model.config
    if config.fast:
        periods = ", ".join(f"{period}" for period in config.fast_periods)
        raise ValueError(
            f"{config.name!r} has CMS levels of periods {periods}, which move by the "
            "loss of its logits, and here it makes none: give them period math.inf."
        )
    tokens = ids("tokens", tokens, config.vocab)
    model.learning = learn = learning.resolve(config, learn)
    x, _ = _through(model, tokens, None, (), aligned=True, learn=learn)
    return model.norm(x)


def learned(graphdef: nnx.GraphDef, params: PyTree, state: LMState) -> PyTree:
    """The mixers' states of rows as if the chunks of their memories ended here: with
    what these have been given and would learn at the end.

    Args:
      graphdef, params: of `build`.
      state: where each row stands.
    """
    blocks, params = nnx.split(_merged(graphdef, params).blocks, nnx.Param)
    each = jax.vmap(lambda params, mixer: nnx.merge(blocks, params).ended(mixer))
    return _swap(each(params, _swap(state.blocks.mixer)))


def state_bytes(config: ModelConfig) -> dict[str, int]:
    """Bytes of the state of one row, part by part, without making it.

    A row that reads has its mixers' states, and of every level that moves meanwhile its
    own weights, what has been learned since the last move, and what its rule carries;
    and the mixers' states at the start of the base chunk whose loss is not yet known.
    At rest (`fold`) it has these alone of the mixers: all but `mixers` and their
    `starts`.
    """
    graphdef, params = abstract_model(config)
    state = jax.eval_shape(lambda params: initial_state(graphdef, params, 1), params)
    size = lambda tree: sum(  # noqa: E731
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
    starts = size(starts_of(state.blocks.mixer))
    made = {"mixers": size(state.blocks.mixer) - starts}
    if starts:
        made["starts"] = starts
    for place, weights, level in zip(
        config.fast, state.blocks.fast, state.levels, strict=True
    ):
        made[f"CMS {place + 1} weights"] = size(weights)
        made[f"CMS {place + 1} learned"] = size((level.learned, level.opened))
        made[f"CMS {place + 1} rule"] = size(level.opt)
        if level.owned is not None:
            made[f"CMS {place + 1} start"] = size(level.owned)
    if state.held is not None:
        made["held chunk"] = size(state.held)
    return made | {"all": size(state)}


def fold(config: ModelConfig, state: LMState) -> LMState:
    """`state` without what can be found again, for rows that rest.

    A model whose levels move while reading keeps the mixers' states at the start of
    the base chunk, for the gradient of its loss, and the chunk's tokens. From these
    `unfold` makes the states where the rows stand. Of other models it is the state
    itself.

    Raises:
      ValueError: a row has read a part of its base chunk without learning, which is
        then not held.
    """
    held, chunk = state.held, config.base_chunk
    if held is None or chunk is None:
        return state
    place = np.asarray(state.position) % chunk
    if (np.asarray(held.count) % chunk != place).any():
        raise ValueError(
            "state has rows that read a part of their chunk without learning, got "
            f"positions {np.asarray(state.position).tolist()} and held tokens "
            f"{np.asarray(held.count).tolist()}: read on to a multiple of {chunk}."
        )
    now = config.bare(state.blocks.mixer)
    mixers = _where(held.count == 0, now, held.mixers, axis=0)
    blocks = state.blocks._replace(mixer=None)
    return state._replace(blocks=blocks, held=held._replace(mixers=mixers))


def unfold(
    graphdef: nnx.GraphDef,
    params: PyTree,
    state: LMState,
    *,
    learn: bool | Learning = True,
) -> LMState:
    """The state that was folded, but for rounding: reads the held tokens once more.

    Args:
      graphdef, params: of `build`.
      state: of `fold`.
      learn: static; as when the rows read them.
    """
    if state.held is None:
        return state
    model = _merged(graphdef, params)
    model.learning = learn = learning.resolve(model.config, learn)
    state = _layers_first(state)
    held, fast = state.held, state.blocks.fast
    assert held is not None

    def read(i, mixers):
        token = jax.lax.dynamic_index_in_dim(held.tokens, i, axis=1)
        _, after, _ = _read(model, token, mixers, fast, aligned=False, learn=learn)
        return _where(i < held.count, after, mixers)

    mixers = model.config.full(held.mixers)
    mixers = jax.lax.fori_loop(0, jnp.max(held.count), read, mixers)
    blocks = state.blocks._replace(mixer=mixers)
    return _rows_first(state._replace(blocks=blocks))


def write(
    graphdef: nnx.GraphDef,
    params: PyTree,
    state: LMState,
    logits: Float[Array, "B N"],
    choose: Callable[[Array, PyTree], Int[Array, " B"]],
    xs: PyTree,
    *,
    learn: bool | Learning = True,
) -> tuple[Int[Array, "B T"], Float[Array, "B N"], LMState]:
    """T tokens a row, each read before the next one is chosen; rows stand anywhere.

    What `apply` does token by token, without a copy of the state at each: levels move
    between blocks of tokens, which end where a row's base chunk does.

    Args:
      graphdef, params: of `build`.
      state: where each row stands.
      logits: what the model said after the token before.
      choose: `(logits[B, N], x) -> tokens[B]`; called once more than once a token, so
        it must be pure.
      xs: what it is given, leaves that lead with T.
      learn: static; as of `apply`.

    Returns:
      The tokens, the logits after the last of them and the state.

    Raises:
      ValueError: no tokens are asked for, or the state is of other rows or of another
        model.
    """
    model = _merged(graphdef, params)
    model.learning = learn = learning.resolve(model.config, learn)
    model.losses = False
    _check_state(model, state, logits.shape[0], False)
    steps = _steps_of(xs)

    def chosen(logits, i):
        return choose(logits, jax.tree.map(lambda a: a[i], xs))

    def put(tokens, i, token, said):
        del said
        return tokens.at[i].set(token)

    tokens = jnp.zeros((steps, logits.shape[0]), jnp.int32)
    walk = _Walk(jnp.zeros((), jnp.int32), logits, _layers_first(state), tokens)
    body = functools.partial(_block, model, chosen, put, steps, learn=learn)
    walk = jax.lax.while_loop(lambda walk: walk.at < steps, body, walk)
    return walk.made.T, walk.logits, _rows_first(walk.state)


def serve(
    graphdef: nnx.GraphDef,
    params: PyTree,
    state: LMState,
    logits: Float[Array, "B N"],
    ledger: Ledger,
    choose: Callable[[Array, PyTree], Int[Array, " B"]],
    xs: PyTree,
    counts: Int[Array, " B"],
    *,
    learn: bool | Learning = True,
) -> tuple[
    tuple[Int[Array, "B T"], Float[Array, "B T"]], Float[Array, "B N"], Ledger, LMState
]:
    """`write` for rows of different readers: each reads as many tokens as it is given.

    No bit of a row depends on what other rows hold, or on how its tokens are cut into
    calls.

    Args:
      graphdef, params: of `build`.
      state, logits, choose, xs: as of `write`.
      ledger: what the levels of each row may do.
      counts: tokens of each row, of the T of `xs`; a row of none keeps its state, its
        logits and its ledger bit for bit.
      learn: static; as of `apply`.

    Returns:
      The tokens and their losses in nats under what was said before each, 0 beyond
      the counts; then logits, ledger and state.
    """
    model = _merged(graphdef, params)
    model.learning = learn = learning.resolve(model.config, learn)
    model.losses = False
    rows, steps = logits.shape[0], _steps_of(xs)
    _check_state(model, state, rows, False)

    def chosen(logits, i):
        return choose(logits, jax.tree.map(lambda a: a[i], xs))

    def put(made, i, token, said):
        tokens, losses = made
        read = i < counts
        loss = jnp.where(read, next_token_loss(said.before, token), 0.0)
        token = jnp.where(read, token, 0)
        return tokens.at[i].set(token), losses.at[i].set(loss)

    def body(walk):
        reading = walk.at < counts
        stop = jnp.min(jnp.where(reading, counts, steps))
        reading = None if rows == 1 else reading  # a row alone reads to its end
        return _block(model, chosen, put, stop, walk, learn=learn, reading=reading)

    made = jnp.zeros((steps, rows), jnp.int32), jnp.zeros((steps, rows), logits.dtype)
    start = jnp.zeros((), jnp.int32)
    walk = _Walk(start, logits, _layers_first(state), made, ledger)
    walk = jax.lax.while_loop(lambda walk: walk.at < jnp.max(counts), body, walk)
    tokens, losses = walk.made
    assert walk.ledger is not None
    return (tokens.T, losses.T), walk.logits, walk.ledger, _rows_first(walk.state)


def _merged(graphdef, params) -> Any:
    """The model, of parameters that are all there; says what is not."""
    try:
        return nnx.merge(graphdef, params)
    except (ValueError, TypeError) as error:
        if not isinstance(graphdef, nnx.GraphDef):
            said = f"graphdef must be that of build, got {type(graphdef).__name__}."
        elif not isinstance(params, Mapping):
            said = (
                f"params must be the parameters of build, got {type(params).__name__}"
                "; a state is an argument of its own."
            )
        else:
            own, given = (_names(tree) for tree in (_asked(graphdef), params))
            lacks, more = sorted(own - given), sorted(given - own)
            if not lacks and not more:
                raise
            said = "params must be all parameters of build, and no others:"
            said += f" they lack {', '.join(lacks)}." if lacks else ""
            said += f" nothing asks for {', '.join(more)}." if more else ""
        raise ValueError(said) from error


def _asked(graphdef: nnx.GraphDef) -> nnx.State:
    """The parameters that a model has, as shapes; it holds its config as it is."""
    held = (getattr(value, "value", None) for _, value in graphdef.attributes)
    return abstract(next(one for one in held if isinstance(one, ModelConfig)))


def _names(tree: PyTree) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(path_names(path)) for path, _ in leaves}


class Watched(NamedTuple):
    """What there was to see of a base chunk; leaves lead with rows, then layers.

    Attributes:
      losses: in nats, of each label.
      levels: the fast CMS levels before they moved, with what they learned of it.
      written: what the memories of the mixers were given, one after the other and in a
        pattern mixer after mixer, leaves `[B, L, H, C, ...]`
        (`hope_jax.models.mixers.base.MixerConfig.memories`).
    """

    losses: Float[Array, "B C"]
    levels: tuple[cms.FastLevel, ...]
    written: tuple[Tokens, ...]


def watch(
    graphdef: nnx.GraphDef,
    params: PyTree,
    tokens: Int[Array, "B C"],
    labels: Int[Array, "B C"],
    state: LMState,
    *,
    learn: bool | Learning = True,
) -> tuple[Watched, LMState]:
    """What `apply` does with `labels`, for somebody to look on: one base chunk, from a
    boundary of its clock on, in more time and memory.

    Args:
      graphdef, params: of `build`.
      tokens, labels: as of `apply`; of a model without fast levels a multiple of
        `config.span`.
      state: where each row stands; nothing is held.
      learn: static; as of `apply`.

    Raises:
      ValueError: as `apply`; or tokens that are no base chunk, or do not begin where
        one does. What is traced cannot be looked at.
    """
    model = _merged(graphdef, params)
    config, (rows, length) = model.config, tokens.shape
    whole = config.span if config.nests else 1
    if length != (config.base_chunk or length) or length % whole:
        raise ValueError(
            f"tokens must be [B, {config.base_chunk or config.span}], a base chunk of "
            f"{config.name!r}, got {tokens.shape}."
        )
    model.learning = learn = learning.resolve(config, learn)
    model.losses = True
    _check_state(model, state, rows, False)
    if not isinstance(state.position, Tracer):
        off = np.asarray(state.position) % length != 0
        if state.held is not None:
            off |= np.asarray(state.held.count) > 0
        if off.any():
            raise ValueError(
                f"state must stand at a multiple of {length} tokens and hold none, got "
                f"position {np.asarray(state.position).tolist()}: read with labels."
            )
    tokens, labels = (
        ids("tokens", tokens, config.vocab),
        ids("labels", labels, config.vocab),
    )
    state = _layers_first(state)
    mixers, fast, _ = state.blocks
    written = _written(model, tokens, state.blocks, learn)
    if not state.levels or not learn.cms:
        read = _read(
            *(model, tokens, mixers, fast),
            aligned=config.nests,
            learn=learn,
            targets=labels,
        )
        life = _Life(read.mixers, fast, state.levels, state.position + length)
        levels = life.levels
    else:
        life = _Life(config.bare(mixers), fast, state.levels, state.position)
        life, read = _learn(model, life, tokens, labels)
        levels = life.levels
        life = _move_due(model, life)
        life = life._replace(mixers=config.full(life.mixers))
    after = LMState(
        BlockState(life.mixers, life.fast), life.levels, state.held, life.position
    )
    before = _rows_first(state._replace(levels=levels)).levels
    return Watched(read.said, before, _swap(written)), _rows_first(after)


def _written(model, tokens, blocks, learn):
    """What the memories of each layer are given."""
    graphdef, params = nnx.split(model.blocks, nnx.Param)
    how = {"aligned": model.config.nests, "learn": learn}

    def layer(x, block):
        params, mixer, fast = block
        return nnx.merge(graphdef, params).watch(x, BlockState(mixer, fast), **how)

    x = model.embedded(tokens)
    return jax.lax.scan(layer, x, (params, blocks.mixer, blocks.fast))[1]


def _check_rows(tokens):
    """Refuses what is not a token at least of each row."""
    if jnp.ndim(tokens) != 2 or min(jnp.shape(tokens)) < 1:
        raise ValueError(
            f"tokens must be [B, T] with B >= 1 and T >= 1, got {jnp.shape(tokens)}."
        )


def _steps_of(xs):
    """How many tokens `choose` is asked for."""
    steps = jax.tree.leaves(xs)[0].shape[0]
    if steps < 1:
        raise ValueError(f"xs must lead with at least one token, got {steps}.")
    return steps


def ids(name: str, tokens: Array | np.ndarray, vocab: int) -> Int[Array, "..."]:
    """Token ids as int32.

    One that the model has no row for would be read as another token's, or make NaN of
    all that its row ever remembers.

    Raises:
      ValueError: they are no integers, or one is outside `[0, vocab)`; what is traced
        cannot be looked at.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {tokens.dtype}.")
    if not isinstance(tokens, Tracer):
        host = np.asarray(tokens)
        wrong = host[(host < 0) | (host >= vocab)]
        if wrong.size:
            raise ValueError(
                f"{name} must be ids in [0, {vocab}), the model's vocabulary, got "
                f"{wrong.flat[0]}. Use the tokenizer that the model was trained with."
            )
    return jnp.asarray(tokens, jnp.int32)


def _check_state(model, state, rows, aligned):
    """Refuses a state that is not of these rows, of this model, or of this place."""
    if not isinstance(state, LMState):
        raise ValueError(
            f"state must be an LMState, of initial_state or an earlier call, got "
            f"{type(state).__name__}."
        )
    if state.held is not None and state.blocks.mixer is None:
        raise ValueError("state is folded: give lm.unfold(graphdef, params, state).")
    if state.position.shape != (rows,):
        raise ValueError(
            f"state is of {state.position.shape[0]} rows, tokens of {rows}."
        )
    fresh = jax.eval_shape(lambda: _rows_first(_begin(model, rows)))
    # With a horizon, a state has only the first of the fast levels.
    moving = len(state.levels)
    blocks = fresh.blocks._replace(fast=fresh.blocks.fast[:moving])
    levels = fresh.levels[:moving]
    if 0 < moving < len(fresh.levels):  # and nothing owns the start of the last
        levels = (*levels[:-1], levels[-1]._replace(owned=None))
    expected = fresh._replace(blocks=blocks, levels=levels)
    expected = expected._replace(held=expected.held if moving else None)
    shapes = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(path): (leaf.shape, jnp.dtype(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    own, given = shapes(expected), shapes(state)
    for path in [*own, *given]:
        if own.get(path) != given.get(path):
            raise ValueError(
                "state is of another model: at state"
                f"{path} it has {given.get(path)}, this model {own.get(path)}."
            )
    if aligned and not isinstance(state.position, Tracer):
        behind = np.asarray(state.position) % model.config.span
        if behind.any():
            raise ValueError(
                "aligned=True promises that every row has read a multiple of "
                f"{model.config.span} tokens, but state.position is "
                f"{np.asarray(state.position).tolist()}: leave aligned out."
            )


def _check_begins(begins, tokens, aligned, span):
    """Refuses documents that cannot begin where they are said to."""
    rows, length = tokens.shape
    if begins.ndim != 2 or begins.shape[0] != rows or length % begins.shape[1]:
        raise ValueError(
            f"begins must be [B, S] for {rows} rows of {length} tokens, S a divisor of "
            f"these, got {begins.shape}."
        )
    stretch = length // begins.shape[1]
    if not aligned or stretch % span:
        raise ValueError(
            f"begins needs aligned=True and stretches of a multiple of {span} tokens, "
            f"where every clock of the model may begin; got aligned={aligned} and "
            f"{stretch}."
        )


def next_token_loss(
    logits: Float[Array, "*B N"], labels: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """Cross-entropy in nats of each label."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


# Inside, leaves of the blocks lead with layers, so that layers are scanned; outside
# they lead with rows. Rows are axis 1 of every such leaf inside.


def _swap(tree):
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tree)


def _rows_first(state: LMState) -> LMState:
    held = state.held
    if held is not None:
        held = held._replace(mixers=_swap(held.mixers))
    levels = tuple(
        v._replace(
            learned=_swap(v.learned),
            opened=_swap(v.opened),
            owned=v.owned
            and v.owned._replace(
                start=_swap(v.owned.start),
                learned=_swap(v.owned.learned),
                window=v.owned.window
                and v.owned.window._replace(
                    mixers=_swap(v.owned.window.mixers),
                    starts=_swap(v.owned.window.starts),
                ),
            ),
        )
        for v in state.levels
    )
    return state._replace(blocks=_swap(state.blocks), levels=levels, held=held)


_layers_first = _rows_first


def _parts(model) -> Parts | None:
    """Those of a model that this device holds a part of."""
    return getattr(model, "parts", None)


def _whole_blocks(model):
    """The parameters of all layers."""
    graphdef, params = nnx.split(model.blocks, nnx.Param)
    parts = _parts(model)
    return graphdef, params if parts is None else parts.blocks(params)


def _starts(model):
    """The learned weights at which the fast levels start."""
    return nnx.merge(*_whole_blocks(model)).starts()


def _begin(model, rows, horizon=None):
    graphdef, params = _whole_blocks(model)
    blocks = jax.vmap(lambda p: nnx.merge(graphdef, p).initial_state(rows, horizon))(
        params
    )
    config = model.config
    if config.cms.gradient == "none":
        blocks = blocks._replace(fast=jax.lax.stop_gradient(blocks.fast))
    moving = _moving(config, blocks.fast)
    owners = (
        [level for level, _ in moving[1:]] if config.cms.variant == "nested" else ()
    )
    levels = tuple(
        cms.begin_level(level, weights, 1, owner)._replace(opened=_closed(config, rows))
        for (level, weights), owner in itertools.zip_longest(moving, owners)
    )
    if config.cms.inner == "exact":
        levels = _with_windows(config, levels, config.bare(blocks.mixer))
    held = None
    if levels:
        held = Held(
            mixers=config.bare(blocks.mixer),
            tokens=jnp.zeros((rows, config.base_chunk), jnp.int32),
            count=jnp.zeros((rows,), jnp.int32),
        )
    return LMState(blocks, levels, held, jnp.zeros((rows,), jnp.int32))


def _with_windows(config, levels, mixers):
    """Levels at a place where all that is owned begins, each with its window."""
    made = []
    for level, period in zip(levels, config.fast_periods[1:], strict=False):
        if level.owned is not None:
            rows = jax.tree.leaves(level.owned.start)[0].shape[1]
            window = cms.Window(
                mixers,
                *_owned(made),
                tokens=jnp.zeros((rows, period), jnp.int32),
                labels=jnp.zeros((rows, period), jnp.int32),
                chunks=jnp.zeros((rows,), jnp.int32),
            )
            level = level._replace(owned=level.owned._replace(window=window))
        made.append(level)
    return (*made, *levels[len(made) :])


def _owned(levels):
    """The starts of levels, and the states of the rules that move these."""
    owned = [level.owned for level in levels]
    return tuple(one.start for one in owned), tuple(one.opt for one in owned)


def _closed(config, rows):
    """The sums of generated factors before the first token."""
    if config.cms.rates != "generated":
        return None
    parts = len(config.pattern)
    shape = config.layers // parts, rows
    zeros = jnp.zeros(shape, wide_type(jnp.dtype(DTYPES[config.dtype])))
    return zeros if parts == 1 else (zeros,) * parts


def _moving(config, fast):
    """The levels that have fast weights, and these."""
    levels = (config.cms.whole[i] for i in config.fast[: len(fast)])
    return tuple(zip(levels, fast, strict=True))


class _Read(NamedTuple):
    """What tokens make of a model.

    Attributes:
      said: its logits, or the losses of targets.
      mixers: the mixers' new states.
      opened: the factors that tokens give to the moves of fast levels, `[L, B, T, F]`;
        None where rates are not generated.
    """

    said: Array
    mixers: PyTree
    opened: PyTree | None


def _read(model, tokens, mixers, fast, *, targets=None, at=None, **how):
    """What `[B, T]` tokens make of a model, the fast weights fixed; `how` as of
    `_through`."""
    x, (mixers, opened) = _through(model, tokens, mixers, fast, **how)
    return _Read(_say(model, _there(x, at), targets), mixers, opened)


def _through(model, tokens, mixers, fast, *, aligned, learn, share=None, blamed=False):
    """What the last block makes of tokens, and the mixers' states and factors of it;
    `blamed` for a gradient of the fast weights and of nothing else."""
    graphdef, params = nnx.split(model.blocks, nnx.Param)
    x, parts = model.embedded(tokens), _parts(model)
    first = jnp.arange(_count(params), dtype=jnp.int32) == 0 if blamed else None

    def layer(x, block):
        params, mixer, fast, first = block
        if parts is not None:
            params = parts.layer(params)
        how = {"aligned": aligned, "learn": learn, "share": share, "first": first}
        x, state = nnx.merge(graphdef, params)(x, BlockState(mixer, fast), **how)
        return x, (state.mixer, state.opened)

    if model.config.remat:
        layer = jax.checkpoint(layer)
    elif parts is not None:
        layer = jax.checkpoint(layer, policy=NOT_KEPT)
    return jax.lax.scan(layer, x, (params, mixers, fast, first))


def _there(x, at):
    """Of `[B, T, D]` what stands at the places `[B, Q]` of each row, or all."""
    return x if at is None else jnp.take_along_axis(x, at[..., None], axis=1)


def _say(model, x, targets):
    """Logits, or the losses of targets, for which no more than some are held at once:
    a vocabulary is large."""
    if targets is None:
        return model.logits(x)

    def some(carry, xs, count):
        del count  # of what is padding nobody asks
        x, targets = xs
        return carry, next_token_loss(model.logits(x), targets)

    by_time = jnp.moveaxis(x, 1, 0), targets.T
    _, losses = scan_padded(some, _SAID, (), by_time, remat=True)
    return losses.T


_SAID = 256  # tokens whose logits are held at once


def _read_and_blame(
    model, tokens, labels, mixers, fast, position, teaches=None
) -> tuple[PyTree, "_Read"]:
    """What a base chunk's loss says of each row's fast weights, and its `_read`.

    The gradient is that of the chunk alone: states at its start, at `position`, are
    constants to it. Of a chunk that does not teach it is not made, but zero.
    """
    graphdef, params = nnx.split(model, nnx.Param)
    chunk = _Chunk(tokens, labels, mixers, fast, teaches)
    if model.config.cms.gradient != "exact":
        return _blame_constant(graphdef, params, chunk)
    blame = jax.checkpoint(_blame, static_argnums=0)
    if all(level.truncate is None for level, _ in _moving(model.config, fast)):
        return blame(graphdef, params, chunk)
    # The same values twice: what is read has the slope of weights as they came to be,
    # what is learned not in every chunk.
    learned, there = blame(
        graphdef, params, chunk._replace(fast=_cut(model, fast, position))
    )
    read = jax.checkpoint(_read_chunk, static_argnums=0)(graphdef, params, chunk)
    return learned, read._replace(opened=there.opened)


def _cut(model, fast, position):
    """Fast weights as those that learn at `position` see them (`CMSLevel.truncate`)."""
    starts, made = _starts(model), []
    for (level, weights), start in zip(
        _moving(model.config, fast), starts, strict=False
    ):
        moves = position // int(level.period)
        made.append(_cut_at(level, moves, weights, start))
    return tuple(made)


def _cut_at(level, moves, weights, start):
    """The weights of a level for its next move after so many: cut where that is the
    first of a stretch."""
    if level.truncate is None:
        return weights
    first = moves % level.truncate == 0
    return _where_any(first, jax.tree.map(cms.cut, weights, start), weights)


# A first-order move is traced as a value, as the forward half of its derivative and
# inside a scan, which traces twice. The compiled program is the same.
_traced_once = functools.partial(jax.jit, static_argnums=0)


class _Chunk(NamedTuple):
    """A base chunk and the states at its start, bare; whether it teaches anything."""

    tokens: Array
    labels: Array
    mixers: PyTree
    fast: tuple
    teaches: Bool[Array, ""] | None = None


@functools.partial(jax.jit, static_argnums=(0, 3))
def _read_chunk(graphdef, params, chunk, blamed=False):
    model = nnx.merge(graphdef, params)
    return _read(
        model,
        chunk.tokens,
        model.config.full(chunk.mixers),
        chunk.fast,
        aligned=model.config.nests,
        learn=model.learning,
        targets=chunk.labels if model.losses else None,
        blamed=blamed,
    )


@_traced_once
def _blame(graphdef, params, chunk):
    model = nnx.merge(graphdef, params)
    moving = _moving(model.config, chunk.fast)

    def objective(fast):
        read = _read_chunk(graphdef, params, chunk._replace(fast=fast), True)
        losses = read.said
        if not model.losses:
            losses = next_token_loss(read.said, chunk.labels)
        return jnp.sum(losses), read

    fast = tuple(cms.noted(*one) for one in moving)
    if chunk.teaches is None:
        gradient, read = jax.grad(objective, has_aux=True)(fast)
    else:
        loss, pullback, read = jax.vjp(objective, fast, has_aux=True)
        gradient = jax.lax.cond(
            chunk.teaches,
            lambda: pullback(jnp.ones_like(loss))[0],
            lambda: jax.tree.map(jnp.zeros_like, fast),
        )
    learned = tuple(
        cms.learned(level, g) for (level, _), g in zip(moving, gradient, strict=True)
    )
    return learned, read


# To the level above, a first-order update is a constant. Its backward pass is then that
# of `_read_chunk` alone; left to itself, JAX would differentiate the inner backward
# pass too and throw the result away.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blame_constant(graphdef, params, chunk):
    return _blame(graphdef, params, chunk)


def _blame_constant_forward(graphdef, params, chunk):
    return _blame(graphdef, params, chunk), (params, chunk)


def _blame_constant_backward(graphdef, residuals, cotangents):
    _, pullback = jax.vjp(functools.partial(_read_chunk, graphdef), *residuals)
    return pullback(cotangents[1])


_blame_constant.defvjp(_blame_constant_forward, _blame_constant_backward)


def _accumulate(model, levels, learned, read, chunk):
    """The levels with what a chunk, `(tokens, labels, mixers, position)` at its start,
    has taught them."""

    def gathered(which, level):
        learns = [model.learning.levels[i] for i in model.config.fast[: which + 1]]
        if not all(learns):  # then it is not lived as it will be lived again
            level = cms.spoiled(level, jnp.ones_like(chunk[0][:, 0], bool))
        if not learns[-1]:
            return level
        opened = jax.tree.map(lambda a: jnp.sum(a[..., which], axis=2), read.opened)
        owned = level.owned
        if owned is not None:
            sums = collect(owned.learned, learned[which].gradient)
            window = owned.window
            if window is not None and all(learns):
                starts, opts = _owned(levels[:which])
                window = _kept_in(window, chunk, starts, opts)
            owned = owned._replace(learned=sums, window=window)
        return level._replace(
            learned=collect(level.learned, learned[which]),
            opened=collect(level.opened, opened),
            owned=owned,
        )

    return tuple(gathered(which, level) for which, level in enumerate(levels))


def _kept_in(window, chunk, starts, opts):
    """A window with one more base chunk, which begins it where its owner has moved."""
    tokens, labels, mixers, position = chunk
    rows, size = window.tokens.shape
    slot = jnp.broadcast_to(position % size, (rows,))
    place = jnp.arange(size, dtype=jnp.int32)[None] - slot[:, None]
    here = (place >= 0) & (place < tokens.shape[1])
    place = jnp.clip(place, 0, tokens.shape[1] - 1)

    def put(old, new):
        return jnp.where(here, jnp.take_along_axis(new, place, axis=1), old)

    begins = slot == 0
    return cms.Window(
        _where(begins, mixers, window.mixers),
        _where(begins, starts, window.starts),
        _where(begins, opts, window.opts, axis=0),
        put(window.tokens, tokens),
        put(window.labels, labels),
        jnp.where(begins, 0, window.chunks) + 1,
    )


def _through_moves(model, place, own, slower):
    """What a whole window says of where fast level `place` began, through its moves and
    those of all that is faster (equation 72): lives the window once more. `slower` are
    the weights of the slower levels, which stood still meanwhile. As ever, the states
    at the start of each base chunk are constants."""
    config, window = model.config, own.owned.window
    graphdef, params = nnx.split(model, nnx.Param)
    given = params, window.mixers, window.starts, window.opts, own.owned.start, slower
    if config.cms.gradient != "exact":  # to the level above it is a constant
        given = jax.lax.stop_gradient(given)
    params, mixers, starts, opts, start, slower = given
    model = nnx.merge(graphdef, params)
    chain = dataclasses.replace(config.cms, gradient="exact")
    model.config = dataclasses.replace(config, cms=chain)
    whole, rows = [chain.whole[i] for i in config.fast], len(window.tokens)

    def begun(weights):
        """All levels up to this one where they began."""
        levels = []
        for i, (level, w) in enumerate(zip(whole, weights, strict=False)):
            owner = whole[i + 1] if i < place else None
            state = cms.begin_level(level, w, 1, owner)
            if state.owned is not None:
                state = state._replace(owned=state.owned._replace(opt=opts[i]))
            levels.append(state._replace(opened=_closed(config, rows)))
        return _with_windows(config, tuple(levels), mixers)

    def loss(start):
        def step(life, xs):
            tokens, labels = xs
            life = life._replace(mixers=jax.lax.stop_gradient(life.mixers))
            life, read = _learn(model, life, tokens, labels)
            losses = read.said if model.losses else next_token_loss(read.said, labels)
            return _move_due(model, life), jnp.sum(losses)

        chunk = config.base_chunk
        cut = lambda a: jnp.moveaxis(a.reshape(len(a), -1, chunk), 1, 0)  # noqa: E731
        weights, origin = (*starts, start), jnp.zeros((), jnp.int32)
        life = _Life(mixers, (*weights, *slower), begun(weights), origin)
        _, losses = jax.lax.scan(step, life, (cut(window.tokens), cut(window.labels)))
        return jnp.sum(losses)

    through = jax.grad(loss)(start)
    there = window.chunks == window.tokens.shape[1] // config.base_chunk
    sums = jax.tree.map(
        lambda new, old: new.astype(old.dtype), through, own.owned.learned
    )
    sums = _where(there, sums, own.owned.learned)
    return own._replace(owned=own.owned._replace(learned=sums))


def _read_documents(model, tokens, labels, targets, state, begins, start, learn):
    """`_read_aligned` of one stretch after another; rows `start` where one begins."""
    if state.levels and learn.cms:
        state, _ = _settle(model, state, tokens[:, 0])
    stretches = begins.shape[1]

    def cut(a):  # [B, T] -> [S, B, T / S]
        return a if a is None else jnp.swapaxes(a.reshape(len(a), stretches, -1), 0, 1)

    def read(state, xs):
        begins, tokens, labels, targets = xs
        state = _where_state(begins, start, state)
        # Where all labels are known nothing was held back.
        settled = labels is not None
        said, state = _read_aligned(
            model, tokens, labels, state, False, learn, settled, targets
        )
        return state, said

    xs = begins.T, cut(tokens), cut(labels), cut(targets)
    state, said = jax.lax.scan(read, state, xs)
    said = jnp.swapaxes(said, 0, 1)
    return said.reshape(*tokens.shape, *said.shape[3:]), state


def _read_shared(model, tokens, targets, begins, axis):
    """This device's stretch of fresh rows, layer by layer beside the others."""
    if begins is not None:
        _check_begins(begins, tokens, True, model.config.span)
    state = _begin(model, tokens.shape[0], tokens.shape[1])
    said = _read(
        *(model, tokens, state.blocks.mixer, state.blocks.fast),
        aligned=True,
        learn=model.learning,
        targets=targets,
        share=Share.of(axis, tokens, begins),
    ).said
    return said, _rows_first(state)


class _Life(NamedTuple):
    """What the scan over chunks carries.

    Attributes:
      mixers: bare, for chunks begin at boundaries.
      position: tokens read; one number for all rows where these are fresh.
      ledger: of rows that are served.
      begun: `mixers` before the last chunk, where that will be held.
    """

    mixers: PyTree
    fast: tuple
    levels: tuple
    position: Int[Array, "*B"]
    ledger: Ledger | None = None
    begun: PyTree | None = None


def _read_aligned(
    model, tokens, labels, state, fresh, learn, settled=False, targets=None, at=None
):
    length = tokens.shape[1]
    position = state.position + length
    if not state.levels or not learn.cms:
        mixers, fast, _ = state.blocks
        given = None if fresh else mixers  # a mixer that begins looks back at nothing
        said, mixers, _ = _read(
            *(model, tokens, given, fast),
            aligned=True,
            learn=learn,
            targets=targets,
            at=at,
        )
        blocks, held = BlockState(mixers, fast), _let_go(state.held)
        return said, LMState(blocks, state.levels, held, position)

    config, chunk = model.config, model.config.base_chunk
    if not (fresh or settled):
        state, _ = _settle(model, state, tokens[:, 0])
    start = jnp.zeros((), jnp.int32) if fresh else state.position
    mixers = config.bare(state.blocks.mixer)
    life = _Life(mixers, state.blocks.fast, state.levels, start)
    missing = labels is None  # that of the last token
    if missing:
        after = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        labels = after if targets is None else targets
    complete = (length - missing) // chunk * chunk  # tokens of chunks with all labels
    # One body for all chunks: whether a slower level moves after one depends on where
    # its row stands, and the last teaches nothing where a label of it is missing.
    whole = length // chunk * chunk if complete else 0
    teaches = None
    if complete < whole:
        teaches = jnp.arange(whole, dtype=jnp.int32) < complete
        life = life._replace(begun=mixers)
    outputs = []
    if whole:
        live = functools.partial(_live, model)
        xs = tokens[:, :whole].T, labels[:, :whole].T, teaches
        life, said = scan_chunks(live, live, chunk, life, xs)
        outputs.append(jnp.moveaxis(said, 0, 1))
    mixers = config.full(life.mixers)
    if whole < length:
        said, mixers, _ = _read(
            model,
            tokens[:, whole:],
            mixers,
            life.fast,
            aligned=config.nests,
            learn=learn,
            targets=None if targets is None else targets[:, whole:],
        )
        outputs.append(said)
    rest = tokens[:, complete:]
    held = Held(
        mixers=life.mixers if life.begun is None else life.begun,
        tokens=jnp.pad(rest, ((0, 0), (0, chunk - rest.shape[1]))),
        count=jnp.full((tokens.shape[0],), rest.shape[1], jnp.int32),
    )
    state = LMState(BlockState(mixers, life.fast), life.levels, held, position)
    return _there(jnp.concatenate(outputs, axis=1), at), state


def _live(model, life, xs):
    """Reads a base chunk of `[C, B]` tokens and labels, and moves what is due then; or
    only reads it, where `teaches`, `[C]`, is not None and says so."""
    tokens, labels, teaches = xs
    if teaches is not None:
        teaches, life = teaches[0], life._replace(begun=life.mixers)
    life, read = _learn(model, life, tokens.T, labels.T, teaches)
    return _move_due(model, life, teaches=teaches), jnp.moveaxis(read.said, 1, 0)


def _learn(model, life, tokens, labels, teaches=None):
    """Reads a base chunk and adds up what it says of the fast levels, if anything."""
    learned, read = _read_and_blame(
        model, tokens, labels, life.mixers, life.fast, life.position, teaches
    )
    chunk = tokens, labels, life.mixers, life.position
    levels = _accumulate(model, life.levels, learned, read, chunk)
    if teaches is not None:
        levels = _where_any(teaches, levels, life.levels)
    life = life._replace(
        mixers=model.config.bare(read.mixers),
        levels=levels,
        position=life.position + tokens.shape[1],
    )
    return life, read


def _move_due(model, life, rows=None, teaches=None):
    """Moves every level whose period ends where a row stands; of `rows`, or of all, if
    the chunk read last `teaches` anything."""
    config, ledger = model.config, life.ledger
    fast, levels = list(life.fast), list(life.levels)
    # A window is lived with all slower weights; theirs is not where one was limited.
    last = None if config.cms.inner == "exact" else 1
    for which, period in enumerate(config.fast_periods[: len(levels)]):
        if not model.learning.levels[config.fast[which]]:
            continue
        # With the next faster level, which may begin again.
        those = slice(max(0, which - 1), last and which + last)
        old = tuple(fast[those]), tuple(levels[those]), ledger
        moves = life.position // period - 1  # before this one
        if rows is None and period == config.base_chunk:
            due = teaches
        else:
            due = Clock(period=period).moves(life.position)
            due = due if rows is None else due & rows
            due = due if teaches is None else due & teaches
        if due is None:
            fast[those], levels[those], ledger = _move(model, which, moves, *old)
            continue

        def move(*old, which=which, moves=moves, due=due):
            return _move(model, which, moves, *old, rows=due if due.ndim else None)

        def stay(*old):
            return old

        fast[those], levels[those], ledger = jax.lax.cond(
            jnp.any(due), jax.checkpoint(move), stay, *old
        )
    return life._replace(fast=tuple(fast), levels=tuple(levels), ledger=ledger)


def _move(model, which, moves, fast, states, ledger, rows=None):
    """Moves one fast level of the rows that are chosen, by default of all. The next
    faster, which begins again where levels nest, comes before it in those that are
    given; slower ones may follow. `moves` is how many it has made."""
    config, place = model.config, min(which, 1)
    rate, start = model.inner_rates()[which], _starts(model)
    faster, weights, slower = list(fast[:place]), fast[place], fast[place + 1 :]
    faster_states, state = list(states[:place]), states[place]
    slower_states = states[place + 1 :]
    if config.cms.gradient == "none":
        rate, start, state, faster_states = jax.lax.stop_gradient(
            (rate, start, state, faster_states)
        )
    level = config.cms.whole[config.fast[which]]
    here, given = _cut_at(level, moves, weights, start[which]), state
    if level.truncate is not None:
        constant = jax.lax.stop_gradient(state.opt)
        first = moves % level.truncate == 0
        given = state._replace(opt=_where_any(first, constant, state.opt, axis=0))
    moved, after = cms.move(config.cms, level, rate, start[which], here, given, axis=1)
    may = rows
    if ledger is not None:
        before = ledger
        moved, may, ledger = _keep_account(ledger, which, rows, weights, moved)
        opt = _where(may, after.opt, state.opt, axis=0)
        shortened = (ledger.shortened > before.shortened)[:, which]
        limited = ~may | shortened
        after = cms.spoiled(after._replace(opt=opt), limited)
    if rows is not None:
        moved = _where(rows, moved, weights)
        after = _where_level(rows, after, state)
    for i, (old, own) in enumerate(zip(faster, faster_states, strict=True)):
        if own.owned is None or not model.learning.levels[config.fast[which - 1]]:
            continue
        taught = own
        if own.owned.window is not None:
            taught = _through_moves(model, which - 1, own, (weights, *slower))
        at, begun = cms.begin_again(
            config.cms,
            config.cms.whole[config.fast[which - 1]],
            level,
            rate,
            start[which - 1],
            taught,
            state.opened,
            axis=1,
        )
        if ledger is not None:
            at, long, _ = _shortened(ledger, own.owned.start, at)
            limited = limited | long
            owned = begun.owned
            assert owned is not None
            begun = begun._replace(owned=owned._replace(start=at))
        if may is not None:
            at, begun = _where(may, at, old), _where_level(may, begun, own)
        faster[i], faster_states[i] = at, begun
    if ledger is not None:
        limited = limited if rows is None else limited & rows
        slower_states = tuple(cms.spoiled(one, limited) for one in slower_states)
    return (
        (*faster, moved, *slower),
        (*faster_states, after, *slower_states),
        ledger,
    )


def _keep_account(ledger, which, due, weights, moved):
    """A move as the ledger allows it, the rows that may make it, and what it says then.

    A move that is short enough is left as it is, bit for bit.
    """
    allowed = due & (jnp.sum(ledger.moves, axis=1) < ledger.most)
    moved, long, way = _shortened(ledger, weights, moved)
    ledger = ledger._replace(
        moves=ledger.moves.at[:, which].add(allowed.astype(jnp.int32)),
        shortened=ledger.shortened.at[:, which].add((allowed & long).astype(jnp.int32)),
        way=ledger.way.at[:, which].add(jnp.where(allowed, way, 0.0)),
    )
    return _where(allowed, moved, weights), allowed, ledger


def _shortened(ledger, weights, moved):
    """A move no longer than may be, whether it would have been, and how long it is."""
    square = lambda a, b: jnp.sum(  # noqa: E731
        jnp.square(a - b), axis=[i for i in range(a.ndim) if i != 1]
    )
    length = jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(square, moved, weights))))
    long = length > ledger.longest
    share = jnp.where(long, ledger.longest / length, 1.0)

    def shorter(new, old):
        by = share.reshape(1, -1, *[1] * (new.ndim - 2))
        return old + by * (new - old)

    moved = _where(long, jax.tree.map(shorter, moved, weights), moved)
    return moved, long, share * length


def _settle(model, state, token, ledger=None, reading=None):
    """Moves the levels of rows whose held chunk the arrival of `token` completes."""
    complete = state.held.count == model.config.base_chunk
    if reading is not None:
        complete = complete & reading

    def settle():
        labels = jnp.concatenate([state.held.tokens[:, 1:], token[:, None]], axis=1)
        position = state.position - model.config.base_chunk
        learned, read = _read_and_blame(
            model,
            state.held.tokens,
            labels,
            state.held.mixers,
            state.blocks.fast,
            position,
        )
        chunk = state.held.tokens, labels, state.held.mixers, position
        gathered = _accumulate(model, state.levels, learned, read, chunk)
        levels = tuple(
            _where_level(complete, new, old)
            for new, old in zip(gathered, state.levels, strict=True)
        )
        mixers, fast, _ = state.blocks
        life = _Life(mixers, fast, levels, state.position, ledger)
        life = _move_due(model, life, complete)
        held = state.held._replace(count=jnp.where(complete, 0, state.held.count))
        blocks = state.blocks._replace(fast=life.fast)
        settled = state._replace(blocks=blocks, levels=life.levels, held=held)
        return settled, life.ledger

    return jax.lax.cond(jnp.any(complete), settle, lambda: (state, ledger))


def _step(model, state, token, *, learn):
    """One token a row, wherever each row stands."""
    config = model.config
    if state.levels and learn.cms:
        state, _ = _settle(model, state, token)
        held = _hold(config, state, token)
    else:
        held = _let_go(state.held)
    mixers, fast, _ = state.blocks
    logits, mixers, _ = _read(
        model, token[:, None], mixers, fast, aligned=False, learn=learn
    )
    state = LMState(BlockState(mixers, fast), state.levels, held, state.position + 1)
    return state, logits[:, 0]


class _Walk(NamedTuple):
    """What a loop over tokens carries.

    Attributes:
      at: how many were read.
      logits: after the last of them.
      state: leaves of the blocks lead with layers.
      made: what the loop is for.
      ledger: of rows that are served.
    """

    at: Int[Array, ""]
    logits: Array
    state: LMState
    made: PyTree
    ledger: Ledger | None = None


class _Said(NamedTuple):
    """Logits before a token and after it."""

    before: Array
    after: Array


def _read_anywhere(model, tokens, state, count, learn):
    """Blocks of tokens to the next boundary, and whole chunks from there."""
    rows, length = tokens.shape
    span = model.config.span
    size = span * max(1, _AT_ONCE // span)  # attention alone has boundaries anywhere
    steps = jnp.asarray(length if count is None else count, jnp.int32)
    steps = jnp.minimum(steps, length)
    by_time = tokens.T

    def chosen(logits, i):
        del logits
        return by_time[i]

    def put(made, i, token, said):
        del token
        return made.at[i].set(said.after)

    def chunk(walk):
        here = jax.lax.dynamic_slice_in_dim(tokens, walk.at, size, axis=1)
        logits, state = _read_aligned(
            model, here, None, walk.state, False, learn, settled=True
        )
        logits = jnp.moveaxis(logits, 1, 0)
        made = jax.lax.dynamic_update_slice_in_dim(walk.made, logits, walk.at, axis=0)
        return _Walk(walk.at + size, logits[-1], state, made)

    def block(walk):
        # As far as a place to read on in parallel, if enough is left for that.
        ahead = span - jnp.max(walk.state.position % span)
        enough = walk.at + ahead + size <= steps
        stop = jnp.where(enough, walk.at + ahead, steps)
        return _block(model, chosen, put, stop, walk, learn=learn, settled=True)

    def body(walk):
        walk = _settled(model, walk, by_time[walk.at], learn)
        if length < size:
            return block(walk)
        whole = jnp.all(walk.state.position % span == 0) & (walk.at + size <= steps)
        return jax.lax.cond(whole, chunk, block, walk)

    dtype = wide_type(jnp.dtype(DTYPES[model.config.dtype]))
    logits = jnp.zeros((rows, model.config.vocab), dtype)
    made = jnp.zeros((length, *logits.shape), dtype)
    walk = _Walk(jnp.zeros((), jnp.int32), logits, state, made)
    walk = jax.lax.while_loop(lambda walk: walk.at < steps, body, walk)
    return jnp.moveaxis(walk.made, 0, 1), walk.state


_AT_ONCE = 128  # tokens that are read in parallel, about


def _block(model, chosen, put, steps, walk, *, learn, settled=False, reading=None):
    """Tokens up to the end of the base chunk of the first row that reaches one.

    Of rows that do not read, whatever the loop makes of them is given up.
    """
    config = model.config
    if not settled:
        first = chosen(walk.logits, walk.at)
        walk = _settled(model, walk, first, learn, reading)
    state = walk.state
    left = steps - walk.at
    # Where rows stand: of those that do not read, somewhere no loop ends early.
    place = state.position
    if reading is not None:
        place = jnp.where(reading, place, 0)
    holds = state.levels and learn.cms
    held, count = _let_go(state.held), left
    if holds:
        slot = state.position % config.base_chunk
        count = jnp.minimum(
            left, config.base_chunk - jnp.max(place % config.base_chunk)
        )
        held = _begin_chunk(config, state, slot)
        follows = held.count == slot
        held = held._replace(count=held.count + jnp.where(follows, count, 0))
    mixers, fast, _ = state.blocks
    read, end = _layer_by_layer(model, fast, learn)

    def step(i, carry):
        before, mixers, tokens, made = carry
        token = chosen(before, walk.at + i)
        logits, mixers = read(token, mixers)
        if holds:
            tokens = _put(tokens, token, slot + i, follows)
        made = put(made, walk.at + i, token, _Said(before, logits))
        return logits, mixers, tokens, made

    carry = walk.logits, _apart(mixers, _count(mixers)), held and held.tokens, walk.made
    stride = config.stride
    if not stride:
        carry = jax.lax.fori_loop(0, count, step, carry)
    else:  # chunks of the memories end between loops over their tokens

        def chunk(at_and_carry):
            at, carry = at_and_carry
            here = place + at if reading is None else jnp.where(reading, place + at, 0)
            stop = jnp.minimum(count, at + stride - jnp.max(here % stride))
            carry = jax.lax.fori_loop(at, stop, step, carry)
            return stop, (carry[0], end(carry[1]), *carry[2:])

        start = jnp.zeros_like(count), carry
        _, carry = jax.lax.while_loop(lambda c: c[0] < count, chunk, start)
    logits, mixers, tokens, made = carry
    mixers = jax.tree.map(lambda *layers: jnp.stack(layers), *mixers)
    after = LMState(
        BlockState(mixers, fast),
        state.levels,
        held and held._replace(tokens=tokens),
        state.position + count,
    )
    if reading is not None:
        after = _where_state(reading, after, state)
        logits = _where(reading, logits, walk.logits, axis=0)
    return _Walk(walk.at + count, logits, after, made, walk.ledger)


def _layer_by_layer(model, fast, learn):
    """What `_read` does with one token a row, and what ends chunks, in a loop over
    tokens.

    A scan over layers would cut the weights of each out of the stack, and put its state
    back into one, at every token. Here all weights stand outside the loop.
    """
    graphdef, params = nnx.split(model.blocks, nnx.Param)
    layers = _apart((params, fast), _count(params))

    def read(token, mixers):
        x = model.embedded(token[:, None])
        after = []
        for (params, fast), mixer in zip(layers, mixers, strict=True):
            x, state = nnx.merge(graphdef, params)(
                x,
                BlockState(mixer, fast),
                aligned=False,
                learn=learn,
                ends=not model.config.stride,
            )
            after.append(state.mixer)
        return model.logits(x)[:, 0], tuple(after)

    def end_row(i, mixers):
        row = jax.tree.map(
            lambda *a: jnp.stack(
                [jax.lax.dynamic_slice_in_dim(one, i, 1) for one in a]
            ),
            *mixers,
        )
        row = jax.lax.map(
            lambda both: nnx.merge(graphdef, both[0]).end(both[1], learn), (params, row)
        )
        return tuple(
            jax.tree.map(
                lambda a, new, n=n: jax.lax.dynamic_update_slice_in_dim(
                    a, new[n], i, 0
                ),
                mixer,
                row,
            )
            for n, mixer in enumerate(mixers)
        )

    def end(mixers):
        # Row by row, in place: rows that stand elsewhere are not touched.
        over = nnx.merge(graphdef, layers[0][0]).over(mixers[0])
        rows = jnp.argsort(~over)
        return jax.lax.fori_loop(
            0, jnp.sum(over), lambda n, mixers: end_row(rows[n], mixers), mixers
        )

    return read, end


def _apart(layers, count):
    """One tree a layer, of one whose leaves lead with them."""
    return tuple(jax.tree.map(operator.itemgetter(i), layers) for i in range(count))


def _count(layers):
    return jax.tree.leaves(layers)[0].shape[0]


def _settled(model, walk, token, learn, reading=None):
    if not (walk.state.levels and learn.cms):
        return walk
    state, ledger = _settle(model, walk.state, token, walk.ledger, reading)
    return walk._replace(state=state, ledger=ledger)


def _begin_chunk(config, state, slot):
    """What is held once the rows that stand at a chunk's start begin to hold it."""
    begins = slot == 0

    def begin():
        now = config.bare(state.blocks.mixer)  # of the others something, left alone
        mixers = _where(begins, now, state.held.mixers)
        count = jnp.where(begins, 0, state.held.count)
        return state.held._replace(mixers=mixers, count=count)

    return jax.lax.cond(jnp.any(begins), begin, lambda: state.held)


def _put(tokens, token, slot, rows):
    """A token a row at its slot of what is held; of the rows that are chosen."""
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    here = (slots[None] == slot[:, None]) & rows[:, None]
    return jnp.where(here, token[:, None], tokens)


def _hold(config, state, token):
    """Adds a token to each row's held chunk, which begins where the row's does."""
    slot = state.position % config.base_chunk
    held = _begin_chunk(config, state, slot)
    follows = held.count == slot
    return held._replace(
        tokens=_put(held.tokens, token, slot, follows),
        count=held.count + follows.astype(jnp.int32),
    )


def _let_go(held):
    return held and held._replace(count=jnp.zeros_like(held.count))


def _where(rows, new, old, axis=1):
    """Chooses rows, which are an axis of every leaf."""

    def choose(a, b):
        shape = [-1 if i == axis else 1 for i in range(a.ndim)]
        return jnp.where(rows.reshape(shape), a, b)

    return jax.tree.map(choose, new, old)


def _where_any(rows, new, old, axis=1):
    """`_where`, of one answer for all rows too."""
    if rows.ndim:
        return _where(rows, new, old, axis)
    return jax.tree.map(lambda a, b: jnp.where(rows, a, b), new, old)


def _where_state(rows, new, old):
    """Chooses rows of a whole state, whose blocks lead with layers."""
    held = old.held
    if held is not None:
        held = Held(
            _where(rows, new.held.mixers, held.mixers),
            _where(rows, new.held.tokens, held.tokens, axis=0),
            _where(rows, new.held.count, held.count, axis=0),
        )
    levels = zip(new.levels, old.levels, strict=True)
    return LMState(
        _where(rows, new.blocks, old.blocks),
        tuple(_where_level(rows, *level) for level in levels),
        held,
        _where(rows, new.position, old.position, axis=0),
    )


def _where_level(rows, new, old):
    owned = old.owned
    if owned is not None:
        owned = cms.Owned(
            _where(rows, new.owned.start, owned.start),
            _where(rows, new.owned.learned, owned.learned),
            _where(rows, new.owned.opt, owned.opt, axis=0),
            _where_window(rows, new.owned.window, owned.window),
        )
    return cms.FastLevel(
        _where(rows, new.learned, old.learned),
        _where(rows, new.opt, old.opt, axis=0),
        _where(rows, new.opened, old.opened),
        owned,
    )


def _where_window(rows, new, old):
    if old is None:
        return None
    return cms.Window(
        *_where(rows, new[:2], old[:2]),
        *_where(rows, new[2:], old[2:], axis=0),
    )
