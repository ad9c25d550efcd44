"""Runs that exist, opened for reading by the commands and by `study.explore`."""

from collections.abc import Iterable
from pathlib import Path

from basics import names, paths
from basics.errors import MissingInput
from study.run import Run, data_dir_of, open_run, run_names


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
