"""Children that do not outlive their parent, however it goes."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None  # looked up before any fork


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have this process sent a signal when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG).

    To be called in the child, after its fork; elsewhere than on Linux it does nothing.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
