"""A language model, complete in one config."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hope_jax.core import show
from hope_jax.core.config import at_least, at_most, float32, one_of
from hope_jax.models.cms import CMSConfig
from hope_jax.models.layers import DTYPES
from hope_jax.models.mixers import MIXERS, Mixer
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.models.mixers.base import MixerConfig
from hope_jax.models.mixers.self_modifying import SelfModifyingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model.

    Attributes:
      name: what the zoo calls it.
      vocab: entries of its vocabulary.
      d_model: width of the residual stream, a multiple of `heads` where the mixer has
        no width of a head of its own.
      layers: number of blocks.
      heads: heads of the mixer.
      mixer: a config of `models.mixers.MIXERS`, or its kind for the one it stands for:
        `self_modifying` (Hope), `attention` (Transformer++, Hope-Attention), a memory;
        or several, a pattern which the layers repeat
        (`("gated_delta_net", "sliding_window")`, or the same with commas).
      cms: the chain of MLPs; one level of infinite period is a Transformer block.
      scaled_embedding: whether embeddings are multiplied by the square root of d_model.
      tied_embedding: whether the head is the embedding, or a table of its own.
      norm_epsilon: added to the mean square in the norms of blocks and head.
      dtype: compute type of projections and MLPs; memories stay in float32.
      remat: whether the backward pass recomputes the inside of each layer rather than
        keep it: less memory, for the time of another forward pass.
    """

    name: str = "custom"
    vocab: int = 257
    d_model: int = 128
    layers: int = 2
    heads: int = 4
    mixer: Mixer | tuple[Mixer, ...] = SelfModifyingConfig()
    cms: CMSConfig = CMSConfig()
    scaled_embedding: bool = True
    tied_embedding: bool = True
    norm_epsilon: float = 1e-6
    dtype: str = "float32"
    remat: bool = False

    _repr_html_ = show.config

    def __post_init__(self):
        object.__setattr__(self, "mixer", _mixers(self.mixer))
        at_least(self, vocab=1, d_model=1, layers=1, heads=1)
        whole = 2**31 - 1  # arrays are indexed by int32
        at_most(self, vocab=whole, d_model=whole, layers=2**16, heads=whole)
        float32(self, "norm_epsilon")
        if not self.norm_epsilon > 0:
            raise ValueError(f"norm_epsilon must be positive, got {self.norm_epsilon}.")
        if self.layers % len(self.pattern):
            raise ValueError(
                f"layers ({self.layers}) must be a multiple of the {len(self.pattern)} "
                f"mixers of the pattern {self.kinds!r}."
            )
        one_of(self, dtype=DTYPES)
        for mixer in self.pattern:
            mixer.check_heads(self.d_model, self.heads)

    @classmethod
    def migrated(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Before mixers had configs of their own, `mixer` was a name or several and the
        fields of every mixer stood beside it."""
        beside = {
            "context",
            "window",
            "chunk",
            "memory",
            "associative",
            "titans",
            "tnt",
        }
        if not beside & set(data):
            return data
        named = str(data.get("mixer", "self_modifying")).split(",")
        made = [_from_before(name.strip(), data) for name in named]
        rest = {name: value for name, value in data.items() if name not in beside}
        return rest | {"mixer": made[0] if len(made) == 1 else made}

    @property
    def pattern(self) -> tuple[MixerConfig, ...]:
        """The mixers of consecutive layers, repeated over them all."""
        return self.mixer if isinstance(self.mixer, tuple) else (self.mixer,)

    @property
    def kinds(self) -> str:
        """The names of the mixers, separated by commas."""
        return ",".join(mixer.kind for mixer in self.pattern)

    @property
    def mixer_chunk(self) -> int:
        """Tokens after which every clock of the mixers stands at a boundary."""
        return math.lcm(*(mixer.span for mixer in self.pattern))

    @property
    def stride(self) -> int:
        """As `MixerConfig.stride`, of all mixers together."""
        strides = [mixer.stride for mixer in self.pattern]
        return math.gcd(*strides) if all(strides) else 0

    def bare(self, mixers: Any) -> Any:
        """As `MixerConfig.bare`, of the states of all mixers of a block or group at the
        start of a base chunk: as they are where a mixer is in mid-chunk there."""
        return self._each("bare", mixers)

    def full(self, mixers: Any) -> Any:
        """What `bare` was made of."""
        return self._each("full", mixers)

    def _each(self, what, mixers):
        if not self.nests:
            return mixers
        if len(self.pattern) == 1:
            return getattr(self.pattern[0], what)(mixers)
        pairs = zip(self.pattern, mixers, strict=True)
        return tuple(getattr(mixer, what)(state) for mixer, state in pairs)

    @property
    def fast(self) -> tuple[int, ...]:
        """Indices of the CMS levels that move while reading, fast first."""
        return self.cms.fast

    def within(self, horizon: int | None) -> tuple[int, ...]:
        """Those of `fast` that move before `horizon` tokens are read; None for all."""
        periods = (self.cms.levels[i].period for i in self.fast)
        count = sum(horizon is None or period < horizon for period in periods)
        return self.fast[:count]

    @property
    def fast_periods(self) -> tuple[int, ...]:
        return tuple(int(self.cms.levels[i].period) for i in self.fast)

    @property
    def base_chunk(self) -> int | None:
        """Tokens after which a CMS level may move, the largest that every period is a
        multiple of: where periods nest, the fastest one. None without fast levels."""
        return math.gcd(*self.fast_periods) if self.fast else None

    @property
    def nests(self) -> bool:
        """Whether the mixers stand at a boundary wherever a CMS level may move. Else
        they read base chunks token by token, which is slower, with the same answers."""
        return self.base_chunk is None or self.base_chunk % self.mixer_chunk == 0

    @property
    def span(self) -> int:
        """Tokens after which the mixers stand at a boundary and a CMS level may move:
        there a row may be read in parallel."""
        return math.lcm(self.base_chunk or 1, self.mixer_chunk)

    @property
    def most(self) -> int | None:
        """Most tokens of a row, for which every mixer has room; None for any number."""
        return min((m.most for m in self.pattern if m.most is not None), default=None)

    def check_room(self, what: str, tokens: int) -> None:
        """Refuses a row of more tokens than `most`.

        Raises:
          ValueError: names `what` it is, its tokens and what to do.
        """
        if self.most is not None and tokens > self.most:
            kinds = " and ".join(m.kind for m in self.pattern if m.most == self.most)
            raise ValueError(
                f"{what} ({tokens} tokens) is longer than the {self.most} that {kinds} "
                "has room for: set model.mixer.context higher (no parameter has its "
                "shape), or read less."
            )

    def check_shared(self, tokens: int, devices: int) -> None:
        """Refuses rows of so many tokens that so many devices cannot share, each a
        stretch of them (`hope_jax.models.share`).

        Raises:
          ValueError: says which layer cannot, why and what to do.
        """
        asked = f"sequence:{devices} of train.mesh cuts rows of {tokens} tokens, but"
        if tokens % devices:
            least = tokens // devices * devices
            near = f"{least} or {least + devices}" if least else f"{devices}"
            raise ValueError(
                f"{asked} {devices} must divide them: set train.seq_len={near}."
            )
        periods = [f"{self.cms.levels[i].period:g}" for i in self.within(tokens)]
        if periods:
            raise ValueError(
                f"{asked} model.cms.levels of periods {', '.join(periods)} "
                "move inside a row, which is read chunk after chunk for that: use a "
                "mesh without sequence, or levels of rate 0."
            )
        for i, mixer in enumerate(self.pattern):
            place = f"model.mixer.{i}" if len(self.pattern) > 1 else "model.mixer"
            reason = mixer.unshared(tokens, devices)
            if reason:
                raise ValueError(f"{asked} {place} ({mixer.kind}) {reason}.")


def with_context(config: ModelConfig, context: int) -> ModelConfig:
    """The model whose attention to whole rows looks back over `context` tokens."""
    pattern = tuple(
        dataclasses.replace(mixer, context=context)
        if isinstance(mixer, AttentionConfig)
        else mixer
        for mixer in config.pattern
    )
    return dataclasses.replace(config, mixer=pattern)


def rechunked(config: ModelConfig, factor: float) -> ModelConfig:
    """The model with other chunks of its memories, its parameters as they are.

    Inner rates stay what they were, though their bound may come from the chunk.

    Raises:
      ValueError: the model has no chunk that is part of its function, or none so long.
    """
    mixer, *others = config.pattern
    if others:
        raise ValueError(f"{config.kinds} has no chunk of a memory alone")
    return dataclasses.replace(config, mixer=mixer.rechunked(factor))


def _mixers(given: Any) -> MixerConfig | tuple[MixerConfig, ...]:
    """`given` with names replaced by what they stand for; a pattern of one is that."""
    if isinstance(given, str) and "," in given:
        given = tuple(name.strip() for name in given.split(","))
    several = tuple(given) if isinstance(given, tuple | list) else (given,)
    if not several:
        raise ValueError("mixer must name at least one mixer, got none.")
    made = tuple(MIXERS.of(one, "mixer") for one in several)
    for one in made:
        if not isinstance(one, MixerConfig):
            raise ValueError(
                f"mixer must be the name or the config of a mixer, got {one!r}."
            )
    return made[0] if len(made) == 1 else made


def _from_before(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a mixer, as JSON, from the fields that it had in the model's."""
    match kind:
        case "self_modifying":
            fields = data.get("memory", {})
        case "memory":
            fields = data.get("associative", {})
        case "attention" | "softmax_attention":
            fields = {"context": data.get("context", 256)}
        case "sliding_window":
            fields = {"window": data.get("window", 64)}
        case "titans_mac" | "titans_mag" | "titans_mal":
            unread = "window" if kind == "titans_mac" else "segment"
            fields = {k: v for k, v in data.get("titans", {}).items() if k != unread}
        case "tnt":
            fields = data.get("tnt", {})
        case _:
            fields = {"chunk": data.get("chunk")}
    return {"kind": kind, **fields}
