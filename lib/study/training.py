"""The stages as notebooks call them: a model goes in, a checkpoint folder with its metrics comes out.

Each is `loop.train` with its objective. A folder whose training is done is not trained again: its checkpoint is loaded.
`prepare` and `train_stage` are what a stage's notebook does and what each worker of `threefold train` does.
"""

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from basics.errors import ConfigError, TrainingError
from basics.files import atomic_write, damaged, read_note, sha256_tree, write_note
from basics.names import replicate_of
from papertrail.run import RUN_FILE, Stage, attempts_determinism, read_run_file
from study import launch
from study.preset import measured_on
from threefold.config import ModelConfig, TrainConfig
from threefold.data import corpus, exclusion
from threefold.data.packing import PackedRows, PairedRows
from threefold.data.tokenizer import load_tokenizer, without_bos
from threefold.model.decoder import Decoder
from threefold.model.gpt2 import gpt2_counterpart
from threefold.model.hf import WEIGHTS, load_checkpoint, save_checkpoint
from threefold.training import distributed
from threefold.training.feed import Feed
from threefold.training.loop import Progress, TrainResult, clear_state, identity, reference_logprobs, train
from threefold.training.objectives import Distillation, NextToken, Objective, Preference
from threefold.training.state import STATE, system_errors, tensors_digest, weights_digest

RESULT = "training.json"
REFERENCE = "reference.safetensors"


@dataclass(frozen=True)
class Trained:
    """A trained model, in memory and in its folder."""

    model: Decoder
    result: TrainResult
    folder: Path


@dataclass(frozen=True)
class Inputs:
    """What a stage trains, from its parents and its data."""

    config: ModelConfig  # of the model that is trained
    parent: Decoder | None  # what it goes on from, or is distilled from; None: fresh weights
    tokenizer: Any
    rows: PackedRows | PairedRows
    heldout: PackedRows | PairedRows
    replay: PackedRows | None = None  # sft: pretraining text that is mixed in


