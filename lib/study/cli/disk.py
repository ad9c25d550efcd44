"""`threefold clean`: removes a run, what can be made again in it, or the cache; and what runs take on the disk."""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from basics import paths
from basics.errors import ConfigError, ThreefoldError
from papertrail import scheduler
from papertrail.stage import at_work
from study.cli.common import columns, from_here, run_folder, say
from study.run import run_names

REMADE = ("report", "tensorboard", "wandb", ".executing")  # by the commands of those names, and by `threefold run`


def clean(options: argparse.Namespace) -> int:
    if options.cache and options.keep_results:
        raise ConfigError("--keep-results is about a run; the cache holds no results")
    run = None if options.cache else removable(options.run)
    with scheduler.lock(run) if run else contextlib.nullcontext():
        listed = leftovers if options.keep_results else contents
        entries = listed(run) if run else cache()
        if not entries:
            say("nothing to remove")
            return 0
        sizes = [size(path) for path in entries]
        rows = [(size_text(count), str(from_here(path))) for count, path in zip(sizes, entries, strict=True)]
        say(f"{columns(rows, right=0)}\n{size_text(sum(sizes))} to free")
        if not options.yes:
            if not sys.stdin.isatty():
                raise ConfigError("nothing was removed: --yes removes it without asking")
            if not _agreed():
                return 0
        remove(entries)
    if run and not options.keep_results:
        run.rmdir()
    return 0


def _agreed() -> bool:
    try:
        return input("Remove? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def removable(name: str) -> Path:
    """The folder of a run that may be removed. Raises ConfigError for one that is a link out of the runs folder,
    ThreefoldError while a notebook works on one of its stages."""
    path = run_folder(name)
    if path.is_symlink():
        raise ConfigError(f"run {name} is a link to another folder: remove the link, and what it points to, yourself")
    if stage := at_work(path):
        raise ThreefoldError(f"run {name} is at work in {stage}; wait for it")
    return path


def contents(run: Path) -> list[Path]:
    """Everything in a run's folder. What makes it a run comes last: a removal cut short can be repeated."""
    return sorted(run.iterdir(), key=lambda entry: (entry.name in ("config.toml", scheduler.LOCK), entry.name))


def leftovers(run: Path) -> list[Path]:
    """What a run can lose without losing a result: the rendered report, exported curves, what failed or was
    interrupted."""
    entries = {run / name for name in REMADE}
    entries.update(run.glob(".*.partial"), run.glob("notebooks/*.failed.ipynb"), run.rglob(".*.tmp"))
    # A folder set aside is the stage's only one until its successor stands in its place (`replace_folder`).
    aside = run.rglob(".*.previous")
    entries.update(old for old in aside if old.with_name(old.name[1:].removesuffix(".previous")).exists())
    return sorted(entry for entry in entries if os.path.lexists(entry) and entries.isdisjoint(entry.parents))


def cache() -> list[Path]:
    """What was derived from the data and is kept between runs; the hub's commits of first loads stay, for nothing makes
    them again. Raises ConfigError where the cache is outside the runs folder, ThreefoldError while a run is at work."""
    from threefold.data.hub import REVISIONS

    folder = paths.cache_folder()
    if folder != paths.RUNS / ".cache":
        raise ConfigError(
            f"the cache is {folder}, not in the runs folder ($THREEFOLD_CACHE, or a link): empty it yourself"
        )
    for name in run_names():
        if scheduler.at_work(paths.RUNS / name):
            raise ThreefoldError(f"run {name} is at work and reads the cache; wait for it")
    return sorted(path for path in folder.glob("*") if path.name != REVISIONS)


def cache_notes() -> list[Path]:
    """The checked notes of what the cache keeps: tokens, overlap searches and hashes."""
    patterns = ("tokens/[!.]*/meta.json", "overlap/[!.]*.json", "hashes/[!.]*.json")
    return [note for pattern in patterns for note in sorted(paths.cache_folder().glob(pattern))]


def remove(entries: Sequence[Path]) -> None:
    """Remove files and folders in the runs folder; links are removed, not followed. Raises ConfigError, before
    anything is removed, for what lies elsewhere."""
    for path in entries:
        if not path.parent.resolve().is_relative_to(paths.RUNS):
            raise ConfigError(f"{path} leads out of the runs folder: remove it yourself")
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# Sizes --------------------------------------------------------------------------------------------------------------


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; a link counts as the link it is."""
    if path.is_dir() and not path.is_symlink():
        return sum(size(entry) for entry in path.iterdir())
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # gone since the folder was listed: a run at work
        return 0


def size_text(count: int) -> str:
    """Bytes for a reader, in powers of 1000: 512 B, 45.2 MB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
