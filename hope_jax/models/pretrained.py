"""Checkpoints of Llama's kind, read and written as Hugging Face lays them out.

    config.json   model.safetensors, or shards with model.safetensors.index.json

`FAMILIES` says which architectures there are and how they differ, `_MODEL` and `_LAYER`
which of their tensors is which of our parameters. A block of ours with one CMS level of
infinite period is their layer.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hope_jax.core import config as config_lib
from hope_jax.core.config import did_you_mean
from hope_jax.models import convert, lm, shards
from hope_jax.models.cms import Activation, CMSConfig
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.models.rotary import Linear, Llama3, Plain, Rotary
from hope_jax.optim.leaves import path_names

_CONFIG = "config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_CONTEXT = 2048  # tokens, at most, unless more are asked for


class Family(NamedTuple):
    """What an architecture has that the config of a checkpoint does not say.

    Attributes:
      model_type: its name in `config.json`.
      defaults: of fields that may be left out of it.
      biases: the field that says whether attention has biases; "" for those of Qwen2,
        on queries, keys and values alone.
      mlp_bias: whether there is a field of that name.
      qk_norm: whether queries and keys have norms.
      norm_from: what a stored norm is counted from: its scale is as much more.
      scaled: whether embeddings are multiplied by the square root of the width.
      gelu: what it computes where the config says `gelu`.
    """

    model_type: str
    defaults: Mapping[str, Any]
    biases: str = "attention_bias"
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_from: float = 0.0
    scaled: bool = False
    gelu: Activation = "gelu"


_GEMMA = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}
FAMILIES = {
    "LlamaForCausalLM": Family("llama", {}, mlp_bias=True),
    "Qwen2ForCausalLM": Family("qwen2", {}, biases=""),
    "Qwen3ForCausalLM": Family("qwen3", {"head_dim": 128}, qk_norm=True),
    "GemmaForCausalLM": Family(
        "gemma", _GEMMA, norm_from=1.0, scaled=True, gelu="gelu_tanh"
    ),
}
_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": _CONTEXT,
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}
# What they would change is not computed here: any other value is refused.
_NEUTRAL = {
    "use_sliding_window": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "use_bidirectional_attention": (False,),
}

_MODEL = {
    "embed.embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head.embedding": "lm_head.weight",
}
_LAYER = {
    "norm.scale": ("input_layernorm.weight",),
    "mixer.qkv.kernel": tuple(f"self_attn.{a}_proj.weight" for a in "qkv"),
    "mixer.qkv.bias": tuple(f"self_attn.{a}_proj.bias" for a in "qkv"),
    "mixer.norm_q.scale": ("self_attn.q_norm.weight",),
    "mixer.norm_k.scale": ("self_attn.k_norm.weight",),
    "mixer.out.kernel": ("self_attn.o_proj.weight",),
    "mixer.out.bias": ("self_attn.o_proj.bias",),
    "levels.0.norm.scale": ("post_attention_layernorm.weight",),
    "levels.0.mlp.gate.kernel": ("mlp.gate_proj.weight",),
    "levels.0.mlp.gate.bias": ("mlp.gate_proj.bias",),
    "levels.0.mlp.up.kernel": ("mlp.up_proj.weight",),
    "levels.0.mlp.up.bias": ("mlp.up_proj.bias",),
    "levels.0.mlp.down.kernel": ("mlp.down_proj.weight",),
    "levels.0.mlp.down.bias": ("mlp.down_proj.bias",),
}
_MIXER = "config.mixer must be attention to whole rows alone, which is all that {} has"


class _Part(NamedTuple):
    """A tensor of theirs in a parameter of ours.

    Attributes:
      name: theirs.
      layer: of which layer; None outside them.
      columns: which of the last axis; None for all.
      turned: whether theirs is the transpose.
      norm: whether it is the scale of a norm.
      shape: theirs.
    """

    name: str
    layer: int | None
    columns: slice
    turned: bool
    norm: bool
    shape: tuple[int, ...]


def read_pretrained(
    folder: str | os.PathLike, *, context: int | None = None
) -> tuple[ModelConfig, PyTree]:
    """A checkpoint of one of `FAMILIES` as a model of ours, of the same logits.

    Everything is checked before the first weight is read: what is not computed here,
    and every tensor that is missing, too many or of another shape, is refused.

    Args:
      folder: with `config.json` and its weights in bfloat16, float16 or float32.
      context: tokens that attention looks back over. By default 2,048, or the
        checkpoint's own if these are fewer; a longer one costs as much more state
        (`models.config.with_context` changes it later).

    Returns:
      The config, whose one CMS level is the checkpoint's MLP (`convert.stack_levels`
      gives it clocks), and float32 parameters, as of `lm.build`.

    Raises:
      FileNotFoundError: no config, or no weights.
      ValueError: names the field or the tensor.
    """
    family, said = _read_config(Path(folder))
    config = _config_of(family, said, context)
    stored, fresh = shards.find(folder), lm.abstract(config)
    parts = _parts(config, fresh)
    _check(stored, [part for several in parts.values() for part in several])
    norm_from = FAMILIES[family].norm_from

    def load(path, leaf):
        made = np.empty(leaf.shape, leaf.dtype)
        for part in parts[".".join(path_names(path))]:
            value = stored[part.name].read().astype(leaf.dtype)
            value = value.T if part.turned else value
            at = made if part.layer is None else made[part.layer]
            at[..., part.columns] = value + norm_from if part.norm else value
        return jnp.asarray(made)

    return config, jax.tree_util.tree_map_with_path(load, fresh)


def write_pretrained(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: PyTree,
    *,
    like: str | os.PathLike,
    dtype: str | None = None,
    shard: int = 5_000_000_000,
) -> None:
    """Writes a model as a checkpoint which `transformers` loads.

    A model with several CMS levels is written as its slow weights are, without clocks,
    where each layer has one MLP in effect (`convert.unstack_levels`).

    Args:
      folder: where to; made if absent. It must hold no weights yet.
      config, params: the model, its mixer attention to whole rows.
      like: the folder of the checkpoint that it came from, whose other fields of
        `config.json` and tokenizer are kept, or a name of `FAMILIES`.
      dtype: `bfloat16`, `float16` or `float32`; by default that of `like`, else
        float32.
      shard: most bytes of a file; more weights go into several.

    Raises:
      FileExistsError: `folder` holds weights.
      ValueError: the model is not one of the family, or has learned in places that the
        format does not have; names what, before anything is written.
    """
    folder, base = Path(folder), {}
    if str(like) in FAMILIES:
        family = str(like)
    else:
        family, base = _read_config(Path(like))
    name = dtype or str(base.get("dtype") or base.get("torch_dtype") or "float32")
    types = {str(known): known for known in shards.TYPES.values()}
    if name not in types:
        raise ValueError(f"dtype must be one of {', '.join(types)}, got {name!r}.")
    if shard < 1:
        raise ValueError(f"shard must be at least 1 byte, got {shard}.")
    config, params = convert.unstack_levels(config, params)
    said = base | _said(family, config, base) | {"torch_dtype": name}
    said = {key: value for key, value in said.items() if key not in _RENAMED}
    _check_family(family, said, config)
    if any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{str(folder)!r} holds weights; choose another folder.")

    norm_from = FAMILIES[family].norm_from
    leaves = {
        ".".join(path_names(path)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def made(leaf, part):
        def make():
            value = leaf if part.layer is None else leaf[part.layer]
            value = np.asarray(value[..., part.columns])
            value = value - norm_from if part.norm else value
            return value.T if part.turned else value

        return shards.Made(part.shape, make)

    tensors = {
        part.name: made(leaves[ours], part)
        for ours, several in _parts(config, params).items()
        for part in several
    }
    folder.mkdir(parents=True, exist_ok=True)
    shards.write(folder, dict(sorted(tensors.items())), types[name], shard)
    text = json.dumps(said, indent=2, sort_keys=True)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
    for file in _TOKENIZER if base else ():
        if (Path(like) / file).exists():
            shutil.copyfile(Path(like) / file, folder / file)


# Configs -----------------------------------------------------------------------------

_RENAMED = ("rope_parameters", "dtype")  # of later versions, which read both


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The architecture and the fields of a checkpoint's config."""
    path = folder / _CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"No {_CONFIG} in {str(folder)!r}: it must be the folder of a checkpoint."
        )
    try:
        said = dict(json.loads(path.read_text(encoding="utf-8")))
        (family,) = said["architectures"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not the config of a model of one architecture: {error!r}"
        ) from error
    if family not in FAMILIES:
        raise ValueError(
            f"architectures of {str(path)!r} must be one of {', '.join(FAMILIES)}, got "
            f"{family!r}.{did_you_mean(family, FAMILIES)}"
        )
    return family, said


