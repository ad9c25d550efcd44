"""Stages that train: their inputs from the run, and their training in this process or in several.

`prepare` and `train_stage` are what a stage's notebook calls, and what each worker of `threefold train` calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from basics.files import read_note
from papertrail import provenance
from papertrail.run import read_run_file
from study import launch
from study.chat import forms
from study.preset import measured_on, scored_on
from study.run import CHOICE, Stage
from threefold.config import ModelConfig, TrainConfig, gpt2_counterpart
from threefold.data import corpus, exclusion
from threefold.data.packing import PackedRows, PairedRows
from threefold.data.tokenizer import load_tokenizer, set_chat_template, with_sinks
from threefold.graphics import Graphics
from threefold.model.decoder import Decoder
from threefold.model.hf import load_checkpoint
from threefold.training import distributed
from threefold.training.loop import RESULT, Trained, train
from threefold.training.monitor import Progress, TrainResult
from threefold.training.objectives import Distillation, NextToken, Objective, Preference, half_depth

RATES = ("learning_rate", "muon_learning_rate")  # keys of TrainConfig that trials choose


@dataclass(frozen=True)
class Inputs:
    """What a stage trains, from its parents and its data. Its learning rates are in `stage.config`."""

    model: Decoder  # trained in place
    objective: Objective
    tokenizer: Any
    rows: PackedRows | PairedRows
    heldout: PackedRows | PairedRows
    replay: PackedRows | None = None  # sft: pretraining text that is mixed in
    inherited: int | None = 0  # tokens that the weights it begins with were trained on
    chosen: Mapping[str, Any] | None = None  # the trials' choice of its learning rates; None: the preset's

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def train(self, config: TrainConfig, folder: Path, **options: Any) -> Trained:
        """Train the model in a folder. options: seed, progress, name and notes, as in `threefold.training.train`."""
        return train(
            self.model,
            self.objective,
            self.rows,
            config,
            folder,
            tokenizer=self.tokenizer,
            heldout=self.heldout,
            replay=self.replay,
            **options,
        )


def prepare(stage: Stage) -> Inputs:
    """The inputs of a stage that trains (TRAINED), of a replicate of one, or of the trials before one.

    With trials before it, `stage.config` gets the learning rates that they chose.
    Raises MissingInput where a parent is not finished; SourceError or DataError.
    """
    kind, data, data_dir, inherited = stage.model, stage.preset.data, stage.run.data_dir, 0
    chosen = tuned(stage)
    exclude = exclusion.Exclusion(stage.preset.overlap, measured_on(stage.preset), data_dir)
    # Learning rates are not chosen by what evaluations score, unless the preset uses a part for both.
    heldout_exclude = None
    if stage.preset.tuning.multipliers:
        used = (*data.pretrain_heldout, *data.sft_heldout, *data.dpo_heldout)
        sets = {name: source for name, source in scored_on(stage.preset).items() if source not in used}
        heldout_exclude = exclusion.Exclusion(stage.preset.overlap, sets, data_dir)
    objective: Objective = NextToken()
    if kind in ("sft", "dpo"):
        folder = stage.require("pretrain" if kind == "sft" else "sft")
        model, tokenizer, inherited = load_checkpoint(folder), load_tokenizer(folder), seen(folder)
    else:
        tokenizer = load_tokenizer(stage.require("data") / "tokenizer")
        config = replace(stage.preset.model, vocab_size=len(tokenizer))
        if kind != "pretrain":  # GPT-2's parts have no sink: its tokenizer puts nothing before a sequence
            config, tokenizer = gpt2_counterpart(config), with_sinks(tokenizer, 0)
        if kind == "distilgpt2":
            folder = stage.require("gpt2")
            teacher, inherited = load_checkpoint(folder), seen(folder)
            teacher.config = config  # with the settings that a GPT-2 checkpoint has no place for
            model = half_depth(teacher)
            objective = Distillation(teacher, stage.config.distill_temperature, stage.config.distill_weight)
        else:
            model = Decoder(config)
            model.initialise(torch.Generator().manual_seed(stage.seed))
    config, replay = model.config, None
    if (form := forms(stage.preset, kind)[0]) != "text":  # saved with the checkpoint
        set_chat_template(tokenizer, form)
    if kind == "dpo":
        objective = Preference(stage.config.beta)
        rows = corpus.preference_rows(data.dpo, tokenizer, config, data_dir, exclude)
        heldout = corpus.preference_rows(data.dpo_heldout, tokenizer, config, data_dir, heldout_exclude)
    elif kind == "sft":
        rows = corpus.example_rows(data.sft, tokenizer, config, data_dir, exclude)
        heldout = corpus.example_rows(data.sft_heldout, tokenizer, config, data_dir, heldout_exclude)
        if stage.config.replay > 0 and len(data.pretrain) > 0:
            replay = corpus.pretraining_rows(data.pretrain, tokenizer, config, data_dir, exclude)
    else:
        rows = corpus.pretraining_rows(data.pretrain, tokenizer, config, data_dir, exclude)
        heldout = corpus.pretraining_rows(data.pretrain_heldout, tokenizer, config, data_dir, heldout_exclude)
    return Inputs(model, objective, tokenizer, rows, heldout, replay, inherited, chosen)


def tuned(stage: Stage) -> dict[str, Any] | None:
    """Give a stage the learning rates that its trials chose, and return their choice; None where there are no trials.
    A replicate takes those of the first seed. Raises MissingInput."""
    if not stage.preset.tuning.multipliers or stage.name.startswith("tune-"):
        return None
    chosen = read_note(stage.require(f"tune-{stage.model}") / CHOICE)
    stage.config = replace(stage.config, **{key: chosen[key] for key in RATES})
    return chosen


def seen(folder: Path) -> int | None:
    """How many tokens a finished training's weights were trained on, those of the weights it began with included; None
    where its record does not say."""
    facts = read_run_file(folder)
    before = facts.get("recipe", {}).get("tokens_inherited")
    return None if before is None else facts["tokens"] + before


def recipe(stage: Stage, inputs: Inputs, result: TrainResult) -> dict[str, Any]:
    """How a stage was trained, for its record: what two trainings are compared by.

    {"optimizer", "learning_rate", "muon_learning_rate" (None without Muon), "weight_decay", "schedule", "rates"
    ("preset" or "trials"), "tuning" (the trials' choice or None), "batch_rows", "steps", "parameters", "tokens",
    "tokens_inherited", "rows" and "row_tokens" (of one pass over the text), "seed", "data"}
    """
    config, data = stage.config, stage.preset.data
    muon = config.optimizer == "muon"
    used = {"sft": data.sft, "dpo": data.dpo}.get(stage.model, data.pretrain)
    return {
        **{key: getattr(config, key) for key in ("optimizer", "learning_rate", "weight_decay", "schedule")},
        "muon_learning_rate": config.muon_learning_rate if muon else None,
        "rates": "trials" if inputs.chosen else "preset",
        "tuning": inputs.chosen,
        "batch_rows": config.batch_size * config.accumulate,
        **{key: getattr(result, key) for key in ("steps", "parameters", "tokens")},
        "tokens_inherited": inputs.inherited,
        "rows": len(inputs.rows),
        "row_tokens": inputs.rows.n_tokens,
        "seed": stage.seed,
        "data": [source.source or Path(source.path).name for source in used],
    }


def train_stage(stage: Stage, inputs: Inputs, folder: Path, progress: Progress | None = None) -> Trained:
    """Train a stage in its folder: in this process, with the workers it has joined, or in `stage.nproc` workers that
    are started for it and whose progress is passed on. Default: one per GPU where there are several, as many of them
    as can share its batch evenly.

    Raises ConfigError for a GPU that torch cannot use, and what `threefold.training.train` does; for started workers
    TrainingError that names the one that failed.
    """
    Graphics.read().check()  # torch that does not see it would train on the CPU
    rows = stage.config.batch_size * stage.config.accumulate
    gpus = max(1, torch.cuda.device_count())
    nproc = stage.nproc or next(n for n in range(gpus, 0, -1) if rows % n == 0)
    workers = distributed.current()
    if workers.first and not (folder / RESULT).exists():
        stage.count_workers(nproc if workers.size == 1 else workers.size)
        if nproc > 1 and workers.size == 1:
            launch.launch(stage, nproc, progress or print)  # leaves the finished training that is loaded below

    def notes() -> dict[str, Any]:
        return {"determinism": provenance.determinism(read_run_file(folder) or {"workers": [workers.size]})}

    trained = inputs.train(stage.config, folder, seed=stage.seed, progress=progress, name=stage.name, notes=notes)
    if workers.first:
        stage.determinism = trained.notes["determinism"]  # of the process that trained, which need not be this one
    return trained
