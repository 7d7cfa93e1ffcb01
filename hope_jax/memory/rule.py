"""Learning rules of a memory, as optax transformations that chain.

Each reads its data-dependent rates from `context`, the token at hand, and adds its term
to the update, so that the terms are independent switches:

    Sₜ = θₜ Sₜ₋₁ − ηₜ ∇ℓ                      `descend`, `inertia`
    Mₜ = Mₜ₋₁ (αₜ I − bₜ xₜ xₜᵀ) + Sₜ          `erase`, `retention.decay`

(equations 88 and 90 of arXiv:2512.24695, with the momentum its Table 6 removes.)

`implicit`, `muon`, `adam`, `scaled` and `from_optax` take the raw gradient, and so the
place of `descend`; `newton` is a whole memory by itself.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, PyTree

from hope_jax.core.config import Kinds, did_you_mean
from hope_jax.memory import rates
from hope_jax.memory.choice import Choice, Make
from hope_jax.memory.flow import transformation


def descend() -> optax.GradientTransformationExtraArgs:
    """`−ηₜ ∇ℓ`, gradient descent with the token's own rate `context.eta`."""

    def update(updates, state, params=None, *, context, **extra):
        del params, extra
        return jax.tree.map(lambda g: -context.eta * g, updates), state

    return transformation(lambda params: (), update)


def inertia(but: tuple[str, ...] = ()) -> optax.GradientTransformationExtraArgs:
    """`Sₜ = θₜ Sₜ₋₁ + update`: inner momentum, decay `context.theta` (Titans 14).

    Matrices named in `but` move by their update itself.
    """

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None, *, context, **extra):
        del params, extra
        moved = jax.tree.map(lambda s, u: context.theta * s + u, state, updates)
        still = {name: state[name] for name in but}
        return moved | {name: updates[name] for name in but}, moved | still

    return transformation(init, update)


def nesterov(but: tuple[str, ...] = ()) -> optax.GradientTransformationExtraArgs:
    """`Sₜ = θₜ Sₜ₋₁ + uₜ`, update `θₜ Sₜ + uₜ`: `inertia` that looks one step ahead."""
    follow = inertia(but)

    def update(updates, state, params=None, *, context, **extra):
        _, state = follow.update(updates, state, params, context=context, **extra)
        ahead = jax.tree.map(lambda s, u: context.theta * s + u, state, updates)
        return ahead | {name: updates[name] for name in but}, state

    return transformation(follow.init, update)


def corrected_rate(eta: Float[Array, ""], x: Float[Array, " K"]) -> Float[Array, ""]:
    """`η / (1 + η‖x‖²)`: the proximal coefficient of delta gradient descent.

    Equation 57 prints `η / (1 + η)`, which is this for a unit-norm input.
    """
    return eta / (1.0 + eta * jnp.vdot(x, x))


def erase(
    erasures: Callable[[Any, Any], Mapping[str, tuple[Array, Array]]],
    written: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`−(M r) pᵀ`: the state-dependent forgetting of delta gradient descent.

    Args:
      erasures: `(context, inputs) -> {name: (r, p)}`, what each matrix recalls and
        erases; for equation 88 `r = xₜ` and `p = bₜ xₜ`. A matrix it does not name
        keeps all.
      written: `−((M − M₀) r) pᵀ`, which leaves the start M₀ as it is; M₀ is where
        `init` saw the parameters.
    """

    def init(params):
        return params if written else ()

    def update(updates, state, params, *, context, inputs, **extra):
        del extra

        def forget(name, recall, along):
            m = params[name] - state[name] if written else params[name]
            recalled = m * recall if m.ndim == 1 else m @ recall
            erased = recalled * along if m.ndim == 1 else jnp.outer(recalled, along)
            return updates[name] - erased

        terms = erasures(context, inputs)
        return updates | {
            name: forget(name, *term) for name, term in terms.items()
        }, state

    return transformation(init, update)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Float[Array, "V K"], steps: int = 5) -> Float[Array, "V K"]:
    """Muon's quintic iteration towards the orthogonal factor of one matrix, step by
    step; `kernels.newton_schulz` is the batched one."""
    a, b, c = NEWTON_SCHULZ
    x = x / (jnp.sqrt(jnp.sum(x * x) + 1e-14))
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def implicit() -> optax.GradientTransformationExtraArgs:
    """`−ηₜ ∇ℓ / (1 + ηₜ‖xₜ‖²)`: implicit gradient descent, in place of `descend`.

    For `½‖M x − v‖²` it is the proximal point `argmin ½‖M x − v‖² + ‖M − Mₜ₋₁‖² / 2ηₜ`
    exactly (Longhorn, arXiv:2407.14207), which no rate makes overshoot. `inputs` gives
    the x of each matrix; what it does not name takes the plain step.
    """

    def update(updates, state, params=None, *, context, inputs, **extra):
        del params, extra

        def step(name, g):
            eta = context.eta
            rate = corrected_rate(eta, inputs[name]) if name in inputs else eta
            return -rate * g

        return {name: step(name, g) for name, g in updates.items()}, state

    return transformation(lambda params: (), update)


class NewtonState(NamedTuple):
    """The sums of `newton`: `values` of η v kᵀ [V, K], `keys` of η k kᵀ [K, K]."""

    values: PyTree
    keys: PyTree


def newton(ridge: float) -> optax.GradientTransformationExtraArgs:
    """Recursive least squares, the reference of Mesa (arXiv:2309.05858, 2506.05233).

        Gₜ = αₜ Gₜ₋₁ + ηₜ vₜ kₜᵀ,   Hₜ = αₜ Hₜ₋₁ + ηₜ kₜ kₜᵀ,   Mₜ = Gₜ (Hₜ + λ I)⁻¹

    From `G₀ = λ M₀`, `H₀ = 0` this is the best matrix for all tokens so far, each with
    the weight it has left, under a ridge λ about what is left of M₀. Retention is
    inside and αₜ a scalar; the gradient and updates before it in a chain are not read.

    Args:
      ridge: λ, positive.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}.")

    def init(params):
        return NewtonState(
            jax.tree.map(lambda m: ridge * m, params),
            jax.tree.map(lambda m: jnp.zeros((m.shape[-1],) * 2, m.dtype), params),
        )

    def update(updates, state, params, *, context, **extra):
        del updates, extra
        k, v, eta, alpha = context.k, context.v, context.eta, context.alpha
        state = NewtonState(
            jax.tree.map(lambda g: alpha * g + eta * jnp.outer(v, k), state.values),
            jax.tree.map(lambda h: alpha * h + eta * jnp.outer(k, k), state.keys),
        )

        def solve(g, h):
            return jnp.linalg.solve(h + ridge * jnp.eye(len(h), dtype=h.dtype), g.T).T

        best = jax.tree.map(solve, state.values, state.keys)
        return jax.tree.map(jnp.subtract, best, params), state

    return transformation(init, update)


