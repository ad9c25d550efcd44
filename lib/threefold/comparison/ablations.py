"""Effects of single components: a variant against the base, seed by seed."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from threefold.comparison.load import Comparison

BASE = "base"


@dataclass(frozen=True)
class Effect:
    """Relative change that the component brings: the base (with it) against the variant (with GPT-2's counterpart).

    change, low, high: e.g. -0.03 is 3% less perplexity. low and high are None with fewer than two seeds.
    """

    variant: str
    quantity: str
    change: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def basis(self) -> str:
        """What the effect rests on: "3 seeds"; a single value is a single seed or timing."""
        if self.seeds > 1:
            return f"{self.seeds} seeds"
        return "one timing" if self.quantity == "tokens_per_second" else "1 seed"


def found(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Variant -> values of its record. The variant is the override it stands for ("norm=layer") or "base"."""
    result = {}
    for name, record in comparison.records.items():
        if name.startswith("ablation/"):
            result[str(record.values.get("variant", name.partition("/")[2]))] = record.values
    return result


def effect(comparison: Comparison, variant: str, quantity: str) -> Effect | None:
    """What the base gains over a variant in `heldout_loss` (as perplexity) or `tokens_per_second`.

    Both records hold one value a seed under that name, in the same order of seeds; a single number is one seed. Pairs
    of logarithms give a Student interval of their mean difference.
    """
    variants = found(comparison)
    if BASE not in variants or variant not in variants:
        return None
    series = []
    for values in (variants[BASE], variants[variant]):
        raw = values.get(quantity)
        if raw is None:
            return None
        series.append(np.atleast_1d(np.asarray(raw, float)))
    n = min(len(one) for one in series)
    if n == 0:
        return None
    base, other = (one[:n] for one in series)
    logs = base - other if quantity == "heldout_loss" else np.log(base) - np.log(other)
    mean = float(logs.mean())
    if n < 2:
        return Effect(variant, quantity, math.expm1(mean), None, None, n)
    half = float(stats.t.ppf(0.975, n - 1) * logs.std(ddof=1) / math.sqrt(n))
    return Effect(variant, quantity, math.expm1(mean), math.expm1(mean - half), math.expm1(mean + half), n)
