"""A run's metrics.jsonl files as offline runs of Weights & Biases: nothing leaves the machine before `wandb sync`."""

import shutil
from pathlib import Path
from types import ModuleType

from basics import files
from basics.errors import MissingInput
from papertrail.run import Run
from study.cli import metrics
from study.preset import to_dict

PROJECT = "threefold"


def client() -> ModuleType:
    """The package wandb. Raises MissingInput where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise MissingInput("Weights & Biases is not installed: `pip install -e '.[wandb]'`") from None
    return wandb


def export(run: Run, wandb: ModuleType) -> Path:
    """Write <run>/wandb/offline-run-*/ for each stage that has metrics and return the folder; one that was there
    before is replaced.

    Such a run is named `<run>/<stage>`, its group is the run, its configuration the preset; the tags are those of
    `metrics.scalars`. Raises what `metrics.trained` raises.
    """
    found = metrics.trained(run)
    # Whoever syncs shares curves and configuration, and not what machine and environment they were exported on.
    settings = wandb.Settings(
        console="off", host="", disable_code=True, disable_git=True, silent=True,
        x_disable_machine_info=True, x_disable_meta=True, x_disable_stats=True, x_save_requirements=False,
    )  # fmt: skip
    with files.atomic_folder(run.path / "wandb") as out:
        for stage, (started, lines) in found.items():
            steps: dict[int, dict[str, float]] = {}
            for tag, value, step, seconds in metrics.scalars(lines):
                steps.setdefault(step, {"_timestamp": started + seconds})[tag] = value
            with wandb.init(
                project=PROJECT, name=f"{run.name}/{stage}", group=run.name, job_type=stage,
                config=to_dict(run.preset), dir=str(out), mode="offline", settings=settings,
            ) as one:  # fmt: skip
                for step, values in steps.items():
                    one.log(values, step=step)
        for made in list(out.glob("wandb/offline-run-*")):
            made.rename(out / made.name)
        shutil.rmtree(out / "wandb")  # links and logs of the writing
    return run.path / "wandb"
