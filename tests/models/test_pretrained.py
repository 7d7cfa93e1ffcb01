"""Checkpoints of others: the same logits, there and back, and what is refused."""

import dataclasses
import functools
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hope_jax.core import config as config_lib
from hope_jax.models import convert, lm, pretrained, shards, systems
from hope_jax.models.block import Block
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig, with_context
from hope_jax.models.rotary import Linear, Llama3, Plain
from tests.models import pretrained_samples as samples
from tests.models import small

each = pytest.mark.parametrize("sample", samples.SAMPLES)
LIVE = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
live = pytest.mark.skipif(
    not LIVE, reason="pip install torch transformers compares with theirs as it is"
)
LOGITS = dict(np.load(samples.LOGITS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a sample's checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def of(sample):
        return samples.write(root / sample, sample)

    return of


@pytest.fixture(scope="module")
def opened(folder):
    """A sample as config and parameters."""
    return functools.cache(lambda sample: pretrained.read_pretrained(folder(sample)))


@functools.cache
def reading(config):
    graphdef, _ = lm.abstract_model(config)
    return jax.jit(lambda params, tokens: lm.apply(graphdef, params, tokens)[0])


def logits(config, params):
    return np.asarray(reading(config)(params, samples.TOKENS))


@each
def test_it_says_what_transformers_says(sample, opened):
    """To 1e-4, of logits up to 5; the types of the parameters are those of `build`."""
    config, params = opened(sample)
    theirs = LOGITS[sample]
    np.testing.assert_allclose(logits(config, params), theirs, atol=1e-4)
    assert np.abs(theirs).max() > 3
    fresh = lm.abstract(config)
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), fresh) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params
    )
    data = json.loads(json.dumps(config_lib.to_json(config)))
    assert config_lib.from_json(ModelConfig, data) == config


@live
@each
def test_transformers_says_now_what_is_stored(sample, folder):
    said = samples.said_by_transformers(folder(sample))
    np.testing.assert_allclose(said, LOGITS[sample], atol=1e-5)


@pytest.mark.parametrize(
    "sample, change",
    [
        ("llama", {"rope_scaling": None}),
        ("llama", {"rope_theta": 600.0}),
        ("llama_biased", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
        ("llama_biased", {"hidden_act": "silu"}),
        ("qwen2", {"rms_norm_eps": 1e-2}),
        ("qwen3", {"rms_norm_eps": 1e-2}),
        ("gemma", {"hidden_activation": "silu"}),
    ],
    ids=str,
)
def test_every_field_is_heard(sample, change, folder, tmp_path, opened):
    own = samples.SAMPLES[sample][0]
    other = samples.write(tmp_path, sample, own | change)
    config, params = pretrained.read_pretrained(other)
    assert config != opened(sample)[0]
    assert np.abs(logits(config, params) - LOGITS[sample]).max() > 1e-3


def test_it_reads_in_pieces_and_looks_back_as_far_as_it_is_told(folder):
    config, params = pretrained.read_pretrained(folder("llama"), context=5)
    assert config.mixer == dataclasses.replace(config.mixer, context=5)
    assert with_context(config, 64) == pretrained.read_pretrained(folder("llama"))[0]
    graphdef, _ = lm.abstract_model(config)
    read = jax.jit(lambda p, tokens, state: lm.apply(graphdef, p, tokens, state))
    whole, _ = read(params, samples.TOKENS, None)
    assert np.abs(whole - LOGITS["llama"])[:, 5:].max() > 1e-2
    np.testing.assert_allclose(whole[:, :5], LOGITS["llama"][:, :5], atol=1e-4)
    first, state = read(params, samples.TOKENS[:, :7], None)
    then, _ = read(params, samples.TOKENS[:, 7:], state)
    np.testing.assert_allclose(np.concatenate([first, then], 1), whole, atol=1e-4)


def test_later_versions_say_the_positions_elsewhere(tmp_path, opened):
    own = dict(samples.SAMPLES["llama"][0])
    rope = own.pop("rope_scaling") | {"rope_theta": own.pop("rope_theta")}
    folder = samples.write(tmp_path, "llama", own | {"rope_parameters": rope})
    assert pretrained.read_pretrained(folder)[0] == opened("llama")[0]


def test_frequencies_by_hand():
    """Pairs turn 16, 4 and 0.25 radians a token times 2 pi / 32 in 32 tokens."""
    plain = Plain(base=64.0**3).frequencies(3)
    np.testing.assert_allclose(plain, [1, 1 / 64, 1 / 4096])
    np.testing.assert_allclose(
        Linear(base=64.0**3, factor=4.0).frequencies(3), plain / 4
    )
    # Turns within the first context: 64, 1 and 1 / 64; the middle one is half of both.
    rotary = Llama3(
        base=64.0**3, factor=8.0, low=0.5, high=1.5, original=round(128 * math.pi)
    )
    expected = plain * [1.0, (1 + 1 / 8) / 2, 1 / 8]
    np.testing.assert_allclose(rotary.frequencies(3), expected, rtol=2e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "got 'MixtralForCausalLM'"),
        ({"architectures": None}, "not the config of a model of one architecture"),
        ({"num_local_experts": 8}, "num_local_experts=8, which this package does not"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='slid"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling='yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "must have the field 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "relu2"}, "hidden_act='relu2'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_size": None}, "must have the field 'hidden_size'"),
        ({"num_key_value_heads": 3}, r"kv_heads \(3\) must divide heads \(4\)"),
        ({"head_dim": 5}, "head_dim must be even for rotary positions, got 5"),
        ({"rms_norm_eps": 0}, "norm_epsilon must be positive, got 0"),
        ({"intermediate_size": 25}, r"mlp.down_proj.weight' must be \(16, 25\)"),
        ({"vocab_size": 29}, r"'model.embed_tokens.weight' must be \(29, 16\)"),
        ({"num_hidden_layers": 3}, "no tensor 'model.layers.2.mlp.down_proj.weight'"),
        ({"num_hidden_layers": 1}, r"has a tensor 'model.layers.1.* \(9 in all\)"),
        ({"tie_word_embeddings": True}, r"has a tensor 'lm_head.weight' \(1 in all\)"),
        ({"attention_bias": True}, "no tensor 'model.layers.0.self_attn.o_proj.bias'"),
    ],
    ids=str,
)
def test_what_is_not_computed_here_is_refused(change, message, tmp_path, monkeypatch):
    """Before any weight is read."""
    monkeypatch.setattr(shards.Stored, "read", None)
    own = samples.SAMPLES["llama"][0]
    folder = samples.write(tmp_path, "llama", own | change)
    with pytest.raises(ValueError, match=message):
        pretrained.read_pretrained(folder)


