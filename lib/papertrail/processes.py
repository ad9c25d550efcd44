"""Processes that do not outlive their parent, and what the machine gives them.

python -m papertrail.processes COMMAND...      runs a command that ends, with all it started, when the caller does
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

from basics.processes import end_with_parent, prctl

_PR_SET_CHILD_SUBREAPER = 36


def supervise(clean: Callable[[], None] = lambda: None) -> Callable[[], NoReturn]:
    """Make this process answer a SIGTERM, which it gets when its parent ends, by killing everything that it started,
    directly or not, calling `clean` and exiting. Returns the function that does so.

    Outside Linux the parent's end is not noticed, nor are processes whose own parent has ended.
    """

    def leave(*_) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(ChildProcessError):  # no child is left
            while True:
                for child in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                os.waitpid(-1, 0)  # what the ended child had started is a child of this process from now on
        clean()
        os._exit(0)

    if prctl is not None:
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, leave)
    end_with_parent(signal.SIGTERM)
    return leave


def run_supervised(command: Sequence[str], given: str = "", **options: Any) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command that is ended, with everything it started, when this process is.

    given: its standard input. options: of `subprocess.Popen`.
    """
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "papertrail.processes", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C in a terminal is for this process
        **options,
    ) as process:
        try:
            out, err = process.communicate(given)
        except BaseException:
            process.terminate()
            raise
    return process.returncode, out, err


def cores() -> int:
    """Cores this process may use: its affinity, limited by a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    return count


def has_gpu() -> bool:
    """Whether a GPU's device file exists. Does not import torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


if __name__ == "__main__":
    supervise()
    sys.exit(subprocess.run(sys.argv[1:]).returncode)
