"""Ablations: variants of one model, trained with equal steps, text, order and parameters, so that each choice of
architecture or optimizer can be compared.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from basics.errors import ConfigError
from basics.files import damaged, read_note, sha256_bytes, sha256_json, write_note
from basics.source_code import code_fingerprint
from threefold.config import ModelConfig, OverlapConfig, SourceConfig, TrainConfig, apply_variant
from threefold.data import corpus, exclusion
from threefold.data.packing import PackedRows
from threefold.data.tokenizer import load_tokenizer, with_sinks
from threefold.model.decoder import Decoder, parameter_counts
from threefold.model.hf import load_checkpoint
from threefold.training.loop import RESULT, train
from threefold.training.monitor import Progress, TrainResult
from threefold.training.objectives import NextToken
from threefold.training.progress import duration
from threefold.training.side_by_side import default_workers, side_by_side
from threefold.training.timing import Timing, time_steps

BASE = "base"
INPUTS = "inputs.json"  # in a training's folder: hash of what it depends on, written when it begins
EQUAL = 0.01  # relative difference of a feed-forward variant's parameters from the base's must be below this

Packed = tuple[PackedRows, PackedRows]  # training rows, held-out rows
RowsFor = Callable[[ModelConfig], Packed]
Configs = tuple[ModelConfig, TrainConfig]


@dataclass(frozen=True)
class VariantRun:
    """One variant trained from one seed."""

    variant: str  # "base", or what was changed: "norm=layer"
    seed: int
    heldout_loss: float  # nats per token after the last step
    parameters: int
    tokens: int
    d_ff: int  # the gelu variants' is 3/2 of the base's
    curve: dict[str, list[float]]  # held-out losses {"tokens": [...], "loss": [...]}, from before the first step on
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
    """Training and held-out text, packed for a model. Can be sent to worker processes."""

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
    rows: RowsFor,
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
        base: the model that the variants differ from, `vocab_size` set.
        variants: see `variant_configs`; the base itself always comes first. Variants equal to it are left out.
        config: of every training.
        rows: a function from a model's config to (packed rows, packed held-out rows), such as `SourceRows`: variants
            that change `sinks` or `context` need rows of their own. A row's sinks come on top of the base's text
            positions, so that every variant with a sink trains on the very same rows; the held-out loss leaves out
            documents' first tokens, so that it is over the same tokens for all.
        seeds: of weights and order; one training per variant and seed.
        folder: keeps each finished training, from which an interrupted call resumes; see `load_variant`.
        reuse: folder of an earlier call, perhaps with other variants; equal trainings in it are copied, unless a byte
            of them has changed.
        device: as in `train`.
        workers: trainings at a time, see `side_by_side`; default one per GPU, or per CPU thread of this process. The
            results do not depend on it.
        progress: called with a line for each finished training.

    Raises:
        ConfigError: a variant that cannot be built.
        TrainingError: a training or a worker that failed; the message says which.
    """
    folder, configs, packed = Path(folder), all_configs(base, config, variants), _Packed(rows, base.sinks)
    for name in dict.fromkeys(variants):
        if name not in configs:
            progress(f"variant {name} is what the base has already: left out")
    # All seeds of a variant follow each other, so that they share its compiled graph.
    tasks = [_Task(name, seed, *configs[name]) for name in configs for seed in seeds]
    for task in tasks:
        if reuse is not None and not task.finished(folder, packed) and task.finished(Path(reuse), packed):
            here, there = (variant_folder(parent, task.variant, task.seed) for parent in (folder, reuse))
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(there, here)
    runs = {task: task.finished(folder, packed) for task in tasks}
    waiting = [task for task, run in runs.items() if run is None]
    if len(waiting) < len(tasks):
        progress(f"{len(tasks) - len(waiting)} of {len(tasks)} trainings are done already")
    workers, begun = default_workers(device) if workers is None else workers, time.perf_counter()
    work = partial(_train, folder=folder, packed=packed, device=device)
    for done, (task, run) in enumerate(side_by_side(work, waiting, workers, device), start=1):
        runs[task] = run
        left = (time.perf_counter() - begun) / done * (len(waiting) - done)
        progress(
            f"{len(tasks) - len(waiting) + done}/{len(tasks)}: {task}: held-out loss {run.heldout_loss:.4f} after "
            f"{run.tokens:,} tokens" + (f"; about {duration(left)} left" if left else "")
        )
    return [VariantResult(name, tuple(runs[task] for task in tasks if task.variant == name)) for name in configs]


