"""Named sizes: every mixer in language models of as many parameters.

Widths and depths of the large models follow Table 6 of ATLAS (arXiv:2505.23735), which
the paper's experiments share, with the MLPs' width set by the parameter count; the
chunks, periods and inner rates are ours, for the paper prints none.
"""

import dataclasses

from hope_jax.core.config import did_you_mean
from hope_jax.memory import named
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.attention import AttentionConfig, SlidingWindowConfig
from hope_jax.models.mixers.base import MixerConfig
from hope_jax.models.mixers.in_place_ttt import InPlaceTTTConfig
from hope_jax.models.mixers.memory_caching import MemoryCachingConfig
from hope_jax.models.mixers.self_modifying import MATRIX, MLP, SelfModifyingConfig
from hope_jax.models.mixers.titans import TitansContextConfig, TitansWindowConfig
from hope_jax.models.mixers.tnt import TNTConfig

# A self-modifying layer says how long the moves of its CMS levels are: ahead of rates
# learned alone in `experiments/twins.py`.
_FAMILIES = {  # name -> its mixer, and whether its MLPs are levels of several clocks
    "hope": ("self_modifying", True),
    "hope_matrix": ("self_modifying", True),
    "hope_attention": ("attention", True),
    "transformer": ("attention", False),
}
_LEAST_WIDTH = 8  # of a head


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Size:
    """What the models of one size share.

    Attributes:
      shared: all but the mixer and the chain of MLPs.
      mixers: those that are not what their name alone stands for.
      levels: the clocks of a chain of several.
      hidden: the MLP width of each family.
    """

    shared: ModelConfig
    mixers: tuple[MixerConfig, ...]
    levels: tuple[CMSLevel, ...]
    hidden: dict[str, int]

    def model(self, family: str, name: str) -> ModelConfig:
        kind, several = _FAMILIES[family]
        levels = self.levels if several else CMSConfig().levels
        rates = "generated" if kind == "self_modifying" else "learned"
        cms = CMSConfig(levels=levels, hidden=self.hidden[family], rates=rates)
        mixer = self.mixer(kind)
        if family == "hope_matrix":
            assert isinstance(mixer, SelfModifyingConfig)
            matrix = dataclasses.replace(MATRIX, chunk=mixer.memory.chunk)
            mixer = dataclasses.replace(mixer, memory=matrix)
        # The memories of a self-modifying layer see to that chunk by chunk.
        remat = self.shared.remat and kind != "self_modifying"
        return dataclasses.replace(
            self.shared, name=name, mixer=mixer, cms=cms, remat=remat
        )

    def mixer(self, kind: str) -> MixerConfig:
        """The mixer of a kind at this size."""
        mine = {mixer.kind: mixer for mixer in self.mixers}
        return mine.get(kind) or MIXERS.get(kind)


def _levels(*periods: int, rate: float) -> tuple[CMSLevel, ...]:
    return tuple(CMSLevel(period=p, rate=rate) for p in periods)


def _large(d_model: int, layers: int, heads: int, **hidden: int) -> _Size:
    titans = named.get("titans").memory
    assert titans is not None
    return _Size(
        shared=ModelConfig(
            d_model=d_model,
            layers=layers,
            heads=heads,
            vocab=32_000,
            dtype="bfloat16",
            remat=True,
        ),
        mixers=(
            SelfModifyingConfig(
                memory=dataclasses.replace(MLP, chunk=64), projection_chunk=64
            ),
            AttentionConfig(context=4096),
            AttentionConfig(kind="softmax_attention", context=4096),
            SlidingWindowConfig(window=1024),
            TitansContextConfig(memory=titans, segment=512),
            *(
                TitansWindowConfig(kind=kind, memory=titans, window=1024)
                for kind in ("titans_mag", "titans_mal")
            ),
            TNTConfig(global_chunk=2048, shard=2048),
            InPlaceTTTConfig(chunk=512),
            MemoryCachingConfig(memory=titans, segment=256, context=4096),
        ),
        levels=_levels(256, 1024, 65_536, 1_048_576, rate=0.1),
        hidden=hidden,
    )


