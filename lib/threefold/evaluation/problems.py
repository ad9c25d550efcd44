"""Word problems by greedy chain of thought (GSM8K), extracted and compared exactly as lm-eval 0.4 does."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from basics.errors import EvaluationError
from threefold.data.readers import with_final_number
from threefold.data.templates import problem_prompt
from threefold.evaluation.adapter import LanguageModel
from threefold.evaluation.results import SCORING, Dataset, Evaluation, Scoring, point, proportion, too_long

STOP = ("Question:", "</s>", "<|im_end|>")
INVALID = "[invalid]"
KEYS = "evaluation.problem_shots, evaluation.problem_new_tokens or model.context"
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def extract_strict(generation: str) -> str:
    """The number after the first `#### `, or INVALID."""
    match = _STRICT.search(generation)
    return match[1].strip() if match else INVALID


def extract_flexible(generation: str) -> str:
    """The last thing that looks like a number, or INVALID."""
    matches = _FLEXIBLE.findall(generation)
    return next(group for group in matches[-1] if group).strip() if matches else INVALID


def normalize(answer: str) -> str:
    """What lm-eval compares: without `,`, `$`, everything up to the last `#### ` and one trailing `.`; lower case."""
    for pattern in _IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


def matches(extracted: str, answer: str) -> bool:
    """Whether an extracted answer equals the reference answer (a whole solution with its final number, see
    `threefold.data.readers.with_final_number`)."""
    return normalize(extracted) == normalize(with_final_number(answer) or answer)


def few_shot(
    model: LanguageModel, data: Dataset, shots: int, new_tokens: int, *, scoring: Scoring = SCORING
) -> Evaluation:
    """`{source}/{shots}-shot`: greedy solutions after `shots` worked examples, exact match of the final number.

    - Data: `evaluation.problems` (GSM8K, test, 1,319 items; a preset may take fewer, and the settings say so);
      demonstrations from `evaluation.problem_demonstrations` (GSM8K, train).
    - Tokens: the model's own, prefix tokens (BOS) first.
    - Prompt: `Question: {question}\\nAnswer:`, demonstrations with their full solutions before it, joined by blank
      lines; one seeded draw serves all items and models.
    - Scoring: greedy, to EOS, `Question:` (lm-eval's other stop strings too) or `new_tokens`. Strict takes the number
      after the first `#### `, flexible the last number in the text; both compare after lm-eval's normalisation. An
      empty generation is wrong, and so is an item that does not fit the context with its new tokens; more than one in
      twenty of these is an error.
    - Metrics, shares of items: `exact_match` (strict), `flexible_match`, `invalid` (no strict answer), each with a 95%
      Wilson interval; `unfinished` (cut off at `new_tokens`), without one.
    - Reproduces: both extractions of lm-eval 0.4's `gsm8k`, answer for answer on the same generations; GPT-2 124M is
      published with about 0.3% 5-shot.
    """
    name = f"{data.name}/{shots}-shot"
    chosen = draw(data.demonstrations, shots, scoring.seed)
    before = "".join(f"{problem_prompt(d['question'])} {d['answer']}\n\n" for d in chosen)
    prompts = [before + problem_prompt(item["question"]) for item in data.items]
    lengths = [len(model.prefix_ids) + len(ids) + new_tokens for ids in model.encode(prompts)]
    long_N = too_long(lengths, model.context, what=f"{name} with {new_tokens} new tokens", keys=KEYS)
    texts, tokens = generate_where(model, prompts, ~long_N, new_tokens, STOP, scoring)
    answers = [item["answer"] for item in data.items]
    strict, flexible = [extract_strict(text) for text in texts], [extract_flexible(text) for text in texts]
    rows = pd.DataFrame(
        {
            "item": np.arange(len(prompts)),
            "question": [item["question"] for item in data.items],
            "answer": [normalize(answer) for answer in answers],
            "generation": texts,
            "tokens": tokens,
            "strict": strict,
            "flexible": flexible,
            "correct": list(map(matches, strict, answers)),
            "correct_flexible": list(map(matches, flexible, answers)),
            "too_long": long_N,
        }
    )
    metrics = {
        "exact_match": proportion(rows["correct"], "exact match"),
        "flexible_match": proportion(rows["correct_flexible"], "exact match"),
        "invalid": proportion(rows["strict"] == INVALID, "share of items"),
        "unfinished": point((rows["tokens"] >= new_tokens).mean(), "share of items", len(rows)),
    }
    settings = {
        "items": len(rows),
        "shots": shots,
        "new_tokens": new_tokens,
        "stop": list(STOP),
        "too_long": int(long_N.sum()),
    }
    return Evaluation(name, model.name, model.weights_sha256, metrics, rows, settings)


def generate_where(
    model: LanguageModel,
    prompts: Sequence[str],
    fits: Sequence[bool],
    new_tokens: int,
    stop: Sequence[str],
    scoring: Scoring,
) -> tuple[list[str], list[int]]:
    """Greedy answers and their lengths in tokens; "" and 0 for a prompt that does not fit the context."""
    kept = [index for index, fit in enumerate(fits) if fit]
    generated = model.generate_with_lengths(
        [prompts[index] for index in kept], new_tokens, stop, batch_tokens=scoring.batch_tokens
    )
    by_prompt = dict(zip(kept, generated, strict=True))
    answers = [by_prompt.get(index, ("", 0)) for index in range(len(prompts))]
    return [text for text, _ in answers], [length for _, length in answers]


def draw(demonstrations: Sequence[Mapping], shots: int, seed: int) -> list[Mapping]:
    """`shots` seeded demonstrations without repetition."""
    if shots > len(demonstrations):
        raise EvaluationError(
            f"evaluation.problem_shots = {shots}, but evaluation.problem_demonstrations has {len(demonstrations)} items"
        )
    generator = np.random.default_rng([seed, shots])
    return [demonstrations[i] for i in generator.choice(len(demonstrations), shots, replace=False)] if shots else []
