"""Named models have the sizes of their names, and configs refuse what cannot be."""

import dataclasses
import math

import jax
import pytest

from hope_jax.core import system
from hope_jax.models import lm, zoo
from hope_jax.models.block import ModelConfig
from hope_jax.models.cms import CMSConfig, CMSLevel
from tests.models import small

SIZES = {"100m": 100e6, "340m": 340e6, "760m": 760e6, "1b3": 1.3e9}


@pytest.mark.parametrize("family", ["hope", "hope_attention", "transformer"])
@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_within_5_percent_of_the_name(size, family):
    count = lm.count_parameters(zoo.get(f"{family}_{size}"))
    assert abs(count / SIZES[size] - 1) < 0.05


def test_the_tiny_twins_are_of_one_size():
    counts = [
        lm.count_parameters(zoo.get(f"{family}_tiny"))
        for family in ("hope", "hope_attention", "transformer")
    ]
    assert max(counts) / min(counts) < 1.01


def test_unknown_name():
    with pytest.raises(
        ValueError, match="no model is named 'hop'; there are hope_tiny"
    ):
        zoo.get("hop")


@pytest.mark.parametrize(
    "name", ["hope_tiny", "hope_attention_tiny", "transformer_tiny"]
)
def test_described_parameters_add_up(name):
    config = zoo.get(name)
    boxes = lm.system(config).boxes
    assert sum(box.parameters for box in boxes) == lm.count_parameters(config)
    assert "next-token loss" in str(system.describe(lm.system(config)))


def test_slow_levels_wait_for_their_period():
    graphdef, params = small.built(small.HOPE)
    del graphdef
    steps = lm.periods(small.HOPE, params, 32)
    for path, period in jax.tree_util.tree_leaves_with_path(steps):
        keys = [str(getattr(p, "key", getattr(p, "name", p))) for p in path]
        slow = "levels" in keys and keys[keys.index("levels") + 1] == "2"
        assert period == (4 if slow else 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(d_model=10, heads=4),
            r"d_model \(10\) must be a multiple of heads \(4\)",
        ),
        (
            dict(mixer="mamba"),
            "mixer must be one of self_modifying, attention, got 'mam",
        ),
        (dict(layers=0), "layers must be at least 1, got 0"),
        (dict(dtype="float16"), "dtype must be one of .* got 'float16'"),
        (dict(mixer="attention", d_model=12, heads=4), "d_model / heads must be even"),
        (
            dict(cms=CMSConfig(levels=(CMSLevel(period=100),)), context=512),
            r"a fast period \(100\) must be a multiple of the next faster chunk \(64\)",
        ),
    ],
)
def test_bad_model_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CMSLevel(period=0.5), "period must be a whole number of tokens"),
        (lambda: CMSLevel(period=4, rate=-1.0), "rate must be at least 0, got -1.0"),
        (lambda: CMSConfig(levels=()), "levels must name at least one MLP"),
        (
            lambda: CMSConfig(levels=(CMSLevel(period=8), CMSLevel(period=4))),
            "levels must be listed from fast to slow, got periods 8 before 4",
        ),
        (lambda: CMSConfig(rule="sdg"), "rule must be one of sgd.* got 'sdg'"),
        (
            lambda: CMSConfig(levels=(CMSLevel(period=math.inf, rate=1.0),)),
            r"rate \(1.0\) must be below rate_bound \(1.0\)",
        ),
    ],
)
def test_bad_cms_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_tokens():
    graphdef, params = small.built(small.TRANSFORMER)
    tokens = small.some_tokens()
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\] with T >= 1"):
        lm.apply(graphdef, params, tokens[:, :0])
    with pytest.raises(ValueError, match="tokens must be integers, got float32"):
        lm.apply(graphdef, params, tokens.astype("float32"))
    with pytest.raises(ValueError, match="labels need aligned=True"):
        lm.apply(graphdef, params, tokens, labels=tokens[:, 1:])


@pytest.mark.parametrize("order", ["fast_to_slow", "slow_to_fast"])
def test_order_of_the_chain(order):
    config = dataclasses.replace(
        small.HOPE_ATTENTION,
        cms=dataclasses.replace(small.HOPE_ATTENTION.cms, order=order),
    )
    _, params = small.built(config)
    first = small.read(small.HOPE_ATTENTION, small.some_tokens())[0]
    mine = small.reading(config)(params, small.some_tokens(), None)[0]
    assert bool(abs(first - mine).max() < 1e-6) == (order == "fast_to_slow")
