"""Four choices make a memory: architecture, attentional bias, retention and rule."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hope_jax.core import show
from hope_jax.core.clock import Clock
from hope_jax.core.config import Kinds, default_of, one_of, refuse_unread
from hope_jax.core.level import Level
from hope_jax.memory import architecture, bias, features, rates, retention, rule
from hope_jax.memory.architecture import ACTIVATIONS, Architecture, Weights
from hope_jax.memory.flow import Flow, chain


class Tokens(NamedTuple):
    """The context of a memory, for one stream and one head; leaves lead with time, T.

    Attributes:
      k, v, q: key, value and query. Keys and queries of unit norm keep the
        rules stable. With `steps > 1`, k, v and eta may be `[T, steps, ...]`.
      eta: inner rate, float32.
      alpha: retained fraction in (0, 1], float32; `[T, K]` with retention `channel`.
      theta: inner momentum in [0, 1), float32; ignored without momentum.
      threshold: of a robust bias; None is the config's.
      weights: of an Omega window, for the token itself, the one before it, and so on;
        None is 1 for each.
      erase_key: what the delta term recalls and erases; None is k.
      erase_rate: the coefficient of the delta term, a vector erases along
        `erase_rate ⊙ erase_key`; None is eta.
    """

    k: Float[Array, "*T K"]
    v: Float[Array, "*T V"]
    q: Float[Array, "*T K"]
    eta: Float[Array, "*T"]
    alpha: Float[Array, "*T"]
    theta: Float[Array, "*T"]
    threshold: Float[Array, "*T"] | None = None
    weights: Float[Array, "*T W"] | None = None
    erase_key: Float[Array, "*T K"] | None = None
    erase_rate: Array | None = None


class Chosen(NamedTuple):
    """The choices of a memory as entries of their registries."""

    architecture: architecture.FunctionClass
    features: features.FeatureMap
    bias: bias.Bias
    retention: retention.Retention
    rule: rule.Rule


def registries() -> dict[str, Kinds]:
    """What there is of each choice that has a registry, by the field that chooses."""
    return {
        "architecture": architecture.ARCHITECTURES,
        "features": features.FEATURES,
        "bias": bias.BIASES,
        "retention": retention.RETENTIONS,
        "rule": rule.RULES,
    }


def readers() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Each option that not all choices read, on which choice that depends, and by which
    members of its registry it is read."""
    for choice, kinds in registries().items():
        options = (option for kind in kinds for option in kinds.get(kind).options)
        for option in dict.fromkeys(options):
            yield option, choice, kinds.which(lambda made: option in made.options)  # noqa: B023


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """An associative memory as independent choices (`l2` with `dgd` is the paper's).
    Options that the choices made do not read are refused.

    Architecture:
      architecture: `vector` (a diagonal), `linear` (a matrix), `mlp` (residual, two
        layers), `gated_mlp` (ATLAS++) or `deep_mlp` (`depth` layers).
      features: the map of keys and queries: `none`, `elu`, `polynomial` (its Taylor
        coefficients are learned) or `exponential`, up to `degree`. The layer applies
        it: `Tokens` hold mapped keys.
      norm: `x + LN(f(x))` rather than `x + f(x)` (TTT, MIRAS).
      expansion: hidden width of an mlp over its width.
      depth: layers of a `deep_mlp`.
      activation: of the mlps.

    Attentional bias:
      bias: `dot`, `l2`, `lp` (of `power`), `huber`, `huber_norm`, `huber_switched`,
        `value_shift` or `kl`; robust ones have a `threshold` unless each token brings
        its own.
      window: the last so many tokens whose loss a token descends (the Omega rule).

    Retention:
      retention: `none`, `decay` by the token's alpha, `channel` (alpha for each key
        channel), `oja`; `decay` in the dual of `lq` (of `retention_power`), `kl` (rows
        on a simplex of sum `retention_scale`) or `bregman` (hypentropy of
        `retention_scale`); `decay`, and at the end of each chunk `elastic_net` (soft
        threshold of `retention_scale` a token) or `norm_clamp` (at most
        `retention_scale`).
      toward: where a decay pulls: to `zero`, or back to the learned `start` W₀,
        `αₜ W + (1 − αₜ) W₀`. A memory of two layers that has decayed to zero is dead:
        the gradients of both vanish there.
      erases: what the delta term erases: `all` that the memory recalls, or what was
        `written` since the start, `W − W₀`.

    Learning rule:
      rule: `gd`, `momentum`, `nesterov`, `implicit` (proximal), `newton` (Mesa, with
        `ridge`), `muon`, `adam`, or `optax.<name>` for any optimizer of optax that
        needs no more than a learning rate.
      dgd: the delta term: on `both` kinds of layers (a hidden layer's coefficient
        corrected for the norm of its input), on the `input` layer only, or `none`.
      recall: what the delta term recalls: the memory `before` its retention or `after`
        it (Gated DeltaNet).
      steps: inner steps a token, each on its own key and value where these are given.
      rate_law: from a token's η to the step of each matrix (`memory.rates`): the
        `token`'s own for all; by the `energy` of what each matrix meets; that and a
        `budget` of writing a chunk in place of its length; `output`, an exact output
        layer over the features of the chunk's start; `non_expansive`.

    Time:
      gradient: `exact` takes it where the memory stands: then the chunk is a speed
        knob. `anchored` takes it at the chunk's start: then the chunk is part of the
        function, and 1 is the token recurrence. Only memories whose gradient is linear
        in them have a fast exact form.
      read: the state that answers a query: `post` (after the token's own write), `pre`
        (before it) or `anchor` (at the chunk's start, equation 90).
      chunk: tokens per chunk.
      products: `bfloat16` rounds the factors of the products with weights and momentum
        and sums in float32. Products of keys with keys, gates and the triangular
        inverse are float32 always, and so is what is carried.
    """

    architecture: str = "mlp"
    features: str = "none"
    degree: int = 2
    norm: bool = False
    expansion: int = 4
    depth: int = 2
    activation: str = "gelu"

    bias: str = "l2"
    power: float = 3.0
    threshold: float = 1.0
    window: int = 1

    retention: str = "decay"
    retention_power: float = 4.0
    retention_scale: float = 1.0
    toward: Literal["zero", "start"] = "zero"
    erases: Literal["all", "written"] = "all"

    rule: str = "momentum"
    dgd: Literal["both", "input", "none"] = "both"
    recall: Literal["before", "after"] = "before"
    steps: int = 1
    ridge: float = 1.0
    rate_law: Literal["token", "energy", "budget", "output", "non_expansive"] = "token"

    gradient: Literal["anchored", "exact"] = "anchored"
    read: Literal["post", "pre", "anchor"] = "post"
    chunk: int = 16
    products: Literal["float32", "bfloat16"] = "float32"

    _repr_html_ = show.config

    def __post_init__(self):
        self.chosen  # refuses unknown names  # noqa: B018
        one_of(self, **_CHOICES)
        _check_numbers(self)
        for refused, reason in _conflicts(self):
            if refused:
                raise ValueError(reason)
        for option, choice, kinds in readers():
            refuse_unread(self, option, choice, getattr(self, choice), kinds)

    @classmethod
    def migrated(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Options that nothing read could once be set; they meant nothing."""
        unread = {
            option
            for option, choice, kinds in readers()
            if data.get(choice, default_of(cls, choice)) not in kinds
        }
        return {name: value for name, value in data.items() if name not in unread}

    @property
    def chosen(self) -> Chosen:
        """What is so of each choice."""
        return Chosen(
            architecture.ARCHITECTURES.get(self.architecture, "architecture"),
            features.FEATURES.get(self.features, "features"),
            bias.BIASES.get(self.bias, "bias"),
            retention.RETENTIONS.get(self.retention, "retention"),
            rule.get(self.rule),
        )

    @property
    def inertia(self) -> bool:
        """Whether the rule has a momentum, so that tokens bring theta."""
        return self.chosen.rule.inertia

    @property
    def erasures(self) -> int:
        """How many times its rate a write erases of what is stored along the key, if
        the gradient is taken where the memory stands: by a bias that recalls, and by a
        delta term."""
        return int(self.chosen.bias.recalls) + int(self.dgd != "none")

    @property
    def returns(self) -> bool:
        """Whether its start is needed after its first token."""
        return self.toward == "start" or self.erases == "written"


def with_choices(config: MemoryConfig, **changes: Any) -> MemoryConfig:
    """`config` with other choices; options that these do not read, those among
    `changes` too, are at their defaults."""
    return MemoryConfig(**MemoryConfig.migrated(vars(config) | changes))


_CHOICES = {
    "activation": tuple(ACTIVATIONS),
    "toward": ("zero", "start"),
    "erases": ("all", "written"),
    "dgd": ("both", "input", "none"),
    "rate_law": rates.LAWS,
    "recall": ("before", "after"),
    "gradient": ("anchored", "exact"),
    "read": ("post", "pre", "anchor"),
    "products": tuple(architecture.PRODUCTS),
}


def _check_numbers(config: MemoryConfig) -> None:
    least = {"chunk": 1, "expansion": 1, "degree": 1, "depth": 2, "window": 1}
    for name, bound in (least | {"steps": 1}).items():
        if getattr(config, name) < bound:
            raise ValueError(
                f"{name} must be at least {bound}, got {getattr(config, name)}."
            )
    if config.power < 1:
        raise ValueError(f"power must be at least 1, got {config.power}.")
    for name in ("threshold", "retention_scale", "ridge"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}.")
    if config.retention_power <= 2:
        raise ValueError(
            f"retention_power must be above 2, got {config.retention_power}: with 2 "
            "the lq retention is the plain decay."
        )


def _those(kinds: Kinds, has: Callable[[Any], bool]) -> str:
    """The members of a registry of which something is so, as a message lists them."""
    *most, last = map(repr, kinds.which(has))
    return f"{', '.join(most)} or {last}" if most else last


def _conflicts(c: MemoryConfig):
    """Pairs of whether a combination is asked for and why it is refused."""
    shape, mapped, bias_, kept, rule_ = c.chosen
    kinds = registries()
    exact, delta = c.gradient == "exact", c.dgd != "none"

    yield (
        shape.diagonal and mapped.taylor,
        f"features={c.features!r} widens keys, which architecture={c.architecture!r} "
        "multiplies one by one: use 'none' or 'elu', or a matrix.",
    )
    yield (
        shape.diagonal and c.norm,
        f"norm=True needs a matrix or an mlp, got architecture={c.architecture!r}.",
    )
    yield (
        exact and not shape.linear,
        f"gradient='exact' needs architecture='linear' or 'vector', got "
        f"{c.architecture!r}: a non-linear memory has no chunk form for it. Use "
        "gradient='anchored' with chunk=1 for the token recurrence.",
    )
    yield (
        exact and (c.norm or not bias_.linear or c.window > 1),
        "gradient='exact' needs a gradient that is linear in the memory: bias "
        f"{_those(kinds['bias'], lambda b: b.linear)}, norm=False and window=1, got "
        f"bias={c.bias!r}, norm={c.norm}, window={c.window}. Use gradient='anchored' "
        "with chunk=1 for the token recurrence.",
    )
    yield (
        exact and c.read == "anchor",
        "read='anchor' needs gradient='anchored': an exact memory has no anchor.",
    )
    yield (
        exact and not rule_.linear,
        f"gradient='exact' needs rule {_those(kinds['rule'], lambda r: r.linear)}, got "
        f"{c.rule!r}: others are not linear in the gradient. Use gradient='anchored'.",
    )
    yield (
        exact and not kept.linear,
        f"retention={c.retention!r} is not linear in the memory, so it needs "
        "gradient='anchored'.",
    )
    yield (
        kept.channels and not (shape.matrix and exact and rule_.immediate),
        f"retention={c.retention!r} decays each key channel of a matrix by itself: it "
        "needs architecture='linear', gradient='exact' and rule "
        f"{_those(kinds['rule'], lambda r: r.immediate)}, got {c.architecture!r}, "
        f"{c.gradient!r} and {c.rule!r}.",
    )
    yield (
        kept.along_values
        and not (
            shape.matrix
            and exact
            and rule_.plain
            and not bias_.recalls
            and (c.dgd, c.read) == ("none", "post")
        ),
        f"retention={c.retention!r} is −η v (vᵀM) beside a Hebbian write: it needs "
        "architecture='linear', bias='dot', rule='gd', dgd='none', gradient='exact' "
        f"and read='post', got {c.architecture!r}, {c.bias!r}, {c.rule!r}, {c.dgd!r}, "
        f"{c.gradient!r}, {c.read!r}.",
    )
    yield (
        rule_.solves
        and not (
            shape.matrix
            and exact
            and bias_.squares
            and kept.uniform
            and (c.dgd, c.read) == ("none", "post")
        ),
        f"rule={c.rule!r} solves a ridge regression: it needs architecture='linear', "
        "bias='l2', dgd='none', retention "
        f"{_those(kinds['retention'], lambda r: r.uniform)}, gradient='exact' and "
        f"read='post', got {c.architecture!r}, {c.bias!r}, {c.dgd!r}, "
        f"{c.retention!r}, {c.gradient!r}, {c.read!r}.",
    )
    yield (
        delta and (c.window > 1 or kept.mirrors),
        "the delta term erases along one token's key in the weights themselves: "
        f"dgd={c.dgd!r} needs window=1 and a retention other than "
        f"{_those(kinds['retention'], lambda r: r.mirrors)}, got window={c.window}, "
        f"retention={c.retention!r}.",
    )
    yield (
        c.window > 1 and rule_.single_key,
        f"rule={c.rule!r} solves for one pair at a time, got window={c.window}.",
    )
    yield (
        kept.channels and bias_.squares and c.recall == "after",
        "bias='l2' with a delta term recalled after the retention is a transition of "
        f"rank two for each channel: use bias='dot' with retention={c.retention!r}.",
    )
    yield (
        c.recall == "after" and not (delta and kept.decays and kept.linear),
        "recall='after' is about a delta term and a decay: it needs dgd 'both' or "
        f"'input' and retention 'decay' or 'channel', got dgd={c.dgd!r}, "
        f"retention={c.retention!r}.",
    )
    yield (
        c.toward == "start" and (rule_.solves or not kept.returns),
        "toward='start' is about a decay: it needs retention "
        f"{_those(kinds['retention'], lambda r: r.returns)} and a rule other than "
        f"{_those(kinds['rule'], lambda r: r.solves)}, got {c.retention!r}, "
        f"{c.rule!r}.",
    )
    yield (
        c.erases == "written"
        and not (delta and (c.toward == "start" or not kept.decays)),
        "erases='written' is about a delta term beside a start that stays: it needs "
        "dgd 'both' or 'input' and toward='start' or retention='none', got "
        f"dgd={c.dgd!r}, toward={c.toward!r}, retention={c.retention!r}.",
    )
    yield (
        c.recall == "after" and c.toward == "start" and c.erases == "all",
        "recall='after' beside toward='start' would erase α W, but retention leaves "
        "α W + (1 − α) W₀: use erases='written' or recall='before'.",
    )
    law = c.rate_law
    yield (
        law != "token"
        and (
            not (shape.matrix or shape.two_layers)
            or not kept.uniform
            or not rule_.explicit
            or c.norm
            or c.window > 1
            or c.steps > 1
        ),
        f"rate_law={law!r} knows the layers of a matrix or an mlp without norm, window "
        "or several steps, with retention "
        f"{_those(kinds['retention'], lambda r: r.uniform)} and rule "
        f"{_those(kinds['rule'], lambda r: r.explicit)}, got {c.architecture!r}, "
        f"norm={c.norm}, window={c.window}, steps={c.steps}, {c.retention!r}, "
        f"{c.rule!r}.",
    )
    yield (
        law != "token" and exact,
        f"rate_law={law!r} is about anchored gradients: an exact memory is stable at "
        "every rate up to 1. Use rate_law='token'.",
    )
    yield (
        law == "output" and not (shape.two_layers and bias_.linear),
        "rate_law='output' solves for the output layer of an mlp: it needs bias 'l2' "
        f"or 'dot', got {c.architecture!r}, {c.bias!r}. A matrix has gradient='exact'.",
    )
    yield (
        law == "budget" and rule_.inertia,
        "rate_law='budget' counts the writes of a chunk, and a momentum carries them "
        f"into the next: it needs rule 'gd', got {c.rule!r}.",
    )
    yield (
        law == "non_expansive" and (rule_.inertia or not kept.decays),
        "rate_law='non_expansive' bounds a step by what its token forgets: it needs "
        f"rule 'gd' and retention 'decay', got {c.rule!r}, {c.retention!r}.",
    )
    yield (
        c.steps > 1 and (c.window > 1 or rule_.solves or not (exact or c.chunk == 1)),
        f"steps={c.steps} needs window=1, a rule other than "
        f"{_those(kinds['rule'], lambda r: r.solves)}, and gradient='exact' or "
        "chunk=1: gradients taken at the chunk's start are the same at every step, got "
        f"window={c.window}, rule={c.rule!r}, gradient={c.gradient!r}, "
        f"chunk={c.chunk}.",
    )
    yield (
        c.products != "float32"
        and (shape.diagonal or rule_.solves or not (kept.uniform and rule_.linear)),
        f"products={c.products!r} is about memories whose gradients are outer products "
        "with known factors: it needs a matrix or an mlp with retention "
        f"{_those(kinds['retention'], lambda r: r.uniform)} and rule "
        f"{_those(kinds['rule'], lambda r: r.linear and not r.solves)}, got "
        f"{c.architecture!r}, {c.retention!r} and {c.rule!r}.",
    )


def key_width(config: MemoryConfig, width: int) -> int:
    """Width of mapped keys and queries, for heads of `width`."""
    return features.width(config.features, config.degree, width)


def build_architecture(config: MemoryConfig, width: int) -> Architecture:
    """The memory's function class for values of `width` and keys of `key_width`."""
    found, wide = config.chosen, key_width(config, width)

    def skip(x):
        return features.linear_part(config.features, config.degree, x, width)

    function = found.architecture.make(config, width, wide, skip)
    function = function._replace(product=architecture.PRODUCTS[config.products])
    if found.architecture.linear or not found.retention.simplex:
        return function

    def logits(key):  # of unit variance, or all rows begin nearly uniform
        return jax.tree.map(lambda w: w * w.shape[-1] ** 0.5, function.init(key))

    return function._replace(init=logits)


def build_bias(config: MemoryConfig) -> bias.Loss:
    return bias.build(config.bias, power=config.power)


def threshold(config: MemoryConfig, tokens: Tokens) -> Array:
    """The thresholds of robust biases, shaped like the tokens' `eta`."""
    if tokens.threshold is not None:
        return tokens.threshold
    return jnp.full_like(tokens.eta, config.threshold)


def delta_rates(
    config: MemoryConfig,
    eta: Array | dict[str, Array],
    inputs: dict[str, Array],
) -> dict:
    """The coefficient b of the delta term for each matrix that has one.

    A key of unit norm meets the first matrices, where the explicit coefficient η is
    stable; mapped keys and hidden vectors have any norm: theirs is the proximal one.
    Under a `rate_law`, `eta` is the step of each matrix, and b is the same.
    """
    if config.dgd == "none":
        return {}
    found = config.chosen
    keyed = found.architecture.first(config)
    if config.rate_law != "token":
        names = keyed if config.dgd == "input" else tuple(inputs)
        return {name: eta[name] for name in names}
    rates = {}
    for name, x in inputs.items():
        if name in keyed and found.features.plain:
            rates[name] = eta
        elif name in keyed or config.dgd == "both":
            assert not isinstance(eta, dict)  # that is a rate law's
            rates[name] = rule.corrected_rate(eta, x)
    return rates


def initial_weights(config: MemoryConfig, start: Weights) -> Weights:
    """The memory's weights where the level above has it begin at `start`, which for a
    mirror retention are dual weights, free of its constraint."""
    link = config.chosen.retention.link
    return start if link is None else jax.tree.map(link(config).primal, start)


class Erasure(NamedTuple):
    """The delta term of one matrix, `−(M recall) alongᵀ`."""

    recall: Array
    along: Array


def erasures(
    config: MemoryConfig,
    tokens: Tokens,
    inputs: dict[str, Array],
    eta: Array | dict[str, Array] | None = None,
) -> dict[str, Erasure]:
    """The delta terms of tokens that share the leading axes of `inputs`; `eta` is that
    of the tokens unless it is given, a step a matrix."""
    terms = {}
    eta = tokens.eta if eta is None else eta
    for name, rate in delta_rates(config, eta, inputs).items():
        x = inputs[name]
        if tokens.erase_key is not None:
            x = tokens.erase_key
        if tokens.erase_rate is not None:
            rate = tokens.erase_rate
        kept = tokens.alpha if config.recall == "after" else jnp.ones_like(tokens.eta)
        spread = lambda a, x: jnp.broadcast_to(  # noqa: E731
            a if a.ndim == x.ndim else a[..., None], x.shape
        )
        terms[name] = Erasure(spread(kept, x) * x, spread(rate, x) * x)
    return terms


def flow_of(config: MemoryConfig) -> Flow:
    """The parts of the memory's learning: rule, delta term and retention."""
    found, erase, retained, landing = config.chosen, None, None, None

    def erased(token, inputs):
        if config.rate_law == "token":
            return erasures(config, token, inputs)
        made = rates.steps(config, token, inputs)  # whose `inputs` is a `Met`
        return erasures(config, token, inputs.inputs, made)

    if config.dgd != "none":
        erase = rule.erase(erased, config.erases == "written")
    kept = found.retention
    if not found.rule.solves:  # which decays its own statistics
        retained = kept.make and kept.make(config)
        if kept.landing is not None:
            landing = retention.project(kept.landing(config), config.chunk)
    return Flow(
        step=found.rule.step and found.rule.step(config),
        momentum=found.rule.momentum and found.rule.momentum(config),
        erase=erase,
        retention=retained,
        landing=landing,
    )


def build_flow(config: MemoryConfig) -> optax.GradientTransformationExtraArgs:
    """The rule, the delta term and the retention as one optax transformation, whose
    state is a `flow.FlowState`."""
    return chain(flow_of(config))


def plain_tokens(config: MemoryConfig, tokens: Tokens) -> Tokens:
    """Tokens with every rate filled in, one inner step each (so `T * steps` of them).

    Retention acts in a token's first step only.
    """
    if not config.chosen.retention.decays:
        tokens = tokens._replace(alpha=jnp.ones_like(tokens.alpha))
    if not config.inertia:
        tokens = tokens._replace(theta=jnp.zeros_like(tokens.theta))
    if config.window > 1 and tokens.threshold is not None:
        raise ValueError(
            "tokens.threshold must be None with a window: the pairs of a window share "
            "config.threshold."
        )
    if config.window > 1 and tokens.weights is None:
        ones = jnp.ones((*tokens.eta.shape, config.window), tokens.eta.dtype)
        tokens = tokens._replace(weights=ones)
    if config.steps == 1:
        return tokens
    ranks = (2, 2, 2, 1, tokens.alpha.ndim, 1, 1, 2, 2, 1)

    def spread(name, leaf, rank):
        if leaf is None:
            return None
        if leaf.ndim == rank:  # the same in every step
            leaf = jnp.repeat(leaf[:, None], config.steps, axis=1)
        if leaf.shape[1] != config.steps:
            raise ValueError(
                f"tokens.{name} must bring {config.steps} steps each, got {leaf.shape}."
            )
        return leaf.reshape(-1, *leaf.shape[2:])

    first = jnp.arange(tokens.alpha.shape[0] * config.steps) % config.steps == 0
    spread_out = Tokens._make(map(spread, Tokens._fields, tokens, ranks))
    alpha = spread_out.alpha
    first = first.reshape(-1, *[1] * (alpha.ndim - 1))
    return spread_out._replace(alpha=jnp.where(first, alpha, jnp.ones_like(alpha)))


def level_context(config: MemoryConfig, tokens: Tokens, recent: tuple | None = None):
    """The stream that `memory_level` lives through: one item an inner step; with a
    window, keys and values `[T, window, ...]`, the item's own first.

    Args:
      config: the memory.
      tokens: T tokens.
      recent: the `window - 1` keys and values before them, oldest first.
    """
    tokens = plain_tokens(config, tokens)
    if config.rate_law == "budget":
        tokens = tokens._replace(eta=rates.ration_stream(tokens.eta, config.chunk))
    if config.window == 1:
        return tokens
    assert recent is not None  # a window has some
    back = jnp.arange(config.window)[None]
    at = jnp.arange(tokens.eta.shape[0])[:, None] + config.window - 1 - back
    k, v = (
        jnp.concatenate([a, b])[at]
        for a, b in zip(recent, (tokens.k, tokens.v), strict=True)
    )
    return tokens._replace(k=k, v=v)


def memory_level(
    config: MemoryConfig, width: int, flow: optax.GradientTransformation | None = None
) -> Level:
    """The memory as a `Level` whose context is a stream of `Tokens`.

    `unroll(memory_level(config, width), ...)` is the definition that the chunk-parallel
    kernels are held to, values and pullbacks. Tokens are those of `level_context`.

    Args:
      config: the four choices.
      width: of values, and of keys before their feature map.
      flow: any optax transformation, in place of the config's rule, retention and delta
        term; it may read the token from the extra argument `context`.
    """
    function = build_architecture(config, width)
    loss = build_bias(config)

    def objective(weights, token):
        if config.window == 1:
            output = function.apply(weights, token.k)
            return loss(output, token.v, threshold(config, token))
        limit = threshold(config, token)
        losses = jax.vmap(lambda o, v: loss(o, v, limit))(
            function.apply(weights, token.k), token.v
        )
        return jnp.vdot(token.weights, losses)

    def inputs(weights, token):
        k = token.k if config.window == 1 else token.k[0]
        if config.rate_law == "token":
            return function.inputs(weights, k)
        slope = jax.grad(loss)
        return rates.meet(
            function, weights, k, lambda o: slope(o, token.v, threshold(config, token))
        )

    return Level(
        init=lambda key: initial_weights(config, function.init(key)),
        read=lambda weights, token: function.apply(weights, token.q),
        objective=objective,
        flow=build_flow(config) if flow is None else flow,
        clock=Clock(anchor=config.chunk if config.gradient == "anchored" else 1),
        read_at=config.read,
        inputs=inputs,
        objective_name=config.bias,
        flow_name=config.rule if flow is None else "",
    )


def half_life_to_retention(half_life: Array) -> Array:
    """`α = 2^(−1/h)`: the retained fraction whose powers halve every h tokens."""
    return jnp.exp2(-1.0 / half_life)
