"""Differences between two models on the same items, and the words they allow.

Right/wrong on single items: McNemar's exact test with Bonett and Price's interval; where there are ties, which count
half, the p-value is that of the exact sign test. Everything else: the paired
bootstrap over documents or items beside Student's t of the clustered standard error, the wider interval of the two,
because a percentile bootstrap over a handful of documents rejects far too often. Its p-value holds for skewed documents
(`statistics.mean_p`). All p-values of a report are adjusted together (Holm, `compared`), so that the chance of *any*
false sentence is at most 5%. A difference is claimed only when
its adjusted p is below 0.05 *and* its interval leaves out zero. Two models are called equivalent only when the whole
95% interval lies within the measure's stated margin: two one-sided tests at 2.5% each (Schuirmann 1987; Lakens 2017
customarily takes the 90% interval, 5% each; the stricter one is the interval that is printed). Models whose results are
the same on every unit, and anything else, are "no detectable difference".
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from study.comparison import models
from study.comparison.load import Comparison
from study.comparison.measures import KEYS, MEASURES, SHARED, STAGED, Measure
from study.comparison.results import NBSP, probability
from threefold.evaluation import statistics

ALPHA = 0.05
POWER = 0.8
BETTER, WORSE, EQUIVALENT, UNRESOLVED = "better", "worse", "equivalent", "no detectable difference"
STAGES, SINCE = "stages", "since-pretraining"  # families beside those of the baselines


@dataclass(frozen=True)
class Difference:
    """`b` minus `a` on one measure, over the same items.

    change, low, high: in the measure's unit of change: relative for perplexity (0.1 is +10%), absolute otherwise.
    """

    measure: Measure
    a: str
    b: str
    change: float
    low: float | None
    high: float | None
    p: float
    n: int
    method: str
    discordant: float | None = None  # share of items that exactly one of the two has right
    adjusted: float | None = None  # Holm's, over the report
    family: int = 1  # comparisons adjusted together
    error: float | None = None  # standard error, before the unit of change, where the method has one
    identical: bool = False  # the same result on every single unit
    names: tuple[str, str] = ("", "")  # of a and b, for a reader
    rows: tuple[Any, Any] = (None, None)  # of the long table, the values of a and b
    question: str = ""  # which of the report's questions it answers: STAGES, SINCE or a baseline

    @property
    def leaves_out_zero(self) -> bool:
        """Whether there is an interval and it lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def detected(self) -> bool:
        """Whether a difference may be claimed at all."""
        return self.leaves_out_zero and (self.p if self.adjusted is None else self.adjusted) < ALPHA

    @property
    def verdict(self) -> str:
        """What b is against a: better, worse, equivalent (the whole interval lies within the measure's margin) or no
        detectable difference."""
        if self.detected:
            return BETTER if (self.change > 0) == (self.measure.better == "higher") else WORSE
        if self.low is None or self.high is None or self.identical:
            return UNRESOLVED
        return EQUIVALENT if max(abs(self.low), abs(self.high)) <= self.measure.margin else UNRESOLVED

    @property
    def text(self) -> str:
        """The change with its interval: "+3.1 pp [+0.4, +5.8]", "−12.0% [−13.1, −10.8]"."""
        return self.measure.change_text(self.change, self.low, self.high)

    @property
    def pair(self) -> str:
        """What was subtracted from what, in short names: "SFT − pretrain"."""
        return " − ".join(map(models.short, reversed(self.names)))

    @property
    def p_text(self) -> str:
        return probability(self.p if self.adjusted is None else self.adjusted)

    @property
    def detectable(self) -> float | None:
        """Minimum detectable effect: the smallest true difference that a single test at 5% over as many units finds
        with 80% power, in the unit of change.

        Right or wrong on single items: the exact test's own power at the discordance seen. The rest: that of Student's
        test at the standard error seen. None where one unit, or no spread at all, leaves nothing to reckon with.
        """
        if self.discordant is not None:
            return statistics.detectable_difference(self.n, self.discordant, power=POWER, alpha=ALPHA)
        if not self.error:
            return None
        return self.measure.change(self.error * statistics.detectable_errors(self.n - 1, power=POWER, alpha=ALPHA))

    @property
    def detectable_text(self) -> str | None:
        """The minimum detectable effect and the number of units."""
        least = self.detectable
        return f"{self.measure.size_text(least)} (n = {self.n:,})".replace(" ", NBSP) if least is not None else None

    def values(self) -> dict:
        """As JSON for a record."""
        own = ("a", "b", "change", "low", "high", "p", "n", "method", "identical", "verdict")
        return {name: getattr(self, name) for name in own} | {
            "measure": self.measure.key,
            "p_adjusted": self.adjusted,
            "margin": self.measure.margin,
            "smallest_detectable": self.detectable,
        }


