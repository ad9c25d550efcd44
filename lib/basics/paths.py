"""Where things are: the project's folders, from the editable install, and the runs folder."""

import os
from pathlib import Path

PACKAGES = Path(__file__).resolve().parents[1]
PROJECT = PACKAGES.parent
NOTEBOOKS = PROJECT / "notebooks"
DATA = PROJECT / "data"
REPORT = PROJECT / "report"
PRESETS = PACKAGES / "study" / "presets"
PLAN = PACKAGES / "study" / "comparison" / "plan.toml"


def named_by(variable: str, default: Path) -> Path:
    """The folder that an environment variable names, absolute and without links (a loop of links stays as it is)."""
    return Path(os.path.realpath(os.environ.get(variable) or default))


RUNS = named_by("THREEFOLD_RUNS", PROJECT / "runs")


def cache_folder() -> Path:
    """Where derived data is kept between runs: $THREEFOLD_CACHE, or .cache in the runs folder."""
    return named_by("THREEFOLD_CACHE", RUNS / ".cache")


def expanded(path: str | Path) -> Path:
    """The path with ~ and ~NAME put in; where nobody has that name it stays as it is, as in a shell."""
    return Path(os.path.expanduser(path))


def model_folders(location: str, data_dir: str | Path | None = "") -> list[Path]:
    """Where a model that is named by a folder is looked for: the folder itself, then in the local data folder."""
    return [expanded(location), *([Path(data_dir) / location] if data_dir else [])]
