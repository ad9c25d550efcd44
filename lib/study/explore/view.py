"""The views of a run. Each takes the run and plain values and returns a `Shown`: HTML in a notebook, text elsewhere.

A view reports in its place what is missing (a stage, an evaluation, a data set) and the command that makes it; an
impossible name or value is a ConfigError.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basics.errors import ConfigError, DataError, MissingInput, ThreefoldError
from basics.names import did_you_mean, replicate_of
from study.comparison import models as naming
from study.comparison.measures import KEYS
from study.comparison.training import smooth
from study.explore import read
from study.explore.display import INK, QUIET, RULE, Html, Shown, block, heading, image, legend, note, table, token
from study.run import Run
from threefold.data.templates import instruction_prompt
from threefold.data.tokenizer import encode, sink_ids
from threefold.evaluation import attention as attention_maps
from threefold.evaluation import statistics
from threefold.model import generate

__all__ = ["attention", "continuations", "items", "losses", "overview", "preferences"]

Names = str | Sequence[str]  # "sft, dpo" (a papermill parameter) or ["sft", "dpo"]
FORMS = {"text": str, "instruction": instruction_prompt}  # how a prompt is put to the models
ALTERNATIVES = 5  # listed for a token
LABELLED = 40  # largest number of tokens that an attention map labels
CLIPPED = 700  # characters of a text in a table of items
WINS, LOSSES = "wins of the second", "losses of the second"
MARGINS = {
    "likelihood": "log p(chosen) − log p(rejected) (nats)",
    "reward": "implicit reward, chosen − rejected (β × nats)",
}


def _view(function: Callable[..., Shown]) -> Callable[..., Shown]:
    """A view that shows what is missing or unreadable as a note; a ConfigError stays an error."""

    @functools.wraps(function)
    def view(*arguments: Any, **settings: Any) -> Shown:
        try:
            return function(*arguments, **settings)
        except ConfigError:
            raise
        except ThreefoldError as error:
            return note(str(error))

    return view


def _notes(messages: Iterable[str]) -> Shown:
    return sum(map(note, messages), Shown())


def _choose(**choices: tuple[Any, Iterable[Any]]) -> None:
    """Raise ConfigError for the first value that is not among its allowed ones."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(f"{name} = {value!r}: allowed are {', '.join(map(str, allowed))}")


@_view
def overview(run: Run) -> Shown:
    """A run's trainings and evaluations, and the commands that make the missing ones."""
    rows, missing = [], []
    try:
        evaluated = read.comparison(run).models
    except MissingInput:
        evaluated = []
    except ThreefoldError as error:
        evaluated, missing = [], [str(error)]
    for name in read.trainings(run):
        finished, absent = read.finished(run, [name])
        missing += absent
        facts = run.require(name) if finished else {}
        curve = read.loss_curve(run, name, points=1) or {}
        base, replicate = replicate_of(name)
        rows.append(
            {
                "stage": name,
                "state": "finished" if finished else "missing",
                "tokens": facts.get("tokens"),
                "held-out loss": next(iter(curve.get("heldout", {}).get("loss", [])[-1:]), None),
                "weights": (facts.get("weights_sha256") or "")[:12] or None,
                "evaluated": None if replicate > 1 else "yes" if base in evaluated else "no",
            }
        )
    return heading(f"run {run.name}") + table(rows) + _notes(missing)


# A prompt -----------------------------------------------------------------------------------------------------------


