"""Processes that do not outlive their parent, and what the machine gives them."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None  # looked up before any fork


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have this process sent a signal when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG).

    Call it in the child, after its fork. Does nothing outside Linux.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (prctl(2), PR_SET_CHILD_SUBREAPER), so that
    `kill_descendants` finds it. Does nothing outside Linux."""
    if _prctl is not None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants() -> None:
    """Kill everything that this process started, directly or not, and wait until it is gone."""
    with contextlib.suppress(ChildProcessError):  # no child is left
        while True:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            os.waitpid(-1, 0)  # what the ended child had started is a child of this process from now on


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
