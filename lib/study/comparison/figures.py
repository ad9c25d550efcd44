"""The report's figures: one colour a model, units on the axes, intervals where there are any."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from study.comparison import ablations, length, models
from study.comparison.differences import comparable
from study.comparison.load import Comparison
from study.comparison.measures import HEADLINE, MEASURES, Measure
from study.comparison.models import SHOWN
from study.comparison.results import UNITS, Result, percent
from study.comparison.training import smooth

INK, RULE, GREY = "#1B1F24", "#D5DAE0", "#8A939C"
WIDTH = 7.6  # inches
DASHED = (0, (4, 3))


def _style(axes: Axes, title: str = "", x: str = "", y: str = "", *, grid: str = "y", size: float = 9) -> Axes:
    """Two spines, quiet ticks, a light grid behind the data; a title on the left."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8.5, length=3)
    axes.grid(axis=grid, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=size)
    axes.set_ylabel(y, fontsize=size)
    return axes


def _panels(count: int, height: float, extra: float = 0, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, three a row of that height in inches."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows + extra), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in every[count:]:
        axes.set_visible(False)
    return figure, every[:count]


def _figure(name: str, figure: Figure | None, text: str, **values: Any) -> Result:
    """A figure's record; without a figure one that shows the text alone."""
    if empty := figure is None:
        figure, values = Figure(figsize=(WIDTH, 1.2)), {"drawn": []}
        figure.text(0.5, 0.5, text, ha="center", va="center", color=INK)
    return Result(f"comparison/{name}", values, figure=figure, text=text, empty=empty)


def _tokens(axes: Axes, largest: float) -> float:
    """Label an axis of tokens; what they are divided by."""
    scale, unit = (1e6, "millions") if largest >= 2e6 else (1e3, "thousands") if largest >= 2e3 else (1.0, "")
    axes.set_xlabel(f"tokens trained on ({unit})" if unit else "tokens trained on")
    return scale


def _point(axes: Axes, row: Any, place: float, colour: str, *, across: bool = False, **options: Any) -> None:
    """A row of the long table with its interval; across: the value on the horizontal axis."""
    error = None
    if row.low is not None and row.high is not None:
        error = [[max(0.0, row.value - row.low)], [max(0.0, row.high - row.value)]]
    x, y = (row.value, place) if across else (place, row.value)
    marker = models.marker(row.model)
    axes.errorbar(x, y, **{"xerr" if across else "yerr": error}, fmt=marker, color=colour, **options)


def _title(measures: Iterable[Measure]) -> str:
    return ", ".join(measure.title.lower() for measure in measures)


# Training ------------------------------------------------------------------------------------------------------------


def loss_curves(comparison: Comparison) -> Result:
    """Training loss against tokens, one panel a stage family, held-out points on top."""
    panels = {"Pretraining and baselines": (*models.BASELINES, "pretrain"), "SFT": ("sft",), "DPO": ("dpo",)}
    curves = {stage: comparison.values(f"curve/{stage}") or {} for stages in panels.values() for stage in stages}
    curves = {stage: curve for stage, curve in curves.items() if curve.get("loss")}
    panels = {title: [stage for stage in stages if stage in curves] for title, stages in panels.items()}
    panels = {title: stages for title, stages in panels.items() if stages}
    if not panels:
        return _figure("loss-curves", None, "No loss curve was recorded.")
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    ratios = [1.7 if len(stages) > 1 else 1.0 for stages in panels.values()]
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0]
    for axes, (title, stages) in zip(grid, panels.items(), strict=True):
        _style(axes, title)
        places = {stage: curves[stage].get("tokens") or curves[stage].get("step") for stage in stages}
        places = {stage: np.asarray(x or range(len(curves[stage]["loss"])), float) for stage, x in places.items()}
        scale = _tokens(axes, max(x[-1] for x in places.values()))
        for stage in stages:
            curve, x, colour = curves[stage], places[stage] / scale, models.colour(stage)
            loss, heldout = np.asarray(curve["loss"], float), curve.get("heldout") or {}
            axes.plot(x, loss, color=colour, alpha=0.22, linewidth=0.7)
            axes.plot(x, smooth(loss), color=colour, linewidth=1.7, label=comparison.name(stage))
            if heldout.get("loss"):
                at = np.interp(heldout["step"], curve["step"], x)
                axes.plot(at, heldout["loss"], "o", color=colour, markeredgecolor="white", markersize=5.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if len(stages) > 1:
            axes.legend(frameon=False, fontsize=8.5)
    grid[0].set_ylabel("training loss (nats per token)")
    if "DPO" in panels:
        grid[-1].set_ylabel("DPO loss (nats per pair)")
    text = f"Loss against tokens for {', '.join(map(comparison.name, curves))}."
    return _figure("loss-curves", figure, text, drawn=list(curves))


_LINES = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B8A700", "#7F7F7F")  # Okabe & Ito


def ablation_curves(variants: ablations.Variants) -> Result:
    """Held-out loss against tokens of the base and each variant, means over seeds."""
    if not variants:
        return _figure("ablation-curves", None, "No ablation was trained.")
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = _style(figure.subplots(), y="held-out loss (nats per token)")
    scale = _tokens(axes, max(curve["tokens"][-1] for values in variants.values() for curve in values["curves"]))
    colours = itertools.cycle(_LINES)
    for name, values in variants.items():
        tokens, loss = (np.mean([curve[key][1:] for curve in values["curves"]], axis=0) for key in ("tokens", "loss"))
        style = {"color": INK, "linewidth": 2.2, "zorder": 3} if name == ablations.BASE else {"color": next(colours)}
        axes.plot(tokens / scale, loss, marker="o", markersize=3, label=name, **{"linewidth": 1.2} | style)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    n = len(next(iter(variants.values()))["curves"])
    text = f"Held-out loss against tokens of {', '.join(variants)}; means over {n} seed{'s' if n > 1 else ''}."
    return _figure("ablation-curves", figure, text, drawn=list(variants))


# Results -------------------------------------------------------------------------------------------------------------


def cross_model(comparison: Comparison) -> Result:
    """Every headline measure as a panel, every model as a point with its 95% interval."""
    measures = [MEASURES[key] for key in HEADLINE if key != "perplexity" and comparison.protocol(key)]
    if not measures:
        return _figure("cross-model", None, "No headline measure was taken.")
    names = [comparison.name(model) for model in comparison.models]
    places = range(len(names))[::-1]
    figure, grid = _panels(len(measures), 0.24 * len(names) + 0.95, sharey=True)
    lines = {"sentiment": comparison.majority, "preferences": 0.5}
    for axes, measure in zip(grid, measures, strict=True):
        unit = f"{UNITS[measure.unit]['axis']}, {measure.better} is better"
        _style(axes, measure.title, unit, grid="x", size=8.5)
        for place, model in zip(places, comparison.models, strict=True):
            if row := comparison.value(measure.key, model):
                colour = models.colour(model, comparison.models)
                _point(axes, row, place, colour, across=True, markersize=6, capsize=2.5, linewidth=1.4)
        axes.set_yticks(places, names, fontsize=8.5)
        axes.set_ylim(-0.6, len(names) - 0.4)
        if measure.unit == "share":
            axes.set_xlim(-0.03, 1.03)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            if (line := lines.get(measure.key)) is not None:
                axes.axvline(line, color=GREY, linewidth=1, linestyle=DASHED)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    text = f"Points with 95% intervals for {', '.join(names)} on {_title(measures)}."
    return _figure("cross-model", figure, text, measures=[measure.key for measure in measures])


def stage_evolution(comparison: Comparison) -> Result:
    """Pretrain, SFT, DPO from left to right: perplexity and tasks, with the baselines as level lines."""
    stages = models.lineage(comparison.models)
    measures = [MEASURES[key] for key in HEADLINE if key != "bits_per_byte" and comparison.protocol(key)]
    if len(stages) < 2 or not measures:
        return _figure("stage-evolution", None, "Fewer than two stages were evaluated.")
    figure, grid = _panels(len(measures), 2.5)
    handles = {}
    for axes, measure in zip(grid, measures, strict=True):
        _style(axes)
        axes.set_title(f"{measure.title} ({UNITS[measure.unit]['axis']})", fontsize=9, color=INK, loc="left")
        rows = {place: comparison.value(measure.key, stage) for place, stage in enumerate(stages)}
        rows = {place: row for place, row in rows.items() if row is not None}
        axes.plot(rows.keys(), [row.value for row in rows.values()], color=GREY, linewidth=1.2, zorder=1)
        for place, row in rows.items():
            _point(axes, row, place, models.colour(row.model), markersize=7, capsize=3, linewidth=1.5, zorder=3)
        for baseline, style in (("gpt2", (0, (5, 2))), ("distilgpt2", (0, (1.5, 1.5)))):
            row = comparison.value(measure.key, baseline)
            if row is not None and comparable(comparison, measure.key, baseline, stages[0]):
                colour = models.colour(baseline)
                line = axes.axhline(row.value, color=colour, linestyle=style, linewidth=1.3, zorder=2)
                handles[comparison.name(baseline)] = line
        axes.set_xticks(range(len(stages)), ["pretrain", "SFT", "DPO"][: len(stages)], fontsize=9)
        axes.set_xlim(-0.4, len(stages) - 0.6)
        if measure.unit == "share":
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8.5
        )
    text = f"{_title(measures)} after {', '.join(map(comparison.name, stages))}."
    return _figure("stage-evolution", figure, text, measures=[measure.key for measure in measures])


