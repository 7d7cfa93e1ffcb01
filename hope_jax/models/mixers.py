"""One door from a mixer's name to its module, its clocks and what it says of itself.

A mixer is softmax attention, the self-modifying memory, a published memory of
`memory.named` under its name there, `memory`, any four choices, or a layer of several
parts: Titans with attention, TNT's hierarchy.
"""

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from flax import nnx

from hope_jax.core.system import Edge
from hope_jax.memory import named
from hope_jax.memory.compose import MemoryConfig
from hope_jax.models.attention import Attention
from hope_jax.models.layers import DTYPES
from hope_jax.models.memory_mixer import MemoryMixer, MemoryMixerConfig
from hope_jax.models.self_modifying import SelfModifyingTitans
from hope_jax.models.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from hope_jax.models.tnt import TNT

if TYPE_CHECKING:  # the config asks this file what its mixers need
    from hope_jax.models.block import ModelConfig


class Part(NamedTuple):
    """One level of a mixer, for the picture of the model it is in.

    Attributes:
      name: of its box.
      period: tokens between two moves; 0 is non-parametric.
      objective, rule: what it descends, and how, in words.
      start: path, inside the mixer, of the parameters that are its initial state; ""
        without any.
      share: how many parts start there.
    """

    name: str
    period: int
    objective: str
    rule: str
    start: str = ""
    share: int = 1


class Mixer(NamedTuple):
    """A sequence mixer of one model.

    Attributes:
      build: `rngs -> module`, with `y, state = module(x, state, aligned=, learn=)` and
        `initial_state(rows)`.
      chunk: tokens after which all its clocks stand at a boundary.
      parts: its levels.
      ends: names of the parts whose answers leave it.
      edges: what passes between its parts.
      even: whether the width of a head must be even, for rotary positions.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    chunk: int
    parts: tuple[Part, ...]
    ends: tuple[str, ...]
    edges: tuple[Edge, ...] = ()
    even: bool = False


def names() -> tuple[str, ...]:
    """Every mixer there is."""
    return (*_MIXERS, *named.POINTS)


def get(name: str, config: "ModelConfig") -> Mixer:
    """The mixer `name`, in the sizes of `config`.

    Raises:
      ValueError: no mixer is called so; the message names those there are.
    """
    if name in _MIXERS:
        return _MIXERS[name](config)
    if name in named.POINTS:
        return _point(name, config)
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"mixer must be one of {', '.join(names())}, or several of them separated by "
        f"commas, got {name!r}.{hint}"
    )


def takes_chunk(name: str) -> bool:
    """Whether `ModelConfig.chunk` is a mixer's own chunk."""
    return name in named.POINTS and named.get(name).memory is not None


def _module(config, kind, *arguments):
    sizes = (config.d_model, config.heads, *arguments, DTYPES[config.dtype])
    return lambda rngs: kind(*sizes, rngs=rngs)


def _self_modifying(config):
    layer = config.memory
    memory, words = layer.memory, {"k": "key", "v": "value", "q": "query"}
    words |= {"eta": "rate", "alpha": "retention"}
    recall = "recall of {}" if memory.bias == "l2" else "dot with {}"
    own = recall.format("values" if layer.targets == "none" else "own values")
    stored = recall.format("own values" if layer.targets == "all" else "values")
    rule = "DGD" if memory.dgd != "none" else "GD"
    rule += f" + {memory.rule}" if memory.rule != "gd" else ""
    main = Part("main memory", memory.chunk, stored, rule, "main_start")
    made = [
        Part(
            f"{words[projection]} memory",
            layer.projection_chunk,
            own,
            rule,
            start="projection_start",
            share=len(layer.projections),
        )
        for projection in layer.projections
    ]
    return Mixer(
        _module(config, SelfModifyingTitans, layer),
        layer.projection_chunk,
        parts=(*made, main),
        ends=(main.name,),
        edges=tuple(Edge(part.name, main.name, "generate") for part in made),
    )


def _attention(config, name, window):
    part = _softmax(name)
    build = _module(config, Attention, window)
    return Mixer(build, 1, parts=(part,), ends=(part.name,), even=True)


def _softmax(name: str) -> Part:
    return Part(name, 0, "regression on values", "softmax")


def _memory(config, name, layer: MemoryMixerConfig):
    part = _recalling(name, layer.memory, "start")
    return Mixer(
        _module(config, MemoryMixer, layer),
        part.period,
        parts=(part,),
        ends=(part.name,),
        even=layer.gates.rotary,
    )


def _recalling(name: str, memory: MemoryConfig, start: str) -> Part:
    """A memory of `memory.compose`; that of an exact one moves at every token."""
    _, bias, _, rule = named.choices(memory)
    period = 1 if memory.gradient == "exact" else memory.chunk
    return Part(name, period, f"{bias} with values", rule, start)


def _titans(config, name, kind):
    layer = config.titans
    memory = _recalling(f"{name} memory", layer.memory, "memory.start")
    attention = _softmax(f"{name} attention")
    reads = Edge(memory.name, attention.name, "generate")
    writes = Edge(attention.name, memory.name, "attend")
    edges = {"MAC": (reads, writes), "MAG": (), "MAL": (reads,)}
    ends = (attention.name,) if name == "MAL" else (memory.name, attention.name)
    return Mixer(
        _module(config, kind, layer),
        layer.segment if name == "MAC" else memory.period,
        parts=(memory, attention),
        ends=ends,
        edges=edges[name],
        even=True,
    )


def _tnt(config):
    layer = config.tnt
    locals_ = (f"TNT local memory {i + 1}" for i in range(len(layer.local_chunks)))
    parts = tuple(
        _recalling(name, memory, f"starts.{i}")
        for i, (name, memory) in enumerate(
            zip(("TNT global memory", *locals_), layer.memories, strict=True)
        )
    )
    ends = tuple(part.name for part in parts)
    return Mixer(_module(config, TNT, layer), layer.span, parts, ends)


def _point(name, config):
    if not takes_chunk(name):
        window = config.window if name == "sliding_window" else config.context
        return _attention(config, name.replace("_", " "), window)
    point = named.get(name, config.chunk)
    layer = MemoryMixerConfig(memory=point.memory, gates=point.gates)
    return _memory(config, f"{point.title} memory", layer)


_MIXERS: dict[str, Callable[["ModelConfig"], Mixer]] = {
    "self_modifying": _self_modifying,
    "attention": lambda c: _attention(c, "attention", c.context),
    "memory": lambda c: _memory(c, "memory", c.associative),
    "titans_mac": lambda c: _titans(c, "MAC", MemoryAsContext),
    "titans_mag": lambda c: _titans(c, "MAG", MemoryAsGate),
    "titans_mal": lambda c: _titans(c, "MAL", MemoryAsLayer),
    "tnt": _tnt,
}
