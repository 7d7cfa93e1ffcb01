"""Systems of levels: what is in them, what passes between them, how they run."""

import dataclasses
import functools
import graphlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import optax
from jaxtyping import Array, PyTree

from hope_jax.core import show
from hope_jax.core.clock import Clock
from hope_jax.core.config import did_you_mean
from hope_jax.core.level import (
    Level,
    LevelState,
    OuterGradient,
    begin,
    said,
    unroll,
)
from hope_jax.core.transfer import backprop

Kind = Literal["condition", "attend", "backprop", "initialise", "generate"]

# What a level must know of another at the same item before it can move (Definition 2).
_SAME_TIME = ("condition", "attend")
# What a level is given together with each item of its context.
_GIVEN = ("condition", "attend", "generate", "backprop")


@dataclasses.dataclass(frozen=True)
class Box:
    """One level of a system, with what there is to say of it.

    Attributes:
      name: unique in its system.
      clock: when it moves, in items of the system's context.
      parameters: how many numbers it learns.
      objective: what it descends, in words or symbols; of a level, what that says.
      rule: how it moves; of a level, what that says.
      level: the level itself; None for a system that only describes itself. `Box.of`
        fills in what a level can say for itself.

    Raises:
      ValueError: no name, a negative count, or words or a clock that are not its
        level's.
    """

    name: str
    clock: Clock
    parameters: int
    objective: str = ""
    rule: str = ""
    level: Level | None = None

    def __post_init__(self):
        if not self.name:
            raise ValueError("name must not be empty.")
        if self.parameters < 0:
            raise ValueError(f"parameters must be at least 0, got {self.parameters}.")
        if self.level is None:
            return
        for what, own in zip(("objective", "rule"), said(self.level), strict=True):
            if getattr(self, what) not in ("", own):
                raise ValueError(
                    f"{what} of {self.name!r} is {own!r}, what its level says, and not "
                    f"{getattr(self, what)!r}: leave it out, or name it in the Level "
                    "(objective_name, flow_name)."
                )
            object.__setattr__(self, what, own)
        if self.level.clock != self.clock:
            raise ValueError(
                f"clock of {self.name!r} ({self.clock}) differs from its level's own "
                f"({self.level.clock})."
            )

    @classmethod
    def of(cls, name: str, level: Level) -> "Box":
        """The box of `level`, its parameters counted by tracing `level.init`.

        >>> def surprise(w, x):
        ...     return (w - x) ** 2
        >>> begin = lambda key: jax.numpy.zeros(3)
        >>> level = Level(begin, lambda w, x: w, surprise, optax.sgd(1.0))
        >>> box = Box.of("mean", level)
        >>> box.parameters, box.objective, box.rule
        (3, 'surprise', 'scale')
        """
        shapes = jax.eval_shape(level.init, jax.random.key(0))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        return cls(name, level.clock, parameters, level=level)


@dataclasses.dataclass(frozen=True)
class Edge:
    """One knowledge transfer, from `source` to `target` (`hope_jax.core.transfer`).

    Attributes:
      source: the level that gives.
      target: the level that is given.
      kind: `condition`: the source's parameters. `attend`: what a non-parametric level
        answers. `backprop`: the source's answer, in one gradient flow with the target.
        `initialise`: where the target starts. `generate`: the source's answer, as
        context or weights.
      differentiable: whether gradients cross. Always so for `backprop`.
      through: what of the source's parameters (`condition`, `initialise`) or of its
        answer (the other kinds) is given; None for all.
    """

    source: str
    target: str
    kind: Kind
    differentiable: bool = True
    through: Callable[[PyTree], PyTree] | None = None

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}."
                + did_you_mean(self.kind, get_args(Kind))
            )
        if self.kind == "backprop" and not self.differentiable:
            raise ValueError(
                f"{self}: a backprop edge is a gradient flow; to cut it use kind "
                "'generate' with differentiable=False."
            )
        if self.source == self.target and self.kind != "generate":
            raise ValueError(
                f"{self}: only 'generate' may lead from a level to itself "
                "(self-generated values)."
            )

    def __str__(self):
        return f"{self.kind} edge {self.source!r} -> {self.target!r}"


