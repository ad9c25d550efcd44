"""Views of evaluation results by item: what one model has right and another wrong, and preference margins."""

import itertools

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from basics.errors import MissingInput
from study.comparison import models as naming
from study.comparison.measures import KEYS
from study.explore import read
from study.explore.display import INK, Shown, block, finish, heading, image, notes, panel, table
from study.explore.read import Names
from study.preset import LINEAGE
from study.run import Run
from threefold.evaluation import statistics

CLIPPED = 700  # characters of a text in a table
WINS, LOSSES = "wins of the second", "losses of the second"
LABELS = ("negative", "positive")
MARGINS = {
    "likelihood": "log p(chosen) − log p(rejected) (nats)",
    "reward": "implicit reward, chosen − rejected (β × nats)",
}


@panel(which=[WINS, LOSSES], count=(1, 20))
def items(
    run: Run, first: str = "", second: str = "", protocol: str = "", *, which: str = WINS, count: int = 6
) -> Shown:
    """The items on which the second model does better than the first, or worse, with their texts.

    first, second, protocol: "" for the first that have such items, see `opening`. which: "wins of the second" or
    "losses of the second". Right-or-wrong tasks list the items that only one model has right; texts list the largest
    differences in bits per byte. Of several templates and draws the first counts.
    """
    evaluated, messages = read.evaluated(run)
    if len(evaluated) < 2:
        return notes(messages)
    first, second, protocol = opening(run, first, second, protocol, which)
    pairs = _pairs(run, first, second, protocol)
    gain = _gain(pairs, which).sort_values(ascending=False, kind="stable")
    texts, unread = read.each([protocol], lambda protocol: read.texts(run, first, protocol))
    rows = []
    for key in gain.index[:count]:
        pair, number = pairs.loc[key], key[0] if isinstance(key, tuple) else key
        own = {name: pair[f"{name}_a"] for name in ("question", "reference") if f"{name}_a" in pair}
        cells = {name: clip(str(text)) for name, text in (texts.get(protocol, {}).get(int(number)) or own).items()}
        cells |= {first: clip(pair["result_a"]), second: clip(pair["result_b"])}
        rows.append({"item": str(number)} | cells | ({"right answer": pair["label_a"]} if "label_a" in pair else {}))
    title = f"{which} ({second} against {first}): {len(gain):,}" + (f", {len(rows)} shown" if rows else "")
    return block(_summary(pairs, first, second, protocol)) + heading(title) + table(rows) + notes(unread)


def opening(run: Run, first: str, second: str, protocol: str, which: str = WINS) -> tuple[str, str, str]:
    """(first, second, protocol) as given; an empty one is filled so that there are items to show, where any are.

    Right-or-wrong tasks come before texts, and the last stages of the run's model before other pairs.
    """
    evaluated, _ = read.evaluated(run)
    models = sorted(evaluated, key=lambda name: -LINEAGE.index(name) if name in LINEAGE else 1)
    pairs = [(first or a, second or b) for b, a in itertools.combinations(models, 2)]
    choices = [(*pair, name) for pair in pairs for name in ([protocol] if protocol else read.protocols(run))]
    choices.sort(key=lambda choice: not choice[2].endswith(("-shot", "/responses")))  # right-or-wrong tasks first
    for choice in choices if not (first and second and protocol) else ():
        gains, _ = read.each([choice], lambda choice: _gain(_pairs(run, *choice), which))
        if len(gains.get(choice, ())):
            return choice
    return choices[0]


def _pairs(run: Run, first: str, second: str, protocol: str) -> pd.DataFrame:
    """Both models' results on the items that they share, with columns that end in _a and _b."""
    a, b = (scored(read.items(run, name, protocol), protocol) for name in (first, second))
    return a.merge(b, left_index=True, right_index=True, suffixes=("_a", "_b"), validate="1:1")


def _gain(pairs: pd.DataFrame, which: str) -> pd.Series:
    gain = (pairs["score_b"] - pairs["score_a"]) * (1 if which == WINS else -1)
    return gain[gain > 0]