# What the report compares --------------------------------------------------------------------------------------------


def compared(comparison: Comparison, *questions: str) -> list[Difference]:
    """Every difference between models that the report puts into words, adjusted together (Holm); or those that answer
    certain questions, STAGES, SINCE or a baseline, adjusted over all of them nevertheless.

    The family is the whole report, not a table: stage from stage, stages since pretraining, and the stages against
    either baseline. In a run whose differences are all noise the chance of any false claim is thus at most 5%.
    """
    every = []
    for question, measure, a, b in _questions(comparison):
        found = difference(comparison, measure, a, b)
        every.append(found and replace(found, question=question))
    return [one for one in adjust(every) if one is not None and (not questions or one.question in questions)]


def stage_changes(comparison: Comparison) -> dict[tuple[str, str, str], Difference]:
    """(STAGES or SINCE, key of a measure, later stage) -> what changed from stage to stage, and since pretraining."""
    return {(one.question, one.measure.key, one.b): one for one in compared(comparison, STAGES, SINCE)}


def _questions(comparison: Comparison) -> Iterator[tuple[str, str, str, str]]:
    """(question, measure, a, b) of every comparison between models that the report makes."""
    present = comparison.lineage
    yield from ((STAGES, measure, a, b) for measure in STAGED for a, b in pairwise(present))
    yield from ((SINCE, measure, present[0], stage) for measure in STAGED for stage in present[2:])
    for place, baseline in enumerate(comparison.baselines):
        others = [*comparison.baselines[:place], *present]
        yield from ((baseline, measure, baseline, model) for measure in SHARED for model in others)


def adjust(differences: Iterable[Difference | None]) -> list[Difference | None]:
    """The same differences with Holm's adjustment over all of them; absent ones stay absent."""
    every = list(differences)
    present = [one for one in every if one is not None]
    adjusted = iter(statistics.holm([one.p for one in present]))
    return [one and replace(one, adjusted=next(adjusted), family=len(present)) for one in every]


# Two models on one measure -------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two models' per-item results, aligned: scores, and what they are divided by where it is not 1."""

    a: np.ndarray
    b: np.ndarray
    weights_a: np.ndarray | None
    weights_b: np.ndarray | None
    clusters: np.ndarray | None  # the unit of each row, where units have several
    unit: str


def paired(comparison: Comparison, measure: Measure, a: str, b: str) -> Pair | None:
    """Per-item results of both models on the items they share; None without items.

    Of several templates the first counts: the metric that carries the headline is over that one.
    """
    protocol = comparison.protocol(measure.key)
    frames = [comparison.items(model, protocol) for model in (a, b)] if protocol else [None]
    if any(frame is None or not set(measure.items) <= set(frame.columns) for frame in frames):
        return None
    frames = [f[f["template"] == f["template"].iloc[0]] if "template" in f and len(f) else f for f in frames]
    keys = [key for key in KEYS if key in frames[0].columns and key in frames[1].columns]
    both = pd.merge(*frames, on=keys, suffixes=("_a", "_b"), validate="one_to_one")
    both = both.dropna(subset=[f"{column}_{side}" for column in measure.items for side in "ab"])  # not generated
    if both.empty:
        return None
    scores = [both[f"{measure.items[0]}_{side}"].to_numpy(float) for side in "ab"]
    weights = [both[f"{measure.items[1]}_{side}"].to_numpy(float) if measure.items[1:] else None for side in "ab"]
    if measure.clusters:
        return Pair(*scores, *weights, both[f"{measure.clusters}_a"].to_numpy(), f"{measure.clusters} clusters")
    clusters = both[keys[0]].to_numpy() if both[keys[0]].duplicated().any() else None
    return Pair(*scores, *weights, clusters, f"{keys[0]}s")


def comparable(comparison: Comparison, measure: str, a: str, b: str) -> bool:
    """Figures per token compare only where the tokens are the same."""
    return MEASURES[measure].unit not in ("perplexity", "nats") or comparison.share_tokenizer(a, b)


