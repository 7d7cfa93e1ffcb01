"""One door to every implementation of a memory over a whole sequence."""

from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.core.level import LevelState, unroll
from hope_jax.kernels.chunk import piece
from hope_jax.memory.architecture import Weights
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_architecture,
    key_width,
    level_context,
    memory_level,
)
from hope_jax.memory.state import MemoryState, commit, commit_if, next_recent

Implementation = Literal["auto", "reference", "chunk"]


def memory_scan(
    config: MemoryConfig,
    state: MemoryState,
    tokens: Tokens,
    impl: Implementation = "auto",
    remat: bool = True,
    truncate: int | None = None,
    start: Weights | None = None,
    count: Int[Array, ""] | None = None,
) -> tuple[MemoryState, Float[Array, "T V"]]:
    """Lets a memory live through T tokens that begin at a chunk boundary.

    Args:
      config: the memory.
      state: where it stands, committed.
      tokens: T tokens of one stream and one head; callers `vmap`. T need not be a
        multiple of the chunk: the last, unfinished chunk is left uncommitted.
      impl: `reference` is `unroll`, token by token; `chunk` is parallel inside chunks;
        `auto` is `chunk`.
      remat: recompute a chunk's inside in the backward pass rather than keep it.
      truncate: tokens, a multiple of the chunk, after which the level above
        differentiates no further back: every so many, the state becomes a constant.
        What it started from then learns from the first of these stretches only. None
        goes back to the start.
      start: the weights of `begin_memory`, for a memory that `returns` to them.
      count: how many of the tokens there are, at least one; what follows is padding,
        which teaches nothing and whose reads mean nothing. None is all. Needs the
        `chunk` form, without `truncate`.

    Returns:
      The state after the last token, and a read per token, in the type of the weights.

    Raises:
      ValueError: arguments out of range, tokens that are of several lengths or none, of
        other ranks or widths, or `alpha` outside [0, 1]; a state of another memory, of
        several, or in the middle of a chunk, whose anchor is not where it stands.
        Values that are traced cannot be looked at.
    """
    if impl not in ("auto", "reference", "chunk"):
        raise ValueError(f"impl must be auto, reference or chunk, got {impl!r}.")
    if truncate is not None and (truncate < 1 or truncate % config.chunk):
        raise ValueError(
            f"truncate ({truncate}) must be a multiple of the chunk ({config.chunk})."
        )

    if count is not None and (impl == "reference" or truncate is not None):
        raise ValueError(
            f"count needs impl='auto' or 'chunk' and truncate=None, got impl={impl!r} "
            f"and truncate={truncate}."
        )

    tokens = _accepted(config, state, tokens)
    _check_widths(config, state, tokens)
    length = tokens.k.shape[0]
    if not isinstance(count, Tracer | None) and not 1 <= int(count) <= length:
        raise ValueError(f"count must be of the {length} tokens, got {count}.")
    chunk = _by_chunk(config, start, count)

    def read(state, tokens):
        if impl == "reference":
            return _reference(config, state, tokens, start)
        return scan_padded(chunk, config.chunk, state, tokens, remat, count)

    if truncate is None or truncate >= tokens.k.shape[0]:
        return read(state, tokens)

    first = jax.tree.map(lambda x: x[:truncate], tokens)
    later = jax.tree.map(lambda x: x[truncate:], tokens)
    stretch = lambda s, t: read(jax.lax.stop_gradient(s), t)  # noqa: E731
    state, y = read(state, first)
    state, more = scan_chunks(stretch, stretch, truncate, state, later)
    return state, jnp.concatenate([y, more])


def memory_end(
    config: MemoryConfig,
    state: MemoryState,
    tokens: Tokens,
    remat: bool = True,
    start: Weights | None = None,
) -> MemoryState:
    """The state in which `memory_scan` ends, of the same arguments; nothing is read."""
    chunk = _by_chunk(config, start, None, reads=False)
    tokens = _accepted(config, state, tokens)
    return scan_padded(chunk, config.chunk, state, tokens, remat)[0]


