"""The comparison that this one redoes, side by side with it: its tables, its protocols rerun, and what its code does.

Its figures are data (original.toml). It scored 200 sentiment items under one prompt, 50 word problems and the first 100
lines of WikiText-2, once each and without intervals.
"""

import statistics
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from study.comparison import training
from study.comparison.differences import SINCE, STAGES, Difference, compared, difference, stage_changes
from study.comparison.load import Comparison
from study.comparison.measures import MEASURES
from study.comparison.models import MODELS
from study.comparison.recipes import recipe
from study.comparison.results import UNITS, Result, estimate, number_of, percent, say, table, value_text
from study.comparison.training import total_parameters
from study.preset import LINEAGE
from threefold.evaluation.results import PRECEDENT_ITEMS
from threefold.evaluation.statistics import detectable_difference, wilson

ORIGINAL = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PROBLEM_ITEMS = 50
VALUES = {key: MEASURES[key] for key in ("perplexity", "sentiment", "problems")}  # the measures of its page


def _table(name: str, rows: Iterable[dict[str, Any]], **values: Any) -> Result:
    """A table of which a report leaves out what has no figure of ours."""
    made = table(name, rows, **values)
    ours = [cell for row in made.values["rows"] for title, cell in row.items() if title.lower().endswith("here")]
    return replace(made, empty=all(cell in (None, "not measured") for cell in ours))


def by_model(comparison: Comparison, name: str) -> Result:
    """One of its tables with a row a model, its figures beside this run's: "original-models", "original-perplexity",
    "original-tasks" or "original-stages"."""
    stages = stage_changes(comparison)
    previous: dict[str, float] = {}
    rows = []
    for model, there in ORIGINAL["model"].items():
        if name == "original-stages" and model not in LINEAGE:
            continue
        rows.append(
            {
                "name": MODELS[model]["name"],
                "there": there | _changes(there, previous),
                "parameters": total_parameters(comparison, model) if model in comparison.models else None,
                "recipe": recipe(comparison, model) if model in comparison.models else None,
                "here": {key: comparison.value(key, model) for key in VALUES},
                "against": None if model == "gpt2" else difference(comparison, "perplexity", "gpt2", model),
                "change": {key: stages.get((STAGES, key, model)) for key in VALUES},
                "total": {key: stages.get((SINCE if model == "dpo" else STAGES, key, model)) for key in VALUES},
            }
        )
        previous = there
    return _table(name, rows)


def _changes(there: dict[str, Any], previous: dict[str, Any]) -> dict[str, Any]:
    """Its figures as they are printed, and their changes: against GPT-2, from the row before, since pretraining."""
    found: dict[str, Any] = {}
    first, gpt2 = ORIGINAL["model"]["pretrain"], ORIGINAL["model"]["gpt2"]
    for key, measure in VALUES.items():
        if key not in there:
            continue
        found[key] = estimate(there[key], **UNITS[measure.unit]["value"])
        for name, base in (("against", gpt2), ("change", previous), ("total", first)):
            if key in base and there is not base:
                change = there[key] / base[key] - 1 if measure.unit == "perplexity" else there[key] - base[key]
                found[f"{name}_{key}"] = measure.change_text(change)
    return found


def standing(comparison: Comparison) -> Result:
    """Where its page says that its model matches, exceeds or lags GPT-2, and what our last stage does here."""
    last = comparison.lineage[-1] if comparison.lineage else ""
    after = {"bits_per_byte": "pretrain", "sentiment": "pretrain"}  # where its page speaks of the pretrained model
    every = compared(comparison, "gpt2")
    found = {one.measure.key: one for one in every if one.b == after.get(one.measure.key, last)}
    words = {"better": "exceeds", "worse": "lags", "equivalent": "matches"}
    rows = []
    for key, there in ORIGINAL["standing"].items():
        one = found.get(key)
        here = one and words.get(one.verdict, one.verdict)
        title = MEASURES[key].title if key in MEASURES else "Generation speed"
        speed = _speed(comparison, "gpt2", last)
        ours = (here, one and one.text) if key in MEASURES else (speed and "no test", speed)
        rows.append({"title": title, "there": there, "verdict": ours[0], "text": ours[1]})
    return _table("original-standing", rows)


def _speed(comparison: Comparison, a: str, b: str) -> str | None:
    """Decoding speed of b at batch 1 as a multiple of a's, where their timings were interleaved."""
    rates = [comparison.metric(model, "speed", "decode_b1") for model in (a, b)]
    return f"{rates[1].value / rates[0].value:.2f}×" if all(rates) and comparison.timed_together else None


def distilgpt2(comparison: Comparison) -> Result:
    """Goal, size, speed and perplexity of DistilGPT-2 against GPT-2."""
    there, pair = ORIGINAL["distilgpt2"], ("gpt2", "distilgpt2")
    sizes = [total_parameters(comparison, model) for model in pair]
    change = difference(comparison, "perplexity", *pair) if set(pair) <= set(comparison.models) else None
    share = percent(sizes[1] / sizes[0]) if all(sizes) else None
    rows = [
        ("Goal", there["goal"], "the same goal" if change else None),
        ("Parameters, share of GPT-2’s", percent(there["parameters"]), share),
        ("Decoding speed", there["speed"], _speed(comparison, *pair)),
        ("Perplexity", there["perplexity"], change and change.text),
    ]
    return _table("original-distilgpt2", ({"Aspect": row, "There": theirs, "Here": ours} for row, theirs, ours in rows))


