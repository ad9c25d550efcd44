"""SIGINT (Ctrl-C) and SIGTERM as the request to end a training after the step that it is in."""

import signal
import threading
import time
from types import FrameType
from typing import NoReturn


class Interruption:
    """Inside its `with` block a first signal is only noted, in `number`; a second one acts as it would have before.

    patience: seconds after the first signal in which others count as the same. Both the terminal and torchrun pass a
        Ctrl-C on to a worker. Outside the main thread, and for signals that are ignored, nothing changes.
    """

    def __init__(self, patience: float = 0.0):
        self.number, self.patience = 0, patience
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._before = {number: how for number, how in handlers.items() if how not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since >= self.patience:
            self.act(number)

    def act(self, number: int = 0) -> NoReturn:
        """Do what this signal (default: the first one) would have done; without one, raise KeyboardInterrupt."""
        self.__exit__()
        if number or self.number:
            signal.raise_signal(number or self.number)
        raise KeyboardInterrupt
