"""A model's config: mixers by kind, options only of what is used, and old files."""

import dataclasses
import json

import jax
import pytest

from hope_jax.core import config as config_lib
from hope_jax.models import lm, zoo
from hope_jax.models.cms import CMSConfig
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.attention import AttentionConfig, SlidingWindowConfig
from hope_jax.models.mixers.memory import MemoryMixerConfig, NamedConfig
from hope_jax.models.mixers.self_modifying import MLP, SelfModifyingConfig
from hope_jax.models.mixers.titans import TitansContextConfig, TitansWindowConfig
from hope_jax.models.mixers.tnt import TNTConfig
from hope_jax.optim.leaves import path_names

SMALL_CHUNK = dataclasses.replace(MLP, chunk=8)
# A model's JSON as it was when the fields of every mixer stood beside `mixer`; what is
# absent had its default.
BEFORE = {
    "name": "custom",
    "vocab": 257,
    "d_model": 128,
    "heads": 4,
    "context": 64,
    "window": 16,
    "chunk": None,
    "memory": {"memory": {"chunk": 8}, "projection_chunk": 32},
    "associative": {"memory": {"bias": "huber"}, "conv": 2},
    "titans": {"segment": 128, "window": 48, "persistent": 2},
    "tnt": {"shard": 32, "local_chunks": [8]},
    "dtype": "float32",
}


def test_a_mixer_is_chosen_by_its_kind_and_then_set():
    made = config_lib.override(
        ModelConfig(), ["mixer=tnt", "mixer.shard=128", "mixer.local_chunks=8"]
    )
    assert made.mixer == TNTConfig(shard=128, local_chunks=(8,))
    made = config_lib.override(
        ModelConfig(), ["mixer=delta_net,sliding_window", "mixer.1.window=7"]
    )
    assert made.mixer == (NamedConfig(kind="delta_net"), SlidingWindowConfig(window=7))
    assert made.kinds == "delta_net,sliding_window"
    assert made == ModelConfig(mixer=("delta_net", SlidingWindowConfig(window=7)))


@pytest.mark.parametrize("kind", MIXERS)
def test_every_mixer_goes_to_json_and_back(kind):
    config = ModelConfig(mixer=kind)
    data = json.loads(json.dumps(config_lib.to_json(config)))
    assert config_lib.from_json(ModelConfig, data) == config
    assert data["mixer"]["kind"] == config.kinds == kind


@pytest.mark.parametrize(
    "mixer, layers, expected",
    [
        (
            "self_modifying",
            2,
            SelfModifyingConfig(
                memory=dataclasses.replace(MIXERS.get("memory").memory, chunk=8),
                projection_chunk=32,
            ),
        ),
        ("attention", 2, AttentionConfig(context=64)),
        ("sliding_window", 2, SlidingWindowConfig(window=16)),
        (
            "memory",
            2,
            MemoryMixerConfig(
                memory=dataclasses.replace(MIXERS.get("memory").memory, bias="huber"),
                conv=2,
            ),
        ),
        ("titans_mac", 2, TitansContextConfig(segment=128, persistent=2)),
        (
            "titans_mal",
            2,
            TitansWindowConfig(kind="titans_mal", window=48, persistent=2),
        ),
        ("tnt", 2, TNTConfig(shard=32, local_chunks=(8,))),
        ("mamba2", 2, NamedConfig(kind="mamba2")),
        (
            "mamba2, softmax_attention",
            4,
            (
                NamedConfig(kind="mamba2"),
                AttentionConfig(kind="softmax_attention", context=64),
            ),
        ),
    ],
)
def test_models_saved_before_are_read(mixer, layers, expected):
    data = BEFORE | {"mixer": mixer, "layers": layers}
    made = config_lib.from_json(ModelConfig, data)
    assert made == ModelConfig(mixer=expected, layers=layers)
    assert config_lib.differences(data, made) == []


def test_options_that_nothing_read_are_of_earlier_versions_alone():
    """Saved with a run they are what they meant, nothing; asked for, refused."""
    data = config_lib.to_json(ModelConfig(mixer="memory"))
    data["mixer"]["memory"] |= {"degree": 3, "power": 2.0, "expansion": 2}
    wide = dataclasses.replace(MIXERS.get("memory").memory, expansion=2)
    made = config_lib.from_json(ModelConfig, data)
    assert made == ModelConfig(mixer=MemoryMixerConfig(memory=wide))
    assert config_lib.differences(data, made) == []
    with pytest.raises(ValueError, match="degree=3 is read by nothing: features="):
        config_lib.override(made, ["mixer.memory.degree=3"])
    again = config_lib.override(
        made, ["mixer.memory.degree=3", "mixer.memory.features=polynomial"]
    )
    assert again.mixer.memory.degree == 3
    both = config_lib.override(
        ModelConfig(mixer=("memory", "delta_net")),
        ["mixer.0.memory.degree=3", "mixer.0.memory.features=polynomial"],
    )
    assert both.mixer[0].memory.degree == 3


def test_the_chunk_of_named_points_was_the_models():
    data = BEFORE | {"mixer": "titans,retnet", "chunk": 16}
    points = tuple(NamedConfig(kind=kind, chunk=16) for kind in ("titans", "retnet"))
    assert config_lib.from_json(ModelConfig, data).mixer == points


