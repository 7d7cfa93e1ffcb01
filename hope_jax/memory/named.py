"""Published sequence models as points among the four choices.

Each function is one model: its recurrence and source in the docstring, its choices in
the configs. `M` is `[V, K]`; η, α and θ are the inner rate, the retained fraction and
the inner momentum of a token; φ is the feature map; `ξ` marks the start of a token's
chunk. An *exact* chunk computes the token recurrence itself; an *anchored* one takes
its gradients at `M_ξ`, so the chunk is part of the model and 1 is the token recurrence.
The layer around the memory (convolutions, norms, output gate) is one for all points,
`models.memory_mixer`; where a paper's layer differs, that is not reproduced here.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from hope_jax.core.config import did_you_mean
from hope_jax.memory.compose import MemoryConfig
from hope_jax.memory.gates import GateConfig

ChunkKind = Literal["exact", "anchored", "non-parametric"]


class Point(NamedTuple):
    """A published model.

    Attributes:
      title: its usual name.
      source: where it was published.
      memory: its four choices; None for a non-parametric end.
      gates: how its tokens get their rates.
    """

    title: str
    source: str
    memory: MemoryConfig | None
    gates: GateConfig = GateConfig()

    @property
    def chunk(self) -> ChunkKind:
        if self.memory is None:
            return "non-parametric"
        return self.memory.gradient


def _matrix(chunk, **choices) -> MemoryConfig:
    plain: dict[str, Any] = dict(
        architecture="linear", bias="dot", retention="none", rule="gd", dgd="none"
    )
    return MemoryConfig(**plain | choices, gradient="exact", chunk=chunk)


_UNIT = GateConfig(unit_values=True)  # as long as what a normed memory can answer


def _deep(chunk, **choices) -> MemoryConfig:
    plain: dict[str, Any] = dict(architecture="mlp", norm=True, rule="gd", dgd="none")
    return MemoryConfig(**plain | choices, gradient="anchored", chunk=chunk)


# Hebbian memories: dot-product bias


def linear_attention(chunk: int = 32) -> Point:
    """`Mₜ = Mₜ₋₁ + vₜ φ(kₜ)ᵀ`, φ = elu + 1. Exact.

    arXiv:2006.16236, without its normaliser `Σ φ(k)`, which the output norm replaces.
    """
    return Point(
        "Linear attention",
        "arXiv:2006.16236",
        _matrix(chunk, features="elu"),
        GateConfig(rate="one", retention="one", unit_keys=False),
    )


def retnet(chunk: int = 32) -> Point:
    """`Mₜ = γ Mₜ₋₁ + vₜ kₜᵀ`, γ = 1 − 2^(−5−h) for head h, rotary positions. Exact.

    arXiv:2307.08621.
    """
    return Point(
        "RetNet",
        "arXiv:2307.08621",
        _matrix(chunk, retention="decay"),
        GateConfig(rate="one", retention="constant", rotary=True),
    )


def gla(chunk: int = 32) -> Point:
    """`Mₜ = Mₜ₋₁ Diag(αₜ) + vₜ kₜᵀ`, αₜ a vector of the token. Exact.

    Gated linear attention, arXiv:2312.06635.
    """
    return Point(
        "GLA",
        "arXiv:2312.06635",
        _matrix(chunk, retention="channel"),
        GateConfig(rate="one"),
    )


def mamba2(chunk: int = 32) -> Point:
    """`Mₜ = αₜ Mₜ₋₁ + Δₜ vₜ kₜᵀ`, αₜ = exp(−a Δₜ). Exact.

    The state-space dual of Mamba-2, arXiv:2405.21060: k, q and v are its B, C and x.
    Every head has keys of its own here.
    """
    return Point(
        "Mamba-2",
        "arXiv:2405.21060",
        _matrix(chunk, retention="decay"),
        GateConfig(rate="step"),
    )


def swla(chunk: int = 16) -> Point:
    """`Mₜ = αₜ Mₜ₋₁ + ηₜ Σ ωₜᵢ vᵢ kᵢᵀ` over the last 4 tokens i. Anchored.

    Sliding-window linear attention, equation 20 of ATLAS, arXiv:2505.23735. The dot
    product's gradient is the same at any state, so its chunk changes nothing.
    """
    memory = MemoryConfig(
        architecture="linear", bias="dot", rule="gd", dgd="none", window=4, chunk=chunk
    )
    return Point("SWLA", "arXiv:2505.23735", memory)


def ojanet(chunk: int = 32) -> Point:
    """`Mₜ = αₜ Mₜ₋₁ + ηₜ vₜ (kₜᵀ − vₜᵀ Mₜ₋₁)`. Exact.

    Oja's rule, equations 66 and 67 of arXiv:2512.24695; values of unit norm keep it
    stable.
    """
    return Point(
        "OjaNet",
        "arXiv:2512.24695",
        _matrix(chunk, retention="oja"),
        GateConfig(unit_values=True),
    )


# Delta rules: L2 bias, or the same as dot product with a delta term


def delta_net(chunk: int = 32) -> Point:
    """`Mₜ = Mₜ₋₁ (I − ηₜ kₜ kₜᵀ) + ηₜ vₜ kₜᵀ`. Exact.

    arXiv:2406.06484; equation 65 of arXiv:2512.24695.
    """
    return Point(
        "DeltaNet",
        "arXiv:2406.06484",
        _matrix(chunk, bias="l2"),
        GateConfig(retention="one"),
    )


def gated_delta_net(chunk: int = 32) -> Point:
    """`Mₜ = αₜ Mₜ₋₁ (I − ηₜ kₜ kₜᵀ) + ηₜ vₜ kₜᵀ`. Exact.

    arXiv:2412.06464: a delta term on a dot-product bias that recalls what retention
    has left.
    """
    return Point(
        "Gated DeltaNet",
        "arXiv:2412.06464",
        _matrix(chunk, retention="decay", dgd="both", recall="after"),
    )


def delta_product(chunk: int = 16) -> Point:
    """`Mₜ = Mₜ₋₁ αₜ Π (I − ηₜⱼ kₜⱼ kₜⱼᵀ) + …`, two keys and values a token. Exact.

    Gated DeltaProduct, arXiv:2502.10297; rates up to 2 let a step reflect.
    """
    return Point(
        "DeltaProduct",
        "arXiv:2502.10297",
        _matrix(chunk, retention="decay", dgd="both", recall="after", steps=2),
        GateConfig(rate_bound=2.0),
    )


def kda(chunk: int = 16) -> Point:
    """`Mₜ = Mₜ₋₁ Diag(αₜ) (I − ηₜ kₜ kₜᵀ) + ηₜ vₜ kₜᵀ`. Exact.

    Kimi delta attention, arXiv:2510.26692: Gated DeltaNet with a decay a key channel.
    """
    return Point(
        "KDA",
        "arXiv:2510.26692",
        _matrix(chunk, retention="channel", dgd="both", recall="after"),
    )


def rwkv7(chunk: int = 16) -> Point:
    """`Mₜ = Mₜ₋₁ (Diag(wₜ) − κₜ (aₜ ⊙ κₜ)ᵀ) + vₜ k̃ₜᵀ`. Exact.

    arXiv:2503.14456: κ is a removal key of its own, a a rate a channel, and the write
    key is modulated by a.
    """
    return Point(
        "RWKV-7",
        "arXiv:2503.14456",
        _matrix(chunk, retention="channel", dgd="both"),
        GateConfig(rate="one", erase="channel"),
    )


def comba(chunk: int = 32) -> Point:
    """`Mₜ = Mₜ₋₁ (αₜ I − b ηₜ kₜ kₜᵀ) + ηₜ vₜ kₜᵀ`, read at `qₜ − d kₜ`. Exact.

    arXiv:2506.02475; b, the strength of state feedback, and d are learned a head.
    """
    return Point(
        "Comba",
        "arXiv:2506.02475",
        _matrix(chunk, retention="decay", dgd="both"),
        GateConfig(erase="feedback"),
    )


def longhorn(chunk: int = 32) -> Point:
    """`Mₜ = Mₜ₋₁ (I − βₜ kₜ kₜᵀ) + βₜ vₜ kₜᵀ`, βₜ = ηₜ / (1 + ηₜ‖kₜ‖²). Exact.

    The implicit step of arXiv:2407.14207, written there for diagonal states.
    """
    return Point(
        "Longhorn",
        "arXiv:2407.14207",
        _matrix(chunk, bias="l2", rule="implicit"),
        GateConfig(retention="one"),
    )


def mesa(chunk: int = 32) -> Point:
    """`Mₜ = argmin Σᵢ ζₜᵢ ‖M kᵢ − vᵢ‖² + λ‖M‖²`, ζ from α and η. Exact.

    MesaNet, arXiv:2506.05233: with Gₜ = αₜ Gₜ₋₁ + ηₜ vₜ kₜᵀ and
    Hₜ = αₜ Hₜ₋₁ + ηₜ kₜ kₜᵀ, it is `Mₜ = Gₜ (Hₜ + λ I)⁻¹`.
    """
    return Point(
        "Mesa",
        "arXiv:2506.05233",
        _matrix(chunk, bias="l2", retention="decay", rule="newton"),
    )


# Test-time training and Titans


def ttt_linear(chunk: int = 16) -> Point:
    """`M(k) = k + LN(W k)`, `Wₜ = Wₜ₋₁ − ηₜ ∇½‖M(kₜ) − vₜ‖²` at W_ξ. Anchored.

    arXiv:2407.04620, its LN of unit length (`architecture.normalise`), its loss halved.
    """
    memory = MemoryConfig(
        architecture="linear",
        norm=True,
        retention="none",
        rule="gd",
        dgd="none",
        chunk=chunk,
    )
    return Point("TTT-Linear", "arXiv:2407.04620", memory, GateConfig(retention="one"))


def ttt_mlp(chunk: int = 16) -> Point:
    """`M(k) = k + LN(W₁ σ(W₂ k))`, otherwise as TTT-Linear. Anchored.

    arXiv:2407.04620.
    """
    return Point(
        "TTT-MLP",
        "arXiv:2407.04620",
        _deep(chunk, retention="none"),
        GateConfig(retention="one", unit_values=True),
    )


def titans(chunk: int = 64) -> Point:
    """`Mₜ = αₜ Mₜ₋₁ + Sₜ`, `Sₜ = θₜ Sₜ₋₁ − ηₜ ∇½‖M_ξ(kₜ) − vₜ‖²`. Anchored.

    The long-term memory of Titans (LMM), arXiv:2501.00663, equations 12 to 18, a
    residual MLP of two layers.
    """
    return Point(
        "Titans (LMM)",
        "arXiv:2501.00663",
        _deep(chunk, norm=False, rule="momentum"),
    )


# MIRAS


def moneta(chunk: int = 16) -> Point:
    """`Aₜ = αₜ Aₜ₋₁ − ηₜ ∇‖M_ξ(kₜ) − vₜ‖₃³`, `Wₜ = Aₜ / ‖Aₜ‖₄²`. Anchored.

    arXiv:2504.13173, equations 24 and 25. A larger A is a smaller W, whose gradient
    through the norm is larger in turn: a step is as large, beside A, whatever A is, and
    a tenth of the usual rate keeps the memory from chaos.
    """
    return Point(
        "Moneta",
        "arXiv:2504.13173",
        _deep(chunk, bias="lp", power=3.0, retention="lq", retention_power=4.0),
        GateConfig(rate_bound=0.1 / chunk, unit_values=True),
    )


def yaad(chunk: int = 16) -> Point:
    """`Wₜ = αₜ Wₜ₋₁ − ηₜ ∇½‖r‖²` if `‖rₜ‖ <= δₜ`, else `− ηₜ δₜ ∇‖r‖₁`. Anchored.

    arXiv:2504.13173, equation 26; δ is made of the token. η, α and δ are numbers of a
    head here, vectors there.
    """
    return Point(
        "Yaad",
        "arXiv:2504.13173",
        _deep(chunk, bias="huber_switched"),
        GateConfig(threshold="token", unit_values=True),
    )


def memora(chunk: int = 16) -> Point:
    """`Wₜ = softmax(αₜ log Wₜ₋₁ − ηₜ ∇½‖M_ξ(kₜ) − vₜ‖²)`, row by row. Anchored.

    arXiv:2504.13173, equation 27: the entropy keeps each row on a simplex.
    """
    return Point("Memora", "arXiv:2504.13173", _deep(chunk, retention="kl"), _UNIT)


# ATLAS


def dla(chunk: int = 16) -> Point:
    """`Wₜ = αₜ Wₜ₋₁ + ηₜ ∇⟨M_ξ(kₜ), vₜ⟩`, a deep memory. Anchored.

    Deep linear attention, equation 19 of ATLAS, arXiv:2505.23735.
    """
    return Point("DLA", "arXiv:2505.23735", _deep(chunk, bias="dot"), _UNIT)


def deep_transformer(chunk: int = 16) -> Point:
    """DLA with `φ(q)·φ(k) ≈ exp(q·k)` to the second order. Anchored.

    DeepTransformers, equations 25 and 26 of ATLAS, arXiv:2505.23735.
    """
    return Point(
        "DeepTransformer",
        "arXiv:2505.23735",
        _deep(chunk, bias="dot", features="exponential"),
        _UNIT,
    )


def omega_net(chunk: int = 16) -> Point:
    """`Wₜ = αₜ Wₜ₋₁ − ηₜ Σ ωₜᵢ ∇½‖M_ξ(φ(kᵢ)) − vᵢ‖²`, i the last 4. Anchored.

    Equations 8 to 11 of ATLAS, arXiv:2505.23735; φ polynomial, coefficients learned.
    """
    return Point(
        "OmegaNet",
        "arXiv:2505.23735",
        _deep(chunk, features="polynomial", window=4),
        _UNIT,
    )


def dot(chunk: int = 16) -> Point:
    """OmegaNet with `φ(q)·φ(k) ≈ exp(q·k)` to the second order. Anchored.

    Deep Omega Transformer, equation 27 of ATLAS, arXiv:2505.23735.
    """
    return Point(
        "Dot",
        "arXiv:2505.23735",
        _deep(chunk, features="exponential", window=4),
        _UNIT,
    )


def atlas(chunk: int = 16) -> Point:
    """`Wₜ = αₜ Wₜ₋₁ + ηₜ NS₅(Sₜ)`, `Sₜ = θₜ Sₜ₋₁ − Σ ωₜᵢ ∇ℓᵢ(W_ξ)`. Anchored.

    Equations 32 and 33 of arXiv:2505.23735, in the sign that descends: OmegaNet with
    the orthogonalised momentum of Muon.
    """
    return Point(
        "ATLAS",
        "arXiv:2505.23735",
        _deep(chunk, features="polynomial", window=4, rule="muon"),
        _UNIT,
    )


# Non-parametric ends


def softmax_attention() -> Point:
    """`argmin_z Σᵢ exp(q·kᵢ) ‖vᵢ − z‖²` over all keys: no state but the context.

    Equation 62 of arXiv:2512.24695 (Nadaraya and Watson's regression).
    """
    return Point("Softmax attention", "arXiv:1706.03762", None)


def sliding_window() -> Point:
    """`argmin_z Σᵢ exp(q·kᵢ) ‖vᵢ − z‖²` over the last keys only.

    Equation 63 of arXiv:2512.24695.
    """
    return Point("Sliding-window attention", "arXiv:2004.05150", None)


POINTS: dict[str, Callable[..., Point]] = {
    make.__name__: make
    for make in (
        linear_attention,
        retnet,
        gla,
        mamba2,
        swla,
        ojanet,
        delta_net,
        gated_delta_net,
        delta_product,
        kda,
        rwkv7,
        comba,
        longhorn,
        mesa,
        ttt_linear,
        ttt_mlp,
        titans,
        moneta,
        yaad,
        memora,
        dla,
        deep_transformer,
        omega_net,
        dot,
        atlas,
        softmax_attention,
        sliding_window,
    )
}


def memories() -> tuple[str, ...]:
    """The points that have a memory: all but the non-parametric ends."""
    return tuple(name for name, make in POINTS.items() if make().memory is not None)


def get(name: str, chunk: int | None = None) -> Point:
    """The named point, with another chunk if one is given.

    Raises:
      ValueError: no point has this name, or it has no chunk to set.
    """
    if name not in POINTS:
        raise ValueError(
            f"no memory is named {name!r}; there are {', '.join(POINTS)}."
            f"{did_you_mean(name, POINTS)}"
        )
    if chunk is None:
        return POINTS[name]()
    if POINTS[name]().memory is None:
        raise ValueError(f"chunk ({chunk}) does not apply to {name}, which has none.")
    return POINTS[name](chunk)


def choices(memory: MemoryConfig) -> tuple[str, str, str, str]:
    """Architecture, bias, retention and rule in words, as tables show them."""
    found = memory.chosen
    architecture = found.architecture.says(memory)
    if memory.norm:
        architecture += " + LN"
    if not found.features.plain:
        architecture += f" + {memory.features}"
    bias = found.bias.says(memory)
    if memory.window > 1:
        bias += f", window {memory.window}"
    retention = found.retention.says(memory)
    if found.retention.mirrors:
        retention += " + decay"
    rule = memory.rule
    if memory.dgd != "none":
        rule += " + delta"
    if memory.steps > 1:
        rule += f", {memory.steps} steps"
    return architecture, bias, retention, rule
