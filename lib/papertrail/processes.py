"""Processes that do not outlive their parent.

python -m papertrail.processes COMMAND...      runs a command that ends, with all it started, when the caller does
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
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


if __name__ == "__main__":
    supervise()
    sys.exit(subprocess.run(sys.argv[1:]).returncode)
