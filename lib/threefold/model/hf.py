"""Hugging Face checkpoints in and out, strictly: no weight missing, extra or misshapen, safetensors only.

A model whose parts are those of one standard class is saved as that class (`LlamaForCausalLM`, `Qwen3ForCausalLM` with
QK-norm, `GPT2LMHeadModel`), and any tool that loads the class runs it without our code. A mixture of parts is saved in
our own format, which only `load_checkpoint` reads. What transformers has no key for is stored under "threefold" in
config.json.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from basics.errors import CheckpointError
from basics.files import atomic_folder, atomic_write, refuse_pointer, require_empty, sha256_bytes, sha256_file
from basics.names import first_few
from threefold.config import ModelConfig
from threefold.model.decoder import Decoder
from threefold.model.hf_config import (
    GPT2,
    LLAMA,
    OWN,
    PARTS,
    QWEN3,
    architecture,
    from_hf_config,
    missing_parts,
    to_hf_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CARD = "README.md"  # the model card
SHOWN = 5  # names of weights in one error
PROBE_TOLERANCE = 1e-4  # of the largest logit: two implementations of the same fp32 sums

# Parts of our weights' names in each standard class; a part without an entry is the same.
_LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "unembed": "lm_head",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "ffn_norm": "post_attention_layernorm",
    "ffn": "mlp",
    **{part: f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")},
}
_NAMES: dict[str, dict[str, str]] = {
    LLAMA: _LLAMA_NAMES,
    QWEN3: _LLAMA_NAMES,
    GPT2: {
        "embed": "transformer.wte",
        "position": "transformer.wpe",
        "norm": "transformer.ln_f",
        "unembed": "lm_head",
        "blocks": "transformer.h",
        "attention_norm": "ln_1",
        "attention": "attn",
        **dict.fromkeys("qkv", "c_attn"),
        "o": "c_proj",
        "ffn_norm": "ln_2",
        "ffn": "mlp",
        "up": "c_fc",
        "down": "c_proj",
    },
}
_BUFFER = re.compile(r"\.(attn|attention|self_attn|crossattention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # GPT-2 keeps its projections as [in, out]


# Weights: names and layouts ------------------------------------------------------------------------------------------


def _hf_name(name: str, architecture: str) -> str:
    """A weight's name in a class: each part of our name translated, for example "blocks" to "model.layers"."""
    names = _NAMES.get(architecture, {})
    return ".".join(names.get(part, part) for part in name.split("."))


def to_hf_state(model: Decoder) -> dict[str, Tensor]:
    """The weights under the names and in the layouts of the model's class (ours for a mixture)."""
    state, name = model.state_dict(), architecture(model.config)
    if name == OWN:
        return state
    parts: dict[str, list[Tensor]] = {}  # GPT-2 has one name for q, k and v
    for ours, tensor in state.items():
        parts.setdefault(_hf_name(ours, name), []).append(tensor)
    out = {key: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for key, tensors in parts.items()}
    if name != GPT2:
        return out
    return {key: (value.t() if key.endswith(_TRANSPOSED) else value).contiguous() for key, value in out.items()}


def from_hf_state(state: Mapping[str, Tensor], config: ModelConfig, where: str = "weights") -> dict[str, Tensor]:
    """The Decoder's state dict from a class's weights.

    Raises CheckpointError naming weights that are missing, extra, misshapen or not floating point, and a head that
    should equal the embedding and does not.
    """
    name = architecture(config)
    state = _canonical(state, name)
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {key} is {tensor.dtype}, expected floating point")
    head, embedding = state.get("lm_head.weight"), state.get(_hf_name("embed.weight", name))
    if config.tie_embeddings and head is not None and embedding is not None and not torch.equal(head, embedding):
        raise CheckpointError(
            f"{where}: lm_head.weight differs from the embedding although tie_word_embeddings is true"
        )
    check_weights({key: tuple(value.shape) for key, value in state.items()}, config, where)
    if name == OWN:
        return state
    with torch.device("meta"):
        names = Decoder(config).state_dict().keys()
    out = {}
    for ours in names:
        theirs = _hf_name(ours, name)
        tensor = state[theirs]
        if name == GPT2 and ".c_attn." in theirs:
            tensor = tensor.split(config.d_model, dim=-1)["qkv".index(ours.split(".")[-2])]
        out[ours] = (tensor.t() if name == GPT2 and theirs.endswith(_TRANSPOSED) else tensor).contiguous()
    return out


