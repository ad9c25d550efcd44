"""Timing: interleaved training steps of several models, and single components with their gradients.

Everything that is compared runs once in every round, in a new random order, so that a slow moment of the machine, or
the previous call, affects all alike; comparisons pair the times of a round.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from threefold.config import ModelConfig, TrainConfig
from threefold.data.packing import PackedRows
from threefold.model.decoder import Decoder, FeedForward, make_norm
from threefold.training.feed import Feed
from threefold.training.loop import TrainStep
from threefold.training.numerics import BY_BLOCK, Numerics, choose
from threefold.training.objectives import MicroBatch, NextToken

WARM_UP = 2  # untimed rounds: the first allocates, and compiles if configured


@dataclass(frozen=True)
class Timing:
    """Seconds of everything that is compared."""

    seconds: dict[str, list[float]]  # name -> one per round
    note: str  # device, precision, compiler


def time_rounds(calls: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds that each call takes in each round, after `WARM_UP` untimed ones."""
    order, shuffle = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + rounds):
        shuffle.shuffle(order)
        for name in order:
            started = _now(device)
            calls[name]()
            taken = _now(device) - started
            if number >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# Training steps -----------------------------------------------------------------------------------------------------


def time_steps(
    variants: Mapping[str, tuple[ModelConfig, TrainConfig]],
    rows: Callable[[ModelConfig], PackedRows],
    rounds: int,
    device: str | None = None,
) -> Timing:
    """Whole training steps of several models: `accumulate` passes, clipping and the optimizers' update.

    Args:
        variants: name -> (model, training). The length of the first one decides whether all are compiled: on a GPU
            block by block, because each variant would have a graph of its own.
        rows: packed rows for a model's config.
    """
    model, config = next(iter(variants.values()))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(model).parameters())
    numerics = choose(config, parameters, Feed(rows(model), config, seed=0).positions, device)
    if numerics.compile and numerics.device == "cuda" and not numerics.by_block:
        note = numerics.note.replace("compiled", BY_BLOCK)
        numerics = replace(numerics, by_block=True, note=note)
    calls = {name: _step(*variant, rows(variant[0]), numerics) for name, variant in variants.items()}
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=len(calls) + 8):  # or the ninth model would run uncompiled
        return Timing(time_rounds(calls, rounds, numerics.device), numerics.note)


def _step(model: ModelConfig, config: TrainConfig, rows: PackedRows, numerics: Numerics) -> Callable[[], None]:
    """A training step of a model of its own, always on the same batch."""
    step = TrainStep(Decoder(model), NextToken(), config, numerics)
    batch = MicroBatch.of(next(rows.batches(config.batch_size, seed=0, steps=1))).to(numerics.device)

    def call() -> None:
        step.gradients([batch] * config.accumulate, batch.weight * config.accumulate)
        step.update()

    return call


# Components alone ---------------------------------------------------------------------------------------------------

FULL = ModelConfig(d_model=1024, n_head=16, d_ff=4096)  # of preset full, 253M parameters
# Positions per call: enough to fill the device, few enough to take seconds.
POSITIONS = {"cpu": {"norm": 4096, "ffn": 128}, "cuda": {"norm": 32768, "ffn": 32768}}


@dataclass(frozen=True)
class KernelTiming(Timing):
    """Forward and backward of one component and its counterpart."""

    part: Literal["norm", "ffn"]
    positions: int
    parameters: dict[str, int]


def time_kernels(
    part: Literal["norm", "ffn"], rounds: int, *, model: ModelConfig = FULL, device: str | None = None
) -> KernelTiming:
    """RMSNorm against LayerNorm, or SwiGLU against GPT-2's GELU at equal parameters, forward and backward, eager.

    model: gives the width and SwiGLU's `d_ff`; GELU's feed-forward, with two matrices instead of three, gets 3/2 of it.
    """
    numerics = choose(TrainConfig(compile="off"), 0, 0, device)
    positions = POSITIONS[numerics.device][part]
    if part == "norm":
        kernels = {"RMSNorm": make_norm(model), "LayerNorm": make_norm(replace(model, norm="layer"))}
    else:
        gelu = replace(model, ffn="gelu", d_ff=model.d_ff * 3 // 2)
        kernels = {"SwiGLU": FeedForward(model), "GELU": FeedForward(gelu)}
    calls = {name: _forward_backward(kernel, model.d_model, positions, numerics) for name, kernel in kernels.items()}
    counts = {name: sum(p.numel() for p in kernel.parameters()) for name, kernel in kernels.items()}
    return KernelTiming(time_rounds(calls, rounds, numerics.device), numerics.note, part, positions, counts)


def _forward_backward(kernel: nn.Module, width: int, positions: int, numerics: Numerics) -> Callable[[], None]:
    """A call that runs the kernel forward on random inputs [positions, width] and backward to inputs and parameters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in kernel.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    kernel.to(numerics.device)
    x, gradient = (torch.randn(positions, width, generator=generator).to(numerics.device) for _ in range(2))
    x.requires_grad_()

    def call() -> None:
        with numerics.autocast():
            out = kernel(x)
        out.backward(gradient.to(out.dtype))
        kernel.zero_grad(set_to_none=True)
        x.grad = None

    return call
