"""Named sizes: a Hope, a Hope-Attention and a Transformer++ of as many parameters.

Widths and depths of the large models follow Table 6 of ATLAS (arXiv:2505.23735), which
the paper's experiments share, with the MLPs' width set by the parameter count; the
chunks, periods and inner rates are ours, for the paper prints none.
"""

import math
from collections.abc import Callable

from hope_jax.memory.compose import MemoryConfig
from hope_jax.models.block import ModelConfig
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.self_modifying import SelfModifyingConfig

_STATIC = (CMSLevel(period=math.inf),)


def _levels(*periods: int, rate: float) -> tuple[CMSLevel, ...]:
    return tuple(CMSLevel(period=p, rate=rate) for p in periods)


def _family(
    size: str,
    *,
    d_model: int,
    layers: int,
    heads: int,
    vocab: int,
    context: int,
    memory: SelfModifyingConfig,
    levels: tuple[CMSLevel, ...],
    hidden: dict[str, int],
    dtype: str,
) -> dict[str, Callable[[], ModelConfig]]:
    """The three models of one size; `hidden` is the MLP width of each."""

    def model(name, mixer, chain):
        return lambda: ModelConfig(
            name=f"{name}_{size}",
            vocab=vocab,
            d_model=d_model,
            layers=layers,
            heads=heads,
            mixer=mixer,
            context=context,
            memory=memory,
            cms=CMSConfig(levels=chain, hidden=hidden[name]),
            dtype=dtype,
        )

    return {
        f"hope_{size}": model("hope", "self_modifying", levels),
        f"hope_attention_{size}": model("hope_attention", "attention", levels),
        f"transformer_{size}": model("transformer", "attention", _STATIC),
    }


def _large(size: str, d_model: int, layers: int, heads: int, hidden: dict[str, int]):
    return _family(
        size,
        d_model=d_model,
        layers=layers,
        heads=heads,
        vocab=32_000,
        context=4096,
        memory=SelfModifyingConfig(memory=MemoryConfig(chunk=64), projection_chunk=64),
        levels=_levels(256, 1024, 65_536, 1_048_576, rate=0.1),
        hidden=hidden,
        dtype="bfloat16",
    )


_ZOO: dict[str, Callable[[], ModelConfig]] = {
    **_family(
        "tiny",
        d_model=128,
        layers=2,
        heads=4,
        vocab=4096,
        context=256,
        memory=SelfModifyingConfig(
            memory=MemoryConfig(chunk=32, expansion=2), projection_chunk=32
        ),
        levels=_levels(128, 512, 2048, rate=0.1),
        hidden={"hope": 128, "hope_attention": 185, "transformer": 556},
        dtype="float32",
    ),
    **_large(
        "100m", 640, 12, 10, {"hope": 488, "hope_attention": 648, "transformer": 2600}
    ),
    **_large(
        "340m", 1024, 24, 16, {"hope": 568, "hope_attention": 704, "transformer": 2800}
    ),
    **_large(
        "760m", 1536, 24, 16, {"hope": 904, "hope_attention": 1096, "transformer": 4376}
    ),
    **_large(
        "1b3", 2048, 18, 16, {"hope": 1848, "hope_attention": 2104, "transformer": 8432}
    ),
}


def names() -> tuple[str, ...]:
    return tuple(_ZOO)


def get(name: str) -> ModelConfig:
    """The named model. Raises ValueError, with the names there are, for another."""
    if name not in _ZOO:
        raise ValueError(f"no model is named {name!r}; there are {', '.join(_ZOO)}.")
    return _ZOO[name]()