def _by_chunk(config, start, count, reads=True):
    """A whole chunk, or what remains: `(state, tokens, here) -> (state, reads)`."""

    def chunk(state, tokens, here):
        if tokens.k.shape[0] < config.chunk:
            return piece(config, state, tokens, reads, start, here)
        # At a chunk's start anchor and weights are one: said so, products are shared.
        # After the last token there is, none starts.
        state = commit(state) if count is None else state
        after, y = piece(config, state, tokens, reads, start, here)
        if here is None:
            return commit(after), y
        return commit_if(here == config.chunk, state, after), y

    return chunk


def _accepted(config: MemoryConfig, state: MemoryState, tokens: Tokens) -> Tokens:
    """The tokens in the type of the weights, once they can be read from `state`."""
    if not isinstance(state, MemoryState):
        raise ValueError(
            f"state must be a MemoryState, of begin_memory or an earlier call, got "
            f"{type(state).__name__}."
        )
    lengths = {
        name: jnp.shape(leaf)[:1]
        for name, leaf in tokens._asdict().items()
        if leaf is not None
    }
    if set(lengths.values()) != {jnp.shape(tokens.k)[:1]} or lengths["k"] in [(), (0,)]:
        said = ", ".join(f"{name} {shape}" for name, shape in lengths.items())
        raise ValueError(
            f"tokens must lead with one time T >= 1, a stream and a head; got {said}."
        )
    if jnp.ndim(tokens.eta) < 1 or jnp.ndim(tokens.k) < 2:
        raise ValueError(
            f"tokens.k must be [T, K] and eta [T], got {jnp.shape(tokens.k)} and "
            f"{jnp.shape(tokens.eta)}."
        )
    _check_ranks(config, tokens)
    if not isinstance(tokens.alpha, Tracer):
        alpha = np.asarray(tokens.alpha)
        wrong = alpha[~((alpha >= 0) & (alpha <= 1))]
        if wrong.size:
            raise ValueError(
                "tokens.alpha must be retained fractions in [0, 1], got "
                f"{wrong.flat[0]}."
            )
    anchor = {} if state.anchor is None else state.anchor
    if any(
        np.any(np.asarray(kept) != np.asarray(state.weights[name]))
        for name, kept in anchor.items()
        if not isinstance(kept, Tracer) and not isinstance(state.weights[name], Tracer)
    ):
        raise ValueError(
            "state is in the middle of a chunk: its anchor is not where it stands. "
            "Read the rest of the chunk with hope_jax.kernels.chunk.piece, or let "
            "commit(state) end it here."
        )
    (dtype,) = {leaf.dtype for leaf in state.weights.values()}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tokens)


def _check_ranks(config, tokens):
    """Refuses leaves that have not the axes of `Tokens`."""
    channels = config.chosen.retention.channels
    vectors = {"k": "K", "v": "V", "q": "K", "weights": "W", "erase_key": "K"}
    for name, leaf in tokens._asdict().items():
        asked = ["T"] if name not in vectors else [f"T, {vectors[name]}"]
        if name == "erase_rate" or (name == "alpha" and channels):
            asked.append("T, K")
        if config.steps > 1 and name != "alpha":  # which acts in the first step alone
            asked += [axes.replace("T", "T, S", 1) for axes in asked]
        ranks = {axes.count(",") + 1 for axes in asked}
        if leaf is not None and jnp.ndim(leaf) not in ranks:
            forms = " or ".join(f"[{axes}]" for axes in asked)
            raise ValueError(
                f"tokens.{name} must be {forms} of one stream and one head, got "
                f"{jnp.shape(leaf)}: map memory_scan over streams and heads."
            )


def _check_widths(config, state, tokens):
    """Refuses vectors of widths that the weights are not for, and weights of another
    memory or of several."""
    width = jnp.shape(tokens.v)[-1]
    function = build_architecture(config, width)
    expected = jax.eval_shape(function.init, jax.random.key(0))
    shapes = [{n: w.shape for n, w in of.items()} for of in (expected, state.weights)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"state must be of one memory of this config, whose weights for values of "
            f"width {width} are {shapes[0]}, got {shapes[1]}."
        )
    wide = key_width(config, width)
    for name in ("k", "q", "erase_key"):
        leaf = getattr(tokens, name)
        if leaf is not None and jnp.shape(leaf)[-1] != wide:
            raise ValueError(
                f"tokens.{name} must be {wide} wide, for values of width {width}, got "
                f"{jnp.shape(leaf)}."
            )


