"""The views of a run. Each takes the run and plain values and returns a `Shown`: HTML in a notebook, text elsewhere.

A view reports in its place what is missing or damaged (a stage, an evaluation, a data set) and the command that makes
it; an impossible name or value is a ConfigError.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from basics.errors import ConfigError, DataError
from basics.names import replicate_of
from papertrail.stage import at_work
from study.comparison import models as naming
from study.comparison.training import smooth
from study.explore import display, read
from study.explore.display import Shown, note, notes, panel, table
from study.explore.read import Names
from study.explore.results import items, preferences
from study.run import Run
from threefold.data.templates import instruction_prompt
from threefold.data.tokenizer import encode, sink_ids
from threefold.evaluation import attention as attention_maps
from threefold.model import generate

__all__ = ["attention", "continuations", "items", "losses", "overview", "preferences"]

FORMS = {"text": str, "instruction": instruction_prompt}  # how a prompt is put to the models
ALTERNATIVES = 5  # listed for a token
LEGEND = (
    "The colour of a token is its probability given the text before it, from red (0%) to blue (100%); the prompt is in "
    "italics; hover over a token for its likely alternatives."
)
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # lines and held-out points of the runs in a diagram
LABELLED = 40  # largest number of tokens that an attention map labels


@panel()
def overview(run: Run) -> Shown:
    """A run's trainings and evaluations, and the commands that make the missing ones."""
    stages, working, (evaluated, unread) = read.trainings(run), at_work(run.path), read.evaluated(run)
    finished, missing = read.each(stages, lambda stage: (run.require(stage), read.loss_curve(run, stage, points=1)))
    rows = []
    for name in stages:
        state = "in training" if run.partial_folder(name).name == working else "missing or damaged"
        made, curve = finished.get(name, ({}, {}))
        row = {
            "stage": name,
            "state": "finished" if made else state,
            "tokens": made.get("tokens"),
            "held-out loss": next(reversed(curve.get("heldout", {}).get("loss", [])), None),
            "weights": (made.get("weights_sha256") or "")[:12] or None,
            "evaluated": "yes" if name in evaluated else "no",
        }
        rows.append(row)
    return display.heading(f"run {run.name}") + table(rows) + notes([*missing, *unread])


# A prompt -----------------------------------------------------------------------------------------------------------


@panel(form=list(FORMS), new_tokens=(1, 128), temperature=(0.0, 2.0, 0.1), seed=(0, 20), at=(1, 64))
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
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed = {seed}: allowed is 0 to {2**63 - 1}")

    def column(stage: str) -> Shown:
        model, tokenizer = read.checkpoint(run, stage)
        try:
            return _continuation(model, tokenizer, FORMS[form](prompt), new_tokens, temperature, seed, at)
        except DataError as error:  # too long for this model's context
            return display.block(str(error))

    columns, missing = read.each(read.chosen(run, stages), column)
    page = table([{name: display.Html(shown.html) for name, shown in columns.items()}] if columns else []).html
    text = "\n".join(f"{name}: {shown.text}" for name, shown in columns.items())
    return Shown(page + display.block(LEGEND).html if columns else "", text) + notes(missing)


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
        spans.append(display.token(text, probability, tip, prompt=place < len(prompt_ids), marked=place == marked))
    if len(prompt_ids) <= marked < len(ids):
        alternatives = _alternatives(tokenizer, logp_TV[marked - 1])
        listed = table([{f"token {at}": repr(word), "p": f"{p:.1%}"} for word, p in alternatives])
    else:
        listed = Shown(display.block(f"{len(new)} new tokens: there is no token {at}").html)
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


