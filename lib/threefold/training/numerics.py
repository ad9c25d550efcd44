"""Which device, number format and compiler a stage uses, and one line that says so.

bf16 is chosen only where the hardware multiplies it fast: NVIDIA GPUs that have it, CPUs with AMX or AVX512-BF16.
Elsewhere it is emulated and slower than fp32. Flags decide and not a probe: a run on a busy machine must take the same
steps as one on an idle one.
"""

import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch

from basics.errors import ConfigError
from threefold.config import TrainConfig
from threefold.model.device import pick_device

# Compiling costs up to a minute with a cold cache and saves about a third of a step: it pays from a few minutes of
# training on. What a device trains at is only needed to within a factor of two.
FLOPS = {"cpu": 1.5e11, "cuda": 1.5e14}
COMPILE_FROM_SECONDS = 240


@dataclass(frozen=True)
class Numerics:
    """The choices, fixed for a stage and kept over a resume."""

    device: str
    bf16: bool
    compile: bool
    note: str  # one line for a person

    @property
    def synchronous(self) -> bool:
        """Whether reading a result makes nothing wait: a CPU has computed it by then, a GPU has not."""
        return self.device == "cpu"

    def autocast(self) -> AbstractContextManager:
        """The context a forward pass runs in: weights stay fp32, matrix products are bf16 where chosen."""
        return torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext()


@lru_cache
def _fast_bf16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Measured on two Zen 4 cores with AVX512-BF16 and no AMX: a step of 0.5M and of 4M parameters takes 0.7 and 0.63 of
    # its fp32 time, Muon's iteration half.
    return kind == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def fast_bf16(device: str | torch.device) -> bool:
    """Whether the device multiplies bf16 matrices faster than fp32 ones."""
    return _fast_bf16(torch.device(device).type)


# Rows, inner size and columns of products that keep a CPU busy; which is fastest differs between libraries.
SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 704, 256), (4096, 256, 1024))


def matmul_flops(dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s that the CPU multiplies matrices of this format with, now and with this process's threads: the fastest of
    `SHAPES`, each timed for so many seconds. Results are written in place; nothing is allocated."""
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


def compiler(device: str) -> str | None:
    """What torch.compile would build kernels with on this device; None if it is not there."""
    cxx = shutil.which(os.environ.get("CXX", "")) or next(
        filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None
    )
    if device == "cpu":
        return cxx
    from torch.utils._triton import has_triton

    return "triton" if has_triton() and shutil.which(os.environ.get("CC", "") or "gcc") else None


def choose(config: TrainConfig, parameters: int, positions: int, device: str | None = None) -> Numerics:
    """Resolve `precision` and `compile` for a stage.

    Args:
        config: the stage's.
        parameters: of the model, for the cost of a position (6 FLOPs a parameter, forward and backward).
        positions: that the whole stage computes, padding included.
        device: as in `pick_device`.

    Raises:
        ConfigError: compile = "on" without a compiler.
    """
    device = pick_device(device)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and fast_bf16(device))
    found = compiler(device)
    if config.compile == "on" and found is None:
        needed = "a C++ compiler (g++ or clang++)" if device == "cpu" else "Triton and a C compiler"
        raise ConfigError(f'compile = "on" needs {needed}, and none is found; "auto" or "off" runs without')
    seconds = 6 * parameters * positions / FLOPS[device]
    compiled = config.compile == "on" or (
        config.compile == "auto" and found is not None and seconds >= COMPILE_FROM_SECONDS
    )
    if bf16:
        reason = "" if fast_bf16(device) else ", as asked for, though this machine only emulates it"
        precision = f"bf16 autocast{reason}"
    elif config.precision == "fp32":
        precision = "fp32, as asked for"
    else:
        precision = "fp32 (no fast bf16 on this machine)"
    if compiled:
        compiling = "compiled"
    elif config.compile == "off":
        compiling = "not compiled, as asked for"
    elif found is None:
        compiling = "not compiled (no compiler found)"
    else:
        compiling = "not compiled (too few steps to pay for it)"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Numerics(device, bf16, compiled, f"{where}; {precision}; {compiling}")
