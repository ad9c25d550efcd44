"""Configurations of Hugging Face checkpoints: which standard class holds a model, its config.json, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from basics.errors import CheckpointError, ConfigError
from threefold.config import GPT2_PARTS, ModelConfig
from threefold.model.cache import kv_heads
from threefold.model.decoder import Decoder

OWN = "ThreefoldDecoder"
LLAMA, QWEN3, GPT2 = "LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"
CLASSES = {"llama": LLAMA, "qwen3": QWEN3, "gpt2": GPT2}  # by model_type
LARGEST = 2**31 - 1  # of any size in a config.json: products of two fit into torch's 64 bits

# What each standard class is made of: the values of our keys that it can hold.
PARTS: dict[str, dict[str, tuple]] = {
    LLAMA: {"norm": ("rms",), "ffn": ("swiglu",), "position": ("rope",), "qk_norm": (False,)},
    QWEN3: {"norm": ("rms",), "ffn": ("swiglu",), "position": ("rope",), "qk_norm": (True,), "bias": (False,)},
    GPT2: {key: (value,) for key, value in GPT2_PARTS.items()},
}

# Our keys under the names of each class, and the values of its other keys that the Decoder's parts amount to.
_LLAMA_KEYS = {
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "bias": "attention_bias",
}
_KEYS = {
    LLAMA: _LLAMA_KEYS,
    QWEN3: _LLAMA_KEYS,
    GPT2: {
        "context": "n_positions",
        "d_model": "n_embd",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "d_ff": "n_inner",
        "norm_eps": "layer_norm_epsilon",
    },
}
_COMMON_KEYS = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"}
_WRITTEN = {
    LLAMA: {"hidden_act": "silu", "attention_dropout": 0.0},
    QWEN3: {"hidden_act": "silu", "attention_dropout": 0.0},
    GPT2: {"activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
_LLAMA_READ = {"hidden_act": ("silu",), "rope_scaling": (None,), "use_sliding_window": (False, None)}
_READ = {  # the values allowed for keys of a config.json, the class's default first
    LLAMA: _LLAMA_READ,
    QWEN3: {**_LLAMA_READ, "attention_bias": (False,)},
    GPT2: {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # another order of the same sums
        "add_cross_attention": (False,),
    },
}


def architecture(config: ModelConfig) -> str:
    """The standard class that holds a model of these parts, or "ThreefoldDecoder" for a mixture."""
    return next((name for name in PARTS if not missing_parts(config, name)), OWN)


def missing_parts(config: ModelConfig, name: str) -> list[str]:
    """What of this model a standard class cannot hold, as `key = value`."""
    missing = []
    for key, allowed in PARTS[name].items():
        value = getattr(config, key)
        if key == "n_kv_head" and value == config.n_head:
            value = -1
        if value not in allowed:
            missing.append(f"{key} = {str(value).lower() if isinstance(value, bool) else value}")
    return missing


def to_hf_config(config: ModelConfig, tokenizer: Any = None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The config.json of a model; special token ids are the tokenizer's (none without one)."""
    name = architecture(config)
    raw = {
        "architectures": [name],
        "dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(config, ours) for ours, theirs in _COMMON_KEYS.items()},
        "initializer_range": 0.02,
        "use_cache": True,
        **{key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "model_type": next((kind for kind, standard in CLASSES.items() if standard == name), "threefold"),
        "threefold": {"format": 1, "sinks": config.sinks},
    }
    if name == OWN:
        raw["threefold"]["model"] = dataclasses.asdict(config)
        return raw
    raw |= {theirs: getattr(config, ours) for ours, theirs in _KEYS[name].items()} | _WRITTEN[name]
    if name != GPT2:
        raw |= {
            "num_key_value_heads": kv_heads(config),
            "head_dim": config.d_model // config.n_head,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "rope_theta": config.rope_theta,  # for readers from before rope_parameters
        }
    if name == LLAMA:
        raw["mlp_bias"] = config.bias
    return raw


def from_hf_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig of a config.json (or of `config.to_dict()`).

    Raises CheckpointError where the class is none of ours, a key is missing, or the Decoder has no such part.
    """
    names, own, kind = raw.get("architectures") or [], raw.get("threefold") or {}, raw.get("model_type")
    if not isinstance(names, list):
        raise CheckpointError(f"{where}: architectures cannot be {repr(names)[:40]}")
    if not isinstance(own, Mapping):
        raise CheckpointError(f'{where}: "threefold" is {own!r}, expected an object')
    if names != [OWN] and kind not in list(CLASSES):
        raise CheckpointError(
            f"{where}: model_type {repr(kind)[:40]}, architectures {str(names)[:80]}; "
            f"readable are {', '.join(CLASSES)} and {OWN}"
        )
    try:
        config = ModelConfig(**(_own_values(own, where) if names == [OWN] else _standard_values(raw, own, where)))
        for name, value in dataclasses.asdict(config).items():
            if (type(value) is int and value > LARGEST) or (name == "vocab_size" and value == -1):
                raise CheckpointError(f"{where}: {name} cannot be {value}")
        with torch.device("meta"):
            Decoder(dataclasses.replace(config, n_layer=1))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return config


def _own_values(own: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    values = own.get("model")
    if not isinstance(values, Mapping):
        raise CheckpointError(f'{where}: a {OWN} needs its "threefold": {{"model": ...}}')
    if wrong := sorted(set(values) ^ {field.name for field in dataclasses.fields(ModelConfig)}):
        raise CheckpointError(f"{where}: missing or unknown keys in threefold.model: {', '.join(wrong)}")
    return values


def _standard_values(raw: Mapping[str, Any], own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """ModelConfig's values in a standard class's config.json; keys that are absent or null have the class's default."""
    name = CLASSES[raw["model_type"]]
    allowed = _READ[name] | ({"mlp_bias": (raw.get("attention_bias", False),)} if name != GPT2 else {})
    for key, values in allowed.items():
        if raw.get(key, values[0]) not in values:
            raise CheckpointError(f"{where}: {key} = {repr(raw[key])[:40]} is a part the Decoder does not have")
    given = {key: value for key, value in raw.items() if value is not None}
    if name == GPT2:
        defaults = {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5}
        if type(raw.get("n_embd")) is int:
            defaults["n_inner"] = 4 * raw["n_embd"]
    else:
        defaults = {"tie_word_embeddings": False, "attention_bias": False, "rms_norm_eps": 1e-6}
        defaults["num_key_value_heads"] = raw.get("num_attention_heads")
    values = {ours: values[0] for ours, values in PARTS[name].items()} | {"sinks": own.get("sinks", 0)}
    for ours, theirs in {**_COMMON_KEYS, **_KEYS[name]}.items():
        value = given.get(theirs, defaults.get(theirs))
        if value is None:
            raise CheckpointError(f"{where}: no {theirs!r}")
        flag = ours in ("bias", "tie_embeddings")
        if ours != "norm_eps" and (
            type(value) is not bool if flag else type(value) is not int or not 1 <= value <= LARGEST
        ):
            raise CheckpointError(f"{where}: {theirs} cannot be {repr(value)[:40]}")
        values[ours] = value
    if name == GPT2:
        return values
    if values["n_kv_head"] == values["n_head"]:
        values["n_kv_head"] = -1
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{where}: rope_parameters cannot be {repr(rope)[:40]}")
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{where}: rope_parameters = {str(rope)[:200]} is a part the Decoder does not have")
    heads, width = values["n_head"], values["d_model"]
    head_dim = given.get("head_dim", 128 if name == QWEN3 else max(width // heads, 1))
    if type(head_dim) is not int or head_dim * heads != width:
        raise CheckpointError(
            f"{where}: head_dim {repr(head_dim)[:40]} x {heads} heads is not hidden_size {width}, as the Decoder needs"
        )
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    return values | {"rope_theta": float(theta) if type(theta) is int and theta <= LARGEST else theta}
