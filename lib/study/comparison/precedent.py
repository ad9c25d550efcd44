"""The precedent, rerun: what its page claimed, what its protocols say of this run's models, and what sound ones say.

The precedent scored 200 sentiment items under one prompt, 50 word problems and the first 100 lines of WikiText-2, once
each and without intervals, and its task scores came from untrained random weights (DESIGN 1).
"""

from typing import Any

from papertrail.records import escape
from study.comparison.differences import difference
from study.comparison.insights import Insight
from study.comparison.load import Comparison
from study.comparison.measures import LINES, ONE_PROMPT, PERPLEXITY, PROBLEMS, SENTIMENT, Measure
from study.comparison.results import NBSP, Result, interval, listed, percent
from study.comparison.tables import majority_class, markdown_table
from study.preset import LINEAGE
from threefold.evaluation import statistics
from threefold.evaluation.results import PRECEDENT_ITEMS

PROBLEM_ITEMS = 50
POINTS = 0.04  # the change in sentiment that its page tells a story about

# What was claimed, between which models, by which of its protocols, and by which of ours.
_CHANGES = (
    ("−33%", "gpt2", "pretrain", LINES, PERPLEXITY),
    ("+26%", "pretrain", "sft", LINES, PERPLEXITY),
    ("+0.5%", "sft", "dpo", LINES, PERPLEXITY),
    ("+4 pp", "pretrain", "sft", ONE_PROMPT, SENTIMENT),
    ("−4 pp", "sft", "dpo", ONE_PROMPT, SENTIMENT),
)


def table(comparison: Comparison) -> Result:
    """The precedent's figures as claimed, by its protocols rerun here, and by this report's."""
    rows: list[dict[str, Any]] = []
    values: dict[str, Any] = {}

    def add(key: str, what: str, claimed: str, rerun: dict | None, sound: dict | None) -> None:
        values[key] = {"claimed": claimed, "rerun": rerun, "sound": sound}
        cells = {"Its protocol, rerun here": rerun, "Sound evaluation, here": sound}
        shown = {title: one["text"] if one else "not measured" for title, one in cells.items()}
        rows.append({"Figure": what, "Claimed": claimed} | shown)

    for claimed, a, b, theirs, ours in _CHANGES:
        what = f"{ours.title}, {comparison.name(b)} against {comparison.name(a)}"
        add(f"{ours.key}-{b}", what, claimed, _change(comparison, theirs, a, b), _change(comparison, ours, a, b))
    last = next((model for model in reversed(LINEAGE) if model in comparison.models), "")
    if last:
        what = f"{PROBLEMS.title}, {comparison.name(last)}"
        add("problems", what, percent(0), first_problems(comparison, last), _value(comparison, PROBLEMS, last))
    if "random" in comparison.models:
        here, sound = (_value(comparison, measure, "random") for measure in (ONE_PROMPT, SENTIMENT))
        add("control", f"{SENTIMENT.title}, {comparison.name('random')}", "–", here, sound)
    return Result("comparison/precedent", {"rows": rows, "figures": values}, markdown=markdown_table(rows))


def _change(comparison: Comparison, measure: Measure, a: str, b: str) -> dict[str, Any] | None:
    one = difference(comparison, measure, a, b)
    if one is None:
        return None
    return {"value": one.change, "low": one.low, "high": one.high, "n": one.n, "text": f"{one.text}, {_n(one.n)}"}


def _value(comparison: Comparison, measure: Measure, model: str) -> dict[str, Any] | None:
    value = measure.value(comparison, model)
    if value is None:
        return None
    text = f"{measure.text(value)}, {_n(value.n)}"
    return {"value": value.value, "low": value.low, "high": value.high, "n": value.n, "text": text}


def first_problems(comparison: Comparison, model: str, count: int = PROBLEM_ITEMS) -> dict[str, Any] | None:
    """Strict matches among the first `count` word problems, with Wilson's interval; None without per-item results."""
    protocol = PROBLEMS.protocol(comparison)
    items = comparison.items(model, protocol) if protocol else None
    if items is None:
        return None
    first = items.sort_values("item")["correct"].to_numpy(float)[:count]
    found = statistics.wilson(float(first.sum()), len(first))
    text = f"{_share(found)}, {_n(found.n)}"
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "text": text}


def _share(found: statistics.Interval) -> str:
    return interval(percent(found.value), f"{100 * found.low:.1f}", f"{100 * found.high:.1f}")


def _n(count: int | None) -> str:
    return f"n{NBSP}={NBSP}{count:,}" if count is not None else "n not recorded"


def sentences(comparison: Comparison) -> list[Insight]:
    """What 200 and 50 items can tell at all, and what chance looks like on them."""
    half = statistics.wilson(PRECEDENT_ITEMS / 2, PRECEDENT_ITEMS)
    none = statistics.wilson(0, PROBLEM_ITEMS)
    # Two models that disagree on a fifth of the items: the usual assumption of `detectable_difference`.
    least = statistics.detectable_difference(PRECEDENT_ITEMS)
    widths = (
        f"At n{NBSP}={NBSP}{PRECEDENT_ITEMS}, an accuracy of one half has the interval {_share(half)}, and two models "
        f"that disagree on a fifth of the items must differ by {100 * least:.1f} points for a chance of four in five "
        f"to show it; the changes claimed are {100 * POINTS:.0f} points. None right of {PROBLEM_ITEMS} word "
        f"problems is compatible with up to {percent(none.high)}."
    )
    figures = {"accuracy": half._asdict(), "smallest_detectable": least, "none_right": none._asdict()}
    found = [Insight("precedent-widths", widths, (), values=(figures,))]
    control = ONE_PROMPT.value(comparison, "random") if "random" in comparison.models else None
    if control is not None:
        majority = majority_class(comparison)
        beside = f", where always giving the commoner label of the whole set is {percent(majority)}" if majority else ""
        chance = (
            f"Chance looks like this: random weights answer {ONE_PROMPT.text(control)} of the same "
            f"{control.n:,} items{beside}. The precedent's task scores were those of untrained random weights."
        )
        evidence = f"evaluation/random/{control.protocol}"
        found.append(Insight("precedent-chance", chance, (evidence,)))
        trained = [model for model in comparison.models if model != "random" and ONE_PROMPT.value(comparison, model)]
        beside_it = [
            model
            for model in trained
            if (value := ONE_PROMPT.value(comparison, model)).low is not None
            and value.low <= control.high
            and value.high >= control.low
        ]
        if trained:
            names = f" ({listed([escape(comparison.name(model)) for model in beside_it])})" if beside_it else ""
            overlap = (
                f"On those items the intervals of {len(beside_it)} of {len(trained)} trained models overlap the random "
                f"control's{names}."
            )
            every = tuple(f"evaluation/{model}/{control.protocol}" for model in ("random", *trained))
            found.append(Insight("precedent-overlap", overlap, every))
    return found
