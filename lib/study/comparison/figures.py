"""The report's figures: one colour a model, units on the axes, intervals where there are any."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from study.comparison import ablations, attention, length, models, tables
from study.comparison.load import Comparison
from study.comparison.measures import HEADLINE, INSTRUCTIONS, PERPLEXITY, PREFERENCES, PROBLEMS, SENTIMENT, Measure
from study.comparison.results import Result, percent
from study.comparison.training import smooth

INK, RULE = "#1B1F24", "#D5DAE0"
WIDTH = 7.6  # inches


def _axes(axes: Axes, *, grid: str = "y") -> Axes:
    """Two spines, quiet ticks, a light grid behind the data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#8A939C")
    axes.tick_params(colors=INK, labelsize=8.5, length=3)
    axes.grid(axis=grid, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _empty(name: str, what: str) -> Result:
    figure = Figure(figsize=(WIDTH, 1.2))
    figure.text(0.5, 0.5, what, ha="center", va="center", color=INK)
    return Result(f"comparison/{name}", {"drawn": []}, figure=figure, text=what)


def loss_curves(comparison: Comparison) -> Result:
    """Training loss against tokens, one panel a stage family, held-out points on top."""
    panels = [
        ("Pretraining and baselines", [s for s in ("gpt2", "distilgpt2", "pretrain") if _has_curve(comparison, s)]),
        ("SFT", [s for s in ("sft",) if _has_curve(comparison, s)]),
        ("DPO", [s for s in ("dpo",) if _has_curve(comparison, s)]),
    ]
    panels = [(title, stages) for title, stages in panels if stages]
    if not panels:
        return _empty("loss-curves", "No loss curve was recorded.")
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    ratios = [1.7 if len(stages) > 1 else 1.0 for _, stages in panels]
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0]
    drawn = []
    for axes, (title, stages) in zip(grid, panels, strict=True):
        _axes(axes)
        scale, unit = _token_unit(max(_x(comparison, stage)[-1] for stage in stages))
        for stage in stages:
            curve = comparison.curve(stage)
            x, loss = _x(comparison, stage) / scale, np.asarray(curve["loss"], float)
            colour = models.colour(stage)
            axes.plot(x, loss, color=colour, alpha=0.22, linewidth=0.7)
            axes.plot(x, smooth(loss), color=colour, linewidth=1.7, label=comparison.name(stage))
            heldout = curve.get("heldout") or {}
            if heldout.get("loss"):
                places = np.interp(heldout["step"], curve["step"], x)
                axes.plot(places, heldout["loss"], "o", color=colour, markeredgecolor="white", markersize=5.5)
            drawn.append(stage)
        axes.set_title(title, fontsize=9.5, color=INK, loc="left")
        axes.set_xlabel(f"tokens trained on ({unit})" if unit else "tokens trained on", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if len(stages) > 1:
            axes.legend(frameon=False, fontsize=8.5)
    grid[0].set_ylabel("training loss (nats per token)", fontsize=9)
    if panels[-1][0] == "DPO":
        grid[-1].set_ylabel("DPO loss (nats per pair)", fontsize=9)
    text = f"Loss against tokens for {', '.join(comparison.name(stage) for stage in drawn)}."
    return Result("comparison/loss-curves", {"drawn": drawn}, figure=figure, text=text)


def _has_curve(comparison: Comparison, stage: str) -> bool:
    return bool((comparison.curve(stage) or {}).get("loss"))


def _x(comparison: Comparison, stage: str) -> np.ndarray:
    curve = comparison.curve(stage)
    return np.asarray(curve.get("tokens") or curve.get("step") or np.arange(len(curve["loss"])), float)


def _token_unit(largest: float) -> tuple[float, str]:
    return (1e6, "millions") if largest >= 2e6 else (1e3, "thousands") if largest >= 2e3 else (1.0, "")


_LINES = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B8A700", "#7F7F7F")  # Okabe & Ito


def ablation_curves(variants: Mapping[str, Mapping[str, Any]]) -> Result:
    """Held-out loss against tokens of the base and each variant, means over seeds (`ablations.found`)."""
    if not variants:
        return _empty("ablation-curves", "No ablation was trained.")
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = _axes(figure.subplots())
    colours = itertools.cycle(_LINES)
    scale, unit = _token_unit(max(curve["tokens"][-1] for values in variants.values() for curve in values["curves"]))
    for name, values in variants.items():
        tokens, loss = (np.mean([curve[key][1:] for curve in values["curves"]], axis=0) for key in ("tokens", "loss"))
        style = {"color": INK, "linewidth": 2.2, "zorder": 3} if name == ablations.BASE else {"color": next(colours)}
        axes.plot(tokens / scale, loss, marker="o", markersize=3, label=name, **{"linewidth": 1.2} | style)
    axes.set_xlabel(f"tokens trained on ({unit})" if unit else "tokens trained on", fontsize=9)
    axes.set_ylabel("held-out loss (nats per token)", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    n = len(next(iter(variants.values()))["curves"])
    text = f"Held-out loss against tokens of {', '.join(variants)}; means over {n} seed{'s' if n > 1 else ''}."
    return Result("comparison/ablation-curves", {"drawn": list(variants)}, figure=figure, text=text)


def cross_model(comparison: Comparison) -> Result:
    """Every headline measure as a panel, every model as a point with its 95% interval."""
    measures = [m for m in HEADLINE if m.protocol(comparison) and m is not PERPLEXITY]
    measures = [m for m in measures if any(m.value(comparison, model) for model in comparison.models)]
    if not measures:
        return _empty("cross-model", "No headline measure was taken.")
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    height = rows * (0.24 * len(comparison.models) + 0.95)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    names = [comparison.name(model) for model in comparison.models]
    places = np.arange(len(names))[::-1]
    for index, axes in enumerate(grid.flat):
        if index >= len(measures):
            axes.set_visible(False)
            continue
        measure = measures[index]
        _axes(axes, grid="x")
        for place, model in zip(places, comparison.models, strict=True):
            value = measure.value(comparison, model)
            if value is not None:
                _point(axes, value, place, model, comparison)
        axes.set_title(measure.title, fontsize=9.5, color=INK, loc="left")
        axes.set_xlabel(f"{_unit(measure)}, {measure.better} is better", fontsize=8.5)
        axes.set_yticks(places, names, fontsize=8.5)
        axes.set_ylim(-0.6, len(names) - 0.4)
        if measure.kind == "share":
            axes.set_xlim(-0.03, 1.03)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            majority = tables.majority_class(comparison) if measure is SENTIMENT else None
            line = majority if majority is not None else 0.5 if measure is PREFERENCES else None
            if line is not None:
                axes.axvline(line, color="#8A939C", linewidth=1, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    text = f"Points with 95% intervals for {', '.join(names)} on {', '.join(m.title.lower() for m in measures)}."
    return Result("comparison/cross-model", {"measures": [m.key for m in measures]}, figure=figure, text=text)


def _unit(measure: Measure) -> str:
    return {"share": "% correct", "perplexity": "per token", "bits": "bits", "nats": "nats per token"}[measure.kind]


def _point(axes: Axes, value, place: float, model: str, comparison: Comparison) -> None:
    error = None
    if value.low is not None and value.high is not None:
        error = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
    axes.errorbar(
        value.value,
        place,
        xerr=error,
        fmt=models.MARKERS.get(model, "P"),
        color=models.colour(model, comparison.models),
        markersize=6,
        capsize=2.5,
        linewidth=1.4,
    )


def stage_evolution(comparison: Comparison) -> Result:
    """Pretrain, SFT, DPO from left to right: perplexity and tasks, with the baselines as level lines."""
    stages = models.lineage(comparison.models)
    measures = [m for m in (PERPLEXITY, SENTIMENT, PROBLEMS, INSTRUCTIONS, PREFERENCES) if m.protocol(comparison)]
    if len(stages) < 2 or not measures:
        return _empty("stage-evolution", "Fewer than two stages were evaluated.")
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    figure = Figure(figsize=(WIDTH, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    x = np.arange(len(stages))
    handles = {}
    for index, axes in enumerate(grid.flat):
        if index >= len(measures):
            axes.set_visible(False)
            continue
        measure = measures[index]
        _axes(axes)
        values = [measure.value(comparison, stage) for stage in stages]
        shown = [(place, value) for place, value in zip(x, values, strict=True) if value is not None]
        axes.plot([p for p, _ in shown], [v.value for _, v in shown], color="#8A939C", linewidth=1.2, zorder=1)
        for place, value in shown:
            stage = stages[place]
            error = None
            if value.low is not None and value.high is not None:
                error = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
            axes.errorbar(
                place, value.value, yerr=error, fmt=models.MARKERS[stage], color=models.colour(stage),
                markersize=7, capsize=3, linewidth=1.5, zorder=3,
            )  # fmt: skip
        for baseline, style in (("gpt2", (0, (5, 2))), ("distilgpt2", (0, (1.5, 1.5)))):
            value = measure.value(comparison, baseline) if baseline in comparison.models else None
            if value is not None and measure.comparable(comparison, baseline, stages[0]):
                line = axes.axhline(
                    value.value, color=models.colour(baseline), linestyle=style, linewidth=1.3, zorder=2
                )
                handles[comparison.name(baseline)] = line
        axes.set_title(f"{measure.title} ({_unit(measure)})", fontsize=9, color=INK, loc="left")
        axes.set_xticks(x, ["pretrain", "SFT", "DPO"][: len(stages)], fontsize=9)
        axes.set_xlim(-0.4, len(stages) - 0.6)
        if measure.kind == "share":
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8.5
        )
    text = f"{', '.join(m.title.lower() for m in measures)} after {', '.join(comparison.name(s) for s in stages)}."
    return Result("comparison/stage-evolution", {"measures": [m.key for m in measures]}, figure=figure, text=text)


# Okabe & Ito's colours, and a dash of its own for each, so that one tells them apart without colours too.
_MODES = {
    "full": ("#D55E00", "-"),
    "window": ("#56B4E9", (0, (1.2, 1.2))),
    "sinks": ("#009E73", (0, (7, 1.5))),
    "anew": ("#000000", (0, (4, 2, 1, 2))),
}


def length_curves(curves: length.Curves) -> Result:
    """Loss against position in contexts, a panel a variant, a line a mode; a cross where learned positions end."""
    if not curves:
        return _empty("length", "Loss past the training length was not measured.")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(WIDTH, 2.35 * rows + 0.35), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    handles = {}
    for axes, values in zip(grid.flat, curves.values(), strict=False):
        handles |= _length_panel(_axes(axes), values)
    for axes in [row[0] for row in grid]:
        axes.set_ylabel("loss (nats per token)", fontsize=8.5)
    for axes in grid.flat[max(0, len(curves) - columns) : len(curves)]:
        axes.set_xlabel("position, in training contexts", fontsize=8.5)
        axes.tick_params(labelbottom=True)
    figure.legend(
        [handles[mode] for mode in length.MODES if mode in handles],
        [length.MODES[mode] for mode in length.MODES if mode in handles],
        loc="outside lower center", ncols=4, frameon=False, fontsize=8.5,
    )  # fmt: skip
    shown = "; ".join(length.title(values) for values in curves.values())
    text = f"Loss against position on a logarithmic axis, one panel for each of: {shown}."
    return Result("comparison/length", {"drawn": list(curves)}, figure=figure, text=text)


def _length_panel(axes: Axes, values: Mapping[str, Any]) -> dict[str, Any]:
    """One variant's lines: means over seeds and streams, each seed's mean faint beside it. {mode: its line}"""
    marks = np.asarray(values["edges"], float)
    middles_B = np.sqrt(np.maximum(marks[:-1], marks[1] / 2) * marks[1:]) / values["context"]
    handles = {}
    for mode in length.present(values):
        colour, dash = _MODES[mode]
        means_SB = np.asarray(list(values["nats"][mode].values())).mean(axis=1)
        x_B = middles_B[: means_SB.shape[1]]
        if len(means_SB) > 1:
            axes.plot(x_B, means_SB.T, color=colour, alpha=0.25, linewidth=0.6)
        (handles[mode],) = axes.plot(x_B, means_SB.mean(axis=0), color=colour, linestyle=dash, linewidth=1.6)
        if means_SB.shape[1] < len(middles_B):
            end = means_SB.mean(axis=0)[-1]
            axes.plot(x_B[-1], end, marker="X", color=colour, markersize=8, markeredgecolor="white", zorder=4)
            axes.annotate(
                "the table ends", (x_B[-1], end), xytext=(7, 5), textcoords="offset points", fontsize=8, color=colour
            )
    axes.axvline(1, color="#8A939C", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(-3, values["factor"].bit_length())]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: {0.125: "⅛", 0.25: "¼", 0.5: "½"}.get(x, f"{x:g}")))
    axes.set_title(length.title(values), fontsize=9.5, color=INK, loc="left")
    return handles


_INKED = 0.4  # a share from which on a cell's number is written in white


def attention_sinks(variants: Mapping[str, Mapping[str, Any]]) -> Result:
    """A heat map a variant, layers down and heads across: `share` [L, H] of the first seed."""
    if not variants:
        return _empty("attention-sinks", "The sinks' share of attention was not measured.")
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    grid = figure.subplots(1, len(variants), squeeze=False)[0]
    for axes, values in zip(grid, variants.values(), strict=True):
        share_LH = np.asarray(values["share"], float)
        layers, heads = share_LH.shape
        image = axes.imshow(share_LH, vmin=0, vmax=1, cmap="cividis_r", aspect="auto")
        axes.set_title(
            f"{attention.title(values)} ({percent(share_LH.mean(), 0)})", fontsize=9.5, color=INK, loc="left"
        )
        axes.set_xticks(range(heads), [str(head + 1) for head in range(heads)], fontsize=8)
        axes.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)], fontsize=8)
        axes.set_xlabel("head", fontsize=8.5)
        axes.tick_params(length=0, colors=INK)
        for side in axes.spines.values():
            side.set_visible(False)
        if share_LH.size <= 48:
            for (layer, head), value in np.ndenumerate(share_LH):
                colour = "white" if value > _INKED else INK
                axes.text(head, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    grid[0].set_ylabel("layer", fontsize=8.5)
    bar = figure.colorbar(image, ax=list(grid), shrink=0.9, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.set_label("attention on the sinks", fontsize=8.5)
    means = "; ".join(f"{attention.title(one)} {percent(np.mean(one['share']), 0)}" for one in variants.values())
    text = f"Share of attention on the sinks by layer and head; means over all heads: {means}."
    return Result("comparison/attention-sinks", {"drawn": list(variants)}, figure=figure, text=text)
