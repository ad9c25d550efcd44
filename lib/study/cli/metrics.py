"""A run's metrics.jsonl files as series of numbers, for programs that draw curves."""

from datetime import datetime
from pathlib import Path
from typing import Any

from basics.errors import MissingInput
from papertrail.run import Run, read_run_file
from study import stages

HELDOUT = "heldout_"
PLACE = ("step", "seconds")  # of a line; everything else in it is a scalar


def trained(run: Run) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    """{stage: (when it began, in seconds since 1970; its metrics)}, one that is still training included.

    Raises MissingInput (nothing trained yet), TrainingError (a damaged line).
    """
    found = {}
    for stage in stages.steps(run.preset):
        for folder in (run.partial_folder(stage), run.stage_folder(stage)):
            if stage not in found and (folder / "metrics.jsonl").is_file():
                found[stage] = _read(folder)
    if not found:
        raise MissingInput(f"run {run.name} has trained no stage yet: `threefold run --run {run.name}`")
    return found


def scalars(lines: list[dict[str, Any]]) -> list[tuple[str, float, int, float]]:
    """(tag, value, step, seconds of training) of each number in the lines of a metrics.jsonl: train/loss, train/lr,
    ..., heldout/loss, ..."""
    found, seconds = [], 0.0
    for line in lines:
        seconds = line.get("seconds", seconds)  # an evaluation's line has none: it comes after its step's
        for name, value in line.items():
            if name not in PLACE and not (name == "tokens" and "heldout_loss" in line):
                group, short = ("heldout", name.removeprefix(HELDOUT)) if name.startswith(HELDOUT) else ("train", name)
                found.append((f"{group}/{short}", value, line["step"], seconds))
    return found


def _read(folder: Path) -> tuple[float, list[dict[str, Any]]]:
    from threefold.training import read_metrics  # imports torch

    begun = (read_run_file(folder) or {}).get("started")
    return datetime.fromisoformat(begun).timestamp() if begun else 0.0, read_metrics(folder)
