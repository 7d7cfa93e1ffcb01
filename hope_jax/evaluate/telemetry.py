"""What every level and memory of a model does while it reads a text."""

import collections
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from hope_jax.core import show
from hope_jax.core.clock import Clock
from hope_jax.memory.compose import build_architecture
from hope_jax.memory.consolidation import with_own_starts
from hope_jax.models import learning, lm
from hope_jax.models.config import ModelConfig
from hope_jax.models.learning import Learning
from hope_jax.stream import slots

PIECE = 64  # tokens of a piece, at least, of a model no level of which has a clock


class LevelLine(NamedTuple):
    """A CMS level along P pieces of a text, in each of L layers; or a start to which
    memories return (`memory.consolidation`), in those of its mixer.

    Attributes:
      name: `CMS 1`, ... of the chain; of a start as in `hope_jax.stream.slots.names`.
      period: tokens between two of its moves.
      moved: whether it moved where the piece ends; of a start in the piece.
      gradient: norm of what it had learned since its last move, that piece included:
        the mean of its gradients over a whole period, or their sum
        (`CMSConfig.reduction`), before its rule clips it. Of a start, how far the
        faster level is from where the piece found it.
      move: norm of how far the piece took it; 0 where it did not move. Of a level that
        begins again where a slower one moved, the way back too.
      distance: norm of its weights minus where it started.
    """

    name: str
    period: int
    moved: Bool[np.ndarray, " P"]
    gradient: Float[np.ndarray, "P L"]
    move: Float[np.ndarray, "P L"]
    distance: Float[np.ndarray, "P L"]

    @property
    def moves(self) -> Int[np.ndarray, " P"]:
        """How often it has moved by the end of each piece."""
        return np.cumsum(self.moved)


