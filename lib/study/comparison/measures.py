"""The measures of the headline table: which protocol and metric each reads, how it is compared and printed."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from study.comparison.load import Comparison, Value
from study.comparison.results import interval, percent, plain, signed

KEYS = ("item", "document", "pair", "template", "draw")  # columns that name an item


@dataclass(frozen=True)
class Pair:
    """Two models' per-item results, aligned."""

    a: np.ndarray
    b: np.ndarray
    weights_a: np.ndarray | None = None
    weights_b: np.ndarray | None = None
    clusters: np.ndarray | None = None
    unit: str = "items"

    @property
    def binary(self) -> bool:
        """Whether each entry is right or wrong."""
        return bool(np.isin(self.a, (0, 1)).all() and np.isin(self.b, (0, 1)).all())

    @property
    def identical(self) -> bool:
        """Whether not a single result tells the two models apart."""
        weights = (self.weights_a, self.weights_b)
        same = weights[0] is None or np.array_equal(*weights)
        return bool(same and np.array_equal(self.a, self.b))


def fuller(comparison: Comparison, protocol: str | None) -> str | None:
    """The protocol that asks the same prompts with every template and draw, where it was measured (of fewer items);
    else the protocol itself."""
    grid = f"{protocol}-grid"
    return grid if grid in comparison.protocols else protocol


@dataclass(frozen=True)
class Measure:
    """One row or column of the comparison."""

    key: str
    title: str
    better: str  # "lower" or "higher"
    protocols: tuple[str, ...]  # patterns, the first that any model was measured by counts
    metric: str
    columns: tuple[str, ...]  # per item: one score, or (sum, weight)
    kind: str  # "share", "perplexity", "bits" or "nats"
    margin: float  # differences within it count as equivalent, in the unit of change

    def protocol(self, comparison: Comparison) -> str | None:
        """The protocol this measure reads in this run."""
        for pattern in self.protocols:
            found = [one for one in comparison.protocols if re.fullmatch(pattern, one)]
            found = [one for one in found if any(comparison.metric(m, one, self.metric) for m in comparison.models)]
            if found:
                return max(found, key=_shots)
        return None

    def value(self, comparison: Comparison, model: str) -> Value | None:
        protocol = self.protocol(comparison)
        return comparison.metric(model, protocol, self.metric) if protocol else None

    def comparable(self, comparison: Comparison, a: str, b: str) -> bool:
        """Perplexity per token compares only where the tokens are the same."""
        return self.kind not in ("perplexity", "nats") or comparison.share_tokenizer(a, b)

    def paired(self, comparison: Comparison, protocol: str, a: str, b: str) -> Pair | None:
        """Both models' results on the items they share; None when they are not at hand."""
        frames = [_first_template(comparison.items(model, protocol)) for model in (a, b)]
        if any(frame is None or not set(self.columns) <= set(frame.columns) for frame in frames):
            return None
        keys = [key for key in KEYS if key in frames[0].columns and key in frames[1].columns]
        if not keys:
            return None
        both = pd.merge(frames[0], frames[1], on=keys, suffixes=("_a", "_b"), validate="one_to_one")
        both = both.dropna(subset=[f"{column}_{side}" for column in self.columns for side in "ab"])  # not generated
        if both.empty:
            return None
        score = self.columns[0]
        unit_key = keys[0]
        several = both[unit_key].duplicated().any()
        weights = [None, None]
        if len(self.columns) == 2:
            weights = [both[f"{self.columns[1]}_{side}"].to_numpy(float) for side in "ab"]
        return Pair(
            both[f"{score}_a"].to_numpy(float),
            both[f"{score}_b"].to_numpy(float),
            *weights,
            clusters=both[unit_key].to_numpy() if several else None,
            unit=f"{unit_key}s" if unit_key in ("item", "document", "pair") else "items",
        )

    # Printing -------------------------------------------------------------------------------------------------------

    @property
    def convert(self) -> Callable[[float], float]:
        """From a difference of means per weight to the unit of change."""
        return {"perplexity": math.expm1, "bits": lambda nats: nats / math.log(2)}.get(self.kind, float)

    def text(self, value: Value | None, *, with_interval: bool = True) -> str | None:
        """A value for a cell; None (an en dash) when it was not measured."""
        if value is None:
            return None
        form = {"share": percent, "perplexity": _perplexity, "bits": lambda x: plain(x, 3)}.get(
            self.kind, lambda x: plain(x, 3)
        )
        if not with_interval or value.low is None or value.high is None:
            return form(value.value)
        short = (lambda x: f"{100 * x:.1f}") if self.kind == "share" else form
        return interval(form(value.value), short(value.low), short(value.high))

    def size_text(self, change: float) -> str:
        """The size of a change, without its sign: a margin, the smallest detectable one."""
        return self.change_text(abs(change)).removeprefix("+")

    def spread_text(self, spread: float, low: float | None = None, high: float | None = None) -> str:
        """A standard deviation or error of the value with its interval: points of a proportion, else the value's
        unit."""
        scale, decimals, unit = {"share": (100, 1, " pp"), "perplexity": (1, 2, "")}.get(self.kind, (1, 4, ""))
        bounds = [None if x is None else plain(scale * x, decimals) for x in (low, high)]
        return interval(f"{plain(scale * spread, decimals)}{unit}", *bounds)

    def change_text(self, change: float, low: float | None = None, high: float | None = None) -> str:
        """A change with its interval, in percentage points, percent, bits or nats."""
        scale, decimals, unit = {
            "share": (100, 1, " pp"),
            "perplexity": (100, 1, "%"),
            "bits": (1, 3, ""),
        }.get(self.kind, (1, 3, ""))
        bounds = [None if x is None else signed(scale * x, decimals) for x in (low, high)]
        return interval(signed(scale * change, decimals, unit), *bounds)


