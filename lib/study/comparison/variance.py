"""What the scores of a sentiment protocol vary with: models, wordings, demonstrations, items."""

from typing import Any

import numpy as np

from study.comparison.load import Comparison
from study.comparison.measures import fuller
from study.comparison.results import Result, percent, plain
from study.comparison.tables import markdown_table

_TITLES = {
    "model": "model",
    "template": "template (wording)",
    "draw": "demonstration draw",
    "item": "item",
    "model_item": "model × item",
    "residual": "residual",
}
_FACTORS = ("model", "template", "draw", "item")


def scores(comparison: Comparison, protocol: str) -> tuple[np.ndarray, dict[str, list]] | None:
    """Right or wrong of every trained model: models x templates x draws x items of 0/1, and the levels of each.

    The items and cells are those that all models share; None with fewer than two models or incomplete cells.
    """
    frames = {
        model: frame
        for model in comparison.models
        if model != "random"
        and (frame := comparison.items(model, protocol)) is not None
        and {"item", "template", "draw", "correct"} <= set(frame.columns)
    }
    if len(frames) < 2:
        return None
    wide = {
        model: frame.pivot(index="item", columns=["template", "draw"], values="correct")
        for model, frame in frames.items()
    }
    first = next(iter(wide.values()))
    templates = list(dict.fromkeys(first.columns.get_level_values("template")))
    draws = sorted(set(first.columns.get_level_values("draw")))
    cells = [(template, draw) for template in templates for draw in draws]
    if any(set(table.columns) != set(cells) for table in wide.values()):
        return None
    shared = sorted(set.intersection(*(set(table.index) for table in wide.values())))
    stacked = np.stack([table.loc[shared, cells].to_numpy(float).T for table in wide.values()])
    if not len(shared) or np.isnan(stacked).any():
        return None
    levels = {"model": list(wide), "template": templates, "draw": draws, "item": shared}
    return stacked.reshape(len(wide), len(templates), len(draws), len(shared)), levels


def table(comparison: Comparison) -> Result:
    """Variance components of sentiment accuracy by protocol, of one answer right or wrong.

    A factor with one level has no variance to estimate: its cell says so, and what it contributes lies in the others.
    The last column is what the templates, draws and items at hand leave uncertain in one model's accuracy.
    """
    from threefold.evaluation.statistics import variance_components

    rows: list[dict[str, Any]] = []
    values: dict[str, Any] = {}
    for protocol in comparison.protocols:
        if "/precedent" in protocol or not protocol.endswith(("-shot", "-grid")):
            continue
        if fuller(comparison, protocol) != protocol:
            continue
        found = scores(comparison, protocol)
        if found is None:
            continue
        correct_MTDI, levels = found
        components = variance_components(correct_MTDI)._asdict()
        counts = {name: len(levels[name]) for name in _FACTORS}
        values[protocol] = {"components": components, "levels": counts}
        for name, title in _TITLES.items():
            part, error = components[name], components.get(f"se_{name}")
            row: dict[str, Any] = {
                "Protocol": protocol,
                "Source": title,
                "Levels": f"{counts[name]:,}" if name in counts else None,
                "Variance (pp²)": "one level: not estimated" if part is None else plain(1e4 * part, 1),
                "Share": percent(max(part, 0.0) / components["total"])
                if part is not None and components["total"]
                else None,
                "SE of a model's accuracy (pp)": plain(100 * error, 2) if error is not None else None,
            }
            rows.append(row)
    shown = [row | ({"Protocol": ""} if place % len(_TITLES) else {}) for place, row in enumerate(rows)]
    none = "*Per-item results of two or more trained models on one sentiment protocol are not at hand.*"
    return Result("comparison/variance", {"protocols": values}, markdown=markdown_table(shown) if rows else none)
