"""A stage of a run, as its notebook works on it.

A notebook opens its stage, takes inputs with `stage.require("pretrain")`, works in `folder = stage.begin()` and ends
with `stage.finish(tokens=...)`.
"""

import os
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from basics import files
from basics.errors import ThreefoldError
from papertrail import provenance, records
from papertrail.provenance import Fingerprint
from papertrail.run import Run, intact_run_file, read_run_file, write_run_file, written_files

PATIENCE = 5.0  # seconds to wait until a killed process that worked on the same stage is gone
RESERVED = (  # facts of run.json that `finish` finds itself
    *("stage", "run", "fingerprint", "git", "hardware", "determinism", "outputs", "attempts", "started", "finished"),
)


@dataclass(kw_only=True)
class Stage:
    """One stage of a run, as a notebook works on it."""

    name: str
    run: Run
    determinism: dict[str, Any] | None = None  # of the processes that did the work; None: this one did all of it
    _fingerprint: Fingerprint | None = None
    _clock: float = 0.0

    def __post_init__(self) -> None:
        files.recover_folder(self.folder)
        records.carry_plan(self.run.project.plan_sha256)

    @property
    def folder(self) -> Path:
        """Where the stage lies once it is finished."""
        return self.run.stage_folder(self.name)

    @property
    def partial(self) -> Path:
        return self.run.partial_folder(self.name)

    @property
    def seed(self) -> int:
        return self.run.seed(self.name)

    def require(self, stage: str) -> Path:
        """Folder of a finished stage that this one builds on. Raises MissingInput, with the command that makes it;
        CheckpointError for a file in it that is not what that stage wrote."""
        return self.run.intact(stage)

    def begin(self, fingerprint: Fingerprint | None = None) -> Path:
        """The folder to work in. What an interrupted attempt with the same fingerprint left there is kept, so that the
        work can be resumed; anything else is removed. Until `finish` the folder is locked.

        fingerprint: default: the run's, now. Raises ThreefoldError while another process works in the folder.
        """
        fingerprint = fingerprint or self.run.fingerprint(self.name)
        if fingerprint.stage != self.name:
            raise ValueError(f"fingerprint of stage {fingerprint.stage} given to stage {self.name}")
        folder = self.partial
        hold(folder)
        begun = intact_run_file(folder)
        if begun is None or begun["fingerprint"].get("digest") != fingerprint.digest:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            begun = {"stage": self.name, "fingerprint": fingerprint.to_dict(), "outputs": {}, "started": _now()}
        for leftover in folder.rglob(".*.tmp"):  # of an atomic write that was interrupted
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
        begun["attempts"] = begun.get("attempts", 0) + 1
        begun["threads"] = [*begun.get("threads", []), provenance.threads()]
        write_run_file(folder, begun)
        self._fingerprint = fingerprint
        self._clock = time.monotonic()
        return folder

    def count_workers(self, number: int) -> None:
        """Note in the run.json of a stage in progress that this many processes train it from here on."""
        begun = read_run_file(self.partial) or {}
        if number not in begun.get("workers", []):
            write_run_file(self.partial, {**begun, "workers": [*begun.get("workers", []), number]})

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write run.json, move the work folder into place (an earlier one is replaced at once), return run.json.

        Facts: `tokens` trained on, `device_seconds`, and any more that are finite JSON. `wall_seconds` is the time
        since `begin` unless given; `weights_sha256` the hash of model.safetensors unless given.
        """
        if self._fingerprint is None:
            raise RuntimeError(f"stage {self.name}: finish without begin")
        if reserved := [name for name in RESERVED if name in facts]:
            raise ValueError(f"finish() finds {', '.join(reserved)} itself")
        folder = self.partial
        begun = read_run_file(folder) or {}
        outputs = written_files(folder)
        content = {
            "stage": self.name,
            "run": self.run.name,  # which notebooks and model cards name; the folder may be copied under another
            "fingerprint": self._fingerprint.to_dict(),
            "git": provenance.git_state(self.run.project.root),
            "hardware": provenance.hardware(),
            "determinism": self.determinism or provenance.determinism(begun),
            "wall_seconds": round(time.monotonic() - self._clock, 3),
            "device_seconds": None,
            "tokens": None,
            "weights_sha256": outputs.get("model.safetensors"),
            "outputs": outputs,
            "attempts": begun.get("attempts", 1),  # above 1 the stage was resumed, and wall_seconds is the last one's
            "started": begun.get("started"),
            "finished": _now(),
            **facts,
        }
        write_run_file(folder, content)
        files.replace_folder(folder, self.folder)
        release(folder)
        self._fingerprint = None
        return read_run_file(self.folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# Work folders -------------------------------------------------------------------------------------------------------

_HELD: dict[Path, int] = {}  # work folder that this process began -> descriptor that holds its lock


def hold(folder: Path) -> None:
    """Make a work folder and lock it for this process; the lock ends with the process, however that ends.

    Raises ThreefoldError while another process holds it.
    """
    release(folder)
    deadline = time.monotonic() + PATIENCE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        opened = files.try_lock(folder)
        if opened is not None and os.path.samestat(os.fstat(opened), os.stat(folder)):
            _HELD[folder] = opened
            return
        if opened is not None:  # in between the other process moved it into its stage's place
            os.close(opened)
        elif time.monotonic() > deadline:
            raise ThreefoldError(f"{'/'.join(folder.parts[-2:])}: another process works on this stage; wait for it")
        time.sleep(0.05)


def release(folder: Path) -> None:
    """Unlock a work folder if this process holds it."""
    if folder in _HELD:
        os.close(_HELD.pop(folder))


def at_work(run: Path) -> str:
    """Name of a work folder of the run that a process holds, "" where there is none."""
    return next((folder.name for folder in sorted(run.glob(".*.partial")) if files.is_locked(folder)), "")
