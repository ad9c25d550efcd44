"""Hugging Face checkpoints in and out, strictly: no weight missing, extra or misshapen, safetensors only.

A model whose parts are those of one standard class is saved as that class (`LlamaForCausalLM`, `Qwen3ForCausalLM` with
QK-norm, `GPT2LMHeadModel`), and any tool that loads the class runs it without our code. A mixture of parts is saved in
our own format, which only `load_checkpoint` reads. What transformers has no key for stands under "threefold" in
config.json.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from basics.errors import CheckpointError, ConfigError
from basics.files import atomic_folder, atomic_write
from threefold.config import ModelConfig
from threefold.model.decoder import Decoder, kv_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CARD = "README.md"  # the model card
OWN = "ThreefoldDecoder"
LLAMA, QWEN3, GPT2 = "LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"
LARGEST = 2**31 - 1  # of any size in a config.json: products of two fit into torch's 64 bits
SHOWN = 5  # names of weights in one error
PROBE_TOLERANCE = 1e-4  # of the largest logit: two implementations of the same fp32 sums

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


# Weights: names and layouts ------------------------------------------------------------------------------------------


def _llama_names(config: ModelConfig) -> dict[str, str]:
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not config.tie_embeddings:
        names["unembed.weight"] = "lm_head.weight"
    kinds = ("weight", "bias") if config.bias else ("weight",)
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        names[f"{ours}.attention_norm.weight"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}.ffn_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        for kind in kinds:
            for part in "qkvo":
                names[f"{ours}.attention.{part}.{kind}"] = f"{theirs}.self_attn.{part}_proj.{kind}"
            for part in ("gate", "up", "down"):
                names[f"{ours}.ffn.{part}.{kind}"] = f"{theirs}.mlp.{part}_proj.{kind}"
        if config.qk_norm:
            for part in "qk":
                names[f"{ours}.attention.{part}_norm.weight"] = f"{theirs}.self_attn.{part}_norm.weight"
    return names


def _gpt2_names(config: ModelConfig) -> dict[str, str]:
    """Ours to theirs for what is one tensor in both; the fused c_attn is apart."""
    names = {
        "embed.weight": "transformer.wte.weight",
        "position.weight": "transformer.wpe.weight",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
    }
    if not config.tie_embeddings:
        names["unembed.weight"] = "lm_head.weight"
    pairs = {"attention_norm": "ln_1", "ffn_norm": "ln_2", "attention.o": "attn.c_proj", "ffn.up": "mlp.c_fc"}
    for layer in range(config.n_layer):
        for ours, theirs in {**pairs, "ffn.down": "mlp.c_proj"}.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"transformer.h.{layer}.{theirs}.{kind}"
    return names


def _is_conv1d(hf_name: str) -> bool:
    """GPT-2 keeps its projections as [in, out]."""
    return hf_name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def to_hf_state(model: Decoder) -> dict[str, Tensor]:
    """The weights under the names and in the layouts of the model's class (ours for a mixture)."""
    state, name = model.state_dict(), architecture(model.config)
    if name == OWN:
        return state
    if name != GPT2:
        return {theirs: state[ours] for ours, theirs in _llama_names(model.config).items()}
    out = {}
    for ours, theirs in _gpt2_names(model.config).items():
        out[theirs] = state[ours].t() if _is_conv1d(theirs) else state[ours]
    for layer in range(model.config.n_layer):
        for kind in ("weight", "bias"):
            fused = torch.cat([state[f"blocks.{layer}.attention.{part}.{kind}"] for part in "qkv"])
            out[f"transformer.h.{layer}.attn.c_attn.{kind}"] = fused.t() if kind == "weight" else fused
    return {key: value.contiguous() for key, value in out.items()}