@_view
def continuations(
    run: Run,
    stages: Names = (),
    prompt: str = "The old miller",
    *,
    form: str = "text",
    new_tokens: int = 24,
    temperature: float = 0.0,
    seed: int = 0,
    at: int = 1,
) -> Shown:
    """The stages' continuations of a prompt side by side, each token on the colour of its probability.

    form: "text" uses the prompt as it is, "instruction" puts it in the format of SFT's training. at: the new token,
    from 1, whose most probable alternatives are listed. Probabilities are at temperature 1, whatever the sampling.
    """
    _choose(form=(form, FORMS))
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed = {seed}: allowed is 0 to {2**63 - 1}")
    names, missing = read.finished(run, read.chosen(run, stages))
    columns, lines = {}, []
    for name in names:
        try:
            column = _continuation(*read.checkpoint(run, name), FORMS[form](prompt), new_tokens, temperature, seed, at)
        except DataError as error:  # too long for this model's context
            column = block(str(error))
        columns[name] = Html(column.html)
        lines.append(f"{name}: {column.text}")
    shown = Shown(table([columns]).html + legend().html, "\n".join(lines)) if columns else Shown()
    return shown + _notes(missing)


def _continuation(
    model: Any, tokenizer: Any, prompt: str, new_tokens: int, temperature: float, seed: int, at: int
) -> Shown:
    prompt_ids = _prompt_ids(tokenizer, prompt)
    generator = torch.Generator().manual_seed(seed)
    eos = tokenizer.eos_token_id
    (new,) = generate(model, [prompt_ids], new_tokens, temperature=temperature, eos_id=eos, generator=generator)
    ended = len(new) < new_tokens and len(prompt_ids) + len(new) < model.config.context
    ids = [*prompt_ids, *new, *([eos] if ended else [])]
    logp_TV = next_logprobs(model, ids)
    marked = len(prompt_ids) + at - 1
    spans = []
    for place in range(len(sink_ids(tokenizer)) if prompt else len(prompt_ids), len(ids)):
        text = "⟨end⟩" if ended and place == len(ids) - 1 else tokenizer.decode([ids[place]])
        probability, tip = None, "the first token: there is no text before it"
        if place:
            probability = float(logp_TV[place - 1, ids[place]].exp())
            others = ", ".join(f"{p:.1%} {word!r}" for word, p in _alternatives(tokenizer, logp_TV[place - 1]))
            tip = f"{probability:.1%} {text!r}; likely: {others}"
        spans.append(token(text, probability, tip, prompt=place < len(prompt_ids), marked=place == marked))
    if len(prompt_ids) <= marked < len(ids):
        alternatives = _alternatives(tokenizer, logp_TV[marked - 1])
        listed = table([{f"token {at}": repr(word), "p": f"{p:.1%}"} for word, p in alternatives])
    else:
        listed = Shown(block(f"{len(new)} new tokens: there is no token {at}").html)
    text = f"{prompt}{tokenizer.decode(new)!r}" + (" ⟨end⟩" if ended else "")
    return Shown(f'<div style="line-height:1.7">{"".join(spans)}</div>', text) + listed


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The prompt's tokens, sinks first; text that looks like a special token stays text."""
    (ids,) = encode(tokenizer, [text])
    return [*sink_ids(tokenizer), *ids.tolist()] or [tokenizer.bos_token_id]


