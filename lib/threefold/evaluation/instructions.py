"""Held-out instructions: the loss of the reference response and the exact match of a greedy answer."""

import numpy as np
import pandas as pd

from basics.errors import EvaluationError
from threefold.data.templates import instruction_prompt
from threefold.evaluation.adapter import LanguageModel
from threefold.evaluation.problems import generate_where
from threefold.evaluation.results import SCORING, Dataset, Evaluation, Scoring, point, proportion

STOP = ("\n###",)  # the next heading: where a model that never learned to stop begins a new task


def responses(
    model: LanguageModel, data: Dataset, *, generations: int = 200, new_tokens: int = 64, scoring: Scoring = SCORING
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
    name, items = f"{data.name}/responses", data.items
    prompts = [instruction_prompt(item["instruction"], item["input"]) for item in items]
    prompt_ids = [model.prefix_ids + ids for ids in model.encode(prompts)]
    response_ids = [[*ids, model.tokenizer.eos_token_id] for ids in model.encode([item["output"] for item in items])]
    requests = list(zip(prompt_ids, response_ids, strict=True))
    kept = [i for i, (prompt, response) in enumerate(requests) if len(prompt) + len(response) - 1 <= model.context]
    if not kept:
        raise EvaluationError(
            f"{name}: no example fits the {model.context} positions of {model.name}; use a longer model.context"
        )
    spans = scoring.logprobs(model, [requests[i] for i in kept], lambda i: f"{name}: item {kept[i]}")
    rows = pd.DataFrame(
        {
            "item": np.arange(len(items)),
            "nats": np.nan,
            "tokens": [len(ids) for ids in response_ids],
            "bytes": [len(item["output"].encode()) for item in items],
            "reference": [item["output"] for item in items],
        }
    )
    rows.loc[kept, "nats"] = [-float(span.sum()) for span in spans]
    scored = rows.loc[kept]
    metrics = {"response_loss": scoring.ratio(scored["nats"], scored["tokens"], "nats per token", "examples")}
    settings = {
        "items": len(items),
        "left_out_too_long": len(items) - len(kept),
        "response_tokens": int(scored["tokens"].sum()),
        "new_tokens": new_tokens,
    }
    if (n := min(generations, len(items))) > 0:
        fits = [len(ids) + new_tokens <= model.context for ids in prompt_ids[:n]]
        texts, lengths = generate_where(model, prompts[:n], fits, new_tokens, STOP, scoring)
        answers = [text.strip() for text in texts]
        correct = [a != "" and a == item["output"].strip() for a, item in zip(answers, items[:n], strict=True)]
        missing = [None] * (len(items) - n)
        rows["answer"] = pd.array(answers + missing, dtype="string")
        rows["correct"] = pd.array(correct + missing, dtype="boolean")
        unfinished = sum(length >= new_tokens for length in lengths)
        metrics |= {
            "exact_match": proportion(correct, "exact match"),
            "unfinished": point(unfinished / n, "share of items", n),
        }
        settings |= {"generations": n, "generations_too_long": n - sum(fits)}
    return Evaluation(name, model.name, model.weights_sha256, metrics, rows, settings)