def test_damaged_files_are_refused(tmp_path):
    folder = samples.write(tmp_path / "a", "qwen2")
    path, whole = folder / "model.safetensors", None
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    name = "model.norm.weight"

    def packed(**changes):
        text = json.dumps(header | {name: header[name] | changes}).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    for content, message in (
        (whole[:-4], "not fully covered"),
        (whole + b"more", "not fully covered"),
        (whole[:100], "invalid header length"),
        (b"", "header too small"),
        (b"\x02" + bytes(7) + b"{[", "cannot be read"),
        (packed(dtype="I16", shape=[32]), "type 'I16'; known are F32, F16, BF16"),
        (packed(shape=[17]), "cannot be read"),
        (packed(shape=[2**40]), "cannot be read"),
        (packed(shape=[-16]), "cannot be read"),
        (packed(data_offsets=[0, 64]), "cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            pretrained.read_pretrained(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="Neither model.safetensors nor"):
        pretrained.read_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="No config.json"):
        pretrained.read_pretrained(tmp_path)


def test_an_index_says_where_tensors_are(tmp_path):
    folder = samples.write(tmp_path, "llama")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    where = index["weight_map"]
    for change, message in (
        ({"x": where["lm_head.weight"]}, "'x' is in no shard"),
        ({"lm_head.weight": where["model.norm.weight"]}, "it has 'lm_head.weight' in"),
        ({"x": "../model.safetensors"}, "in another folder"),
    ):
        path.write_text(json.dumps({"weight_map": where | change}))
        with pytest.raises(ValueError, match=message):
            pretrained.read_pretrained(folder)
    path.write_text(json.dumps(index))
    (folder / where["lm_head.weight"]).unlink()
    with pytest.raises(FileNotFoundError, match="No model-0000.-of-00003.safetensors"):
        pretrained.read_pretrained(folder)
    path.write_text("[]")
    with pytest.raises(ValueError, match="no index with a weight_map"):
        pretrained.read_pretrained(folder)


# There and back ----------------------------------------------------------------------


def tensors_in(folder):
    return {name: at.read() for name, at in shards.find(folder).items()}


@pytest.mark.parametrize(
    "sample, shard", [("llama", 2000), *((name, 10**9) for name in samples.SAMPLES)]
)
def test_what_was_read_is_written_as_it_was(sample, shard, folder, opened, tmp_path):
    """The same names and values of the same type; Gemma's norms to rounding."""
    source = folder(sample)
    config, params = opened(sample)
    name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    dtype = name[samples.SAMPLES[sample][1]]
    pretrained.write_pretrained(
        tmp_path, config, params, like=source, dtype=dtype, shard=shard
    )
    theirs, ours = tensors_in(source), tensors_in(tmp_path)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape
        atol = 1e-7 if sample == "gemma" and "norm" in name else 0
        a, b = (np.float32(v) for v in (ours[name], value))
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if shard == 2000 else 0)
    again, _ = pretrained.read_pretrained(tmp_path)
    assert dataclasses.replace(again, dtype=config.dtype) == config
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["bos_token_id"] == 1  # what is no business of ours is kept