@dataclasses.dataclass(frozen=True)
class System:
    """Levels and the transfers between them (Definition 3 of arXiv:2512.24695).

    Attributes:
      boxes: the levels, in the order in which a picture should show them.
      edges: the transfers.

    Raises:
      ValueError: for names that are twice there or unknown, and for edges that make no
        sense: a start given by a level that is not slower, an `attend` edge with no
        non-parametric end, a non-parametric level in a gradient flow or initialised,
        a gradient flow in a circle, and levels of one frequency that each need the
        other's present state.

    >>> slow = Box("head", Clock(period=64), 512, "next token", "AdamW")
    >>> fast = Box("memory", Clock(), 64, "-<Mk, v>", "GD")
    >>> system = System((slow, fast), (Edge("head", "memory", "initialise"),))
    >>> [[box.name for box in level] for level in by_frequency(system)]
    [['head'], ['memory']]
    """

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "boxes", tuple(self.boxes))
        object.__setattr__(self, "edges", tuple(self.edges))
        names = [box.name for box in self.boxes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"boxes has two levels named {name!r}.")
        for edge in self.edges:
            for end in (edge.source, edge.target):
                if end not in names:
                    raise ValueError(
                        f"{edge}: there is no level {end!r}."
                        f"{did_you_mean(end, names)} Known: {', '.join(names)}."
                    )
            self._check_clocks(edge)
        _order(self, ("backprop",), names, "backprop edges form a circle")
        by_frequency(self)

    def __getitem__(self, name: str) -> Box:
        for box in self.boxes:
            if box.name == name:
                return box
        names = [box.name for box in self.boxes]
        raise KeyError(
            f"there is no level {name!r}.{did_you_mean(name, names)} Known: "
            f"{', '.join(names)}."
        )

    def _repr_html_(self) -> str:
        lines = [list(row.values()) for row in rows(self)]
        return show.table(f"System of {len(self.boxes)} levels", _COLUMNS, lines)

    def _check_clocks(self, edge: Edge):
        source, target = self[edge.source].clock, self[edge.target].clock
        if edge.kind == "initialise":
            if not target.parametric:
                raise ValueError(
                    f"{edge}: {edge.target!r} is non-parametric and starts nowhere."
                )
            if source.frequency() >= target.frequency():
                raise ValueError(
                    f"{edge}: a start comes from a slower level, but {edge.source!r} "
                    f"moves at {period(source)} and {edge.target!r} at "
                    f"{period(target)}."
                )
        if edge.kind == "attend" and source.parametric and target.parametric:
            raise ValueError(
                f"{edge}: one end must be non-parametric (period 0); use 'condition' "
                "between two levels with parameters."
            )
        if edge.kind == "condition" and not source.parametric:
            raise ValueError(
                f"{edge}: {edge.source!r} is non-parametric and has no parameters; use "
                "'attend'."
            )
        if edge.kind == "backprop" and not (source.parametric and target.parametric):
            raise ValueError(
                f"{edge}: a non-parametric level has no gradient; use 'attend'."
            )


def by_frequency(system: System) -> tuple[tuple[Box, ...], ...]:
    """The boxes by level, slowest first: level 1 has the lowest frequency.

    Of two boxes of equal frequency the one whose present state the other needs is the
    faster (Definition 2); where neither needs the other they share a level.
    """
    levels = []
    for frequency in sorted({box.clock.frequency() for box in system.boxes}):
        names = [b.name for b in system.boxes if b.clock.frequency() == frequency]
        if frequency == 0:  # nothing moves, so nothing waits
            generations = [names]
        else:
            generations = _order(
                system,
                _SAME_TIME,
                names,
                "levels of one frequency need each other's present state",
            )
        for generation in reversed(generations):
            levels.append(tuple(b for b in system.boxes if b.name in generation))
    return tuple(levels)


# Running ------------------------------------------------------------------------------


