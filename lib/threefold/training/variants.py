"""Variants of one model, trained alike: what each choice of architecture or optimizer is worth at equal steps, text,
order and parameters.
"""

import hashlib
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from basics.errors import ConfigError
from basics.files import damaged, read_note, sha256_json, sha256_tree, write_note
from basics.source_code import code_fingerprint
from threefold.config import ModelConfig, OverlapConfig, SourceConfig, TrainConfig, apply_variant
from threefold.data import corpus, exclusion
from threefold.data.packing import PackedRows
from threefold.data.tokenizer import load_tokenizer, with_sinks
from threefold.model.decoder import Decoder, parameter_counts
from threefold.model.hf import load_checkpoint, save_checkpoint
from threefold.training.loop import Progress, clear_state, train
from threefold.training.objectives import NextToken
from threefold.training.side_by_side import default_workers, side_by_side
from threefold.training.state import STATE
from threefold.training.timing import Timing, time_steps

BASE = "base"
BEGUN, RESULT = "begun.json", "result.json"  # in a training's folder
EQUAL = 0.01  # parameters of a feed-forward variant may differ from the base's by less than this share

Packed = tuple[PackedRows, PackedRows]  # training rows, held-out rows
Configs = tuple[ModelConfig, TrainConfig]


@dataclass(frozen=True)
class VariantRun:
    """One variant trained from one seed."""

    variant: str  # "base", or what was changed: "norm=layer"
    seed: int
    heldout_loss: float  # nats a token after the last step
    parameters: int
    tokens: int
    d_ff: int  # the gelu variants' is 3/2 of the base's
    curve: dict[
        str, list[float]
    ]  # held-out loss on the way: {"tokens": [...], "loss": [...]}, from before the first step
    seconds: float = field(compare=False)  # in training steps


