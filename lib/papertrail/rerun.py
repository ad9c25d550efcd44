"""Repeat a stage in a temporary folder and report what differs: `threefold verify --rerun STAGE`."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from basics import names
from papertrail import scheduler
from papertrail.differences import differences
from papertrail.provenance import RESUMED
from papertrail.run import Run
from papertrail.staleness import state


def rerun(run: Run, stage: str, say: Callable[[str], None]) -> list[str]:
    """Make a finished stage again from the same inputs, with the threads and workers it was made with.

    Returns one line for each file or record that differs, with its first difference.
    Raises MissingInput (the stage, or one that it needs, has not been made), StageFailed.
    """
    facts = run.require(stage)
    threads = facts.get("determinism", {}).get("threads", [0])
    with tempfile.TemporaryDirectory(prefix="threefold-") as folder:
        copy = _mirror(run, stage, Path(folder).resolve())
        workers = facts.get("training", {}).get("workers")
        scheduler.execute(copy, selected=[stage], force=True, nproc=workers, threads=threads[-1], say=say)
        lines = list(differences(run, copy, stage))
    if lines:
        lines += [f"{stage}: now made from other inputs: {reason}" for reason in state(run, stage).reasons]
        if facts.get("determinism", {}).get("level", "").startswith(RESUMED):
            lines.append(f"{stage}: its level of determinism is {facts['determinism']['level']}")
    return lines


def _mirror(run: Run, stage: str, runs: Path) -> Run:
    """The run without this stage, in another runs folder: links to everything else that was made."""
    name = names.check_name(run.require(stage).get("run", run.name), "run")  # a copied run has another one by now
    copy = replace(run, name=name, path=runs / name, parameters={"run": name})
    for name, spec in run.plan.items():
        if name == stage or run.finished(name) is None:
            continue
        for kept, link in (
            (run.stage_folder(name), copy.stage_folder(name)),
            (run.notebook(spec.executed), copy.notebook(spec.executed)),
        ):
            if kept.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(kept)
    copy.notebook("").parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(run.path / "config.toml", copy.path)
    return copy
