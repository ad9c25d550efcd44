"""Held-out instructions: the loss of the reference response and the exact match of a greedy answer."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from basics.errors import EvaluationError
from threefold.data.templates import instruction_prompt
from threefold.evaluation import statistics
from threefold.evaluation.adapter import LanguageModel
from threefold.evaluation.results import SCORING, Evaluation, Metric, Scoring, metric, plain

VERSION = 1  # of the protocols in this module; raised when a number would come out differently
STOP = ("\n###",)  # the next heading: where a model that never learned to stop begins a new task


def responses(
    model: LanguageModel,
    items: Sequence[Mapping],
    *,
    generations: int = 200,
    new_tokens: int = 64,
    source: str = "alpaca",
    scoring: Scoring = SCORING,
) -> Evaluation:
    """`{source}/responses`: nats per token of held-out responses, and exact match of greedy answers.

    - Data: `evaluation.instructions` (Alpaca, the part held out of SFT).
    - Tokens: the model's own, prefix tokens (BOS) first; prompt and response apart, as in training.
    - Prompt: the template of training (`### Instruction:` ... `### Response:`).
    - Scoring: log-likelihood of the reference response and its EOS, as SFT trains them, summed over all examples and
      divided once; examples that do not fit the context whole are left out and counted. The first `generations` are
      also answered greedily (to EOS, the next `###` heading or `new_tokens`), right where the answer equals the
      reference after stripping white space; an empty answer, or a prompt that leaves no room for one, is wrong.
    - Metrics: `response_loss` (nats per token; 95% bootstrap over examples), `exact_match` (share of items; 95%
      Wilson), `unfinished` (share cut off at `new_tokens`), without an interval.
    - Reproduces: SFT's own loss on the same tokens; no published figure.
    """
    name = f"{source}/responses"
    if not items:
        raise EvaluationError(f"{name}: no items")
    prompts = [instruction_prompt(item["instruction"], item["input"]) for item in items]
    prompt_ids = [model.prefix_ids + ids for ids in model.encode(prompts)]
    eos = model.tokenizer.eos_token_id
    response_ids = [[*ids, eos] for ids in model.encode([item["output"] for item in items])]
    fits = [
        i
        for i, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True))
        if len(prompt) + len(response) - 1 <= model.context
    ]
    if not fits:
        raise EvaluationError(
            f"{name}: no example fits the {model.context} positions of {model.name}; use a longer model.context"
        )
    spans = model.token_loglikelihoods(
        [(prompt_ids[i], response_ids[i]) for i in fits],
        batch_tokens=scoring.batch_tokens,
        describe=lambda r: f"{name}: item {fits[r]}",
    )
    rows = pd.DataFrame(
        {
            "item": np.arange(len(items)),
            "nats": np.nan,
            "tokens": [len(ids) for ids in response_ids],
            "bytes": [len(item["output"].encode()) for item in items],
            "reference": [item["output"] for item in items],
        }
    )
    rows.loc[fits, "nats"] = [-float(span.sum()) for span in spans]
    loss = statistics.bootstrap_ratio(
        rows.loc[fits, "nats"], rows.loc[fits, "tokens"], resamples=scoring.bootstrap, seed=scoring.seed
    )
    metrics = {"response_loss": metric(loss, "nats per token", "bootstrap over examples")}
    settings = {
        "version": VERSION,
        "items": len(items),
        "left_out_too_long": len(items) - len(fits),
        "response_tokens": int(rows.loc[fits, "tokens"].sum()),
        "new_tokens": new_tokens,
    }
    if generations > 0:
        first = min(generations, len(items))
        metrics |= _answers(model, rows, prompts[:first], prompt_ids[:first], new_tokens, settings, scoring)
    return Evaluation(name, model.name, model.weights_sha256, metrics, rows, settings)


def _answers(
    model: LanguageModel,
    rows: pd.DataFrame,
    prompts: list[str],
    prompt_ids: list[list[int]],
    new_tokens: int,
    settings: dict,
    scoring: Scoring,
) -> dict[str, Metric]:
    """Generate for the first prompts and add answer and correctness to their rows."""
    room = [i for i, ids in enumerate(prompt_ids) if len(ids) + new_tokens <= model.context]
    generated = model.generate_with_lengths(
        [prompts[i] for i in room], new_tokens, STOP, batch_tokens=scoring.batch_tokens
    )
    answers: list[str | None] = [""] * len(prompts) + [None] * (len(rows) - len(prompts))
    unfinished = 0
    for i, (text, length) in zip(room, generated, strict=True):
        answers[i] = text.strip()
        unfinished += length >= new_tokens
    rows["answer"] = pd.array(answers, dtype="string")
    correct = [
        None if answer is None else answer != "" and answer == reference.strip()
        for answer, reference in zip(answers, rows["reference"], strict=True)
    ]
    rows["correct"] = pd.array(correct, dtype="boolean")
    settings |= {"generations": len(prompts), "generations_too_long": len(prompts) - len(room)}
    n = len(prompts)
    return {
        "exact_match": metric(statistics.wilson(int(rows["correct"].sum()), n), "exact match", "Wilson"),
        "unfinished": plain(unfinished / n, "share of items", n),
    }
