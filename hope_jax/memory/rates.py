"""From a token's openness η to the step of each matrix: what a write does, bounded.

With gradients taken at the chunk's start, the writes of a chunk of C tokens add up. To
first order, one token's step at its own key x changes the memory's answer there by

    −(Σₙ rateₙ ‖xₙ‖² Jₙ Jₙᵀ) e        xₙ what matrix n meets, Jₙ the way from its
                                      product to the answer, e the gradient of the loss

so a law that keeps `C Σₙ rateₙ ‖xₙ‖² ‖Jₙ‖²` at most 2 is stable for a key that fills
its chunk, which is the worst case of equal keys; for MLPs the claim holds as far as the
linearisation does. ‖J‖ is the Frobenius norm, never less than the operator norm.

    token          ηₜ for every matrix: stable for ηₜ <= 2 / (C Σ ‖xₙ‖²‖Jₙ‖²), which
                   whoever makes η has to see to
    energy         ηₜ / (C max(1, N ‖xₙ‖² ‖Jₙ‖²)) for each of N matrices: the sum above
                   is at most 1 for η <= 1, however large the memory has grown
    budget         ηₜ Pₜ / (1 + Pₜ) / max(1, N ‖xₙ‖² ‖Jₙ‖²), Pₜ the product of 1 − η
                   over the chunk's tokens before. One minus these shares multiply to at
                   least ½ over a chunk, so they add up to at most log 2, whatever η in
                   [0, 1]: tokens that write much leave less to those after them. A
                   matrix never moves away from what it learns. Without a delta term a
                   chunk multiplies errors by I − Σ share k kᵀ, within [1 − log 2, 1];
                   with one by 2 Π(I − share k kᵀ) − I, which is non-expansive
    output         the output layer, over the features h of the chunk's start, is a
                   matrix memory whose gradient is taken where it stands:
                   ηₜ / (ε + ‖hₜ‖²) multiplies the error at the key by
                   1 − η‖h‖²/(ε + ‖h‖²), in [0, 1] for η <= 1 whatever the keys of the
                   chunk; the hidden layer takes a tenth of `energy`'s step, for the
                   output layer has written already, and features that turn forget
    non_expansive  min(−c expm1(−η/c), 2 α / ‖x‖²), c = (1 − α) / ‖write‖: a step is
                   never longer than what its token forgets, so with a decay to zero no
                   matrix grows beyond max(‖M₀‖, 1), and toward a start beyond that and
                   ‖M₀‖ (arXiv:2609.33325); nothing is written as α → 1

With a delta term the same step is also the coefficient of the erasure.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hope_jax.memory.flow import transformation

if TYPE_CHECKING:
    from hope_jax.memory.architecture import Architecture, Weights
    from hope_jax.memory.compose import MemoryConfig

LAWS = ("token", "energy", "budget", "output", "non_expansive")
EPSILON = 0.05  # of `output`: shorter features are written more slowly
HIDDEN = 0.1  # of `output`: the hidden layer's share
_SAFE = 1e-6


class Met(NamedTuple):
    """What a token meets at the chunk's start, for each matrix.

    Attributes:
      inputs: what it multiplies, `[*T, K]`.
      gains: `‖Jₙ‖²` of the way from its product to the output, `[*T]`.
      errors: the loss's gradient in its product, `[*T, V]`.
      skip: the part of the output that passes the output layer by, `[*T, V]`.
    """

    inputs: dict[str, Array]
    gains: dict[str, Array]
    errors: dict[str, Array]
    skip: Float[Array, "*T V"]


def meet(
    function: "Architecture",
    weights: "Weights",
    x: Float[Array, "*T K"],
    blame: Callable[[Array], Array],
) -> Met:
    """`Met` of keys at `weights`; `blame` is the gradient of the loss in the output."""
    single = x.ndim == 1
    rows = x[None] if single else x
    slope = (lambda o: blame(o[0])[None]) if single else blame
    inputs, errors = function.inputs_and_errors(weights, rows, slope)
    if "w" in weights:
        gains = {"w": jnp.ones_like(rows[:, 0])}
        skip = jnp.zeros_like(errors["w"])
    else:
        gains, skip = _mlp_gains(function, weights, rows)
    met = Met(inputs, gains, errors, skip)
    return jax.tree.map(lambda a: a[0], met) if single else met


def _mlp_gains(function, weights, rows):
    """Of two layers: `‖W₁ diag(σ')‖²` for the hidden one, 1 for the output layer."""

    def features(z):
        met = {}

        def multiply(name, x):
            met[name] = x
            if name == "w2":
                return z
            return jnp.zeros((*x.shape[:-1], weights["w1"].shape[0]), x.dtype)

        skip = function.forward(multiply, rows)
        return met["w1"], skip

    z = function.product(weights["w2"], rows)
    (_, skip), (slope, _) = jax.jvp(features, (z,), (jnp.ones_like(z),))
    columns = jnp.sum(weights["w1"] * weights["w1"], axis=0)
    gain = jnp.sum(slope * slope * jnp.broadcast_to(columns, slope.shape), axis=-1)
    return {"w2": gain, "w1": jnp.ones_like(gain)}, skip


def ration(
    eta: Float[Array, " T"], left: Float[Array, ""]
) -> tuple[Float[Array, " T"], Float[Array, ""]]:
    """The shares of `budget` of T tokens of one chunk, and what it then has left.

    Args:
      eta: in [0, 1].
      left: the product of `1 − η` over the chunk's tokens before these.

    >>> shares, left = ration(jnp.array([1.0, 0.5]), jnp.ones(()))
    >>> shares.tolist(), float(left)
    ([0.5, 0.0], 0.0)
    """
    after = left * jnp.cumprod(1.0 - eta)
    before = jnp.concatenate([left[None], after[:-1]])
    return eta * before / (1.0 + before), after[-1]


def ration_stream(eta: Float[Array, " T"], chunk: int) -> Float[Array, " T"]:
    """`ration` token by token, of a stream that begins where a chunk does."""

    def share(carry, eta):
        left, count = carry
        left = jnp.where(count % chunk == 0, jnp.ones_like(left), left)
        return (left * (1.0 - eta), count + 1), eta * left / (1.0 + left)

    start = jnp.ones((), eta.dtype), jnp.zeros((), jnp.int32)
    return jax.lax.scan(share, start, eta)[1]


def within(config: "MemoryConfig", bound: float, share: Array, alpha: Array) -> Array:
    """η of a token whose gradient is exact: a share of a bound that its retention sets.

    A write multiplies what is stored along its key by `α − n η`, with n 1 or 2
    (`MemoryConfig.erasures`). For n η <= 1 that is never below −1; where the bound lets
    a token turn what is stored round, it falls with α, from `bound` at 1 to `1 / n` at
    0. What recalls after it has forgotten multiplies by `α (1 − n η)` instead, and any
    η up to `2 / n` will do.

    Args:
      config: of the memory.
      bound: of η, at most `2 / n`.
      share: in [0, 1], of any shape.
      alpha: retention, of a shape that leads that of `share`, or with channels.
    """
    n = config.erasures
    exact = config.gradient == "exact" and config.rate_law == "token"
    if not exact or n * bound <= 1 or config.recall == "after":
        return bound * share
    if config.retention == "none":
        return bound * share
    if config.chosen.retention.channels:
        alpha = jnp.min(alpha, axis=-1)
    alpha = alpha.reshape(*alpha.shape, *[1] * (share.ndim - alpha.ndim))
    return share * (1.0 + (n * bound - 1.0) * alpha) / n


def steps(config: "MemoryConfig", token: Any, met: Met) -> dict[str, Array]:
    """The step of each matrix under `config.rate_law`, one of `LAWS` but `token`.

    A momentum averages steps and adds none: with one, a step is `1 − θ` as long.

    Args:
      config: the memory, whose `chunk` tokens share an anchor.
      token: with `eta`, `alpha` and `theta`, `[*T]`; η in [0, 1], under `budget` the
        shares of `ration`.
      met: what it meets.
    """
    law, chunk, made = config.rate_law, config.chunk, {}
    for name, x in met.inputs.items():
        eta, energy = token.eta, jnp.sum(x * x, axis=-1)
        if config.inertia and not (law == "output" and name == "w1"):
            eta = eta * (1.0 - token.theta)
        if law == "output" and name == "w1":
            made[name] = eta / (EPSILON + energy)
        elif law == "non_expansive":
            error = met.errors[name]
            write = energy * jnp.sum(error * error, axis=-1)
            cap = (1.0 - token.alpha) / jnp.sqrt(write + _SAFE)
            step = -cap * jnp.expm1(-eta / jnp.maximum(cap, _SAFE))
            made[name] = jnp.minimum(step, 2.0 * token.alpha / (energy + _SAFE))
        else:
            count, share = (1, HIDDEN) if law == "output" else (len(met.inputs), 1.0)
            among = 1 if law == "budget" else chunk
            shared = among * jnp.maximum(1.0, count * met.gains[name] * energy)
            made[name] = share * eta / shared
    return made


def descend(config: "MemoryConfig") -> optax.GradientTransformationExtraArgs:
    """`−rateₙ ∇ₙℓ` in place of `rule.descend`; `inputs` is a `Met`.

    Under `output` the gradient of the output layer, `(skip + W₁ h − v) hᵀ` for the L2
    bias, is taken at its running weights.
    """

    def update(updates, state, params, *, context, inputs, **extra):
        del extra
        made = steps(config, context, inputs)
        if config.rate_law == "output" and config.chosen.bias.squares:
            h = inputs.inputs["w1"]
            error = inputs.skip + params["w1"] @ h - context.v
            updates = updates | {"w1": jnp.outer(error, h)}
        return {name: -made[name] * g for name, g in updates.items()}, state

    return transformation(lambda params: (), update)
