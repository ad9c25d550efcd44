"""What the scores of a sentiment protocol vary with: models, wordings, demonstrations, items."""

import math
from typing import Any

import numpy as np

from threefold.comparison.load import Comparison
from threefold.comparison.results import Result, plain
from threefold.comparison.tables import markdown_table

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
    """
    from threefold.evaluation.statistics import variance_components

    rows: list[dict[str, Any]] = []
    values: dict[str, Any] = {}
    for protocol in comparison.protocols:
        found = scores(comparison, protocol) if protocol.endswith("-shot") else None
        if found is None or "/precedent" in protocol:
            continue
        correct_MTDI, levels = found
        components = variance_components(correct_MTDI)._asdict()
        known = {name: components[name] for name in _TITLES if name not in _FACTORS or len(levels[name]) > 1}
        total = sum(max(value, 0.0) for value in known.values())
        counts = {name: len(levels[name]) for name in _FACTORS}
        values[protocol] = {"components": known, "levels": counts}
        for name, title in _TITLES.items():
            count = counts.get(name)
            row: dict[str, Any] = {
                "Protocol": protocol,
                "Source": title,
                "Levels": "–" if count is None else f"{count:,}",
            }
            if name not in known:
                row |= {"Variance (pp²)": "one level: not estimated", "sd (pp)": "–", "Share": "–"}
            else:
                part = max(known[name], 0.0)
                row |= {
                    "Variance (pp²)": plain(1e4 * known[name], 1),
                    "sd (pp)": plain(100 * math.sqrt(part), 1),
                    "Share": f"{100 * part / total:.1f}%" if total else "–",
                }
            rows.append(row)
    shown = [row | ({"Protocol": ""} if place % len(_TITLES) else {}) for place, row in enumerate(rows)]
    none = "*Per-item results of two or more trained models on one sentiment protocol are not at hand.*"
    return Result("comparison/variance", {"protocols": values}, markdown=markdown_table(shown) if rows else none)
