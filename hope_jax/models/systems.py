"""A language model as levels: described, and lived token by token by `core.live`."""

import collections
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from hope_jax.core.clock import Clock
from hope_jax.core.level import Level, Seen
from hope_jax.core.system import Box, Edge, Kind, System
from hope_jax.memory.flow import Transformation, transformation
from hope_jax.models import cms, lm
from hope_jax.models.block import Block
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.base import MixerConfig
from hope_jax.optim.leaves import path_names, wide

SLOW = "slow weights"


def system(config: ModelConfig, row: int) -> System:
    """The model as levels and what passes between them; items are tokens.

    A mixer that layers repeat is shown once. It is the model in training, on rows of
    `row` tokens: when it reads on, slower levels move by their own rules.
    """
    inside = config.within(row)
    sizes = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(lm.abstract(config)):
        sizes[_owner(config, path_names(path))] += leaf.size

    slow = Box(
        SLOW,
        Clock(period=row),
        sizes[SLOW],
        "next-token loss",
        "outer optimizer",
    )
    boxes, edges = [slow], []
    ends: dict[str, Kind] = {}
    seen = collections.Counter()
    for mixer in dict.fromkeys(config.pattern):
        called = {}  # two mixers of one kind differ in a number
        own = (*mixer.parts, *mixer.starts)
        for part in own:
            seen[part.name] += 1
            again = f" {seen[part.name]}" if seen[part.name] > 1 else ""
            called[part.name] = f"{part.name}{again}"
        chained = _nested(mixer)
        for part in own:
            name = called[part.name]
            size = sizes[mixer, part.start] // part.share
            clock = Clock(period=part.period)
            boxes.append(Box(name, clock, size, part.objective, part.rule))
            starts = 0 < part.period < row
            kind = "initialise" if starts else "generate"
            owner = chained.get(part.name)
            if owner is None:
                edges.append(Edge(slow.name, name, kind))
            else:
                edges.append(Edge(called[owner], name, "initialise"))
            if part.name in mixer.ends:
                ends[name] = "backprop" if part.period else "attend"
        edges += [
            dataclasses.replace(e, source=called[e.source], target=called[e.target])
            for e in mixer.edges
        ]
    readers = tuple(ends)
    chain = list(enumerate(config.cms.whole))
    if config.cms.order == "slow_to_fast":
        chain.reverse()
    for i, level in chain:
        name = _called(i)
        fast = i in inside
        period = level.period if level.period != float("inf") else row
        rule = level.rule.kind.upper() if fast and level.rule else "outer optimizer"
        boxes.append(
            Box(name, Clock(period=period), sizes[name], "next-token loss", rule)
        )
        if fast:
            owned = config.cms.variant == "nested" and i + 1 in inside
            owner = _called(i + 1) if owned else slow.name
            edges.append(Edge(owner, name, "initialise"))
            if config.cms.rates == "generated":
                edges += [Edge(reader, name, "generate") for reader in readers]
        edges += [Edge(below, name, kind) for below, kind in ends.items()]
        if config.cms.order != "independent":  # then all read what the mixer leaves
            ends = {name: "backprop"}
    return System(tuple(boxes), tuple(edges))


def _nested(mixer: MixerConfig) -> dict[str, str]:
    """The part that owns the start of each that another part does."""
    if not mixer.starts:
        return {}
    first, *_ = names = [part.name for part in mixer.starts]
    return {part.name: first for part in mixer.learns} | dict(itertools.pairwise(names))


def _called(i: int) -> str:
    return f"CMS {i + 1}"


def _owner(config: ModelConfig, keys: tuple[str, ...]) -> str | tuple[MixerConfig, str]:
    """The box that a parameter belongs to; in a mixer, it and a part's start."""
    if "mixer" not in keys:
        if "levels" in keys:
            return _called(int(keys[keys.index("levels") + 1]))
        return SLOW
    at = keys.index("mixer")
    mixer = config.pattern[int(keys[at - 1]) if "parts" in keys[:at] else 0]
    inside = ".".join(keys[at + 1 :])
    for part in mixer.parts:
        if part.start and inside.startswith(f"{part.start}."):
            return mixer, part.start
    return SLOW


MEMORIES = "memories"
_RETENTIONS = (("bias_alpha",), ("alpha", "up", "bias"))  # logits of α, by their paths


