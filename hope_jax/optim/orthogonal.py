"""Orthogonal factors of a whole tree at once, and AdaMuon, which scales them.

Muon itself is `optax.contrib.muon`; what is here serves AdaMuon and M3 (`rules/m3.py`).
A matrix is the last two axes of a leaf, whatever is stacked before them.
"""

import collections
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from hope_jax.kernels.newton_schulz import orthogonalise
from hope_jax.optim.leaves import guarded, like, wide, zeros

RMS = 0.2  # of an update, about AdamW's, so that learning rates carry over


class AdaMuonState(NamedTuple):
    """Averages, in float32 or wider: of gradients, and of squared factors."""

    memory: PyTree
    second: PyTree


def orthogonalise_tree(
    tree: PyTree,
    steps: int = 5,
    dtype: jnp.dtype | None = None,
    *,
    mesh: Mesh | None = None,
) -> PyTree:
    """The orthogonal factor `U Vᵀ` of every matrix of a tree, by Newton-Schulz.

    All matrices of one shape, also after transposition, are one batch of one call of
    `hope_jax.kernels.newton_schulz.orthogonalise`, which states the band of singular
    values. Each is divided by its largest entry first, so that factors depend on the
    scale of a matrix in no range of float32; zero gives zero.

    Args:
      tree: floating point leaves `[..., M, N]`, each a stack of matrices.
      steps: of Newton-Schulz.
      dtype: of the factors of its products. By default bfloat16 on an accelerator, and
        the type of the leaves, at least float32, on the CPU, which has no bfloat16.
      mesh: cut each batch over all devices of it, where otherwise every device of a
        data-parallel program would repeat the work on all matrices.

    Returns:
      The factors, a tree of the same shapes and types.

    >>> tree = {"a": 1e-20 * jnp.eye(2), "b": jnp.zeros((3, 2, 4))}
    >>> factors = orthogonalise_tree(tree)
    >>> 0.6 < float(factors["a"][0, 0]) < 1.3, float(factors["b"].sum())
    (True, 0.0)
    """
    check_matrices(tree)
    on_cpu = jax.default_backend() == "cpu"
    if dtype is None and not on_cpu:
        dtype = jnp.dtype(jnp.bfloat16)

    def factor_of(batch):
        return orthogonalise(batch, steps, dtype=dtype)

    leaves, structure = jax.tree.flatten(tree)
    batches = collections.defaultdict(list)
    for place, leaf in enumerate(leaves):
        batches[(*sorted(leaf.shape[-2:]), wide(leaf).dtype)].append(place)
    factors = list(leaves)
    for places in batches.values():
        lying = [_lying(leaves[place]) for place in places]
        batch = _unit(jnp.concatenate(lying))
        count = len(batch)
        if mesh is not None:
            batch = jnp.pad(batch, ((0, -count % mesh.size), (0, 0), (0, 0)))
            batch = jax.lax.with_sharding_constraint(
                batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            )
        if on_cpu and mesh is None:  # one after another they stay in its caches
            batch = jax.lax.map(factor_of, batch)
        else:
            batch = factor_of(batch)
        start = 0
        for place, part in zip(places, lying, strict=True):
            leaf, end = leaves[place], start + len(part)
            factor = batch[start:end]
            start = end
            if leaf.shape[-2] > leaf.shape[-1]:
                factor = factor.mT
            factors[place] = factor.reshape(leaf.shape).astype(leaf.dtype)
    return structure.unflatten(factors)


