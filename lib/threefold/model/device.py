"""The device that models run on, and whether it multiplies bf16 fast."""

from functools import lru_cache

import torch

from basics.errors import ConfigError


def pick_device(device: str | None = None) -> str:
    """The device asked for, else a GPU if there is one, else the CPU."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no GPU here; leave the device out to run on the CPU")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device {device}: allowed are cpu and cuda")
    return kind


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
