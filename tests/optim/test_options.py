"""What optimizers may be told: every field of every config changes the program."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from hope_jax import optim
from hope_jax.core import config as config_lib
from hope_jax.train.config import OptimizerConfig

# For each field another value than its default, and what must be set to see it.
CHANGES = {
    "dgd.explicit": ["true"],
    "dgd.retention": ["0.5"],
    "ggd.memory": [None, "memory.bias=dot", "memory.rule=nesterov"],
    "ggd.b1": ["0.5", "memory.rule=nesterov"],
    "ggd.retention": ["0.5", "memory.retention=decay"],
    "adamuon.sign": ["false"],
    "m3.periods": ["1,5"],
    "m3.alpha": ["0.2"],
    "m3.decays": ["0.8,0.7"],
    "m3.variant": ["two_scale"],
    "m3.spread": ["true"],
    "shampoo.frequency": ["5"],
    "shampoo.root": ["2"],
    "shampoo.grafting": ["rms"],
    "shampoo.max_size": ["3"],
    "soap.frequency": ["5"],
    "soap.shampoo_beta": ["0.5"],
    "soap.max_size": ["3"],
    "delta_momentum.form": ["matrix"],
    "delta_momentum.stability": ["clip"],
    "feature_map_momentum.feature_map": ["tanh"],
    "nonlinear_momentum.literal": ["true"],
    "deep_momentum.inner_rate": ["0.2"],
    "deep_momentum.objective": ["dot"],
    "deep_momentum.target": ["ones"],
    "deep_momentum.hidden": ["5"],
    "gradient_memory.memory": [None, "memory.bias=dot"],
    "gradient_memory.rows": ["sequence"],
    "gradient_memory.inner_rate": ["0.1"],
    "gradient_memory.inertia": ["0.5", "memory.rule=momentum"],
    "adam_memory.ridge": ["0.1"],
    "adam_memory.target": ["square"],
    "adam_memory.literal": ["true"],
    "adagrad_memory.form": ["outer"],
    "adagrad_memory.ridge": ["0.1"],
    "adagrad_memory.max_width": ["3", "form=outer"],
}


@functools.cache
def program(name, *settings):
    """All that a step of a config computes, and the state it computes it from.

    For `ggd` the slope of a product belongs to it; see `optim.differentiation`.
    """
    start = OptimizerConfig(rule=name, weight_decay=0.0 if name == "adam" else 0.1)
    config = config_lib.override(start, [f"rule.{setting}" for setting in settings])
    params = {name: {"kernel": jnp.ones((4, 6), jnp.float32)} for name in "ab"}
    layers = jax.tree.map(lambda _: True, params)
    tx = optim.build(
        config, total_steps=9, periods=optim.one_clock(params), layers=layers
    )

    def loss(params):
        x = jnp.ones((1, 4))
        return jnp.sum(x @ params["a"]["kernel"] + x @ params["b"]["kernel"]), None

    differentiate = optim.differentiation(config, layers, tokens=1)

    def step(params, state):
        gradients, inputs = params, None
        if differentiate is not None:
            _, gradients, inputs = differentiate(loss, params)
        return tx.update(gradients, state, params, inputs=inputs)

    with jax.numpy_dtype_promotion("standard"):
        try:
            state = tx.init(params)
        except ValueError as error:
            return str(error)
        text = str(jax.make_jaxpr(step)(params, state))
    return re.sub("0x[0-9a-f]+", "", text)  # where a function is, not what it does


def options():
    """Every field of the config of every rule, but `kind`, which chooses it."""
    for name in optim.RULES:
        for field in dataclasses.fields(optim.RULES.get(name)):
            if field.name != "kind":
                yield f"{name}.{field.name}"


def test_no_change_is_of_an_option_that_is_no_more():
    assert set(CHANGES) <= set(options())


@pytest.mark.parametrize("option", list(options()))
def test_every_option_does_something(option):
    name, _, field = option.partition(".")
    value, *before = CHANGES.get(option) or ["0.5"]
    changes = [f"{field}={value}"]
    if value is None:  # a config inside: its fields instead
        before, changes = [], before
    plain = program(name, *before)
    for change in changes:
        assert program(name, *before, change) != plain
