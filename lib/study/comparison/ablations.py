"""Effects of single components: a variant against the base, over seeds for the loss and over rounds for the time.

Loss: both were trained from the same seeds on the same rows in the same order; the mean of their differences carries
Student's interval. Time: in each round both took one step; the median of the ratios carries the interval of order
statistics, which no single slow round can move. Tokens to equal loss are read off the curves of held-out loss.

Variants are the values of the records `ablation/<variant>`, by variant (`Comparison.by_variant`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from study.comparison.differences import ALPHA
from study.comparison.models import SHOWN, choice
from study.comparison.results import bounds, count, estimate
from threefold.evaluation import statistics
from threefold.evaluation.statistics import paired_median, paired_student

BASE = "base"
QUANTITIES = {"heldout_loss": "perplexity", "tokens_per_second": "training speed"}  # and the words for them
Variants = Mapping[str, Mapping[str, Any]]
_COMPONENTS = {one["key"]: one for one in SHOWN["component"]}


def title(variant: str) -> str:
    """A variant for a reader: "norm=layer" is "Normalisation: LayerNorm"; one of no component keeps its own name."""
    key, _, value = variant.partition(",")[0].partition("=")
    if key == "optimizer":
        return f"Optimizer: {SHOWN['optimizer'].get(value, value)}"
    component = _COMPONENTS.get(key)
    return f"{component['name']}: {choice(component, value)}" if component else variant


@dataclass(frozen=True)
class Effect:
    """Relative change that the component brings: the base (with it) against the variant (with GPT-2's counterpart).

    change, low, high: e.g. -0.03 is 3% less perplexity. low and high are None where too few values leave no interval.
    """

    quantity: str
    change: float
    low: float | None
    high: float | None
    values: int  # seeds of a loss, rounds of a speed

    @property
    def basis(self) -> str:
        """What the effect rests on: "3 seeds", "15 rounds"."""
        return count(self.values, "round" if self.quantity == "tokens_per_second" else "seed")

    @property
    def text(self) -> str:
        """ "−2.1% [−3.0, −1.2]"."""
        return estimate(self.change, self.low, self.high, scale=100, decimals=1, unit="%", sign=True)

    @property
    def turned(self) -> "Effect":
        """The variant against the base: what a component brings that the base does not have."""
        change, high, low = bounds(lambda x: 1 / (1 + x) - 1, self.change, self.low, self.high)
        return Effect(self.quantity, change, low, high, self.values)


def effect(variants: Variants, variant: str, quantity: str) -> Effect | None:
    """What the base gains over a variant in `heldout_loss` (as perplexity) or `tokens_per_second`.

    Both records hold one value a seed, or one a round of timing, under that name, in the same order.
    """
    base, other = (_series(variants.get(name, {}), quantity) for name in (BASE, variant))
    n = min(len(base), len(other))
    if n == 0:
        return None
    base, other = base[:n], other[:n]
    found = paired_student(other, base) if quantity == "heldout_loss" else paired_median(np.log(other), np.log(base))
    return Effect(quantity, *bounds(math.expm1, *found[:3]), found.n)


def _series(values: Mapping[str, Any], quantity: str) -> np.ndarray:
    return np.atleast_1d(np.asarray(values.get(quantity) or [], float))


def equal_loss(
    base: Mapping[str, Sequence[float]], variant: Mapping[str, Sequence[float]]
) -> tuple[float, float] | None:
    """Tokens that the base and the variant need to come to the same held-out loss.

    The loss is the higher of the two last ones, which both curves reach; on the way to it each curve is read between
    its points, linearly in the logarithm of tokens. None where one has come to it by its first point after the start.

    base, variant: {"tokens": [...], "loss": [...]} of one seed.
    """
    level = max(base["loss"][-1], variant["loss"][-1])
    needed = _tokens_to(level, base), _tokens_to(level, variant)
    return None if None in needed else needed


def _tokens_to(level: float, curve: Mapping[str, Sequence[float]]) -> float | None:
    """Tokens at which a curve first comes down to a loss that it reaches."""
    points = [(tokens, loss) for tokens, loss in zip(curve["tokens"], curve["loss"], strict=True) if tokens > 0]
    place = next(i for i, (_, loss) in enumerate(points) if loss <= level)
    if place == 0:
        return float(points[0][0]) if points[0][1] == level else None
    (left, above), (right, below) = points[place - 1 : place + 1]
    share = (above - level) / (above - below)
    return math.exp((1 - share) * math.log(left) + share * math.log(right))


def contrasts(variants: Variants) -> list[dict[str, Any]]:
    """Every variant against the base, as JSON for a record. Ratios are kept as logarithms, p-values adjusted over the
    variants (Holm).

    loss: nats a token, over seeds. log_tokens: ratio of tokens to equal loss, over seeds; None where they are not
    known. log_step_seconds: by size, ratio of step times, over rounds.
    """
    if BASE not in variants:
        return []
    base, found = variants[BASE], []
    for name, values in variants.items():
        if name == BASE:
            continue
        needed = [equal_loss(*pair) for pair in zip(base["curves"], values["curves"], strict=True)]
        times = {size: (taken, values["step_seconds"][size]) for size, taken in base["step_seconds"].items()}
        found.append(
            {
                "variant": name,
                "loss": paired_student(*(_series(one, "heldout_loss") for one in (base, values)))._asdict(),
                "log_tokens": None if None in needed else paired_student(*np.log(needed).T)._asdict(),
                "log_step_seconds": {size: paired_median(*np.log(pair))._asdict() for size, pair in times.items()},
            }
        )
    adjust([one["loss"] for one in found])
    for size in base["step_seconds"]:
        adjust([one["log_step_seconds"][size] for one in found])
    return found


def adjust(tests: Sequence[dict[str, Any]]) -> None:
    """Give every test its "p_adjusted": Holm's, over all of them."""
    for test, p in zip(tests, statistics.holm([test["p"] for test in tests]), strict=True):
        test["p_adjusted"] = p


def half_width(tests: Sequence[Mapping[str, Any]]) -> float | None:
    """Half the width of the tests' 95% intervals, in the median; None where no test has an interval."""
    halves = [(test["high"] - test["low"]) / 2 for test in tests if test["low"] is not None]
    return float(np.median(halves)) if halves else None


def detected(contrast: dict[str, Any]) -> bool:
    """Whether the difference in held-out loss may be claimed."""
    loss = contrast["loss"]
    return loss["low"] is not None and (loss["low"] > 0 or loss["high"] < 0) and loss["p_adjusted"] < ALPHA