def difference(comparison: Comparison, measure: str, a: str, b: str) -> Difference | None:
    """`b` against `a`; None where either was not measured, per-item results are missing, or they do not compare."""
    key = (measure, a, b)
    if key not in comparison.differences:
        pair = paired(comparison, MEASURES[measure], a, b) if comparable(comparison, measure, a, b) else None
        found = pair and _difference(pair, MEASURES[measure], a, b, comparison.resamples)
        comparison.differences[key] = found and replace(found, **described(comparison, measure, a, b))
    return comparison.differences[key]


def described(comparison: Comparison, measure: str, a: str, b: str) -> dict[str, tuple]:
    """The names and values of two models, as `Difference` holds them."""
    rows = comparison.value(measure, a), comparison.value(measure, b)
    return {"names": (comparison.name(a), comparison.name(b)), "rows": rows}


def _difference(pair: Pair, measure: Measure, a: str, b: str, resamples: int) -> Difference:
    answers = measure.unit == "share" and pair.clusters is None and pair.weights_a is None  # a row a unit
    same_weights = pair.weights_a is None or np.array_equal(pair.weights_a, pair.weights_b)
    identical = same_weights and np.array_equal(pair.a, pair.b)
    if answers and np.isin([pair.a, pair.b], (0, 1)).all():  # right or wrong, without ties
        n, _, only_a, only_b, _, *estimate, p = statistics.paired_proportions(pair.a, pair.b)
        discordant = (only_a + only_b) / n
        return Difference(measure, a, b, *estimate, p, n, "McNemar, exact", discordant, identical=identical)
    if identical:
        return _identical(pair, measure, a, b)
    found = statistics.paired_bootstrap(*pair[:4], clusters=pair.clusters, resamples=resamples)
    change, method = measure.change(found.difference), f"bootstrap over {pair.unit}"
    if found.low is None or found.high is None:  # one unit: nothing to judge by
        return Difference(measure, a, b, change, None, None, 1.0, found.n, method)
    error, p = clustered_t(pair)
    if answers:  # with ties, which count half: more items right than wrong?
        p, method = statistics.paired_proportions(pair.a > pair.b, pair.b > pair.a).p, f"sign test, {method}"
    half = statistics.student_half_width(error, found.n - 1)
    low = measure.change(min(found.low, found.difference - half))
    high = measure.change(max(found.high, found.difference + half))
    return Difference(measure, a, b, change, low, high, p, found.n, method, error=error)


def _identical(pair: Pair, measure: Measure, a: str, b: str) -> Difference:
    """Two models with the same result on every row. That no unit differs does not mean that none would: of right and
    wrong answers the interval is that of as many single answers of which none differs, Bonett and Price's. Of other
    results nothing bounds a difference that was never seen, and there is no interval."""
    n = len(pair.a if pair.clusters is None else np.unique(pair.clusters))
    method = f"same result on all {pair.unit}"
    if measure.unit != "share":
        return Difference(measure, a, b, 0.0, None, None, 1.0, n, method, identical=True)
    none = statistics.paired_proportions(np.zeros(n), np.zeros(n))
    return Difference(measure, a, b, 0.0, none.low, none.high, 1.0, n, method, discordant=0.0, identical=True)


def clustered_t(pair: Pair) -> tuple[float, float]:
    """Standard error of the difference of two paired ratios, and the p-value of `statistics.mean_p` over clusters.

    Each unit's influence on `sum b / sum weights_b - sum a / sum weights_a` is summed within its cluster (linearised
    ratio; Miller 2024, arXiv 2411.00640, section 2.2; degrees of freedom as Cameron, Gelbach & Miller 2008). The p of a
    percentile bootstrap is far too small over a handful of documents.
    """

    def ratio(values_N: np.ndarray, weights_N: np.ndarray | None) -> tuple[float, np.ndarray]:
        """The ratio of the sums, and each row's influence on it."""
        weights_N = np.ones_like(values_N) if weights_N is None else weights_N
        value = float(values_N.sum() / weights_N.sum())
        return value, (values_N - value * weights_N) / weights_N.sum()

    (a, a_N), (b, b_N) = ratio(pair.a, pair.weights_a), ratio(pair.b, pair.weights_b)
    influence_N = b_N - a_N
    if pair.clusters is not None:
        influence_N = np.bincount(np.unique(pair.clusters, return_inverse=True)[1], weights=influence_N)
    n = len(influence_N)
    p = statistics.mean_p(influence_N + (b - a) / n)
    return math.sqrt(n / (n - 1) * float((influence_N**2).sum())), p
