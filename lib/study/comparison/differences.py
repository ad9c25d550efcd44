"""Differences between two models on the same items, and the words they allow.

Right/wrong on single items: McNemar's exact test with Bonett and Price's interval. Everything else: the paired
bootstrap over documents or items beside Student's t of the clustered standard error, the wider interval of the two,
because a percentile bootstrap over a handful of documents rejects far too often. All p-values of a report are adjusted
together (Holm, `tables.compared`), so that the chance of *any* false sentence is at most 5%. A difference is claimed
only when its adjusted p is below 0.05 *and* its interval leaves out zero. Two models are called equivalent only when
the whole 95% interval lies within the measure's stated margin: two one-sided tests at 2.5% each (Schuirmann 1987;
Lakens 2017 customarily takes the 90% interval, 5% each; the stricter one is the interval that is printed). Models
whose results are the same on every unit, and anything else, are "no detectable difference".
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from study.comparison.load import Comparison
from study.comparison.measures import Measure, Pair
from study.comparison.results import probability
from threefold.evaluation import statistics

ALPHA = 0.05
POWER = 0.8
BETTER, WORSE, EQUIVALENT, UNRESOLVED = "better", "worse", "equivalent", "no detectable difference"


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
    adjusted: float | None = None  # Holm's, within the table it stands in
    family: int = 1  # comparisons adjusted together
    error: float | None = None  # standard error in the unit of change, where the method has one
    identical: bool = False  # the same result on every single unit

    @property
    def detected(self) -> bool:
        """Whether a difference may be claimed at all."""
        p = self.p if self.adjusted is None else self.adjusted
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0) and p < ALPHA

    @property
    def verdict(self) -> str:
        """What b is against a: better, worse, equivalent (within the margin) or no detectable difference."""
        if self.detected:
            return BETTER if (self.change > 0) == (self.measure.better == "higher") else WORSE
        return EQUIVALENT if self.within_margin and not self.identical else UNRESOLVED

    @property
    def within_margin(self) -> bool:
        """Whether the whole interval lies within the measure's margin of equivalence."""
        bounded = self.low is not None and self.high is not None
        return bounded and max(abs(self.low), abs(self.high)) <= self.measure.margin

    @property
    def text(self) -> str:
        """The change with its interval: "+3.1 pp [+0.4, +5.8]", "−12.0% [−13.1, −10.8]"."""
        return self.measure.change_text(self.change, self.low, self.high)

    @property
    def p_text(self) -> str:
        return probability(self.p if self.adjusted is None else self.adjusted)

    def values(self) -> dict:
        """As JSON for a record."""
        return {
            "measure": self.measure.key,
            "a": self.a,
            "b": self.b,
            "change": self.change,
            "low": self.low,
            "high": self.high,
            "p": self.p,
            "p_adjusted": self.adjusted,
            "n": self.n,
            "method": self.method,
            "margin": self.measure.margin,
            "smallest_detectable": minimum_detectable_effect(self),
            "identical": self.identical,
            "verdict": self.verdict,
        }


def difference(comparison: Comparison, measure: Measure, a: str, b: str) -> Difference | None:
    """`b` against `a`; None where either was not measured, per-item results are not at hand, or they do not compare."""
    key = (measure.key, a, b)
    if key not in comparison.differences:
        comparison.differences[key] = _difference(comparison, measure, a, b)
    return comparison.differences[key]


def _difference(comparison: Comparison, measure: Measure, a: str, b: str) -> Difference | None:
    protocol = measure.protocol(comparison)
    if protocol is None or not measure.comparable(comparison, a, b):
        return None
    pair = measure.paired(comparison, protocol, a, b)
    if pair is None or len(pair.a) == 0:
        return None
    identical = pair.identical
    if pair.clusters is None and pair.weights_a is None and pair.binary:
        found = statistics.paired_proportions(pair.a.astype(bool), pair.b.astype(bool))
        discordant = (found.only_a + found.only_b) / found.n
        interval = (found.difference, found.low, found.high)
        return Difference(measure, a, b, *interval, found.p, found.n, "McNemar, exact", discordant, identical=identical)
    found = statistics.paired_bootstrap(
        pair.a,
        pair.b,
        pair.weights_a,
        pair.weights_b,
        clusters=pair.clusters,
        resamples=comparison.resamples,
    )
    convert = measure.convert
    method = f"bootstrap over {pair.unit}"
    if found.low is None or found.high is None:  # one unit: nothing to judge by
        return Difference(measure, a, b, convert(found.difference), None, None, 1.0, found.n, method)
    error, p = clustered_t(pair)
    half = float(stats.t.ppf(0.5 + statistics.CONFIDENCE / 2, found.n - 1)) * error
    bounds = (min(found.low, found.difference - half), max(found.high, found.difference + half))
    return Difference(
        measure,
        a,
        b,
        convert(found.difference),
        *(convert(bound) for bound in bounds),
        p,
        found.n,
        method,
        error=convert(error),
        identical=identical,
    )


def clustered_t(pair: Pair) -> tuple[float, float]:
    """Standard error of the difference of two paired ratios, and its two-sided p from Student's t at one degree of
    freedom less than there are clusters.

    Each unit's influence on `sum b / sum weights_b - sum a / sum weights_a` is summed within its cluster (linearised
    ratio; Miller 2024, arXiv 2411.00640, section 2.2; degrees of freedom as Cameron, Gelbach & Miller 2008). The
    bootstrap's own p cannot fall below 2 / (resamples + 1) and is far too small over a handful of documents.
    """

    def influence(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        weights_N = np.ones_like(values) if weights is None else weights
        return (values - values.sum() / weights_N.sum() * weights_N) / weights_N.sum()

    def ratio(values: np.ndarray, weights: np.ndarray | None) -> float:
        return float(values.sum() / (len(values) if weights is None else weights.sum()))

    influence_N = influence(pair.b, pair.weights_b) - influence(pair.a, pair.weights_a)
    if pair.clusters is not None:
        influence_N = np.bincount(np.unique(pair.clusters, return_inverse=True)[1], weights=influence_N)
    n = len(influence_N)
    if n < 2:
        raise ValueError("a standard error needs at least two units")
    error = math.sqrt(n / (n - 1) * float((influence_N**2).sum()))
    change = ratio(pair.b, pair.weights_b) - ratio(pair.a, pair.weights_a)
    if change == 0:
        return error, 1.0
    return error, float(2 * stats.t.sf(abs(change) / error, n - 1)) if error else 0.0


def adjust(differences: Iterable[Difference | None]) -> list[Difference | None]:
    """The same differences with Holm's adjustment over all of them; absent ones stay absent."""
    every = list(differences)
    present = [one for one in every if one is not None]
    if not present:
        return every
    adjusted = iter(statistics.holm([one.p for one in present]))
    return [one and replace(one, adjusted=next(adjusted), family=len(present)) for one in every]


def minimum_detectable_effect(one: Difference) -> float | None:
    """Smallest true difference that a single test over this many units detects with 80% power, in the unit of change.

    Proportions of single items: Connor (1987) from the discordance seen, at least one item taken as discordant. The
    rest: (z for 5% two-sided + z for 80%) standard errors (Miller 2024, section 5). None where one unit, or no spread
    at all, leaves nothing to reckon with.
    """
    if one.discordant is not None:
        return statistics.detectable_difference(one.n, max(one.discordant, 1 / one.n), power=POWER, alpha=ALPHA)
    if not one.error:
        return None
    return float(stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER)) * one.error