def start(system: System, params: Mapping[str, PyTree]) -> dict[str, LevelState]:
    """The states of all levels before the first item.

    Args:
      system: every box with its `level`.
      params: where each level starts. A level with an `initialise` edge is left out: it
        starts at the parameters of the edge's source.

    Raises:
      ValueError: `params` lacks a level, or has one that is not asked for; named; or
        it holds states.
    """
    origins = {e.target: e for e in system.edges if e.kind == "initialise"}
    asked = {box.name: origins.get(box.name) for box in system.boxes}
    places = {name: edge.source if edge else name for name, edge in asked.items()}
    _same_levels("params", params, set(places.values()))
    states = {}
    for box in system.boxes:
        edge = asked[box.name]
        initial = params[places[box.name]]
        if isinstance(initial, LevelState):
            raise ValueError(
                f"params[{places[box.name]!r}] is a LevelState, where the level stands "
                "already: start is given parameters, and live the states."
            )
        if edge:
            initial = _across(edge, initial)
        states[box.name] = begin(_level(box), initial)
    return states


def _same_levels(what: str, given: Mapping[str, Any], asked: set[str]) -> None:
    """Refuses a mapping that is not about the levels that are asked for."""
    lacks, more = sorted(asked - set(given)), sorted(set(given) - asked)
    if lacks:
        raise ValueError(
            f"{what} lacks {', '.join(lacks)}; it must have {', '.join(sorted(asked))}."
        )
    if more:
        raise ValueError(
            f"{what} has {', '.join(more)}, which nothing asks for: it must have "
            f"{', '.join(sorted(asked))}."
        )


def live(
    system: System, states: Mapping[str, LevelState], context: PyTree
) -> tuple[dict[str, LevelState], dict[str, PyTree]]:
    """Lets all levels of `system` live through one context.

    A level with incoming edges is given items `(x_t, {source: what it gives})`, any
    other level `x_t`. What is given is the source's parameters for `condition`, its
    read for the other kinds. Levels tied by `backprop` edges share one gradient flow:
    its objective is that of the levels at the end of it (those with no outgoing
    `backprop` edge), and each level's gradient comes from one backward pass.

    Args:
      system: every box with its `level`.
      states: where each stands, from `start` or an earlier `live`.
      context: a pytree whose leaves lead with time, T.

    Returns:
      The states after the last item, and the T reads of each level by name.

    Raises:
      ValueError: when a box has no level, the edges leave no order to run in, or
        `states` are not those of the system's levels.
    """
    _same_levels("states", states, {box.name for box in system.boxes})
    for name, state in states.items():
        if not isinstance(state, LevelState):
            raise ValueError(
                f"states[{name!r}] is no LevelState, got {type(state).__name__}: "
                "states come from start(system, params) or an earlier live."
            )
    params, reads, moved = {}, {}, {}
    for group in _flows(system):
        outside = {
            name: {
                e.source: _given(e, params, reads)
                for e in _incoming(system, name)
                if e.source not in group
            }
            for name in group
        }
        if len(group) == 1:
            (name,) = group
            level = _level(system[name])
            tells = any(
                e.source == name and e.kind == "condition" for e in system.edges
            )
            items = (context, outside[name]) if outside[name] else context
            moved[name], read = unroll(
                _telling(level) if tells else level, states[name], items
            )
            params[name], reads[name] = read if tells else (None, read)
        else:
            ends, told = _one_flow(system, group, states, (context, outside))
            moved |= ends
            for name in group:
                params[name], reads[name] = told[name]
    return moved, {box.name: reads[box.name] for box in system.boxes}


