"""Two or more runs side by side: their headline figures and where their presets differ."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from study.comparison import Comparison, tables
from study.comparison.load import Value
from study.comparison.measures import HEADLINE, PERPLEXITY, Measure
from study.comparison.models import ordered
from study.preset import to_dict
from study.run import Run

FOOT = (
    "Each interval is its own run's 95%, over items. Whether two runs differ is not tested here: item by item only the "
    "models of one run are compared (`threefold report`), and another seed of training moves a figure too."
)


@dataclass(frozen=True)
class Figure:
    """One headline figure of one run. Figures of two runs share a row if protocol and conditions are equal."""

    run: str
    measure: Measure
    model: str
    name: str  # of the model, for a reader
    protocol: str
    conditions: tuple[tuple[str, str], ...]  # what was measured on what: ("n", "872"), ("data", "fc8ff935"), ...
    value: Value


def side_by_side(runs: Sequence[Run]) -> str:
    """Markdown: the headline figures with their intervals, a row per measure and model and a column per run; then the
    keys of the presets that differ.

    Figures share a row only if they come from one protocol and version, the same data and number of items and, for
    perplexity per token, the same tokenizer; otherwise the row says by what it differs.
    Raises MissingInput (a notebook that was not run), RecordError (weights that are not the stage's).
    """
    rows = list(_figure_rows(_figures(runs), [run.name for run in runs]))
    keys = preset_rows({run.name: to_dict(run.preset) for run in runs})
    figures = tables.markdown_table(rows) if rows else "*No headline figure was measured.*"
    return "\n\n".join([figures, FOOT, tables.markdown_table(keys) if keys else "*The presets are the same.*"])


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """{"runs", "figures": [{"run", "measure", "model", "protocol", "conditions", "value", "low", "high"}], "differing":
    {key: {run: value}}}: what `side_by_side` shows, under the same rules. Raises what `side_by_side` raises."""
    figures = [
        {name: getattr(figure, name) for name in ("run", "model", "protocol")}
        | {name: getattr(figure.value, name) for name in ("value", "low", "high")}
        | {"measure": figure.measure.key, "conditions": dict(figure.conditions)}
        for figure in _figures(runs)
    ]
    differing = {
        row.pop("Key"): {name.removeprefix("run "): text and json.loads(text) for name, text in row.items()}
        for row in preset_rows({run.name: to_dict(run.preset) for run in runs})
    }
    return {"runs": [run.name for run in runs], "figures": figures, "differing": differing}


def _figures(runs: Sequence[Run]) -> list[Figure]:
    """The figures of each run's headline table."""
    figures = []
    for run in runs:
        comparison = Comparison.load(run)
        headline = tables.headline(comparison).values
        for measure, model in itertools.product(HEADLINE, comparison.models):
            protocol = headline["protocols"].get(measure.key)
            entry = headline["models"].get(model, {}).get(measure.key)
            if protocol is None or entry is None:
                continue
            settings = comparison.evaluations(model)[protocol].get("settings", {})
            data = settings.get("data") or {}
            conditions = {
                "version": settings.get("version"),
                "data": str(data.get("fingerprint") or data.get("source"))[:8],
                "n": entry["n"],
            }
            if measure is PERPLEXITY:  # without a tokenizer's hash nothing is known to be the same
                conditions["tokenizer"] = (settings.get("tokenizer_sha256") or f"of run {run.name}")[:8]
            value = Value(**entry, protocol=protocol, metric=measure.metric)
            texts = tuple((name, str(condition)) for name, condition in conditions.items())
            figures.append(Figure(run.name, measure, model, comparison.name(model), protocol, texts, value))
    return figures


def _figure_rows(figures: Sequence[Figure], runs: Sequence[str]) -> Iterator[dict[str, Any]]:
    models = ordered(figure.model for figure in figures)
    rows: dict[tuple, dict[str, str]] = {}
    for figure in sorted(figures, key=lambda figure: (HEADLINE.index(figure.measure), models.index(figure.model))):
        row = rows.setdefault((figure.measure, figure.name, figure.protocol, figure.conditions), {})
        row[figure.run] = figure.measure.text(figure.value) or "–"
    for (measure, name, protocol, conditions), cells in rows.items():
        alike = [dict(other) for *row, other in rows if row == [measure, name, protocol]]
        differing = [f"{key} {value}" for key, value in conditions if any(other.get(key) != value for other in alike)]
        yield {
            "Measure": f"{measure.title} {'↓' if measure.better == 'lower' else '↑'}",
            "Model": name,
            "Protocol": ", ".join([protocol, *differing]),
            **{f"run {run}": cells.get(run) for run in runs},
        }


def preset_rows(presets: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per key whose value is not the same in all presets; a key that a preset does not have is None."""
    flat = {run: dict(_flat(preset)) for run, preset in presets.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    return [
        {"Key": key, **{f"run {run}": values.get(key) for run, values in flat.items()}}
        for key in keys
        if len({values.get(key) for values in flat.values()}) > 1
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as TOML would show it); a list of tables by its places, another list as one value."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, json.dumps(value, ensure_ascii=False)
