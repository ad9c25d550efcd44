"""`threefold compare`: the headline figures of two or more runs side by side, and where their presets differ."""

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from basics.errors import ConfigError
from study.cli.common import columns, open_intact, say, say_json, warn_if_behind
from study.comparison import Comparison, tables
from study.comparison.measures import HEADLINE, MEASURES
from study.comparison.models import ordered
from study.comparison.results import NBSP, value_text
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
    groups: dict[tuple, dict] = {}  # of one measure, model and protocol: {conditions: {run: its figure}}
    for figure, name, text in _figures(runs):
        group = groups.setdefault((figure["measure"], name, figure["protocol"]), {})
        group.setdefault(tuple(figure["conditions"].items()), {})[figure["run"]] = text
    figures = []
    for (key, name, protocol), group in groups.items():
        title, shared = MEASURES[key].heading.replace(NBSP, " "), set.intersection(*map(set, group))
        for conditions, cells in group.items():
            differing = [" ".join(condition) for condition in conditions if condition not in shared]
            own = [cells.get(run.name) or "–" for run in runs]
            figures.append([title, name, ", ".join([protocol, *differing]), *own])
    keys = [
        [key, *(values[run.name] or "–" for run in runs)]
        for key, values in differing_keys({run.name: to_dict(run.preset) for run in runs}).items()
    ]
    names = [f"run {run.name}" for run in runs]
    headings = ["Measure", "Model", "Protocol", *names]
    shown = columns(figures, headings) if figures else "No headline figure was measured."
    return "\n\n".join([shown, FOOT, columns(keys, ["Key", *names]) if keys else "The presets are the same."])


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """{"runs", "figures": [{"run", "measure", "model", "protocol", "conditions", "value", "low", "high"}], "differing":
    {key: {run: value}}}: what `side_by_side` shows, under the same rules. Raises what `side_by_side` raises."""
    differing = {
        key: {run: text and json.loads(text) for run, text in values.items()}
        for key, values in differing_keys({run.name: to_dict(run.preset) for run in runs}).items()
    }
    figures = [figure for figure, *_ in _figures(runs)]
    return {"runs": [run.name for run in runs], "figures": figures, "differing": differing}


def _figures(runs: Sequence[Run]) -> Iterator[tuple[dict[str, Any], str, str | None]]:
    """(the figure as JSON, the model's name, its value with its interval as text) of the headline figures.

    Conditions are what was measured on what, as in {"n": "872", "data": "fc8ff935"}.
    """
    comparisons = {run.name: Comparison.load(run) for run in runs}
    headlines = {run: tables.headline(comparison).values for run, comparison in comparisons.items()}
    models = ordered(model for comparison in comparisons.values() for model in comparison.models)
    for key, model, run in itertools.product(HEADLINE, models, comparisons):
        comparison, headline = comparisons[run], headlines[run]
        protocol, entry = headline["protocols"].get(key), headline["models"].get(model, {}).get(key)
        if protocol is None or entry is None:
            continue
        settings = comparison.settings(model, protocol)
        data = settings.get("data") or {}
        source = str(data.get("fingerprint") or data.get("source"))[:8]
        conditions = {"version": str(settings.get("version")), "data": source, "n": str(entry["n"])}
        if key == "perplexity":  # without a tokenizer's hash nothing is known to be the same
            conditions["tokenizer"] = (settings.get("tokenizer_sha256") or f"of run {run}")[:8]
        figure = {"run": run, "measure": key, "model": model, "protocol": protocol, "conditions": conditions}
        figure |= {name: entry[name] for name in ("value", "low", "high")}
        yield figure, comparison.name(model), value_text(comparison.value(key, model))


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
