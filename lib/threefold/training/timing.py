"""How long things take: training steps of several models by turns, and single components with their gradients.

Everything that is compared takes its turn in every round, in an order drawn anew, so that a slow moment of the machine,
or the neighbour before it, meets all alike; the comparison pairs the times of a round.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from threefold.config import ModelConfig, TrainConfig
from threefold.data.packing import Batch, PackedRows
from threefold.model.decoder import Decoder, FeedForward, make_norm
from threefold.training import optimizers as optim
from threefold.training.feed import Feed
from threefold.training.loop import _Forward
from threefold.training.numerics import Numerics, choose
from threefold.training.objectives import NextToken, Work

WARM_UP = 2  # untimed rounds: the first allocates, and compiles where that is asked for


@dataclass(frozen=True)
class Timing:
    """Seconds of everything compared, round by round."""

    seconds: dict[str, list[float]]  # name -> one a round
    note: str  # device, precision, compiler


def time_rounds(turns: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds that each call takes in each round, after `WARM_UP` untimed ones."""
    order, shuffle = list(turns), random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(WARM_UP + rounds):
        shuffle.shuffle(order)
        for name in order:
            started = _now(device)
            turns[name]()
            seconds = _now(device) - started
            if turn >= WARM_UP:
                taken[name].append(seconds)
    return taken


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
        variants: name -> (model, training). The first one's length decides whether all are compiled, as in its stage.
        rows: packed rows for a model's config.
    """
    model, config = next(iter(variants.values()))
    feed = Feed(rows(model), config, seed=0)
    numerics = choose(config, sum(p.numel() for p in _on_meta(model).parameters()), feed.positions, device)
    steppers = {name: _Stepper(*variant, rows(variant[0]), numerics) for name, variant in variants.items()}
    turns = {name: stepper.step for name, stepper in steppers.items()}
    if numerics.compile:
        torch.compiler.reset()
        with torch._dynamo.config.patch(recompile_limit=len(turns) + 8):  # or the ninth model would run uncompiled
            return Timing(time_rounds(turns, rounds, numerics.device), numerics.note)
    return Timing(time_rounds(turns, rounds, numerics.device), numerics.note)


def _on_meta(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


class _Stepper:
    """A model that takes training steps, each on the same batch."""

    def __init__(self, model: ModelConfig, config: TrainConfig, rows: PackedRows, numerics: Numerics):
        self.config, self.numerics = config, numerics
        self.model = Decoder(model).to(numerics.device)
        self.forward = _Forward(self.model) if numerics.compile else self.model
        self.parameters = list(self.model.parameters())
        self.optimizers = optim.build(self.model, config)
        batch: Batch = next(rows.batches(config.batch_size, seed=0, steps=1))
        self.work = Work.of(batch).to(numerics.device)

    def step(self) -> None:
        for _ in range(self.config.accumulate):
            with self.numerics.autocast():
                loss = NextToken()(self.forward, self.work)
            (loss.sum / (loss.weight * self.config.accumulate)).backward()
        if self.config.clip > 0:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters], foreach=True)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


# Components alone ---------------------------------------------------------------------------------------------------

FULL = ModelConfig(d_model=1024, n_head=16, d_ff=4096)  # of preset full, 253M parameters
# Positions at a time: enough to fill the device, few enough for seconds.
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

    model: gives the width and `d_ff`, SwiGLU's; GELU's feed-forward has two matrices for three and gets 3/2 of it.
    """
    numerics = choose(TrainConfig(compile="off"), 0, 0, device)
    positions = POSITIONS[numerics.device][part]
    if part == "norm":
        kernels = {"RMSNorm": make_norm(model), "LayerNorm": make_norm(replace(model, norm="layer"))}
    else:
        gelu = replace(model, ffn="gelu", d_ff=model.d_ff * 3 // 2)
        kernels = {"SwiGLU": FeedForward(model), "GELU": FeedForward(gelu)}
    turns = {name: _forward_backward(kernel, model.d_model, positions, numerics) for name, kernel in kernels.items()}
    counts = {name: sum(p.numel() for p in kernel.parameters()) for name, kernel in kernels.items()}
    return KernelTiming(time_rounds(turns, rounds, numerics.device), numerics.note, part, positions, counts)


def _forward_backward(kernel: nn.Module, width: int, positions: int, numerics: Numerics) -> Callable[[], None]:
    """A call that takes the kernel through random inputs [positions, width] and back, to inputs and parameters."""
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