def spread(comparison: Comparison) -> Result:
    """How far its figures and ours move over the stages: range, and range as a share of the mean."""
    rows = []
    for key, measure in VALUES.items():
        here = [row.value for stage in LINEAGE if (row := comparison.value(key, stage)) is not None]
        there = [ORIGINAL["model"][stage][key] for stage in LINEAGE]
        rows.append({"title": measure.title, "there": _range(measure, there), "here": _range(measure, here)})
    return _table("original-spread", rows)


def _range(measure: Any, values: list[float]) -> dict[str, str | None]:
    """Of three stages or fewer: the range in the value's unit, and as a share of the mean."""
    if len(values) < 2:
        return {"range": None, "share": None}
    width, mean = max(values) - min(values), statistics.fmean(values)
    return {"range": measure.spread_text(width), "share": percent(width / mean) if mean else None}


def efficiency(comparison: Comparison) -> Result:
    """Hours and tokens of its stages beside ours, with a total, and GPT-2's as its page cites them."""
    ours = {one.stage: one for one in training.trainings(comparison, *LINEAGE)}
    if len(ours) > 1:
        ours["total"] = training.total(list(ours.values()))
    names = {key: model["name"] for key, model in MODELS.items()} | {"total": "Total"}
    rows = [{"name": names[row["name"]], "there": row, "one": ours.get(row["name"])} for row in ORIGINAL["efficiency"]]
    return _table("original-efficiency", rows)


def rerun(comparison: Comparison) -> Result:
    """Its figures as claimed, by its protocols rerun here, and by this report's."""
    found = []  # key, measure, what it is of, claimed, by its protocol, by ours
    for row in ORIGINAL["figure"]:
        a, b, sound = row["a"], row["b"], row["sound"]
        changes = (difference(comparison, measure, a, b) for measure in (row["rerun"], sound))
        of = f"{comparison.name(b)} against {comparison.name(a)}"
        found.append((f"{sound}-{b}", sound, of, row["claimed"], *map(_figure, changes)))
    if comparison.lineage:
        last = comparison.lineage[-1]
        figures = first_problems(comparison, last), _figure(comparison.value("problems", last))
        found.append(("problems", "problems", comparison.name(last), percent(0), *figures))
    if "random" in comparison.models:
        figures = (_figure(comparison.value(key, "random")) for key in ("sentiment_prompt", "sentiment"))
        found.append(("control", "sentiment", comparison.name("random"), "–", *figures))
    values, rows = {}, []
    for key, measure, of, claimed, *figures in found:
        values[key] = {"claimed": claimed, "rerun": figures[0], "sound": figures[1]}
        texts = [figure["text"] if figure else "not measured" for figure in figures]
        title = f"{MEASURES[measure].title}, {of}"
        rows.append({"title": title, "claimed": claimed, "rerun": texts[0], "sound": texts[1]})
    return _table("original-rerun", rows, figures=values)


def _figure(one: Any) -> dict[str, Any] | None:
    """A difference, or a row of the long table, as JSON with its text; None for what was not measured."""
    if one is None:
        return None
    value, text = (one.change, one.text) if isinstance(one, Difference) else (one.value, value_text(one))
    return {"value": value, "low": one.low, "high": one.high, "n": one.n, "text": f"{text}, {number_of(one.n)}"}


def first_problems(comparison: Comparison, model: str, count: int = PROBLEM_ITEMS) -> dict[str, Any] | None:
    """Strict matches among the first `count` word problems, with Wilson's interval; None without per-item results."""
    row = comparison.value("problems", model)
    items = comparison.items(model, row.protocol) if row else None
    if items is None:
        return None
    first = items.sort_values("item")["correct"].to_numpy(float)[:count]
    return _figure(row._replace(**wilson(float(first.sum()), len(first))._asdict()))


def statements(comparison: Comparison) -> Result:
    """What its code does, with file and line, and what samples as small as its own can resolve."""
    lines = [f"- {one['text']} ({', '.join(f'`{place}`' for place in one['where'])})" for one in ORIGINAL["statement"]]
    half, none = wilson(PRECEDENT_ITEMS / 2, PRECEDENT_ITEMS), wilson(0, PROBLEM_ITEMS)
    least = detectable_difference(PRECEDENT_ITEMS)
    control = comparison.value("sentiment_prompt", "random")
    fields = {
        "n": PRECEDENT_ITEMS, "problems": PROBLEM_ITEMS, "least": 100 * least, "most": none.high,
        "half": estimate(*half[:3], **UNITS["share"]["value"]),
    }  # fmt: skip
    lines.append(f"- {say('original-widths', **fields)}")
    if control is not None:
        lines.append(f"- {say('original-control', shown=value_text(control), n=control.n)}")
    values = {"accuracy": half._asdict(), "smallest_detectable": least, "none_right": none._asdict()}
    return Result("comparison/original-statements", values, markdown="\n".join(lines))
