"""Training: one loop, three objectives, two optimizers; `stages` holds what the notebooks call."""

from threefold.training.card import write_card
from threefold.training.loop import TrainResult, held_out_loss, reference_logprobs, train
from threefold.training.objectives import Distillation, Loss, NextToken, Objective, Preference
from threefold.training.stages import Inputs, Trained, distil, dpo, half_depth, prepare, pretrain, sft, train_stage
from threefold.training.state import curve, read_metrics
from threefold.training.timing import KernelTiming, Timing, time_kernels
from threefold.training.variants import (
    PresetRows,
    VariantResult,
    VariantRun,
    load_variant,
    run_variants,
    time_variants,
    variant_configs,
)

__all__ = [
    "Distillation",
    "Inputs",
    "KernelTiming",
    "Loss",
    "NextToken",
    "Objective",
    "Preference",
    "PresetRows",
    "Timing",
    "TrainResult",
    "Trained",
    "VariantResult",
    "VariantRun",
    "curve",
    "distil",
    "dpo",
    "half_depth",
    "held_out_loss",
    "load_variant",
    "prepare",
    "pretrain",
    "read_metrics",
    "reference_logprobs",
    "run_variants",
    "sft",
    "time_kernels",
    "time_variants",
    "train",
    "train_stage",
    "variant_configs",
    "write_card",
]
