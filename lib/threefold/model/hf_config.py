"""Configurations of Hugging Face checkpoints: which standard class holds a model, its config.json, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from basics.errors import CheckpointError, ConfigError
from threefold.config import ModelConfig
from threefold.model.cache import kv_heads
from threefold.model.decoder import Decoder

OWN = "ThreefoldDecoder"
LLAMA, QWEN3, GPT2 = "LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"
LARGEST = 2**31 - 1  # of any size in a config.json: products of two fit into torch's 64 bits

# What each standard class is made of; a list of values a class can hold.
_PARTS: dict[str, dict[str, tuple]] = {
    LLAMA: {"norm": ("rms",), "ffn": ("swiglu",), "position": ("rope",), "qk_norm": (False,)},
    QWEN3: {"norm": ("rms",), "ffn": ("swiglu",), "position": ("rope",), "qk_norm": (True,), "bias": (False,)},
    GPT2: {
        "norm": ("layer",),
        "ffn": ("gelu",),
        "position": ("learned",),
        "qk_norm": (False,),
        "bias": (True,),
        "n_kv_head": (-1,),
    },
}


# Which class holds a model ------------------------------------------------------------------------------------------


def architecture(config: ModelConfig) -> str:
    """The standard class that holds a model of these parts, or "ThreefoldDecoder" for a mixture."""
    return next((name for name in _PARTS if not _differences(config, name)), OWN)


def why_no_standard_class(config: ModelConfig) -> str:
    """For each standard class, what of this model it cannot hold; "" if one of them holds it all."""
    if architecture(config) != OWN:
        return ""
    return "; ".join(f"{name} has no {', '.join(_differences(config, name))}" for name in _PARTS)


def _differences(config: ModelConfig, name: str) -> list[str]:
    found = []
    for key, allowed in _PARTS[name].items():
        value = getattr(config, key)
        if key == "n_kv_head" and value == config.n_head:
            value = -1
        if value not in allowed:
            found.append(f"{key} = {str(value).lower() if isinstance(value, bool) else value}")
    return found


# Configurations -----------------------------------------------------------------------------------------------------


def to_hf_config(config: ModelConfig, tokenizer: Any = None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The config.json of a model; special token ids are the tokenizer's (none without one)."""
    name = architecture(config)
    ids = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    common = {
        "architectures": [name],
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
        **ids,
    }
    own = {"threefold": {"format": 1, "sinks": config.sinks}}
    if name == OWN:
        own["threefold"]["model"] = dataclasses.asdict(config)
        return {**common, "model_type": "threefold", **own}
    if name == GPT2:
        return {
            **common,
            "model_type": "gpt2",
            "n_positions": config.context,
            "n_embd": config.d_model,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.d_ff,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            **own,
        }
    return {
        **common,
        "model_type": "qwen3" if name == QWEN3 else "llama",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": kv_heads(config),
        "head_dim": config.d_model // config.n_head,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # for readers from before rope_parameters
        "attention_bias": config.bias,
        "attention_dropout": 0.0,
        **({} if name == QWEN3 else {"mlp_bias": config.bias}),
        **own,
    }


def from_hf_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig of a config.json (or of `config.to_dict()`).

    CheckpointError where the class is none of ours, a key is missing, or the Decoder has no such part.
    """
    names = raw.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"{where}: architectures cannot be {repr(names)[:40]}")
    own = raw.get("threefold") or {}
    if not isinstance(own, Mapping):
        raise CheckpointError(f'{where}: "threefold" is {own!r}, expected an object')
    kind = raw.get("model_type")
    if names != [OWN] and kind not in ["llama", "qwen3", "gpt2"]:
        raise CheckpointError(
            f"{where}: model_type {repr(kind)[:40]}, architectures {str(names)[:80]}; "
            f"readable are llama, qwen3, gpt2 and {OWN}"
        )
    try:
        if names == [OWN]:
            config = _own_config(own, where)
        else:
            sinks = own.get("sinks", 0)
            config = _gpt2_config(raw, sinks, where) if kind == "gpt2" else _llama_config(raw, sinks, where)
        for name, value in dataclasses.asdict(config).items():
            if (type(value) is int and value > LARGEST) or (name == "vocab_size" and value == -1):
                raise CheckpointError(f"{where}: {name} cannot be {value}")
        with torch.device("meta"):
            Decoder(dataclasses.replace(config, n_layer=1))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return config


def _own_config(own: Mapping[str, Any], where: str) -> ModelConfig:
    values = own.get("model")
    if not isinstance(values, Mapping):
        raise CheckpointError(f'{where}: a {OWN} needs its "threefold": {{"model": ...}}')
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    if set(values) != fields:
        wrong = ", ".join(sorted(set(values) ^ fields))
        raise CheckpointError(f"{where}: missing or unknown keys in threefold.model: {wrong}")
    return ModelConfig(**values)


def _size(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A whole number of at least 1; where it is absent or null the default, if there is one."""
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise CheckpointError(f"{where}: no {key!r}")
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise CheckpointError(f"{where}: {key} cannot be {repr(value)[:40]}")
    return value


