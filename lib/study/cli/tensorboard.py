"""A run's metrics.jsonl files as TensorBoard event files."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from basics import files
from basics.errors import MissingInput
from papertrail.run import Run
from study.cli import metrics


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
    """Write <run>/tensorboard/<stage>/ for each stage that has metrics and return the folder; one that was there
    before is replaced.

    The tags are those of `metrics.scalars`; the step is the stage's, the time its start plus the seconds of training
    until then. Raises what `metrics.trained` raises.
    """
    found = metrics.trained(run)
    with files.atomic_folder(run.path / "tensorboard") as out:
        for stage, (started, lines) in found.items():
            one = writer(str(out / stage))
            try:
                for tag, value, step, seconds in metrics.scalars(lines):
                    one.add_scalar(tag, value, global_step=step, walltime=started + seconds)
            finally:
                one.close()
    return run.path / "tensorboard"
