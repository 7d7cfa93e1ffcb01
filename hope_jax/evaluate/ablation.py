"""Who does the learning? What a model loses when a part of it stops learning.

Three questions to a trained model, each asked with every part switched off in turn and
under the controls of a sceptic (arXiv:2602.21204, arXiv:2510.09551):

    first, again, other   nats a token of a text, of the same text right after it, and
                          of another text after it: what a second reading gains over
                          another text was learned from the first one
    facts                 nats a token that a fact, random tokens planted in the text,
                          saves when it comes again at a distance

The parts are those of `models.learning`. A row that a model has no meaning for says so.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.models import learning
from hope_jax.models.config import ModelConfig, rechunked
from hope_jax.models.learning import Controls, Learning
from hope_jax.stream.reader import Reader, reader_of

DISTANCES = (16, 96, 1000)
CUE, ANSWER = 4, 4  # tokens of a fact: what it is asked by, and what is then scored
_LEAD = 16  # fewest tokens of text before a fact


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      name: of the line.
      model: read with; differs from the trained one in its chunks at most.
      learn: who learns; None if the line has no meaning for the model.
      reason: why it has none.
      facts: whether planted facts are asked.
    """

    name: str
    model: ModelConfig
    learn: Learning | None
    reason: str = ""
    facts: bool = False


class Readings(NamedTuple):
    """Nats a token, means over rows and positions; not finite where logits were not."""

    first: float
    again: float
    other: float

    @property
    def gain(self) -> float:
        """What the second reading of a text saves over another text in its place."""
        return self.other - self.again


class Gain(NamedTuple):
    """Nats a token that planted facts save: the mean and its normal 95 % interval."""

    mean: float
    low: float
    high: float


class Facts(NamedTuple):
    """Rows of text whose ends ask for a fact that each row has, or has not, been told.

    Attributes:
      absent: `[B, T]`, rows that were not; the last tokens are the cue and the answer.
      planted: the same with the fact, its cue and then its answer, planted so many
        tokens before its cue comes again; by that distance.
    """

    absent: Int[np.ndarray, "B T"]
    planted: dict[int, Int[np.ndarray, "B T"]]


class Measured(NamedTuple):
    """What was measured of a row; None if it has no meaning."""

    row: Row
    readings: Readings | None
    facts: dict[int, Gain]


def rows(config: ModelConfig) -> list[Row]:
    """Every switch and control, in the order of the table."""
    count = len(config.cms.levels)
    fast = config.fast
    everything = learning.off(config)
    memories, changes = learning.has_memories(config), learning.modifies_itself(config)
    no_memory = f"{config.kinds} has no memory that learns while reading"
    no_projection = f"the projections of {config.kinds} are no memories"
    no_level = "no CMS level moves while reading"

    def made(name, learn, reason="", facts=False):
        return Row(name, config, None if reason else learn, reason, facts)

    def without(*levels):
        return Learning(levels=tuple(i not in levels for i in range(count)))

    found = [
        made("all learn", Learning(), facts=True),
        made("main memory off", Learning(main=False), "" if memories else no_memory),
        made(
            "projections off",
            Learning(projections=False),
            "" if changes else no_projection,
        ),
    ]
    if learning.consolidates(config):
        found.append(made("consolidation off", Learning(consolidation=False)))
    for i in range(count):
        reason = "" if i in fast else "it never moves while reading"
        found.append(made(f"CMS {i + 1} off", without(i), reason))
    off = dataclasses.replace(everything, levels=None)
    found += [
        made("all CMS off", without(*fast), "" if fast else no_level, facts=True),
        made("all memories off", off, "" if memories else no_memory, facts=True),
        made("nothing learns", everything, facts=True),
    ]
    for name, field, controls in (
        ("control: sign of eta flipped", "flip", Controls(flip=True)),
        ("control: q replaced by k", "q_is_k", Controls(q_is_k=True)),
        ("control: 2 inner steps", "steps", Controls(steps=2)),
        ("control: 4 inner steps", "steps", Controls(steps=4)),
    ):
        reason = learning.missing_control(config, field)
        found.append(made(name, Learning(controls=controls), reason))
    for factor, name in ((0.5, "half the chunk"), (2, "twice the chunk")):
        try:
            other = rechunked(config, factor)
            if config.nests and not other.nests:
                raise ValueError(
                    f"levels may move every {other.base_chunk} tokens, which is no "
                    f"multiple of {other.mixer_chunk}: memories would be read token by "
                    "token"
                )
            found.append(Row(f"control: {name}", other, Learning()))
        except ValueError as error:
            found.append(made(f"control: {name}", None, str(error)))
    return found