@torch.inference_mode()
def next_logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Natural log-probabilities of the token after each of `ids`, [T, V], fp32 on the CPU."""
    tokens_1T = torch.tensor([list(ids)], device=model.embed.weight.device)
    return model(tokens_1T)[0].float().log_softmax(dim=-1).cpu()


def _alternatives(tokenizer: Any, logp_V: torch.Tensor) -> list[tuple[str, float]]:
    best = logp_V.topk(min(ALTERNATIVES, len(logp_V)))
    words = [tokenizer.decode([token_id]) for token_id in best.indices.tolist()]
    return list(zip(words, best.values.exp().tolist(), strict=True))


# Training -----------------------------------------------------------------------------------------------------------


@_view
def losses(
    run: Run,
    stages: Names = (),
    *,
    span: tuple[float, float] = (0.0, 1.0),
    against: str = "tokens",
    smoothing: float = 0.05,
) -> Shown:
    """Loss curves, one panel a stage; a running stage is drawn as far as it has come.

    span: the part of each training that is drawn, (0, 1) for all of it; the vertical axis fits it. against: "tokens"
    or "step". smoothing: window of the running mean as a share of the steps; 0 draws none.
    """
    _choose(against=(against, ("tokens", "step")))
    low, high = float(span[0]), float(span[1])
    if not 0 <= low < high <= 1:
        raise ConfigError(f"span = ({low:g}, {high:g}): expected 0 <= begin < end <= 1")
    curves, missing = {}, []
    for name in read.chosen(run, stages):
        curve = read.loss_curve(run, name, points=20_000)
        if curve is None:
            missing += read.finished(run, [name])[1] or [f"stage {name} of run {run.name} left no metrics.jsonl"]
        elif curve.get("loss"):
            curves[name] = curve
    if not curves:
        return _notes(missing or [f"no step has been trained in run {run.name}"])
    figure = Figure(figsize=(max(4.4, 3.4 * len(curves)), 3.0), layout="constrained")
    panels = zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True)
    lines = [_loss_panel(axes, name, curve, (low, high), against, smoothing) for axes, (name, curve) in panels]
    return image(figure, "\n".join(lines)) + _notes(missing)


def _loss_panel(axes: Axes, name: str, curve: dict, span: tuple[float, float], against: str, smoothing: float) -> str:
    """Draw one stage's curve and return its description."""
    places, loss = np.asarray(curve[against], float), np.asarray(curve["loss"], float)
    begin, end = span[0] * places[-1], span[1] * places[-1]
    kept = (places >= begin) & (places <= end)
    base = replicate_of(name)[0]
    axes.plot(places[kept], loss[kept], color=naming.colour(base), linewidth=0.6, alpha=0.45 if smoothing else 1.0)
    if smoothing:
        smoothed = smooth(loss, smoothing)
        axes.plot(places[kept], smoothed[kept], color=naming.colour(base), linewidth=1.6, label="training")
    heldout = curve["heldout"]
    if heldout.get("loss"):
        points = [(x, y) for x, y in zip(heldout[against], heldout["loss"], strict=True) if begin <= x <= end]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), "o", color=INK, markersize=4, label="held out")
    axes.set(title=name, xlabel="tokens trained on" if against == "tokens" else "step")
    axes.set_ylabel("loss (nats per pair)" if base == "dpo" else "loss (nats per token)")
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)
    if not kept.any():
        return f"{name}: no step lies in this part"
    steps = np.asarray(curve["step"])[kept]
    return f"{name}: steps {steps[0]:,} to {steps[-1]:,}, loss {loss[kept][0]:.3f} to {loss[kept][-1]:.3f}" + (
        f", held out {heldout['loss'][-1]:.3f} at the end" if heldout.get("loss") else ""
    )


# Attention ----------------------------------------------------------------------------------------------------------