def muon(
    orthogonalise: Callable[[Array], Array],
) -> optax.GradientTransformationExtraArgs:
    """`Sₜ = θₜ Sₜ₋₁ − ∇ℓ`, update `ηₜ orthogonalise(Sₜ)`, in place of `descend`.

    The rule of ATLAS (arXiv:2505.23735, equations 32 and 33, with the sign that
    descends). Leaves that are no matrices step by ηₜ Sₜ.

    Args:
      orthogonalise: `[V, K] -> [V, K]`, a matrix near the one whose singular values are
        1, such as `newton_schulz`.
    """

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None, *, context, **extra):
        del params, extra
        state = jax.tree.map(lambda s, g: context.theta * s - g, state, updates)

        def step(s):
            return context.eta * (orthogonalise(s) if s.ndim == 2 else s)

        return jax.tree.map(step, state), state

    return transformation(init, update)


def scaled(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Any optax transformation as a memory's rule: its update times ηₜ.

    `tx` descends by itself (build it with `learning_rate=1.0`) and stands in place of
    `descend`. If it takes extra arguments it is given `context` and `inputs`.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        with _ordinary_promotion():
            return tx.init(params)

    def update(updates, state, params=None, *, context, **extra):
        with _ordinary_promotion():
            updates, state = tx.update(updates, state, params, context=context, **extra)
        return jax.tree.map(lambda u: context.eta * u, updates), state

    return transformation(init, update)


# Under the root, where a squared gradient of zero would have no finite slope for the
# level above; optax has none unless asked.
_EPSILON_ROOT = 1e-16


def adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """`−ηₜ m̂ₜ / (√v̂ₜ + eps)`: Adam (arXiv:1412.6980), in place of `descend`."""
    return scaled(optax.adam(1.0, b1=b1, b2=b2, eps=eps, eps_root=_EPSILON_ROOT))


@functools.cache
def from_optax(name: str) -> optax.GradientTransformationExtraArgs:
    """The optimizer `optax.<name>`, built with `learning_rate=1.0`, times ηₜ.

    Its other arguments keep their defaults, but for a tiny `eps_root` where there is
    one, without which the level above gets no finite gradient. For other arguments
    build it and use `scaled`.

    Args:
      name: as in optax, "adam" or "contrib.muon"; a leading "optax." is allowed.

    Raises:
      ValueError: optax has no such optimizer, or it needs more than a gradient.

    >>> import types
    >>> rule, w = from_optax("optax.sgd"), {"w": jnp.zeros(2)}
    >>> token = types.SimpleNamespace(eta=jnp.array(0.5))
    >>> step, _ = rule.update({"w": jnp.ones(2)}, rule.init(w), w, context=token)
    >>> step["w"].tolist()
    [-0.5, -0.5]
    """
    name = name.removeprefix("optax.")
    factories = _optax_factories()
    if name not in factories:
        near = difflib.get_close_matches(name, factories, n=3) or ["sgd", "adam"]
        raise ValueError(
            f"optax has no optimizer {name!r} with a learning_rate. Near: "
            f"{', '.join(near)}. A transformation object can be a rule by "
            "`rule.scaled`."
        )
    arguments = inspect.signature(factories[name]).parameters
    missing = [
        a.name
        for a in arguments.values()
        if a.default is a.empty
        and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)
        and a.name != "learning_rate"
    ]
    if missing:
        raise ValueError(
            f"optax.{name} needs {', '.join(missing)}: build it with learning_rate=1.0 "
            "and make it a rule by `rule.scaled`."
        )
    options = {"eps_root": _EPSILON_ROOT} if "eps_root" in arguments else {}
    tx = factories[name](learning_rate=1.0, **options)
    _try_out(name, tx)
    return scaled(tx)


