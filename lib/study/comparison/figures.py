"""The report's figures: one colour a model, units on the axes, intervals where there are any."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from study.comparison import ablations, attribution, length, models
from study.comparison.differences import Difference
from study.comparison.load import Comparison
from study.comparison.measures import Measure
from study.comparison.models import SHOWN
from study.comparison.results import NBSP, UNITS, Result, count, percent, signed
from study.comparison.training import smooth
from study.preset import LINEAGE

INK, RULE, GREY = "#1B1F24", "#D5DAE0", "#8A939C"
WIDTH = 7.6  # inches


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


def _figure(name: str, figure: Figure | None, text: str, **values: Any) -> Result:
    """A figure's record; without a figure one that shows the text alone."""
    if empty := figure is None:
        figure, values = Figure(figsize=(WIDTH, 1.2)), {"drawn": []}
        figure.text(0.5, 0.5, text, ha="center", va="center", color=INK)
    return Result(f"comparison/{name}", values, figure=figure, text=text, empty=empty)


def _panels(
    height: float, rows: int = 1, columns: int = 1, used: int | None = None, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of axes, of which the first `used` (by default all) are visible, and those."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in grid[len(grid) if used is None else used :]:
        axes.set_visible(False)
    return figure, grid[:used]


def _tokens(axes: Axes, largest: float) -> float:
    """Label an axis of tokens; what they are divided by."""
    scale, unit = (1e6, "millions") if largest >= 2e6 else (1e3, "thousands") if largest >= 2e3 else (1.0, "")
    axes.set_xlabel(f"tokens trained on ({unit})" if unit else "tokens trained on")
    return scale


# Training ------------------------------------------------------------------------------------------------------------


def loss_curves(comparison: Comparison) -> Result:
    """Training loss against tokens, one panel a stage family, held-out points on top."""
    first = [stage for stage in comparison.trained if stage not in LINEAGE[1:]]
    curves = {stage: comparison.values(f"curve/{stage}") for stage in (*first, *LINEAGE[1:])}
    curves = {stage: curve for stage, curve in curves.items() if curve.get("loss")}
    panels: dict[str, list[str]] = {}
    for stage in curves:
        panels.setdefault(stage.upper() if stage in LINEAGE[1:] else "Pretraining and baselines", []).append(stage)
    if not panels:
        return _figure("loss-curves", None, "No loss curve was recorded.")
    ratios = [1.7 if len(stages) > 1 else 1.0 for stages in panels.values()]
    figure, grid = _panels(3.0, columns=len(panels), width_ratios=ratios)
    for axes, (title, stages) in zip(grid, panels.items(), strict=True):
        _style(axes, title)
        scale = _tokens(axes, max(curves[stage]["tokens"][-1] for stage in stages))
        for stage in stages:
            curve, colour = curves[stage], models.colour(stage)
            x, loss, heldout = np.asarray(curve["tokens"]) / scale, np.asarray(curve["loss"], float), curve["heldout"]
            axes.plot(x, loss, color=colour, alpha=0.22, linewidth=0.7)
            axes.plot(x, smooth(loss), color=colour, linewidth=1.7, label=comparison.name(stage))
            if heldout:
                at = np.interp(heldout["step"], curve["step"], x)
                axes.plot(at, heldout["loss"], "o", color=colour, markeredgecolor="white", markersize=5.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if len(stages) > 1:
            axes.legend(frameon=False, fontsize=8.5)
    grid[0].set_ylabel("training loss (nats per token)")
    if "DPO" in panels:
        grid[-1].set_ylabel("DPO loss (nats per pair)")
    ends = (f"{comparison.name(stage)} {np.mean(curve['loss'][-10:]):.2f}" for stage, curve in curves.items())
    text = f"Training loss against tokens; mean of the last ten steps: {', '.join(ends)}."
    return _figure("loss-curves", figure, text, drawn=list(curves))


_LINES = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B8A700", "#7F7F7F")  # Okabe & Ito


def ablation_curves(variants: ablations.Variants) -> Result:
    """Held-out loss against tokens of the base and each variant, means over seeds."""
    if not variants:
        return _figure("ablation-curves", None, "No ablation was trained.")
    figure, (axes,) = _panels(3.6)
    _style(axes, y="held-out loss (nats per token)")
    scale = _tokens(axes, max(curve["tokens"][-1] for values in variants.values() for curve in values["curves"]))
    axes.set_prop_cycle(color=_LINES)
    for name, values in variants.items():
        tokens, loss = (np.mean([curve[key][1:] for curve in values["curves"]], axis=0) for key in ("tokens", "loss"))
        style = {"color": INK, "linewidth": 2.2, "zorder": 3} if name == ablations.BASE else {"linewidth": 1.2}
        axes.plot(tokens / scale, loss, marker="o", markersize=3, label=ablations.title(name), **style)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    over = count(len(next(iter(variants.values()))["curves"]), "seed")
    ends = (f"{ablations.title(name)} {np.mean(one['heldout_loss']):.3f}" for name, one in variants.items())
    text = f"Held-out loss against tokens; at the end, in means over {over}: {'; '.join(ends)}."
    return _figure("ablation-curves", figure, text, drawn=list(variants))


# Results -------------------------------------------------------------------------------------------------------------


def forest(name: str, comparison: Comparison, found: Sequence[Difference], columns: int) -> Result:
    """Differences with their 95% intervals, a panel a measure: the zero line, the margin of equivalence as a band,
    filled markers where a difference may be claimed. With one column the numbers stand beside the points."""
    if not found:
        return _figure(f"forest-{name}", None, "No two models were evaluated on the same items.")
    panels: dict[Measure, list[Difference]] = {}
    for one in found:
        panels.setdefault(one.measure, []).append(one)
    heights = [0.25 * len(part) + 0.85 for part in panels.values()]
    columns = min(columns, len(panels))
    rows = [max(heights[place : place + columns]) for place in range(0, len(heights), columns)]
    figure, grid = _panels(sum(rows), len(rows), columns, used=len(panels), height_ratios=rows)
    pairs = [[(one.a, one.b) for one in part] for part in panels.values()]
    shared = columns > 1 and all(part == pairs[0] for part in pairs)
    for place, (axes, (measure, part)) in enumerate(zip(grid, panels.items(), strict=True)):
        _forest_panel(_style(axes, measure.title, grid="x", size=8.5), measure, part, comparison, columns == 1)
        if shared and place % columns:
            axes.tick_params(labelleft=False)
    said = "; ".join(f"{one.measure.title}, {one.names[1]} against {one.names[0]}: {one.text}" for one in found)
    text = f"Differences with 95% intervals. {said.replace(NBSP, ' ')}."
    return _figure(f"forest-{name}", figure, text, differences=[one.values() for one in found])


def _forest_panel(
    axes: Axes, measure: Measure, part: Sequence[Difference], comparison: Comparison, numbers: bool
) -> None:
    change = UNITS[measure.unit]["change"]
    scale, margin = change.get("scale", 1), change.get("scale", 1) * measure.margin
    axes.axvspan(-margin, margin, color=RULE, alpha=0.6, linewidth=0, zorder=0)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    for place, one in zip(range(len(part))[::-1], part, strict=True):
        colour = models.colour(one.b, comparison.models)
        if one.low is not None and one.high is not None:
            axes.plot([scale * one.low, scale * one.high], [place, place], color=colour, linewidth=1.6, zorder=2)
        face = colour if one.detected else "white"
        marker = {"marker": models.marker(one.b), "markersize": 6.5, "markerfacecolor": face, "color": colour}
        axes.plot(scale * one.change, place, **marker, zorder=3)
        if numbers:
            axes.annotate(one.text, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_yticks(range(len(part))[::-1], [one.pair for one in part], fontsize=8)
    axes.set_ylim(-0.7, len(part) - 0.3)
    unit = change.get("unit", "").strip() or UNITS[measure.unit]["axis"]
    axes.set_xlabel(f"{unit}, {'left' if measure.better == 'lower' else 'right'} is better", fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))


# Length --------------------------------------------------------------------------------------------------------------


def length_curves(curves: length.Curves) -> Result:
    """Loss against position in contexts, a panel a variant, a line a mode; a cross where learned positions end."""
    if not curves:
        return _figure("length", None, "Loss past the training length was not measured.")
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure, grid = _panels(2.35 * rows + 0.35, rows, columns, used=len(curves), sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for place, (axes, values) in enumerate(zip(grid, curves.values(), strict=True)):
        lowest = place >= len(curves) - columns
        x, y = "position, in training contexts" if lowest else "", "" if place % columns else "loss (nats per token)"
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
    axes.axvline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
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
    figure, grid = _panels(2.9, columns=len(variants))
    means = []
    for axes, values in zip(grid, variants.values(), strict=True):
        share_LH = np.asarray(values["share"], float)
        title = count(values["sinks"], "sink") if values["sinks"] else "no sink: first token"
        mean = percent(share_LH.mean(), 0)
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
    bar = figure.colorbar(image, ax=grid, shrink=0.9, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.set_label("attention on the sinks", fontsize=8.5)
    text = f"Share of attention on the sinks by layer and head; means over all heads: {'; '.join(means)}."
    return _figure("attention-sinks", figure, text, drawn=list(variants))


_FALLING, _RISING = "#009E73", "#D55E00"  # a link that lowers the loss, one that raises it


def attribution_waterfall(links: Sequence[Mapping[str, Any]]) -> Result:
    """Held-out loss from GPT-2's recipe down to this model, a bar a link with the interval of its difference."""
    steps = attribution.single(links)
    if not steps:
        return _figure("attribution-waterfall", None, "No attribution was made in this run.")
    figure, (axes,) = _panels(0.42 * (len(steps) + 2) + 0.9)
    _style(axes, x="held-out loss (nats per token)", grid="x")
    start, end = (float(np.mean(one[key])) for one, key in ((steps[0], "loss_before"), (steps[-1], "loss_after")))
    names = ["GPT-2’s recipe", *(attribution.title(one["link"]) for one in steps), "All replaced"]
    for place, one in enumerate(steps, start=1):
        before, after = (float(np.mean(one[key])) for key in ("loss_before", "loss_after"))
        axes.barh(place, after - before, left=before, color=_FALLING if after < before else _RISING, height=0.6)
        axes.plot([after, after], [place, place + 1], color=GREY, linewidth=0.8)
        if one["low"] is not None:
            axes.plot([before + one["low"], before + one["high"]], [place, place], color=INK, linewidth=1.2)
        near = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(signed(one["difference"], 3), (max(before, after), place), **near)
    axes.plot([start, start], [0, 1], color=GREY, linewidth=0.8)
    axes.plot([start, end], [0, len(steps) + 1], "o", color=INK, markersize=5)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.use_sticky_edges = False
    axes.margins(x=0.14)
    parts = "; ".join(f"{attribution.title(one['link'])} {signed(one['difference'], 3)}" for one in steps)
    alt = f"Held-out loss from {start:.3f} with GPT-2’s recipe to {end:.3f} nats per token, link by link: {parts}."
    drawn = [one["link"] for one in steps]
    return _figure("attribution-waterfall", figure, alt, start=start, end=end, drawn=drawn)
