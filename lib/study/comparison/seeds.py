"""What another training seed changes: the same stages trained again, measured on the same items.

The first training and its replicates answer the same items with the same demonstrations, so what their figures differ
by is the seed of training (initial weights, order of the rows), and the sampling of items is not in it. The standard
error over items is that of the first training's interval. Of k seeds the standard deviation (k - 1) carries the exact
chi-square interval of normal values, a change from one stage to the next Student's interval over the k changes; with
k = 3 both are wide, and say so.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from study.comparison.differences import ALPHA, Difference, adjust, described
from study.comparison.load import Comparison
from study.comparison.measures import HEADLINE, MEASURES, PRIMARY, SHARED, STAGED, Measure
from study.comparison.results import bounds
from study.preset import LINEAGE, REPLICATED
from threefold.evaluation import statistics

METHOD = "Student's t over seeds"
OVER_SEEDS, OVER_ITEMS, UNRESOLVED = "over seeds", "over items", "not resolved"


@dataclass(frozen=True)
class Spread:
    """One measure of one stage over the training seeds, in the measure's own unit."""

    measure: Measure
    stage: str
    values: tuple[float, ...]  # one a seed, the first training's first
    first: Any  # the first training's row of the long table
    mean: float
    deviation: statistics.Interval  # standard deviation over seeds
    error_over_items: float | None  # standard error over items, of the first training
    p: float = 1.0  # that both spreads are one
    p_adjusted: float = 1.0  # Holm's, over all spreads

    @property
    def larger(self) -> str:
        """Which spread is the larger one, where the interval and the adjusted p-value agree on it."""
        _, low, high, _ = self.deviation
        if low is None or not self.error_over_items or self.p_adjusted >= ALPHA:
            return UNRESOLVED
        return OVER_SEEDS if low > self.error_over_items else OVER_ITEMS if high < self.error_over_items else UNRESOLVED

    def as_record(self) -> dict[str, Any]:
        """As JSON for a record."""
        own = ("stage", "values", "mean", "error_over_items", "p", "p_adjusted", "larger")
        deviation = dict(zip(("deviation", "deviation_low", "deviation_high"), self.deviation, strict=False))
        return {"measure": self.measure.key} | {name: getattr(self, name) for name in own} | deviation


def seeds(comparison: Comparison) -> list[int]:
    """The seed each training of the lineage began from, as its first stage's fingerprint says; where none does, no
    seed is named."""
    every = comparison.trainings.values()
    stages = [next((facts for name in LINEAGE if (facts := one.stage(name))), {}) for one in every]
    found = [(facts.get("fingerprint") or {}).get("seed") for facts in stages]
    return [seed for seed in found if isinstance(seed, int)]


def basis(comparison: Comparison) -> str:
    """How many trainings a figure of one stage rests on, for a sentence that states what the stage did."""
    count = len(comparison.trainings)
    return "one training seed" if count == 1 else f"the first of {count} training seeds"


def spreads(comparison: Comparison) -> list[Spread]:
    """Every headline measure of every model that two trainings or more were measured by, adjusted together."""
    found = []
    for measure in map(MEASURES.get, HEADLINE):
        for stage in REPLICATED:
            values = _values(comparison, measure, stage)
            if len(values) < 2:
                continue
            first, deviation = comparison.value(measure.key, stage), statistics.deviation(values)
            error = None if first.low is None else statistics.standard_error(first.low, first.high)
            known = error and deviation.low is not None
            p = statistics.deviation_p(deviation.value, len(values), error) if known else 1.0
            mean = sum(values) / len(values)
            found.append(Spread(measure, stage, tuple(values), first, mean, deviation, error, p))
    adjusted = statistics.holm([one.p for one in found])
    return [replace(one, p_adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def changes(comparison: Comparison) -> list[tuple[Difference, tuple[float, ...]]]:
    """Each stage's change from the one before, and that from GPT-2's rows to our pretraining, over the seeds (n is
    their number), with each seed's own change.

    In the measure's unit of change; perplexities are compared as logarithms. Changes of primary measures are adjusted
    together, and so are all others.
    """
    found, single = [], []
    pairs = [(key, a, b) for key in STAGED for a, b in pairwise(LINEAGE)]
    pairs += [(key, baseline, "pretrain") for key in SHARED for baseline in REPLICATED[len(LINEAGE) :]]
    for key, a, b in pairs:
        measure = MEASURES[key]
        relative = measure.unit == "perplexity"
        back = math.expm1 if relative else float
        series = [_values(comparison, measure, stage) for stage in (a, b)]
        before, after = ([math.log(value) for value in values] if relative else values for values in series)
        if min(len(before), len(after)) < 2:
            continue
        test = statistics.paired_student(before, after)
        low, high = bounds(back, test.low, test.high)
        about = described(comparison, key, a, b)
        found.append(Difference(measure, a, b, back(test.difference), low, high, test.p, test.n, METHOD, **about))
        single.append(tuple(back(y - x) for x, y in zip(before, after, strict=True)))
    primary = [one.measure.key in PRIMARY["baseline" if one.b == "pretrain" else one.b] for one in found]
    families = [[one if of == kind else None for one, of in zip(found, primary, strict=True)] for kind in (True, False)]
    adjusted = [one or other for one, other in zip(*map(adjust, families), strict=True)]
    return list(zip(adjusted, single, strict=True))


def _values(comparison: Comparison, measure: Measure, stage: str) -> list[float]:
    """The measure's value of every training, in order; empty unless all of them have it under the same protocol."""
    found = [comparison.value(measure.key, stage, replicate) for replicate in comparison.trainings]
    return [] if None in found else [row.value for row in found]
