"""Child processes that do not outlive their parent, and an orderly end of this one."""

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1
prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None  # looked up before any fork


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have this process sent a signal when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG).

    Call it in the child, after its fork. Does nothing outside Linux.
    """
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], Any] | signal.Handlers, *names: str) -> Iterator[None]:
    """Inside the block these signals are handled so. Those that are ignored stay ignored (nohup ignores SIGHUP), and
    those that the system does not have are passed over. Does nothing outside the main thread."""
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
    handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def terminable() -> contextlib.AbstractContextManager[None]:
    """SIGTERM, and SIGHUP of a closed terminal, raise SystemExit inside the block instead of ending this process at
    once: children are ended and temporary folders removed."""
    return handling(lambda number, _: sys.exit(128 + number), "SIGTERM", "SIGHUP")
