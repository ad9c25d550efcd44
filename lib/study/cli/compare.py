"""`threefold compare`: the headline figures of two or more runs side by side, and where their presets differ."""

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from basics.errors import ConfigError
from study.cli.common import columns, open_intact, say, say_json, warn_if_behind
from study.comparison import Comparison, tables
from study.comparison.measures import HEADLINE, MEASURES, Measure
from study.comparison.models import ordered
from study.comparison.results import value_text
from study.preset import to_dict
from study.run import Run

FOOT = (
    "Each interval is its own run's 95%, over items. Whether two runs differ is not tested here: item by item only the "
    "models of one run are compared (`threefold report`), and another seed of training moves a figure too."
)


def compare(options: argparse.Namespace) -> int:
    twice = next((name for name in options.runs if options.runs.count(name) > 1), None)
    if twice or len(options.runs) < 2:
        raise ConfigError(f"compare: run {twice} is named twice" if twice else "compare: name two runs or more")
    runs = [open_intact(name) for name in options.runs]
    shown = as_json(runs) if options.json else side_by_side(runs)
    for run in runs:
        warn_if_behind(run, f"the figures of run {run.name} show")
    (say_json if options.json else say)(shown)
    return 0


def side_by_side(runs: Sequence[Run]) -> str:
    """Text: the headline figures with their intervals, a row per measure and model and a column per run; then the keys
    of the presets that differ.

    Figures share a row only if they come from one protocol and version, the same data and number of items and, for
    perplexity per token, the same tokenizer; otherwise the row says by what it differs.
    Raises MissingInput (a notebook that was not run), RecordError (weights that are not the stage's).
    """
    groups: dict[
        tuple, dict[tuple, dict[str, str]]
    ] = {}  # the figures of one measure, model and protocol, by conditions
    for measure, name, protocol, value, figure in _figures(runs):
        group = groups.setdefault((measure, name, protocol), {})
        group.setdefault(tuple(figure["conditions"].items()), {})[figure["run"]] = value_text(value)
    figures = [
        [
            f"{measure.title} {'↓' if measure.better == 'lower' else '↑'}",
            name,
            ", ".join([protocol, *(f"{key} {text}" for key, text in conditions if _differs(key, text, group))]),
            *(cells.get(run.name) or "–" for run in runs),
        ]
        for (measure, name, protocol), group in groups.items()
        for conditions, cells in group.items()
    ]
    keys = [
        [key, *("–" if values[run.name] is None else values[run.name] for run in runs)]
        for key, values in differing_keys({run.name: to_dict(run.preset) for run in runs}).items()
    ]
    names = [f"run {run.name}" for run in runs]
    headings = ["Measure", "Model", "Protocol", *names]
    shown = columns(figures, headings) if figures else "No headline figure was measured."
    return "\n\n".join([shown, FOOT, columns(keys, ["Key", *names]) if keys else "The presets are the same."])


def _differs(key: str, text: str, group: Mapping[tuple, Any]) -> bool:
    return any(dict(conditions).get(key) != text for conditions in group)


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """{"runs", "figures": [{"run", "measure", "model", "protocol", "conditions", "value", "low", "high"}], "differing":
    {key: {run: value}}}: what `side_by_side` shows, under the same rules. Raises what `side_by_side` raises."""
    differing = {
        key: {run: text and json.loads(text) for run, text in values.items()}
        for key, values in differing_keys({run.name: to_dict(run.preset) for run in runs}).items()
    }
    figures = [figure for *_, figure in _figures(runs)]
    return {"runs": [run.name for run in runs], "figures": figures, "differing": differing}


def _figures(runs: Sequence[Run]) -> Iterator[tuple[Measure, str, str, Any, dict[str, Any]]]:
    """(measure, the model's name, protocol, row of the long table, all of it as JSON) of the headline figures.

    Conditions are what was measured on what, as in {"n": "872", "data": "fc8ff935"}.
    """
    comparisons = {run.name: Comparison.load(run) for run in runs}
    headlines = {run: tables.headline(comparison).values for run, comparison in comparisons.items()}
    models = ordered(model for comparison in comparisons.values() for model in comparison.models)
    for key, model, run in itertools.product(HEADLINE, models, comparisons):
        measure = MEASURES[key]
        protocol = headlines[run]["protocols"].get(measure.key)
        entry = headlines[run]["models"].get(model, {}).get(measure.key)
        if protocol is None or entry is None:
            continue
        settings = comparisons[run].evaluations(model)[protocol].get("settings", {})
        data = settings.get("data") or {}
        source = str(data.get("fingerprint") or data.get("source"))[:8]
        conditions = {"version": str(settings.get("version")), "data": source, "n": str(entry["n"])}
        if measure.key == "perplexity":  # without a tokenizer's hash nothing is known to be the same
            conditions["tokenizer"] = (settings.get("tokenizer_sha256") or f"of run {run}")[:8]
        figure = {"run": run, "measure": measure.key, "model": model, "protocol": protocol, "conditions": conditions}
        figure |= {key: entry[key] for key in ("value", "low", "high")}
        row = comparisons[run].value(measure.key, model)
        yield measure, comparisons[run].name(model), protocol, row, figure


def differing_keys(presets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str | None]]:
    """{dotted key: {run: value as JSON}} of the keys whose value is not the same in all presets; None where a preset
    does not have the key."""
    flat = {run: dict(_flat(preset)) for run, preset in presets.items()}
    rows = {key: {run: flat[run].get(key) for run in flat} for values in flat.values() for key in values}
    return {key: values for key, values in rows.items() if len(set(values.values())) > 1}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as JSON); a list of tables by its places, another list as one value."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, json.dumps(value, ensure_ascii=False)