@_view
def attention(
    run: Run,
    stage: str = "dpo",
    prompt: str = "The old miller",
    *,
    layer: int = 0,
    head: int = 0,
) -> Shown:
    """A stage's attention while it reads a prompt: one map, and every head's share on the sinks.

    layer, head: from 1; 0 is the mean over all.
    """
    (stage,) = read.chosen(run, [stage])
    model, tokenizer = read.checkpoint(run, stage)
    for name, value, most in (("layer", layer, model.config.n_layer), ("head", head, model.config.n_head)):
        if not 0 <= value <= most:
            return note(f"{stage} has no {name} {value}: choose 1 to {most}, or 0 for the mean over all")
    ids = _prompt_ids(tokenizer, prompt)
    sinks = max(1, model.config.sinks)
    first = min(attention_maps.FIRST_QUERIES, len(ids) // 2)
    if first < sinks or len(ids) > model.config.context:
        return note(f"{len(ids)} tokens: type a prompt of {2 * sinks} to {model.config.context - sinks}")
    maps_LHTS = attention_maps.maps(model, ids)
    share_LH = attention_maps.sink_share(maps_LHTS, sinks, first)
    uniform = attention_maps.uniform_share(len(ids), sinks, first)
    selected = maps_LHTS[slice(None) if layer == 0 else slice(layer - 1, layer)]
    map_TS = selected[:, slice(None) if head == 0 else slice(head - 1, head)].mean(dim=(0, 1))
    target = "sink" if model.config.sinks else "first token"
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _draw_map(left, map_TS, [_label(tokenizer, token_id) for token_id in ids])
    place = f"{'all layers' if layer == 0 else f'layer {layer}'}, {'all heads' if head == 0 else f'head {head}'}"
    left.set(title=f"{stage}: {place}", xlabel="attended token", ylabel="attending token")
    _draw_shares(right, share_LH, f"share on the {target}")
    return image(
        figure,
        f"{stage}: the {target}{'' if model.config.sinks else ' (this model has no sink)'} takes "
        f"{share_LH.mean():.0%} of the attention, {share_LH.min():.0%} to {share_LH.max():.0%} by head, of queries "
        f"from position {first} on; an even spread would give {uniform:.0%}",
    )


def _draw_map(axes: Axes, map_TS: torch.Tensor, labels: list[str]) -> None:
    drawn = axes.imshow(map_TS.clamp_min(1e-3).numpy(), cmap="Blues", norm="log", vmin=1e-3, vmax=1)
    if len(labels) <= LABELLED:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(labels)), labels, fontsize=7, parse_math=False)
    axes.figure.colorbar(drawn, ax=axes, shrink=0.8, label="probability")


def _draw_shares(axes: Axes, share_LH: torch.Tensor, title: str) -> None:
    axes.imshow(share_LH.numpy(), cmap="Oranges", vmin=0, vmax=1, aspect="auto")
    layers, heads = share_LH.shape
    if layers * heads <= 200:
        for (layer, head), value in np.ndenumerate(share_LH.numpy()):
            ink = "white" if value > 0.6 else INK
            axes.text(head, layer, f"{value:.0%}", ha="center", va="center", fontsize=8, color=ink)
    axes.set(title=title, xlabel="head", ylabel="layer")
    axes.set_xticks(range(heads), range(1, heads + 1))
    axes.set_yticks(range(layers), range(1, layers + 1))


def _label(tokenizer: Any, token_id: int) -> str:
    """A token in one line of ten characters, without characters that a font lacks."""
    text = tokenizer.decode([token_id]).replace("\n", "↵").replace(" ", "·")
    return "".join(char if char.isprintable() and ord(char) < 0x3000 else "?" for char in text)[:10]


# Items --------------------------------------------------------------------------------------------------------------


@_view
def items(
    run: Run, first: str = "sft", second: str = "dpo", protocol: str = "", *, which: str = WINS, count: int = 6
) -> Shown:
    """The items on which the second model does better than the first, or worse, with their texts.

    protocol: "" for the first one with right and wrong answers. which: "wins of the second" or "losses of the second".
    Right-or-wrong tasks list the items that only one model has right; texts list the largest differences in bits per
    byte. Of several templates and draws the first counts.
    """
    _choose(which=(which, (WINS, LOSSES)))
    comparison = read.comparison(run) if read.protocols(run) else None
    protocol = protocol or default_protocol(run)
    if comparison is None or not protocol:
        read.comparison(run)  # raises where the records cannot be read
        raise MissingInput(f"run {run.name} has no evaluation yet: run `{run.command('evaluate-sft')}`")
    for name in (first, second):
        if name not in comparison.models:
            raise MissingInput(
                f"run {run.name} has not evaluated {name!r}{did_you_mean(name, comparison.models)}; evaluated are "
                f"{', '.join(comparison.models)}"
            )
    pairs, key, binary = _pair_items(*(_first_wording(read.items(run, name, protocol)) for name in (first, second)))
    if pairs is None:
        raise MissingInput(f"{protocol} has no result by item that two models could be compared on")
    gain = (pairs["score_b"] - pairs["score_a"]) * (1 if which == WINS else -1)
    order = pairs[gain > 0].assign(gain=gain[gain > 0]).sort_values("gain", ascending=False, kind="stable")
    texts, missing = _item_texts(run, first, protocol)
    rows = [
        _item_row(row, texts.get(int(row[key]), {}), first, second, binary) for _, row in order.head(count).iterrows()
    ]
    title = f"{which} ({second} against {first}): {len(order):,}" + (f", {len(rows)} shown" if rows else "")
    summary = _summary(pairs, first, second, protocol, binary)
    return block(summary) + heading(title) + table(rows) + _notes(missing)


