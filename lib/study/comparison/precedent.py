"""The precedent, rerun: what its page claimed, what its protocols say of this run's models, and what sound ones say.

The precedent scored 200 sentiment items under one prompt, 50 word problems and the first 100 lines of WikiText-2, once
each and without intervals, and its task scores came from untrained random weights (DESIGN 1).
"""

from dataclasses import replace
from typing import Any

from papertrail.records import escape
from study.comparison.differences import difference
from study.comparison.insights import Insight
from study.comparison.load import Comparison
from study.comparison.measures import MEASURES
from study.comparison.models import SHOWN
from study.comparison.results import (
    UNITS,
    Result,
    estimate,
    listed,
    number_of,
    percent,
    say,
    table,
    value_text,
)
from study.preset import LINEAGE
from threefold.evaluation import statistics
from threefold.evaluation.results import PRECEDENT_ITEMS

PROBLEM_ITEMS = 50
POINTS = 0.04  # the change in sentiment that its page interprets


def figures(comparison: Comparison) -> Result:
    """The precedent's figures as claimed, by its protocols rerun here, and by this report's."""
    found: list[dict[str, Any]] = []
    values: dict[str, Any] = {}

    def add(key: str, title: str, claimed: str, *figures: dict | None) -> None:
        values[key] = {"claimed": claimed, "rerun": figures[0], "sound": figures[1]}
        rerun, sound = (figure["text"] if figure else "not measured" for figure in figures)
        found.append({"title": title, "claimed": claimed, "rerun": rerun, "sound": sound})

    for row in SHOWN["precedent"]:
        a, b, sound = row["a"], row["b"], row["sound"]
        title = f"{MEASURES[sound].title}, {comparison.name(b)} against {comparison.name(a)}"
        changes = (_change(comparison, measure, a, b) for measure in (row["rerun"], sound))
        add(f"{sound}-{b}", title, row["claimed"], *changes)
    last = next((model for model in reversed(LINEAGE) if model in comparison.models), "")
    if last:
        title = f"{MEASURES['problems'].title}, {comparison.name(last)}"
        add("problems", title, percent(0), first_problems(comparison, last), _value(comparison, "problems", last))
    if "random" in comparison.models:
        title = f"{MEASURES['sentiment'].title}, {comparison.name('random')}"
        add("control", title, "–", *(_value(comparison, key, "random") for key in ("sentiment_prompt", "sentiment")))
    measured = any(value["rerun"] or value["sound"] for value in values.values())
    return replace(table("precedent", found, figures=values), empty=not measured)


def _change(comparison: Comparison, measure: str, a: str, b: str) -> dict[str, Any] | None:
    one = difference(comparison, measure, a, b)
    return one and _figure(one.change, one.low, one.high, one.n, one.text)


def _value(comparison: Comparison, measure: str, model: str) -> dict[str, Any] | None:
    row = comparison.value(measure, model)
    return row and _figure(row.value, row.low, row.high, row.n, value_text(row))


def _figure(value: float, low: float | None, high: float | None, n: int | None, text: str | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n, "text": f"{text}, {number_of(n)}"}


def first_problems(comparison: Comparison, model: str, count: int = PROBLEM_ITEMS) -> dict[str, Any] | None:
    """Strict matches among the first `count` word problems, with Wilson's interval; None without per-item results."""
    protocol = comparison.protocol("problems")
    items = comparison.items(model, protocol) if protocol else None
    if items is None:
        return None
    first = items.sort_values("item")["correct"].to_numpy(float)[:count]
    found = statistics.wilson(float(first.sum()), len(first))
    return _figure(*found, _share(found))


def _share(found: statistics.Interval) -> str:
    return estimate(*found[:3], **UNITS["share"]["value"])


def sentences(comparison: Comparison) -> list[Insight]:
    """What 200 and 50 items can resolve, and how often random weights are right on them."""
    half = statistics.wilson(PRECEDENT_ITEMS / 2, PRECEDENT_ITEMS)
    none = statistics.wilson(0, PROBLEM_ITEMS)
    # Two models that disagree on a fifth of the items: the usual assumption of `detectable_difference`.
    least = statistics.detectable_difference(PRECEDENT_ITEMS)
    widths = say(
        "precedent-widths",
        n=number_of(PRECEDENT_ITEMS),
        half=_share(half),
        least=100 * least,
        points=100 * POINTS,
        problems=PROBLEM_ITEMS,
        most=none.high,
    )
    values = {"accuracy": half._asdict(), "smallest_detectable": least, "none_right": none._asdict()}
    found = [Insight("precedent-widths", widths, (), values=(values,))]
    rows = {model: comparison.value("sentiment_prompt", model) for model in comparison.models}
    rows = {model: row for model, row in rows.items() if row is not None}
    control = rows.pop("random", None)
    if control is None:
        return found
    majority = comparison.majority
    beside = f", where always giving the commoner label of the whole set is {percent(majority)}" if majority else ""
    chance = say("precedent-chance", shown=value_text(control), n=control.n, beside=beside)
    found.append(Insight("precedent-chance", chance, (control.record,)))
    overlapping = [
        escape(comparison.name(model))
        for model, row in rows.items()
        if row.low is not None and row.low <= control.high and row.high >= control.low
    ]
    if rows:
        named = f" ({listed(overlapping)})" if overlapping else ""
        overlap = say("precedent-overlap", overlapping=len(overlapping), every=len(rows), names=named)
        found.append(Insight("precedent-overlap", overlap, (control.record, *(row.record for row in rows.values()))))
    return found
