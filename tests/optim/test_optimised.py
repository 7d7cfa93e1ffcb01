"""Zero gradients in programs that are optimised, as those of users are.

The other tests run unoptimised programs (`tests/conftest.py`), in which a division can
be finite that overflows in fused and vectorised code.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from hope_jax import optim
from hope_jax.train.config import OptimizerConfig
from tests.versions import FORMER_EMITTERS

SHAPES = {"a": (2, 32, 96), "b": (2, 128, 32), "c": (32, 10)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("adamuon", "m3"), ("shampoo", "soap")], ids="+".join
)
def test_matrices_without_a_gradient_stay(names):
    """Beside one that has a gradient, and as one of a stack."""
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in SHAPES.items()}
    gradients = jax.tree.map(jnp.zeros_like, params)
    gradients["c"]["kernel"] = jnp.ones(SHAPES["c"])
    config = OptimizerConfig(weight_decay=0.0, warmup_steps=0)
    rules = [
        optim.build(
            dataclasses.replace(config, rule=name),
            total_steps=9,
            periods=optim.one_clock(params),
        )
        for name in names
    ]

    def two_steps(gradients):
        found = []
        for rule in rules:
            state = rule.init(params)
            _, state = rule.update(gradients, state, params)
            found.append(rule.update(gradients, state, params)[0])
        return found

    optimised: dict[str, int] = {"xla_backend_optimization_level": 3}
    if FORMER_EMITTERS:
        optimised["xla_cpu_use_fusion_emitters"] = True
    program = jax.jit(two_steps).lower(gradients).compile(compiler_options=optimised)
    for name, update in zip(names, program(gradients), strict=True):
        for stack in ("a", "b"):
            assert (update[stack]["kernel"] == 0).all(), name
        moved = update["c"]["kernel"]
        assert jnp.isfinite(moved).all() and (moved != 0).any(), name
