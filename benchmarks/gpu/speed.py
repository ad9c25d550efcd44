"""What is timed: matrix products, training steps, decoding and scoring; and the kernels of a step."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cost import Model
from benchmarks.gpu.box import EOS, SINK, Box, texts
from threefold.config import ModelConfig, TokenizerConfig, TrainConfig
from threefold.data.packing import PackedRows, PairedRows, pack_documents, pack_examples, pack_pairs
from threefold.data.tokenizer import build_tokenizer
from threefold.evaluation import LanguageModel
from threefold.memory import free_memory
from threefold.model import Decoder, generate, to_transformers
from threefold.training import NextToken, Objective, Preference
from threefold.training.feed import Feed
from threefold.training.loop import TrainStep
from threefold.training.numerics import choose
from threefold.training.objectives import MicroBatch

H100 = 989e12  # FLOP/s in bf16 by the data sheet, dense
WARM_UP, STEPS = 5, 30  # steps that are not counted, and all of them
LAST_MOMENT = 10  # seconds before a section's end at which steps stop


def matmul(box: Box) -> dict[str, Any]:
    dtype, found = (torch.bfloat16 if box.device == "cuda" else torch.float32), {}
    config, rows = box.model_config(), 256 if box.rehearse else 32768
    side = 256 if box.rehearse else 8192
    for m, k, n in ((side,) * 3, (rows, config.d_model, config.d_ff), (rows, config.d_ff, config.d_model)):
        a, b = (torch.randn(shape, device=box.device).to(dtype) for shape in ((m, k), (k, n)))
        seconds = box.seconds(lambda a=a, b=b: [a @ b for _ in range(10)], repeats=5)
        found[f"{m} x {k} x {n}"] = 20 * m * k * n / seconds / 1e12
    return {"tflops": found, "fastest_tflops": max(found.values())}


# Training -----------------------------------------------------------------------------------------------------------


def _rows(stage: str, config: ModelConfig, count: int) -> PackedRows | PairedRows:
    """About `count` documents, examples or pairs with lengths like those of Wikipedia and stories, Alpaca, HH-RLHF."""
    longest = config.context // 2 - 2
    scale = min(1.0, config.context / 1024)
    if stage == "pretrain":
        return pack_documents(texts(0, count, 300 * scale, 1.0, config.vocab_size, 8192), config, EOS, [SINK])
    median, spread = (20, 0.5) if stage == "sft" else (120, 0.8)
    prompts = texts(1, count, median * scale, spread, config.vocab_size, longest)
    responses = [texts(seed, count, 55 * scale, 0.9, config.vocab_size, longest) for seed in (2, 3)]
    if stage == "sft":
        return pack_examples(list(zip(prompts, responses[0], strict=True)), config, EOS, [SINK])
    return pack_pairs(list(zip(prompts, *responses, strict=True)), config, EOS, [SINK])


def _prepared(box: Box, stage: str, train: TrainConfig, count: int) -> tuple[TrainStep, Feed, dict[str, Any]]:
    """A step and its rows, and what preparing the objective took."""
    config, noted = box.model_config(), {}
    rows, model = _rows(stage, config, count), Decoder(config)
    objective: Objective = Preference(train.beta) if stage == "dpo" else NextToken()
    feed = Feed(rows, train, 0, _rows("pretrain", config, count) if train.replay else None)
    with tempfile.TemporaryDirectory() as folder:
        begun = box.now()
        objective.prepare(model, rows, None, train, Path(folder), box.device)
        if stage == "dpo":
            noted["reference_pairs_per_second"] = len(rows) / (box.now() - begun)
    numerics = choose(train, sum(p.numel() for p in model.parameters()), feed.positions, box.device)
    numerics = replace(numerics, by_block=stage != "pretrain")  # as in the whole stages of `full`
    return TrainStep(model, objective, train, numerics), feed, {**noted, "numerics": numerics.note}


def _steps(step: TrainStep, feed: Feed) -> Iterator[tuple[list[MicroBatch], float]]:
    """Take the steps; the micro-batches and the loss of each. Micro-batches are halved where memory runs out."""
    done = 0
    while done < feed.steps:
        for batches, _ in feed.run(done):
            batches = [MicroBatch.of(batch) for batch in batches]
            try:
                _, values = step.gradients(batches, sum(batch.weight for batch in batches))
            except torch.OutOfMemoryError as error:
                step.model.zero_grad(set_to_none=True)
                free_memory(error)
                if not feed.halve():
                    raise
                break
            step.update()
            done += 1
            yield batches, values[0].item()


def training(box: Box, stage: str) -> dict[str, Any]:
    steps, warm_up = (3, 1) if box.rehearse else (STEPS, WARM_UP)
    train = box.train_config(stage, steps)
    count = {"pretrain": 8000, "sft": 8000, "dpo": train.batch_size * 8}[stage] if not box.rehearse else 60
    if box.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step, feed, found = _prepared(box, stage, train, count)
    costs, head = Model.of(step.model.config), step.model.head_weight.numel()
    timed, losses, begun = [], [], box.now()
    for batches, loss in _steps(step, feed):
        ended = box.now()
        tokens, padding = sum(batch.tokens for batch in batches), sum(batch.padding for batch in batches)
        targets = sum(len(batch.targets_N) for batch in batches)
        flops = (6 * (costs.products - head) + 3 * costs.attention) * tokens + 6 * head * targets
        timed.append((ended - begun, tokens, flops, padding / sum(batch.tokens_BT.numel() for batch in batches)))
        losses.append(loss)
        begun = ended
        if len(timed) > warm_up + 2 and time.monotonic() > box.deadline - LAST_MOMENT:
            break
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"losses that are not finite: {losses}")
    seconds, tokens, flops, padding = np.array(timed[warm_up:]).T
    rate = float(np.median(flops / seconds))
    low, median, high = np.quantile(tokens / seconds, [0.25, 0.5, 0.75])
    fastest = box.results.get("matmul", {}).get("fastest_tflops")
    peak = torch.cuda.max_memory_allocated() if box.device == "cuda" else 0
    return found | {
        "tokens_per_second": float(median),
        "quartiles": [float(low), float(high)],
        "steps": len(seconds),
        "warm_up_seconds": sum(entry[0] for entry in timed[:warm_up]),
        "seconds_a_step": float(np.median(seconds)),
        "tokens_a_step": float(np.median(tokens)),
        "rows": f"{feed.accumulate} x {' x '.join(map(str, batches[0].tokens_BT.shape))}",
        "padding": float(np.mean(padding)),
        "tflops": rate / 1e12,
        "share_of_989_tflops": rate / H100,
        "share_of_matmul": rate / 1e12 / fastest if fastest else None,
        "peak_memory_gb": peak / 1e9,
        "parameters": step.n_parameters,
        "loss": [losses[0], losses[-1]],
    }


def top_kernels(box: Box) -> dict[str, Any]:
    train = replace(box.train_config("pretrain", 4), accumulate=1)
    step, feed, _ = _prepared(box, "pretrain", train, 60 if box.rehearse else 2000)
    steps = _steps(step, feed)
    for _ in range(3):
        next(steps)
    kind, wanted = ("device", DeviceType.CUDA) if box.device == "cuda" else ("cpu", DeviceType.CPU)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (box.device == "cuda")
    with profile(activities=activities) as profiler:
        next(steps)
        box.now()
    spent = {
        event.key: (getattr(event, f"self_{kind}_time_total") / 1e3, event.count)
        for event in profiler.key_averages()
        if event.device_type == wanted and not event.is_user_annotation  # operators repeat the time of their kernels
    }
    total = sum(ms for ms, _ in spent.values())
    top = sorted(spent.items(), key=lambda item: -item[1][0])[:20]
    return {
        "milliseconds": total,
        "kernels": [
            {"name": name[:120], "milliseconds": ms, "calls": calls, "share": ms / total} for name, (ms, calls) in top
        ],
    }


# Inference ----------------------------------------------------------------------------------------------------------


def _pair(box: Box) -> tuple[Decoder, Any]:
    """The same model as a Decoder and in transformers, in bf16 on a GPU."""
    model = box.model(std=0.02).eval()
    if box.device == "cuda":
        model = model.bfloat16()
    return model, to_transformers(model)


def _tokens(box: Box, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, box.model_config().vocab_size, (rows, length), generator=generator)


@torch.inference_mode()
def decoding(box: Box) -> dict[str, Any]:
    (ours, theirs), found = _pair(box), {}
    length, new = (16, 8) if box.rehearse else (512, 128)
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": EOS}
    for batch in (1, 32):
        prompts = _tokens(box, batch, length)
        inputs = {"inputs": prompts.to(box.device), "attention_mask": torch.ones_like(prompts).to(box.device)}
        calls = {
            "tokens_per_second": partial(generate, ours, prompts.tolist(), new),
            "not captured": partial(_not_captured, ours, prompts.tolist(), new),
            "transformers": partial(theirs.generate, **inputs, **settings),
        }
        found[f"batch {batch}"] = {name: batch * new / box.seconds(call) for name, call in calls.items()}
    return found


def _not_captured(*arguments: Any) -> None:
    with patch("threefold.model.decoding.CAPTURED", set()):
        generate(*arguments)


@torch.inference_mode()
def scoring(box: Box) -> dict[str, Any]:
    config, (ours, theirs) = box.model_config(), _pair(box)
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=259), ["a text of a few words"], config.sinks)
    model, width, found = LanguageModel.from_model(ours, tokenizer, "ours", "none"), config.context, {}
    count, batch = (8, 4) if box.rehearse else (256, 32)
    shots = _tokens(box, 1, width // 2).repeat(count, 1)
    cases = {  # contexts, targets, and how many targets each context has
        "windows": (_tokens(box, count, width // 2), _tokens(box, count, width // 2 - 1), 1),
        "few-shot": (torch.cat([shots, _tokens(box, count, width // 16)], dim=1), _tokens(box, count, 2), 2),
    }
    for name, (context, target, several) in cases.items():
        targets = target.view(count, several, -1)
        inputs = torch.cat([context, targets[:, 0, :-1]], dim=1).to(box.device)
        rows, length = targets.to(box.device), targets.shape[2]
        requests = [(c, t) for c, ts in zip(context.tolist(), targets.tolist(), strict=True) for t in ts]
        our_score = partial(model.loglikelihoods, requests, batch_tokens=batch * width)
        their_score = partial(_transformers_scores, theirs, inputs.split(batch), rows.split(batch), length)
        found[name] = {
            "tokens_per_second": inputs.numel() / box.seconds(our_score),
            "transformers": inputs.numel() / box.seconds(their_score),
            "difference": float(np.abs(np.concatenate(our_score()) - their_score()).max()),
        }
    return found


def _transformers_scores(model: Any, inputs: Any, targets: Any, length: int) -> np.ndarray:
    """Log-probabilities of the targets [B, K, T] of each batch of rows, in one vector."""
    parts = []
    for tokens_BT, targets_BKT in zip(inputs, targets, strict=True):
        logits_BTV = model(tokens_BT, use_cache=False, logits_to_keep=length).logits
        logp_BKTV = logits_BTV.float().log_softmax(-1)[:, None].expand(-1, targets_BKT.shape[1], -1, -1)
        parts.append(logp_BKTV.gather(3, targets_BKT[..., None]).flatten())
    return torch.cat(parts).cpu().numpy()
