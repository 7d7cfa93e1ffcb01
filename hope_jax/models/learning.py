"""Who learns while a model reads: switches of its parts, and controls of a sceptic.

`learn=True` lets every part learn, `learn=False` none. A `Learning` says it part by
part. All of it is static: it changes no parameter and no shape of a state.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

_STEPS = (1, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """What a memory that learns should suffer from, and one that does not will not.

    The controls of arXiv:2602.21204 and arXiv:2510.09551, on memories of `memory`.

    Attributes:
      flip: gives every inner rate η the other sign: memories climb what they should
        descend.
      q_is_k: reads with the key instead of the query.
      steps: how often the main memory of a self-modifying layer descends a chunk: 1, 2
        or 4. Later steps start from where the one before ended and forget nothing
        more; what the chunk itself reads is of the first.
    """

    flip: bool = False
    q_is_k: bool = False
    steps: int = 1

    def __post_init__(self):
        if self.steps not in _STEPS:
            raise ValueError(f"steps must be 1, 2 or 4, got {self.steps!r}.")

    def on(self, tokens: Any) -> Any:
        """The tokens of a memory (`memory.compose.Tokens`) under the controls."""
        if self.flip:
            erased = None if tokens.erase_rate is None else -tokens.erase_rate
            tokens = tokens._replace(eta=-tokens.eta, erase_rate=erased)
        if self.q_is_k:  # of a token with several keys, the last
            one = tokens.k.ndim == tokens.q.ndim
            tokens = tokens._replace(q=tokens.k if one else tokens.k[..., -1, :])
        return tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning:
    """Which parts of a model learn while it reads. Accepted wherever `learn` is.

    Attributes:
      main: main memories; of a mixer that modifies nothing of itself, its memories.
      projections: memories that make keys, values, gates and queries.
      consolidation: slower starts of memories (`memory.consolidation`), which move only
        where memories learn.
      levels: one switch a CMS level, fast first; None is all of them.
      controls: of a sceptic.
    """

    main: bool = True
    projections: bool = True
    consolidation: bool = True
    levels: tuple[bool, ...] | None = None
    controls: Controls = Controls()

    @property
    def cms(self) -> bool:
        """Whether any CMS level learns; of what `resolve` gives."""
        return self.levels is None or any(self.levels)


def of(learn: bool | Learning) -> Learning:
    """`learn` as switches of a mixer's parts."""
    if isinstance(learn, Learning):
        return learn
    return Learning(main=learn, projections=learn, consolidation=learn)


def still(tokens: Any) -> Any:
    """Tokens that no memory learns from: nothing written, forgotten or coasting on."""
    erased = tokens.erase_rate
    return tokens._replace(
        erase_rate=None if erased is None else jnp.zeros_like(erased),
        eta=jnp.zeros_like(tokens.eta),
        alpha=jnp.ones_like(tokens.alpha),
        theta=jnp.zeros_like(tokens.theta),
    )


def resolve(config: Any, learn: bool | Learning) -> Learning:
    """The switches of every part of a model; what it has not, or never moves, is off.

    Args:
      config: a `ModelConfig`.
      learn: of `apply`.

    Raises:
      ValueError: switches off, or controls, a part that the model has not; named.
    """
    count = len(config.cms.levels)
    if not isinstance(learn, Learning):
        learn = Learning() if learn else off(config)
    wanted = (True,) * count if learn.levels is None else learn.levels
    if len(wanted) != count:
        raise ValueError(
            f"learn.levels must have one switch for each of the {count} CMS levels, "
            f"got {len(wanted)}."
        )
    for i, on in enumerate(wanted):
        if not on and i not in config.fast:
            raise ValueError(
                f"learn.levels[{i}] is False, but CMS {i + 1} of {config.name!r} never "
                "moves while reading; leave it True."
            )
    if not learn.main and not has_memories(config):
        raise ValueError(
            f"learn.main is False, but {config.name!r} (mixer {config.kinds!r}) has no "
            "memory that learns while reading; leave it True."
        )
    if not learn.projections and not modifies_itself(config):
        raise ValueError(
            f"learn.projections is False, but {config.name!r} (mixer {config.kinds!r}) "
            "has no projections that learn; leave it True."
        )
    if not learn.consolidation and not consolidates(config):
        raise ValueError(
            f"learn.consolidation is False, but {config.name!r} (mixer "
            f"{config.kinds!r}) has no slower starts; leave it True."
        )
    for name, value in dataclasses.asdict(learn.controls).items():
        reason = missing_control(config, name)
        if value != getattr(Controls, name) and reason:
            raise ValueError(f"learn.controls.{name} is {value!r}, but {reason}.")
    return dataclasses.replace(
        learn,
        main=learn.main and has_memories(config),
        projections=learn.projections and modifies_itself(config),
        consolidation=learn.consolidation and consolidates(config),
        levels=tuple(on and i in config.fast for i, on in enumerate(wanted)),
    )


def off(config: Any) -> Learning:
    """Everything that `config` has, switched off: what `learn=False` is."""
    return Learning(
        main=not has_memories(config),
        projections=not modifies_itself(config),
        consolidation=not consolidates(config),
        levels=tuple(i not in config.fast for i in range(len(config.cms.levels))),
    )


def has_memories(config: Any) -> bool:
    """Whether a mixer of the model learns while it reads."""
    return any(part.period > 0 for mixer in config.pattern for part in mixer.parts)


def modifies_itself(config: Any) -> bool:
    """Whether its projections are memories."""
    return any(mixer.modifies_itself for mixer in config.pattern)


def consolidates(config: Any) -> bool:
    """Whether its memories return to starts that move."""
    return any(mixer.starts for mixer in config.pattern)


def missing_control(config: Any, name: str) -> str:
    """Why a field of `Controls` has no meaning for a model; "" if it has one."""
    if not has_memories(config):
        return f"{config.kinds} has no memory that learns while reading"
    for mixer in config.pattern:
        if not mixer.controlled:
            return f"the memories of {mixer.kind} have no controls"
    if name == "steps" and not modifies_itself(config):
        return (
            f"the memories of {config.kinds} take one step a token by their definition"
        )
    return ""
