"""Continuum memory: a chain of MLPs, each moved by the task loss on its own clock.

Section 7 of arXiv:2512.24695, by default its sequential variant (equations 70, 71 and
73). Every row has its own fast copy of a level, which starts at the learned parameters
and descends the next-token loss of the text read so far: it moves whenever as many
tokens as its period have been read, however long the text is. In training a level that
is slower than the rows would never move inside one. It then holds no fast copy and is
an ordinary parameter, which the training loop's optimizer moves on a slower clock.
"""

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from hope_jax import optim
from hope_jax.core import level as level_lib
from hope_jax.core import show
from hope_jax.core.config import at_least, one_of, refuse_unread
from hope_jax.core.level import Collected
from hope_jax.optim import capture, slopes
from hope_jax.optim.leaves import wide
from hope_jax.optim.rules import RULES, saved


def _check_nested(config: "CMSConfig") -> None:
    """Refuses what the variant is not about."""
    if config.order == "independent" or len(config.fast) < 2:
        raise ValueError(
            "variant='nested' is about a chain of at least two levels that move while "
            f"reading, got order={config.order!r} and {len(config.fast)} such levels: "
            "use variant='sequential'."
        )
    for i in config.fast:
        if _rule(config.whole[i]).inputs is not None:
            raise ValueError(
                "variant='nested' moves starts by gradients alone, and rule "
                f"{_rule(config.whole[i]).kind!r} of levels.{i} takes more than these: "
                "use another, or variant='sequential'."
            )
    periods = [config.levels[i].period for i in config.fast]
    nest = all(slow % fast == 0 for fast, slow in itertools.pairwise(periods))
    if config.inner == "exact" and not nest:
        raise ValueError(
            "inner='exact' is for levels that move while reading each period of which "
            f"is a multiple of the next faster one's, got {periods}: use "
            "inner='first_order'."
        )


def _check_mixing(config: "CMSConfig") -> None:
    """Refuses what is not about several levels side by side."""
    refuse_unread(config, "mixing", "order", config.order, ("independent",))
    refuse_unread(config, "top_k", "mixing", config.mixing, ("routed",))
    count = len(config.levels)
    if config.mixing != "mean" and count < 2:
        raise ValueError(
            f"mixing={config.mixing!r} is about what several levels say, and `levels` "
            "has one: use mixing='mean'."
        )
    if config.mixing == "routed" and not 2 <= config.top_k < count:
        raise ValueError(
            f"top_k must be at least 2 and below the number of levels ({count}), got "
            f"{config.top_k}: one alone has a weight of 1 whatever the router says, "
            "which then learns nothing; for all of them use mixing='gated'."
        )


def _check_truncated(config: "CMSConfig") -> None:
    """Refuses a cut of what no gradient goes through."""
    for i, level in enumerate(config.levels):
        if level.truncate is None:
            continue
        if config.gradient != "exact":
            raise ValueError(
                f"truncate={level.truncate} of levels.{i} is about gradients that go "
                f"through moves, and gradient={config.gradient!r} goes through none: "
                "use gradient='exact', or leave truncate None."
            )
        if config.variant == "nested" or i not in config.fast:
            raise ValueError(
                f"truncate={level.truncate} of levels.{i} is about the moves of a "
                "level that goes on from each, got variant="
                f"{config.variant!r}, period {level.period} and rate {level.rate}: "
                "leave it None."
            )


_ACCUMULATORS = ("float32", "bfloat16")
Activation = Literal["silu", "gelu", "gelu_tanh"]