def _config_of(
    family: str, said: Mapping[str, Any], context: int | None
) -> ModelConfig:
    """The model that `config.json` describes."""
    of = FAMILIES[family]
    for name, allowed in _NEUTRAL.items():
        if said.get(name) is not None and said[name] not in allowed:
            raise _unsupported(name, said[name])
    for kind in said.get("layer_types") or ():
        if kind != "full_attention":
            raise _unsupported("layer_types", kind)
    given = {key: value for key, value in said.items() if value is not None}
    get = {**_DEFAULTS, **of.defaults, **given}
    act = get.get("hidden_activation", get["hidden_act"])
    if act not in _ACTIVATIONS:
        raise _unsupported("hidden_act", act)
    try:
        heads, width = get["num_attention_heads"], get["hidden_size"]
        longest = get["max_position_embeddings"]
        epsilon, bias = get["rms_norm_eps"], bool(get.get(of.biases))
        return ModelConfig(
            name=of.model_type,
            vocab=get["vocab_size"],
            d_model=width,
            layers=get["num_hidden_layers"],
            heads=heads,
            mixer=AttentionConfig(
                context=min(longest, _CONTEXT) if context is None else context,
                kv_heads=get.get("num_key_value_heads", heads),
                head_dim=get.get("head_dim", width // heads),
                rotary=_rotary(get),
                qk_norm=epsilon if of.qk_norm else None,
                qkv_bias=bias or not of.biases,
                out_bias=bias,
            ),
            cms=CMSConfig(
                hidden=get["intermediate_size"],
                activation=of.gelu if act == "gelu" else _ACTIVATIONS[act],
                bias=of.mlp_bias and get["mlp_bias"],
            ),
            scaled_embedding=of.scaled,
            tied_embedding=get["tie_word_embeddings"],
            norm_epsilon=epsilon,
            dtype="bfloat16" if _type(get) == "bfloat16" else "float32",
        )
    except KeyError as error:
        raise ValueError(
            f"{_CONFIG} must have the field {error.args[0]!r}, which {family} needs."
        ) from error


def _type(get):
    return get.get("dtype") or get.get("torch_dtype")


def _rotary(get: Mapping[str, Any]) -> Rotary:
    """Of `rope_scaling`, or `rope_parameters` as later versions have it."""
    scaling = {**get.get("rope_scaling", {}), **get.get("rope_parameters", {})}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    base = float(scaling.get("rope_theta", get["rope_theta"]))
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise _unsupported("partial_rotary_factor", scaling["partial_rotary_factor"])
    match kind:
        case "default":
            return Plain(base=base)
        case "linear":
            return Linear(base=base, factor=float(scaling["factor"]))
        case "llama3":
            return Llama3(
                base=base,
                factor=float(scaling["factor"]),
                low=float(scaling["low_freq_factor"]),
                high=float(scaling["high_freq_factor"]),
                original=scaling["original_max_position_embeddings"],
            )
    raise _unsupported("rope_scaling", kind)


def _unsupported(name: str, value: Any) -> ValueError:
    return ValueError(
        f"{_CONFIG} has {name}={value!r}, which this package does not compute: the "
        "logits would be others. Choose a checkpoint without it."
    )


def _said(family: str, config: ModelConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config.json` that describe a model."""
    of, mixer = FAMILIES[family], config.mixer
    if not isinstance(mixer, AttentionConfig):
        raise ValueError(f"{_MIXER.format(family)}, got {config.kinds!r}.")
    rotary = mixer.rotary
    if not isinstance(rotary, Plain | Linear | Llama3):
        raise ValueError(
            f"{family} has rotary positions, and model.mixer.rotary is {rotary.kind!r}:"
            " no checkpoint of it computes this."
        )
    (level,) = config.cms.whole
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    activation = names[config.cms.activation]
    said = {
        "architectures": [family],
        "model_type": of.model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": mixer.kv_heads or config.heads,
        "head_dim": mixer.head_dim or config.d_model // config.heads,
        "intermediate_size": level.hidden,
        "hidden_act": activation,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embedding,
        "max_position_embeddings": base.get("max_position_embeddings", mixer.context),
        "rope_theta": rotary.base,
        "rope_scaling": _scaling(rotary),
    }
    if "hidden_activation" in base:
        said["hidden_activation"] = activation
    if of.biases:
        said[of.biases] = mixer.out_bias
    if of.mlp_bias:
        said["mlp_bias"] = config.cms.bias
    return said


def _scaling(rotary: Rotary) -> dict[str, Any] | None:
    match rotary:
        case Linear():
            return {"rope_type": "linear", "factor": rotary.factor}
        case Llama3():
            return {
                "rope_type": "llama3",
                "factor": rotary.factor,
                "low_freq_factor": rotary.low,
                "high_freq_factor": rotary.high,
                "original_max_position_embeddings": rotary.original,
            }
    return None


def _check_family(family: str, said: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuses a model that reading its `config.json` would not give back."""
    again, mixer = _config_of(family, said, None), config.mixer
    assert isinstance(mixer, AttentionConfig) and isinstance(again.mixer, type(mixer))
    own = dataclasses.replace(
        config,
        mixer=dataclasses.replace(
            mixer,
            kind=again.mixer.kind,
            context=again.mixer.context,
            kv_heads=again.mixer.kv_heads,
            head_dim=again.mixer.head_dim,
        ),
        cms=CMSConfig(
            hidden=again.cms.hidden,
            activation=config.cms.activation,
            bias=config.cms.bias,
        ),
        **{name: getattr(again, name) for name in ("name", "dtype", "remat")},
    )
    differences = config_lib.differences(config_lib.to_json(again), own)
    if differences:
        raise ValueError(
            f"{family} is not what this model is; where they differ, of the family and "
            f"of the model: {'; '.join(differences)}."
        )


# Tensors -----------------------------------------------------------------------------


def _parts(config: ModelConfig, params: PyTree) -> dict[str, list[_Part]]:
    """What each of our parameters, or of their shapes, is made of."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = {".".join(path_names(path)): leaf.shape for path, leaf in leaves}
    return {
        ours: list(_parts_of(config, ours, shape)) for ours, shape in shapes.items()
    }


def _parts_of(config, ours: str, shape: tuple[int, ...]) -> Iterator[_Part]:
    turned, norm = ours.endswith("kernel"), ours.endswith("scale")
    if ours in _MODEL:
        yield _Part(_MODEL[ours], None, slice(None), turned, norm, shape)
        return
    theirs, shape = _LAYER[ours.removeprefix("blocks.")], shape[1:]
    ends = [shape[-1]]
    if len(theirs) > 1:
        mixer = config.mixer
        width = mixer.head_dim or config.d_model // config.heads
        kv_heads = mixer.kv_heads or config.heads
        ends = np.cumsum([config.heads * width, kv_heads * width, kv_heads * width])
    for layer in range(config.layers):
        start = 0
        for name, end in zip(theirs, map(int, ends), strict=True):
            one = (*shape[:-1], end - start)
            yield _Part(
                f"model.layers.{layer}.{name}",
                layer,
                slice(start, end),
                turned,
                norm,
                one[::-1] if turned else one,
            )
            start = end


def _check(stored: Mapping[str, shards.Stored], parts: list[_Part]) -> None:
    """Refuses tensors that are not those of the config, which it reads nothing of."""
    wanted = {part.name: part.shape for part in parts}
    for name, shape in wanted.items():
        if name not in stored:
            near = did_you_mean(name, set(stored) - set(wanted))
            raise ValueError(f"the checkpoint has no tensor {name!r}.{near}")
        if stored[name].shape != shape:
            raise ValueError(
                f"the tensor {name!r} must be {shape}, as {_CONFIG} says, got "
                f"{stored[name].shape}."
            )
    surplus = [name for name in stored if name not in wanted]
    surplus = [name for name in surplus if not name.endswith("rotary_emb.inv_freq")]
    if surplus:
        raise ValueError(
            f"the checkpoint has a tensor {surplus[0]!r} ({len(surplus)} in all) that "
            f"the model which {_CONFIG} describes does not have."
        )
