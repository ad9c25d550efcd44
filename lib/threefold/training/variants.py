"""Variants of one model, trained alike: what each architectural choice is worth at equal steps, rows and parameters."""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from threefold.config import ModelConfig, Preset, TrainConfig, ablated
from threefold.data.packing import Batch, PackedRows
from threefold.errors import ConfigError
from threefold.model.decoder import Decoder, parameter_counts
from threefold.model.hf import load_checkpoint, save_checkpoint
from threefold.provenance import atomic_write, sha256_json
from threefold.training import optimizers as optim
from threefold.training.loop import Progress, clear_state, train
from threefold.training.numerics import Numerics, choose
from threefold.training.objectives import NextToken, Work

BASE = "base"
TIMED_STEPS = 10  # of each variant, one after the other in turn, so that a slow minute of the machine hits all alike


@dataclass(frozen=True)
class VariantRun:
    """One variant trained from one seed."""

    variant: str  # "base", or what was changed: "norm=layer"
    seed: int
    heldout_loss: float  # nats a token after the last step
    parameters: int
    tokens: int
    d_ff: int  # the gelu variants' is 3/2 of the base's


@dataclass(frozen=True)
class VariantResult:
    """One variant over all seeds."""

    variant: str
    runs: tuple[VariantRun, ...]
    step_seconds: float  # median of a step, timed in turn with the other variants

    @property
    def heldout_loss(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(run.heldout_loss for run in self.runs)

    @property
    def parameters(self) -> int:
        return self.runs[0].parameters


Packed = tuple[PackedRows, PackedRows]  # training rows, held-out rows


def variant_config(base: ModelConfig, variant: str) -> ModelConfig:
    """The base with a variant's changes ("norm=layer", "norm=layer,bias=true"), at equal parameters.

    GELU's feed-forward has two matrices where SwiGLU's has three: a change from one to the other that leaves `d_ff`
    alone scales it by 3/2 or 2/3.

    Raises ConfigError for an unknown key or an impossible value.
    """
    if variant == BASE:
        return base
    changed = ablated(Preset(name="variant", model=base), variant).model
    if changed.ffn != base.ffn and changed.d_ff == base.d_ff:
        scaled = base.d_ff * 3 / 2 if changed.ffn == "gelu" else base.d_ff * 2 / 3
        changed = replace(changed, d_ff=round(scaled))
    return changed


def run_variants(
    base: ModelConfig,
    variants: Sequence[str],
    config: TrainConfig,
    rows: PackedRows | Callable[[ModelConfig], Packed],
    heldout: PackedRows | None = None,
    seeds: Sequence[int] = (0,),
    *,
    folder: str | Path,
    device: str | None = None,
    progress: Progress | None = None,
) -> list[VariantResult]:
    """Train the base and every variant from each seed, on the same rows in the same order.

    Args:
        base: the model the variants differ from, `vocab_size` set.
        variants: see `variant_config`; the base itself always comes first.
        config: of every training.
        rows, heldout: packed rows. Variants that change `sinks` or `context` need rows of their own: give a function
            from a model's config to (rows, heldout rows) instead.
        seeds: of weights and order; one training of each variant a seed.
        folder: keeps each finished training and the step times, so that an interrupted call goes on.
        device, progress: as in `loop.train`.

    Raises:
        ConfigError: a variant that cannot be built or needs rows of its own.
    """
    folder, names = Path(folder), [BASE, *dict.fromkeys(v for v in variants if v != BASE)]
    configs = {name: variant_config(base, name) for name in names}
    if not callable(rows):
        if heldout is None:
            raise ConfigError("the variants need held-out rows to be compared on")
        for name, changed in configs.items():
            if (changed.sinks, changed.context) != (base.sinks, base.context):
                raise ConfigError(f"variant {name} packs its rows otherwise; give a function that packs them by config")
    packed: dict[tuple[int, int], Packed] = {}

    def rows_of(model: ModelConfig) -> Packed:
        key = (model.sinks, model.context)
        if key not in packed:
            packed[key] = rows(model) if callable(rows) else (rows, heldout)
        return packed[key]

    runs: dict[str, list[VariantRun]] = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            runs[name].append(_run(name, configs[name], config, rows_of, seed, folder, device, progress))
    seconds = _step_seconds(configs, config, rows_of, folder, device)
    return [VariantResult(name, tuple(runs[name]), seconds[name]) for name in names]


def load_variant(folder: str | Path, name: str, seed: int) -> Decoder:
    """The model a finished training of `run_variants` ended with, from the folder given to it.

    Raises CheckpointError where that variant was not trained from that seed.
    """
    return load_checkpoint(variant_folder(folder, name, seed))


def variant_folder(folder: str | Path, name: str, seed: int) -> Path:
    """Where one training of a variant lies: its checkpoint, metrics.jsonl and result.json."""
    return Path(folder) / f"{_stem(name)}-{seed}"


def _run(
    name: str,
    model_config: ModelConfig,
    config: TrainConfig,
    rows_of: Callable[[ModelConfig], Packed],
    seed: int,
    folder: Path,
    device: str | None,
    progress: Progress | None,
) -> VariantRun:
    """One training, or what is known of it from before."""
    rows, heldout = rows_of(model_config)
    asked = {
        "model": asdict(model_config),
        "train": asdict(config),
        "rows": [len(rows), rows.n_tokens, len(heldout), heldout.n_tokens],
    }
    work = variant_folder(folder, name, seed)
    known = _cached(work / "result.json", asked)
    if known is not None:
        return VariantRun(**known)
    if _cached(work / "begun.json", asked) is None:  # what lies there is of another training
        shutil.rmtree(work, ignore_errors=True)
        _keep(work / "begun.json", asked, {})
    model = Decoder(model_config)
    model.initialise(torch.Generator().manual_seed(seed))
    if progress is not None:
        progress(f"{name}, seed {seed}: {sum(p.numel() for p in model.parameters()):,} parameters")
    result = train(
        model,
        NextToken(),
        rows,
        config,
        folder=work,
        seed=seed,
        heldout=heldout,
        device=device,
        progress=_quiet,
        name=f"variant {name}",
    )
    save_checkpoint(work, model)
    clear_state(work)
    run = VariantRun(
        name, seed, result.heldout_loss, parameter_counts(model)["total"], result.tokens, model_config.d_ff
    )
    _keep(work / "result.json", asked, asdict(run))
    return run


def _step_seconds(
    configs: dict[str, ModelConfig],
    config: TrainConfig,
    rows_of: Callable[[ModelConfig], Packed],
    folder: Path,
    device: str | None,
) -> dict[str, float]:
    """The median time of a full step of each variant. They step in turn and so share the machine's moods."""
    asked = {"models": {name: asdict(model) for name, model in configs.items()}, "train": asdict(config)}
    known = _cached(folder / "step_seconds.json", asked)
    if known is not None:
        return known
    numerics = choose(replace(config, compile="off"), 0, 0, device)
    steppers = {name: _Stepper(model, config, rows_of(model)[0], numerics) for name, model in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(TIMED_STEPS + 1):
        for name, stepper in steppers.items():
            taken = stepper.step()
            if turn:  # the first one allocates
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    _keep(folder / "step_seconds.json", asked, medians)
    return medians


class _Stepper:
    """A model that takes timed training steps on one batch."""

    def __init__(self, model_config: ModelConfig, config: TrainConfig, rows: PackedRows, numerics: Numerics):
        self.numerics = numerics
        self.model = Decoder(model_config).to(numerics.device)
        self.optimizers = optim.build(self.model, config)
        batch: Batch = next(rows.batches(config.batch_size, seed=0, steps=1))
        self.work = Work.of(batch).to(numerics.device)

    def step(self) -> float:
        started = self._now()
        with self.numerics.autocast():
            loss = NextToken()(self.model, self.work)
        (loss.sum / loss.weight).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self._now() - started

    def _now(self) -> float:
        if self.numerics.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _stem(name: str) -> str:
    """A variant's name as a folder's."""
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in name)


def _cached(path: Path, asked: dict) -> dict | None:
    """What is kept there, if it was made from the same inputs."""
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return kept["result"] if kept["inputs"] == sha256_json(asked) else None


def _keep(path: Path, asked: dict, result: dict) -> None:
    atomic_write(path, json.dumps({"inputs": sha256_json(asked), "result": result}, indent=2) + "\n")


def _quiet(message: str) -> None:
    """Takes the messages of one variant's training, of which there would be too many."""
