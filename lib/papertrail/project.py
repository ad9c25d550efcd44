"""What a study tells papertrail about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basics.files import sha256_file


@dataclass(frozen=True)
class Project:
    """Folders, code and libraries behind a study's results, and which of its results are times."""

    root: Path  # of the repository; notebooks are executed in it
    notebooks: Path
    plan: Path | None = None  # the file in `root` that fixes, before a run, how its results will be judged
    packages: tuple[str, ...] = ()  # whose source code counts in a stage's fingerprint
    distributions: tuple[str, ...] = ()  # whose version counts
    summary: str = ""  # the stage that reads every other stage's whole result, times included, and measures nothing
    timed_files: tuple[str, ...] = ()  # names of output files that hold measured times
    timed_records: tuple[str, ...] = ()  # beginnings of the names of records that do
    # file name -> function that reads it, where a repetition may differ in bytes but not in what that returns
    readers: Mapping[str, Callable[[Path], Any]] = field(default_factory=dict)

    @property
    def plan_sha256(self) -> str | None:
        """Hash of the plan as it is now, which every record carries; None where the study has no plan."""
        return sha256_file(self.plan) if self.plan else None