def of_step(
    config: ModelConfig, gradient: PyTree, change: PyTree, params: PyTree
) -> dict[str, Array]:
    """What an optimizer step did, level by level, for the log of a training.

    Args:
      config: of the model.
      gradient, change: of its parameters, trees like these.
      params: where it was before the step.

    Returns:
      Float32 scalars: `grad_norm/<level>` and `update_norm/<level>` of `CMS 1`, ...,
      of the starts of the `memories` and of the `slow weights`; `rate/<level>`, the
      learned rate of a level that moves while reading; `half_life/shortest` and
      `half_life/longest`, in tokens, of all heads of mixers with a retention gate,
      where the token says nothing.
    """
    squares = collections.defaultdict(list)
    both = zip(
        *map(jax.tree_util.tree_leaves_with_path, (gradient, change)), strict=True
    )
    for (path, g), (_, moved) in both:
        owner = _owner(config, path_names(path))
        name = owner if isinstance(owner, str) else MEMORIES
        for what, leaf in (("grad_norm", g), ("update_norm", moved)):
            squares[f"{what}/{name}"].append(jnp.sum(jnp.square(wide(leaf))))
    made = {name: jnp.sqrt(sum(found)) for name, found in sorted(squares.items())}
    half_lives = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = path_names(path)
        if names == ("rates",):
            rates = config.cms.rate_bound * jax.nn.sigmoid(leaf)
            made |= {f"rate/{_called(i)}": rates[n] for n, i in enumerate(config.fast)}
        if any(names[-len(end) :] == end for end in _RETENTIONS):
            forgets = -jax.nn.log_sigmoid(wide(leaf)).ravel()
            # A log takes finite numbers alone.
            half_lives.append(math.log(2.0) / jnp.maximum(forgets, 1e-9))
    if half_lives:
        every = jnp.concatenate(half_lives)
        made["half_life/shortest"] = jnp.min(every)
        made["half_life/longest"] = jnp.max(every)
    return made


# Living ------------------------------------------------------------------------------