@live
@each
def test_transformers_reads_what_is_written(sample, folder, opened, tmp_path):
    config, params = opened(sample)
    params = jax.tree.map(lambda a: a + 0.01, params)
    pretrained.write_pretrained(
        tmp_path, config, params, like=folder(sample), dtype="float32", shard=4000
    )
    said = samples.said_by_transformers(tmp_path)
    np.testing.assert_allclose(said, logits(config, params), atol=1e-4)


def test_a_model_of_ours_is_one_of_gemmas_kind(tmp_path):
    """Its embeddings are scaled and tied, and its MLPs may be SwiGLU."""
    config, tokens = small.TRANSFORMER, small.some_tokens()
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(1.0, 0.3, a.shape), a.dtype),
        lm.abstract(config),
    )
    pretrained.write_pretrained(tmp_path, config, params, like="GemmaForCausalLM")
    again, weights = pretrained.read_pretrained(tmp_path)
    # An offset of norms is no rounding: 1 + (w - 1) is w next to 1.
    said, _ = small.reading(again)(weights, tokens, None)
    expected, _ = small.reading(config)(params, tokens, None)
    np.testing.assert_allclose(said, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not .*scaled_embedding"):
        pretrained.write_pretrained(
            tmp_path / "b", config, params, like="LlamaForCausalLM"
        )
    with pytest.raises(FileExistsError, match="holds weights"):
        pretrained.write_pretrained(tmp_path, config, params, like="GemmaForCausalLM")
    with pytest.raises(ValueError, match="dtype must be one of .* got 'int8'"):
        pretrained.write_pretrained(
            tmp_path, config, params, like="GemmaForCausalLM", dtype="int8"
        )
    with pytest.raises(ValueError, match="shard must be at least 1 byte, got 0"):
        pretrained.write_pretrained(
            tmp_path, config, params, like="GemmaForCausalLM", shard=0
        )
    hope = dataclasses.replace(small.HOPE, cms=CMSConfig(hidden=24))
    with pytest.raises(ValueError, match="mixer must be attention .* 'self_modifying'"):
        pretrained.write_pretrained(
            tmp_path / "b", hope, lm.abstract(hope), like="GemmaForCausalLM"
        )
    assert not (tmp_path / "b").exists()


# Levels ------------------------------------------------------------------------------

LEVELS = tuple(CMSLevel(period=p, rate=0.3) for p in (4, 8))
STILL = tuple(dataclasses.replace(level, rate=0.0) for level in LEVELS)


def still(config, params):
    """What a model is while none of its levels moves."""
    cms = dataclasses.replace(config.cms, levels=STILL)
    return dataclasses.replace(config, cms=cms), small.drop_rates(params)


def trained(config, params, steps=50):
    """After so many steps by a rule that decays weights too."""
    graphdef, _ = lm.abstract_model(config)
    tx = optax.adamw(1e-2)
    tokens = jnp.asarray(samples.TOKENS)

    def loss(params):
        said, _ = lm.apply(graphdef, params, tokens[:, :-1], after=tokens[:, -1])
        return said.mean()

    def step(carry, _):
        params, opt = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(gradient, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to whole numbers
        run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, steps))
        (params, _), losses = run(params)
    assert losses[-1] < 0.8 * losses[0]
    return params


@pytest.mark.parametrize("how", ["stack", "rest", "copy"])
@pytest.mark.parametrize("sample", ["llama", "gemma"])
def test_levels_at_rest_keep_every_logit_bit_for_bit(sample, how, opened):
    """Both readings of stacking, at inner rates of 0."""
    config, params = opened(sample)
    levels = (*STILL, CMSLevel(period=math.inf))
    if how == "copy":
        stacked = convert.copy_levels(config, params, levels)
    else:
        extra = "rest" if how == "rest" else "learn"
        stacked = convert.stack_levels(config, params, levels, extra=extra)
    said = logits(config, params)
    np.testing.assert_array_equal(logits(*stacked), said)
    single, weights = convert.unstack_levels(*stacked)
    assert single == dataclasses.replace(config, cms=single.cms)
    jax.tree.map(np.testing.assert_array_equal, weights, params)


