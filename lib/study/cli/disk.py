"""What runs take on the disk, and the removal of a run, of what can be made again in it, or of the cache."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from basics import names, paths
from basics.errors import ConfigError, ThreefoldError
from papertrail import scheduler
from papertrail.run import at_work
from study.run import run_names

REMADE = ("report", "tensorboard", "wandb", ".executing")  # by the commands of those names, and by `threefold run`
CONFIG = "config.toml"  # what makes a folder a run; the last to go, so that a removal cut short can be taken up again


def folder(name: str) -> Path:
    """The folder of a run, whether or not its config.toml can still be read. Raises ConfigError."""
    names.check_name(name, "run")
    path = paths.RUNS / name
    if not (path / CONFIG).is_file():
        raise ConfigError(
            f"no run {name!r}{names.did_you_mean(name, run_names())}; "
            f"runs: {', '.join(run_names()) or 'none yet'}; `threefold run --run {name}` makes it"
        )
    return path


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


# Removing -----------------------------------------------------------------------------------------------------------


def removable(name: str) -> Path:
    """The folder of a run that may be removed. Raises ConfigError for one that is a link out of the runs folder,
    ThreefoldError while a notebook works on one of its stages."""
    path = folder(name)
    if path.is_symlink():
        raise ConfigError(f"run {name} is a link to another folder: remove the link, and what it points to, yourself")
    if stage := at_work(path):
        raise ThreefoldError(f"run {name} is at work in {stage}; wait for it")
    return path


def whole(name: str) -> list[Path]:
    """Everything in a run's folder; what makes it a run comes last."""
    last = (CONFIG, scheduler.LOCK)
    return sorted(removable(name).iterdir(), key=lambda entry: (entry.name in last, entry.name))


def leftovers(name: str) -> list[Path]:
    """What a run can lose without losing a result: the rendered report, exported curves, what failed or was
    interrupted."""
    path = removable(name)
    found = {path / entry for entry in REMADE}
    found.update(path.glob(".*.partial"), path.glob("notebooks/*.failed.ipynb"), path.rglob(".*.tmp"))
    # A folder set aside is the stage's only one until its successor stands in its place (`replace_folder`).
    aside = path.rglob(".*.previous")
    found.update(old for old in aside if old.with_name(old.name[1:].removesuffix(".previous")).exists())
    return sorted(entry for entry in found if os.path.lexists(entry) and found.isdisjoint(entry.parents))


def cache() -> list[Path]:
    """What was derived from the data and is kept between runs; the hub's commits of first loads stay, for nothing makes
    them again. Raises ConfigError where the cache is outside the runs folder, ThreefoldError while a run is at work."""
    from threefold.data.hub import REVISIONS

    own, used = paths.RUNS / ".cache", paths.cache_folder()
    if used != own:
        raise ConfigError(
            f"the cache is {used}, not in the runs folder ($THREEFOLD_CACHE, or a link): empty it yourself"
        )
    busy = [name for name in run_names() if scheduler.at_work(paths.RUNS / name)]
    if busy:
        raise ThreefoldError(f"run {busy[0]} is at work and reads the cache; wait for it")
    return sorted(path for path in own.iterdir() if path.name != REVISIONS) if own.is_dir() else []


def cache_notes() -> list[Path]:
    """The checked notes of what the cache keeps: tokens, overlap searches and hashes."""
    patterns = ("tokens/[!.]*/meta.json", "overlap/[!.]*.json", "hashes/[!.]*.json")
    return [note for pattern in patterns for note in sorted(paths.cache_folder().glob(pattern))]


def remove(found: Iterable[Path]) -> None:
    """Remove files and folders in the runs folder; links are removed, not followed. Raises ConfigError, before
    anything is removed, for what lies elsewhere."""
    found = list(found)
    for path in found:
        if not path.parent.resolve().is_relative_to(paths.RUNS):
            raise ConfigError(f"{path} leads out of the runs folder: remove it yourself")
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