def living(
    graphdef: nnx.GraphDef, params: PyTree, row: int
) -> tuple[System, dict[str, PyTree]]:
    """`system` of a small model with its levels filled in, for `core.live` to run.

    It says what a continuum memory does inside a row, one token at a time: attention is
    solved anew for every token, the MLPs share one gradient flow, and each moves on its
    own clock. `lm.apply` reads chunks of the same life at once.

    Items are one row's `(token, label)`. What the last MLP answers is what the head
    reads; `head` makes it logits.

    Args:
      graphdef, params: of `lm.build`, of a model of one layer whose mixer is attention,
        whose `cms.rates` are learned and whose levels are a chain. In a deeper one the
        loss of a chunk reaches a level through later tokens too, and the gradients of
        single tokens do not add up to it.
      row: tokens of a row; the slow weights do not move before its end.

    Returns:
      The system, and where its levels start, for `core.system.start`.

    Raises:
      ValueError: a model of another kind.

    >>> from hope_jax.core.system import live, start
    >>> from hope_jax.models.mixers.attention import AttentionConfig
    >>> config = ModelConfig(
    ...     vocab=5,
    ...     d_model=4,
    ...     layers=1,
    ...     heads=1,
    ...     mixer=AttentionConfig(context=8),
    ...     cms=cms.CMSConfig(levels=(cms.CMSLevel(period=2),), hidden=4),
    ... )
    >>> graphdef, params = lm.build(config, jax.random.key(0))
    >>> tokens, labels = jnp.array([1, 4, 2, 3]), jnp.array([4, 2, 3, 0])
    >>> alive, starts = living(graphdef, params, row=4)
    >>> _, answers = live(alive, start(alive, starts), (tokens, labels))
    >>> logits = jax.vmap(lambda x: head(graphdef, params, x))(answers["CMS 1"])
    >>> fast, _ = lm.apply(graphdef, params, tokens[None], labels=labels[None])
    >>> bool(jnp.allclose(logits, fast[0], atol=1e-5))
    True
    """
    model = nnx.merge(graphdef, params)
    config: ModelConfig = model.config
    mixer = config.pattern[0]
    if (
        config.layers != 1
        or any(part.period for part in mixer.parts)
        or config.cms.rates != "learned"
        or config.cms.order == "independent"
        or config.cms.variant != "sequential"
    ):
        raise ValueError(
            "layers must be 1, the mixer attention, cms.rates 'learned', cms.order "
            "that of a chain and cms.variant 'sequential' for levels that live token "
            f"by token, got {config.layers}, {mixer.kind!r}, {config.cms.rates!r}, "
            f"{config.cms.order!r} and {config.cms.variant!r}."
        )
    described, inside = system(config, row), config.within(row)
    block = _only_block(model)
    (attention,) = (part.name for part in mixer.parts)
    still = Level(
        init=_started, read=_silent, objective=_no_objective, flow=optax.set_to_zero()
    )

    def embed(weights, item):
        token, _ = item
        return nnx.merge(graphdef, weights).embedded(token)

    def attend(seen: Seen, item):
        del item  # the last one seen
        _, given = seen.context
        x = jnp.where(seen.mask[:, None], given[SLOW], 0.0)  # nothing of the future
        y, _ = block.mixer(block.norm(x)[None])
        return (x + y[0])[jnp.sum(seen.mask) - 1]

    levels = {
        SLOW: still._replace(read=embed),
        attention: still._replace(read=attend, flow=optax.identity()),
    }
    starts = {SLOW: params, attention: ()}
    through = {}
    for i, level in enumerate(config.cms.whole):
        name, start = _called(i), functools.partial(_start, graphdef, i)
        read = functools.partial(_answer, block.levels[i])
        flow = optax.set_to_zero()
        if i in inside:
            rate = model.inner_rates()[config.fast.index(i)]
            flow = _equation_71(config.cms, level, rate, start(params))
            through[name] = start
        else:
            starts[name] = start(params)
        levels[name] = Level(
            init=_started,
            read=read,
            objective=functools.partial(_loss, graphdef, params, read),
            flow=flow,
        )
    boxes = (
        dataclasses.replace(
            box,
            level=levels[box.name]._replace(
                clock=box.clock, objective_name=box.objective, flow_name=box.rule
            ),
        )
        for box in described.boxes
    )
    edges = (
        dataclasses.replace(edge, through=through[edge.target])
        if edge.kind == "initialise"
        else edge
        for edge in described.edges
    )
    return System(tuple(boxes), tuple(edges)), starts


def head(
    graphdef: nnx.GraphDef, params: PyTree, x: Float[Array, " D"]
) -> Float[Array, " N"]:
    """Logits of what the last level answers."""
    model = nnx.merge(graphdef, params)
    return model.logits(x)


def _started(key):
    raise ValueError("a model's levels start where its parameters say.")


def _silent(params, item):
    return None


def _no_objective(params, item):
    return jnp.zeros(())


def _only_block(model: lm.LanguageModel) -> Block:
    graphdef, params = nnx.split(model.blocks, nnx.Param)
    block = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], params))
    assert isinstance(block, Block)
    return block


def _start(graphdef, i, params):
    """Where CMS level i starts, of all that the slow level holds."""
    return nnx.state(_only_block(nnx.merge(graphdef, params)).levels[i].mlp, nnx.Param)


def _answer(part, weights, item):
    _, given = item
    (x,) = given.values()
    return part(x[None, None], jax.tree.map(lambda w: w[None], weights))[0, 0]


def _loss(graphdef, params, read, weights, item):
    (_, label), _ = item
    return lm.next_token_loss(head(graphdef, params, read(weights, item)), label)


def _equation_71(config, level, rate, start) -> Transformation:
    """A level's whole move, its pull to where it starts too, as a rule."""
    rule = cms.flow(level, rate)
    scale = 1.0 / level.period if config.reduction == "mean" else 1.0

    def update(gradient, state, weights, **extra):
        del extra  # it takes no more of its token than the gradient
        gradient, at = jax.tree.map(lambda g: scale * g, gradient), weights
        if config.gradient == "first_order":  # but of the rate a move is a constant
            gradient, at = jax.lax.stop_gradient((gradient, at))
        updates, state = rule.update(gradient, state, at)
        pulled = jax.tree.map(
            lambda u, w, s: u - level.pull * (w - s), updates, weights, start
        )
        return pulled, state

    return transformation(rule.init, update)
