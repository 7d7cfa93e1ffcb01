"""Pre-trained weights into models with more levels."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hope_jax.models import lm
from hope_jax.models.cms import CMSLevel
from hope_jax.models.config import ModelConfig


def stack_levels(
    config: ModelConfig,
    params: PyTree,
    levels: Sequence[CMSLevel],
    assignment: Sequence[int] | None = None,
    *,
    extra: Literal["learn", "rest"] = "learn",
) -> tuple[ModelConfig, PyTree]:
    """Gives the MLPs of a trained model clocks of their own, and keeps its function.

    Section 7.3 of arXiv:2512.24695 starts each level at a pre-trained MLP. Here every
    layer keeps its own MLP, as the level it is assigned to. The chain's other places in
    that layer begin as copies of it with a zero output projection, which add nothing
    until they learn. With all rates at 0 the logits are the pre-trained ones, bit for
    bit.

    Args:
      config, params: the pre-trained model, with one MLP a block.
      levels: the new chain, from fast to slow.
      assignment: the index in `levels` of each layer's MLP; by default the first layers
        take the fastest level and the last the slowest, in groups of equal size. With
        the same index for all, each layer's MLP becomes a chain of its copies.
      extra: whether the other places of a layer `learn`, or `rest`: then their kernels
        are zero altogether, no gradient reaches them, and the model stays one MLP a
        layer whatever it is trained on (`unstack_levels`).

    Returns:
      The new model's config and parameters, arrays of the old one where they are kept.
    """
    if extra not in ("learn", "rest"):
        raise ValueError(f"extra must be one of learn, rest, got {extra!r}.")
    if extra == "rest" and config.cms.bias:
        raise ValueError(
            "extra='rest' needs MLPs without bias, whose gradient is never zero, got "
            "config.cms.bias=True; use extra='learn'."
        )
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
        if "down" not in names and (extra == "learn" or "mlp" not in names):
            return source
        part = int(names[at - 2]) if "parts" in names else 0
        layers = place[:, part].reshape(-1, *[1] * (source.ndim - 1))
        mine = layers == int(names[at])
        return jnp.where(mine, source, jnp.zeros_like(source))

    _, fresh = lm.build(stacked, jax.random.key(0))
    return stacked, jax.tree_util.tree_map_with_path(convert, fresh)


def unstack_levels(config: ModelConfig, params: PyTree) -> tuple[ModelConfig, PyTree]:
    """The model without clocks, one MLP a layer, of the same slow weights.

    What `stack_levels` made is taken apart: in each layer the one level is kept whose
    output projection is not zero. Logits are those of a reading in which no level
    moves.

    Args:
      config, params: a model of any number of levels; parameters that can be looked at.

    Returns:
      Config and parameters of one level of infinite period.

    Raises:
      ValueError: a layer has more than one MLP that adds something; names it.
    """
    count = len(config.cms.levels)
    hidden = {level.hidden for level in config.cms.whole}
    if len(hidden) > 1:
        raise ValueError(
            "config.cms.levels must have one hidden width to be one MLP a layer, got "
            f"{sorted(map(str, hidden))}."
        )
    cms = dataclasses.replace(
        config.cms,
        levels=(CMSLevel(period=math.inf),),
        hidden=hidden.pop(),
        rates="learned",
    )
    single = dataclasses.replace(config, cms=cms)
    leaves = {
        _names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    adds = {}  # by what is before `levels`: of each level and layer, whether it adds
    for names, leaf in leaves.items():
        if "mixer" not in names and "levels" in names and "down" in names:
            at = names.index("levels")
            found = adds.setdefault(names[:at], np.zeros((count, len(leaf)), bool))
            each = np.any(np.asarray(leaf), axis=tuple(range(1, leaf.ndim)))
            found[int(names[at + 1])] |= each
    for before, found in adds.items():
        for layer in np.flatnonzero(found.sum(axis=0) > 1):
            part = int(before[-1]) if "parts" in before else 0
            levels = [int(level) for level in np.flatnonzero(found[:, layer])]
            raise ValueError(
                f"params of layer {layer * len(config.pattern) + part} have MLPs in "
                f"levels {levels} whose output projections are not zero, and one MLP a "
                "layer cannot hold them: stack levels with extra='rest', then places "
                "that no MLP was assigned to stay empty in training."
            )

    def kept(path, leaf):
        del leaf
        names = _names(path)
        if count == 1 or "mixer" in names or "levels" not in names:
            return leaves[names]
        at = names.index("levels")
        own = np.argmax(adds[names[:at]], axis=0)  # the first, where none adds
        several = [
            leaves[*names[: at + 1], str(i), *names[at + 2 :]] for i in range(count)
        ]
        return jnp.stack([several[level][i] for i, level in enumerate(own)])

    return single, jax.tree_util.tree_map_with_path(kept, lm.abstract(single))


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