@pytest.mark.parametrize(
    "settings, message",
    [
        (["mixer=memory", "mixer.window=3"], r"mixer \(MemoryMixerConfig\) has no"),
        (["memory.memory.bias=huber"], "ModelConfig has no field 'memory'"),
        (["titans.segment=8"], "ModelConfig has no field 'titans'"),
        (["mixer=titans_mag", "mixer.segment=8"], "has no field 'segment'"),
        (["mixer=titans_mac", "mixer.window=8"], "has no field 'window'"),
        (["tnt.shard=8"], "ModelConfig has no field 'tnt'"),
        (["window=8"], "ModelConfig has no field 'window'"),
        (["mixer=tnt", "mixer.memory.chunk=8"], "memory.chunk is set by the hier"),
        (["mixer=attention", "mixer.chunk=8"], "has no field 'chunk'"),
        (["mixer=mamba3"], "mixer must be one of .* got 'mamba3'. Did .* 'mamba2'"),
        (["mixer=tnt", "mixer.projection=all"], "projection must be one of sum"),
    ],
)
def test_options_of_what_is_not_there_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(ModelConfig(), settings)


@pytest.mark.parametrize("mixer", [5, (MLP,), CMSConfig()])
def test_what_is_no_mixer_is_refused(mixer):
    with pytest.raises(ValueError, match="mixer must be the name or the config of a m"):
        ModelConfig(mixer=mixer, layers=2)


def test_only_attention_to_whole_rows_has_a_context():
    config = ModelConfig(mixer="attention,sliding_window,retnet", layers=3)
    raised = with_context(config, 999)
    assert raised.mixer == (AttentionConfig(context=999), *config.mixer[1:])
    assert with_context(ModelConfig(), 999) == ModelConfig()


def test_a_named_point_is_what_its_choices_are():
    point = NamedConfig(kind="titans", chunk=16)
    assert point.layer.memory.chunk == point.span == 16
    assert point.rechunked(0.5) == NamedConfig(kind="titans", chunk=8)
    with pytest.raises(ValueError, match="matter of speed"):
        NamedConfig(kind="mamba2").rechunked(2)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        NamedConfig(kind="titans", chunk=0)
    with pytest.raises(ValueError, match="no memory is named 'titan'"):
        NamedConfig(kind="titan")
    with pytest.raises(ValueError, match="'sliding_window' has no memory"):
        NamedConfig(kind="sliding_window")


def test_cms_of_a_model_is_kept():
    data = BEFORE | {"mixer": "tnt", "layers": 2, "cms": {"hidden": 5}}
    assert config_lib.from_json(ModelConfig, data).cms == CMSConfig(hidden=5)


def test_options_of_later_versions_are_off():
    """What was saved without them is read; parameters are called what they were."""
    config = ModelConfig(mixer="attention", cms=CMSConfig(hidden=5))
    data = config_lib.to_json(config)
    for of, names in (
        (data, ("scaled_embedding", "tied_embedding", "norm_epsilon")),
        (data["cms"], ("activation", "bias")),
        (data["mixer"], ("kv_heads", "head_dim", "rotary", "qk_norm", "qkv_bias")),
        (data["mixer"], ("out_bias",)),
    ):
        for name in names:
            del of[name]
    assert config_lib.from_json(ModelConfig, data) == config
    assert config_lib.differences(data, config) == []
    leaves = jax.tree_util.tree_leaves_with_path(lm.abstract(config))
    assert {".".join(path_names(path)): leaf.shape for path, leaf in leaves} == {
        "embed.embedding": (257, 128),
        "blocks.norm.scale": (2, 128),
        "blocks.mixer.qkv.kernel": (2, 128, 384),
        "blocks.mixer.out.kernel": (2, 128, 128),
        "blocks.levels.0.norm.scale": (2, 128),
        "blocks.levels.0.mlp.gate.kernel": (2, 128, 5),
        "blocks.levels.0.mlp.up.kernel": (2, 128, 5),
        "blocks.levels.0.mlp.down.kernel": (2, 5, 128),
        "norm.scale": (128,),
    }


@pytest.mark.parametrize(
    "settings, message",
    [
        (["mixer.kv_heads=3"], r"kv_heads \(3\) must divide heads \(4\)"),
        (["mixer.kv_heads=0"], "kv_heads must be at least 1, got 0"),
        (["mixer.head_dim=7"], "head_dim must be even for rotary positions, got 7"),
        (["mixer.qk_norm=0"], "qk_norm must be positive, got 0"),
        (["mixer.rotary=yarn"], "mixer.rotary must be one of plain, linear, llama3"),
        (["mixer.rotary.base=1"], "base must be above 1, got 1"),
        (["mixer.rotary=linear", "mixer.rotary.factor=0.5"], "factor must be at least"),
        (["mixer.rotary=llama3", "mixer.rotary.low=4"], r"low \(4.0\) must be above 0"),
        (["norm_epsilon=0"], "norm_epsilon must be positive, got 0"),
        (["cms.activation=relu"], "activation must be one of silu, gelu, gelu_tanh"),
        (["cms.order=nested"], "order must be one of .*independent, got 'nested'"),
    ],
)
def test_options_of_attention_and_mlps_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(ModelConfig(mixer="attention"), settings)


def test_heads_of_a_width_of_their_own_need_no_multiple():
    own = AttentionConfig(head_dim=6, kv_heads=1)
    assert ModelConfig(d_model=10, heads=3, mixer=own).d_model == 10
    with pytest.raises(ValueError, match=r"d_model \(10\) must be a multiple of heads"):
        ModelConfig(d_model=10, heads=3, mixer="attention")


def test_sizes_are_matched_with_biases_too():
    config = ModelConfig(mixer="attention", cms=CMSConfig(hidden=40, bias=True))
    made, changes = zoo.matched(config, 300_000)
    assert changes["parameters"][1] == lm.count_parameters(made)
