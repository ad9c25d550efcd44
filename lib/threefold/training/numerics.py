"""The device, number format and compiler that a stage uses, and one line that reports them.

bf16 is chosen only where the hardware multiplies it fast: on NVIDIA GPUs that have it and on CPUs with AMX or
AVX512-BF16. Elsewhere it is emulated and slower than fp32. Hardware flags decide, not a measurement, so that a run on a
busy machine takes the same steps as one on an idle machine.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

from basics.errors import ConfigError
from threefold.config import TrainConfig
from threefold.graphics import missing_to_compile
from threefold.memory import free_memory
from threefold.model.device import fast_bf16, pick_device
from threefold.training.distributed import current

# Compiling takes up to a minute with a cold cache and saves about a third of a step, so it pays off after a few minutes
# of training. The FLOP/s that a device trains at are only needed to within a factor of two. On a GPU, blocks are
# compiled for shorter trainings, such as those of ablations: one graph serves all blocks of a model and all seeds.
FLOPS = {"cpu": 1.5e11, "cuda": 1.5e14}
COMPILE_FROM_SECONDS = {"cpu": 240, "cuda": 20}
WHOLE_FROM_SECONDS = {"cpu": 0, "cuda": 600}  # from which the whole model is one graph
BY_BLOCK = "compiled block by block"


@dataclass(frozen=True)
class Numerics:
    """The choices for one stage."""

    device: str
    bf16: bool
    compile: bool
    note: str  # one line for a person
    by_block: bool = False  # whether each block is compiled by itself

    @property
    def synchronous(self) -> bool:
        """Whether a result is there as soon as its operation returns: on a CPU, not on a GPU."""
        return self.device == "cpu"

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass: weights stay fp32; matrix products are bf16 if that was chosen."""
        return torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext()


Result = TypeVar("Result")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch has a type for exhausted GPU memory only; its CPU allocator raises RuntimeError."""
    texts = ("DefaultCPUAllocator", "std::bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def in_memory(compute: Callable[[int], Result], batch_size: int) -> Result:
    """compute(batch_size). Where a device runs out of memory, again with half the batch size, down to 1.

    For computations whose result does not depend on it. Workers compute in step, so several of them do not retry.
    """
    try:
        return compute(batch_size)
    except torch.OutOfMemoryError as error:
        if batch_size == 1 or current().size > 1:
            raise
        free_memory(error)
    return in_memory(compute, batch_size // 2)


# Rows, inner size and columns of products that keep a CPU busy. Which is fastest differs between libraries.
SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 704, 256), (4096, 256, 1024))


def matmul_flops(dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s at which the CPU multiplies matrices of this format with this process's threads: the fastest of `SHAPES`,
    each timed for so many seconds. Results are written in place; nothing is allocated."""
    best = 0.0
    for m, k, n in SHAPES:
        a, b_t, out = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype).T, torch.empty(m, n, dtype=dtype)
        torch.mm(a, b_t, out=out)
        done, begun = 0, time.perf_counter()
        while (spent := time.perf_counter() - begun) < seconds:
            torch.mm(a, b_t, out=out)
            done += 1
        best = max(best, 2 * done * m * k * n / spent)
    return best


def choose(config: TrainConfig, parameters: int, positions: int, device: str | None = None) -> Numerics:
    """Resolve `precision` and `compile` for a stage.

    Args:
        config: the stage's.
        parameters: of the model, for the cost of a position (6 FLOPs per parameter, forward and backward).
        positions: that the whole stage computes, padding included.
        device: as in `pick_device`.

    Raises:
        ConfigError: compile = "on" without what it needs.
    """
    device = pick_device(device)
    fast, missing = fast_bf16(device), missing_to_compile(device)
    if config.compile == "on" and missing:
        raise ConfigError(f'compile = "on" needs {missing}, which is not found; "auto" or "off" runs without')
    precision = {
        "fp32": "fp32, as asked for",
        "bf16": "bf16 autocast" + ("" if fast else ", as asked for, though this machine only emulates it"),
        "auto": "bf16 autocast" if fast else "fp32 (no fast bf16 on this machine)",
    }[config.precision]
    seconds = 6 * parameters * positions / FLOPS[device]
    pays = seconds >= COMPILE_FROM_SECONDS[device]
    compiled = config.compile == "on" or (config.compile == "auto" and not missing and pays)
    by_block = compiled and seconds < WHOLE_FROM_SECONDS[device]
    if compiled:
        compiling = BY_BLOCK if by_block else "compiled"
    elif config.compile == "off":
        compiling = "not compiled, as asked for"
    else:
        compiling = f"not compiled ({f'not found: {missing}' if missing else 'too few steps to pay for it'})"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    note = f"{where}; {precision}; {compiling}"
    return Numerics(device, precision.startswith("bf16"), compiled, note, by_block)