_SIZES: dict[str, _Size] = {
    "tiny": _Size(
        shared=ModelConfig(d_model=128, layers=2, heads=4, vocab=4096),
        mixers=(
            SelfModifyingConfig(
                memory=dataclasses.replace(MLP, chunk=32, expansion=2),
                projection_chunk=32,
            ),
        ),
        levels=_levels(128, 512, 2048, rate=0.1),
        hidden={
            "hope": 80,
            "hope_matrix": 136,
            "hope_attention": 185,
            "transformer": 556,
        },
    ),
    "100m": _large(
        640, 12, 10, hope=328, hope_matrix=512, hope_attention=648, transformer=2600
    ),
    "340m": _large(
        1024, 24, 16, hope=312, hope_matrix=504, hope_attention=704, transformer=2800
    ),
    "760m": _large(
        1536, 24, 16, hope=520, hope_matrix=800, hope_attention=1096, transformer=4376
    ),
    "1b3": _large(
        2048, 18, 16, hope=1336, hope_matrix=1712, hope_attention=2104, transformer=8432
    ),
}


def names() -> tuple[str, ...]:
    """Every family and every mixer at every size; nothing is built."""
    return tuple(
        f"{family}_{size}" for size in _SIZES for family in (*_FAMILIES, *MIXERS)
    )


def get(name: str) -> ModelConfig:
    """The model of a name: `hope_tiny`, `titans_340m`.

    A mixer's model is `transformer_<size>` with that mixer, its MLPs narrowed until it
    has as many parameters; where a memory alone is too large for that (feature maps of
    the second degree), with twice or four times the heads. A pattern of mixers is a
    name too: `mamba2,sliding_window_100m`.

    Raises:
      ValueError: no such model; the message says which there are.
    """
    family, _, size = name.rpartition("_")
    pattern = [mixer.strip() for mixer in family.split(",")]
    known = family in _FAMILIES or set(pattern) <= set(MIXERS)
    if size not in _SIZES or not known:
        raise ValueError(
            f"no model is named {name!r}.{did_you_mean(name, names())} A name is a "
            f"family or a mixer, and a size: {', '.join(_FAMILIES)}, "
            f"{', '.join(MIXERS)}; {', '.join(_SIZES)}."
        )
    if family in _FAMILIES:
        return _SIZES[size].model(family, name)
    twin = _SIZES[size].model("transformer", name)
    target = lm.count_parameters(twin)
    mixer = tuple(_SIZES[size].mixer(kind) for kind in pattern)
    config = dataclasses.replace(twin, mixer=mixer)
    while True:
        try:
            return matched(config, target)[0]
        except ValueError:
            narrower = dataclasses.replace(config, heads=2 * config.heads)
            if narrower.d_model // narrower.heads < _LEAST_WIDTH:
                raise
            config = narrower


def matched(
    config: ModelConfig, parameters: int, tolerance: float = 0.02
) -> tuple[ModelConfig, dict[str, tuple[int, int]]]:
    """`config` with the MLP width that gives it `parameters`, and what that changed.

    Only `cms.hidden` changes, the width of levels that have none of their own, to a
    multiple of 8 where one is near enough. Nothing is built.

    Args:
      config: any model.
      parameters: how many it is to have.
      tolerance: how far from them it may be, as a fraction.

    Returns:
      The model, and `{field: (before, after)}` of what changed: `cms.hidden` and the
      count, `parameters`; empty where nothing did.

    Raises:
      ValueError: no width comes near enough; the message names the nearest count.

    >>> small = ModelConfig(mixer="attention", cms=CMSConfig(hidden=100))
    >>> matched(small, 300_000)[1]
    {'cms.hidden': (100, 176), 'parameters': (241408, 299776)}
    """
    if parameters < 1:
        raise ValueError(f"parameters must be at least 1, got {parameters}.")
    if tolerance < 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}.")
    before = lm.count_parameters(config)
    shared = sum(level.hidden is None for level in config.cms.levels)
    if not shared:
        raise ValueError(
            "config.cms.levels have hidden widths of their own, so none is left to "
            "choose; leave that of one level at least None."
        )
    each = (3 * config.d_model + 2 * config.cms.bias) * config.layers * shared
    wanted = config.cms.hidden + (parameters - before) / each

    def count(hidden):
        return before + each * (hidden - config.cms.hidden)

    def near(hidden):
        return abs(count(hidden) - parameters) <= tolerance * parameters

    nearest = max(1, round(wanted))
    if nearest == config.cms.hidden and near(nearest):
        return config, {}
    for hidden in (8 * round(wanted / 8), nearest):
        if hidden >= 1 and near(hidden):
            cms = dataclasses.replace(config.cms, hidden=hidden)
            changes = {"cms.hidden": (config.cms.hidden, hidden)}
            changes["parameters"] = (before, count(hidden))
            return dataclasses.replace(config, cms=cms), changes
    raise ValueError(
        f"parameters ({parameters}) cannot be reached by the MLPs of {config.kinds!r} "
        f"within {tolerance:.1%}: the nearest count is {count(nearest)}, with "
        f"cms.hidden={nearest}. Change d_model, layers or heads."
    )