def _first_template(items: pd.DataFrame | None) -> pd.DataFrame | None:
    """The rows of the first template: the metric that carries the headline is over that one."""
    if items is None or "template" not in items.columns or items.empty:
        return items
    return items[items["template"] == items["template"].iloc[0]]


def _perplexity(value: float) -> str:
    return plain(value, 2 if value < 1000 else 0)


def _shots(protocol: str) -> tuple[int, str]:
    """More demonstrations first: the few-shot setting is the headline's."""
    found = re.search(r"(\d+)-shot", protocol)
    return (int(found.group(1)) if found else 0, protocol)


_DISJOINT = r"[^/]+/disjoint-\d+"
_SHOTS = r"[^/]+/\d+-shot"  # sentiment and word problems; which of the two, the metric's name tells
_RESPONSES = r"[^/]+/responses"
_PREFERENCES = r"[^/]+/(?!.*shot).*"  # the other protocol with an accuracy

# Margins: what the report calls equivalent. 1% of perplexity, 0.01 bits per byte, two points of a proportion.
PERPLEXITY = Measure(
    "perplexity", "Perplexity", "lower", (_DISJOINT,), "perplexity", ("nats", "tokens"), "perplexity", 0.01
)
BITS_PER_BYTE = Measure(
    "bits_per_byte", "Bits per byte", "lower", (_DISJOINT,), "bits_per_byte", ("nats", "bytes"), "bits", 0.01
)
SENTIMENT = Measure("sentiment", "Sentiment", "higher", (_SHOTS,), "accuracy", ("correct",), "share", 0.02)
PROBLEMS = Measure("problems", "Word problems", "higher", (_SHOTS,), "exact_match", ("correct",), "share", 0.02)
INSTRUCTIONS = Measure(
    "instructions", "Instructions", "higher", (_RESPONSES,), "exact_match", ("correct",), "share", 0.02
)
RESPONSE_LOSS = Measure(
    "response_loss", "Response loss", "lower", (_RESPONSES,), "response_loss", ("nats", "tokens"), "nats", 0.01
)
PREFERENCES = Measure("preferences", "Preferences", "higher", (_PREFERENCES,), "accuracy", ("correct",), "share", 0.02)
# The precedent's own definitions, rerun for its table alone; nothing else compares by them.
LINES = Measure(
    "perplexity_lines", "Perplexity, 100 lines", "lower", (r"[^/]+/lines-\d+",), "perplexity", ("nats", "tokens"),
    "perplexity", 0.01,
)  # fmt: skip
ONE_PROMPT = Measure(
    "sentiment_prompt", "Sentiment, one prompt", "higher", (r"[^/]+/precedent-\d+-shot",), "accuracy", ("correct",),
    "share", 0.02,
)  # fmt: skip

HEADLINE = (PERPLEXITY, BITS_PER_BYTE, SENTIMENT, PROBLEMS, INSTRUCTIONS, PREFERENCES)
COMPARED = (BITS_PER_BYTE, SENTIMENT, PROBLEMS, INSTRUCTIONS, PREFERENCES)  # those that any two models share
STAGED = (PERPLEXITY, SENTIMENT, PROBLEMS, INSTRUCTIONS, RESPONSE_LOSS, PREFERENCES)  # within one lineage
