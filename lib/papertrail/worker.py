"""The child process that executes notebooks, one after another, through papermill.

    python -m papertrail.worker

Speaks JSON lines: jobs on stdin, events on stdout. A process of its own, because papermill changes the working
directory and because a process can be killed; one for many notebooks, because importing papermill takes seconds.
When stdin ends (the parent is gone, however it went) the worker kills its kernel and leaves.

Job    {"input", "output", "parameters", "cwd", "environment" (beside the worker's own), "nursery" (address or "")}
Events {"event": "text", "text"}                            a line the notebook printed
       {"event": "done"}                                    executed without an error; the notebook lies at `output`
       {"event": "failed", "ename", "evalue", "traceback"}  a cell raised; the notebook with the error lies at `output`
       {"event": "died", "status"}                          the kernel is gone; status as of subprocess (-9: killed)
       {"event": "broken", "traceback"}                     papermill or this file failed
"""

import contextlib
import json
import logging
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import NoReturn, TextIO

# jsonschema imports this module where it is installed and spends two seconds on building its grammar, to check IRI
# formats that no notebook has. None makes the import fail, and jsonschema does without.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

from jupyter_client.manager import AsyncKernelManager  # noqa: E402
from nbclient.exceptions import DeadKernelError  # noqa: E402
from papermill.clientwrap import PapermillNotebookClient  # noqa: E402
from papermill.engines import NBClientEngine, papermill_engines  # noqa: E402
from papermill.exceptions import PapermillExecutionError  # noqa: E402
from papermill.execute import execute_notebook  # noqa: E402

from basics.processes import end_with_parent  # noqa: E402
from papertrail.kernel_forkserver import Provisioner  # noqa: E402

STARTUP_SECONDS = 180  # a loaded machine may take long to import what a kernel needs
IOPUB_SECONDS = 120  # nbclient's 4 s turn a busy machine into a failed notebook
REWRITE_SECONDS = 10.0  # between two states of a line that rewrites itself (a progress bar)
LONGEST_SOCKET = 90  # characters; the system's limit for a socket's path is 103 to 107, and "-ipc-5" is added
SOCKETS = Path(tempfile.mkdtemp(prefix="threefold-"))


class Lines:
    """Cuts a notebook's streams into lines; of a line that rewrites itself only a state every few seconds."""

    def __init__(self, emit):
        self._emit = emit
        self._rest = ""
        self._shown = 0.0

    def feed(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._say(line)
        if "\r" in self._rest:
            self._rest = self._rest[self._rest.rstrip("\r").rfind("\r") + 1 :]
            if time.monotonic() - self._shown >= REWRITE_SECONDS:
                self._say(self._rest)

    def end(self) -> None:
        self._say(self._rest)
        self._rest = ""

    def _say(self, line: str) -> None:
        shown = [part.strip() for part in line.split("\r") if part.strip()]
        if shown:
            self._shown = time.monotonic()
            self._emit({"event": "text", "text": shown[-1]})


class Manager(AsyncKernelManager):
    """jupyter_client's manager, without its interrupt before a shutdown: an idle kernel only reports it as an error."""

    async def _async_interrupt_kernel(self) -> None:
        if not self.shutting_down:
            await super()._async_interrupt_kernel()


class Client(PapermillNotebookClient):
    """papermill's client that passes on what the notebook prints and remembers how its kernel ended."""

    lines: Lines
    environment: dict[str, str]
    nursery = ""
    kernel_status: int | None = None

    def create_kernel_manager(self) -> Manager:
        # Over sockets in a folder of our own: no other user can connect, and no two kernels can pick the same port.
        file = SOCKETS / f"{uuid.uuid4().hex[:8]}.json"
        transport = "ipc" if os.name == "posix" and len(str(file)) < LONGEST_SOCKET else "tcp"
        self.km = Manager(kernel_name=self.kernel_name, transport=transport, connection_file=str(file))
        self.km.provisioner = Provisioner(kernel_id=file.stem, kernel_spec=self.km.kernel_spec, parent=self.km)
        self.km.provisioner.nursery = self.nursery
        return self.km

    def process_message(self, *arguments, **keywords):
        output = super().process_message(*arguments, **keywords)
        if output is not None and output.get("output_type") == "stream":
            self.lines.feed("".join(output["text"]))
        return output

    async def _async_check_alive(self) -> None:
        if self.km is not None and self.km.provisioner is not None and self.km.provisioner.has_process:
            self.kernel_status = await self.km.provisioner.poll()
        await super()._async_check_alive()


class Engine(NBClientEngine):
    """Runs the client above, and lets the worker find the kernel it has to kill."""

    client: Client | None = None

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, job, emit, **_):
        client = Client(nb_man, kernel_name=kernel_name, startup_timeout=STARTUP_SECONDS, iopub_timeout=IOPUB_SECONDS)
        client.lines = Lines(emit)
        client.nursery = job["nursery"]
        cls.client = client
        client.execute(env={**os.environ, **job["environment"]})
        client.lines.end()


def kill_kernel() -> None:
    """SIGKILL to the kernel's process group: what it started (data loaders, compilers, torchrun) goes with it."""
    client = Engine.client
    provisioner = getattr(getattr(client, "km", None), "provisioner", None)
    process = getattr(provisioner, "process", None)
    if process is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(provisioner.pgid or process.pid, signal.SIGKILL)


def execute(job: dict, emit) -> None:
    """Executes one notebook and emits how it ended."""
    Engine.client = None
    try:
        execute_notebook(
            job["input"],
            job["output"],
            parameters=job["parameters"],
            engine_name="threefold",
            progress_bar=False,
            cwd=job["cwd"],
            job=job,
            emit=emit,
        )
    except PapermillExecutionError as error:
        emit({"event": "failed", "ename": error.ename, "evalue": error.evalue, "traceback": "\n".join(error.traceback)})
    except DeadKernelError:
        emit({"event": "died", "status": Engine.client.kernel_status if Engine.client else None})
    except Exception:  # the parent has to hear of it, whatever it is
        emit({"event": "broken", "traceback": traceback.format_exc()})
    else:
        emit({"event": "done"})


def main() -> NoReturn:
    # Whatever a kernel writes to its file descriptors must not end up between the events.
    events: TextIO = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(event: dict) -> None:
        with lock:
            events.write(json.dumps(event) + "\n")

    def leave(*_) -> None:
        kill_kernel()
        shutil.rmtree(SOCKETS, ignore_errors=True)
        os._exit(1)

    signal.signal(signal.SIGTERM, leave)
    end_with_parent(signal.SIGTERM)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    papermill_engines.register("threefold", Engine)
    jobs: queue.SimpleQueue[dict] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            jobs.put(json.loads(line))
        leave()

    threading.Thread(target=read, daemon=True).start()
    while True:  # until stdin ends
        execute(jobs.get(), emit)


if __name__ == "__main__":
    main()
