"""Messages of a training while it runs, and between them its progress.

In a terminal and in a notebook the progress is one line that is rewritten. The longer a training takes, the rarer the
updates, so that an executed notebook holds few of them. In a file or a pipe, where nothing can be rewritten, the
progress is a new line from time to time.
"""

import shutil
import sys
from collections.abc import Callable
from typing import TextIO

BAR = 20  # characters
NOTEBOOK_COLUMNS = 110
# (least seconds between two updates, and as a share of the time so far): an hour has about 170 updates, or 50 lines
REWRITTEN, LINES = (1.0, 1 / 30), (10.0, 1 / 10)


class Console:
    """Shows messages, and states that are replaced by the next one.

    write: called with each as one line; None: standard output.
    """

    def __init__(self, write: Callable[[str], None] | None = None):
        self.write = write
        self._shown = 0  # characters of the state on the current line

    @property
    def rewrites(self) -> bool:
        """Whether a state can be replaced by the next."""
        return self.write is None and (sys.stdout.isatty() or _is_notebook(sys.stdout))

    def pause(self, elapsed: float) -> float:
        """Seconds until the next state, given the seconds since the beginning."""
        least, share = REWRITTEN if self.rewrites else LINES
        return max(least, share * elapsed)

    def __call__(self, message: str) -> None:
        """Show a message."""
        if self.write is not None:
            self.write(message)
            return
        self._put(f"\r{' ' * self._shown}\r{message}\n" if self._shown else f"{message}\n")
        self._shown = 0

    def state(self, message: str, share: float) -> None:
        """Show a state, with a bar for the share that is done."""
        if not self.rewrites:
            self(message)
            return
        done = int(BAR * share)
        columns = NOTEBOOK_COLUMNS if _is_notebook(sys.stdout) else shutil.get_terminal_size().columns - 1
        line = f"{'━' * done}{'╌' * (BAR - done)} {share:4.0%} {message}"[:columns]
        self._put(f"\r{line.ljust(self._shown)}")
        self._shown = len(line)

    def close(self) -> None:
        """Keep the last state; what is printed next begins a new line."""
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
