"""The views of a run. Each takes the run and plain values and gives a `Shown`: HTML in a notebook, elsewhere text.

What is not there (a stage, an evaluation, a data set) is said in the view, with what makes it; a name that cannot be
meant is an error.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basics.errors import ConfigError, DataError, MissingInput, RecordError, ThreefoldError
from basics.names import near_miss, replicate_of
from papertrail.run import Run
from study.comparison import models as naming
from study.comparison.measures import KEYS
from study.comparison.training import smooth
from study.explore import page, reading
from study.explore.page import INK, QUIET, RULE, Html, Shown
from study.explore.reading import open_run
from threefold.data.templates import instruction_prompt
from threefold.data.tokenizer import encode, sink_ids
from threefold.evaluation import attention as looking
from threefold.evaluation import statistics
from threefold.model import generate
from threefold.training import curve

__all__ = ["attention", "continuations", "items", "losses", "open_run", "overview", "preferences"]

Names = str | Sequence[str]  # "sft, dpo" (a papermill parameter) or ["sft", "dpo"]
FORMS = {"text": str, "instruction": instruction_prompt}  # how a prompt is put to the models
LIKELY = 5  # alternatives listed for a token
LABELLED = 40  # tokens up to which an attention map names them
CLIPPED = 700  # characters of a text in a table of items
WINS, LOSSES = "wins of the second", "losses of the second"


def _told(view: Callable[..., Shown]) -> Callable[..., Shown]:
    """What is missing or cannot be read is told in the view's place; a wrong name stays an error."""

    @functools.wraps(view)
    def told(*arguments: Any, **settings: Any) -> Shown:
        try:
            return view(*arguments, **settings)
        except ConfigError:
            raise
        except ThreefoldError as error:
            return page.note(str(error))

    return told


@_told
def overview(run: Run) -> Shown:
    """What there is of a run: its trainings and evaluations, and what makes those that are not there."""
    rows, missing = [], []
    evaluated = reading.evaluated(run)
    try:
        reading.readable(run)
    except RecordError as error:
        missing.append(str(error))
    for name in reading.trainings(run):
        _, absent = reading.there(run, [name])
        missing += absent
        facts = {} if absent else run.require(name)
        base, replicate = replicate_of(name)
        rows.append(
            {
                "stage": name,
                "state": "not there" if absent else "finished",
                "tokens": facts.get("tokens"),
                "held-out loss": _last_heldout(run, name),
                "weights": (facts.get("weights_sha256") or "")[:12] or None,
                "evaluated": "yes" if base in evaluated and replicate == 1 else "no" if replicate == 1 else None,
            }
        )
    shown = Shown(page.heading(f"run {run.name}") + page.table(rows), f"run {run.name}\n{page.plain_table(rows)}")
    return _with_notes(shown, missing)


# A prompt -----------------------------------------------------------------------------------------------------------


