"""What optimizers by name may be told beyond rates and decays, as configs.

Each class is the options of the name in `hope_jax.optim.RULES` that its field in
`OptimizerConfig` bears: `--set optimizer.m3.alpha=0.5` is read where `m3` moves a group
of parameters, and refused where it does not. The rules themselves check the values.
"""

import dataclasses
from typing import Literal

from hope_jax.memory.compose import MemoryConfig
from hope_jax.optim import adaptive, generalised, m3, momentum, shampoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class DGD:
    """Of `dgd`; see `hope_jax.optim.dgd.dgd`.

    Attributes:
      explicit: one gradient step on the objective instead of its minimum.
      retention: how much of a matrix is kept at each step.
    """

    explicit: bool = False
    retention: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGD:
    """Of `ggd`; see `hope_jax.optim.slopes.descend_slopes`.

    Attributes:
      memory: the bias, the rule and the retention; any of a matrix memory that need no
        single key. By default explicit DGD. The momentum of a rule is `b1`.
      retention: how much of a matrix is kept at each step, if there is a retention.
    """

    memory: MemoryConfig = MemoryConfig(
        architecture="linear",
        bias="l2",
        rule="gd",
        retention="none",
        dgd="none",
        chunk=1,
    )
    retention: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaMomentum:
    """Of `delta_momentum`; see `hope_jax.optim.momentum.delta_momentum`.

    Attributes:
      form: each number by itself, or matrices.
      stability: what keeps the memory from blowing up.
    """

    form: momentum.Form = "element"
    stability: momentum.Stability = "proximal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMapMomentum:
    """Of `feature_map_momentum`.

    Attributes:
      feature_map: `sign`, by which the size of gradients does not matter, or `tanh`,
        for which gradients far below 1 pass unchanged.
    """

    feature_map: Literal["sign", "tanh"] = "sign"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonlinearMomentum:
    """Of `nonlinear_momentum`; see `hope_jax.optim.momentum.nonlinear_momentum`.

    Attributes:
      literal: the learning rate inside, as the paper prints it.
    """

    literal: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepMomentum:
    """Of `deep_momentum`; see `hope_jax.optim.deep.deep_momentum`.

    Attributes:
      inner_rate: of the memory's own descent.
      objective: what it descends, an attentional bias of `hope_jax.memory.bias`.
      target: what gradients are mapped to: none for themselves, or the `ones` of the
        paper.
      hidden: width of the network.
    """

    inner_rate: float = 0.1
    objective: str = "l2"
    target: Literal["ones"] | None = None
    hidden: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientMemory:
    """Of `gradient_memory`; see `hope_jax.optim.generalised.from_memory`.

    Attributes:
      memory: which memory learns the gradients; `b1` is what its retention keeps.
      rows: whether the rows of a gradient teach it at once or one after another; none
        for at once where that is defined.
      inner_rate: of its rule; none for half of what is stable.
      inertia: momentum of its rule, where it has one.
    """

    memory: MemoryConfig = MemoryConfig(
        architecture="linear", bias="l2", rule="gd", dgd="none", gradient="exact"
    )
    rows: generalised.Rows | None = None
    inner_rate: float | None = None
    inertia: float = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamMemory:
    """Of `adam_memory`; see `hope_jax.optim.adaptive.adam_memory`.

    Attributes:
      ridge: of the regression, on the scale of squared gradients.
      target: what gradients are mapped to.
      literal: sums in place of means, as printed.
    """

    ridge: float = 0.0
    target: adaptive.Target = "root"
    literal: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaGradMemory:
    """Of `adagrad_memory`; see `hope_jax.optim.adaptive.adagrad_memory`.

    Attributes:
      form: each number by itself, or whole rows.
      ridge: of the regression, on the scale of squared gradients.
      max_width: of the last axis of a leaf, for `outer`.
    """

    form: adaptive.Form = "element"
    ridge: float = 0.0
    max_width: int = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaMuon:
    """Of `adamuon`; see `hope_jax.optim.muon.scale_by_adamuon`.

    Attributes:
      sign: orthogonalise the signs of the memory, or the memory itself.
    """

    sign: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class M3:
    """Of `m3`; see `hope_jax.optim.m3.scale_by_m3`.

    Attributes:
      periods: steps between two moves of each scale's memory, the first of them 1; on a
        slower clock, moves of the group.
      alpha: weights of all scales but the first, or one number for each.
      decays: what each memory keeps when it moves; none for `b1` and then 0.9.
      variant: how their sum is scaled.
      spread: take the factors of slow memories at several steps.
    """

    periods: tuple[int, ...] = (1, 10)
    alpha: float | tuple[float, ...] = 0.3
    decays: tuple[float, ...] | None = None
    variant: m3.Variant = "adamuon"
    spread: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shampoo:
    """Of `shampoo`; see `hope_jax.optim.shampoo.scale_by_shampoo`.

    Attributes:
      frequency: steps between two takings of the inverse roots.
      root: of the two sides' matrices.
      grafting: where the size of a step comes from.
      max_size: of a side with a matrix of its own.
    """

    frequency: int = 10
    root: Literal[2, 4] = 4
    grafting: shampoo.Grafting = "adam"
    max_size: int = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soap:
    """Of `soap`; see `hope_jax.optim.shampoo.scale_by_soap`.

    Attributes:
      frequency: steps between two turns of the bases.
      shampoo_beta: what the matrices of the two sides keep at each step.
      max_size: of a side with a basis of its own.
    """

    frequency: int = 10
    shampoo_beta: float = 0.95
    max_size: int = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """What the inner rule of a level may be told beyond its rate.

    Attributes:
      b1: decay of the first moment, or the momentum of rules with only one.
      b2: decay of the second moment.
      deep_momentum, m3, ...: further options of the name that they bear; they may be
        set only where it moves something.
    """

    b1: float = 0.9
    b2: float = 0.99
    dgd: DGD = DGD()
    ggd: GGD = GGD()
    adamuon: AdaMuon = AdaMuon()
    m3: M3 = M3()
    shampoo: Shampoo = Shampoo()
    soap: Soap = Soap()
    delta_momentum: DeltaMomentum = DeltaMomentum()
    feature_map_momentum: FeatureMapMomentum = FeatureMapMomentum()
    nonlinear_momentum: NonlinearMomentum = NonlinearMomentum()
    deep_momentum: DeepMomentum = DeepMomentum()
    gradient_memory: GradientMemory = GradientMemory()
    adam_memory: AdamMemory = AdamMemory()
    adagrad_memory: AdaGradMemory = AdaGradMemory()

    def __post_init__(self):
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}."
                )
