"""What several commands do: check a run's files, find a stage's checkpoint, and print."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from basics.errors import ConfigError, MissingInput
from papertrail.staleness import survey
from study.existing import open_existing
from study.preset import lineage
from study.run import Run


def say(line: str) -> None:
    print(line, flush=True)


def fail(message: str, status: int) -> int:
    """Print an error; returns the exit status."""
    print(f"threefold: {message}", file=sys.stderr)
    return status


def say_json(values: object) -> None:
    say(json.dumps(values, indent=2, allow_nan=False))


def columns(rows: Sequence[Sequence[str]], headings: Sequence[str] = (), right: int = -1) -> str:
    """Text in aligned columns. right: the right-aligned column."""
    sides = ["right" if place == right else "left" for place in range(len(rows[0]))]
    return tabulate(rows, headings, "simple" if headings else "plain", colalign=sides, disable_numparse=True)


def from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def open_intact(name: str, data_dir: str = "") -> Run:
    """As `open_existing`, after reading every byte of its finished stages. CheckpointError or RecordError names the
    first file that changed since its stage wrote it; a missing file is reported by the command that needs it."""
    run = open_existing(name, data_dir)
    for stage in run.plan:
        if run.finished(stage) is not None:
            run.intact(stage, gone=True)
    run.check_records()
    return run


def checkpoint(options: argparse.Namespace) -> Path:
    """The folder of a stage's finished checkpoint, if its files are those the stage wrote. Without a stage: of
    the last one that the run trains, which is noted in the options."""
    run = open_existing(options.run)
    options.stage = options.stage or lineage(run.preset)[-1]
    if options.stage not in run.plan:
        raise ConfigError(f"run {run.name} trains no {options.stage}; it has {', '.join(lineage(run.preset))}")
    if "model.safetensors" not in run.require(options.stage)["outputs"]:
        raise MissingInput(f"stage {options.stage} of run {run.name} holds no checkpoint")
    return run.intact(options.stage)


def warn_if_behind(run: Run, what: str) -> None:
    behind = [name for name, state in survey(run).items() if state.kind != "fresh"]
    if behind:
        fail(f"{what} an earlier state of {', '.join(behind)}: `threefold status --run {run.name}`", 0)
