"""Sentiment by label log-likelihood (SST-2): zero- and few-shot, over several templates and demonstration draws.

A model answers with the label it finds more likely after the prompt; nothing is generated, and likelihoods are not
normalised by length (lm-eval's `acc`). A small model often prefers one label after any sentence, which hides what it
can tell apart; accuracy after contextual calibration is therefore measured too. The spread over wordings and
demonstrations is reported beside the sampling error of the items, because at this scale it is often larger.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from basics.errors import EvaluationError
from threefold.data.templates import LABELS, review_prompt
from threefold.evaluation import results
from threefold.evaluation.adapter import LanguageModel
from threefold.evaluation.results import SCORING, Dataset, Evaluation, Items, Metric, Scoring, point, proportion

KEYS = "evaluation.sentiment_shots or model.context"
CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 5


@dataclass(frozen=True)
class Template:
    """A wording: `prompt` contains {sentence}; the words of the labels (0, 1) follow it after one space."""

    name: str
    prompt: str
    labels: tuple[str, str] = LABELS
    separator: str = "\n\n"  # between demonstrations

    def text(self, sentence: str) -> str:
        return self.prompt.replace("{sentence}", sentence)

    def demonstration(self, item: Mapping) -> str:
        return f"{self.text(item['sentence'])} {self.labels[item['label']]}"


TEMPLATES = (
    Template("lm-eval", review_prompt("{sentence}")),
    Template("review", "Review: {sentence}\nSentiment:"),
    Template("movie", "Movie review: {sentence}\nThis review is", ("negative", "positive")),
    Template("it-was", "{sentence}\nAll in all, the film was", ("terrible", "great")),
    Template("good-bad", "Text: {sentence}\nIs the text good or bad?\nAnswer:", ("bad", "good")),
)
PRECEDENT = TEMPLATES[1]


def zero_shot(model: LanguageModel, data: Dataset, *, templates: int = 5, scoring: Scoring = SCORING) -> Evaluation:
    """`{source}/0-shot`: every item under every template, no demonstrations.

    - Data: `evaluation.sentiment` (SST-2, validation, 872 items), sentences as the source has them (the hub's end in a
      space, which lm-eval keeps too).
    - Tokens: the model's own, prefix tokens (BOS) first; a label's tokens are what prompt and label together have
      beyond the prompt's.
    - Prompt: the first `evaluation.sentiment_templates` of five wordings; the first is `{sentence}\\nQuestion: Is this
      sentence positive or negative?\\nAnswer:`, answered ` negative` or ` positive`.
    - Scoring: the label of the higher summed log-likelihood, not normalised by length; a tie is the first label. An
      item too long for the context is wrong; more than one in twenty is an error.
    - Metrics, shares of items: `accuracy` (first template; 95% Wilson), `accuracy_calibrated` (likewise),
      `accuracy_mean` (over templates; 95% bootstrap over items); without interval `template_spread` (sd of the
      templates' accuracies), `template_lowest`, `template_highest`, `positive_rate` (how often the answer is
      positive). All but `accuracy_calibrated` are without calibration. The majority class's accuracy is in the
      settings.
    - Calibration: contextual calibration (Zhao et al. 2021, arXiv 2102.09690). Each label's probability is divided by
      the one it has after the same prompt with `N/A`, `[MASK]` and nothing in the place of the sentence, averaged over
      the three.
    - Reproduces: `accuracy` is lm-eval 0.4's `sst2` `acc`, the same prediction on every item.
    """
    name = f"{data.name}/0-shot"
    return with_demonstrations(model, data.items, [()], name, TEMPLATES[:templates], scoring=scoring)


def few_shot(
    model: LanguageModel,
    data: Dataset,
    shots: int,
    *,
    templates: int = 5,
    draws: int = 5,
    scoring: Scoring = SCORING,
) -> Evaluation:
    """`{source}/{shots}-shot`: every item under every template after each of several draws of demonstrations.

    - Data: `evaluation.sentiment` (SST-2, validation); demonstrations from `evaluation.sentiment_demonstrations`
      (SST-2, train).
    - Tokens: as zero-shot.
    - Prompt: as zero-shot, after `shots` demonstrations of the same wording joined by blank lines. A draw (there are
      `evaluation.sentiment_draws`) takes them seeded, labels as even as can be, in random order; all items, templates
      and models see the same draws.
    - Scoring: as zero-shot.
    - Metrics, shares of items: `accuracy` and `accuracy_calibrated` (first template, averaged over draws) and
      `accuracy_mean` (over templates and draws), with a 95% bootstrap over items (Wilson where there is one draw or one
      cell); the rest as zero-shot, and `draw_spread` (sd over the draws of a template's accuracy). The items hold every
      cell of items x templates x draws, from which the variance is split into its sources.
    - Calibration: as zero-shot, the demonstrations included.
    - Reproduces: lm-eval 0.4's few-shot `sst2` given the same demonstrations, the same prediction on every item.
    """
    name = f"{data.name}/{shots}-shot"
    drawn = [draw(data.demonstrations, shots, scoring.seed, index) for index in range(draws)]
    return with_demonstrations(model, data.items, drawn, name, TEMPLATES[:templates], scoring=scoring)


def grid(
    model: LanguageModel, data: Dataset, shots: int, *, first: int, draws: int = 5, scoring: Scoring = SCORING
) -> Evaluation:
    """`{source}/{shots}-shot-grid`: the first items under every template after every draw, to tell how much of a score
    is the prompt's.

    - Data: the first `evaluation.sentiment_grid_items` items of `evaluation.sentiment`; demonstrations as few-shot.
    - Tokens: as zero-shot.
    - Prompt: all five wordings, each after the same five draws of demonstrations, as few-shot makes them.
    - Scoring: as zero-shot.
    - Metrics: as few-shot. The variance of all models' answers is split over this full crossing of items, templates
      and draws; a few items suffice for that where all of them under 25 prompts would take hours. No score is quoted
      from it.
    - Reproduces: no published figure.
    """
    name = f"{data.name}/{shots}-shot-grid"
    drawn = [draw(data.demonstrations, shots, scoring.seed, index) for index in range(draws)]
    return with_demonstrations(model, data.items[:first], drawn, name, TEMPLATES, scoring=scoring)


def precedent(model: LanguageModel, data: Dataset, *, scoring: Scoring = SCORING) -> Evaluation:
    """`{source}/precedent-3-shot`: the precedent's protocol in form: one plain 3-shot prompt, the first 200 items.

    - Data: the first 200 items of `evaluation.sentiment` (SST-2, validation).
    - Tokens: as zero-shot.
    - Prompt: `Review: {sentence}\\nSentiment: {label}`, three fixed demonstrations (the first positive, the first
      negative, the second positive of `evaluation.sentiment_demonstrations`).
    - Scoring: as zero-shot, one run.
    - Metrics: `accuracy` (share of items; 95% Wilson), whose interval shows how little 200 items under one prompt can
      tell; `accuracy_calibrated`, which the precedent did not have; `positive_rate`, without interval.
    - Reproduces: no published figure: the precedent's code scored weights it had not trained.
    """
    positive, negative = ([item for item in data.demonstrations if item["label"] == label] for label in (1, 0))
    if len(positive) < 2 or not negative:
        raise EvaluationError(
            "evaluation.sentiment_demonstrations needs at least two positive items and a negative one"
        )
    fixed = (positive[0], negative[0], positive[1])
    name = f"{data.name}/precedent-{len(fixed)}-shot"
    return with_demonstrations(
        model, data.items[: results.PRECEDENT_ITEMS], [fixed], name, (PRECEDENT,), scoring=scoring
    )


def with_demonstrations(
    model: LanguageModel,
    items: Items,
    draws: Sequence[Items],
    name: str = "sst2/given",
    templates: Sequence[Template] = TEMPLATES[:1],
    *,
    scoring: Scoring = SCORING,
) -> Evaluation:
    """Every item under every template after each of these draws of demonstrations: what all protocols here run."""
    labels = np.array([item["label"] for item in items])
    free = [{"sentence": text} for text in CONTENT_FREE]
    frames = []
    n_long = 0
    for template in templates:
        for index, demonstrations in enumerate(draws):
            logp_N2, long_N = _label_logprobs(model, items, template, demonstrations, name, scoring)
            n_long += int(long_N.sum())
            free_F2, _ = _label_logprobs(model, free, template, demonstrations, f"{name}, no content", scoring)
            prediction = logp_N2.argmax(axis=1)  # a tie goes to the first label, as in lm-eval
            calibrated = (logp_N2 - content_free_logprobs(free_F2)).argmax(axis=1)
            columns = {
                "item": np.arange(len(items)),
                "template": template.name,
                "draw": index,
                "label": labels,
                "prediction": np.where(long_N, -1, prediction),
                "logp_negative": logp_N2[:, 0],
                "logp_positive": logp_N2[:, 1],
                "correct": (prediction == labels) & ~long_N,
                "prediction_calibrated": np.where(long_N, -1, calibrated),
                "correct_calibrated": (calibrated == labels) & ~long_N,
            }
            frames.append(pd.DataFrame(columns))
    rows = pd.concat(frames, ignore_index=True)
    majority = int(np.bincount(labels, minlength=2).argmax())
    settings = {
        "items": len(items),
        "templates": [template.name for template in templates],
        "shots": len(draws[0]),
        "draws": len(draws),
        "too_long": n_long,
        "calibration": list(CONTENT_FREE),
        "majority_label": LABELS[majority],
        "majority_accuracy": float((labels == majority).mean()),
    }
    return Evaluation(name, model.name, model.weights_sha256, _metrics(rows, scoring), rows, settings)


def draw(demonstrations: Items, shots: int, seed: int, index: int) -> tuple[Mapping, ...]:
    """The `index`-th seeded draw of `shots` demonstrations, labels as even as can be, in random order."""
    generator = np.random.default_rng([seed, shots, index])
    first = int(generator.integers(2))  # which label gets the odd one
    chosen: list[Mapping] = []
    for label, count in ((first, shots - shots // 2), (1 - first, shots // 2)):
        pool = [item for item in demonstrations if item["label"] == label]
        if len(pool) < count:
            raise EvaluationError(
                f"{shots} demonstrations need {count} of label {label}, "
                f"evaluation.sentiment_demonstrations has {len(pool)}"
            )
        chosen += [pool[i] for i in generator.choice(len(pool), count, replace=False)]
    return tuple(chosen[i] for i in generator.permutation(shots))


def content_free_logprobs(free_F2: np.ndarray) -> np.ndarray:
    """Log of both labels' probabilities averaged over F content-free inputs [F, 2] -> [2].

    Contextual calibration answers argmax p / p_cf (Zhao et al. 2021, arXiv 2102.09690, section 5, W = diag(p_cf)^-1),
    in logs argmax(log p - log p_cf); a common factor of both labels' probabilities changes nothing.
    """
    return np.logaddexp.reduce(free_F2, axis=0) - np.log(len(free_F2))


def _label_logprobs(
    model: LanguageModel, items: Items, template: Template, demonstrations: Items, name: str, scoring: Scoring
) -> tuple[np.ndarray, np.ndarray]:
    """(log-likelihood of both labels [N, 2], mask of items too long for the context, whose row is 0)."""
    shots = "".join(template.demonstration(item) + template.separator for item in demonstrations)
    prompts = [shots + template.text(item["sentence"]) for item in items]
    contexts = model.encode(prompts)
    whole = [model.encode([f"{prompt} {label}" for prompt in prompts]) for label in template.labels]
    lengths = [len(model.prefix_ids) + max(len(pair[0]), len(pair[1])) - 1 for pair in zip(*whole, strict=True)]
    long_N = results.too_long(lengths, model.context, what=f"{name}, template {template.name}", keys=KEYS)
    kept = np.flatnonzero(~long_N)
    logp_N2 = np.zeros((len(items), 2))
    logp_N2[kept] = scoring.totals(
        model,
        # as lm-eval: what prompt and label together have beyond the prompt's tokens
        [(model.prefix_ids + contexts[i], ids[i][len(contexts[i]) :]) for i in kept for ids in whole],
        lambda r: f"{name}: item {kept[r // 2]}, template {template.name}, label {template.labels[r % 2]!r}",
    ).reshape(-1, 2)
    return logp_N2, long_N


def _metrics(rows: pd.DataFrame, scoring: Scoring) -> dict[str, Metric]:
    cells = rows.groupby(["template", "draw"], sort=False)["correct"].mean().unstack("draw")
    first = rows[rows["template"] == rows["template"].iloc[0]]
    n = int(rows["item"].nunique())
    metrics = {
        "accuracy": _accuracy(first, scoring),
        "accuracy_calibrated": _accuracy(first, scoring, "correct_calibrated"),
    }
    if len(cells.index) > 1:
        metrics["accuracy_mean"] = _accuracy(rows, scoring)
        by_template = cells.mean(axis=1)
        metrics["template_spread"] = point(by_template.std(ddof=1), "sd of accuracy over templates", len(by_template))
        metrics["template_lowest"] = point(by_template.min(), "accuracy", n)
        metrics["template_highest"] = point(by_template.max(), "accuracy", n)
    if len(cells.columns) > 1:
        spread = float(np.sqrt(cells.var(axis=1, ddof=1).mean()))
        metrics["draw_spread"] = point(spread, "sd of accuracy over draws", len(cells.columns))
    # How often the positive label is chosen: .5 and chance accuracy is guessing, 0 or 1 and chance accuracy a bias.
    metrics["positive_rate"] = point((first["prediction"] == 1).mean(), "share of items", n)
    return metrics


def _accuracy(rows: pd.DataFrame, scoring: Scoring, correct: str = "correct") -> Metric:
    if not rows["item"].duplicated().any():
        return proportion(rows[correct], "accuracy")
    return scoring.ratio(rows[correct], 1.0, "accuracy", "items", clusters=rows["item"])
