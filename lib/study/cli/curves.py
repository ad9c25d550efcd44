"""A run's metrics.jsonl files for programs that draw curves: TensorBoard event files, and offline runs of Weights &
Biases, of which nothing leaves the machine before `wandb sync`."""

import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from basics import files
from basics.errors import MissingInput
from papertrail.run import Run, read_run_file
from study.preset import to_dict

Point = tuple[str, float, int, float]  # tag, value, step, seconds since 1970


def series(run: Run) -> dict[str, list[Point]]:
    """{stage: its metrics as points}, stages that are still training included. Tags: train/loss, heldout/loss, ...

    Raises MissingInput (nothing trained yet), TrainingError (a damaged line).
    """
    from threefold.training import read_metrics  # imports torch

    points: dict[str, list[Point]] = {}
    for stage in run.plan:
        for folder in (run.partial_folder(stage), run.stage_folder(stage)):
            if stage not in points and (folder / "metrics.jsonl").is_file():
                begun = (read_run_file(folder) or {}).get("started")
                start = datetime.fromisoformat(begun).timestamp() if begun else 0.0
                points[stage] = _points(read_metrics(folder), start)
    if not points:
        raise MissingInput(f"run {run.name} has trained no stage yet: `threefold run --run {run.name}`")
    return points


def _points(lines: list[dict[str, Any]], start: float) -> list[Point]:
    points, seconds = [], 0.0
    for line in lines:
        seconds = line.get("seconds", seconds)  # an evaluation's line has none: it comes after its step's
        for name, value in line.items():
            if name in ("step", "seconds") or (name == "tokens" and "heldout_loss" in line):
                continue
            heldout = name.startswith("heldout_")
            tag = f"heldout/{name.removeprefix('heldout_')}" if heldout else f"train/{name}"
            points.append((tag, value, line["step"], start + seconds))
    return points


def summary_writer() -> Callable[[str], Any]:
    """TensorBoard's SummaryWriter, called with a folder. Raises MissingInput where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingInput("TensorBoard is not installed: `pip install -e '.[tensorboard]'`") from None
    return SummaryWriter


def to_tensorboard(run: Run, writer: Callable[[str], Any]) -> Path:
    """Write <run>/tensorboard/<stage>/ for each stage that has metrics, replacing an earlier export; return the folder.

    The step is the stage's; the time is its start plus the seconds of training. Raises what `series` raises.
    """
    stage_points = series(run)
    with files.atomic_folder(run.path / "tensorboard") as out:
        for stage, points in stage_points.items():
            board = writer(str(out / stage))
            try:
                for tag, value, step, time in points:
                    board.add_scalar(tag, value, global_step=step, walltime=time)
            finally:
                board.close()
    return run.path / "tensorboard"


def wandb_client() -> ModuleType:
    """The package wandb. Raises MissingInput where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise MissingInput("Weights & Biases is not installed: `pip install -e '.[wandb]'`") from None
    return wandb


def to_wandb(run: Run, wandb: ModuleType) -> Path:
    """Write <run>/wandb/offline-run-*/ for each stage that has metrics, replacing an earlier export; return the folder.

    Its name is `<run>/<stage>`, its group the run, its configuration the preset. Raises what `series` raises.
    """
    stage_points = series(run)
    # Syncing shares curves and configuration, but not which machine and environment they were exported on.
    settings = wandb.Settings(
        console="off", host="", disable_code=True, disable_git=True, silent=True,
        x_disable_machine_info=True, x_disable_meta=True, x_disable_stats=True, x_save_requirements=False,
    )  # fmt: skip
    with files.atomic_folder(run.path / "wandb") as out:
        for stage, points in stage_points.items():
            steps: dict[int, dict[str, float]] = {}
            for tag, value, step, time in points:
                steps.setdefault(step, {"_timestamp": time})[tag] = value
            with wandb.init(
                project="threefold", name=f"{run.name}/{stage}", group=run.name, job_type=stage,
                config=to_dict(run.preset), dir=str(out), mode="offline", settings=settings,
            ) as log:  # fmt: skip
                for step, values in steps.items():
                    log.log(values, step=step)
        for made in list(out.glob("wandb/offline-run-*")):
            made.rename(out / made.name)
        shutil.rmtree(out / "wandb")  # links and logs of the writing
    return run.path / "wandb"
