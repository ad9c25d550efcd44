"""What the stages of a run will need from this machine, asked before the first of them starts: models from outside, the
packages that read them, memory, room on the disk, and prompts that fit a tokenizer that is already known."""

import importlib.util
import shutil
from collections.abc import Collection
from pathlib import Path

import psutil

from basics import paths
from basics.errors import ConfigError, SourceError, ThreefoldError
from basics.names import replicate_of
from papertrail.processes import has_gpu
from study import checks, sizes, stages
from study.preset import TRAINED, Preset
from study.run import Run
from threefold.config import GPT2_VOCABULARY

WEIGHT_FORMS = ("model*.safetensors", "pytorch_model*.bin")
READS_GGUF = ("gguf", "accelerate")  # packages that transformers needs to read a GGUF file


def check(run: Run, selected: Collection[str] | None = None) -> None:
    """Check what the selected stages (default: all) that are not made yet need.

    Raises SourceError (a model from outside that is not to be had), ConfigError (a package or memory that this machine
    does not have), EvaluationError (prompts that do not fit the context), ThreefoldError (no room on the disk).
    """
    todo = [name for name in run.plan if (selected is None or name in selected) and run.finished(name) is None]
    models = dict.fromkeys(entry for stage in todo for entry in stages.models_from_outside(run.preset, stage))
    for name, location, revision in models:
        _check_model(name, location, revision, run.data_dir)
    trained = [name for name in todo if replicate_of(name)[0] in TRAINED]
    parameters = _parameters(run.preset)
    if trained:
        _check_memory(run.preset, parameters)
    kept = len(trained) * 4 * parameters  # fp32 weights, and the moments and weights of the state of one that trains
    _check_disk(run.path, kept + (12 * parameters if trained else 0))
    if "data" in todo and run.preset.tokenizer.kind == "gpt2":  # another one is known when stage data has trained it
        from threefold.data.tokenizer import build_tokenizer

        model = run.preset.model
        tokenizer = build_tokenizer(
            run.preset.tokenizer, sinks=model.sinks, data_dir=run.data_dir, context=model.context
        )
        checks.check_evaluations(run.preset, tokenizer, run.data_dir)


def _parameters(preset: Preset) -> int:
    vocabulary = GPT2_VOCABULARY if preset.tokenizer.kind == "gpt2" else preset.tokenizer.vocab_size
    model = preset.model
    positions = model.context if model.position == "learned" else 0
    ff = model.d_ff if model.ffn == "swiglu" else model.d_ff * 2 // 3  # two matrices instead of three
    return sizes.parameters(model.n_layer, model.d_model, ff, positions, vocabulary)


def _check_model(name: str, location: str, revision: str, data_dir: str) -> None:
    if location.startswith("package:"):  # its file was looked up for the stage's fingerprint
        missing = [package for package in READS_GGUF if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"model {name}: reading {location} needs {' and '.join(missing)}: `pip install {' '.join(missing)}`, "
                "or take it out of the preset's [[baselines.external]]"
            )
        return
    folder = next((folder for folder in paths.model_folders(location, data_dir) if folder.is_dir()), None)
    if folder is not None:
        for needed in (("config.json",), WEIGHT_FORMS):
            if not any(path for pattern in needed for path in folder.glob(pattern)):
                raise SourceError(f"model {name}: {folder} holds no {' or '.join(needed)}")
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from threefold.data import hub

    try:
        cached = try_to_load_from_cache(location, "config.json", revision=revision or None)
    except HFValidationError:
        raise SourceError(f"model {name}: no folder {location}, and no name on the hub") from None
    if not isinstance(cached, str):
        try:
            hub.resolve_commit(location, revision, "model")
        except SourceError as error:
            raise SourceError(
                f"model {name}: no folder {location}, not in the Hugging Face cache, and {error}: offline, name a "
                "checkpoint folder in the preset's [baselines]"
            ) from error


def _check_memory(preset: Preset, parameters: int) -> None:
    needed, there = sizes.TRAINING_BYTES * parameters, psutil.virtual_memory().total + psutil.swap_memory().total
    if needed > there and not has_gpu():
        model = preset.model
        raise ConfigError(
            f"a model of {parameters:,} parameters (model.n_layer = {model.n_layer}, model.d_model = {model.d_model}) "
            f"needs {needed / 1e9:,.0f} GB to train, this machine has {there / 1e9:,.0f} GB"
        )


def _check_disk(folder: Path, needed: int) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if needed > (free := shutil.disk_usage(existing).free):
        raise ThreefoldError(
            f"the run will write at least {needed / 1e9:,.1f} GB to {paths.RUNS}, and {free / 1e9:,.1f} GB are free: "
            "`threefold clean` frees what runs take, THREEFOLD_RUNS puts them elsewhere"
        )