def texts(
    documents: Sequence[Int[np.ndarray, "_"]], *, count: int, length: int
) -> Int[np.ndarray, "B T"]:
    """Rows of `length` tokens spread over all the text, which is read as one.

    Raises:
      ValueError: fewer than two rows asked for, or too little text for them.
    """
    if count < 2 or length < 2:
        raise ValueError(
            f"count and length must be at least 2, got {count} and {length}: another "
            "text is the control of a second reading."
        )
    stream = np.concatenate(documents)
    if len(stream) < count * length:
        raise ValueError(
            f"the text has {len(stream)} tokens, fewer than {count} rows of {length}; "
            "give more text or ask for less."
        )
    starts = np.linspace(0, len(stream) - length, count).astype(int)
    return np.stack([stream[start : start + length] for start in starts])


def plant(
    text: Int[np.ndarray, "B T"],
    distances: Sequence[int],
    seed: int,
    vocab: Sequence[int] | Int[np.ndarray, " N"],
) -> Facts:
    """Gives each row of text a fact of its own, asked at the row's end.

    Rows are of one length at every distance, so a model is compiled once.

    Args:
      text: rows with room for it: at least `room(distance)` tokens.
      distances: tokens between the end of the fact and its cue.
      seed: of the facts.
      vocab: the tokens that facts are drawn from; those of one fact all differ.

    Raises:
      ValueError: rows that are too short, a distance below 1, or too few tokens.
    """
    for distance in distances:
        need = room(distance)
        if distance < 1 or text.shape[1] < need:
            raise ValueError(
                f"a distance of {distance} must be at least 1 and needs rows of {need} "
                f"tokens, got {text.shape[1]}."
            )
    size = CUE + ANSWER
    if len(vocab) < size:
        raise ValueError(
            f"vocab must have the {size} different tokens of a fact, got {len(vocab)}."
        )
    draw = np.random.default_rng(seed)
    fact = np.stack([draw.choice(vocab, size, replace=False) for _ in text])
    absent = text.astype(np.int32)
    absent[:, -size:] = fact

    def told(distance):
        end = text.shape[1] - size - distance
        planted = absent.copy()
        planted[:, end - size : end] = fact
        return planted

    return Facts(absent, {distance: told(distance) for distance in distances})


def room(distance: int) -> int:
    """Fewest tokens of a row in which a fact comes again after `distance`."""
    return _LEAD + distance + 2 * (CUE + ANSWER)


def interval(values: Sequence[float] | Float[np.ndarray, " N"]) -> Gain:
    """The mean of independent values, and the normal 95 % interval of it.

    >>> gain = interval([1.0, 3.0])
    >>> gain.mean, round(gain.low, 2), round(gain.high, 2)
    (2.0, 0.04, 3.96)
    """
    found = np.asarray(values, np.float64)
    half = 1.96 * found.std(ddof=1) / math.sqrt(len(found))
    mean = found.mean()
    return Gain(float(mean), float(mean - half), float(mean + half))


