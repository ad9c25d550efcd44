"""Speed of prefill and decoding, with the models' timings interleaved so that a busy machine slows them alike."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from basics.errors import EvaluationError
from basics.machine import OtherLoad, cores
from threefold.evaluation.adapter import LanguageModel
from threefold.evaluation.results import Evaluation, Progress, metric, quiet
from threefold.evaluation.statistics import Interval

RELIABLE = 0.8  # cores that the other processes must leave, for each thread, so that times count as reliable
VERSION = 1  # of the protocols in this module; raised when a number would come out differently


def measure(
    models: Sequence[LanguageModel],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt: int = 64,
    new_tokens: int = 64,
    repeats: int = 5,
    seed: int = 0,
    progress: Progress = quiet,
) -> list[Evaluation]:
    """`speed`: tokens per second by batch size, one evaluation a model.

    - Data: none.
    - Tokens: random ids, seeded.
    - Prompt: `evaluation.speed_prompt` positions (prefix included) in every row.
    - Scoring: every repeat times all batch sizes (and all models given) in turn, after one round that is not counted.
      On a GPU each timing ends with a synchronisation. A model runs as the evaluations run it (see `backend` and
      `precision` in the settings). Where other processes leave less than 0.8 cores a thread, it says that the times
      are not reliable, and so does the record (`machine_busy`).
    - Metrics, tokens per second: `prefill_b{B}` (positions of the prompts over the time of one forward that fills the
      cache and yields the next token's logits), `decode_b{B}` (tokens of `new_tokens` greedy steps over their time);
      values are medians, low and high the quartiles of the repeats, not a confidence interval.
    - Reproduces: no published figure: it holds for the machine it ran on.
    """
    for model in models:
        if prompt + new_tokens > model.context:
            raise EvaluationError(
                f"speed: evaluation.speed_prompt = {prompt} and evaluation.speed_new_tokens = {new_tokens} exceed the "
                f"{model.context} positions of {model.name}; set them lower or use a longer model.context"
            )
    if min(prompt, new_tokens, repeats) < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise EvaluationError("speed: evaluation.speed_* must be at least 1 each")
    rows: list[tuple] = []
    load = OtherLoad()
    for repeat in range(-1, repeats):
        for batch in batch_sizes:
            for index, model in enumerate(models):
                prefill, decode = _time(model, batch, prompt, new_tokens, seed)
                if repeat >= 0:
                    rows.append((index, repeat, batch, "prefill", batch * prompt, prefill))
                    rows.append((index, repeat, batch, "decode", batch * new_tokens, decode))
        if repeat >= 0:
            progress(f"speed: repeat {repeat + 1} of {repeats}")
    others = load.cores()
    if busy := cores() - others < RELIABLE * torch.get_num_threads():
        progress(
            f"speed: the machine was too busy to time reliably: other processes used {others:.1f} of {cores()} cores; "
            "repeat it on a quiet machine, `threefold run --only speed --force`"
        )
    table = pd.DataFrame(rows, columns=["model", "repeat", "batch", "phase", "tokens", "seconds"])
    table["tokens_per_second"] = table["tokens"] / table["seconds"]
    noted = {"other_processes_cores": round(others, 2), "machine_busy": busy}
    return [_evaluation(model, models, table[table["model"] == index], noted) for index, model in enumerate(models)]


def _evaluation(
    model: LanguageModel, models: Sequence[LanguageModel], rows: pd.DataFrame, noted: dict[str, Any]
) -> Evaluation:
    metrics = {}
    for (phase, batch), group in rows.groupby(["phase", "batch"], sort=False):
        low, value, high = np.quantile(group["tokens_per_second"], [0.25, 0.5, 0.75]).tolist()
        quartiles = Interval(value, low, high, len(group))
        metrics[f"{phase}_b{batch}"] = metric(quartiles, "tokens per second", "quartiles of repeats")
    settings = {
        "version": VERSION,
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        **noted,
        "measured_by_turns_with": [other.name for other in models if other is not model],
        **model.facts,
    }
    items = rows.drop(columns="model").reset_index(drop=True)
    return Evaluation("speed", model.name, model.weights_sha256, metrics, items, settings)


@torch.inference_mode()
def _time(model: LanguageModel, batch: int, prompt: int, new_tokens: int, seed: int) -> tuple[float, float]:
    """Seconds of (prefill, decoding) of one batch."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(min(len(model.tokenizer), model.backend.vocab_size), (batch, prompt), generator=generator)
    if model.prefix_ids:
        tokens_BT[:, : len(model.prefix_ids)] = torch.tensor(model.prefix_ids[:prompt])
    tokens_BT = tokens_BT.to(model.device)
    synchronize = torch.get_device_module(model.device).synchronize
    synchronize(model.device)
    begin = time.perf_counter()
    with model.backend.packed(batch, batch * (prompt + new_tokens)):
        logits_BV, cache = model.backend.prefill(tokens_BT, prompt + new_tokens)
        synchronize(model.device)
        middle = time.perf_counter()
        decode = model.backend.decoding(cache)
        for _ in range(new_tokens):
            logits_BV = decode(logits_BV.argmax(-1))
        synchronize(model.device)
        return middle - begin, time.perf_counter() - middle