@functools.cache
def _optax_factories() -> dict[str, Callable[..., Any]]:
    """Every function of optax that has a `learning_rate`, by name."""
    rooms = (("", optax), ("contrib.", optax.contrib))
    return {
        prefix + name: function
        for prefix, room in rooms
        for name, function in vars(room).items()
        if not name.startswith("_")
        and inspect.isfunction(function)
        and "learning_rate" in inspect.signature(function).parameters
    }


def _try_out(name: str, tx: optax.GradientTransformation):
    """Refuses what cannot move by a gradient alone, such as a line search."""

    def step(w):
        with _ordinary_promotion():
            return optax.with_extra_args_support(tx).update(w, tx.init(w), w)

    try:
        jax.eval_shape(step, {"w": jnp.zeros((2, 3))})
    except Exception as error:
        raise ValueError(
            f"optax.{name} cannot be a memory's rule, which is given gradient and "
            f"parameters: {error}"
        ) from error


@contextlib.contextmanager
def _ordinary_promotion():
    """JAX's own promotion of types and ranks, whatever is set outside.

    Optax raises floats to the power of its integer counts, so a program that asks for
    strict promotion, as our tests do, could not use it.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(Choice):
    """A learning rule by name, and what is so of it.

    Attributes:
      step: `config -> transformation` of the raw gradient.
      momentum: `config -> transformation` after that, whose state is shaped like the
        weights and decays by the token's θ.
      linear: its steps are linear in gradients: a chunk of them has a fast form, and
        with a linear bias an exact one.
      explicit: its step is `−η ∇ℓ`, so that a `rate_law` may say the η of each matrix;
        it diverges if η is too large.
      affine: weights are sums over time of what each token gives, whose factors do not
        depend on them.
      bounded: no η makes it overshoot.
      single_key: it takes one key at a time, so has no step for the mean of several.
      rate: `(eta, key) -> the factor of ∇ℓ`; None for η itself.
      lookahead: it moves by what its momentum will be (Nesterov).
      orthogonal: it moves by η times the orthogonal factor of its momentum.
      solves: it is a whole memory by itself, the best for all tokens so far, retention
        included.
    """

    step: Make | None = None
    momentum: Make | None = None
    linear: bool = False
    explicit: bool = False
    affine: bool = False
    bounded: bool = False
    single_key: bool = False
    rate: Callable[[Array, Array], Array] | None = None
    lookahead: bool = False
    orthogonal: bool = False
    solves: bool = False

    @property
    def inertia(self) -> bool:
        """Whether it has a momentum, so that tokens bring θ."""
        return self.momentum is not None

    @property
    def plain(self) -> bool:
        """Whether it is gradient descent, and nothing is carried on."""
        return self.explicit and not self.inertia

    @property
    def immediate(self) -> bool:
        """Whether a token's write is one outer product, made at once."""
        return self.linear and not self.inertia and not self.solves


def _descend(config):
    return descend() if config.rate_law == "token" else rates.descend(config)


def _carried(follow):
    """A momentum, but of an exact output layer, which takes its own step at once."""
    return lambda config: follow(("w1",) if config.rate_law == "output" else ())


_DESCENT: dict[str, Any] = dict(step=_descend, linear=True, explicit=True, affine=True)

RULES: Kinds[Rule] = Kinds.of_entries(
    "rule",
    Rule(kind="gd", **_DESCENT),
    Rule(kind="momentum", momentum=_carried(inertia), **_DESCENT),
    Rule(kind="nesterov", momentum=_carried(nesterov), lookahead=True, **_DESCENT),
    Rule(
        kind="implicit",
        step=lambda config: implicit(),
        linear=True,
        bounded=True,
        single_key=True,
        rate=corrected_rate,
    ),
    Rule(
        kind="newton",
        options=("ridge",),
        step=lambda config: newton(config.ridge),
        linear=True,
        bounded=True,
        single_key=True,
        solves=True,
    ),
    Rule(
        kind="muon",
        momentum=lambda config: muon(newton_schulz),
        affine=True,
        orthogonal=True,
    ),
    Rule(kind="adam", step=lambda config: adam()),
)


def get(name: str) -> Rule:
    """The rule called `name`; `optax.<name>` is any of optax by `from_optax`.

    Raises:
      ValueError: there is none.
    """
    if name.startswith("optax."):
        made = from_optax(name.removeprefix("optax."))
        return Rule(kind=name, step=lambda config: made)
    if name not in RULES:
        raise ValueError(
            f"rule must be one of {', '.join(RULES)} or 'optax.<name>', got {name!r}."
            f"{did_you_mean(name, RULES)}"
        )
    return RULES.get(name)
