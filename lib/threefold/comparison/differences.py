"""Differences between two models on the same items, and the words they allow.

Right/wrong on single items: McNemar's exact test with Bonett and Price's interval. Everything else: the paired
bootstrap over documents or items. A table's p-values are adjusted together (Holm). A difference is claimed only when
its adjusted p is below 0.05 *and* its interval leaves out zero; two models are called equivalent only when the whole
interval lies within the measure's stated margin; anything else is "no detectable difference".
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from threefold.comparison.load import Comparison
from threefold.comparison.measures import Measure
from threefold.comparison.results import probability
from threefold.evaluation import statistics

ALPHA = 0.05
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
        bounded = self.low is not None and self.high is not None
        if bounded and max(abs(self.low), abs(self.high)) <= self.measure.margin:
            return EQUIVALENT
        return UNRESOLVED

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
    if pair.clusters is None and pair.weights_a is None and pair.binary:
        found = statistics.paired_proportions(pair.a.astype(bool), pair.b.astype(bool))
        discordant = (found.only_a + found.only_b) / found.n
        interval = (found.difference, found.low, found.high)
        return Difference(measure, a, b, *interval, found.p, found.n, "McNemar, exact", discordant)
    found = statistics.paired_bootstrap(
        pair.a,
        pair.b,
        pair.weights_a,
        pair.weights_b,
        clusters=pair.clusters,
        resamples=comparison.resamples,
    )
    convert = measure.convert
    bounds = [None if bound is None else convert(bound) for bound in (found.low, found.high)]
    return Difference(
        measure, a, b, convert(found.difference), *bounds, found.p, found.n, f"bootstrap over {pair.unit}"
    )


def adjust(differences: Iterable[Difference | None]) -> list[Difference | None]:
    """The same differences with Holm's adjustment over all of them; absent ones stay absent."""
    every = list(differences)
    present = [one for one in every if one is not None]
    if not present:
        return every
    adjusted = iter(statistics.holm([one.p for one in present]))
    return [one and replace(one, adjusted=next(adjusted), family=len(present)) for one in every]


def smallest_detectable(one: Difference) -> float | None:
    """Smallest difference of proportions that this many items would show with 80% power, from the discordance seen.

    At least one item is taken as discordant; None for measures that are no proportions of single items.
    """
    if one.discordant is None:
        return None
    return statistics.detectable_difference(one.n, max(one.discordant, 1 / one.n))