def from_hf_state(state: Mapping[str, Tensor], config: ModelConfig, where: str = "weights") -> dict[str, Tensor]:
    """The Decoder's state dict from a class's weights. CheckpointError naming what is missing, extra or misshapen."""
    name = architecture(config)
    state = _canonical(state, name)
    if config.tie_embeddings and name != OWN:
        state = _without_tied_head(state, name, where)
    check_weights({key: tuple(value.shape) for key, value in state.items()}, config, where)
    if name == OWN:
        return state
    if name != GPT2:
        return {ours: state[theirs] for ours, theirs in _llama_names(config).items()}
    out = {}
    for ours, theirs in _gpt2_names(config).items():
        out[ours] = state[theirs].t().contiguous() if _is_conv1d(theirs) else state[theirs]
    for layer in range(config.n_layer):
        for kind in ("weight", "bias"):
            fused = state[f"transformer.h.{layer}.attn.c_attn.{kind}"]
            parts = (fused.t() if kind == "weight" else fused).split(config.d_model)
            for part, tensor in zip("qkv", parts, strict=True):
                out[f"blocks.{layer}.attention.{part}.{kind}"] = tensor.contiguous()
    return out


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights a checkpoint of this config holds, in its class's names."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in to_hf_state(Decoder(config)).items()}