def test_from_a_checkpoint_to_levels_through_training_and_back(
    folder, opened, tmp_path
):
    """What moves while it reads differs, its slow view is a checkpoint of the family,
    and that says to the bit what the levels say at rest."""
    stacked, weights = convert.stack_levels(*opened("llama"), LEVELS, extra="rest")
    moving = logits(stacked, weights)
    np.testing.assert_allclose(moving[:, :4], LOGITS["llama"][:, :4], atol=1e-4)
    assert np.abs(moving - LOGITS["llama"])[:, 4:].max() > 1e-3
    weights = trained(stacked, weights)
    single, slow = convert.unstack_levels(stacked, weights)
    at_rest = logits(*still(stacked, weights))
    np.testing.assert_array_equal(logits(single, slow), at_rest)
    assert np.abs(at_rest - LOGITS["llama"]).max() > 0.1
    pretrained.write_pretrained(
        tmp_path, stacked, weights, like=folder("llama"), dtype="float32"
    )
    again = pretrained.read_pretrained(tmp_path)
    np.testing.assert_array_equal(logits(*again), at_rest)
    if LIVE:
        said = samples.said_by_transformers(tmp_path)
        np.testing.assert_allclose(said, at_rest, atol=1e-4)


def test_places_that_have_learned_are_not_written(opened, tmp_path):
    config, params = opened("llama")
    stacked, weights = convert.stack_levels(config, params, LEVELS)
    learned = jax.tree.map(lambda a: a, weights)
    kernel = learned["blocks"]["levels"][1]["mlp"]["down"]["kernel"]
    kernel[...] = kernel[...].at[0, 2, 3].set(1e-3)
    with pytest.raises(ValueError, match=r"layer 0 have MLPs in levels \[0, 1\]"):
        pretrained.write_pretrained(tmp_path, stacked, learned, like="LlamaForCausalLM")
    copies, weights = convert.copy_levels(config, params, LEVELS)
    kernel = weights["blocks"]["levels"][1]["mlp"]["up"]["kernel"]
    kernel[...] = kernel[...].at[0, 2, 3].set(1e-3)
    with pytest.raises(ValueError, match="levels.1.mlp.up.kernel are no longer those"):
        pretrained.write_pretrained(tmp_path, copies, weights, like="LlamaForCausalLM")


def test_levels_that_a_model_cannot_have_are_refused(opened):
    config, params = opened("llama_biased")
    with pytest.raises(ValueError, match="extra='rest' needs MLPs without bias"):
        convert.stack_levels(config, params, LEVELS, extra="rest")
    with pytest.raises(ValueError, match="extra must be one of learn, rest, got 'sle"):
        convert.stack_levels(config, params, LEVELS, extra="sleep")
    copies = convert.copy_levels(config, params, LEVELS[:1])
    with pytest.raises(ValueError, match="order must be that of a chain"):
        convert.stack_levels(*copies, LEVELS)


@pytest.mark.parametrize("mixing", ["mean", "learned", "gated", "routed"])
def test_independent_levels_add_what_they_say(mixing):
    """Each reads what the mixer leaves; in the picture too. Weights by hand."""
    levels = (*STILL, CMSLevel(period=16))
    cms = CMSConfig(levels=levels, hidden=5, order="independent", mixing=mixing)
    config = ModelConfig(d_model=8, heads=2, layers=1, mixer="attention", cms=cms)
    graphdef, params = small.shaken(Block(config, rngs=nnx.Rngs(0)))
    x = jnp.asarray(small.drawn(2, 7, 8))

    @jax.jit
    def both(params):
        block = nnx.merge(graphdef, params)
        left = x + block.mixer(block.norm(x))[0]
        said = [level.mlp(level.norm(left)) for level in block.levels]
        return block(x)[0], left, said

    made, left, said = jax.device_get(both(params))
    weights = np.full((2, 7, 3), 1 / 3)
    if mixing == "learned":
        weights = weights + np.asarray(params["mix"]["shares"][...])
    elif mixing != "mean":
        unit = left / np.sqrt(np.mean(left**2, axis=-1, keepdims=True) + 1e-6)
        gate = params["mix"]["gate"]
        kernel, bias = (np.asarray(gate[name][...]) for name in ("kernel", "bias"))
        gates = np.exp(unit @ kernel + bias)
        if mixing == "routed":  # of three the two largest
            gates = np.where(gates == gates.min(-1, keepdims=True), 0, gates)
        weights = gates / gates.sum(-1, keepdims=True)
    expected = left + np.einsum("btk,kbtd->btd", weights, said)
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert np.ptp(weights) > 0.1 or mixing == "mean"
    drawn = systems.system(config, 32)
    readers = {e.target for e in drawn.edges if e.source == "attention"}
    assert readers == {"CMS 1", "CMS 2", "CMS 3"}
    parameters = sum(box.parameters for box in drawn.boxes)
    assert parameters == lm.count_parameters(config)
    with pytest.raises(ValueError, match="cms.order that of a chain .* 'independent'"):
        systems.living(*lm.abstract_model(config), 32)
