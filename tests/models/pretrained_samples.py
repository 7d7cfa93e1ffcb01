"""Tiny checkpoints as Hugging Face lays them out, and what `transformers` says of them.

Weights are drawn from the name of each, so a test writes the checkpoint anew. The
logits are kept in `pretrained_logits.npz`; where `transformers` and `torch` are
installed,

    python tests/models/pretrained_samples.py

makes that file again.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

LOGITS = Path(__file__).with_name("pretrained_logits.npz")
TOKENS = np.random.default_rng(5).integers(0, 23, (2, 19)).astype(np.int32)
CODES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_SHARED = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 50.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name: (config.json, type of the weights, files)
SAMPLES = {
    "llama": (
        _SHARED
        | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        | {"head_dim": 8, "rope_theta": 500.0, "rope_scaling": _LLAMA3},
        "BF16",
        3,
    ),
    "llama_biased": (
        _SHARED
        | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
        | {"rope_scaling": {"type": "linear", "factor": 2.0}, "hidden_act": "gelu"},
        "F16",
        1,
    ),
    "qwen2": (
        _SHARED
        | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        | {"use_sliding_window": False, "sliding_window": 32},
        "F32",
        1,
    ),
    "qwen3": (
        _SHARED
        | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        | {"head_dim": 6, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "F32",
        2,
    ),
    "gemma": (
        _SHARED
        | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
        | {"head_dim": 10, "hidden_act": "gelu", "hidden_activation": None}
        | {"tie_word_embeddings": True, "num_attention_heads": 3}
        | {"num_key_value_heads": 1, "hidden_size": 18},
        "F32",
        1,
    ),
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint, by the names that `transformers` gives them."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim", width // heads)
    q, kv = heads * head, config["num_key_value_heads"] * head
    kind = config["model_type"]
    made = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        made["lm_head.weight"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input", "post_attention"):
            made[f"{at}.{norm}_layernorm.weight"] = (width,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            made[f"{at}.self_attn.{name}_proj.weight"] = (rows, width)
            if kind == "qwen2" or config.get("attention_bias"):
                made[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        made[f"{at}.self_attn.o_proj.weight"] = (width, q)
        if config.get("attention_bias"):
            made[f"{at}.self_attn.o_proj.bias"] = (width,)
        if kind == "qwen3":
            made[f"{at}.self_attn.q_norm.weight"] = (head,)
            made[f"{at}.self_attn.k_norm.weight"] = (head,)
        for name, shape in (
            ("gate", (hidden, width)),
            ("up", (hidden, width)),
            ("down", (width, hidden)),
        ):
            made[f"{at}.mlp.{name}_proj.weight"] = shape
            if config.get("mlp_bias"):
                made[f"{at}.mlp.{name}_proj.bias"] = shape[:1]
    return made


def drawn(name: str, shape: tuple[int, ...], norm_from: float) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    value = rng.normal(size=shape)
    if "norm" in name:
        return 0.3 * value + norm_from
    return value * (0.5 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)


def tensors(sample: str) -> dict[str, np.ndarray]:
    config, code, _ = SAMPLES[sample]
    norm_from = 0.0 if config["model_type"] == "gemma" else 1.0
    return {
        name: drawn(name, shape, norm_from).astype(CODES[code])
        for name, shape in shapes(config).items()
    }


def write(folder: Path, sample: str, config=None, made=None) -> Path:
    """The folder of a checkpoint; `config` and `made` stand for the sample's own."""
    own, code, files = SAMPLES[sample]
    made = tensors(sample) if made is None else made
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(own if config is None else config))
    names = list(made)
    where = {}
    for i in range(files):
        file = "model.safetensors"
        if files > 1:
            file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        mine = {name: made[name] for name in names[i::files]}
        (folder / file).write_bytes(packed(mine, code))
        where |= dict.fromkeys(mine, file)
    if files > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def packed(made: dict[str, np.ndarray], code: str) -> bytes:
    """A safetensors file."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, value in made.items():
        offsets = [at, at + value.nbytes]
        header[name] = {
            "dtype": code,
            "shape": list(value.shape),
            "data_offsets": offsets,
        }
        at += value.nbytes
    text = json.dumps(header).encode()
    body = b"".join(value.tobytes() for value in made.values())
    return len(text).to_bytes(8, "little") + text + body


def said_by_transformers(folder: Path) -> np.ndarray:
    """Logits of `TOKENS`, in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        logits = {
            sample: said_by_transformers(write(Path(root) / sample, sample))
            for sample in SAMPLES
        }
    np.savez(LOGITS, **logits)
    sys.stdout.write(f"{LOGITS.name}: {LOGITS.stat().st_size} bytes\n")