def scored(frame: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """A row per item, of the first template and draw, with its score and result; the pages of a document together.

    The score is 1 or 0 (a tie .5) where items are right or wrong, else minus bits per byte, so that more is better.
    """
    for key in ("template", "draw"):
        if key in frame:
            frame = frame[frame[key] == frame[key].iloc[0]].drop(columns=key)
    if "document" in frame:
        frame = frame.groupby("document", as_index=False)[["nats", "tokens", "bytes"]].sum()
    keys = [key for key in KEYS if key in frame]
    if "correct" in frame:
        frame = frame[frame["correct"].notna()]
        score = frame["correct"].astype(float)
    elif {"nats", "bytes"} <= set(frame) and keys:
        score = -frame["nats"] / frame["bytes"] / np.log(2)
    else:
        raise MissingInput(f"{protocol} has no result by item that two models could be compared on")
    frame = frame.assign(score=score, binary="correct" in frame)
    frame = frame.assign(result=[_result(row) for _, row in frame.iterrows()])
    if "label" in frame:
        frame["label"] = [LABELS[int(label)] for label in frame["label"]]
    return frame.set_index(keys)


def _result(row: pd.Series) -> str:
    """A model's result on an item."""
    if "generation" in row or "answer" in row:
        return str(row["generation" if "generation" in row else "answer"])
    if "logp_positive" in row:
        odds = row["logp_positive"] - row["logp_negative"]
        return f"{LABELS[int(row['prediction'])]} ({odds:+.2f} nats to positive)"
    if "logp_chosen" in row:
        return f"{row['logp_chosen'] - row['logp_rejected']:+.1f} nats to the chosen"
    return ("right" if row["score"] else "wrong") if row["binary"] else f"{-row['score']:.3f} bits per byte"


def _summary(pairs: pd.DataFrame, first: str, second: str, protocol: str) -> str:
    a, b = pairs["score_a"].to_numpy(), pairs["score_b"].to_numpy()
    if pairs["binary_a"].all() and np.isin((a, b), (0, 1)).all():
        counts = statistics.paired_proportions(a.astype(bool), b.astype(bool))
        return (
            f"{protocol}, {counts.n:,} items: both right {counts.both:,}, only {first} {counts.only_a:,}, only "
            f"{second} {counts.only_b:,}, neither {counts.neither:,}; McNemar's exact p = {counts.p:.2g} for this pair "
            "alone"
        )
    better, worse = int((b > a).sum()), int((b < a).sum())
    return f"{protocol}, {len(pairs):,} items: {second} is better on {better:,}, worse on {worse:,}, equal on the rest"


def clip(text: str) -> str:
    return text if len(text) <= CLIPPED else f"{text[: CLIPPED // 2]} … {text[-CLIPPED // 2 :]}"


@panel(margin=list(MARGINS), order=["lowest", "highest"], count=(1, 20))
def preferences(
    run: Run, models: Names = ("sft", "dpo"), *, margin: str = "likelihood", order: str = "lowest", count: int = 4
) -> Shown:
    """Margins of the held-out preference pairs, and the pairs at one end of the last model's with their texts.

    margin: "likelihood", log p(chosen) − log p(rejected) in nats; "reward", DPO's implicit reward against the SFT
    checkpoint, for models that were measured against it. order: "lowest" or "highest".
    """
    protocol = next((name for name in read.protocols(run) if name.endswith("/preferences")), None)
    if protocol is None:
        return notes(read.evaluated(run)[1] or [f"run {run.name} measures no preferences: see evaluation.preferences"])

    def margins_of(name: str) -> pd.Series:
        frame = read.items(run, name, protocol).set_index("item")
        if margin == "likelihood":
            return frame["logp_chosen"] - frame["logp_rejected"]
        if "reward_margin" not in frame:
            raise MissingInput(
                f"{name} was measured against no reference, so it has no rewards: use margin='likelihood'"
            )
        return frame["reward_margin"]

    margins, missing = read.each(read.split(models), margins_of)
    if not margins:
        return notes(missing)
    last, values = list(margins.items())[-1]
    ends = values.sort_values(ascending=order == "lowest", kind="stable")[:count]
    texts, unread = read.each([protocol], lambda protocol: read.texts(run, last, protocol))
    rows = [
        {"pair": str(number), "margin": f"{value:+.3f}"}
        | {name: clip(text) for name, text in texts.get(protocol, {}).get(int(number), {}).items()}
        for number, value in ends.items()
    ]
    shown = _margin_histograms(margins, MARGINS[margin]) + heading(f"{order} margins of {last}")
    return shown + table(rows) + notes([*missing, *unread])


def _margin_histograms(margins: dict[str, pd.Series], label: str) -> Shown:
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    axes = figure.subplots()
    edges = np.histogram_bin_edges(np.concatenate(list(margins.values())), bins=40)
    lines = []
    for name, own in margins.items():
        right = float((own > 0).mean() + 0.5 * (own == 0).mean())
        lines.append(f"{name}: mean margin {own.mean():+.3f}, chosen ahead in {right:.1%} of {len(own):,} pairs")
        axes.hist(own, edges, color=naming.colour(name, margins), alpha=0.45, label=name)
        axes.axvline(own.mean(), color=naming.colour(name, margins), linewidth=1.5)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel=label, ylabel="pairs")
    finish(axes)
    return image(figure, "\n".join(lines))
