"""What a training says while it runs: messages, and between them how far it has come.

In a terminal and in a notebook that is one line which rewrites itself. JupyterLab shows its last state, a pipeline
passes on one every few seconds, and an executed notebook keeps few: states get rarer the longer the training takes. In
a file or a pipe, where nothing can be rewritten, it is a line now and then.
"""

import shutil
import sys
from collections.abc import Callable
from typing import TextIO

BAR = 20  # characters
NOTEBOOK_COLUMNS = 110
# (seconds between two states at least, and as a share of the time so far): an hour has about 170 states, or 50 lines
REWRITTEN, LINES = (1.0, 1 / 30), (10.0, 1 / 10)


class Console:
    """Takes messages, and states that give way to the next one.

    write: takes each as a line of its own; None: standard output.
    """

    def __init__(self, write: Callable[[str], None] | None = None):
        self.write = write
        self._shown = 0  # characters of the state that stands on the current line

    @property
    def rewrites(self) -> bool:
        """Whether a state can be replaced by the next."""
        return self.write is None and (sys.stdout.isatty() or _is_notebook(sys.stdout))

    def pause(self, elapsed: float) -> float:
        """Seconds until the next state, after so many since the beginning."""
        least, share = REWRITTEN if self.rewrites else LINES
        return max(least, share * elapsed)

    def __call__(self, message: str) -> None:
        """A message, which stays."""
        if self.write is not None:
            self.write(message)
            return
        self._put(f"\r{' ' * self._shown}\r{message}\n" if self._shown else f"{message}\n")
        self._shown = 0

    def state(self, message: str, share: float) -> None:
        """How it stands, and which share of it is done."""
        if not self.rewrites:
            self(message)
            return
        done = int(BAR * share)
        columns = NOTEBOOK_COLUMNS if _is_notebook(sys.stdout) else shutil.get_terminal_size().columns - 1
        line = f"{'━' * done}{'╌' * (BAR - done)} {share:4.0%} {message}"[:columns]
        self._put(f"\r{line.ljust(self._shown)}")
        self._shown = len(line)

    def close(self) -> None:
        """The state that stands there stays, and what is printed next begins a line."""
        if self._shown:
            self._put("\n")
        self._shown = 0

    def _put(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """A time span for a person: "2 h 5 min", "3 min 20 s" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _is_notebook(stream: TextIO) -> bool:
    """Whether a stream is a kernel's, whose front end rewrites a line at a carriage return."""
    return type(stream).__module__.startswith("ipykernel.")