@_told
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

    form: "text" puts the prompt as it is, "instruction" under the headings of SFT's training. at: the new token, from
    1, whose most probable alternatives are listed. Probabilities are those of temperature 1, whatever is drawn at.
    """
    if form not in FORMS:
        raise ConfigError(f"form = {form!r}: allowed are {', '.join(FORMS)}")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed = {seed}: allowed is 0 to {2**63 - 1}")
    names, missing = reading.there(run, reading.chosen(run, stages))
    columns, lines = {}, []
    for name in names:
        try:
            columns[name], line = _continuation(run, name, FORMS[form](prompt), new_tokens, temperature, seed, at)
        except DataError as error:  # too long for this model's context
            columns[name], line = page.cell(str(error)), str(error)
        lines.append(f"{name}: {line}")
    if not columns:
        return _with_notes(Shown(Html(""), ""), missing)
    width = [f"{100 // len(columns)}%"] * len(columns)
    return _with_notes(Shown(page.table([columns], widths=width) + page.legend(), "\n".join(lines)), missing)


def _continuation(
    run: Run, stage: str, prompt: str, new_tokens: int, temperature: float, seed: int, at: int
) -> tuple[Html, str]:
    model, tokenizer = reading.loaded(run, stage)
    given = _ids(tokenizer, prompt)
    generator = torch.Generator().manual_seed(seed)
    eos = tokenizer.eos_token_id
    (new,) = generate(model, [given], new_tokens, temperature=temperature, eos_id=eos, generator=generator)
    ended = len(new) < new_tokens and len(given) + len(new) < model.config.context
    every = [*given, *new, *([eos] if ended else [])]
    logp_TV = next_logprobs(model, every)
    asked = len(given) + at - 1
    spans = []
    for place in range(len(sink_ids(tokenizer)) if prompt else len(given), len(every)):
        text = "⟨end⟩" if ended and place == len(every) - 1 else tokenizer.decode([every[place]])
        p, tip = None, "the first token: nothing stands before it"
        if place:
            p = float(logp_TV[place - 1, every[place]].exp())
            others = (f"{share:.1%} {word!r}" for word, share in _likely(tokenizer, logp_TV[place - 1]))
            tip = f"{p:.1%} {text!r}; likely: {', '.join(others)}"
        spans.append(page.token(text, p, tip, given=place < len(given), marked=place == asked))
    rows = []
    if len(given) <= asked < len(every):
        rows = [{f"token {at}": repr(w), "p": f"{share:.1%}"} for w, share in _likely(tokenizer, logp_TV[asked - 1])]
    likely = page.table(rows) if rows else page.prose(f"{len(new)} new tokens: there is no token {at}")
    html = Html(f'<div style="line-height:1.7">{"".join(spans)}</div><div style="margin-top:8px">{likely}</div>')
    text = f"{prompt}{tokenizer.decode(new)!r}" + (" ⟨end⟩" if ended else "")
    return html, text + (f"\n{page.plain_table(rows)}" if rows else "")


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The prompt as the model was trained to read it, sinks first; what looks like a special token in it is text."""
    (ids,) = encode(tokenizer, [text])
    return [*sink_ids(tokenizer), *ids.tolist()] or [tokenizer.bos_token_id]