def as_level(
    system: System,
    objective: Callable[[PyTree, tuple[PyTree, PyTree]], Array],
    *,
    flow: optax.GradientTransformation,
    clock: Clock | None = None,
    gradient: OuterGradient = "exact",
) -> Level:
    """`system` as one level, so that systems nest.

    One item of the level's context is a whole context of the system. The level's
    parameters are where the system's own levels start (`{name: params}`, without those
    that an `initialise` edge starts); they move by `flow`, through the life of the
    levels inside. Its read is the reads of all levels, by name.

    Args:
      system: every box with its `level`.
      objective: `(params, (context, reads)) -> scalar`.
      flow: how the starting points move.
      clock: when they move; None for every item.
      gradient: the `Level.gradient` of the level returned. Each level inside has its
        own.
    """
    started = {e.target for e in system.edges if e.kind == "initialise"}
    own = {b.name: _level(b) for b in system.boxes if b.name not in started}
    _flows(system)

    def init(key):
        keys = jax.random.split(key, len(own))
        return {name: own[name].init(k) for name, k in zip(own, keys, strict=True)}

    def read(params, context):
        return live(system, start(system, params), context)[1]

    return Level(
        init=init,
        read=read,
        objective=lambda params, x: objective(params, (x, read(params, x))),
        flow=flow,
        clock=clock or Clock(),
        gradient=gradient,
    )


def _one_flow(system, group, states, contexts):
    """Scans the levels of one gradient flow through their context together."""
    levels = {name: _level(system[name]) for name in group}
    for name, level in levels.items():
        if level.read_at != "pre" or level.clock.anchor > 1:
            raise ValueError(
                f"{name!r} shares a gradient flow, whose levels are all read before "
                "they move: it needs read_at 'pre' and anchor 1, got "
                f"{level.read_at!r} and {level.clock.anchor}."
            )
    inside = {
        name: [e for e in _incoming(system, name) if e.source in group]
        for name in group
    }
    feeding = {e.source for e in system.edges if e.kind == "backprop"}

    def forward(params, item):
        x_t, given = item
        reads, items = {}, {}
        for name in group:
            here = dict(given[name])
            for e in inside[name]:
                here[e.source] = _given(e, params, reads)
            items[name] = (x_t, here) if here else x_t
            reads[name] = levels[name].read(params[name], items[name])
        return reads, items

    def objective(params, item):
        reads, items = forward(params, item)
        ends = [name for name in group if name not in feeding]
        losses = (levels[n].objective(params[n], items[n]) for n in ends)
        loss = functools.reduce(operator.add, losses)
        return loss, {name: (params[name], reads[name]) for name in group}

    def inputs(params, item):
        _, items = forward(params, item)
        return {
            name: level.inputs(params[name], items[name])
            for name, level in levels.items()
            if level.inputs
        }

    def step(states, item):
        states, (_, told) = backprop(levels, states, objective, item, inputs=inputs)
        return states, told

    held = {
        name: jax.lax.stop_gradient(states[name])
        if levels[name].gradient == "none"
        else states[name]
        for name in group
    }
    return jax.lax.scan(step, held, contexts)


def _flows(system: System) -> list[list[str]]:
    """Names in running order; those tied by backprop edges in one list."""
    names = [box.name for box in system.boxes]
    pairs = [(e.source, e.target) for name in names for e in _incoming(system, name)]
    for source, target in pairs:
        if pairs.count((source, target)) > 1:
            raise ValueError(
                f"{source!r} gives {target!r} two things; a system that runs has one "
                "edge between two levels, besides 'initialise'."
            )
    flow = {name: {name} for name in names}
    for edge in system.edges:
        if edge.kind == "backprop" and flow[edge.source] is not flow[edge.target]:
            joined = flow[edge.source] | flow[edge.target]
            flow |= dict.fromkeys(joined, joined)
    generations = _order(
        system,
        _GIVEN,
        names,
        "the edges leave no order to run the levels in; cut a "
        "level in two (what it makes, and what it reads)",
    )
    order = [name for generation in generations for name in generation]
    before = {
        frozenset(flow[name]): {
            frozenset(flow[e.source])
            for member in flow[name]
            for e in _incoming(system, member)
            if e.source not in flow[name]
        }
        for name in names
    }
    try:
        groups = list(graphlib.TopologicalSorter(before).static_order())
    except graphlib.CycleError as error:
        circle = [" + ".join(sorted(group)) for group in error.args[1]]
        raise ValueError(
            "a gradient flow needs what comes out of it: " + " -> ".join(circle)
        ) from None
    return [sorted(group, key=order.index) for group in groups]


