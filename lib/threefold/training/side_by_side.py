"""Independent tasks in worker processes: one CPU thread each, or one GPU.

Workers are spawned, so they share nothing with the calling process and its CUDA context does not matter. Each computes
with one thread however many there are, so a result does not depend on their number. A worker ends with the calling
process.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from basics.errors import ThreefoldError, TrainingError
from basics.processes import end_with_parent
from threefold.model.device import pick_device


def default_workers(device: str | None = None) -> int:
    """The number of GPUs, or of this process's CPU threads."""
    return torch.cuda.device_count() if pick_device(device) == "cuda" else torch.get_num_threads()


def side_by_side(
    work: Callable[[Any], Any], tasks: Sequence[Any], workers: int, device: str | None = None
) -> Iterator[tuple[Any, Any]]:
    """(task, its result) of every task as it finishes. With one worker this process does the work itself, in order.

    Args:
        work: module-level, with picklable arguments and results, as spawned processes need.
        tasks: `str(task)` names one in messages.
        device: as in `loop.train`.

    Raises:
        What a task raises, with its name added, and TrainingError for a worker that died. The other workers are killed
        then, and also when the caller stops iterating or is interrupted.
    """
    gpu = pick_device(device) == "cuda"
    if min(workers, len(tasks)) <= 1:
        threads = torch.get_num_threads()
        for task in tasks:
            torch.set_num_threads(threads if gpu else 1)
            try:
                result = _run(work, task)
            finally:
                torch.set_num_threads(threads)
            yield task, result
        return
    context = multiprocessing.get_context("spawn")
    waiting, busy, processes = list(reversed(tasks)), {}, {}
    try:
        for number in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            processes[ours] = context.Process(target=_serve, args=(theirs, work, number if gpu else None), daemon=True)
            processes[ours].start()
            theirs.close()  # or the worker's death would go unnoticed here
            busy[ours] = waiting.pop()
            ours.send(busy[ours])
        while busy:
            for connection in wait(list(busy)):
                task = busy.pop(connection)
                try:
                    result, error = connection.recv()
                except (EOFError, ConnectionError):
                    raise _died(task, processes[connection]) from None
                if error is not None:
                    raise error
                if waiting:
                    busy[connection] = waiting.pop()
                    connection.send(busy[connection])
                yield task, result
    finally:
        for connection, process in processes.items():
            process.kill()
            process.join()
            connection.close()


def _serve(connection: Connection, work: Callable[[Any], Any], gpu: int | None) -> None:
    """The loop of a worker: receives tasks, sends (result, error)."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the workers too: the parent kills them
    if gpu is None:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(gpu)
    while True:
        task = connection.recv()
        try:
            answer = _run(work, task), None
        except Exception as error:  # raised again in the calling process
            error.add_note(f"In the worker:\n{''.join(traceback.format_tb(error.__traceback__))}")
            answer = None, error
        connection.send(answer)


def _run(work: Callable[[Any], Any], task: Any) -> Any:
    """The task's result. An error gets the task's name: in the message where a notebook shows nothing else."""
    try:
        return work(task)
    except ThreefoldError as error:
        raise (error if str(task) in str(error) else type(error)(f"{task}: {error}")) from error.__cause__
    except Exception as error:
        error.add_note(f"In {task}")
        raise


def _died(task: Any, process: multiprocessing.Process) -> TrainingError:
    process.join()
    status = process.exitcode
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
    return TrainingError(
        f"{task}: its worker ended {how}; the others were stopped. What is finished is kept: run it again to continue "
        "(where memory ran short, with fewer workers)"
    )