# Length --------------------------------------------------------------------------------------------------------------


def length_curves(curves: length.Curves) -> Result:
    """Loss against position in contexts, a panel a variant, a line a mode; a cross where learned positions end."""
    if not curves:
        return _figure("length", None, "Loss past the training length was not measured.")
    figure, grid = _panels(len(curves), 2.35, 0.35, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for place, (axes, values) in enumerate(zip(grid, curves.values(), strict=True)):
        lowest = place >= len(curves) - min(3, len(curves))
        x, y = "position, in training contexts" if lowest else "", "" if place % 3 else "loss (nats per token)"
        handles |= _length_panel(_style(axes, length.title(values), x, y, size=8.5), values)
        axes.tick_params(labelbottom=lowest)
    shown = {length.MODES[mode]: handles[mode] for mode in length.MODES if mode in handles}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    shown_titles = "; ".join(length.title(values) for values in curves.values())
    text = f"Loss against position on a logarithmic axis, one panel for each of: {shown_titles}."
    return _figure("length", figure, text, drawn=list(curves))


def _length_panel(axes: Axes, values: Mapping[str, Any]) -> dict[str, Any]:
    """One variant's lines: means over seeds and streams, each seed's mean faint beside it. {mode: its line}"""
    marks = np.asarray(values["edges"], float)
    middles_B = np.sqrt(np.maximum(marks[:-1], marks[1] / 2) * marks[1:]) / values["context"]
    handles = {}
    for mode in length.present(values):
        colour, dash = SHOWN["mode"][mode]["colour"], (0, SHOWN["mode"][mode]["dash"])
        means_SB = np.asarray(list(values["nats"][mode].values())).mean(axis=1)
        x_B, mean_B = middles_B[: means_SB.shape[1]], means_SB.mean(axis=0)
        if len(means_SB) > 1:
            axes.plot(x_B, means_SB.T, color=colour, alpha=0.25, linewidth=0.6)
        (handles[mode],) = axes.plot(x_B, mean_B, color=colour, linestyle=dash if dash[1] else "-", linewidth=1.6)
        if len(x_B) < len(middles_B):
            end, near = (x_B[-1], mean_B[-1]), {"xytext": (7, 5), "textcoords": "offset points"}
            axes.plot(*end, marker="X", color=colour, markersize=8, markeredgecolor="white", zorder=4)
            axes.annotate("the table ends", end, **near, fontsize=8, color=colour)
    axes.axvline(1, color=GREY, linewidth=1, linestyle=DASHED, zorder=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(-3, values["factor"].bit_length())]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: {0.125: "⅛", 0.25: "¼", 0.5: "½"}.get(x, f"{x:g}")))
    return handles


