"""Two or more runs side by side: their headline figures and where their presets differ."""

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
    """One headline figure of one run, with what must be the same in another run to stand in its row."""

    run: str
    measure: Measure
    model: str
    name: str  # of the model, for a reader
    protocol: str
    conditions: tuple[tuple[str, str], ...]  # what was measured on what: ("n", "872"), ("data", "fc8ff935"), ...
    value: Value

    @property
    def text(self) -> str:
        return self.measure.text(self.value) or "–"


def side_by_side(runs: Sequence[Run]) -> str:
    """Markdown: the headline figures with their intervals, a row a measure and model and a column a run; then the keys
    of the presets that differ.

    Figures share a row only if they come from one protocol and version, the same data and number of items and, for
    perplexity per token, the same tokenizer; otherwise the row says by what it differs.
    Raises MissingInput (a notebook that was not run), RecordError (weights that are not the stage's).
    """
    figures = _figures(runs)
    rows = [] if not figures else list(_figure_rows(figures, [run.name for run in runs]))
    keys = preset_rows({run.name: to_dict(run.preset) for run in runs})
    parts = [
        tables.markdown_table(rows) if rows else "*No headline figure was measured.*",
        FOOT,
        tables.markdown_table(keys) if keys else "*The presets are the same.*",
    ]
    return "\n\n".join(parts)


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """{"runs", "figures": [{"run", "measure", "model", "protocol", "conditions", "value", "low", "high"}], "differing":
    {key: {run: value}}}: what `side_by_side` shows, under the same rules. Figures compare if their protocol and
    conditions are equal. Raises what `side_by_side` raises."""
    figures = [
        {
            "run": one.run,
            "measure": one.measure.key,
            "model": one.model,
            "protocol": one.protocol,
            "conditions": dict(one.conditions),
            "value": one.value.value,
            "low": one.value.low,
            "high": one.value.high,
        }
        for one in _figures(runs)
    ]
    keys = preset_rows({run.name: to_dict(run.preset) for run in runs})
    differing = {
        row["Key"]: {run.name: None if (text := row[f"run {run.name}"]) is None else json.loads(text) for run in runs}
        for row in keys
    }
    return {"runs": [run.name for run in runs], "figures": figures, "differing": differing}


def _figures(runs: Sequence[Run]) -> list[Figure]:
    return [figure for run in runs for figure in headline_figures(run.name, Comparison.load(run))]


def headline_figures(run: str, comparison: Comparison) -> list[Figure]:
    """The figures of the report's headline table."""
    found = tables.headline(comparison).values
    figures = []
    for measure in HEADLINE:
        protocol = found["protocols"].get(measure.key)
        for model in comparison.models:
            entry = found["models"].get(model, {}).get(measure.key)
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
                conditions["tokenizer"] = (settings.get("tokenizer_sha256") or f"of run {run}")[:8]
            value = Value(**entry, protocol=protocol, metric=measure.metric)
            known = tuple((name, str(condition)) for name, condition in conditions.items())
            figures.append(Figure(run, measure, model, comparison.name(model), protocol, known, value))
    return figures


def _figure_rows(figures: Sequence[Figure], runs: Sequence[str]) -> Iterator[dict[str, Any]]:
    models = ordered(figure.model for figure in figures)
    places = sorted(figures, key=lambda figure: (HEADLINE.index(figure.measure), models.index(figure.model)))
    rows: dict[tuple, dict[str, str]] = {}
    for one in places:
        rows.setdefault((one.measure, one.name, one.protocol, one.conditions), {})[one.run] = one.text
    for (measure, name, protocol, conditions), cells in rows.items():
        beside = [
            dict(other) for what, model, where, other in rows if (what, model, where) == (measure, name, protocol)
        ]
        telling = [f"{key} {value}" for key, value in conditions if any(other.get(key) != value for other in beside)]
        yield {
            "Measure": f"{measure.title} {'↓' if measure.better == 'lower' else '↑'}",
            "Model": name,
            "Protocol": ", ".join([protocol, *telling]),
            **{f"run {run}": cells.get(run) for run in runs},
        }


def preset_rows(presets: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a key whose value is not the same in all presets; a key that a preset does not have is None."""
    flat = {run: dict(_flat(preset)) for run, preset in presets.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    return [
        {"Key": key, **{f"run {run}": values.get(key) for run, values in flat.items()}}
        for key in keys
        if len({values.get(key) for values in flat.values()}) > 1
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as TOML would show it); a list of tables by its places, another list as one value."""
    tables_ = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
    if isinstance(value, Mapping) or tables_:
        for name, item in enumerate(value) if tables_ else value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, json.dumps(value, ensure_ascii=False)