class MemoryLine(NamedTuple):
    """A memory of the mixers along P pieces of a text, in L layers with H heads each.

    Attributes:
      name: of `hope_jax.stream.slots.names`.
      layers: in which it is.
      norm, distance: of its weights, and of these minus where they started.
      eta: mean of its inner rates over the tokens of a piece, as its gates give them.
      alpha: mean share that a token lets it keep.
      half_life: tokens after which these shares, multiplied, are a half; inf if they
        are one.
      recall: mean cosine between what it answers after the piece to the last keys that
        were written, and the values that it was to store under them.
      before: the same asked of the memory as it was before the piece: what is above
        that was learned in it.
    """

    name: str
    layers: tuple[int, ...]
    norm: Float[np.ndarray, "P L H"]
    distance: Float[np.ndarray, "P L H"]
    eta: Float[np.ndarray, "P L H"]
    alpha: Float[np.ndarray, "P L H"]
    half_life: Float[np.ndarray, "P L H"]
    recall: Float[np.ndarray, "P L H"]
    before: Float[np.ndarray, "P L H"]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A text, piece by piece.

    Attributes:
      position: tokens read where each piece ends.
      loss: mean loss in nats of its next tokens.
      levels: the CMS levels that move while reading, fast first, and then starts.
      memories: of the mixers.
    """

    position: Int[np.ndarray, " P"]
    loss: Float[np.ndarray, " P"]
    levels: tuple[LevelLine, ...]
    memories: tuple[MemoryLine, ...]

    def columns(self) -> dict[str, np.ndarray]:
        """One number a piece, by name: norms over all layers and heads, means of the
        rest, of half-lives the mean of their logarithms."""
        made = {"position": self.position, "loss": self.loss}
        for line in self.levels:
            made[f"{line.name} moves"] = line.moves
            for what in ("gradient", "move", "distance"):
                made[f"{line.name} {what}"] = _norm(getattr(line, what))
        for line in self.memories:
            for what in ("norm", "distance"):
                made[f"{line.name} {what}"] = _norm(getattr(line, what))
            for what in ("eta", "alpha", "half_life", "recall", "before"):
                values = getattr(line, what).reshape(len(self.position), -1)
                if what == "half_life":
                    with np.errstate(divide="ignore"):  # of one that keeps nothing
                        made[f"{line.name} {what}"] = np.exp(np.log(values).mean(-1))
                else:
                    made[f"{line.name} {what}"] = values.mean(-1)
        return made

    def rows(self) -> list[dict[str, float]]:
        """The table of `columns`, a piece a line."""
        columns = self.columns()
        lines = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [dict(zip(columns, line, strict=True)) for line in lines]

    def _repr_html_(self) -> str:
        columns = self.columns()
        head = ["", *(f"{at:,} tokens" for at in self.position[[0, -1]])]
        lines = [
            [name, *(f"{value:.4g}" for value in values[[0, -1]])]
            for name, values in columns.items()
            if name != "position"
        ]
        return show.table(f"Timeline of {len(self.position)} pieces", head, lines)


def follow(
    config: ModelConfig,
    params: PyTree,
    tokens: Int[Array | np.ndarray, " T"],
    *,
    recent: int = 16,
    learn: bool | Learning = True,
) -> Timeline:
    """Reads a text and writes down what every level does.

    The text is read in base chunks, between which CMS levels may move; that of a model
    without such levels in pieces of at least `PIECE` tokens. What is left at its end is
    not read. Every piece goes through one compiled program, which any text shares.

    Args:
      config: of the model.
      params: its parameters.
      tokens: ids of one text.
      recent: pairs that are recalled, the last of each piece; at most all of it.
      learn: which parts learn.

    Raises:
      ValueError: fewer tokens than a piece and the one after it, or more than the model
        has room for, `recent` below 1, or tokens that the model has no row for.
    """
    piece = config.base_chunk or config.span * math.ceil(PIECE / config.span)
    if tokens.ndim != 1 or tokens.shape[0] <= piece:
        raise ValueError(
            f"tokens must be [T] with T above {piece}, a piece that {config.name!r} "
            f"reads at once and the token after it, got {tokens.shape}."
        )
    if recent < 1:
        raise ValueError(f"recent must be at least 1, got {recent}.")
    config.check_room("tokens", tokens.shape[0])
    text = np.asarray(lm.ids("tokens", tokens, config.vocab))
    switches = learning.resolve(config, learn)
    learns = switches.levels or ()
    consolidates = switches.consolidation and (switches.main or switches.projections)
    state = start = _begin(config, params)
    found = []
    for at in range(0, len(text) - piece, piece):
        here = text[None, at : at + piece + 1]
        seen, state = _piece(
            config, min(recent, piece), learn, params, here, state, start
        )
        found.append(seen)
    position = piece * np.arange(1, len(found) + 1)
    each = jax.tree.map(lambda *a: np.stack(a), *jax.device_get(found))
    levels = tuple(
        LevelLine(
            name=f"CMS {place + 1}",
            period=period,
            moved=_moved(Clock(period=period), position, learns[place]),
            **each.levels[i],
        )
        for i, (place, period) in enumerate(
            zip(config.fast, config.fast_periods, strict=True)
        )
    )
    count, names = len(config.pattern), slots.names(config)
    levels += tuple(
        LevelLine(
            name=names[at],
            period=part.period,
            moved=(position % part.period < piece) & consolidates,
            **line,
        )
        for (at, part), line in zip(_starts(config), each.starts, strict=True)
    )
    memories = tuple(
        MemoryLine(name=names[at], layers=tuple(range(i, config.layers, count)), **line)
        for (i, at), line in zip(_watched(config), each.memories, strict=True)
    )
    return Timeline(position, each.loss, levels, memories)


class Gates(NamedTuple):
    """What a memory's gates give each token of B rows, in L layers with H heads.

    Attributes:
      eta: inner rates, of several writes a token each.
      alpha: the share that a token lets it keep, of channels where it has those.
    """

    eta: Float[Array, "B L H T ..."]
    alpha: Float[Array, "B L H T ..."]


def gates(
    config: ModelConfig, params: PyTree, tokens: Int[Array | np.ndarray, "B T"]
) -> dict[str, Gates]:
    """What the gates of all memories give the tokens of rows that are read from their
    start.

    Args:
      config: of a model without CMS levels that move while it reads.
      params: its parameters.
      tokens: ids.

    Returns:
      By name, as `MemoryLine` has them.

    Raises:
      ValueError: the model has such levels; rows that are none, are longer than it has
        room for, or have tokens that it has no row for.
    """
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens must be [B, T], one at least, got {tokens.shape}.")
    config.check_room("tokens", tokens.shape[1])
    if config.fast:
        raise ValueError(
            f"{config.name!r} has CMS levels that move while it reads, between whose "
            "moves its gates change: use follow, which reads piece by piece."
        )
    rows = lm.ids("tokens", tokens, config.vocab)
    found = _gates(
        config, params, jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % config.span)))
    )
    names = slots.names(config)
    return {
        names[at]: Gates(*(a[:, :, :, : rows.shape[1]] for a in of))
        for (_, at), of in zip(_watched(config), found, strict=True)
    }


@functools.partial(jax.jit, static_argnames="config")
def _gates(config, params, rows):
    graphdef = slots.graph(config)
    state = lm.initial_state(graphdef, params, rows.shape[0])
    seen, _ = lm.watch(graphdef, params, rows, rows, state)
    return [Gates(tokens.eta, tokens.alpha) for tokens in seen.written]


def _watched(config):
    """Of every memory that can be watched: its mixer in the pattern, and its place in
    `slots.names`."""
    found, at = [], 0
    for i, mixer in enumerate(config.pattern):
        found += [(i, at + j) for j in range(len(mixer.memories))]
        at += len(mixer.learns) + len(mixer.starts)
    return found


def _of_mixers(config):
    """`state -> states of the mixers of the pattern`."""
    several = len(config.pattern) > 1
    return lambda s: s.blocks.mixer if several else (s.blocks.mixer,)


def _starts(config):
    """Of every start, its place in `slots.names` and its part."""
    found, at = [], 0
    for mixer in config.pattern:
        at += len(mixer.learns)
        found += [(at + j, part) for j, part in enumerate(mixer.starts)]
        at += len(mixer.starts)
    return found


class _Seen(NamedTuple):
    """Of one piece: a scalar, and the fields of each line."""

    loss: Array
    levels: list[dict[str, Array]]
    memories: list[dict[str, Array]]
    starts: list[dict[str, Array]]


@functools.partial(jax.jit, static_argnames="config")
def _begin(config, params):
    return lm.initial_state(slots.graph(config), params, 1)


@functools.partial(jax.jit, static_argnames=("config", "recent", "learn"))
def _piece(config, recent, learn, params, text, state, start):
    """One piece of a text `[1, C + 1]`, and the state after it."""
    seen, after = lm.watch(
        slots.graph(config), params, text[:, :-1], text[:, 1:], state, learn=learn
    )
    first, old, new = (slots.memories(config, params, s) for s in (start, state, after))
    count = len(new) - len(seen.levels)
    levels = []
    for i, level in enumerate(seen.levels):
        scale = 1.0
        if config.cms.reduction == "mean":
            scale = 1.0 / config.fast_periods[i]
        levels.append(
            {
                "gradient": scale * _of_layers(level.learned.gradient, config),
                "move": _of_layers(_minus(new[count + i], old[count + i]), config),
                "distance": _of_layers(
                    _minus(new[count + i], first[count + i]), config
                ),
            }
        )
    kinds = [memory for mixer in config.pattern for memory in mixer.memories]
    memories = []
    places = [place for _, place in _watched(config)]
    first, old, new = ([of[place] for place in places] for of in (first, old, new))
    for kind, tokens, at, before, weights in zip(
        kinds, seen.written, first, old, new, strict=True
    ):
        kept = jnp.log2(tokens.alpha)
        ask = functools.partial(_recall, kind, recent, tokens)
        memories.append(
            {
                "norm": _of_heads(weights),
                "distance": _of_heads(_minus(weights, at)),
                "eta": _mean(tokens.eta),
                "alpha": _mean(tokens.alpha),
                "half_life": -1.0 / _mean(kept),
                "recall": ask(weights),
                "before": ask(before),
            }
        )
    starts = []
    for mixers in zip(*map(_of_mixers(config), (start, state, after)), strict=True):
        nodes = list(zip(*map(with_own_starts, mixers), strict=True))
        for i in range(len(nodes[0][0].starts) if nodes else 0):
            norms = collections.defaultdict(list)
            for at, before, now in nodes:
                faster = (now.weights, *before.starts)[i]
                a, b, c = (memory.starts[i] for memory in (at, before, now))
                norms["gradient"].append(_minus(faster, b))
                norms["move"].append(_minus(c, b))
                norms["distance"].append(_minus(c, a))
            starts.append({name: _norms(of) for name, of in norms.items()})
    return _Seen(jnp.mean(seen.losses), levels, memories, starts), after


def _recall(kind, recent, tokens, weights):
    """Cosines of what memories answer to the last keys with their values."""

    def one(weights, k, v):  # of one layer and head
        k, v = (a[-recent:].reshape(-1, a.shape[-1]) for a in (k, v))
        said = build_architecture(kind, v.shape[-1]).apply(weights, k)
        length = jnp.linalg.norm(said, axis=-1) * jnp.linalg.norm(v, axis=-1)
        return jnp.mean(jnp.sum(said * v, axis=-1) / jnp.maximum(length, 1e-12))

    with jax.default_matmul_precision("float32"):
        cosine = jax.vmap(jax.vmap(jax.vmap(one)))(weights, tokens.k, tokens.v)
    return cosine[0]


def _mean(a):
    """Of `[1, L, H, T, ...]` over tokens and what is of each."""
    return jnp.mean(a[0], axis=tuple(range(2, a.ndim - 1)))


def _minus(a, b):
    return jax.tree.map(jnp.subtract, a, b)


def _of_heads(weights):
    """Norms of a memory, leaves `[1, L, H, ...]`."""
    square = lambda w: jnp.sum(w[0] * w[0], axis=tuple(range(2, w.ndim - 1)))  # noqa: E731
    return jnp.sqrt(sum(map(square, jax.tree.leaves(weights))))


def _of_layers(weights, config):
    """Norms of a level in each layer, leaves `[1, L, ...]`; of a pattern, a tuple of
    its mixers' blocks, whose layers take turns."""

    if len(config.pattern) == 1:
        return _norms(weights)
    return jnp.stack([_norms(part) for part in weights], axis=1).reshape(-1)


def _norms(weights):
    """Of leaves `[1, L, ...]`."""
    square = lambda w: jnp.sum(  # noqa: E731
        jnp.square(w[0].astype(jnp.float32)), axis=tuple(range(1, w.ndim - 1))
    )
    return jnp.sqrt(sum(map(square, jax.tree.leaves(weights))))


def _moved(clock, position, learns):
    return np.asarray(clock.moves(position)) & learns


def _norm(values):
    """Of all numbers of a piece together."""
    return np.sqrt(np.sum(np.square(values), axis=tuple(range(1, values.ndim))))