_INKED = 0.4  # a share from which on a cell's number is written in white


def attention_sinks(variants: Mapping[str, Mapping[str, Any]]) -> Result:
    """A heat map a variant, layers down and heads across: `share` [L, H] of the first seed."""
    if not variants:
        return _figure("attention-sinks", None, "The sinks' share of attention was not measured.")
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    grid = figure.subplots(1, len(variants), squeeze=False)[0]
    means = []
    for axes, values in zip(grid, variants.values(), strict=True):
        share_LH = np.asarray(values["share"], float)
        title, mean = length.sinks_title(values), percent(share_LH.mean(), 0)
        means.append(f"{title} {mean}")
        image = axes.imshow(share_LH, vmin=0, vmax=1, cmap="cividis_r", aspect="auto")
        axes.set_title(f"{title} ({mean})", fontsize=9.5, color=INK, loc="left")
        layers, heads = (range(size) for size in share_LH.shape)
        axes.set_xticks(heads, [str(head + 1) for head in heads], fontsize=8)
        axes.set_yticks(layers, [str(layer + 1) for layer in layers], fontsize=8)
        axes.set_xlabel("head", fontsize=8.5)
        axes.tick_params(length=0, colors=INK)
        axes.spines[:].set_visible(False)
        for (layer, head), value in np.ndenumerate(share_LH) if share_LH.size <= 48 else ():
            colour = "white" if value > _INKED else INK
            axes.text(head, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    grid[0].set_ylabel("layer", fontsize=8.5)
    bar = figure.colorbar(image, ax=list(grid), shrink=0.9, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.set_label("attention on the sinks", fontsize=8.5)
    text = f"Share of attention on the sinks by layer and head; means over all heads: {'; '.join(means)}."
    return _figure("attention-sinks", figure, text, drawn=list(variants))
