"""What the scores of a sentiment protocol vary with: models, wordings, demonstrations, items."""

import math
from dataclasses import replace

import numpy as np

from study.comparison.load import Comparison
from study.comparison.models import SHOWN
from study.comparison.results import Result, plain, table
from threefold.evaluation.statistics import student_half_width, variance_components


def fuller(comparison: Comparison, protocol: str | None) -> str | None:
    """The protocol that asks the same prompts with every template and draw, where it was measured (of fewer items);
    else the protocol itself."""
    grid = f"{protocol}-grid"
    return grid if grid in comparison.protocols else protocol


def scores(comparison: Comparison, protocol: str) -> tuple[np.ndarray, dict[str, list]] | None:
    """Right or wrong of every stage and baseline: models x templates x draws x items of 0/1, and the levels of each.

    A model from elsewhere is left out: one that saw far more text would by itself decide how far models differ. The
    items and cells are those that all models share; None with fewer than two models or incomplete cells.
    """
    wide = {}
    for model in (*filter(comparison.trained_here, comparison.baselines), *comparison.lineage):
        frame = comparison.items(model, protocol)
        if frame is not None and {"item", "template", "draw", "correct"} <= set(frame.columns):
            wide[model] = frame.pivot(index="item", columns=["template", "draw"], values="correct")
    if len(wide) < 2:
        return None
    columns = next(iter(wide.values())).columns
    templates, draws = list(columns.unique("template")), sorted(columns.unique("draw"))
    cells = [(template, draw) for template in templates for draw in draws]
    if any(set(answers.columns) != set(cells) for answers in wide.values()):
        return None
    shared = sorted(set.intersection(*(set(answers.index) for answers in wide.values())))
    stacked = np.stack([answers.loc[shared, cells].to_numpy(float).T for answers in wide.values()])
    if not len(shared) or np.isnan(stacked).any():
        return None
    levels = {"model": list(wide), "template": templates, "draw": draws, "item": shared}
    return stacked.reshape(*map(len, levels.values())), levels


def components(comparison: Comparison) -> Result:
    """Variance components of sentiment accuracy by protocol, of one answer right or wrong.

    A factor with one level has no variance to estimate: its cell says so, and what it contributes lies in the others.
    The last column is what the templates, draws and items at hand leave uncertain in one model's accuracy.
    """
    found, values = [], {}
    for protocol in comparison.protocols:
        prompts = protocol.endswith(("-shot", "-grid")) and "/precedent" not in protocol
        crossed = scores(comparison, protocol) if prompts and fuller(comparison, protocol) == protocol else None
        if crossed is None:
            continue
        parts = variance_components(crossed[0])._asdict()
        levels = {factor: len(names) for factor, names in crossed[1].items()}
        values[protocol] = {"components": parts, "levels": levels}
        for source, title in SHOWN["variance"].items():
            part, error = parts[source], parts.get(f"se_{source}")
            found.append(
                {
                    "protocol": protocol,
                    "source": title,
                    "levels": levels.get(source),
                    "variance": "one level: not estimated" if part is None else plain(1e4 * part, 1),
                    "share": None if part is None or not parts["total"] else max(part, 0.0) / parts["total"],
                    "error": None if error is None else 100 * error,
                }
            )
    none = "*Per-item results of two or more trained models on one sentiment protocol are not at hand.*"
    return replace(table("variance", found, none=none), values={"protocols": values})


def method_against_model(scores_NMT: np.ndarray) -> tuple[float, float, float, float]:
    """Variance over templates (within models, averaged), over models (of their means), and the 95% interval of the
    first less the second. scores_NMT: items x models x templates.

    Means over few items differ by chance alone, which variances of observed means would count as spread, more of it
    over templates than over models. Both are therefore averaged over pairs of *distinct* items, which is unbiased
    (Hoeffding 1948: a U-statistic of degree two), and may come out below zero. Interval: jackknife over items with
    Student's t; models and templates are taken as they are.
    """
    n, models_, templates = scores_NMT.shape
    within_NMT = scores_NMT - scores_NMT.mean(axis=2, keepdims=True)
    means_NM = scores_NMT.mean(axis=2)
    between_NM = means_NM - means_NM.mean(axis=1, keepdims=True)
    parts = []  # either variance is a sum of squares of linear scores of the items
    for scores_NC, freedom in ((within_NMT.reshape(n, -1), models_ * (templates - 1)), (between_NM, models_ - 1)):
        scaled_NC = scores_NC / math.sqrt(freedom)
        total_C, own_N = scaled_NC.sum(axis=0), (scaled_NC**2).sum(axis=1)
        whole = float((total_C**2).sum() - own_N.sum()) / (n * (n - 1))
        rest_N = ((total_C - scaled_NC) ** 2).sum(axis=1) - (own_N.sum() - own_N)
        parts.append((whole, rest_N / ((n - 1) * (n - 2))))
    (method, method_N), (model, model_N) = parts
    left_out_N = method_N - model_N
    error = math.sqrt((n - 1) / n * float(((left_out_N - left_out_N.mean()) ** 2).sum()))
    half = student_half_width(error, n - 1)
    return method, model, method - model - half, method - model + half
