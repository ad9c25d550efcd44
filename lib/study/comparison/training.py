"""Facts of training: tokens, time, efficiency and stability, from the stages' records and loss curves."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from study.comparison.load import Comparison
from study.comparison.models import SHOWN


@dataclass(frozen=True)
class Training:
    """What one stage took. Seconds are the device's where it was timed, else the stage's wall time."""

    stage: str
    tokens: int
    seconds: float
    timed: str  # "device" or "wall"
    parameters: int | None
    facts: dict[str, Any]

    @property
    def tokens_per_hour(self) -> float:
        return 3600 * self.tokens / self.seconds

    @property
    def gpus(self) -> list[str]:
        """The GPUs that it trained on, one a worker; the machine may have more."""
        workers = (self.facts.get("training") or {}).get("workers", 1)
        return ((self.facts.get("hardware") or {}).get("gpu") or [])[:workers]

    @property
    def device(self) -> str:
        cores = (self.facts.get("hardware") or {}).get("cores")
        if gpus := self.gpus:
            return f"{len(gpus)} × {gpus[0]}" if len(gpus) > 1 else gpus[0]
        return f"CPU, {cores} cores" if cores else "CPU"

    @property
    def limit(self) -> tuple[float, str] | None:
        """FLOP/s of matrix products that the device could do, and where that is from: "measured" on a CPU at the end of
        the training, in the format and with the threads it trained with; a GPU's "data sheet"."""
        if measured := (self.facts.get("training") or {}).get("matmul_flops"):
            return float(measured), "measured"
        peaks = [1e12 * peak for name, peak in SHOWN["peak"].items() if self.gpus and name in self.gpus[0]]
        return (len(self.gpus) * peaks[0], "data sheet") if peaks else None

    @property
    def flops_per_second(self) -> float | None:
        """6N a token (Kaplan et al. 2020); attention's share of the context is left out."""
        return 6 * self.parameters * self.tokens / self.seconds if self.parameters else None

    @property
    def share_of_limit(self) -> float | None:
        """Model FLOPs utilisation (Chowdhery et al. 2022, 2204.02311, appendix B, without attention's term), where the
        limit is known."""
        return self.flops_per_second / self.limit[0] if self.flops_per_second and self.limit else None


def total_parameters(comparison: Comparison, model: str) -> int | None:
    """Parameters of a model, from its own record or what its evaluations say."""
    if not (record := comparison.model(model)):
        return comparison.facts(model).get("parameters")
    counts = record.get("parameters")
    return counts.get("total") if isinstance(counts, dict) else counts


def trainings(comparison: Comparison, *stages: str) -> list[Training]:
    """Every stage that trained on tokens, in the fixed order; or those of `stages`."""
    found = []
    for stage in comparison.trained:
        facts = comparison.stage(stage) or {}
        timed = "device" if facts.get("device_seconds") else "wall"
        seconds, tokens = facts.get(f"{timed}_seconds"), facts.get("tokens")
        if tokens and seconds and stage in (stages or comparison.trained):
            size = total_parameters(comparison, stage)
            found.append(Training(stage, int(tokens), float(seconds), timed, size, facts))
    return found


@dataclass(frozen=True)
class Curve:
    """A stage's losses: mean over the first and last tenth of the steps, held-out at start and end, the worst
    setback."""

    stage: str
    name: str  # of the model, for a reader
    steps: int
    start: float
    end: float
    heldout: tuple[float, float] | None  # at start and end
    setback: float  # largest rise of the smoothed loss above the least it had been, in nats

    @property
    def stable(self) -> bool:
        """No smoothed setback larger than a tenth of what the stage started from, and an end no worse than the
        start."""
        return self.setback <= 0.1 * self.start and self.end <= self.start

    @property
    def steady(self) -> str:
        return "yes" if self.stable else "no"


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Running mean over a share of the steps."""
    width = max(1, round(share * len(values)))
    padded = np.concatenate([np.full(width - 1, values[0]), values])
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def curves(comparison: Comparison) -> list[Curve]:
    """Every stage with a recorded loss curve."""
    found = []
    for stage in comparison.trained:
        curve = comparison.values(f"curve/{stage}") or {}
        loss, step = np.asarray(curve.get("loss") or [], float), curve.get("step") or []
        if not len(loss):
            continue
        tenth, smoothed = max(1, len(loss) // 10), smooth(loss)
        setback = float(np.max(smoothed - np.minimum.accumulate(smoothed)))
        heldout = (curve.get("heldout") or {}).get("loss")
        ends = (float(heldout[0]), float(heldout[-1])) if heldout else None
        first, last = float(loss[:tenth].mean()), float(loss[-tenth:].mean())
        found.append(
            Curve(stage, comparison.name(stage), int(step[-1]) if step else len(loss), first, last, ends, setback)
        )
    return found


def worst(found: list[Curve]) -> Curve:
    """The curve with the largest setback for what it started from."""
    return max(found, key=lambda curve: curve.setback / curve.start)
