"""Executes a notebook through papermill, in a kernel that the fork server starts.

Importing this module takes a second, so import it only where a notebook is to be executed.
"""

import logging
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# jsonschema imports this module where it is installed and spends two seconds on building its grammar, to check IRI
# formats that no notebook has. None makes the import fail, and jsonschema does without.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

from jupyter_client.manager import AsyncKernelManager  # noqa: E402
from jupyter_client.provisioning.local_provisioner import LocalProvisioner  # noqa: E402
from nbclient.exceptions import DeadKernelError  # noqa: E402
from papermill.clientwrap import PapermillNotebookClient  # noqa: E402
from papermill.engines import NBClientEngine, papermill_engines  # noqa: E402
from papermill.execute import execute_notebook  # noqa: E402

from papertrail.kernel_forkserver import ForkServer, KernelDied  # noqa: E402

STARTUP_SECONDS = 180  # a loaded machine may take long to import what a kernel needs
IOPUB_SECONDS = 120  # nbclient's 4 s would turn a busy machine into a failed notebook
REWRITE_SECONDS = 10.0  # between two states of a line that rewrites itself (a progress bar)
LONGEST_SOCKET = 90  # characters; the system's limit for a socket's path is 103 to 107, and "-ipc-5" is appended


class Lines:
    """The file to which papermill writes a notebook's output, which it cuts into lines. Of a line that rewrites itself,
    only a state every few seconds is passed on."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._rest, self._last = say, "", 0.0

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        if "\r" in self._rest:
            self._rest = self._rest[self._rest.rstrip("\r").rfind("\r") + 1 :]
            if time.monotonic() - self._last >= REWRITE_SECONDS:
                lines.append(self._rest)
        for line in lines:
            if states := [part.strip() for part in line.split("\r") if part.strip()]:
                self._last = time.monotonic()
                self._say(states[-1])

    def flush(self) -> None:
        """Nothing: a line is passed on when it ends."""


class Provisioner(LocalProvisioner):
    """jupyter_client's local provisioner, with kernels from the fork server."""

    server: ForkServer

    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        self.process = self.server.start(cmd, options["env"], options["cwd"])
        self.pid = self.pgid = self.process.pid
        return self.connection_info

    async def send_signal(self, signum: int) -> None:
        if signum != signal.SIGINT:  # sent before a shutdown only; an idle kernel would report it as an error
            await super().send_signal(signum)


class Engine(NBClientEngine):
    """papermill's engine with kernels from the fork server. Of its arguments, `execute` explains the last four."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, server, env, folder, say, **_):
        # Sockets in a private folder: no other user can connect, and no two kernels can pick the same port.
        file = server.sockets / f"{uuid.uuid4().hex[:8]}.json"
        transport = "ipc" if len(str(file)) < LONGEST_SOCKET else "tcp"
        manager = AsyncKernelManager(kernel_name=kernel_name, transport=transport, connection_file=str(file))
        kernel = Provisioner(kernel_id=file.stem, kernel_spec=manager.kernel_spec, parent=manager)
        manager.provisioner, kernel.server, lines = kernel, server, Lines(say)
        waits = {"startup_timeout": STARTUP_SECONDS, "iopub_timeout": IOPUB_SECONDS}
        client = PapermillNotebookClient(nb_man, manager, stdout_file=lines, stderr_file=lines, **waits)
        try:
            client.execute(env=dict(env), cwd=str(folder), cleanup_kc=True)
        except DeadKernelError as error:
            raise KernelDied(kernel.process.returncode) from error
        lines.write("\n")


papermill_engines.register("papertrail", Engine)
logging.getLogger("papermill").setLevel(logging.ERROR)


def execute(notebook: Path, output: Path, parameters: Mapping[str, object], **kernel: Any) -> None:
    """Execute a notebook into `output`, which also holds the error where a cell raises one. May run in any thread.

    kernel: server (starts it), env and folder (its environment and working folder), say (called with each line the
    notebook prints). Raises KernelDied, PapermillExecutionError for a cell's error.
    """
    execute_notebook(notebook, output, dict(parameters), "papertrail", progress_bar=False, **kernel)
