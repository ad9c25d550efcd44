"""The device that models run on."""

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
