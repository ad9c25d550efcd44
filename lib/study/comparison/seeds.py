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

from study.comparison.differences import ALPHA, Difference, adjust
from study.comparison.load import Comparison, Value
from study.comparison.measures import HEADLINE, STAGED, Measure
from study.preset import LINEAGE
from threefold.evaluation import statistics

METHOD = "Student's t over seeds"
OVER_SEEDS, OVER_ITEMS, UNRESOLVED = "over seeds", "over items", "not resolved"


@dataclass(frozen=True)
class Spread:
    """One measure of one stage over the training seeds, in the measure's own unit."""

    measure: Measure
    stage: str
    values: tuple[float, ...]  # one a seed, the first training's first
    first: Value
    mean: float
    deviation: statistics.Interval  # standard deviation over seeds
    error: float | None  # standard error over items, of the first training
    p: float = 1.0  # that both spreads are one
    adjusted: float = 1.0  # Holm's, over all spreads

    @property
    def larger(self) -> str:
        """Which spread is the larger one, where the interval and the adjusted p-value tell."""
        low, high = self.deviation.low, self.deviation.high
        if low is not None and self.error and self.adjusted < ALPHA:
            if low > self.error:
                return OVER_SEEDS
            if high < self.error:
                return OVER_ITEMS
        return UNRESOLVED

    def as_record(self) -> dict[str, Any]:
        """As JSON for a record."""
        return {
            "measure": self.measure.key,
            "stage": self.stage,
            "values": list(self.values),
            "mean": self.mean,
            "deviation": self.deviation.value,
            "deviation_low": self.deviation.low,
            "deviation_high": self.deviation.high,
            "error_over_items": self.error,
            "p": self.p,
            "p_adjusted": self.adjusted,
            "larger": self.larger,
        }


def trainings(comparison: Comparison) -> list[Comparison]:
    """The first training and its replicates, in the order of their seeds."""
    return [comparison, *comparison.replicates.values()]


def seeds(comparison: Comparison) -> list[int]:
    """The seed each training of the lineage began from, as its first stage's fingerprint says; where none does, no
    seed is named."""
    stages = [next((facts for name in LINEAGE if (facts := one.stage(name))), {}) for one in trainings(comparison)]
    found = [(facts.get("fingerprint") or {}).get("seed") for facts in stages]
    return [seed for seed in found if isinstance(seed, int)]


def basis(comparison: Comparison) -> str:
    """How many trainings a figure of one stage rests on, for a sentence that states what the stage did."""
    count = len(trainings(comparison))
    return "one training seed" if count == 1 else f"the first of {count} training seeds"


def spreads(comparison: Comparison) -> list[Spread]:
    """Every headline measure of every stage that two trainings or more were measured by, adjusted together."""
    found = []
    for measure in HEADLINE:
        for stage in LINEAGE:
            values = _values(comparison, measure, stage)
            if len(values) < 2:
                continue
            numbers = tuple(value.value for value in values)
            first, deviation = values[0], statistics.deviation(numbers)
            bounded = first.low is not None and first.high is not None
            error = statistics.standard_error(first.low, first.high) if bounded else None
            known = error and deviation.low is not None
            p = statistics.deviation_p(deviation.value, len(numbers), error) if known else 1.0
            found.append(Spread(measure, stage, numbers, first, sum(numbers) / len(numbers), deviation, error, p))
    adjusted = statistics.holm([one.p for one in found]) if found else []
    return [replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def changes(comparison: Comparison) -> list[tuple[Difference, tuple[float, ...]]]:
    """Each stage's change from the one before over the seeds (n is their number), with each seed's own change.

    In the measure's unit of change; perplexities are compared as logarithms. Adjusted together.
    """
    found, single = [], []
    for measure in STAGED:
        for a, b in pairwise(LINEAGE):
            pairs = [
                (_logged(measure, before.value), _logged(measure, after.value))
                for before, after in zip(_values(comparison, measure, a), _values(comparison, measure, b), strict=False)
            ]
            if len(pairs) < 2:
                continue
            test = statistics.paired_student(*zip(*pairs, strict=True))
            back = math.expm1 if measure.kind == "perplexity" else float
            bounds = [None if x is None else back(x) for x in (test.low, test.high)]
            found.append(Difference(measure, a, b, back(test.difference), *bounds, test.p, test.n, METHOD))
            single.append(tuple(back(after - before) for before, after in pairs))
    return [(one, each) for one, each in zip(adjust(found), single, strict=True) if one is not None]


def _values(comparison: Comparison, measure: Measure, stage: str) -> list[Value]:
    """The measure's value of every training, in order; empty unless all of them have it under the same protocol."""
    protocol = measure.protocol(comparison)
    found = [one.metric(stage, protocol, measure.metric) if protocol else None for one in trainings(comparison)]
    return [] if None in found else found


def _logged(measure: Measure, value: float) -> float:
    return math.log(value) if measure.kind == "perplexity" else value