def check_weights(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """CheckpointError naming missing, extra and misshapen weights, if there are any."""
    name = architecture(config)
    shapes = _canonical(shapes, name)
    if config.tie_embeddings and name != OWN:
        shapes.pop("lm_head.weight", None)
    if config.n_layer > len(shapes):  # a model of a million layers is not built for a comparison
        raise CheckpointError(f"{where}: {len(shapes)} weights, too few for {config.n_layer:,} layers")
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in to_hf_state(Decoder(config)).items()}
    common = sorted(expected.keys() & shapes.keys())
    faults = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "extra": sorted(shapes.keys() - expected.keys()),
        "misshapen": [
            f"{key} {list(shapes[key])}, expected {list(expected[key])}"
            for key in common
            if shapes[key] != expected[key]
        ],
    }
    if named := "; ".join(f"{fault} {first_few(names, SHOWN)}" for fault, names in faults.items() if names):
        raise CheckpointError(f"{where}: {named} (of {len(expected)} weights of {name})")


def is_buffer(name: str) -> bool:
    """Whether a tensor of a foreign checkpoint is not a weight but a buffer that older versions of transformers saved
    with the weights: the causal mask of GPT-2 and its relatives, the rotary frequencies of Llama. Models compute them.
    """
    return bool(_BUFFER.search(name))


def _canonical(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Weights under the names that transformers writes today: buffers are dropped, and the names of the hub's GPT-2
    files get their "transformer.".
    """
    if name == OWN:
        return dict(state)
    weights = {key: value for key, value in state.items() if not is_buffer(key)}
    if name != GPT2:
        return weights
    whole = ("transformer.", "lm_head.")
    return {key if key.startswith(whole) else f"transformer.{key}": value for key, value in weights.items()}


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
    for file, values in (("generation_config.json", generation), ("config.json", config)):
        atomic_write(folder / file, json.dumps(values, indent=2) + "\n")
    state = {key: value.detach().cpu().contiguous() for key, value in to_hf_state(model).items()}
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", temporary)  # what the umask allows; safetensors makes files of mode 0600
    temporary.replace(folder / WEIGHTS)


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The Decoder of a checkpoint folder: ours, or a Llama, Qwen3 or GPT-2 checkpoint in safetensors (also sharded).

    Raises CheckpointError: no folder or file, a damaged file, a part the Decoder does not have, weights missing, extra
    or misshapen (named).
    """
    folder = Path(folder)
    config, files = read_config(folder), weight_files(folder)
    where = str(files[0] if len(files) == 1 else folder)
    shapes: dict[str, tuple[int, ...]] = {}
    state: dict[str, Tensor] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as header:
                shapes |= {key: tuple(header.get_slice(key).get_shape()) for key in header.keys()}  # noqa: SIM118
        check_weights(shapes, config, where)  # before a byte of a wrong file is read
        for file in files:
            state |= load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return _build(config, from_hf_state(state, config, where), dtype, device)


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder. Raises CheckpointError as `load_checkpoint`."""
    return from_hf_config(read_json_config(folder), str(Path(folder) / "config.json"))


def read_json_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a folder. Raises CheckpointError where it is missing or no JSON object."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {folder}: it holds no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return raw


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors of a folder, or the shards that its index names.

    Raises CheckpointError where there is neither, where the index is damaged or names a file elsewhere, and where a
    shard is missing; SourceError for a file that Git LFS has not fetched.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        refuse_pointer(folder / WEIGHTS)
        return [folder / WEIGHTS]
    if not index.is_file():
        raise CheckpointError(f"no {WEIGHTS} in {folder}; other weight formats are not read")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {str(name)[:80]!r} is not a file name that ends in .safetensors")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: shard {name} is missing")
        refuse_pointer(folder / name)
    return [folder / name for name in names]


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a folder's model.safetensors; of sharded weights, the hash over the shards' names and hashes."""
    files = weight_files(folder)
    if files == [folder / WEIGHTS]:
        return sha256_file(files[0])
    return sha256_bytes("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode())


def _build(config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config)
    moved = {key: tensor.to(device=device, dtype=dtype) for key, tensor in state.items()}
    model.load_state_dict(moved, strict=True, assign=True)
    return model.requires_grad_(True).eval()


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
    if architecture(config) == OWN:
        reason = "; ".join(f"{name} has no {', '.join(missing_parts(config, name))}" for name in PARTS)
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
    require_empty(destination)
    model = load_checkpoint(source)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    with atomic_folder(destination) as folder:
        save_checkpoint(folder, model, tokenizer)
        if (source / CARD).is_file():
            atomic_write(folder / CARD, (source / CARD).read_bytes())
        standard = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        length = min(model.config.context, 32)
        tokens_BT = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours, theirs = model(tokens_BT), standard(tokens_BT, use_cache=False).logits
        difference = (ours - theirs).abs().max()
        if not difference <= PROBE_TOLERANCE * ours.abs().max():
            raise CheckpointError(
                f"{destination}: transformers' logits differ from ours by {difference:.3g}; not exported"
            )
    return architecture(model.config)
