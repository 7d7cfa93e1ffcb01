"""Optimizers by name: a file each with its config, which builds it, and a line here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hope_jax.core.config import Kinds
from hope_jax.optim.rules.adafactor import Adafactor
from hope_jax.optim.rules.adagrad_memory import AdaGradMemory
from hope_jax.optim.rules.adam import Adam
from hope_jax.optim.rules.adam_memory import AdamMemory
from hope_jax.optim.rules.adamuon import AdaMuon
from hope_jax.optim.rules.deep_momentum import DeepMomentum
from hope_jax.optim.rules.delta_momentum import DeltaMomentum
from hope_jax.optim.rules.dgd import DGD
from hope_jax.optim.rules.feature_map_momentum import FeatureMapMomentum
from hope_jax.optim.rules.ggd import GGD
from hope_jax.optim.rules.gradient_memory import GradientMemory
from hope_jax.optim.rules.lion import Lion
from hope_jax.optim.rules.m3 import M3
from hope_jax.optim.rules.momentum import Momentum
from hope_jax.optim.rules.muon import Muon
from hope_jax.optim.rules.nonlinear_momentum import NonlinearMomentum
from hope_jax.optim.rules.preconditioned_momentum import PreconditionedMomentum
from hope_jax.optim.rules.sgd import SGD
from hope_jax.optim.rules.shampoo import Shampoo
from hope_jax.optim.rules.soap import Soap

RULES = Kinds(
    "optimizer",
    {
        "adamw": Adam(),
        "adam": Adam(kind="adam"),
        "sgd": SGD(),
        "lion": Lion(),
        "adafactor": Adafactor(),
        "muon": Muon(),
        "adamuon": AdaMuon(),
        "m3": M3(),
        "shampoo": Shampoo(),
        "soap": Soap(),
        "dgd": DGD(),
        "ggd": GGD(),
        "momentum": Momentum(),
        "delta_momentum": DeltaMomentum(),
        "preconditioned_momentum": PreconditionedMomentum(),
        "feature_map_momentum": FeatureMapMomentum(),
        "nonlinear_momentum": NonlinearMomentum(),
        "deep_momentum": DeepMomentum(),
        "gradient_memory": GradientMemory(),
        "adam_memory": AdamMemory(),
        "adagrad_memory": AdaGradMemory(),
    },
)


def saved(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a rule from that of configs which held the options of every rule.

    Args:
      kind: of the rule.
      options: `b1` and `b2`, of all rules, and under the name of each its own options.
    """
    fields = {field.name for field in dataclasses.fields(RULES.get(kind))}
    shared = {name: options[name] for name in ("b1", "b2") if name in options}
    own = {"kind": kind, **shared, **options.get(kind, {})}
    if own.get("decays") is not None:  # which then were those of all memories
        own.pop("b1", None)
    return {name: value for name, value in own.items() if name in fields}
