"""Facts of training: tokens, time, efficiency and stability, from the stages' records and loss curves."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from study.comparison.load import Comparison
from study.comparison.models import SHOWN
from study.comparison.results import percent, plain


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
    def device(self) -> str:
        return device(self.facts)

    @property
    def limit(self) -> tuple[float, str] | None:
        """FLOP/s of matrix products that the device could do, and where that is from: "measured" on a CPU at the end of
        the training, in the format and with the threads it trained with; a GPU's "data sheet"."""
        if measured := (self.facts.get("training") or {}).get("matmul_flops"):
            return float(measured), "measured"
        used = gpus(self.facts)
        peaks = [1e12 * peak for name, peak in SHOWN["peak"].items() if used and name in used[0]]
        return (len(used) * peaks[0], "data sheet") if peaks else None

    @property
    def flops_per_second(self) -> float | None:
        """6N a token (Kaplan et al. 2020); attention's share of the context is left out."""
        return 6 * self.parameters * self.tokens / self.seconds if self.parameters else None

    @property
    def share_of_limit(self) -> float | None:
        """Model FLOPs utilisation (Chowdhery et al. 2022, 2204.02311, appendix B, without attention's term), where the
        limit is known."""
        return self.flops_per_second / self.limit[0] if self.flops_per_second and self.limit else None


def gpus(facts: Mapping[str, Any]) -> list[str]:
    """The GPUs that a stage trained on, one a worker; the machine may have more."""
    workers = (facts.get("training") or {}).get("workers", 1)
    return ((facts.get("hardware") or {}).get("gpu") or [])[:workers]


def device(facts: Mapping[str, Any]) -> str:
    """The device that a stage ran on: "2 × NVIDIA H100", "CPU, 2 cores"."""
    if used := gpus(facts):
        return f"{len(used)} × {used[0]}" if len(used) > 1 else used[0]
    cores = (facts.get("hardware") or {}).get("cores")
    return f"CPU, {cores} cores" if cores else "CPU"


def total_parameters(comparison: Comparison, model: str) -> int | None:
    """Parameters of a model, from its own record or what its evaluations say."""
    counts = comparison.model(model).get("parameters") or {}
    return counts.get("total", comparison.facts(model).get("parameters"))


def trainings(comparison: Comparison, *stages: str) -> list[Training]:
    """Every stage that trained on tokens, in the fixed order; or those of `stages`."""
    found = []
    for stage in comparison.trained:
        facts = comparison.stage(stage)
        timed = "device" if facts.get("device_seconds") else "wall"
        seconds, tokens = facts.get(f"{timed}_seconds"), facts.get("tokens")
        if tokens and seconds and stage in (stages or comparison.trained):
            size = total_parameters(comparison, stage)
            found.append(Training(stage, int(tokens), float(seconds), timed, size, facts))
    return found


def total(found: list[Training]) -> Training:
    """Several stages of one model as one."""
    tokens, seconds = (sum(getattr(one, key) for one in found) for key in ("tokens", "seconds"))
    timed = "/".join(dict.fromkeys(one.timed for one in found))
    return replace(found[0], stage="total", tokens=tokens, seconds=seconds, timed=timed, parameters=None)


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
    def setback_text(self) -> str:
        """The largest setback in nats, and as a share of what the stage started from."""
        return f"{plain(self.setback, 3)} nats ({percent(self.setback / self.start)} of the start)"

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
        curve = comparison.values(f"curve/{stage}")
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
