"""The cost of training, by calculation: operations and bytes of a step, and its duration on several devices.

The model of time, for data-parallel training with copies (DDP) and Muon:

    step = micro-batches x (operations / rate) + exposed communication + Muon + update

Gradients (fp32) are summed in a ring: each worker sends and receives 2 (W - 1) / W of their bytes (Patarasuk and Yuan
2009). They go while the backward pass of the last micro-batch runs (two thirds of its time); what takes longer is
exposed, and so is the last bucket. Muon's directions (bf16) are gathered after it, each worker computing its share of
them. The update reads and writes weights, gradients and states once, on every worker alike.

`LOSS` counts the bytes that the loss moves for each logit in bf16. Eager: the product writes 2; 6 to widen them to
fp32; 4 each to find the largest and to sum; 8 each to subtract and to take exponentials; 6 to narrow the gradient
again; its two products read 4. Fused: 2 written, 2 read for the largest and the sum, 4 to write the gradient, 4 read.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from threefold.config import ModelConfig
from threefold.model.decoder import Decoder

LOSS = {"eager": 42, "fused": 12}
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at a time
NEWTON_SCHULZ = 5  # iterations of torch.optim.Muon
UPDATE = (
    28  # bytes per parameter that an optimizer moves: reads weight, gradient, two moments, writes all but the gradient
)


@dataclass(frozen=True)
class Model:
    """The counts of a model that the costs follow from."""

    parameters: int
    products: int  # parameters that multiply every token: all matrices, the output head once
    attention: int  # operations of a token with all positions of its row, forward, in all layers
    hidden: dict[tuple[int, int], int]  # shape -> number of the matrices that Muon trains

    @classmethod
    def of(cls, config: ModelConfig, width: int | None = None) -> "Model":
        """The counts of a model with this `vocab_size`, for rows of `width` positions (default: the context)."""
        with torch.device("meta"):
            model = Decoder(config)
        matrices = [module.weight for module in model.blocks.modules() if isinstance(module, nn.Linear)]
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            products=sum(weight.numel() for weight in matrices) + model.head_weight.numel(),
            attention=4 * config.n_layer * (width or config.context) * config.d_model,
            hidden=dict(Counter(tuple(weight.shape) for weight in matrices)),
        )

    @property
    def flops_a_token(self) -> int:
        """FLOPs per token, forward and backward: 6 per multiplying parameter, and attention over the whole row."""
        return 6 * self.products + 3 * self.attention

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.parameters

    def muon_flops(self, workers: int = 1) -> int:
        """FLOPs in one step of the worker that has most to orthogonalise."""
        return sum(-(-count // workers) * newton_schulz_flops(*shape) for shape, count in self.hidden.items())

    def muon_bytes(self, workers: int) -> float:
        """Bytes that each worker receives of the others' directions, in bf16."""
        return 2 * sum(count * rows * columns for (rows, columns), count in self.hidden.items()) * (1 - 1 / workers)


def newton_schulz_flops(rows: int, columns: int, steps: int = NEWTON_SCHULZ) -> int:
    """FLOPs of `optimizers.orthogonalise` on one matrix: three products per iteration on the smaller Gram matrix."""
    small, large = sorted((rows, columns))
    return steps * (4 * small * small * large + 2 * small**3)


def ring_bytes(size: float, workers: int) -> float:
    """Bytes that each worker sends, and receives, when `size` bytes are summed over all workers in a ring."""
    return 2 * (workers - 1) / workers * size


@dataclass(frozen=True)
class Device:
    """The speed of one worker's device, as achieved and not as on a data sheet."""

    flops: float  # operations/s in training
    memory: float  # bytes/s
    link: float  # bytes/s that it sends and at the same time receives
    overlap: float = 1.0  # share of the backward pass in which communication costs nothing


@dataclass(frozen=True)
class Step:
    """Seconds of one step."""

    compute: float
    exchange: float  # of the gradients, hidden or not
    exposed: float  # what is not hidden of it
    muon: float
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.muon + self.update


def step(model: Model, device: Device, workers: int, tokens: int, micro_batches: int, muon: bool = True) -> Step:
    """The time of a step of `tokens` tokens that `workers` share, each in `micro_batches` micro-batches."""
    compute = tokens / workers * model.flops_a_token / device.flops
    size = model.gradient_bytes
    exchange = ring_bytes(size, workers) / device.link if workers > 1 else 0.0
    hidden = device.overlap * compute / micro_batches * 2 / 3
    exposed = max(exchange - hidden, exchange * min(1.0, BUCKET / size))
    orthogonalise = model.muon_flops(workers) / device.flops + model.muon_bytes(workers) / device.link if muon else 0.0
    return Step(compute, exchange, exposed, orthogonalise, UPDATE * model.parameters / device.memory)