def default_protocol(run: Run) -> str:
    """The first protocol with right and wrong answers, else the first; "" where nothing was evaluated."""
    names = read.protocols(run)
    return next((name for name in names if name.endswith(("-shot", "/responses"))), next(iter(names), ""))


def _item_texts(run: Run, model: str, protocol: str) -> tuple[dict[int, dict[str, str]], list[str]]:
    try:
        return read.texts(run, model, protocol), []
    except ThreefoldError as error:  # the results are worth seeing without their texts
        return {}, [str(error)]


def _pair_items(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame | None, str, bool]:
    """(both models' rows on the items they share, the column that numbers items, whether each is right or wrong).

    Columns end in _a and _b; score_a and score_b are 1 or 0 (a tie .5) where `correct` is known, else minus bits per
    byte, so that more is better. None where there is neither.
    """
    keys = [key for key in KEYS if key in a and key in b]
    binary = "correct" in a and "correct" in b
    if not keys or not (binary or {"nats", "bytes"} <= set(a) & set(b)):
        return None, "", binary
    pairs = pd.merge(a, b, on=keys, suffixes=("_a", "_b"), validate="one_to_one")
    for side in "ab":
        if binary:
            pairs = pairs[pairs[f"correct_{side}"].notna()]
            pairs[f"score_{side}"] = pairs[f"correct_{side}"].astype(float)
        else:
            pairs[f"score_{side}"] = -pairs[f"nats_{side}"] / pairs[f"bytes_{side}"] / np.log(2)
    return pairs, keys[0], binary


def _first_wording(frame: pd.DataFrame) -> pd.DataFrame:
    """One row an item: the first template and draw; the pages of a document together."""
    for key in ("template", "draw"):
        if key in frame:
            frame = frame[frame[key] == frame[key].iloc[0]].drop(columns=key)
    if "document" in frame:
        frame = frame.groupby("document", as_index=False)[["nats", "tokens", "bytes"]].sum()
    return frame


def _summary(pairs: pd.DataFrame, first: str, second: str, protocol: str, binary: bool) -> str:
    a, b = pairs["score_a"].to_numpy(), pairs["score_b"].to_numpy()
    if binary and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        counts = statistics.paired_proportions(a.astype(bool), b.astype(bool))
        return (
            f"{protocol}, {counts.n:,} items: both right {counts.both:,}, only {first} {counts.only_a:,}, only "
            f"{second} {counts.only_b:,}, neither {counts.neither:,}; McNemar's exact p = {counts.p:.2g} for this pair "
            "alone"
        )
    better, worse = int((b > a).sum()), int((b < a).sum())
    return f"{protocol}, {len(pairs):,} items: {second} is better on {better:,}, worse on {worse:,}, equal on the rest"