def time_variants(
    base: ModelConfig,
    variants: Sequence[str],
    config: TrainConfig,
    rows: RowsFor,
    rounds: int,
    *,
    file: str | Path,
    device: str | None = None,
) -> Timing:
    """Step times of the base and every variant, interleaved in this process (`timing.time_steps`).

    All have rows of the base's width, sinks included: a few more positions would not fit the blocks of GPU kernels.

    Args:
        file: keeps them, so that an interrupted notebook does not measure again.
        The rest as in `run_variants`.
    """
    configs, packed = all_configs(base, config, variants), _Packed(rows)
    inputs = sha256_json([rounds, {name: [asdict(part) for part in parts] for name, parts in configs.items()}])
    kept = read_note(Path(file)) or {}
    if kept.get("inputs") == inputs:
        return Timing(**kept["result"])
    timing = time_steps(configs, lambda model: packed(model)[0], rounds, device)
    write_note(Path(file), {"inputs": inputs, "result": asdict(timing)})
    return timing


def load_variant(folder: str | Path, name: str, seed: int) -> Decoder:
    """The final model of a training by `run_variants`, from the folder given to it.

    Raises CheckpointError if that variant was not trained from that seed.
    """
    return load_checkpoint(variant_folder(folder, name, seed))


def variant_folder(folder: str | Path, name: str, seed: int) -> Path:
    """The folder of one training of a variant: its checkpoint, metrics.jsonl and training.json."""
    stem = "".join(char if char.isalnum() or char in "._-" else "-" for char in name)
    return Path(folder) / f"{stem}-{seed}"


# One training -------------------------------------------------------------------------------------------------------


class _Packed:
    """Rows for each model, packed once per process; a copy for another process is sent without them.

    sinks: the base's. Rows of variants are longer or shorter by their difference in sinks, so that all hold the same
        text. None: each has rows of its own context.
    """

    def __init__(self, pack: RowsFor, sinks: int | None = None):
        self.pack, self.sinks = pack, sinks
        self.kept: dict[tuple[int, int], Packed] = {}

    def __call__(self, model: ModelConfig) -> Packed:
        more = 0 if self.sinks is None else model.sinks - self.sinks
        wide = replace(model, context=model.context + more)
        key = (wide.sinks, wide.context)
        if key not in self.kept:
            rows, heldout = self.pack(wide)
            if rows.width != wide.context:
                raise ConfigError(
                    f"a variant with sinks = {wide.sinks} needs rows of {wide.context} positions, not {rows.width}; "
                    "`rows` must pack them by the config it is given"
                )
            self.kept[key] = rows, heldout.without_openings()
        return self.kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kept": {}}


@dataclass(frozen=True)
class _Task:
    variant: str
    seed: int
    model: ModelConfig
    config: TrainConfig

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    def inputs(self, packed: _Packed) -> dict[str, str]:
        """Hash of what the training depends on; its seed is in its folder's name."""
        inputs = {
            "model": asdict(self.model),
            "train": asdict(self.config),
            "rows": [_digest(rows) for rows in packed(self.model)],
            "code": code_fingerprint(__name__),
            "torch": torch.__version__,
        }
        return {"inputs": sha256_json(inputs)}

    def finished(self, parent: Path, packed: _Packed) -> VariantRun | None:
        """The training's result, if it has finished from the same inputs and no byte of its files has changed."""
        folder = variant_folder(parent, self.variant, self.seed)
        if read_note(folder / INPUTS) != self.inputs(packed) or damaged(folder / RESULT):
            return None
        return self.run(TrainResult(**read_note(folder / RESULT)["result"]))

    def run(self, result: TrainResult) -> VariantRun:
        return VariantRun(
            variant=self.variant,
            seed=self.seed,
            heldout_loss=result.heldout_loss,
            parameters=result.parameters,
            tokens=result.tokens,
            d_ff=self.model.d_ff,
            curve={key: [point[key] for point in result.heldout] for key in ("tokens", "loss")},
            seconds=result.seconds,
        )


def _digest(rows: PackedRows) -> list[Any]:
    """Size and a hash of some of the rows, evenly spread."""
    some = rows.rows(np.linspace(0, len(rows) - 1, min(len(rows), 64)).astype(int))
    return [len(rows), rows.n_tokens, sha256_bytes(some.tokens_BT.numpy().tobytes())]


def _train(task: _Task, *, folder: Path, packed: _Packed, device: str | None) -> VariantRun:
    """One training, started or resumed."""
    own, inputs = variant_folder(folder, task.variant, task.seed), task.inputs(packed)
    if read_note(own / INPUTS) != inputs or (own / RESULT).exists():  # another's, or damaged
        shutil.rmtree(own, ignore_errors=True)
        write_note(own / INPUTS, inputs)
    _keep_graphs_of(task.model, task.config)
    model = Decoder(task.model)
    model.initialise(torch.Generator().manual_seed(task.seed))
    rows, heldout = packed(task.model)
    settings = {"heldout": heldout, "device": device, "progress": lambda message: None, "name": str(task)}
    return task.run(train(model, NextToken(), rows, task.config, own, seed=task.seed, **settings).result)


@lru_cache(maxsize=1)  # called again with the same variant it does nothing
def _keep_graphs_of(model: ModelConfig, config: TrainConfig) -> None:
    """Drop the compiled graphs of other variants, because torch compiles no more than eight; a variant's other seeds
    use its own again."""
    torch.compiler.reset()