@torch.inference_mode()
def next_logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Natural log-probabilities of the token after each of `ids`, [T, V], fp32 on the CPU."""
    tokens_1T = torch.tensor([list(ids)], device=model.embed.weight.device)
    return model(tokens_1T)[0].float().log_softmax(dim=-1).cpu()


def _likely(tokenizer: Any, logp_V: torch.Tensor) -> list[tuple[str, float]]:
    best = logp_V.topk(min(LIKELY, len(logp_V)))
    return [
        (tokenizer.decode([token]), share)
        for token, share in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    ]


# Training -----------------------------------------------------------------------------------------------------------


@_told
def losses(
    run: Run,
    stages: Names = (),
    *,
    span: tuple[float, float] = (0.0, 1.0),
    against: str = "tokens",
    smoothing: float = 0.05,
) -> Shown:
    """Loss curves, one panel a stage; a stage that is still training is drawn as far as it has come.

    span: the part of each training that is drawn, (0, 1) being all of it; the vertical axis fits what is drawn.
    against: "tokens" or "step". smoothing: share of the steps in the running mean; 0 draws none.
    """
    if against not in ("tokens", "step"):
        raise ConfigError(f"against = {against!r}: allowed are tokens, step")
    low, high = float(span[0]), float(span[1])
    if not 0 <= low < high <= 1:
        raise ConfigError(f"span = ({low:g}, {high:g}): expected 0 <= begin < end <= 1")
    drawn, missing = [], []
    for name in reading.chosen(run, stages):
        folder = reading.metrics_folder(run, name)
        if folder is None:
            missing += reading.there(run, [name])[1] or [f"stage {name} of run {run.name} left no metrics.jsonl"]
        elif history := curve(folder, points=20_000):
            drawn.append((name, history))
    drawn = [(name, history) for name, history in drawn if history.get("loss")]
    if not drawn:
        return _with_notes(page.note(f"no step has been trained in run {run.name}") if not missing else None, missing)
    figure = Figure(figsize=(max(4.4, 3.4 * len(drawn)), 3.0), layout="constrained")
    lines = []
    for axes, (name, history) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        lines.append(_loss(axes, name, history, (low, high), against, smoothing))
    text = "\n".join(lines)
    return _with_notes(Shown(page.image(figure, text) + page.prose(text), text), missing)


def window(places: Sequence[float], span: tuple[float, float]) -> np.ndarray:
    """Which of the rising `places` lie in that part of their whole, from 0 to the last one. [N] bool"""
    places_N = np.asarray(places, float)
    end = places_N[-1] if len(places_N) else 0.0
    return (places_N >= span[0] * end) & (places_N <= span[1] * end)


def _loss(axes: Axes, name: str, history: dict, span: tuple[float, float], against: str, smoothing: float) -> str:
    at, loss = np.asarray(history[against], float), np.asarray(history["loss"], float)
    kept = window(at, span)
    tint = naming.colour(replicate_of(name)[0])
    axes.plot(at[kept], loss[kept], color=tint, linewidth=0.6, alpha=0.45 if smoothing else 1.0)
    if smoothing:
        axes.plot(at[kept], smooth(loss, smoothing)[kept], color=tint, linewidth=1.6, label="training")
    held = history["heldout"]
    if held.get("loss"):
        places, values = np.asarray(held[against], float), np.asarray(held["loss"], float)
        inside = (places >= span[0] * at[-1]) & (places <= span[1] * at[-1])
        axes.plot(places[inside], values[inside], "o", color=INK, markersize=4, label="held out")
    axes.set(title=name, xlabel="tokens trained on" if against == "tokens" else "step")
    axes.set_ylabel("loss (nats per pair)" if replicate_of(name)[0] == "dpo" else "loss (nats per token)")
    axes.legend(frameon=False, fontsize=8)
    _quiet(axes)
    if not kept.any():
        return f"{name}: no step lies in this part"
    steps = np.asarray(history["step"])[kept]
    return f"{name}: steps {steps[0]:,} to {steps[-1]:,}, loss {loss[kept][0]:.3f} to {loss[kept][-1]:.3f}" + (
        f", held out {held['loss'][-1]:.3f} at the end" if held.get("loss") else ""
    )


def _last_heldout(run: Run, stage: str) -> float | None:
    folder = reading.metrics_folder(run, stage)
    held = curve(folder, points=1)["heldout"].get("loss") if folder else None
    return held[-1] if held else None


# Attention ----------------------------------------------------------------------------------------------------------


@_told
def attention(
    run: Run,
    stage: str = "dpo",
    prompt: str = "The old miller",
    *,
    layer: int = 0,
    head: int = 0,
) -> Shown:
    """Where a stage looks while it reads a prompt: one attention map, and every head's share on the sinks.

    layer, head: from 1; 0 is the mean over all.
    """
    (stage,) = reading.chosen(run, [stage])
    model, tokenizer = reading.loaded(run, stage)
    for name, value, most in (("layer", layer, model.config.n_layer), ("head", head, model.config.n_head)):
        if not 0 <= value <= most:
            return page.note(f"{stage} has no {name} {value}: choose 1 to {most}, or 0 for the mean over all")
    ids = _ids(tokenizer, prompt)
    sinks = max(1, model.config.sinks)
    first = min(looking.FIRST_QUERIES, len(ids) // 2)
    if first < sinks or len(ids) > model.config.context:
        return page.note(f"{len(ids)} tokens: type a prompt of {2 * sinks} to {model.config.context - sinks}")
    maps_LHTS = looking.maps(model, ids)
    share_LH = looking.sink_share(maps_LHTS, sinks, first)
    uniform = looking.uniform_share(len(ids), sinks, first)
    map_TS = maps_LHTS[slice(None) if layer == 0 else slice(layer - 1, layer)]
    map_TS = map_TS[:, slice(None) if head == 0 else slice(head - 1, head)].mean(dim=(0, 1))
    what = "sink" if model.config.sinks else "first token (this model has no sink)"
    told = (
        f"{stage}: the {what} takes {share_LH.mean():.0%} of the attention, {share_LH.min():.0%} to "
        f"{share_LH.max():.0%} by head, of queries from position {first} on; an even spread would give {uniform:.0%}"
    )
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _map(left, map_TS, [_short(tokenizer, token) for token in ids])
    place = f"{'all layers' if layer == 0 else f'layer {layer}'}, {'all heads' if head == 0 else f'head {head}'}"
    left.set(title=f"{stage}: {place}", xlabel="looked at", ylabel="looking token")
    _shares(right, share_LH, f"share on the {'sink' if model.config.sinks else 'first token'}")
    return Shown(page.image(figure, told) + page.prose(told), told)


def _map(axes: Axes, map_TS: torch.Tensor, labels: list[str]) -> None:
    shown = axes.imshow(map_TS.clamp_min(1e-3).numpy(), cmap="Blues", norm="log", vmin=1e-3, vmax=1)
    if len(labels) <= LABELLED:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(labels)), labels, fontsize=7, parse_math=False)
    axes.figure.colorbar(shown, ax=axes, shrink=0.8, label="probability")


def _shares(axes: Axes, share_LH: torch.Tensor, title: str) -> None:
    axes.imshow(share_LH.numpy(), cmap="Oranges", vmin=0, vmax=1, aspect="auto")
    layers, heads = share_LH.shape
    if layers * heads <= 200:
        for layer in range(layers):
            for head in range(heads):
                value = float(share_LH[layer, head])
                ink = "white" if value > 0.6 else INK
                axes.text(head, layer, f"{value:.0%}", ha="center", va="center", fontsize=8, color=ink)
    axes.set(title=title, xlabel="head", ylabel="layer")
    axes.set_xticks(range(heads), range(1, heads + 1))
    axes.set_yticks(range(layers), range(1, layers + 1))


def _short(tokenizer: Any, token: int) -> str:
    """A token as a label: one line, ten characters, nothing that a font lacks or matplotlib reads as maths."""
    text = tokenizer.decode([token]).replace("\n", "↵").replace(" ", "·")
    return "".join(char if char.isprintable() and ord(char) < 0x3000 else "?" for char in text)[:10]


# Items --------------------------------------------------------------------------------------------------------------


@_told
def items(
    run: Run, first: str = "sft", second: str = "dpo", protocol: str = "", *, which: str = WINS, count: int = 6
) -> Shown:
    """On which items the second model does better than the first, and on which worse, with their texts.

    protocol: "" for the first one with right and wrong answers. which: "wins of the second" or "losses of the second".
    Right-or-wrong tasks list the items that only one of the two has right; texts list the largest differences in bits
    per byte. Of several wordings the first counts.
    """
    if which not in (WINS, LOSSES):
        raise ConfigError(f"which = {which!r}: allowed are {WINS!r}, {LOSSES!r}")
    protocol = protocol or default_protocol(run)
    if not protocol:
        reading.readable(run)
        raise MissingInput(f"run {run.name} has no evaluation yet: run `{run.command('evaluate-sft')}`")
    models = reading.comparison(run).models
    for name in (first, second):
        if name not in models:
            miss = near_miss(name, models)
            hint = f", did you mean {miss}?" if miss else ""
            raise MissingInput(f"run {run.name} has not evaluated {name!r}{hint}; evaluated are {', '.join(models)}")
    frames = [_per_item(reading.items(run, name, protocol)) for name in (first, second)]
    both, keys, binary = paired(*frames)
    if both is None:
        raise MissingInput(f"{protocol} has no result by item that two models could be compared on")
    gain = both["score_b"] - both["score_a"]
    told = _summary(both, first, second, protocol, binary)
    order = both.assign(gain=gain if which == WINS else -gain)
    order = order[order["gain"] > 0].sort_values("gain", ascending=False, kind="stable")
    picked = order.head(count)
    try:
        texts, note = reading.texts(run, first, protocol), None
    except ThreefoldError as error:  # the items themselves are still worth seeing
        texts, note = {}, str(error)
    rows = [_item_row(row, texts.get(int(row[keys[0]]), {}), first, second, binary) for _, row in picked.iterrows()]
    listed = f"{which} ({second} against {first}): {len(order):,}" + (f", {len(rows)} shown" if rows else "")
    shown = Shown(
        page.prose(told) + page.heading(listed) + page.table(rows), f"{told}\n{listed}\n{page.plain_table(rows)}"
    )
    return _with_notes(shown, [note] if note else [])


def paired(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame | None, list[str], bool]:
    """(both models' rows on the items they share, columns that name an item, whether each is right or wrong).

    Columns end in _a and _b; score_a and score_b are 1 or 0 (a tie .5) where `correct` is known, else minus bits per
    byte, so that more is better. None where there is neither.
    """
    keys = [key for key in KEYS if key in a and key in b]
    if not keys:
        return None, [], False
    binary = "correct" in a and "correct" in b
    if not binary and not {"nats", "bytes"} <= set(a) & set(b):
        return None, keys, False
    both = pd.merge(a, b, on=keys, suffixes=("_a", "_b"), validate="one_to_one")
    for side in "ab":
        if binary:
            both = both[both[f"correct_{side}"].notna()]
            both[f"score_{side}"] = both[f"correct_{side}"].astype(float)
        else:
            both[f"score_{side}"] = -both[f"nats_{side}"] / both[f"bytes_{side}"] / np.log(2)
    return both, keys, binary


def _per_item(frame: pd.DataFrame) -> pd.DataFrame:
    """One row an item: the first wording and draw; pages of a document together."""
    for key in ("template", "draw"):
        if key in frame:
            frame = frame[frame[key] == frame[key].iloc[0]].drop(columns=key)
    if "document" in frame:
        frame = frame.groupby("document", as_index=False)[["nats", "tokens", "bytes"]].sum()
    return frame


def default_protocol(run: Run) -> str:
    """The first protocol with right and wrong answers, else the first; "" where nothing was evaluated."""
    names = reading.scored(run)
    return next((name for name in names if name.endswith(("-shot", "/responses"))), next(iter(names), ""))


def _summary(both: pd.DataFrame, first: str, second: str, protocol: str, binary: bool) -> str:
    a, b = both["score_a"].to_numpy(), both["score_b"].to_numpy()
    if binary and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        found = statistics.paired_proportions(a.astype(bool), b.astype(bool))
        return (
            f"{protocol}, {found.n:,} items: both right {found.both:,}, only {first} {found.only_a:,}, only {second} "
            f"{found.only_b:,}, neither {found.neither:,}; McNemar's exact p = {found.p:.2g} for this pair alone"
        )
    better, worse = int((b > a).sum()), int((b < a).sum())
    return f"{protocol}, {len(both):,} items: {second} is better on {better:,}, worse on {worse:,}, level on the rest"


def _item_row(row: pd.Series, text: dict[str, str], first: str, second: str, binary: bool) -> dict[str, Any]:
    """What is shown of an item: its texts, then what each model made of it."""
    found: dict[str, Any] = {"item": str(row.iloc[0])}
    told = dict(text) or {name: row[f"{name}_a"] for name in ("question", "reference") if f"{name}_a" in row}
    found |= {name: _clip(str(value)) for name, value in told.items()}
    for side, model in (("a", first), ("b", second)):
        for name in ("generation", "answer"):
            if f"{name}_{side}" in row and not ("generation_a" in row and name == "answer"):
                found[model] = _clip(str(row[f"{name}_{side}"]))
        if "logp_positive_a" in row:
            odds = row[f"logp_positive_{side}"] - row[f"logp_negative_{side}"]
            answer = ("negative", "positive")[int(row[f"prediction_{side}"])]
            found[model] = f"{answer} ({odds:+.2f} nats to positive)"
        elif "logp_chosen_a" in row:
            found[model] = f"{row[f'logp_chosen_{side}'] - row[f'logp_rejected_{side}']:+.1f} nats to the chosen"
        elif not binary:
            found[model] = f"{-row[f'score_{side}']:.3f} bits per byte"
    if "label_a" in row:
        found["right answer"] = ("negative", "positive")[int(row["label_a"])]
    return found


def _clip(text: str) -> str:
    return text if len(text) <= CLIPPED else f"{text[: CLIPPED // 2]} … {text[-CLIPPED // 2 :]}"


# Preferences --------------------------------------------------------------------------------------------------------

MARGINS = {
    "likelihood": "log p(chosen) − log p(rejected) (nats)",
    "reward": "implicit reward, chosen − rejected (β × nats)",
}


@_told
def preferences(
    run: Run, models: Names = ("sft", "dpo"), *, margin: str = "likelihood", order: str = "lowest", count: int = 4
) -> Shown:
    """Margins of the held-out preference pairs, and the pairs at one end of the last model's with their texts.

    margin: "likelihood", log p(chosen) − log p(rejected) in nats; "reward", DPO's implicit reward against the SFT
    checkpoint, which only models measured against it have. order: "lowest" or "highest".
    """
    for name, value, allowed in (("margin", margin, MARGINS), ("order", order, ("lowest", "highest"))):
        if value not in allowed:
            raise ConfigError(f"{name} = {value!r}: allowed are {', '.join(allowed)}")
    names = [part.strip() for part in models.split(",")] if isinstance(models, str) else list(models)
    protocol = next((one for one in reading.scored(run) if one.endswith("/preferences")), None)
    if protocol is None:
        reading.readable(run)
        raise MissingInput(f"run {run.name} has measured no preferences yet: run `{run.command('evaluate-dpo')}`")
    found, missing = {}, []
    for name in names:
        try:
            found[name] = margins(reading.items(run, name, protocol), margin)
        except MissingInput as error:
            missing.append(str(error))
        except KeyError:
            missing.append(
                f"{name} was measured against no reference, so it has no rewards: margin='likelihood' it has"
            )
    if not found:
        return _with_notes(None, missing)
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    axes = figure.subplots()
    every = np.concatenate(list(found.values()))
    edges = np.linspace(every.min(), every.max(), 41) if np.ptp(every) else np.array([-0.5, 0.5]) + every.min()
    lines = []
    for name, values in found.items():
        right = float((values > 0).mean() + 0.5 * (values == 0).mean())
        lines.append(f"{name}: mean margin {values.mean():+.3f}, chosen ahead in {right:.1%} of {len(values):,} pairs")
        tint = naming.colour(name, found)
        axes.hist(values, edges, color=tint, alpha=0.45, label=name)
        axes.axvline(values.mean(), color=tint, linewidth=1.5)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel=MARGINS[margin], ylabel="pairs")
    axes.legend(frameon=False, fontsize=8)
    _quiet(axes)
    last = list(found)[-1]
    try:
        texts = reading.texts(run, last, protocol)
    except ThreefoldError as error:
        texts, missing = {}, [*missing, str(error)]
    values = found[last]
    numbers = reading.items(run, last, protocol)["item"].to_numpy()
    places = np.argsort(values if order == "lowest" else -values, kind="stable")[:count]
    rows = []
    for place in places:
        number = int(numbers[place])
        pair = {name: _clip(text) for name, text in texts.get(number, {}).items()}
        rows.append({"pair": str(number), "margin": f"{values[place]:+.3f}", **pair})
    told = "\n".join(lines)
    title = f"{order} margins of {last}"
    html = page.image(figure, told) + page.prose(told) + page.heading(title) + page.table(rows)
    return _with_notes(Shown(Html(html), f"{told}\n{title}\n{page.plain_table(rows)}"), missing)


def margins(frame: pd.DataFrame, margin: str = "likelihood") -> np.ndarray:
    """The margin of each pair [N]. KeyError for rewards of a model that was measured against no reference."""
    if margin == "reward":
        return frame["reward_margin"].to_numpy(float)
    return (frame["logp_chosen"] - frame["logp_rejected"]).to_numpy(float)


# Shared -------------------------------------------------------------------------------------------------------------


def _with_notes(shown: Shown | None, notes: Iterable[str]) -> Shown:
    """A view with what is missing from it underneath."""
    parts = [*([shown] if shown else []), *map(page.note, notes)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def _quiet(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=QUIET, labelsize=8)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
