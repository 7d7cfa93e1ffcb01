"""Optimizers as levels: each an optax transformation, on one clock or several.

What is here are functions that make transformations, and what a run is built with. The
names of functions are those of no module: `hope_jax.optim.m3` is the function
`m3(learning_rate)`, and its config, `M3`, lives in `hope_jax.optim.rules.m3`. By name
all of them are in `RULES`. The other modules are

- `builder`: a whole optimizer from a config; `rule` and `rules`: the configs by kind;
- `groups`: which parameters of our models are what, and how often they move;
- `matrices`: which leaves are matrices in the trees of others;
- `capture`: what matrices are multiplied with, for `dgd` and `slopes`;
- `momenta`, `orthogonal`, `kronecker`, `adaptive`, `generalised`, `slopes`, `levels`,
  `meta`: the transformations.
"""

from hope_jax.optim.adaptive import adagrad_memory, adam_memory
from hope_jax.optim.builder import (
    build,
    describe,
    differentiation,
    inner,
    labelled,
    needs_inputs,
    one_clock,
    rules_of,
    schedule,
)
from hope_jax.optim.generalised import from_memory, ggd
from hope_jax.optim.groups import on_clock, on_clocks
from hope_jax.optim.kronecker import (
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    soap,
)
from hope_jax.optim.levels import from_level
from hope_jax.optim.matrices import for_matrices, with_adamw
from hope_jax.optim.meta import learned
from hope_jax.optim.momenta import (
    delta_momentum,
    feature_map_momentum,
    momentum,
    nonlinear_momentum,
    preconditioned_momentum,
)
from hope_jax.optim.orthogonal import adamuon, scale_by_adamuon
from hope_jax.optim.rule import Rule, Settings
from hope_jax.optim.rules import RULES
from hope_jax.optim.rules.deep_momentum import deep_momentum
from hope_jax.optim.rules.dgd import dgd
from hope_jax.optim.rules.m3 import m3, scale_by_m3
from hope_jax.optim.slopes import descend_slopes

__all__ = [
    "RULES",
    "Rule",
    "Settings",
    "adagrad_memory",
    "adam_memory",
    "adamuon",
    "build",
    "deep_momentum",
    "delta_momentum",
    "descend_slopes",
    "describe",
    "dgd",
    "differentiation",
    "feature_map_momentum",
    "for_matrices",
    "from_level",
    "from_memory",
    "ggd",
    "inner",
    "labelled",
    "learned",
    "m3",
    "momentum",
    "needs_inputs",
    "nonlinear_momentum",
    "on_clock",
    "on_clocks",
    "one_clock",
    "preconditioned_momentum",
    "rules_of",
    "scale_by_adamuon",
    "scale_by_m3",
    "scale_by_shampoo",
    "scale_by_soap",
    "schedule",
    "shampoo",
    "soap",
    "with_adamw",
]
