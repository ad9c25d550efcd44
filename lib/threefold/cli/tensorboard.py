"""A run's metrics.jsonl files as TensorBoard event files."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from threefold import provenance, stages
from threefold.errors import MissingInput
from threefold.run import Run, read_run_file

HELDOUT = "heldout_"
PLACE = ("step", "seconds")  # of a line; everything else in it is a scalar


class Writer(Protocol):
    """What is used of `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, walltime: float) -> None: ...

    def close(self) -> None: ...


def summary_writer() -> Callable[[str], Writer]:
    """TensorBoard's own writer, called with a folder. Raises MissingInput where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingInput("TensorBoard is not installed: `pip install -e '.[tensorboard]'`") from None
    return SummaryWriter


def export(run: Run, writer: Callable[[str], Writer]) -> Path:
    """Write <run>/tensorboard/<stage>/ for each stage that has metrics, one that is still training included, and
    return the folder; one that was there before is replaced.

    Tags: train/loss, train/lr, ..., heldout/loss, ...; the step is the stage's, the time its start plus the seconds of
    training until then. Raises MissingInput (nothing trained yet), TrainingError (a damaged line).
    """
    found = {}
    for stage in stages.steps(run.preset):
        for folder in (run.partial_folder(stage), run.stage_folder(stage)):
            if stage not in found and (folder / "metrics.jsonl").is_file():
                found[stage] = _read(folder)
    if not found:
        raise MissingInput(f"run {run.name} has trained no stage yet: `threefold run --run {run.name}`")
    with provenance.atomic_folder(run.path / "tensorboard") as out:
        for stage, (started, lines) in found.items():
            one = writer(str(out / stage))
            try:
                for tag, value, step, seconds in scalars(lines):
                    one.add_scalar(tag, value, global_step=step, walltime=started + seconds)
            finally:
                one.close()
    return run.path / "tensorboard"


def scalars(lines: list[dict[str, Any]]) -> list[tuple[str, float, int, float]]:
    """(tag, value, step, seconds of training) of each number in the lines of a metrics.jsonl."""
    found, seconds = [], 0.0
    for line in lines:
        seconds = line.get("seconds", seconds)  # an evaluation's line has none: it comes after its step's
        for name, value in line.items():
            if name not in PLACE and not (name == "tokens" and "heldout_loss" in line):
                group, short = ("heldout", name.removeprefix(HELDOUT)) if name.startswith(HELDOUT) else ("train", name)
                found.append((f"{group}/{short}", value, line["step"], seconds))
    return found


def _read(folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """(when the stage began, in seconds since 1970; its metrics)."""
    from threefold.training import read_metrics  # imports torch

    begun = (read_run_file(folder) or {}).get("started")
    return datetime.fromisoformat(begun).timestamp() if begun else 0.0, read_metrics(folder)
