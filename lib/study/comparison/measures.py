"""The measures of the comparison and the units in which they are printed (plan.toml, display.toml)."""

import math
from dataclasses import dataclass

from study.comparison.models import PLAN
from study.comparison.results import NBSP, UNITS, estimate

KEYS = ("item", "document", "pair", "template", "draw")  # columns that name an item


@dataclass(frozen=True)
class Measure:
    """One row or column of the comparison."""

    key: str
    title: str
    better: str  # "lower" or "higher"
    form: str  # of the protocol's name
    metric: str
    items: tuple[str, ...]  # columns of the per-item results: one score, or (sum, weight)
    unit: str
    margin: float  # differences within it count as equivalent, in the unit of change
    clusters: str = ""  # column whose values are the units, where several items are alike

    @property
    def heading(self) -> str:
        """The title with an arrow to the better side, on one line."""
        return f"{self.title} {'↓' if self.better == 'lower' else '↑'}".replace(" ", NBSP)

    def change(self, difference: float) -> float:
        """From a difference of means, or of nats per unit of text, to the unit of change."""
        if self.unit == "perplexity":
            return math.expm1(difference)
        return difference / math.log(2) if self.unit == "bits" else difference

    def change_text(self, change: float, low: float | None = None, high: float | None = None) -> str:
        """A change with its interval, in percentage points, percent, bits or nats."""
        return estimate(change, low, high, **UNITS[self.unit]["change"], sign=True)

    def size_text(self, change: float) -> str:
        """The size of a change, without its sign: a margin, the minimum detectable one."""
        return estimate(abs(change), **UNITS[self.unit]["change"])

    def spread_text(self, spread: float, low: float | None = None, high: float | None = None) -> str:
        """A standard deviation or error of the value, with its interval."""
        return estimate(spread, low, high, **UNITS[self.unit]["spread"])


MEASURES = {key: Measure(key, **row | {"items": tuple(row["items"])}) for key, row in PLAN["measure"].items()}
PRIMARY: dict[str, list[str]] = PLAN["primary"]  # of a later stage, or of "baseline"
HEADLINE, SHARED, STAGED = (PLAN["sets"][name] for name in ("headline", "shared", "staged"))


def unit_of(text: str | None) -> str:
    """The unit that a record's text for it begins with, "accuracy" say."""
    return next(key for key, unit in UNITS.items() if (text or "").startswith(tuple(unit["names"])))
