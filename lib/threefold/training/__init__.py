"""Training: one loop, three objectives, two optimizers."""

from threefold.training.loop import Trained, TrainResult, train
from threefold.training.objectives import (
    Distillation,
    Loss,
    NextToken,
    Objective,
    Preference,
    half_depth,
    reference_logprobs,
)
from threefold.training.state import curve, read_metrics
from threefold.training.step import held_out_loss
from threefold.training.timing import KernelTiming, Timing, time_kernels
from threefold.training.variants import (
    SourceRows,
    VariantResult,
    VariantRun,
    load_variant,
    run_variants,
    time_variants,
    variant_configs,
)

__all__ = [
    "Distillation",
    "KernelTiming",
    "Loss",
    "NextToken",
    "Objective",
    "Preference",
    "SourceRows",
    "Timing",
    "TrainResult",
    "Trained",
    "VariantResult",
    "VariantRun",
    "curve",
    "half_depth",
    "held_out_loss",
    "load_variant",
    "read_metrics",
    "reference_logprobs",
    "run_variants",
    "time_kernels",
    "time_variants",
    "train",
    "variant_configs",
]
