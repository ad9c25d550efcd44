"""Starts the workers of a stage's training with torchrun, as a subprocess: a fork would not survive CUDA."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO

import torch

from basics import paths
from basics.errors import TrainingError
from basics.processes import terminable
from study.run import Stage

STOP_SECONDS = 50.0  # between asking the workers to save their state and killing them
TAIL = 200_000  # characters of what the workers wrote to stderr that are searched for the error
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
# What `threefold train` writes last in a worker that fails, and torchrun's summary of one that was killed.
FAILED = re.compile(r"^threefold: (worker \d+ of \d+: .*)$", re.MULTILINE)
KILLED = re.compile(r"rank\s*: (\d+)[^\n]*\n\s*exitcode\s*: -(\d+)")


def launch(stage: Stage, nproc: int, say: Callable[[str], None]) -> None:
    """Train a stage that was begun in `nproc` workers on this machine, and wait for them.

    Their lines are passed on to `say`. When this process is interrupted, they save their state and end; when it dies,
    they end.
    Raises TrainingError with the rank and the message of the worker that failed first.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    # after --, or torchrun would take --run for one of its own options
    command += ["-m", "--", "study", "train", stage.name, "--run", stage.run.name, "--begun"]
    environment = {
        **os.environ,
        **dict.fromkeys(THREADS, str(max(1, torch.get_num_threads() // nproc))),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.PACKAGES), os.environ.get("PYTHONPATH")])),
        "THREEFOLD_DATA": stage.run.data_dir,
        "THREEFOLD_RUNS": str(paths.RUNS),
    }
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # nothing is written to it: it ends with this process, and the workers with it
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        # Where torchrun itself is killed, its workers are left, and hold the pipe that is read here.
        threading.Thread(target=_let_go, args=(process,), daemon=True).start()
        with terminable():
            try:
                for line in process.stdout:
                    say(line.rstrip("\n"))
                process.wait()
            finally:
                _end(process)
        if process.returncode:
            raise TrainingError(_explanation(errors, process.returncode, say))


def _let_go(process: subprocess.Popen) -> None:
    process.wait()
    process.stdin.close()


def _end(process: subprocess.Popen) -> None:
    """End torchrun. Workers that it can no longer end do so themselves when their stdin is closed."""
    try:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def _explanation(errors: IO[str], status: int, say: Callable[[str], None]) -> str:
    """Why the workers ended. When one fails, the others fail because of it, so the first error counts."""
    errors.seek(0)
    text = errors.read()[-TAIL:]
    for rank, number in KILLED.findall(text):
        if int(number) != signal.SIGTERM:  # that is torchrun's, for the others
            return f"worker {rank} was killed by signal {number}; by 9 most likely for want of memory"
    failed = FAILED.search(text)
    if failed:
        traceback = text.rfind("Traceback", 0, failed.start())
        if traceback >= 0:
            say(text[traceback : failed.start()].rstrip())
        return failed[1]
    return f"torchrun ended with status {status}: {text.strip().rpartition(chr(10))[2]}"
