"""What several commands do, and `study.explore`: open a run that exists; check its files, and print."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from basics import names, paths
from basics.errors import ConfigError, MissingInput
from papertrail.staleness import survey
from study.preset import lineage
from study.run import Run, data_dir_of, open_run, run_names


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


def run_folder(name: str) -> Path:
    """The folder of a run, whether or not its config.toml can still be read. Raises ConfigError (no valid name) or
    MissingInput, which lists the runs and names the command that makes one."""
    names.check_name(name, "run")
    path = paths.RUNS / name
    if not (path / "config.toml").is_file():
        known, hint = ", ".join(run_names()) or "none yet", names.did_you_mean(name, run_names())
        raise MissingInput(f"no run {name!r}{hint}; runs: {known}; `threefold run --run {name}` makes it")
    return path


def open_existing(name: str, data_dir: str = "", overrides: Iterable[str] = ()) -> Run:
    """A run that exists, as it was last configured, or as it would be with these overrides; for reading only."""
    run_folder(name)
    return open_run("", name, overrides, data_dir_of(name, data_dir), create=False)


def open_intact(name: str, data_dir: str = "") -> Run:
    """The same, after reading every byte of its finished stages. CheckpointError or RecordError names the first file
    that changed since its stage wrote it; a missing file is reported by the command that needs it."""
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