@panel(against=["tokens", "step"], smoothing=(0.0, 0.3, 0.01))
def losses(
    run: Run,
    stages: Names = (),
    *,
    overlay: Names = (),
    span: tuple[float, float] = (0.0, 1.0),
    against: str = "tokens",
    smoothing: float = 0.05,
) -> Shown:
    """Loss curves, one panel per stage; a stage in training is drawn up to its latest step.

    overlay: other runs, whose curves of the same stages are drawn with dashed lines. span: the part of each training
    that is drawn, (0, 1) for all of it; the vertical axis fits it. against: "tokens" or "step". smoothing: window of
    the running mean as a share of the steps; 0 draws none.
    """
    low, high = float(span[0]), float(span[1])
    if not 0 <= low < high <= 1:
        raise ConfigError(f"span = ({low:g}, {high:g}): expected 0 <= begin < end <= 1")
    runs = [run, *(read.open_run(name) for name in read.split(overlay) if name != run.name)]
    wanted = {(stage, drawn.name): drawn for stage in read.chosen(run, stages) for drawn in runs if stage in drawn.plan}
    read_curves, messages = read.each(wanted, lambda key: read.loss_curve(wanted[key], key[0], points=20_000))
    curves = {key: curve for key, curve in read_curves.items() if curve.get("loss")}
    stages = list(dict.fromkeys(stage for stage, _ in curves))
    if not stages:
        return notes(messages or [f"no step has been trained in run {run.name}"])
    figure = Figure(figsize=(max(4.4, 3.4 * len(stages)), 3.0), layout="constrained")
    axes = dict(zip(stages, figure.subplots(1, len(stages), squeeze=False)[0], strict=True))
    lines = []
    for (stage, name), curve in curves.items():
        frame = pd.DataFrame({key: curve[key] for key in ("step", "tokens", "loss")}).set_index(against, drop=False)
        frame["smooth"] = smooth(frame["loss"].to_numpy(float), smoothing)
        heldout = pd.Series(curve["heldout"].get("loss", []), curve["heldout"].get(against, []), dtype=float)
        begin, end = low * frame.index[-1], high * frame.index[-1]
        part, label = frame.loc[begin:end], "training" if len(runs) == 1 else name
        style, marker = STYLES[[drawn.name for drawn in runs].index(name) % len(STYLES)]
        line = {"color": naming.colour(replicate_of(stage)[0]), "linestyle": style}
        axes[stage].plot(part["loss"], **line, linewidth=0.6, alpha=0.3 if smoothing else 1.0)
        axes[stage].plot(part["smooth"], **line, linewidth=1.6 if smoothing else 0.6, label=label)
        if len(heldout):
            points = heldout.loc[begin:end]
            axes[stage].plot(points, marker, color=display.INK, markersize=4, label=f"{label}, held out")
        text = "no step lies in this part"
        if len(part):
            first, last = part.iloc[0], part.iloc[-1]
            text = f"steps {first.step:,.0f} to {last.step:,.0f}, loss {first.loss:.3f} to {last.loss:.3f}"
            text += f", held out {heldout.iloc[-1]:.3f} at the end" if len(heldout) else ""
        lines.append(f"{stage}{'' if name == run.name else f' of {name}'}: {text}")
    for stage, diagram in axes.items():
        diagram.set(title=stage, xlabel="tokens trained on" if against == "tokens" else "step")
        diagram.set_ylabel("loss (nats per pair)" if stage.startswith("dpo") else "loss (nats per token)")
        diagram.xaxis.set_major_locator(MaxNLocator(4))
        diagram.xaxis.set_major_formatter(EngFormatter(sep=""))  # 150k
        display.finish(diagram)
    return display.image(figure, "\n".join(lines)) + notes(messages)


# Attention ----------------------------------------------------------------------------------------------------------