@guarded
def scale_by_adamuon(
    *,
    decay: float = 0.95,
    beta2: float = 0.95,
    eps: float = 1e-8,
    sign: bool = True,
    ns_steps: int = 5,
    dtype: jnp.dtype | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of AdaMuon (arXiv:2507.11005), for trees of matrices.

        Mₜ = μ Mₜ₋₁ + (1 − μ) gₜ,   Oₜ = NS(sign Mₜ)
        Vₜ = μ₂ Vₜ₋₁ + (1 − μ₂) Oₜ²,   Ôₜ = Oₜ / (√Vₜ + ε)
        update = 0.2 √(d_out d_in) Ôₜ / ‖Ôₜ‖

    Every update has the root mean square 0.2: it does not depend on the scale of the
    gradients. It points uphill, like a gradient: `adamuon` is the whole optimizer.

    Args:
      decay: μ, what the memory of gradients keeps at each step, in [0, 1).
      beta2: μ₂, what the second moment of the factors keeps, in [0, 1).
      eps: ε.
      sign: orthogonalise the signs of the memory, as the paper does, or (False) the
        memory itself, which is what M3's variant "adamuon" does.
      ns_steps: of Newton-Schulz; `static_args` of `optax.inject_hyperparams`.
      dtype: see `orthogonalise_tree`.
      mesh: see `orthogonalise_tree`.

    Raises:
      ValueError: a decay outside [0, 1), or a leaf that is no matrix.
    """
    check_fraction("decay", decay)
    check_fraction("beta2", beta2)
    check_steps(ns_steps)

    def init(params):
        check_matrices(params)
        return AdaMuonState(zeros(params), zeros(params))

    def update(updates, state, params=None, **extra):
        del params, extra
        memory = jax.tree.map(
            lambda m, g: average(m, wide(g), decay), state.memory, updates
        )
        seen = jax.tree.map(jnp.sign, memory) if sign else memory
        factors = orthogonalise_tree(seen, ns_steps, dtype, mesh=mesh)
        scaled, second = by_second_moment(factors, state.second, beta2, eps)
        return like(scaled, updates), AdaMuonState(memory, second)

    return optax.GradientTransformationExtraArgs(init, update)


def adamuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.95,
    beta2: float = 0.95,
    eps: float = 1e-8,
    sign: bool = True,
    ns_steps: int = 5,
    dtype: jnp.dtype | None = None,
    mesh: Mesh | None = None,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdaMuon with decoupled weight decay, for trees of matrices.

    `with_adamw(scale_by_adamuon(), learning_rate)` is the one for a whole model. See
    `scale_by_adamuon` for the other arguments.

    >>> rule = adamuon(0.1)
    >>> w = jnp.ones((4, 4))
    >>> update, _ = rule.update(1e20 * jnp.eye(4), rule.init(w), w)
    >>> round(float(jnp.sqrt(jnp.mean(update**2))), 4)  # 0.1 of 0.2
    0.02
    """
    direction = scale_by_adamuon(
        decay=decay,
        beta2=beta2,
        eps=eps,
        sign=sign,
        ns_steps=ns_steps,
        dtype=dtype,
        mesh=mesh,
    )
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def by_second_moment(
    factors: PyTree, second: PyTree, beta2: float, eps: float
) -> tuple[PyTree, PyTree]:
    """Factors over the root of their mean square, at the RMS of Adam; the new mean."""

    def divide(o, v):
        o = o / (jnp.sqrt(v) + jnp.asarray(eps, o.dtype))
        norm = jnp.sqrt(jnp.sum(o**2, axis=(-2, -1), keepdims=True))
        to = RMS * math.sqrt(o.shape[-2] * o.shape[-1])
        # Not a floor of the least float: optimised division overflows there.
        return to * o / jnp.where(norm > 0, norm, 1)

    second = jax.tree.map(lambda v, o: average(v, o**2, beta2), second, factors)
    return jax.tree.map(divide, factors, second), second


def by_shape(factors: PyTree) -> PyTree:
    """Orthogonal factors at the RMS of Adam: Muon's scale for `consistent_rms=0.2`."""
    return jax.tree.map(lambda o: RMS * math.sqrt(max(o.shape[-2:])) * o, factors)


def average(old: Array, new: Array, decay: Any) -> Array:
    decay = jnp.asarray(decay, old.dtype)
    return decay * old + (1 - decay) * new


def check_matrices(tree: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jnp.ndim(leaf) < 2:
            name = jax.tree_util.keystr(path) or "the parameter"
            raise ValueError(
                f"{name} has shape {jnp.shape(leaf)}, which is no matrix; "
                "for_matrices(rule, others) gives only the matrices of a model to rule."
            )


def check_fraction(name: str, value: Any) -> None:
    # An array is a value of inject_hyperparams: known only when the program runs.
    if isinstance(value, int | float) and not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_steps(ns_steps: Any) -> None:
    if not isinstance(ns_steps, int) or ns_steps < 1:
        raise ValueError(
            f"ns_steps must be a whole number >= 1, got {ns_steps}; with "
            "optax.inject_hyperparams, name it in static_args."
        )


def _lying(leaf: Array) -> Float[Array, "B M N"]:
    """The matrices of a leaf in one batch, none higher than wide."""
    x = wide(leaf)
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _unit(batch: Float[Array, "B M N"]) -> Float[Array, "B M N"]:
    """Largest entry 1: the sums of squares neither overflow nor vanish."""
    largest = jnp.max(jnp.abs(batch), axis=(-2, -1), keepdims=True, initial=0)
    return batch / jnp.where(largest > 0, largest, 1)
