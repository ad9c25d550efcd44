"""Child processes that do not outlive their parent, and an orderly end of this one."""

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None  # looked up before any fork


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have this process sent a signal when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG).

    Call it in the child, after its fork. Does nothing outside Linux.
    """
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a closed terminal, raise SystemExit inside the block instead of ending this process at
    once: children are ended and temporary folders removed. Does nothing outside the main thread."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    if threading.current_thread() is not threading.main_thread():
        heard = []
    before = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