Carry = TypeVar("Carry")


def scan_chunks(
    whole, rest, chunk: int, carry: Carry, xs: PyTree, remat: bool = False
) -> tuple[Carry, Any]:
    """Scans `whole` over the full chunks of `xs` (leaves lead with time), then `rest`
    over what remains, and joins the outputs in time.

    With `remat` the backward pass of the scan recomputes each chunk's inside.
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    count = length // chunk
    outputs = []
    if count:
        full = jax.tree.map(
            lambda x: x[: count * chunk].reshape(count, chunk, *x.shape[1:]), xs
        )
        if count == 1:
            carry, y = whole(carry, jax.tree.map(lambda x: x[0], full))
        else:
            body = jax.checkpoint(whole) if remat else whole
            carry, y = jax.lax.scan(body, carry, full)
            y = jax.tree.map(lambda a: a.reshape(count * chunk, *a.shape[2:]), y)
        outputs.append(y)
    if count * chunk < length:
        carry, y = rest(carry, jax.tree.map(lambda x: x[count * chunk :], xs))
        outputs.append(y)
    if len(outputs) == 1:
        return carry, outputs[0]
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *outputs)


def scan_padded(
    read,
    chunk: int,
    carry: Carry,
    xs: PyTree,
    remat: bool = False,
    count: Int[Array, ""] | None = None,
) -> tuple[Carry, Any]:
    """`scan_chunks` with one body, `read(carry, xs, count)`, for what remains as well.

    Where chunks come before it, it is a whole chunk too, whose last tokens are padding:
    of each chunk `count` then says how many there are. Else it is None, and a chunk is
    over where its length is `chunk`. With a `count` of its own it reads so many of
    `xs`; each chunk is then told, and one that is all padding has none.
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    chunks, rest = divmod(length, chunk)
    if count is None and not (chunks and rest):
        whole = lambda carry, xs: read(carry, xs, None)  # noqa: E731
        return scan_chunks(whole, whole, chunk, carry, xs, remat=remat)
    if not chunks:
        return read(carry, xs, count)

    chunks = -(-length // chunk)
    begins = chunk * np.arange(chunks, dtype=np.int32)
    counts = jnp.clip((length if count is None else count) - begins, 0, chunk)

    def cut(a):  # what it ends with is repeated: as finite as a token, and so its slope
        if rest:
            a = jnp.concatenate([a, jnp.repeat(a[-1:], chunk - rest, axis=0)])
        return a.reshape(chunks, chunk, *a.shape[1:])

    cuts = jax.tree.map(cut, xs), counts
    if chunks == 1:
        return read(carry, *jax.tree.map(lambda a: a[0], cuts))
    body = jax.checkpoint(read) if remat else read
    carry, y = jax.lax.scan(lambda carry, xs: body(carry, *xs), carry, cuts)
    join = lambda a: a.reshape(chunks * chunk, *a.shape[2:])[:length]  # noqa: E731
    return carry, jax.tree.map(join, y)


def _reference(config, state, tokens, start):
    width = tokens.v.shape[-1]
    level = memory_level(config, width)
    start = state.starts[0] if state.starts else start
    opt: PyTree = state.rule
    if opt is None:
        opt = level.flow.init(start if config.returns else state.weights)
    if state.momentum is not None:
        opt = opt._replace(momentum=state.momentum)
    before = LevelState(
        state.weights,
        opt,
        state.anchor if level.clock.anchor > 1 else None,
        None,
        jnp.zeros((), jnp.int32),
    )
    after, y = unroll(level, before, level_context(config, tokens, state.recent))
    anchor = state.anchor
    if anchor is not None:
        anchor = after.anchor if level.clock.anchor > 1 else after.params
    recent = state.recent
    if recent is not None:
        recent = next_recent(config, recent, tokens)
    left = state.left
    if left is not None:
        whole = tokens.eta.shape[0] // config.chunk * config.chunk
        left = jnp.prod(1.0 - tokens.eta[whole:])
    after = MemoryState(
        weights=after.params,
        momentum=None if state.momentum is None else after.opt.momentum,
        anchor=anchor,
        rule=None if state.rule is None else after.opt,
        recent=recent,
        left=left,
        starts=state.starts,
    )
    return after, y[config.steps - 1 :: config.steps]
