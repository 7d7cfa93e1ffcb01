"""The five ways one level knows of another (section 3.3 of arXiv:2512.24695).

condition    on the parameters, or the answer, of another level   (equations 24-26)
attend       on the context of another level, non-parametrically  (equation 27)
backprop     two states on two clocks in one gradient flow        (CMS)
initialise   start where another level says                       (equation 28)
generate     weights or context made by another level             (hypernetworks)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from hope_jax.core.clock import Clock
from hope_jax.core.level import (
    Level,
    LevelState,
    OuterGradient,
    Seen,
    begin,
    receive,
    unroll,
)

Read = Callable[[PyTree, PyTree], PyTree]


def condition(
    read: Callable[[PyTree, PyTree, PyTree], PyTree],
    on: PyTree | Callable[[PyTree], PyTree],
    *,
    differentiable: bool = False,
) -> Read:
    """Conditions a level on another level's parameters, or on its answer.

        M⁽⁰⁾(x) := M⁽⁰⁾(x; Θ⁽¹⁾)      (24)
        M⁽⁰⁾(x) := M⁽⁰⁾(x; M⁽¹⁾(x))   (25)

    Args:
      read: `(params, x, given) -> output` of the level that is conditioned.
      on: `given` itself, a pytree of the other level's parameters, or the other level's
        read `x -> given`.
      differentiable: whether gradients cross. By default each state is only a constant
        in the other's problem.

    Returns:
      `(params, x) -> output`.

    Linear attention reads the memory it wrote (equation 26), y = M (W_q x):

    >>> memory = jnp.array([[2.0, 0.0], [0.0, 3.0]])
    >>> attention = condition(lambda w_q, x, m: m @ (w_q @ x), memory)
    >>> attention(jnp.eye(2), jnp.array([1.0, 1.0])).tolist()
    [2.0, 3.0]
    """

    def conditioned(params, x):
        given = on(x) if callable(on) else on
        if not differentiable:
            given = jax.lax.stop_gradient(given)
        return read(params, x, given)

    return conditioned


def dot_product(k: Array, q: Array) -> Array:
    """log s(k, q) = ⟨k, q⟩ / √K, the similarity that makes softmax attention."""
    return jnp.vdot(k, q) / k.shape[-1] ** 0.5


def regress(
    score: Callable[[Any, Any], Array] = dot_product, *, window: int | None = None
) -> Callable[[PyTree, Array, PyTree], Array]:
    """A local regression of values on keys, solved in closed form (Nadaraya-Watson).

        y = argmin_z Σᵢ s(kᵢ, q) ‖vᵢ − z‖² = Σᵢ s(kᵢ, q) vᵢ / Σⱼ s(kⱼ, q)   (62)

    Args:
      score: `(k_i, q) -> log s(k_i, q)`.
      window: how many items back, the present one included, take part (equation 63);
        None for all.

    Returns:
      `(context, mask, item) -> y`, for `attend`. Items are `(k, v, q)`.
    """
    if window is not None and window < 1:
        raise ValueError(
            f"window must be at least 1 item, or None for all, got {window}."
        )

    def read(context, mask, item):
        keys, values, _ = context
        _, _, q = item
        if window is not None:
            mask = mask & (jnp.cumsum(mask[::-1])[::-1] <= window)
        scores = jax.vmap(lambda k: score(k, q))(keys)
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        return jnp.tensordot(weights, values, axes=1)

    return read


def attend(
    read: Callable[[PyTree, Array, PyTree], PyTree] | None = None,
    *,
    through: Callable[[PyTree], PyTree] = lambda item: item,
) -> Level:
    """A non-parametric level: conditioned on a context, and solved anew for every item.

        M⁽⁰⁾(x) := M⁽⁰⁾(x; M⁽¹⁾(C⁽¹⁾))   (27)

    It has no parameters and no state, only its context: `Clock(period=0)`.

    Args:
      read: `(context, mask, item) -> output`; leaves of `context` lead with time and
        `mask` says which items are past. None is `regress()`, softmax attention over
        items `(k, v, q)`.
      through: what another level makes of each item of the context, the keys, values
        and queries of a sequence for example.

    Returns:
      A level to `unroll`.
    """
    solve = regress() if read is None else read

    def answer(seen: Seen, item):
        return solve(jax.vmap(through)(seen.context), seen.mask, through(item))

    return Level(
        init=lambda key: (),
        read=answer,
        objective=lambda params, item: jnp.zeros(()),
        flow=optax.identity(),
        clock=Clock(period=0),
    )


def backprop(
    levels: Mapping[str, Level],
    states: Mapping[str, LevelState],
    objective: Callable[[dict[str, PyTree], PyTree], tuple[Array, PyTree]],
    context_t: PyTree,
    *,
    inputs: Callable[[dict[str, PyTree], PyTree], Mapping[str, PyTree]] | None = None,
) -> tuple[dict[str, LevelState], tuple[Array, PyTree]]:
    """One item for several levels in one gradient flow, each on its own clock.

    One backward pass serves all of them. Every level adds up the gradients of its own
    items and moves on its own clock, so what a slow level receives is the sum of its
    own items' gradients whatever the faster clocks do; what the faster levels change is
    the point at which a later item's gradient is taken. `scan` it over a context:

        states, (loss, read) = jax.lax.scan(
            lambda s, x_t: backprop(levels, s, objective, x_t), states, context
        )

    Args:
      levels: the levels by name. Their own objectives and reads are not used.
      states: where each stands.
      objective: `({name: params}, context_t) -> (scalar, read)`.
      context_t: one item.
      inputs: `({name: params}, context_t) -> {name: inputs}` for flows that need the
        vectors that weight matrices multiplied; names it leaves out have none.

    Returns:
      The states after the item, and the objective's value and read.
    """
    if set(levels) != set(states):
        raise ValueError(
            f"levels ({sorted(levels)}) and states ({sorted(states)}) must have the "
            "same names."
        )
    params = {
        name: state.params if state.anchor is None else state.anchor
        for name, state in states.items()
    }
    (loss, read), gradients = jax.value_and_grad(objective, has_aux=True)(
        params, context_t
    )
    multiplied = {} if inputs is None else inputs(params, context_t)
    moved = {
        name: receive(level, states[name], gradients[name], multiplied.get(name))
        for name, level in levels.items()
    }
    return moved, (loss, read)


def initialise(
    level: Level,
    score: Callable[[PyTree, PyTree], Array],
    *,
    gradient: OuterGradient = "exact",
) -> Callable[[PyTree, tuple[PyTree, PyTree]], Array]:
    """The objective of the level that decides where `level` starts (MAML).

        Θ⁽¹⁾₀ = argmin_Φ E_C ℓ(M⁽¹⁾(·; Φ), C)   (28)

    Args:
      level: the fast level, which starts at Φ and lives through a task's context.
      score: `(params, query) -> scalar`, ℓ: how good the place is that it came to.
      gradient: how Φ is differentiated. `exact` through every update; `first_order`
        with the updates as constants, so that dℓ/dΦ is ℓ's gradient at the end;
        `none` gives zero.

    Returns:
      `(initial, (context, query)) -> scalar`, the objective of an outer `Level`, for
      one task.
    """
    fast = level._replace(gradient=gradient)

    def objective(initial, task):
        context, query = task
        state, _ = unroll(fast, begin(fast, initial), context)
        return score(state.params, query)

    return objective


def generate(
    level: Level,
    *,
    weights: Callable[[PyTree, PyTree], PyTree] | None = None,
    context: Callable[[PyTree, PyTree], PyTree] | None = None,
    init: Callable[[Array], PyTree] | None = None,
    differentiable: bool = True,
) -> Level:
    """Lets a generator make the weights of `level`, or the context it lives in.

    Args:
      level: the level generated for.
      weights: `(phi, x) -> params`, a hypernetwork. The level returned learns `phi`;
        the weights themselves are made anew for every item.
      context: `(params, x) -> item`. The level returned sees what this makes of each
        item. As it is given the level's own parameters, values may be generated by the
        memory that stores them (self-reference, equation 58).
      init: `key -> phi`; needed with `weights`.
      differentiable: whether gradients of the objective cross into what is generated,
        at this level and at those above. A generator in another level learns through
        here; False makes self-generated values fixed targets.

    Returns:
      A `Level` whose parameters are `phi` (for `weights`) or those of `level`.

    Raises:
      ValueError: unless exactly one of `weights` and `context` is given, with `init`
        for `weights` and without it for `context`.
    """
    if (weights is None) == (context is None):
        raise ValueError("generate needs `weights` or `context`, and not both.")
    if (weights is None) != (init is None):
        raise ValueError(
            "`init` is where the generator's own parameters start: give it with "
            "`weights` and leave it out with `context`."
        )

    def made(params, x):
        if weights is not None:
            return weights(params, x), x
        assert context is not None  # one of the two is given
        return params, context(params, x)

    def objective(params, x):
        own, item = made(params, x)
        if not differentiable:
            if weights is None:
                item = jax.lax.stop_gradient(item)
            else:
                own = jax.lax.stop_gradient(own)
        return level.objective(own, item)

    def inputs(params, x):
        assert level.inputs is not None  # else it is not asked
        return level.inputs(*made(params, x))

    return level._replace(
        init=level.init if weights is None else init,
        read=lambda params, x: level.read(*made(params, x)),
        objective=objective,
        inputs=None if weights or not level.inputs else inputs,
    )
