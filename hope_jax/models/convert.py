"""Pre-trained weights into models with more levels."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from hope_jax.models import lm
from hope_jax.models.cms import CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.optim.leaves import path_names


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
    bit. `copy_levels` is the other reading of that section.

    Args:
      config, params: the pre-trained model, with one MLP a block.
      levels: the new chain, from fast to slow.
      assignment: the index in `levels` of each layer's MLP; by default the first layers
        take the fastest level and the last the slowest, in groups of equal size.
      extra: whether the other places of a layer `learn`, or `rest`: then their kernels
        are zero altogether, no gradient reaches them, and the model stays one MLP a
        layer whatever it is trained on (`unstack_levels`).

    Returns:
      The new model's config and parameters, arrays of the old one where they are kept.

    Raises:
      ValueError: a model of several MLPs a block, levels of another width, or what
        cannot be assigned.
    """
    if extra not in ("learn", "rest"):
        raise ValueError(f"extra must be one of learn, rest, got {extra!r}.")
    if extra == "rest" and config.cms.bias:
        raise ValueError(
            "extra='rest' needs MLPs without bias, whose gradient is never zero, got "
            "config.cms.bias=True; use extra='learn'."
        )
    if config.cms.order == "independent":
        raise ValueError(
            "config.cms.order must be that of a chain, got 'independent', which adds "
            "what a layer's levels say side by side: use copy_levels."
        )
    count = len(levels)
    if assignment is None:
        assignment = [layer * count // config.layers for layer in range(config.layers)]
    if len(assignment) != config.layers or not all(0 <= a < count for a in assignment):
        raise ValueError(
            f"assignment must name a level in 0..{count - 1} for each of the "
            f"{config.layers} layers, got {list(assignment)}."
        )
    place = np.asarray(assignment).reshape(-1, len(config.pattern))

    def placed(names, source):
        at = names.index("levels") + 1
        if "down" not in names and (extra == "learn" or "mlp" not in names):
            return source
        part = int(names[at - 2]) if "parts" in names else 0
        mine = jnp.asarray(place[:, part] == int(names[at]))
        mine = mine.reshape(-1, *[1] * (source.ndim - 1))
        return jnp.where(mine, source, jnp.zeros_like(source))

    return _leveled(config, params, levels, {"order": config.cms.order}, placed)


def copy_levels(
    config: ModelConfig,
    params: PyTree,
    levels: Sequence[CMSLevel],
    *,
    mixing: Literal["mean", "learned", "gated", "routed"] = "mean",
    top_k: int = 2,
) -> tuple[ModelConfig, PyTree]:
    """Makes each MLP of a trained model as many copies of itself as there are levels,
    side by side, and keeps its function.

    The second reading of section 7.3 of arXiv:2512.24695: every level of every layer
    starts at that layer's pre-trained MLP. A layer adds a mean of what its levels say
    (`cms.order="independent"`, equation 74), which of equal ones is what each says: a
    chain of copies would be another function. With all rates at 0 the logits are the
    pre-trained ones, bit for bit.

    Args:
      config, params: the pre-trained model, with one MLP a block.
      levels: from fast to slow.
      mixing, top_k: as of `CMSConfig`; weights and gates begin as those of a new model.

    Returns:
      As `stack_levels`.

    Raises:
      ValueError: a model of several MLPs a block, or levels of another width.
    """
    independent = dict(order="independent", mixing=mixing, top_k=top_k)
    return _leveled(config, params, levels, independent, lambda names, source: source)


def _leveled(config, params, levels, how, placed):
    """A model of one MLP a block with `levels`, put together as `how` says, fields of
    its continuum memory; `placed(names, source)` is what a parameter of a level starts
    at, of the trained one's."""
    if len(config.cms.levels) != 1:
        raise ValueError(
            "config must have one MLP a block to stack levels on, got "
            f"{len(config.cms.levels)} in config.cms.levels."
        )
    (trained_level,) = config.cms.whole
    cms = dataclasses.replace(
        config.cms, levels=tuple(levels), hidden=trained_level.hidden, **how
    )
    for level in cms.whole:
        if level.hidden != trained_level.hidden:
            raise ValueError(
                f"levels must have the hidden width of the trained MLP, "
                f"{trained_level.hidden}, got {level.hidden}; leave it None."
            )
    leveled = dataclasses.replace(config, cms=cms)
    trained = _by_name(params)

    def convert(path, leaf):
        names = path_names(path)
        if "rates" in names:
            return lm.first_rates(leveled)
        if "open" in names or _mixes(names):  # every factor is 1, all weights equal
            return jnp.zeros(leaf.shape, leaf.dtype)
        if "mixer" in names or "levels" not in names:
            return trained[names]
        at = names.index("levels") + 1
        return placed(names, trained[(*names[:at], "0", *names[at + 1 :])])

    return leveled, jax.tree_util.tree_map_with_path(convert, lm.abstract(leveled))


def unstack_levels(config: ModelConfig, params: PyTree) -> tuple[ModelConfig, PyTree]:
    """The model without clocks, one MLP a layer, of the same slow weights.

    What `stack_levels` made is taken apart: in each layer the one level is kept whose
    output projection is not zero; of what `copy_levels` made one copy, while they are
    equal and their weights add up to 1. Logits are those of a reading in which no level
    moves.

    Args:
      config, params: a model of any number of levels; parameters that can be looked at.

    Returns:
      Config and parameters of one level of infinite period.

    Raises:
      ValueError: a layer has more than one MLP that adds something, or copies that are
        no longer equal or as one; names them.
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
        order="fast_to_slow",
        mixing="mean",
        top_k=2,
        rates="learned",
    )
    single = dataclasses.replace(config, cms=cms)
    leaves = _by_name(params)
    adds = {}
    if config.cms.order == "independent":
        _check_copies(leaves)
    elif count > 1:
        adds = _adding(config, leaves)

    def kept(path, leaf):
        del leaf
        names = path_names(path)
        if not adds or "mixer" in names or "levels" not in names:
            return leaves[names]
        at = names.index("levels")
        own = np.argmax(adds[names[:at]], axis=0)  # the first, where none adds
        several = [
            leaves[*names[: at + 1], str(i), *names[at + 2 :]] for i in range(count)
        ]
        return jnp.stack([several[level][i] for i, level in enumerate(own)])

    return single, jax.tree_util.tree_map_with_path(kept, lm.abstract(single))


def _adding(config, leaves) -> dict[tuple[str, ...], np.ndarray]:
    """Whether each level of each layer adds something, bool[levels, layers], by what
    is before `levels` in the names of parameters; one of a layer at most."""
    adds = {}
    for names, leaf in leaves.items():
        if "mixer" not in names and "levels" in names and "down" in names:
            at = names.index("levels")
            empty = np.zeros((len(config.cms.levels), len(leaf)), bool)
            found = adds.setdefault(names[:at], empty)
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
    return adds


def _check_copies(leaves) -> None:
    """Refuses levels that are not all equal, or that together are not one of them."""
    for names, leaf in leaves.items():
        if _mixes(names) and "shares" in names:
            total = 1 + np.sum(np.asarray(leaf, np.float64), axis=-1)
            if np.any(total != 1):
                raise ValueError(
                    f"params {'.'.join(names)} give the levels of a layer weights of "
                    f"{total.tolist()} together, and one MLP a layer has one of 1: the "
                    "weights have learned."
                )
        if "mixer" in names or "levels" not in names:
            continue
        at = names.index("levels") + 1
        first = leaves[*names[:at], "0", *names[at + 1 :]]
        if not np.array_equal(np.asarray(leaf), np.asarray(first)):
            raise ValueError(
                f"params {'.'.join(names)} are no longer those of level 0: the copies "
                "have learned, and one MLP a layer cannot hold them. Only levels of "
                "`stack_levels` stay one MLP a layer in training."
            )


def _mixes(names) -> bool:
    """Whether this is a weight or a gate of independent levels."""
    return "mix" in names and "mixer" not in names


def _by_name(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_names(path): leaf for path, leaf in leaves}


def add_level(
    config: ModelConfig, params: PyTree, level: CMSLevel, key: Array
) -> tuple[ModelConfig, PyTree]:
    """One more level in the chain, which adds nothing until it learns.

    It stands where its period belongs, after those of the same period; its MLP is drawn
    as that of a new model, with a zero output projection.

    Args:
      config, params: a trained model, whose levels are a chain, or are independent with
        `learned` weights: then the others keep theirs.
      level: the new one.
      key: decides its MLP.

    Returns:
      The new model's config and parameters. Logits are the same while the level has not
      learned, those of its other levels' moves among them.

    Raises:
      ValueError: independent levels whose weights add up to 1.
    """
    levels = list(config.cms.levels)
    at = sum(level.period >= other.period for other in levels)
    sources: list[int | None] = list(range(len(levels)))
    levels.insert(at, level)
    sources.insert(at, None)
    return _rearranged(config, params, levels, sources, empty={at}, key=key)


def split_level(
    config: ModelConfig, params: PyTree, index: int, faster: CMSLevel, slower: CMSLevel
) -> tuple[ModelConfig, PyTree]:
    """Two levels in place of one: what it knows goes to the slower of them.

    The faster begins as a copy with a zero output projection, which adds nothing until
    it learns.

    Args:
      config, params: a trained model, as of `add_level`.
      index: of the level, in `config.cms.levels`.
      faster, slower: what it becomes, with clocks of their own.

    Returns:
      As `add_level`.

    Raises:
      ValueError: as `add_level`, no such level, or clocks out of order.
    """
    levels = list(config.cms.levels)
    _check_index(config, index)
    sources: list[int | None] = list(range(len(levels)))
    levels[index : index + 1] = [faster, slower]
    sources.insert(index, index)
    return _rearranged(config, params, levels, sources, empty={index})


def remove_level(
    config: ModelConfig, params: PyTree, index: int, *, forget: bool = False
) -> tuple[ModelConfig, PyTree]:
    """The chain without one of its levels.

    Args:
      config, params: a trained model, as of `add_level`.
      index: of the level, in `config.cms.levels`.
      forget: whether a level may be removed that adds something, which is then lost.

    Returns:
      Config and parameters of the others.

    Raises:
      ValueError: as `split_level`, the only level, or one that adds something.
    """
    _check_index(config, index)
    levels = list(config.cms.levels)
    if len(levels) == 1:
        raise ValueError("config.cms.levels has one level, and a chain needs one.")
    adds = [
        np.any(np.asarray(leaf))
        for names, leaf in _by_name(params).items()
        if _level_of(names) == index and "down" in names
    ]
    if any(adds) and not forget:
        raise ValueError(
            f"level {index} adds something in {sum(adds)} of its {len(adds)} output "
            "projections: the model would be another one without. To give it up say "
            "forget=True."
        )
    sources: list[int | None] = list(range(len(levels)))
    del levels[index], sources[index]
    return _rearranged(config, params, levels, sources)


def freeze_level(
    config: ModelConfig, params: PyTree, index: int
) -> tuple[ModelConfig, PyTree]:
    """The model with a level that no longer moves while reading; its MLP stays, and is
    learned between sequences alone.

    Args:
      config, params: a trained model.
      index: of the level, in `config.cms.levels`.

    Raises:
      ValueError: no such level.
    """
    _check_index(config, index)
    levels = list(config.cms.levels)
    levels[index] = dataclasses.replace(levels[index], rate=0.0, truncate=None)
    return _rearranged(config, params, levels, list(range(len(levels))), chain=False)


def _check_index(config, index):
    if not 0 <= index < len(config.cms.levels):
        raise ValueError(
            f"index must be of config.cms.levels, 0..{len(config.cms.levels) - 1}, got "
            f"{index}."
        )


def _level_of(names) -> int | None:
    """The level whose parameter this is; None of others."""
    if "mixer" in names or "levels" not in names:
        return None
    return int(names[names.index("levels") + 1])


def _rearranged(config, params, levels, sources, empty=(), key=None, chain=True):
    """A model of other `levels`, each with the MLP of the level in `sources`, or a new
    one; those that are `empty` have a zero output projection."""
    independent = config.cms.order == "independent"
    if chain and independent and config.cms.mixing != "learned":
        raise ValueError(
            "config.cms.order must be that of a chain, got 'independent' with mixing="
            f"{config.cms.mixing!r}, whose weights of a layer's levels add up to 1: "
            "with one more or less they are others. mixing='learned' can keep them."
        )
    rates = config.cms.rates
    if not any(level.rate > 0 and level.period != math.inf for level in levels):
        rates = "learned"  # none is left to be ruled
    cms = dataclasses.replace(config.cms, levels=tuple(levels), rates=rates)
    made = dataclasses.replace(config, cms=cms)
    trained = _by_name(params)
    fresh = {} if key is None else _by_name(lm.build(made, key)[1])
    # Where each level that moves was among those that moved, if it did.
    before = [
        config.fast.index(sources[i])
        if i not in empty and sources[i] in config.fast
        else None
        for i in made.fast
    ]

    def column(start, old):
        """`start` with what was learned of levels that are still there, last axis."""
        for new, was in enumerate(before):
            if was is not None:
                start = start.at[..., new].set(old[..., was])
        return start

    def convert(path, leaf):
        names = path_names(path)
        if "rates" in names:
            return column(lm.first_rates(made), trained.get(names))
        if "open" in names:  # a new factor is 1 at the start
            return column(jnp.zeros(leaf.shape, leaf.dtype), trained[names])
        if _mixes(names) and "shares" in names:
            # 1 / levels + share is what stays; a new level's is that of a new model.
            old, now = trained[names], jnp.zeros(leaf.shape, leaf.dtype)
            apart = 1 / len(config.cms.levels) - 1 / len(levels)
            for new, source in enumerate(sources):
                if source is not None and new not in empty:
                    now = now.at[..., new].set(old[..., source] + apart)
            return now
        level = _level_of(names)
        if level is None:
            return trained[names]
        source, at = sources[level], names.index("levels") + 1
        if source is None:
            value = fresh[names]
        else:
            value = trained[(*names[:at], str(source), *names[at + 1 :])]
        return jnp.zeros_like(value) if level in empty and "down" in names else value

    return made, jax.tree_util.tree_map_with_path(convert, lm.abstract(made))
