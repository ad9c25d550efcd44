"""Training: one loop, three objectives, two optimizers."""

from threefold.training.forward import held_out_loss
from threefold.training.loop import Trained, train
from threefold.training.monitor import TrainResult
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
from threefold.training.timing import time_kernels
from threefold.training.variants import SourceRows, load_variant, run_variants, time_variants

__all__ = [
    "Distillation",
    "Loss",
    "NextToken",
    "Objective",
    "Preference",
    "SourceRows",
    "TrainResult",
    "Trained",
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
]