def _flag(raw: Mapping[str, Any], key: str, where: str, default: bool = False) -> bool:
    value = default if raw.get(key) is None else raw[key]
    if type(value) is not bool:
        raise CheckpointError(f"{where}: {key} cannot be {repr(value)[:40]}, expected true or false")
    return value


def _refuse(raw: Mapping[str, Any], allowed: Mapping[str, tuple], where: str) -> None:
    for key, values in allowed.items():
        if raw.get(key, values[0]) not in values:
            raise CheckpointError(f"{where}: {key} = {repr(raw[key])[:40]} is a part the Decoder does not have")


def _llama_config(raw: Mapping[str, Any], sinks: int, where: str) -> ModelConfig:
    qwen = raw["model_type"] == "qwen3"
    _refuse(
        raw,
        {
            "hidden_act": ("silu",),
            "rope_scaling": (None,),
            "use_sliding_window": (False, None),
            "mlp_bias": (raw.get("attention_bias", False),),
            **({"attention_bias": (False,)} if qwen else {}),
        },
        where,
    )
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{where}: rope_parameters cannot be {repr(rope)[:40]}")
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{where}: rope_parameters = {str(rope)[:200]} is a part the Decoder does not have")
    heads, width = _size(raw, "num_attention_heads", where), _size(raw, "hidden_size", where)
    head_dim = _size(raw, "head_dim", where, 128 if qwen else max(width // heads, 1))
    if head_dim * heads != width:
        raise CheckpointError(
            f"{where}: head_dim {head_dim} x {heads} heads is not hidden_size {width}; the Decoder's are"
        )
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    kv = _size(raw, "num_key_value_heads", where, heads)
    return ModelConfig(
        n_layer=_size(raw, "num_hidden_layers", where),
        d_model=width,
        n_head=heads,
        n_kv_head=-1 if kv == heads else kv,
        d_ff=_size(raw, "intermediate_size", where),
        context=_size(raw, "max_position_embeddings", where),
        vocab_size=_size(raw, "vocab_size", where),
        sinks=sinks,
        qk_norm=qwen,
        bias=_flag(raw, "attention_bias", where),
        tie_embeddings=_flag(raw, "tie_word_embeddings", where),
        rope_theta=float(theta) if type(theta) is int and theta <= LARGEST else theta,
        norm_eps=raw.get("rms_norm_eps", 1e-6),
    )


def _gpt2_config(raw: Mapping[str, Any], sinks: int, where: str) -> ModelConfig:
    _refuse(
        raw,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False, True),  # another order of the same sums
            "add_cross_attention": (False,),
        },
        where,
    )
    width = _size(raw, "n_embd", where)
    return ModelConfig(
        n_layer=_size(raw, "n_layer", where),
        d_model=width,
        n_head=_size(raw, "n_head", where),
        d_ff=_size(raw, "n_inner", where, 4 * width),
        context=_size(raw, "n_positions", where),
        vocab_size=_size(raw, "vocab_size", where),
        norm="layer",
        ffn="gelu",
        position="learned",
        sinks=sinks,
        bias=True,
        tie_embeddings=_flag(raw, "tie_word_embeddings", where, True),
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
    )
