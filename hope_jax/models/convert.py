"""Pre-trained weights into models with more levels."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from hope_jax.models import lm
from hope_jax.models.cms import CMSLevel
from hope_jax.models.config import ModelConfig


def stack_levels(
    config: ModelConfig,
    params: PyTree,
    levels: Sequence[CMSLevel],
    assignment: Sequence[int] | None = None,
) -> tuple[ModelConfig, PyTree]:
    """Gives the MLPs of a trained model clocks of their own, and keeps its function.

    Section 7.3 of arXiv:2512.24695 starts each level at a pre-trained MLP. Here every
    layer keeps its own MLP, as the level it is assigned to; the chain's other places in
    that layer begin with a zero output projection, which adds nothing until it learns.
    With all rates at 0 the logits are the pre-trained ones, bit for bit.

    Args:
      config, params: the pre-trained model, with one MLP a block.
      levels: the new chain, from fast to slow.
      assignment: the index in `levels` of each layer's MLP; by default the first layers
        take the fastest level and the last the slowest, in groups of equal size.

    Returns:
      The new model's config and parameters, arrays of the old one where they are kept.
    """
    if len(config.cms.levels) != 1:
        raise ValueError(
            "config must have one MLP a block to stack levels on, got "
            f"{len(config.cms.levels)} in config.cms.levels."
        )
    count = len(levels)
    if assignment is None:
        assignment = [layer * count // config.layers for layer in range(config.layers)]
    if len(assignment) != config.layers or not all(0 <= a < count for a in assignment):
        raise ValueError(
            f"assignment must name a level in 0..{count - 1} for each of the "
            f"{config.layers} layers, got {list(assignment)}."
        )
    (trained_level,) = config.cms.whole
    cms = dataclasses.replace(
        config.cms, levels=tuple(levels), hidden=trained_level.hidden
    )
    for level in cms.whole:
        if level.hidden != trained_level.hidden:
            raise ValueError(
                f"levels must have the hidden width of the trained MLP, "
                f"{trained_level.hidden}, got {level.hidden}; leave it None."
            )
    stacked = dataclasses.replace(config, cms=cms)

    trained = {
        _names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    place = jnp.asarray(assignment, jnp.int32).reshape(-1, len(config.pattern))

    def convert(path, fresh):
        names = _names(path)
        if "rates" in names or "open" in names:
            return fresh
        if "mixer" in names or "levels" not in names:
            return trained[names]
        at = names.index("levels") + 1
        source = trained[(*names[:at], "0", *names[at + 1 :])]
        if "down" not in names:
            return source
        part = int(names[at - 2]) if "parts" in names else 0
        layers = place[:, part].reshape(-1, *[1] * (source.ndim - 1))
        mine = layers == int(names[at])
        return jnp.where(mine, source, jnp.zeros_like(source))

    _, fresh = lm.build(stacked, jax.random.key(0))
    return stacked, jax.tree_util.tree_map_with_path(convert, fresh)


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