def read_twice(
    reader: Reader, params: PyTree, text: Int[np.ndarray, "B T"], learn: bool | Learning
) -> Readings:
    """A text, then the same again or that of the next row, `learn` as it says.

    The first token of a row is read and never scored; rows are cut so that both
    readings begin where every clock stands at a boundary.
    """
    length = (text.shape[1] - 1) // reader.span * reader.span
    if length < 1:
        raise ValueError(
            f"text must have more than {reader.span} tokens a row, the span of the "
            f"model's clocks, got {text.shape[1]}."
        )
    reader.check_room("a text, read twice,", 2 * length)
    rows = jnp.asarray(text[:, : length + 1], jnp.int32)
    start = reader.initial_state(params, rows.shape[0])
    first, state = costs(reader, learn, params, rows, start)
    again, _ = costs(reader, learn, params, rows, state)
    other, _ = costs(reader, learn, params, jnp.roll(rows, 1, axis=0), state)
    return Readings(*(float(jnp.mean(cost)) for cost in (first, again, other)))


PARTS = (
    "all learn",
    "main memory off",
    "projections off",
    "all CMS off",
    "nothing learns",
)


def first_readings(
    config: ModelConfig,
    params: PyTree,
    text: Int[np.ndarray, "B T"],
    names: Sequence[str] = PARTS,
) -> dict[str, Float[np.ndarray, "B S"]]:
    """Nats of every token but the first of rows that are read once, by name of those of
    `rows` that have a meaning for the model.

    Rows that say the same of a model are read once; each other is a program of its own.
    """
    known, found = {}, {}
    for row in rows(config):
        if row.learn is None or row.name not in names:
            continue
        switches = row.model, learning.resolve(row.model, row.learn)
        if switches not in known:
            reader = reader_of(row.model)
            start = reader.initial_state(params, len(text))
            read = jnp.asarray(text, jnp.int32)
            cost, _ = costs(reader, row.learn, params, read, start)
            known[switches] = np.asarray(cost, np.float64)
        found[row.name] = known[switches]
    return found


def ask(
    reader: Reader, params: PyTree, facts: Facts, learn: bool | Learning, *, batch: int
) -> dict[int, Gain]:
    """What having read the facts saves at their answers, in nats a token, by distance.

    Args:
      batch: rows read side by side.
    """

    every = np.concatenate([facts.absent, *facts.planted.values()])
    found = []
    for at in range(0, len(every), batch):
        part = jnp.asarray(every[at : at + batch])
        start = reader.initial_state(params, len(part))
        cost, _ = costs(reader, learn, params, part, start)
        found.append(np.asarray(cost[:, -ANSWER:], np.float64).mean(axis=1))
    absent, *planted = np.split(np.concatenate(found), 1 + len(facts.planted))
    return {
        distance: interval(absent - told)
        for distance, told in zip(facts.planted, planted, strict=True)
    }


def measure(
    row: Row,
    params: PyTree,
    text: Int[np.ndarray, "B T"],
    facts: Facts | None = None,
) -> Measured:
    """One line of the table; see `rows`, `texts` and `plant`.

    The program compiled for the text serves the facts, if their rows are as long.
    """
    if row.learn is None:
        return Measured(row, None, {})
    reader, gains = reader_of(row.model), {}
    readings = read_twice(reader, params, text, row.learn)
    if facts is not None and row.facts:
        gains = ask(reader, params, facts, row.learn, batch=len(text))
    return Measured(row, readings, gains)


def flat(measured: Sequence[Measured]) -> dict[str, float]:
    """The finite numbers under names of a result file: `<row>/<what>`."""
    found = {}
    for row, readings, facts in measured:
        if readings is not None:
            values = {**readings._asdict(), "gain": readings.gain}
            found |= {f"{row.name}/{what}": v for what, v in values.items()}
        for distance, gain in facts.items():
            for what, value in gain._asdict().items():
                found[f"{row.name}/fact at {distance}/{what}"] = value
    return {name: value for name, value in found.items() if math.isfinite(value)}


@functools.partial(jax.jit, static_argnames=("reader", "learn"))
def costs(
    reader: Reader,
    learn: bool | Learning,
    params: PyTree,
    text: Int[Array, "B T"],
    state: PyTree,
) -> tuple[Float[Array, "B S"], PyTree]:
    """The cost of each token but the first, and the state before the last."""
    logits, state = reader.apply(params, text[:, :-1], state, True, learn)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, text[:, 1:, None], axis=-1)[..., 0], state
