"""Lives of optimizers on families of problems: log10 of the loss, step by step."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from hope_jax.optim.meta import Family, LearnedConfig, Meta, learned, solve

CEILING = 100.0  # of every loss that is reported: a life that diverged


class Lives(NamedTuple):
    """Rate, and log10 of the loss: [optimizers, problems, steps]."""

    rate: float
    curves: np.ndarray


def curves(
    rule: optax.GradientTransformation, family: Family, steps: int, keys: Array
) -> Float[Array, "problems steps"]:
    """log10 of the loss before each step, on one problem a key."""

    def one(key):
        return solve(family(key), rule, steps, jax.random.fold_in(key, 1))[1]

    losses = jax.vmap(one)(keys)
    return jnp.log10(jnp.where(losses < CEILING, losses, CEILING))  # NaN is above too


def tuned(
    rule: Callable[[Array, Array], optax.GradientTransformation],
    family: Family,
    rates: np.ndarray,
    best: Callable[[np.ndarray], int],
    lengths: Sequence[int],
    tuning: Array,
    keys: Array,
) -> dict[int, Lives]:
    """Lives of each length, at the rate that is best on other problems.

    Args:
      rule: `(rate, steps to come) -> optimizer`; both may be traced.
      family: of the problems.
      rates: those that are tried.
      best: scores of all rates, means over problems and steps -> index of the chosen.
      lengths: steps of a life, each with a rate of its own.
      tuning, keys: of the problems that choose, and of those that count.
    """
    longest = max(lengths)  # a shorter life begins like a longer one

    def life(rate, steps, keys):
        return curves(rule(rate, steps), family, longest, keys)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def score(rate, steps):
        tried = life(rate, steps, tuning)
        inside = jnp.arange(longest) < steps
        return jnp.mean(jnp.where(inside[None], tried, 0.0)) * longest / steps

    chosen = [rates[best(np.asarray(score(rates, float(n))))] for n in lengths]
    final = jax.jit(jax.vmap(life, (0, 0, None)))
    out = np.asarray(final(np.array(chosen), np.array(lengths, np.float32), keys))
    return {
        steps: Lives(float(rate), curve[None, :, :steps])
        for steps, rate, curve in zip(lengths, chosen, out, strict=True)
    }


def remembered(
    config: LearnedConfig,
    metas: Meta,
    rate: float,
    family: Family,
    lengths: Sequence[int],
    keys: Array,
) -> dict[int, Lives]:
    """Lives of each length of learned memories, as they are, at one rate.

    Args:
      config: of the memories.
      metas: what they have learned; leaves lead with memories.
      rate: of the optimizers.
      family: of the problems.
      lengths: steps of a life.
      keys: of the problems.
    """

    @jax.jit
    @jax.vmap
    def by_memory(meta):
        return curves(learned(meta, config, rate), family, max(lengths), keys)

    out = np.asarray(by_memory(metas))
    return {steps: Lives(rate, out[..., :steps]) for steps in lengths}


def measures(lives: Lives) -> dict[str, float]:
    """Numbers of lives.

    `mean` over steps and `final` over the last tenth of them, with the standard error
    `mean_se` over problems and the spread `mean_sd` between optimizers of one kind.
    """
    values = np.asarray(lives.curves, np.float64)
    last = max(1, values.shape[-1] // 10)
    by_problem = values.mean((0, 2))
    return {
        "rate": lives.rate,
        "mean": values.mean(),
        "mean_se": by_problem.std() / len(by_problem) ** 0.5,
        "mean_sd": values.mean((1, 2)).std(),
        "final": values[..., -last:].mean(),
    }
