"""Configs saved before a rule was a config of its own are read as what they said.

`saved_configs.json` holds them as commit 03425a5 wrote them.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from hope_jax.core import config as config_lib
from hope_jax.models.cms import CMSConfig
from hope_jax.optim.rules.adam import Adam
from hope_jax.optim.rules.dgd import DGD
from hope_jax.optim.rules.lion import Lion
from hope_jax.optim.rules.m3 import M3
from hope_jax.optim.rules.momentum import Momentum
from hope_jax.optim.rules.sgd import SGD
from hope_jax.optim.rules.shampoo import Shampoo
from hope_jax.train.config import OptimizerConfig

SAVED = json.loads(Path(__file__).with_name("saved_configs.json").read_text())

# Where a rule for matrices had b1 or b2 of its own, so had the adamw of all else.
_SLOWER = Adam(b1=0.95)
OPTIMIZERS = {
    "adamw": OptimizerConfig(),
    "adamw_decays": OptimizerConfig(rule=Adam(b1=0.8, b2=0.99), learning_rate=3e-4),
    "m3": OptimizerConfig(
        rule=M3(b1=0.95, periods=(1, 5), alpha=0.5, variant="two_scale"),
        embeddings=_SLOWER,
        convolutions=_SLOWER,
        others=_SLOWER,
    ),
    "m3_decays": OptimizerConfig(rule=M3(decays=(0.8, 0.7))),
    "dgd": OptimizerConfig(rule=DGD(explicit=True, retention=0.999), clip_norm=None),
    "shampoo": OptimizerConfig(
        rule=Shampoo(b1=0.85, frequency=4, grafting="rms"),
        embeddings=Lion(b1=0.85),
        convolutions=Adam(b1=0.85),
        others=Momentum(b1=0.85),
    ),
}
CHAINS = {
    "plain": (SGD(),),
    "chain": (
        Adam(b2=0.99),
        M3(b1=0.5, b2=0.99, alpha=0.2),
        DGD(explicit=True),
        M3(b2=0.99, periods=(1, 2)),
    ),
}


@pytest.mark.parametrize("name", SAVED["optimizer"])
def test_an_optimizer_saved_by_name_is_what_it_was(name):
    config = config_lib.from_json(OptimizerConfig, SAVED["optimizer"][name])
    assert config == OPTIMIZERS[name]
    assert config_lib.differences(SAVED["optimizer"][name], config) == []
    again = config_lib.to_json(config)
    assert config_lib.from_json(OptimizerConfig, again) == config


@pytest.mark.parametrize("name", SAVED["cms"])
def test_a_chain_saved_with_options_is_what_it_was(name):
    config = config_lib.from_json(CMSConfig, SAVED["cms"][name])
    assert tuple(level.rule for level in config.whole) == CHAINS[name]
    again = config_lib.to_json(config)
    assert config_lib.from_json(CMSConfig, again) == config


def test_a_name_stands_for_its_rule():
    assert OptimizerConfig(rule="m3", others="lion") == OptimizerConfig(
        rule=M3(), others=Lion()
    )
    config = config_lib.override(
        OptimizerConfig(), ["rule=m3", "rule.alpha=0.5", "embeddings=lion"]
    )
    assert config == OptimizerConfig(rule=M3(alpha=0.5), embeddings=Lion())
    assert dataclasses.replace(config, rule="sgd").rule == SGD()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rule=m4", "rule must be one of adamw, .* got 'm4'. Did you mean 'm3'"),
        ("rule.alpha=0.5", r"rule \(Adam\) has no field 'alpha'"),
        ("others.b1=0.5", "others is none, so it has no field 'b1' to set"),
        ("others=m3", "others='m3': m3 moves matrices"),
    ],
)
def test_what_no_rule_reads_cannot_be_set(setting, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(OptimizerConfig(), [setting])