def _item_row(row: pd.Series, text: dict[str, str], first: str, second: str, binary: bool) -> dict[str, Any]:
    """The cells of an item: its texts, then each model's result."""
    text = text or {name: row[f"{name}_a"] for name in ("question", "reference") if f"{name}_a" in row}
    cells: dict[str, Any] = {"item": str(row.iloc[0])} | {name: _clip(str(value)) for name, value in text.items()}
    for side, model in (("a", first), ("b", second)):
        if "generation_a" in row or "answer_a" in row:
            cells[model] = _clip(str(row[f"generation_{side}" if "generation_a" in row else f"answer_{side}"]))
        if "logp_positive_a" in row:
            odds = row[f"logp_positive_{side}"] - row[f"logp_negative_{side}"]
            answer = ("negative", "positive")[int(row[f"prediction_{side}"])]
            cells[model] = f"{answer} ({odds:+.2f} nats to positive)"
        elif "logp_chosen_a" in row:
            cells[model] = f"{row[f'logp_chosen_{side}'] - row[f'logp_rejected_{side}']:+.1f} nats to the chosen"
        elif not binary:
            cells[model] = f"{-row[f'score_{side}']:.3f} bits per byte"
    if "label_a" in row:
        cells["right answer"] = ("negative", "positive")[int(row["label_a"])]
    return cells


def _clip(text: str) -> str:
    return text if len(text) <= CLIPPED else f"{text[: CLIPPED // 2]} … {text[-CLIPPED // 2 :]}"


# Preferences --------------------------------------------------------------------------------------------------------


@_view
def preferences(
    run: Run, models: Names = ("sft", "dpo"), *, margin: str = "likelihood", order: str = "lowest", count: int = 4
) -> Shown:
    """Margins of the held-out preference pairs, and the pairs at one end of the last model's with their texts.

    margin: "likelihood", log p(chosen) − log p(rejected) in nats; "reward", DPO's implicit reward against the SFT
    checkpoint, for models that were measured against it. order: "lowest" or "highest".
    """
    _choose(margin=(margin, MARGINS), order=(order, ("lowest", "highest")))
    names = [part.strip() for part in models.split(",")] if isinstance(models, str) else list(models)
    protocol = next((name for name in read.protocols(run) if name.endswith("/preferences")), None)
    if protocol is None:
        read.comparison(run)  # raises where the records cannot be read
        raise MissingInput(f"run {run.name} has measured no preferences yet: run `{run.command('evaluate-dpo')}`")
    margins, missing = {}, []
    for name in names:
        try:
            frame = read.items(run, name, protocol)
        except MissingInput as error:
            missing.append(str(error))
            continue
        if margin == "likelihood":
            margins[name] = (frame["logp_chosen"] - frame["logp_rejected"]).to_numpy(float)
        elif "reward_margin" in frame:
            margins[name] = frame["reward_margin"].to_numpy(float)
        else:
            missing.append(f"{name} was measured against no reference, so it has no rewards: use margin='likelihood'")
    if not margins:
        return _notes(missing)
    shown = _margin_histograms(margins, MARGINS[margin])
    last, values = list(margins.items())[-1]
    texts, unread = _item_texts(run, last, protocol)
    numbers = read.items(run, last, protocol)["item"].to_numpy()
    rows = []
    for place in np.argsort(values if order == "lowest" else -values, kind="stable")[:count]:
        pair = {name: _clip(text) for name, text in texts.get(int(numbers[place]), {}).items()}
        rows.append({"pair": str(numbers[place]), "margin": f"{values[place]:+.3f}", **pair})
    return shown + heading(f"{order} margins of {last}") + table(rows) + _notes([*missing, *unread])


def _margin_histograms(margins: dict[str, np.ndarray], label: str) -> Shown:
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    axes = figure.subplots()
    values = np.concatenate(list(margins.values()))
    edges = np.linspace(values.min(), values.max(), 41) if np.ptp(values) else np.array([-0.5, 0.5]) + values.min()
    lines = []
    for name, own in margins.items():
        right = float((own > 0).mean() + 0.5 * (own == 0).mean())
        lines.append(f"{name}: mean margin {own.mean():+.3f}, chosen ahead in {right:.1%} of {len(own):,} pairs")
        axes.hist(own, edges, color=naming.colour(name, margins), alpha=0.45, label=name)
        axes.axvline(own.mean(), color=naming.colour(name, margins), linewidth=1.5)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel=label, ylabel="pairs")
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)
    return image(figure, "\n".join(lines))


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=QUIET, labelsize=8)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
