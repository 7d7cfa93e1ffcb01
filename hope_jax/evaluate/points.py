"""Memories to compare on recall: products of the four choices, and published ones."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from hope_jax.evaluate.probe import ProbeConfig, model_for
from hope_jax.memory import compose, named
from hope_jax.memory.compose import MemoryConfig
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.memory import MemoryMixerConfig

CHOICES = ("architecture", "bias", "retention", "rule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig(ProbeConfig):
    """What all points share.

    Attributes:
      mixer: the layer and the memory that the four choices of a grid are put into.
        Named points bring their own.
      gradients: tried in this order; a memory has the first that it accepts. Exact
        memories have the chunk as a speed knob, anchored ones as part of the function.

    Raises:
      ValueError: a field out of range.
    """

    mixer: MemoryMixerConfig = MemoryMixerConfig(
        memory=MemoryConfig(dgd="none", chunk=8, expansion=2)
    )
    gradients: tuple[Literal["exact", "anchored"], ...] = ("exact", "anchored")

    def __post_init__(self):
        if not self.gradients:
            raise ValueError("gradients must name 'exact', 'anchored' or both.")
        super().__post_init__()


class Point(NamedTuple):
    """A memory that is compared.

    Attributes:
      name: of it.
      cell: row and column in a heat map, each a group and a name.
      choices: architecture, bias, retention and rule, in words.
      chunk: kind and length of its chunks.
      model: what is trained; None if refused.
      reason: why it is refused.
    """

    name: str
    cell: tuple[tuple[str, str], tuple[str, str]]
    choices: tuple[str, str, str, str]
    chunk: str
    model: ModelConfig | None
    reason: str = ""


def options(choice: str) -> tuple[str, ...]:
    """What there is of one of the four choices; rules also by `optax.<name>`."""
    return tuple(compose.registries()[choice])


def miras(config: GridConfig, choices: Mapping[str, Sequence[str]]) -> list[Point]:
    """Every product of `choices`, those that are refused too."""
    products = itertools.product(*(dict.fromkeys(choices[c]) for c in CHOICES))
    return [_product(config, (a, b, c, d)) for a, b, c, d in products]


def _product(config: GridConfig, choices: tuple[str, str, str, str]) -> Point:
    architecture, bias, retention, rule = choices
    cell = ((architecture, bias), (retention, rule))
    reasons = []
    for gradient in config.gradients:
        try:
            memory = compose.with_choices(
                config.mixer.memory,
                **dict(zip(CHOICES, choices, strict=True)),
                gradient=gradient,
            )
            mixer = dataclasses.replace(config.mixer, memory=memory)
            model = model_for(config, mixer)
        except ValueError as error:
            reasons.append(str(error))
            continue
        chunk = f"{gradient} {memory.chunk}"
        return Point("/".join(choices), cell, choices, chunk, model)
    # Better what the choices lack than that the first gradient is not for them.
    about_choices = [r for r in reasons if not r.startswith("gradient=")]
    reason = (about_choices or reasons)[0]
    return Point("/".join(choices), cell, choices, "", None, reason)


def published(config: GridConfig, names: Sequence[str] = ()) -> list[Point]:
    """The named points, or some of them; their chunks as in `config`.

    Raises:
      ValueError: no such point; lists those that exist.
    """
    names = list(dict.fromkeys(names)) or list(named.POINTS)
    for name in names:
        named.get(name)  # refuses an unknown one
    return [_published(config, name) for name in names]


def _published(config: GridConfig, name: str) -> Point:
    point = named.get(name)
    column = ("", "accuracy")
    if point.memory is None:
        cell = (("non-parametric", name), column)
        return Point(name, cell, ("", "", "", ""), point.chunk, model_for(config, name))
    cell = ((point.memory.architecture, name), column)
    choices = named.choices(point.memory)
    memory = dataclasses.replace(point.memory, chunk=config.mixer.memory.chunk)
    chunk = f"{point.chunk} {memory.chunk}"
    try:
        mixer = dataclasses.replace(config.mixer, memory=memory, gates=point.gates)
        return Point(name, cell, choices, chunk, model_for(config, mixer))
    except ValueError as error:
        return Point(name, cell, choices, chunk, None, str(error))