@dataclass(frozen=True)
class VariantResult:
    """One variant over all seeds."""

    variant: str
    runs: tuple[VariantRun, ...]

    @property
    def heldout_loss(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(run.heldout_loss for run in self.runs)

    @property
    def parameters(self) -> int:
        return self.runs[0].parameters


@dataclass(frozen=True)
class SourceRows:
    """Training and held-out text in rows for a model; worker processes receive it pickled."""

    train: tuple[SourceConfig, ...]
    heldout: tuple[SourceConfig, ...]
    tokenizer: Path  # folder
    overlap: OverlapConfig
    measured_on: Mapping[str, SourceConfig]  # removed from the training text, as `overlap` says
    data_dir: str = ""

    def __call__(self, model: ModelConfig) -> Packed:
        fitting = with_sinks(load_tokenizer(self.tokenizer), model.sinks)
        exclude = exclusion.Exclusion(self.overlap, self.measured_on, self.data_dir)
        return (
            corpus.pretraining_rows(self.train, fitting, model, self.data_dir, exclude),
            corpus.pretraining_rows(self.heldout, fitting, model, self.data_dir),
        )


def variant_configs(model: ModelConfig, config: TrainConfig, variant: str) -> Configs:
    """Model and training of a variant ("norm=layer", "norm=layer,bias=true", "optimizer=adamw"), at equal parameters.

    GELU's feed-forward has two matrices where SwiGLU's has three: a change from one to the other that leaves `d_ff`
    alone scales it by 3/2 or 2/3.

    Raises ConfigError for an unknown key or an impossible value, and where no `d_ff` makes the parameters equal.
    """
    if variant == BASE:
        return model, config
    changed, training = apply_variant(model, config, variant)
    if changed.ffn != model.ffn and changed.d_ff == model.d_ff:
        changed = replace(changed, d_ff=round(model.d_ff * (3 / 2 if changed.ffn == "gelu" else 2 / 3)))
        unlike = _ffn_parameters(changed) / _ffn_parameters(replace(changed, ffn=model.ffn, d_ff=model.d_ff)) - 1
        if abs(unlike) >= EQUAL:
            raise ConfigError(
                f"variant {variant}: with d_ff = {changed.d_ff} its feed-forward has {unlike:+.1%} parameters; "
                f"choose a base with a larger d_ff than {model.d_ff}, or name d_ff in the variant"
            )
    return changed, training


def _ffn_parameters(model: ModelConfig) -> int:
    return parameter_counts(replace(model, vocab_size=1))["ffn"]


def all_configs(model: ModelConfig, config: TrainConfig, variants: Sequence[str]) -> dict[str, Configs]:
    """The base and every variant that differs from it, by name.

    All have the same vocabulary, with room for the sinks of the variant that has most.
    """
    found = {name: variant_configs(model, config, name) for name in (BASE, *variants)}
    found = {name: configs for name, configs in found.items() if name == BASE or configs != (model, config)}
    more = max(changed.sinks for changed, _ in found.values()) - model.sinks
    return {
        name: (replace(changed, vocab_size=changed.vocab_size + more), trained)
        for name, (changed, trained) in found.items()
    }


def run_variants(
    base: ModelConfig,
    variants: Sequence[str],
    config: TrainConfig,
    rows: PackedRows | Callable[[ModelConfig], Packed],
    heldout: PackedRows | None = None,
    seeds: Sequence[int] = (0,),
    *,
    folder: str | Path,
    reuse: str | Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    progress: Progress = print,
) -> list[VariantResult]:
    """Train the base and every variant from each seed, on the same text in the same order.

    Args:
        base: the model the variants differ from, `vocab_size` set.
        variants: see `variant_configs`; the base itself always comes first, what does not differ from it is left out.
        config: of every training.
        rows, heldout: packed rows. Variants that change `sinks` or `context` need rows of their own: give a function
            from a model's config to (rows, heldout rows) instead, such as `SourceRows`. A row's sinks come on top of
            the base's text positions, so that every variant with a sink trains on the very same rows; the held-out
            loss leaves out documents' first tokens, so that it is over the same tokens for all.
        seeds: of weights and order; one training of each variant a seed.
        folder: keeps each finished training, so that an interrupted call goes on; see `load_variant`.
        reuse: folder of an earlier call, perhaps with other variants; what it holds of the same trainings is copied,
            unless a byte of it changed since.
        device: as in `loop.train`.
        workers: trainings side by side, see `side_by_side`; default one a GPU, or a CPU thread of this process. The
            results do not depend on it.
        progress: takes a line for each finished training.

    Raises:
        ConfigError: a variant that cannot be built or needs rows of its own.
        TrainingError: a training or a worker that failed; the message says which.
    """
    folder, configs = Path(folder), all_configs(base, config, variants)
    for name in dict.fromkeys(variants):
        if name not in configs:
            progress(f"variant {name} is what the base has already: left out")
    if not callable(rows):
        if heldout is None:
            raise ConfigError("the variants need held-out rows to be compared on")
        for name, (changed, _) in configs.items():
            if (changed.sinks, changed.context) != (base.sinks, base.context):
                raise ConfigError(f"variant {name} packs its rows otherwise; give a function that packs them by config")
    packed = _Packed(rows if callable(rows) else partial(_given, (rows, heldout)), base.sinks)

    tasks = [_Task(name, seed, *configs[name]) for seed in seeds for name in configs]
    if reuse is not None:
        for task in tasks:
            if not _known(task, folder, packed) and _known(task, Path(reuse), packed):
                here, there = (variant_folder(home, task.variant, task.seed) for home in (folder, reuse))
                shutil.rmtree(here, ignore_errors=True)
                shutil.copytree(there, here)
    runs = {task: _known(task, folder, packed) for task in tasks}
    waiting = [task for task in tasks if runs[task] is None]
    if len(waiting) < len(tasks):
        progress(f"{len(tasks) - len(waiting)} of {len(tasks)} trainings are done already")
    workers = default_workers(device) if workers is None else workers
    begun = time.perf_counter()
    work = partial(_train, folder=folder, packed=packed, device=device)
    for done, (task, run) in enumerate(side_by_side(work, waiting, workers, device), start=1):
        runs[task] = run
        left = (time.perf_counter() - begun) / done * (len(waiting) - done)
        progress(
            f"{len(tasks) - len(waiting) + done}/{len(tasks)}: {task}: held-out loss {run.heldout_loss:.4f} after "
            f"{run.tokens:,} tokens" + (f"; about {_minutes(left)} left" if left else "")
        )
    return [VariantResult(name, tuple(runs[task] for task in tasks if task.variant == name)) for name in configs]


def time_variants(
    base: ModelConfig,
    variants: Sequence[str],
    config: TrainConfig,
    rows: Callable[[ModelConfig], Packed],
    rounds: int,
    *,
    file: str | Path,
    device: str | None = None,
) -> Timing:
    """Step times of the base and every variant, by turns in this process (`timing.time_steps`).

    Args:
        file: keeps them, so that an interrupted notebook does not time again.
        The rest as in `run_variants`.
    """
    configs = all_configs(base, config, variants)
    asked = {"configs": {name: [asdict(part) for part in parts] for name, parts in configs.items()}, "rounds": rounds}
    known = _cached(Path(file), asked)
    if known is None:
        packed = _Packed(rows, base.sinks)
        known = asdict(time_steps(configs, lambda model: packed(model)[0], rounds, device))
        _keep(Path(file), asked, known)
    return Timing(**known)


def load_variant(folder: str | Path, name: str, seed: int) -> Decoder:
    """The model a finished training of `run_variants` ended with, from the folder given to it.

    Raises CheckpointError where that variant was not trained from that seed.
    """
    return load_checkpoint(variant_folder(folder, name, seed))


def variant_folder(folder: str | Path, name: str, seed: int) -> Path:
    """Where one training of a variant lies: its checkpoint, metrics.jsonl and result.json."""
    stem = "".join(char if char.isalnum() or char in "._-" else "-" for char in name)
    return Path(folder) / f"{stem}-{seed}"


# One training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    variant: str
    seed: int
    model: ModelConfig
    train: TrainConfig

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


class _Packed:
    """Rows for each model, each kind packed once in a process; a copy for another process travels without them."""

    def __init__(self, pack: Callable[[ModelConfig], Packed], sinks: int):
        self.pack, self.sinks = pack, sinks  # the base's
        self.kept: dict[tuple[int, int], Packed] = {}

    def __call__(self, model: ModelConfig) -> Packed:
        wide = replace(model, context=model.context + model.sinks - self.sinks)
        key = (wide.sinks, wide.context)
        if key not in self.kept:
            rows, heldout = self.pack(wide)
            self.kept[key] = rows, heldout.without_openings()
        return self.kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kept": {}}


def _given(packed: Packed, model: ModelConfig) -> Packed:
    return packed


def _train(task: _Task, *, folder: Path, packed: _Packed, device: str | None) -> VariantRun:
    """One training, begun or gone on with, and kept."""
    work, asked = variant_folder(folder, task.variant, task.seed), _asked(task, packed)
    if _cached(work / BEGUN, asked) is None or (work / RESULT).exists():  # of another training, or damaged
        shutil.rmtree(work, ignore_errors=True)
        _keep(work / BEGUN, asked, {})
    torch.compiler.reset()  # graphs of the trainings before: past eight of them torch would not compile another
    model = Decoder(task.model)
    model.initialise(torch.Generator().manual_seed(task.seed))
    rows, heldout = packed(task.model)
    result = train(
        model,
        NextToken(),
        rows,
        task.train,
        folder=work,
        seed=task.seed,
        heldout=heldout,
        device=device,
        progress=_quiet,
        name=str(task),
    )
    save_checkpoint(work, model)
    run = VariantRun(
        variant=task.variant,
        seed=task.seed,
        heldout_loss=result.heldout_loss,
        parameters=parameter_counts(model)["total"],
        tokens=result.tokens,
        d_ff=task.model.d_ff,
        curve={key: [point[key] for point in result.heldout] for key in ("tokens", "loss")},
        seconds=result.seconds,
    )
    files = {path: digest for path, digest in sha256_tree(work).items() if path not in (STATE, RESULT, BEGUN)}
    _keep(work / RESULT, asked, asdict(run), files)
    clear_state(work)
    return run


def _known(task: _Task, folder: Path, packed: _Packed) -> VariantRun | None:
    """The training's result, if it is finished."""
    kept = _cached(variant_folder(folder, task.variant, task.seed) / RESULT, _asked(task, packed))
    return None if kept is None else VariantRun(**kept)


def _asked(task: _Task, packed: _Packed) -> dict[str, Any]:
    """What a training is known by; its seed is in its folder's name."""
    return {
        "model": asdict(task.model),
        "train": asdict(task.train),
        "rows": [_digest(rows) for rows in packed(task.model)],
        "code": code_fingerprint(__name__),
        "torch": torch.__version__,
    }


def _digest(rows: PackedRows) -> list[Any]:
    """Size and a hash of some of the rows, evenly spread."""
    some = rows.rows(np.linspace(0, len(rows) - 1, min(len(rows), 64)).astype(int))
    return [len(rows), rows.n_tokens, hashlib.sha256(some.tokens_BT.numpy().tobytes()).hexdigest()]


def _cached(path: Path, asked: Mapping[str, Any]) -> dict | None:
    """What is kept there, if it was made from the same inputs and every byte, of its files too, is as it was
    written."""
    kept = read_note(path)
    if kept is None or kept["inputs"] != sha256_json(asked) or damaged(path):
        return None
    return kept["result"]


def _keep(path: Path, asked: Mapping[str, Any], result: dict, files: Mapping[str, str] | None = None) -> None:
    """files: {name beside the note: SHA-256} of what goes with the result."""
    write_note(path, {"inputs": sha256_json(asked), "result": result, "files": dict(files or {})})


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _quiet(message: str) -> None:
    """Takes the messages of one variant's training, of which there would be too many."""
