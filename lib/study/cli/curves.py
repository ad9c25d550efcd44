"""A run's metrics.jsonl files for programs that draw curves: `threefold tensorboard` writes TensorBoard event files,
`threefold wandb` offline runs of Weights & Biases, of which nothing leaves the machine before `wandb sync`."""

import argparse
import contextlib
import importlib
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from basics import files
from basics.errors import MissingInput
from papertrail.run import Run, read_run_file
from study.cli.common import from_here, open_intact
from study.preset import to_dict

Point = tuple[int, float, dict[str, float]]  # step, seconds since 1970, values by tag (train/loss, heldout/loss, ...)


def tensorboard(options: argparse.Namespace) -> int:
    run, package = open_intact(options.run), _package("torch.utils.tensorboard", "TensorBoard", "tensorboard")
    out = from_here(to_tensorboard(run, package.SummaryWriter))
    print(f"`tensorboard --logdir {out}` shows the training of run {options.run}")
    return 0


def wandb(options: argparse.Namespace) -> int:
    out = from_here(to_wandb(open_intact(options.run), _package("wandb", "Weights & Biases", "wandb")))
    print(f"`wandb sync {out}/offline-run-*` uploads the training of run {options.run}; nothing was sent yet")
    return 0


def _package(module: str, title: str, extra: str) -> ModuleType:
    """An optional package. Raises MissingInput where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingInput(f"{title} is not installed: `pip install -e '.[{extra}]'`") from None


def series(run: Run) -> dict[str, list[Point]]:
    """{stage: its metrics as points}, stages that are still training included.

    Raises MissingInput (nothing trained yet), TrainingError (a damaged line).
    """
    from threefold.training import read_metrics  # imports torch

    points: dict[str, list[Point]] = {}
    for stage in run.plan:
        for folder in (run.stage_folder(stage), run.partial_folder(stage)):
            if (folder / "metrics.jsonl").is_file():
                begun = (read_run_file(folder) or {}).get("started")
                start = datetime.fromisoformat(begun).timestamp() if begun else 0.0
                points[stage] = list(_points(read_metrics(folder), start))  # a new attempt's, not the finished one's
    if not points:
        raise MissingInput(f"run {run.name} has trained no stage yet: `threefold run --run {run.name}`")
    return points


def _points(lines: list[dict[str, Any]], start: float) -> Iterator[Point]:
    seconds = 0.0
    for line in lines:
        seconds = line.get("seconds", seconds)  # an evaluation's line has none: it comes after its step's
        if "heldout_loss" in line:
            values = {key.replace("_", "/", 1): line[key] for key in line if key.startswith("heldout_")}
        else:
            values = {f"train/{key}": line[key] for key in line if key not in ("step", "seconds")}
        yield line["step"], start + seconds, values


def to_tensorboard(run: Run, writer: Callable[[str], Any]) -> Path:
    """Write <run>/tensorboard/<stage>/ for each stage that has metrics, replacing an earlier export; return the folder.

    writer: TensorBoard's SummaryWriter, called with a folder. The step is the stage's; the time is its start plus the
    seconds of training. Raises what `series` raises.
    """
    stage_points = series(run)
    with files.atomic_folder(run.path / "tensorboard") as out:
        for stage, points in stage_points.items():
            with contextlib.closing(writer(str(out / stage))) as board:
                for step, time, values in points:
                    for tag, value in values.items():
                        board.add_scalar(tag, value, global_step=step, walltime=time)
    return run.path / "tensorboard"


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
            for step, time, values in points:
                steps.setdefault(step, {"_timestamp": time}).update(values)
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