def prepare(stage: Stage) -> Inputs:
    """The inputs of a stage that trains: pretrain, gpt2, distilgpt2, sft, dpo or a replicate of one.

    Raises MissingInput where a parent is not finished; SourceError or DataError.
    """
    kind, data, data_dir = replicate_of(stage.name)[0], stage.preset.data, stage.run.data_dir
    exclude = exclusion.Exclusion(stage.preset.overlap, measured_on(stage.preset), data_dir)
    if kind in ("sft", "dpo"):
        folder = stage.require("pretrain" if kind == "sft" else "sft")
        model, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
        config = model.config
        if kind == "dpo":
            rows = corpus.preference_rows(data.dpo, tokenizer, config, data_dir, exclude)
            return Inputs(
                config, model, tokenizer, rows, corpus.preference_rows(data.dpo_heldout, tokenizer, config, data_dir)
            )
        rows = corpus.example_rows(data.sft, tokenizer, config, data_dir, exclude)
        heldout = corpus.example_rows(data.sft_heldout, tokenizer, config, data_dir)
        mixed = stage.config.replay > 0 and len(data.pretrain) > 0
        replay = corpus.pretraining_rows(data.pretrain, tokenizer, config, data_dir, exclude) if mixed else None
        return Inputs(config, model, tokenizer, rows, heldout, replay)
    tokenizer = load_tokenizer(stage.require("data") / "tokenizer")
    config, teacher = replace(stage.preset.model, vocab_size=len(tokenizer)), None
    if kind != "pretrain":  # GPT-2's parts have no sink: its tokenizer puts nothing before a sequence
        config, tokenizer = gpt2_counterpart(config), without_bos(tokenizer)
    if kind == "distilgpt2":
        config, teacher = replace(config, n_layer=(config.n_layer + 1) // 2), load_checkpoint(stage.require("gpt2"))
    rows = corpus.pretraining_rows(data.pretrain, tokenizer, config, data_dir, exclude)
    return Inputs(
        config, teacher, tokenizer, rows, corpus.pretraining_rows(data.pretrain_heldout, tokenizer, config, data_dir)
    )


def train_stage(stage: Stage, inputs: Inputs, folder: Path, progress: Progress | None = None) -> "Trained":
    """Train a stage in its folder: in this process, with the workers it has joined, or in `stage.nproc` workers that
    are started for it, whose progress is passed on. Default: one a GPU where there are several, as many of them as can
    share its batch evenly.

    Raises what `loop.train` does; of workers TrainingError that names the one that failed.
    """
    rows = stage.config.batch_size * stage.config.accumulate
    gpus = max(1, torch.cuda.device_count())
    nproc = stage.nproc or next(n for n in range(gpus, 0, -1) if rows % n == 0)
    workers = distributed.current()
    if workers.first and not (folder / RESULT).exists():
        stage.count_workers(nproc if workers.size == 1 else workers.size)
        if nproc > 1 and workers.size == 1:
            launch.launch(stage, nproc, progress or print)  # leaves the finished training that is loaded below
    common = {
        "folder": folder,
        "tokenizer": inputs.tokenizer,
        "seed": stage.seed,
        "heldout": inputs.heldout,
        "progress": progress,
        "name": stage.name,
    }
    kind = replicate_of(stage.name)[0]
    if kind == "dpo":
        trained = dpo(inputs.parent, inputs.rows, stage.config, **common)
    elif kind == "sft":
        trained = sft(inputs.parent, inputs.rows, stage.config, replay=inputs.replay, **common)
    elif kind == "distilgpt2":
        trained = distil(inputs.parent, inputs.rows, stage.config, **common)
    else:
        trained = pretrain(inputs.config, inputs.rows, stage.config, **common)
    if workers.first:  # of the process that trained, which need not be this one
        stage.determinism = read_note(folder / RESULT)["determinism"]
    return trained


def pretrain(
    model: Decoder | ModelConfig,
    rows: PackedRows,
    config: TrainConfig,
    *,
    folder: str | Path,
    tokenizer: Any,
    seed: int,
    heldout: PackedRows | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    name: str = "pretrain",
) -> Trained:
    """Train a decoder on packed text (also a baseline of GPT-2's parts, by its config and `name="gpt2"`).

    Args:
        model: a config, whose weights are drawn from `seed`, or a decoder to go on with.
        rows, heldout: from `threefold.data.packing.pack_documents`.
        config, folder, seed, device, progress: as in `loop.train`.
        tokenizer: saved beside the weights.
    """
    return _stage(
        _built(model, seed), NextToken(), rows, config, folder, tokenizer, seed, heldout, device, progress, name
    )


def distil(
    teacher: Decoder,
    rows: PackedRows,
    config: TrainConfig,
    *,
    folder: str | Path,
    tokenizer: Any,
    seed: int,
    heldout: PackedRows | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    name: str = "distilgpt2",
) -> Trained:
    """Train a student of half the teacher's depth to follow it (Sanh et al. 2019); the student is in the result.

    Uses `config.distill_temperature` and `config.distill_weight`; the rest as in `pretrain`. The teacher stays as it
    is, on the device trained on.
    """
    objective = Distillation(teacher, config.distill_temperature, config.distill_weight)
    student = half_depth(teacher)
    return _stage(student, objective, rows, config, folder, tokenizer, seed, heldout, device, progress, name)


def sft(
    model: Decoder,
    rows: PackedRows,
    config: TrainConfig,
    *,
    folder: str | Path,
    tokenizer: Any,
    seed: int,
    heldout: PackedRows | None = None,
    replay: PackedRows | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    name: str = "sft",
) -> Trained:
    """Fine-tune a pretrained decoder, in place, on the responses of examples.

    Args:
        rows, heldout: from `threefold.data.packing.pack_examples`: only responses and their end are targets.
        replay: pretraining rows; `config.replay` of all rows are taken from them.
        The rest as in `pretrain`.
    """
    return _stage(model, NextToken(), rows, config, folder, tokenizer, seed, heldout, device, progress, name, replay)


def dpo(
    model: Decoder,
    pairs: PairedRows,
    config: TrainConfig,
    *,
    folder: str | Path,
    tokenizer: Any,
    seed: int,
    heldout: PairedRows | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    name: str = "dpo",
) -> Trained:
    """Train a fine-tuned decoder, in place, to prefer chosen responses (Rafailov et al. 2023); it is its own reference.

    Before the first step its log-probabilities of all pairs are computed once, into `folder/reference.safetensors`.

    Args:
        pairs, heldout: from `threefold.data.packing.pack_pairs`.
        config: with `beta`; `batch_size` counts pairs.
        The rest as in `pretrain`.
    """
    folder = Path(folder)
    reference = _reference(model, {"train": pairs, "heldout": heldout}, config, folder, device)
    objective = Preference(config.beta, reference["train"], reference.get("heldout"))
    return _stage(model, objective, pairs, config, folder, tokenizer, seed, heldout, device, progress, name)


def half_depth(teacher: Decoder) -> Decoder:
    """A student of copies: every other block of the teacher, the first included, its embeddings and final norm.

    Raises ConfigError for a teacher of one block.
    """
    config = teacher.config
    if config.n_layer < 2:
        raise ConfigError(f"a teacher with n_layer = {config.n_layer} has no half-depth student; it needs at least 2")
    kept = range(0, config.n_layer, 2)
    student = Decoder(replace(config, n_layer=len(kept)))
    weights = {}
    for name, value in teacher.state_dict().items():
        part, _, rest = name.partition(".")
        if part != "blocks":
            weights[name] = value
            continue
        index, _, rest = rest.partition(".")
        if int(index) in kept:
            weights[f"blocks.{kept.index(int(index))}.{rest}"] = value
    student.load_state_dict(weights)
    return student


def _built(model: Decoder | ModelConfig, seed: int) -> Decoder:
    if isinstance(model, Decoder):
        return model
    decoder = Decoder(model)
    decoder.initialise(torch.Generator().manual_seed(seed))
    return decoder


def _stage(
    model: Decoder,
    objective: Objective,
    rows: PackedRows | PairedRows,
    config: TrainConfig,
    folder: str | Path,
    tokenizer: Any,
    seed: int,
    heldout: PackedRows | PairedRows | None,
    device: str | None,
    progress: Progress | None,
    name: str,
    replay: PackedRows | None = None,
) -> Trained:
    """Train, save a checkpoint, note that it is done and only then drop the state to resume from."""
    folder = Path(folder)
    asked = json.loads(json.dumps(identity(model, objective, Feed(rows, config, seed, replay), config)))
    if (folder / RESULT).exists():
        if changed := damaged(folder / RESULT):
            raise TrainingError(
                f"{folder.name}/{changed[0].name} is not what the training wrote; remove {RESULT} there to train again"
            )
        done = read_note(folder / RESULT)
        different = [key for key in {**asked, **done["identity"]} if asked.get(key) != done["identity"].get(key)]
        if different:
            raise TrainingError(
                f"{folder.name} holds another finished training ({', '.join(different)} differ); "
                "remove it, or train in another folder"
            )
        if distributed.current().first:
            (progress or print)(f"{name}: trained already, {done['result']['steps']} steps; its checkpoint is loaded")
        return Trained(load_checkpoint(folder), TrainResult(**done["result"]), folder)
    result = train(
        model,
        objective,
        rows,
        config,
        folder=folder,
        seed=seed,
        heldout=heldout,
        replay=replay,
        device=device,
        progress=progress,
        name=name,
    )
    model = _whole(model)
    if distributed.current().first:
        with system_errors(f"{folder.name}/{WEIGHTS}"):
            save_checkpoint(folder, model, tokenizer)
        begun = read_run_file(folder) or {"workers": [distributed.current().size]}
        made = {
            "result": asdict(result),
            "identity": asked,
            "determinism": attempts_determinism(begun),
            "files": {path: digest for path, digest in sha256_tree(folder).items() if path not in (STATE, RUN_FILE)},
        }
        write_note(folder / RESULT, made)
        clear_state(folder)
    return Trained(model, result, folder)


def _whole(model: Decoder) -> Decoder:
    """The model with all its weights; where it was split over workers a new one in host memory."""
    if not any(map(distributed.is_split, model.parameters())):
        return model
    weights = distributed.whole_state(model.state_dict(), keep=True)
    whole = Decoder(model.config, model.attention)
    whole.load_state_dict(weights)
    return whole


def _reference(
    model: Decoder, parts: dict[str, PairedRows | None], config: TrainConfig, folder: Path, device: str | None
) -> dict[str, Tensor]:
    """The reference's log-probabilities of each part's pairs: the folder's if they are this model's, else new."""
    parts = {name: pairs for name, pairs in parts.items() if pairs is not None}
    path = folder / REFERENCE
    made_from = {"weights": weights_digest(model)}
    made_from |= {name: f"{len(pairs)} pairs, {pairs.n_tokens} tokens" for name, pairs in parts.items()}
    kept, known, workers = {}, False, distributed.current()
    if path.exists():
        with contextlib.suppress(SafetensorError), safe_open(path, "pt") as file:  # a damaged header
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            known = file.metadata() == _reference_metadata(made_from, kept)
    if workers.agreed(known):
        return kept
    found = {
        name: reference_logprobs(model, pairs, batch_size=config.batch_size, device=device, precision=config.precision)
        for name, pairs in parts.items()
    }
    if workers.first:
        atomic_write(path, save(found, metadata=_reference_metadata(made_from, found)))
    return found


def _reference_metadata(made_from: dict[str, str], found: dict[str, Tensor]) -> dict[str, str]:
    """One entry: safetensors writes several in an order that changes, and so would the file's bytes."""
    return {"made_from": json.dumps({**made_from, "sha256": tensors_digest(found)})}