def _check_shared(config: "CMSLevel | CMSConfig") -> None:
    object.__setattr__(config, "rule", RULES.of(config.rule, "rule"))
    if config.hidden is not None and config.hidden < 1:
        raise ValueError(f"hidden must be at least 1, got {config.hidden}.")
    if config.clip is not None and config.clip <= 0:
        raise ValueError(f"clip must be positive, got {config.clip}.")
    if config.pull is not None and not 0 <= config.pull < 1:
        raise ValueError(
            f"pull must be at least 0 and below 1, where a move forgets all that came "
            f"before it; got {config.pull}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMSLevel:
    """One MLP of the chain. What is None is the chain's, in `CMSConfig`.

    Attributes:
      period: tokens of one stream between two moves. `math.inf` has no clock of its
        own: the MLP of an ordinary Transformer block, a parameter like any other.
      rate: inner rate at the start; it is learned, between 0 and
        `CMSConfig.rate_bound`. A level of rate 0 never moves while reading.
      hidden: hidden width of the MLP.
      rule: inner optimizer, one of `hope_jax.optim.RULES`; in Python its name will do.
      clip: bound on the norm of one row's inner gradient, over the level's whole stack.
      pull: how much of the way back to its start a move also takes the level.
      accumulator: the type that its gradients are kept in until it moves.
      truncate: with `gradient="exact"`, through how many of the level's own moves the
        outer gradient goes back from where its weights are read: the last 1 to
        `truncate` of them, for the way is cut every `truncate` moves. Of a stretch of
        so many the first move sees weights and a state of its rule that are constants,
        but that the weights have the slope of where they started, and what is learned
        for it is learned there too. None goes back to the start. It bounds what
        gradients are products of, not what is kept to make them.
    """

    period: float
    rate: float = 0.1
    hidden: int | None = None
    rule: Annotated[optim.Rule, RULES] | None = None
    clip: float | None = None
    pull: float | None = None
    accumulator: Literal["float32", "bfloat16"] | None = None
    truncate: int | None = None

    def __post_init__(self):
        at_least(self, truncate=1)
        if self.period != math.inf and (
            self.period < 1 or not float(self.period).is_integer()
        ):
            raise ValueError(
                "period must be a whole number of tokens, at least 1, or math.inf, got "
                f"{self.period}."
            )
        if self.rate < 0:
            raise ValueError(f"rate must be at least 0, got {self.rate}.")
        if self.accumulator is not None:
            one_of(self, accumulator=_ACCUMULATORS)
        _check_shared(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMSConfig:
    """The chain and how its levels learn while they read.

    Attributes:
      levels: from fast to slow, the order in which the chain applies them.
      hidden: hidden width of each MLP.
      activation: of the gate: `silu` is SwiGLU, `gelu` (exact) and `gelu_tanh` GeGLU.
      bias: whether the MLPs' projections have one.
      order: `fast_to_slow` (the paper's figures), `slow_to_fast` (equation 70 as
        printed), or `independent`: each level reads what the mixer leaves, and what
        they say is added up (equation 74).
      mixing: by which weights, where levels are independent: their `mean`; `learned`
        ones, 1 / levels at the start, each by itself and of any sign; `gated`, a
        softmax over the levels for each token, of a projection of what they read that
        starts at zero, so that all begin at the mean; or `routed`: of these gates the
        `top_k` largest of each token, made to add up to 1 again. Of gates that are
        equal, as all are at the start, those of faster levels are taken. Every level
        is computed for every token, and one that is not taken learns nothing from it.
      top_k: how many levels are taken where they are routed.
      variant: `sequential` (equation 73): levels go on as long as the text does.
        `nested` (equation 72): whenever a level moves, the next faster one that moves
        begins again, at a start that the slower one owns: a copy a row of the learned
        one, which moves with the slower level, by its rule, on the gradients of all
        that the faster one read meanwhile.
      inner: where levels nest, which gradients: `first_order` takes them where the
        faster level stood; `exact`, equation 72, in where it began, through its moves
        and those of all that is faster still. That is for levels each period of which
        is a multiple of the next faster one's. A row then keeps, for each but the
        slowest, the tokens since the slower level's last move, the mixers' states and
        the faster levels' starts there, and lives through them again at the next; where
        not all of them were learned from as they came (learning switched off or
        limited, a level reset), the move is first order. Each level more lives the
        windows of all below it once more. That is for `gradient` other than `exact`
        where there are more than two: gradients of gradients of gradients took more
        than eight minutes to compile for three levels of a tiny model.
      rule: inner optimizer, one of `hope_jax.optim.RULES`; `sgd` is equation 71.
      reduction: `mean` of the gradients over a level's period, so that its step does
        not grow with its period, or `sum` (equation 71 to the letter).
      gradient: what the outer level differentiates: `exact`, through every inner move;
        `first_order`, moves are constants; `none`, the initial state learns nothing.
      clip: bound on the norm of one row's inner gradient, over a level's whole stack.
      pull: how much of the way back to its start a move also takes a level,
        w <- w - step - pull (w - start). Its weights then stay within the longest step
        over `pull` of where they start, however long the text. 0 is equation 71.
      accumulator: the type in which each row keeps the sums of a level's gradients
        until its next move. `bfloat16` halves them and has 8 bits: what a base chunk
        adds to a sum 256 times as large is lost.
      rate_bound: upper bound of the learned inner rates.
      rates: who says how long a move is: `learned`, a rate a level alone; `generated`,
        what the mixer of each block has read as well: its output at every token gives
        each level of the block a factor between 0 and 2, 1 at the start, and a move is
        as long as the mean over its tokens says. A self-modifying layer so rules over
        how its block's MLPs are modified. The factor has a gradient with every
        `gradient` but `none`.
    """

    levels: tuple[CMSLevel, ...] = (CMSLevel(period=math.inf),)
    hidden: int = 256
    activation: Activation = "silu"
    bias: bool = False
    order: Literal["fast_to_slow", "slow_to_fast", "independent"] = "fast_to_slow"
    mixing: Literal["mean", "learned", "gated", "routed"] = "mean"
    top_k: int = 2
    variant: Literal["sequential", "nested"] = "sequential"
    inner: Literal["first_order", "exact"] = "first_order"
    rule: Annotated[optim.Rule, RULES] = RULES.get("sgd")
    reduction: Literal["mean", "sum"] = "mean"
    gradient: Literal["exact", "first_order", "none"] = "first_order"
    clip: float = 1.0
    pull: float = 0.01
    accumulator: Literal["float32", "bfloat16"] = "float32"
    rate_bound: float = 1.0
    rates: Literal["learned", "generated"] = "learned"

    _repr_html_ = show.config

    def __post_init__(self):
        if not self.levels:
            raise ValueError("levels must name at least one MLP, got none.")
        for a, b in itertools.pairwise(self.levels):
            if a.period > b.period:
                raise ValueError(
                    "levels must be listed from fast to slow, got periods "
                    f"{a.period} before {b.period}; `order` turns the chain round."
                )
        one_of(
            self,
            activation=typing.get_args(Activation),
            order=("fast_to_slow", "slow_to_fast", "independent"),
            mixing=("mean", "learned", "gated", "routed"),
            variant=("sequential", "nested"),
            inner=("first_order", "exact"),
            reduction=("mean", "sum"),
            gradient=("exact", "first_order", "none"),
            accumulator=_ACCUMULATORS,
            rates=("learned", "generated"),
        )
        if self.rate_bound <= 0:
            raise ValueError(f"rate_bound must be positive, got {self.rate_bound}.")
        if self.rates == "generated" and not self.fast:
            raise ValueError(
                "rates='generated' is about levels that move while reading, and none "
                "of `levels` does: give one a finite period and a rate, or use "
                "rates='learned'."
            )
        for level in self.levels:
            if level.rate >= self.rate_bound:
                raise ValueError(
                    f"rate ({level.rate}) must be below rate_bound ({self.rate_bound})."
                )
        _check_shared(self)
        _check_mixing(self)
        _check_truncated(self)
        refuse_unread(self, "inner", "variant", self.variant, ("nested",))
        if self.variant == "nested":
            _check_nested(self)

    @classmethod
    def migrated(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Saved when rules were names, with the options of all of them beside."""
        if "options" not in data:
            return data
        kind, options = data.get("rule", "sgd"), data["options"]

        def level(old):
            new = {key: value for key, value in old.items() if key != "options"}
            if old.get("rule") is not None or old.get("options") is not None:
                own = old.get("options")
                own = options if own is None else own
                new["rule"] = saved(old.get("rule") or kind, own)
            return new

        now = {key: value for key, value in data.items() if key != "options"}
        now["rule"] = saved(kind, options)
        if "levels" in data:
            now["levels"] = [level(old) for old in data["levels"]]
        return now

    @functools.cached_property
    def whole(self) -> tuple[CMSLevel, ...]:
        """The levels with what is the chain's filled in."""

        def filled(level):
            return {
                name: getattr(self if getattr(level, name) is None else level, name)
                for name in ("hidden", "rule", "clip", "pull", "accumulator")
            }

        return tuple(dataclasses.replace(v, **filled(v)) for v in self.levels)

    @property
    def fast(self) -> tuple[int, ...]:
        """Indices of the levels that move while reading, fast first."""
        moving = (v.rate > 0 and v.period != math.inf for v in self.levels)
        return tuple(i for i, moves in enumerate(moving) if moves)


class Window(NamedTuple):
    """What came since the owner of a start last moved, for `CMSConfig.inner` exact.

    Attributes:
      mixers: the mixers' states then, bare; leaves as of the blocks.
      starts: of all levels that are faster than the one that begins again, where they
        began then; rows as in their weights.
      opts: the states of the rules that move these starts; rows lead.
      tokens, labels: what was read, and what followed each, `[B, W]`, W the owner's
        period; what is not there yet is left from before.
      chunks: `[B]`, how many base chunks of it were learned from, all as they came; far
        below zero where one was not.
    """

    mixers: PyTree
    starts: tuple[PyTree, ...]
    opts: tuple[PyTree, ...]
    tokens: Int[Array, "B W"]
    labels: Int[Array, "B W"]
    chunks: Int[Array, " B"]


SPOILED = -(2**30)  # chunks of a window that is not as it was read


class Owned(NamedTuple):
    """The start of a level that the next slower one owns (`CMSConfig.variant`).

    Attributes:
      start: where the level begins again; rows as in its weights.
      learned: the sums over its tokens since the slower level's last move.
      opt: the state of the slower level's rule.
      window: these tokens, where gradients go through the level's moves; else None.
    """

    start: PyTree
    learned: PyTree
    opt: PyTree
    window: Window | None = None


class FastLevel(NamedTuple):
    """Where a fast level of every row stands, apart from its weights.

    Attributes:
      learned: the sums over its own tokens since its last move; rows on the axis on
        which the weights have them.
      opt: the state of its rule, whose leaves always lead with rows.
      opened: the sums of `generated` factors since its last move, of a row in each
        layer; a prefix of the weights without their own axes. None without them.
      owned: its start; None where no level owns it.
    """

    learned: Collected
    opt: PyTree
    opened: PyTree | None = None
    owned: Owned | None = None


def noted(level: CMSLevel, weights: PyTree) -> PyTree:
    """`weights` of a level, as those whose gradients are what its rule asks for."""
    match _rule(level).inputs:
        case "grams":
            return capture.capture(weights)
        case "slopes":
            return capture.capture(weights, objective=_objective(level), tokens=1)
    return weights


def learned(level: CMSLevel, gradient: PyTree) -> Collected:
    """What there is in the gradient of `noted` weights."""
    match _rule(level).inputs:
        case "grams":
            return Collected(capture.plain(gradient), capture.grams(gradient))
        case "slopes":
            return Collected(capture.slopes(gradient), None)
    return Collected(gradient, None)


def _rule(level: CMSLevel) -> optim.Rule:
    """The rule of a level of `CMSConfig.whole`."""
    assert level.rule is not None
    return level.rule


def _objective(level: CMSLevel):
    rule: Any = _rule(level)  # one of slopes, which has a memory
    return _objective_of(rule.memory)


_objective_of = functools.cache(slopes.objective)  # programs are kept by the function


def flow(level: CMSLevel, rate: Array | float) -> optax.GradientTransformation:
    """The rule of a level, for one row."""
    assert level.clip is not None
    return optax.chain(
        _clip(level.clip),
        optim.inner(_rule(level), rate),
    )


def spoiled(state: FastLevel, rows: Bool[Array, " B"]) -> FastLevel:
    """The state of a level whose window is not as it was read, in the rows that are
    chosen: its start moves in the first order next time. Others are left alone."""
    owned = state.owned
    if owned is None or owned.window is None:
        return state
    chunks = jnp.where(rows, SPOILED, owned.window.chunks)
    window = owned.window._replace(chunks=chunks)
    return state._replace(owned=owned._replace(window=window))


def _clip(longest: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, to the bit, that has a derivative at zero too: a
    level that no token was routed to has learned nothing."""

    def update(updates, state, params=None):
        del params
        square = optax.tree.norm(updates, squared=True)
        norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
        short = (square == 0) | (norm < longest)
        clipped = jax.tree.map(
            lambda g: jnp.where(short, g, (g / norm.astype(g.dtype)) * longest),
            updates,
        )
        return clipped, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def begin_level(
    level: CMSLevel, weights: PyTree, axis: int, owner: CMSLevel | None = None
) -> FastLevel:
    """The level before its first token; `weights` carry the rows on `axis`. `owner` is
    the level that owns its start."""
    begin = lambda level: jax.vmap(flow(level, 0.0).init, axis)(weights)  # noqa: E731
    nothing = jax.eval_shape(lambda w: learned(level, noted(level, w)), weights)
    sums = _kept(level, jax.tree.map(jnp.zeros_like, nothing))
    owned = None if owner is None else Owned(weights, sums.gradient, begin(owner))
    return FastLevel(sums, begin(level), owned=owned)


def _kept(level: CMSLevel, sums: Collected) -> Collected:
    """Sums as the level keeps them."""
    if level.accumulator != "bfloat16":
        return sums  # as they come, of whatever type
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), sums)


def move(
    config: CMSConfig,
    level: CMSLevel,
    rate: Float[Array, ""] | float,
    start: PyTree,
    weights: PyTree,
    state: FastLevel,
    axis: int,
) -> tuple[PyTree, FastLevel]:
    """Equation 71 at the end of a level's period, for every row on `axis` of leaves.

        w <- w - rate opened f(g) - pull (w - start)

    with f the level's rule and g the clipped mean, or sum, of its tokens' gradients;
    `opened` is 1 unless rates are `generated`, then the mean over its tokens.

    Args:
      config: the chain.
      level: one of `config.whole`.
      rate: its inner rate.
      start: the learned weights, which have no rows.
      weights, state: where the level of each row stands.
      axis: of the rows.
    """
    scale = 1.0 / level.period if config.reduction == "mean" else 1.0
    rule = flow(level, rate)

    def move_row(weights, learned, opt, opened):
        learned = jax.tree.map(lambda a: scale * wide(a), learned)
        at = weights
        if config.gradient == "first_order":  # a move is a constant
            at = jax.lax.stop_gradient(weights)
        updates, opt, fresh = level_lib.move(rule, learned, opt, at)
        if opened is not None:
            updates = jax.tree.map(
                functools.partial(_scaled, 1.0 / level.period), opened, updates
            )
        moved = optax.apply_updates(weights, updates)
        if level.pull:
            moved = jax.tree.map(
                lambda new, old, s: new - level.pull * (old - s), moved, weights, start
            )
        return moved, _kept(level, fresh), opt, level_lib.nothing(opened)

    axes: Any = (axis, 0, axis)
    over_rows = jax.vmap(move_row, (axis, *axes), (axis, *axes))
    moved, *after = over_rows(weights, *state[:3])
    return moved, FastLevel(*after, owned=state.owned)


@jax.custom_jvp
def cut(weights: Array, start: Array) -> Array:
    """`weights`, `[L, B, ...]`, which to the level above are constants but that they
    move as far as `start`, `[L, ...]`, does."""
    del start
    return weights


@cut.defjvp
def _cut_slope(primals, tangents):
    weights, _ = primals
    _, start = tangents
    return weights, jnp.broadcast_to(start[:, None], weights.shape)


def begin_again(
    config: CMSConfig,
    level: CMSLevel,
    owner: CMSLevel,
    rate: Float[Array, ""] | float,
    start: PyTree,
    state: FastLevel,
    opened: PyTree | None,
    axis: int,
) -> tuple[PyTree, FastLevel]:
    """Where `owner` moves: its start of the faster `level` moves too, as `move` moves
    weights, and the level is there, with nothing learned.

    Args:
      config: the chain.
      level, owner: of `config.whole`.
      rate: of the owner.
      start: the learned weights of the level, which have no rows.
      state: of the level.
      opened: of the owner, before its move.
      axis: of the rows.
    """
    owned = state.owned
    assert owned is not None
    sums = FastLevel(Collected(owned.learned, None), owned.opt, opened)
    moved, after = move(config, owner, rate, start, owned.start, sums, axis)
    fresh = begin_level(level, moved, axis, owner)
    nothing = level_lib.nothing(state.opened)
    learned = level_lib.nothing(owned.learned)
    kept = Owned(moved, learned, after.opt, owned.window)
    return moved, fresh._replace(opened=nothing, owned=kept)


def _scaled(by, opened, updates):
    """The updates of layers, which lead, by what they were opened, `[L]`."""
    return jax.tree.map(
        lambda u: u * (by * opened).reshape(-1, *[1] * (u.ndim - 1)), updates
    )