def check_weights(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """CheckpointError naming missing, extra and misshapen weights, if there are any."""
    expected = expected_shapes(config)
    faults = []
    if missing := sorted(expected.keys() - shapes.keys()):
        faults.append(f"missing {_some(missing)}")
    if extra := sorted(shapes.keys() - expected.keys()):
        faults.append(f"extra {_some(extra)}")
    bad = [key for key in sorted(expected.keys() & shapes.keys()) if tuple(shapes[key]) != expected[key]]
    if bad:
        faults.append(
            "misshapen " + _some([f"{key} {list(shapes[key])}, expected {list(expected[key])}" for key in bad])
        )
    if faults:
        raise CheckpointError(f"{where}: {'; '.join(faults)} (of {len(expected)} weights of {architecture(config)})")


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _canonical(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Names as transformers writes them today: the hub's GPT-2 files leave out "transformer." and hold causal masks."""
    if name != GPT2:
        return dict(state)
    named = {
        key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}": value
        for key, value in state.items()
    }
    return {key: value for key, value in named.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}


def _without_tied_head(state: dict[str, Tensor], name: str, where: str) -> dict[str, Tensor]:
    head = state.get("lm_head.weight")
    if head is None:
        return state
    embedding = state.get("transformer.wte.weight" if name == GPT2 else "model.embed_tokens.weight")
    if embedding is not None and head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        raise CheckpointError(
            f"{where}: lm_head.weight differs from the embedding although tie_word_embeddings is true"
        )
    return {key: value for key, value in state.items() if key != "lm_head.weight"}


# Folders ------------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: str | Path, model: Decoder, tokenizer: Any = None) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files into `folder`.

    The weights come last and config.json before them, each in one step, so that a half-written folder never loads.
    CheckpointError if the tokenizer has more tokens than the model.
    """
    folder = Path(folder)
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{folder}: a tokenizer of {len(tokenizer)} tokens and a model of {model.config.vocab_size}; "
            "one was made for another run"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)
    config = to_hf_config(model.config, tokenizer, model.embed.weight.dtype)
    generation = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None
    }
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    atomic_write(folder / "generation_config.json", _json(generation))
    atomic_write(folder / "config.json", _json(config))
    state = {key: value.detach().cpu().contiguous() for key, value in to_hf_state(model).items()}
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS)


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The Decoder of a checkpoint folder: ours, or a Llama, Qwen3 or GPT-2 checkpoint in safetensors (also sharded).

    CheckpointError: no folder or file, a damaged file, a part the Decoder does not have, weights missing, extra or
    misshapen (named).
    """
    folder = Path(folder)
    config = read_config(folder)
    state = _canonical(_read_weights(folder, config), architecture(config))
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{folder / WEIGHTS}: {key} is {tensor.dtype}, expected floating point")
    return _build(config, from_hf_state(state, config, str(folder / WEIGHTS)), dtype, device)


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder. CheckpointError as for `load_checkpoint`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {folder}: it holds no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return from_hf_config(raw, str(path))


def _read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif index.is_file():
        files = _shards(folder, index)
    else:
        raise CheckpointError(f"no {WEIGHTS} in {folder}; other weight formats are not read")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as header:
                shapes = {key: tuple(header.get_slice(key).get_shape()) for key in header.keys()}  # noqa: SIM118
            if len(files) == 1 and config.n_layer > len(shapes):  # nor is a model of a million layers built to compare
                raise CheckpointError(f"{file}: {len(shapes)} weights, too few for {config.n_layer:,} layers")
            if len(files) == 1:  # before a byte of a wrong file is read
                shapes = _canonical(shapes, architecture(config))
                if config.tie_embeddings and architecture(config) != OWN:
                    shapes.pop("lm_head.weight", None)
                check_weights(shapes, config, str(file))
            state.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    if config.n_layer > len(state):
        raise CheckpointError(f"{folder}: {len(state)} weights, too few for {config.n_layer:,} layers")
    return state


def shard_names(index: Path) -> list[str]:
    """The files that an index of sharded weights names, beside it. CheckpointError: no index, or a name that leads
    elsewhere."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {str(name)[:80]!r} is no file name that ends in .safetensors")
    return names


def _shards(folder: Path, index: Path) -> list[Path]:
    names = shard_names(index)
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: shard {name} is missing")
    return [folder / name for name in names]


def _build(config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config)
    moved = {key: tensor.to(device=device, dtype=dtype) for key, tensor in state.items()}
    model.load_state_dict(moved, strict=True, assign=True)
    return model.requires_grad_(True).eval()


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


# transformers' own models ---------------------------------------------------------------------------------------------


def from_transformers(model: "PreTrainedModel") -> Decoder:
    """The same model as a Decoder, weights copied: Llama, Qwen3 or GPT-2 in memory, its dtype and device kept.

    CheckpointError where the Decoder has not the parts.
    """
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config = from_hf_config(raw, type(model).__name__)
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        state.pop("lm_head.weight", None)  # transformers ties it: the state dict lists one tensor twice
    first = next(model.parameters())
    return _build(config, from_hf_state(state, config, type(model).__name__), first.dtype, first.device)


def to_transformers(model: Decoder, tokenizer: Any = None) -> "PreTrainedModel":
    """The same model as its standard class of transformers, weights copied. CheckpointError for a mixture."""
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds to import: only where it is used

    _must_be_standard(model.config, "this model")
    raw = to_hf_config(model.config, tokenizer, model.embed.weight.dtype)
    hf_config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    copy = AutoModelForCausalLM.from_config(hf_config, dtype=model.embed.weight.dtype)
    state = {key: tensor.detach().clone() for key, tensor in to_hf_state(model).items()}
    if model.config.tie_embeddings:
        state["lm_head.weight"] = model.embed.weight.detach().clone()
    copy.load_state_dict(state, strict=True)
    copy.tie_weights()
    return copy.to(model.embed.weight.device).eval()


def _must_be_standard(config: ModelConfig, what: str) -> None:
    if reason := why_no_standard_class(config):
        raise CheckpointError(
            f"{what} cannot be exported: no standard class of transformers holds this mixture of parts ({reason}); "
            "it loads with threefold.model.load_checkpoint"
        )


def export(source: str | Path, destination: str | Path) -> str:
    """Write a checkpoint as a folder any Hugging Face tool loads, and check it: transformers' logits must equal ours.

    Returns the class. Only weights, in fp32, configuration, tokenizer and model card are written. CheckpointError: a
    mixture that no standard class holds (with the reason), a destination that is not empty, or an export whose logits
    differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, destination = Path(source), Path(destination)
    _must_be_standard(read_config(source), str(source))
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} is not empty; name another destination")
    model = load_checkpoint(source)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    with atomic_folder(destination) as folder:
        save_checkpoint(folder, model, tokenizer)
        if (source / CARD).is_file():
            atomic_write(folder / CARD, (source / CARD).read_bytes())
        standard = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        _check_equal(model, standard, str(destination))
    return architecture(model.config)


@torch.no_grad()
def _check_equal(ours: Decoder, theirs: "PreTrainedModel", where: str) -> None:
    length = min(ours.config.context, 32)
    tokens_BT = torch.randint(ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    a, b = ours(tokens_BT), theirs(tokens_BT, use_cache=False).logits
    if not (a - b).abs().max() <= PROBE_TOLERANCE * a.abs().max():
        raise CheckpointError(
            f"{where}: transformers' logits differ from ours by {(a - b).abs().max():.3g}; not exported"
        )
