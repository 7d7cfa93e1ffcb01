"""Named models have the sizes of their names, and configs refuse what cannot be."""

import dataclasses
import math

import jax
import pytest

from hope_jax.core import system
from hope_jax.models import lm, systems, zoo
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers import MIXERS
from tests.models import small

SIZES = {"100m": 100e6, "340m": 340e6, "760m": 760e6, "1b3": 1.3e9}


@pytest.mark.parametrize(
    "family", ["hope", "hope_matrix", "hope_attention", "transformer"]
)
@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_within_5_percent_of_the_name(size, family):
    count = lm.count_parameters(zoo.get(f"{family}_{size}"))
    assert abs(count / SIZES[size] - 1) < 0.05


def test_the_tiny_twins_are_of_one_size():
    counts = [
        lm.count_parameters(zoo.get(f"{family}_tiny"))
        for family in ("hope", "hope_matrix", "hope_attention", "transformer")
    ]
    assert max(counts) / min(counts) < 1.01


@pytest.mark.parametrize(
    "name, message",
    [
        ("hope_tin", "no model is named 'hope_tin'. Did you mean 'hope_tiny'?"),
        ("titans", "a size: hope, .*, titans, .*; tiny, 100m, 340m, 760m, 1b3"),
        ("hope,attention_tiny", "no model is named 'hope,attention_tiny'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        zoo.get(name)


@pytest.mark.parametrize("name", [*MIXERS, "retnet,sliding_window"])
def test_every_mixer_has_a_tiny_model_of_one_size(name):
    """Counted from shapes: no parameter is made."""
    twin = zoo.get("transformer_tiny")
    config = zoo.get(f"{name}_tiny")
    assert config.kinds == name and config.name == f"{name}_tiny"
    count = lm.count_parameters(config)
    assert abs(count / lm.count_parameters(twin) - 1) < 0.02
    fields = {"name", "mixer", "cms", "heads"}
    for field in {f.name for f in dataclasses.fields(config)} - fields:
        assert getattr(config, field) == getattr(twin, field)
    assert config.heads == (8 if name in SECOND_DEGREE else 4)
    assert sum(box.parameters for box in systems.system(config, 256).boxes) == count


SECOND_DEGREE = {"deep_transformer", "omega_net", "dot", "atlas"}


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_reads_tokens_in_bfloat16(name):
    config = ModelConfig(vocab=7, d_model=8, heads=2, mixer=name, dtype="bfloat16")

    def read(tokens):
        graphdef, params = lm.build(config, jax.random.key(0))
        return lm.apply(graphdef, params, tokens)

    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix types
        logits, state = jax.eval_shape(read, jax.ShapeDtypeStruct((2, 5), "int32"))
    assert (logits.shape, logits.dtype) == ((2, 5, 7), "float32")
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state))


def test_names_are_those_of_every_family_and_mixer_at_every_size():
    assert {"hope_tiny", "titans_340m", "softmax_attention_1b3"} <= set(zoo.names())
    assert len(zoo.names()) == 5 * (4 + len(MIXERS))
    assert "memory_tiny" in zoo.names()


def test_matched_changes_the_width_of_the_mlps_and_says_so():
    config = dataclasses.replace(zoo.get("transformer_tiny"), mixer="titans")
    before = lm.count_parameters(config)
    same, changes = zoo.matched(config, before)
    assert same == config and changes == {}
    smaller, changes = zoo.matched(config, 1_000_000)
    after = lm.count_parameters(smaller)
    width = smaller.cms.hidden
    assert changes == {"cms.hidden": (556, width), "parameters": (before, after)}
    assert abs(after / 1e6 - 1) < 0.02 and width % 8 == 0
    assert dataclasses.replace(smaller, cms=config.cms) == config
    exact, _ = zoo.matched(config, 1_000_000, tolerance=3 * 128 * 2 / 1e6)
    assert abs(lm.count_parameters(exact) - 1_000_000) <= 3 * 128


def test_matched_counts_every_level_of_hope():
    config, changes = zoo.matched(zoo.get("hope_tiny"), 1_500_000)
    assert changes["parameters"][1] == lm.count_parameters(config)
    assert abs(changes["parameters"][1] / 1.5e6 - 1) < 0.02


@pytest.mark.parametrize(
    "count, tolerance, message",
    [
        (
            100_000,
            0.02,
            r"parameters \(100000\) cannot be reached by the MLPs of 'titans' within "
            r"2.0%: the nearest count is \d+, with cms.hidden=1",
        ),
        (1_000_001, 0.0, r"within 0.0%: the nearest count is (999|1000)\d\d\d, "),
        (0, 0.02, "parameters must be at least 1, got 0"),
        (10, -1.0, "tolerance must not be negative, got -1.0"),
    ],
)
def test_matched_refuses_what_no_width_reaches(count, tolerance, message):
    config = dataclasses.replace(zoo.get("transformer_tiny"), mixer="titans")
    with pytest.raises(ValueError, match=message):
        zoo.matched(config, count, tolerance)


@pytest.mark.parametrize(
    "name", ["hope_tiny", "hope_attention_tiny", "transformer_tiny"]
)
def test_described_parameters_add_up(name):
    config = zoo.get(name)
    boxes = systems.system(config, 256).boxes
    assert sum(box.parameters for box in boxes) == lm.count_parameters(config)
    assert "next-token loss" in str(system.describe(systems.system(config, 256)))


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
            "mixer must be one of self_modifying, attention, .* got 'mam",
        ),
        (dict(mixer="titan"), "Did you mean 'titans'?"),
        (
            dict(mixer="retnet", d_model=12, heads=4),
            "rotary positions of retnet, got 3",
        ),
        (dict(layers=0), "layers must be at least 1, got 0"),
        (dict(dtype="float16"), "dtype must be one of .* got 'float16'"),
        (dict(mixer="attention", d_model=12, heads=4), "d_model / heads must be even"),
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
        (lambda: CMSConfig(rule="sdg"), "rule must be .* 'sdg'. Did you mean 'sgd'"),
        (
            lambda: CMSConfig(levels=(CMSLevel(period=math.inf, rate=1.0),)),
            r"rate \(1.0\) must be below rate_bound \(1.0\)",
        ),
        (lambda: CMSLevel(period=4, truncate=0), "truncate must be at least 1, got 0"),
        (
            lambda: CMSConfig(levels=(CMSLevel(period=4, truncate=2),)),
            "truncate=2 of levels.0 .* gradient='first_order' goes through none",
        ),
        (
            lambda: CMSConfig(
                levels=(CMSLevel(period=4, rate=0.0, truncate=2),), gradient="exact"
            ),
            "truncate=2 of levels.0 is about the moves of .* rate 0.0",
        ),
        (lambda: CMSConfig(inner="exact"), "inner='exact' is read by nothing"),
        (lambda: CMSConfig(mixing="gated"), "mixing='gated' is read by nothing"),
        (lambda: CMSConfig(top_k=1), "top_k=1 is read by nothing: mixing='mean'"),
        (
            lambda: CMSConfig(order="independent", mixing="gated"),
            "mixing='gated' is about what several levels say, and `levels` has one",
        ),
        (
            lambda: CMSConfig(
                levels=(CMSLevel(period=4), CMSLevel(period=8)),
                order="independent",
                mixing="routed",
            ),
            r"top_k must be at least 2 and below the number of levels \(2\), got 2",
        ),
    ],
)
def test_bad_cms_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_tokens():
    graphdef, params = small.built(small.TRANSFORMER)
    tokens = small.some_tokens()
    with pytest.raises(
        ValueError, match=r"tokens must be \[B, T\] with B >= 1 and T >= 1"
    ):
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
