"""The sequence mixers: a file each, whose config builds it, and a line here.

`ModelConfig.mixer` holds one of them or a pattern of several, chosen by kind: on a
command line `model.mixer=tnt`, then `model.mixer.shard=64`; several are separated by
commas.
"""

from typing import Annotated

from hope_jax.core.config import Kinds
from hope_jax.memory import named
from hope_jax.models.mixers.attention import AttentionConfig, SlidingWindowConfig
from hope_jax.models.mixers.base import MixerConfig
from hope_jax.models.mixers.in_place_ttt import InPlaceTTTConfig
from hope_jax.models.mixers.lstm import LSTMConfig
from hope_jax.models.mixers.memory import MemoryMixerConfig, NamedConfig
from hope_jax.models.mixers.memory_caching import MemoryCachingConfig
from hope_jax.models.mixers.self_modifying import SelfModifyingConfig
from hope_jax.models.mixers.srwm import SRWMConfig
from hope_jax.models.mixers.titans import TitansContextConfig, TitansWindowConfig
from hope_jax.models.mixers.tnt import TNTConfig

MIXERS = Kinds(
    "mixer",
    {
        "self_modifying": SelfModifyingConfig(),
        "attention": AttentionConfig(),
        "memory": MemoryMixerConfig(),
        "titans_mac": TitansContextConfig(),
        "titans_mag": TitansWindowConfig(kind="titans_mag"),
        "titans_mal": TitansWindowConfig(kind="titans_mal"),
        "tnt": TNTConfig(),
        "in_place_ttt": InPlaceTTTConfig(),
        "memory_caching": MemoryCachingConfig(),
        "lstm": LSTMConfig(),
        "srwm": SRWMConfig(),
        **{name: NamedConfig(kind=name) for name in named.memories()},
        "softmax_attention": AttentionConfig(kind="softmax_attention"),
        "sliding_window": SlidingWindowConfig(),
    },
)
Mixer = Annotated[MixerConfig, MIXERS]
