"""What all sections share: the device, sizes, the time that is left, and random documents."""

import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from threefold.config import LENGTHS, ModelConfig, TrainConfig
from threefold.model import Decoder

PRESET = Path(__file__).resolve().parents[2] / "lib" / "study" / "presets" / "full.toml"
VOCABULARY = 50258  # GPT-2's and the sink
EOS, SINK = 0, 1
TINY = {"n_layer": 2, "d_model": 64, "n_head": 4, "d_ff": 128, "context": 128, "vocab_size": 320}


@dataclass
class Box:
    """One run on one device.

    results: of the sections that have run. deadline: `time.monotonic()` at which the section in progress must end.
    """

    device: str
    rehearse: bool
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    deadline: float = float("inf")

    def model_config(self) -> ModelConfig:
        """That of `full`; in a rehearsal a tiny one."""
        return ModelConfig(**(TINY if self.rehearse else {**_preset()["model"], "vocab_size": VOCABULARY}))

    def train_config(self, stage: str, steps: int) -> TrainConfig:
        """That of a stage of `full`, for so many steps."""
        names = {entry.name for entry in fields(TrainConfig)} - set(LENGTHS)
        values = {key: value for key, value in _preset()[stage].items() if key in names}
        if self.rehearse:
            values |= {"batch_size": 4, "accumulate": min(2, values.get("accumulate", 1))}
        return TrainConfig(**values, steps=steps, compile="off" if self.rehearse else "on")

    def model(self, config: ModelConfig | None = None, std: float = 0.05) -> Decoder:
        """A model on the device with the same random weights each time, none of them zero."""
        model, generator = Decoder(config or self.model_config()), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter.copy_(noise + (parameter.ndim == 1))  # norms stay near 1
        return model.to(self.device)

    def now(self) -> float:
        """Seconds on a clock, once the device has done all it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, call: Callable[[], Any], repeats: int = 3) -> float:
        """The median seconds of a call after one that is not timed."""
        call()
        taken = []
        for _ in range(repeats):
            begun = self.now()
            call()
            taken.append(self.now() - begun)
        return float(np.median(taken))


def _preset() -> dict[str, Any]:
    return tomllib.loads(PRESET.read_text(encoding="utf-8"))


def texts(seed: int, count: int, median: float, spread: float, vocabulary: int, longest: int) -> list[np.ndarray]:
    """Random token ids with log-normal lengths, as those of documents are, at least 2 and at most `longest`."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(np.log(median), spread, count), 2, longest).astype(int)
    return [generator.integers(2, vocabulary, length) for length in lengths]


def close(found: Tensor, expected: Tensor, tolerance: float) -> dict[str, Any]:
    """The norm of the difference over that of the expected values, and whether it is within the tolerance."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    error = float((found - expected).norm() / expected.norm())
    return {"relative_error": error, "tolerance": tolerance, "ok": error <= tolerance}