@panel()
def attention(run: Run, stage: str = "dpo", prompt: str = "The old miller", *, layer: int = 0, head: int = 0) -> Shown:
    """A stage's attention while it reads a prompt: one map, and beside it all heads with their share on the sinks.

    layer, head: of the large map, from 1; 0 is the mean over all.
    """
    (stage,) = read.chosen(run, [stage])
    model, tokenizer = read.checkpoint(run, stage)
    for name, value, most in (("layer", layer, model.config.n_layer), ("head", head, model.config.n_head)):
        if not 0 <= value <= most:
            return note(f"{stage} has no {name} {value}: choose 1 to {most}, or 0 for the mean over all")
    ids, sinks = _prompt_ids(tokenizer, prompt), max(1, model.config.sinks)
    first = min(attention_maps.FIRST_QUERIES, len(ids) // 2)
    if first < sinks or len(ids) > model.config.context:
        return note(f"{len(ids)} tokens: type a prompt of {2 * sinks} to {model.config.context - sinks}")
    maps_LHTS = attention_maps.maps(model, ids)
    share_LH = attention_maps.sink_share(maps_LHTS, sinks, first)
    uniform = attention_maps.uniform_share(len(ids), sinks, first)
    selected = maps_LHTS[slice(None) if layer == 0 else slice(layer - 1, layer)]
    map_TS = selected[:, slice(None) if head == 0 else slice(head - 1, head)].mean(dim=(0, 1))
    target = "sink" if model.config.sinks else "first token"
    height = 4.6 if len(ids) > LABELLED else max(4.6, 0.16 * len(ids) + 1.6)
    figure = Figure(figsize=(2.2 * height, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = _draw_map(left, map_TS)
    if len(ids) <= LABELLED:
        labels = [_label(tokenizer, token_id) for token_id in ids]
        left.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, parse_math=False)
        left.set_yticks(range(len(labels)), labels, fontsize=7, parse_math=False)
    place = f"{'all layers' if layer == 0 else f'layer {layer}'}, {'all heads' if head == 0 else f'head {head}'}"
    left.set(title=f"{stage}: {place}", xlabel="attended token", ylabel="attending token")
    _draw_heads(right, maps_LHTS, share_LH)
    right.set(title=f"all heads, with their share on the {target}", xlabel="head", ylabel="layer")
    figure.colorbar(drawn, ax=right, shrink=0.8, label="probability")
    return display.image(
        figure,
        f"{stage}: the {target}{'' if model.config.sinks else ' (this model has no sink)'} takes "
        f"{share_LH.mean():.0%} of the attention, {share_LH.min():.0%} to {share_LH.max():.0%} by head, of queries "
        f"from position {first} on; an even spread would give {uniform:.0%}",
    )


def _draw_map(axes: Axes, map_TS: torch.Tensor) -> Any:
    return axes.imshow(map_TS.clamp_min(1e-3).numpy(), cmap="Blues", norm="log", vmin=1e-3, vmax=1, aspect="auto")


def _draw_heads(axes: Axes, maps_LHTS: torch.Tensor, share_LH: torch.Tensor) -> None:
    """The maps of all heads side by side, a row per layer; each with its share where there is room for the text."""
    layers, heads, length, _ = maps_LHTS.shape
    framed = torch.nn.functional.pad(maps_LHTS, (0, 1, 0, 1), value=1.0)  # a dark line between two maps
    side = length + 1
    _draw_map(axes, framed.transpose(1, 2).reshape(layers * side, heads * side))
    if layers * heads <= 200:
        for (layer, head), share in np.ndenumerate(share_LH.numpy()):
            axes.text((head + 0.95) * side, (layer + 0.05) * side, f"{share:.0%}", ha="right", va="top", fontsize=8)
    axes.set_xticks((np.arange(heads) + 0.5) * side, range(1, heads + 1), fontsize=8)
    axes.set_yticks((np.arange(layers) + 0.5) * side, range(1, layers + 1), fontsize=8)


def _label(tokenizer: Any, token_id: int) -> str:
    """A token in one line of ten characters, without characters that a font lacks."""
    text = tokenizer.decode([token_id]).replace("\n", "↵").replace(" ", "·")
    return "".join(char if char.isprintable() and ord(char) < 0x3000 else "?" for char in text)[:10]
