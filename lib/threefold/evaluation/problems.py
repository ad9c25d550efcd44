"""Tasks that a model answers by greedy generation: word problems (GSM8K) and held-out instructions.

Answers to word problems are extracted and compared exactly as lm-eval 0.4 does.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from basics.errors import EvaluationError
from threefold.data.readers import with_final_number
from threefold.data.templates import FORMS, instruction_prompt, problem_prompt
from threefold.evaluation.adapter import LanguageModel
from threefold.evaluation.results import SCORING, Dataset, Evaluation, Items, Scoring, point, proportion, too_long

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


def problems(
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
    texts, lengths_N = generate_where(model, prompts, ~long_N, new_tokens, STOP, scoring)
    answers = [item["answer"] for item in data.items]
    strict, flexible = [extract_strict(text) for text in texts], [extract_flexible(text) for text in texts]
    rows = pd.DataFrame(
        {
            "item": np.arange(len(prompts)),
            "question": [item["question"] for item in data.items],
            "answer": [normalize(answer) for answer in answers],
            "generation": texts,
            "tokens": lengths_N,
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


def instructions(
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
      Wilson), `unfinished` (share of the answers cut off at `new_tokens`), without an interval.
    - Reproduces: SFT's own loss on the same tokens; no published figure.
    """
    name, items = f"{data.name}/responses", data.items
    prompts = [instruction_prompt(item["instruction"], item["input"]) for item in items]
    references = [item["output"] for item in items]
    prompt_ids = [model.prefix_ids + ids for ids in model.encode(prompts)]
    response_ids = [[*ids, model.tokenizer.eos_token_id] for ids in model.encode(references)]
    requests = list(zip(prompt_ids, response_ids, strict=True))
    kept = [i for i, (prompt, response) in enumerate(requests) if len(prompt) + len(response) - 1 <= model.context]
    if not kept:
        raise EvaluationError(
            f"{name}: no example fits the {model.context} positions of {model.name}; use a longer model.context"
        )
    rows = pd.DataFrame(
        {
            "item": np.arange(len(items)),
            "nats": np.nan,
            "tokens": [len(ids) for ids in response_ids],
            "bytes": [len(reference.encode()) for reference in references],
            "reference": references,
        }
    )
    rows.loc[kept, "nats"] = -scoring.totals(model, [requests[i] for i in kept], lambda i: f"{name}: item {kept[i]}")
    scored = rows.loc[kept]
    metrics = {"response_loss": scoring.ratio(scored["nats"], scored["tokens"], "nats per token", "examples")}
    settings = {
        "items": len(items),
        "left_out_too_long": len(items) - len(kept),
        "response_tokens": int(scored["tokens"].sum()),
        "new_tokens": new_tokens,
    }
    if (n := min(generations, len(items))) > 0:
        fits_N = np.array([len(ids) + new_tokens <= model.context for ids in prompt_ids[:n]])
        texts, lengths_N = generate_where(model, prompts[:n], fits_N, new_tokens, FORMS["instruction"].stops, scoring)
        answers, asked = [text.strip() for text in texts], int(fits_N.sum())
        correct = [a != "" and a == reference.strip() for a, reference in zip(answers, references, strict=False)]
        missing = [None] * (len(items) - n)
        rows["answer"] = pd.array(answers + missing, dtype="string")
        rows["correct"] = pd.array(correct + missing, dtype="boolean")
        cut_off = (lengths_N[fits_N] >= new_tokens).sum() / max(1, asked)
        metrics |= {
            "exact_match": proportion(correct, "exact match"),
            "unfinished": point(cut_off, "share of items", asked),
        }
        settings |= {"generations": n, "generations_too_long": n - asked}
    return Evaluation(name, model.name, model.weights_sha256, metrics, rows, settings)


def generate_where(
    model: LanguageModel, prompts: list[str], fits_N: np.ndarray, new_tokens: int, stop: Sequence[str], scoring: Scoring
) -> tuple[list[str], np.ndarray]:
    """Greedy answers and their lengths in tokens [N]; "" and 0 for a prompt that does not fit the context."""
    texts, lengths_N = [""] * len(prompts), np.zeros(len(prompts), np.int64)
    kept = np.flatnonzero(fits_N)
    generated = model.generate([prompts[i] for i in kept], new_tokens, stop, batch_tokens=scoring.batch_tokens)
    for index, answer in zip(kept, generated, strict=True):
        texts[index], lengths_N[index] = answer
    return texts, lengths_N


def draw(demonstrations: Items, shots: int, seed: int) -> list[Mapping]:
    """`shots` seeded demonstrations without repetition."""
    if shots > len(demonstrations):
        raise EvaluationError(
            f"evaluation.problem_shots = {shots}, but evaluation.problem_demonstrations has {len(demonstrations)} items"
        )
    generator = np.random.default_rng([seed, shots])
    return [demonstrations[i] for i in generator.choice(len(demonstrations), shots, replace=False)] if shots else []