def _incoming(system: System, name: str) -> list[Edge]:
    return [
        e
        for e in system.edges
        if e.target == name and e.kind in _GIVEN and e.source != name
    ]


def _given(edge: Edge, params: dict, reads: dict) -> PyTree:
    """What the source of `edge` gives its target."""
    return _across(edge, (params if edge.kind == "condition" else reads)[edge.source])


def _across(edge: Edge, value: PyTree) -> PyTree:
    value = value if edge.through is None else edge.through(value)
    return value if edge.differentiable else jax.lax.stop_gradient(value)


def _telling(level: Level) -> Level:
    """`level`, which also reads out its parameters."""
    return level._replace(read=lambda params, x: (params, level.read(params, x)))


def _level(box: Box) -> Level:
    if box.level is None:
        raise ValueError(
            f"{box.name!r} only describes itself: give its Box a `level` to run it."
        )
    return box.level


def _order(system, kinds, names, complaint) -> list[list[str]]:
    """Generations of `names`: each needs, through `kinds`, only earlier ones."""
    needs = {name: [] for name in names}
    for edge in system.edges:
        ends = {edge.source, edge.target}
        if edge.kind in kinds and len(ends) == 2 and ends <= set(names):
            needs[edge.target].append(edge.source)
    sorter = graphlib.TopologicalSorter(needs)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise ValueError(f"{complaint}: {' -> '.join(error.args[1])}.") from None
    generations = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=names.index)
        generations.append(ready)
        sorter.done(*ready)
    return generations


# Showing ------------------------------------------------------------------------------

_COLUMNS = ("level", "name", "period", "parameters", "objective", "rule", "edges")


def rows(system: System) -> list[dict[str, str]]:
    """One row a box, slowest level first, as text; columns as in `describe`."""
    table = []
    for index, boxes in enumerate(by_frequency(system), start=1):
        for box in boxes:
            out = [
                f"{e.kind} {e.target}" + ("" if e.differentiable else " (stopped)")
                for e in system.edges
                if e.source == box.name
            ]
            cells = (
                str(index),
                box.name,
                period(box.clock),
                human(box.parameters),
                box.objective,
                box.rule,
                ", ".join(out),
            )
            table.append(dict(zip(_COLUMNS, cells, strict=True)))
    return table


def describe(system: System) -> str:
    """`system` as a Markdown table, aligned so that a terminal shows it as well.

    >>> memory = Box("memory", Clock(), 65_536, "½‖Mk - v‖²", "GD")
    >>> print(describe(System((memory,))))
    | level | name   | period     | parameters | objective  | rule | edges |
    |-------|--------|------------|------------|------------|------|-------|
    | 1     | memory | every item | 65.5K      | ½‖Mk - v‖² | GD   |       |
    """
    return markdown(_COLUMNS, rows(system))


def markdown(columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> str:
    """A Markdown table whose cells are aligned."""
    table = [dict(zip(columns, columns, strict=True)), *rows]
    table = [{c: row[c].replace("|", "\\|") for c in columns} for row in table]
    widths = {c: max(len(row[c]) for row in table) for c in columns}
    lines = [
        "| " + " | ".join(row[c].ljust(widths[c]) for c in columns) + " |"
        for row in table
    ]
    rule = "|" + "|".join("-" * (widths[c] + 2) for c in columns) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def human(count: int) -> str:
    """A count in three digits: 950, 65.5K, 1.23M, 1.3B.

    >>> [human(n) for n in (0, 950, 65_536, 999_999, 1_234_567, 1_300_000_000)]
    ['0', '950', '65.5K', '1M', '1.23M', '1.3B']
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * size:  # 999,999 is 1M, not 1e+03K
            return f"{count / size:.3g}{unit}"
    return str(count)


def period(clock: Clock) -> str:
    """How often a level moves, in words."""
    if not clock.parametric:
        return "non-parametric"
    if clock.frozen:
        return "frozen"
    return "every item" if clock.period == 1 else f"{int(clock.period):,} items"
