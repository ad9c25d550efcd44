"""Evaluation in bf16 on a GPU, where bf16 hardly changes the metrics of a sample of the items."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from basics.errors import EvaluationError
from threefold.evaluation.adapter import LanguageModel
from threefold.evaluation.results import Dataset, Evaluation
from threefold.model.device import fast_bf16

DEVICES = {"cuda"}  # types of device that may evaluate in bf16
LEAST, MOST, PART = 8, 64, 8  # items of the sample: an eighth of all, at least and at most
SHARE = 0.1  # of a metric's interval by which bf16 may change it


def evaluate(
    function: Callable[..., Evaluation], model: LanguageModel, data: Dataset, **arguments: Any
) -> tuple[Evaluation, dict[str, Any]]:
    """A protocol's evaluation of a model, and what its settings record of the precision (nothing on a CPU).

    On a GPU with bf16, evenly spread items are first evaluated in fp32 and in bf16. Where every metric with an interval
    differs by at most a tenth of the interval that all items would give (that of the sample, times the square root of
    the sample's share), all items are evaluated in bf16, else in fp32.
    """
    size = min(MOST, len(data.items) // PART)
    if model.device.type not in DEVICES or not fast_bf16(model.device) or model.backend.dtype != torch.float32:
        return function(model, data, **arguments), {}
    in_bf16 = {key: value.in_bf16 for key, value in arguments.items() if isinstance(value, LanguageModel)}
    check: dict[str, Any] = {"items": size}
    if size >= LEAST:
        spread = np.linspace(0, len(data.items) - 1, size).round().astype(int)
        sample = replace(data, items=[data.items[index] for index in spread])
        try:
            exact = function(model, sample, **arguments)
            rough = function(model.in_bf16, sample, **{**arguments, **in_bf16})
            check["metrics"] = differences(exact, rough, size / len(data.items))
        except EvaluationError as error:  # items too long for a sample, or logits that are not finite in bf16
            check["error"] = str(error)
    if "metrics" in check and all(one["difference"] <= one["allowed"] for one in check["metrics"].values()):
        model, arguments = model.in_bf16, {**arguments, **in_bf16}
    return function(model, data, **arguments), {"precision": model.facts["precision"], "precision_check": check}


def differences(exact: Evaluation, rough: Evaluation, share: float) -> dict[str, dict[str, float]]:
    """For each metric with an interval, the difference of two evaluations of a sample and the largest one allowed.

    share: of all items that are in the sample.
    """
    return {
        name: {
            "difference": abs(rough.metrics[name]["value"] - metric["value"]),
            "allowed": SHARE * math.sqrt(share) * (metric["high"] - metric["low"]),
        }
        for name, metric in exact.metrics.items()
        if metric["low"] is not None
    }
