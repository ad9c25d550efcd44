"""Executes a notebook through papermill, in a kernel that the fork server starts.

Importing this module takes a second, so import it only where a notebook is to be executed.
"""

import logging
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

from papertrail.kernel_forkserver import ForkServer  # noqa: E402

STARTUP_SECONDS = 180  # a loaded machine may take long to import what a kernel needs
IOPUB_SECONDS = 120  # nbclient's 4 s would turn a busy machine into a failed notebook
REWRITE_SECONDS = 10.0  # between two states of a line that rewrites itself (a progress bar)
LONGEST_SOCKET = 90  # characters; the system's limit for a socket's path is 103 to 107, and "-ipc-5" is appended


class KernelDied(Exception):
    """The kernel ended before the notebook did."""

    def __init__(self, status: int | None):
        super().__init__(status)
        self.status = status  # as in subprocess (-9: killed), None if unknown


class Lines:
    """Cuts a notebook's output into lines. Of a line that rewrites itself, only a state every few seconds is passed."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._rest, self._last = say, "", 0.0

    def feed(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        if "\r" in self._rest:
            self._rest = self._rest[self._rest.rstrip("\r").rfind("\r") + 1 :]
            if time.monotonic() - self._last >= REWRITE_SECONDS:
                lines.append(self._rest)
        for line in lines:
            if states := [part.strip() for part in line.split("\r") if part.strip()]:
                self._last = time.monotonic()
                self._say(states[-1])


class Provisioner(LocalProvisioner):
    """jupyter_client's local provisioner, with kernels from the fork server."""

    server: ForkServer

    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        self.process = self.server.start(cmd, options["env"], options["cwd"])
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class Manager(AsyncKernelManager):
    """jupyter_client's manager without its interrupt before a shutdown, which an idle kernel reports as an error."""

    async def _async_interrupt_kernel(self) -> None:
        if not self.shutting_down:
            await super()._async_interrupt_kernel()


class Client(PapermillNotebookClient):
    """papermill's client that passes on what the notebook prints and remembers how its kernel ended."""

    lines: Lines
    server: ForkServer
    sockets: Path
    kernel_status: int | None = None

    def create_kernel_manager(self) -> Manager:
        # Sockets in a private folder: no other user can connect, and no two kernels can pick the same port.
        file = self.sockets / f"{uuid.uuid4().hex[:8]}.json"
        transport = "ipc" if len(str(file)) < LONGEST_SOCKET else "tcp"
        self.km = Manager(kernel_name=self.kernel_name, transport=transport, connection_file=str(file))
        self.km.provisioner = Provisioner(kernel_id=file.stem, kernel_spec=self.km.kernel_spec, parent=self.km)
        self.km.provisioner.server = self.server
        return self.km

    def process_message(self, *arguments, **options):
        output = super().process_message(*arguments, **options)
        if output is not None and output.get("output_type") == "stream":
            self.lines.feed("".join(output["text"]))
        return output

    async def _async_check_alive(self) -> None:
        if self.km is not None and self.km.provisioner is not None and self.km.provisioner.has_process:
            self.kernel_status = await self.km.provisioner.poll()
        await super()._async_check_alive()


class Engine(NBClientEngine):
    """papermill's engine with the client above."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, server, sockets, kernel_options, say, **_):
        client = Client(nb_man, kernel_name=kernel_name, startup_timeout=STARTUP_SECONDS, iopub_timeout=IOPUB_SECONDS)
        client.lines, client.server, client.sockets = Lines(say), server, sockets
        try:
            client.execute(**kernel_options)
        except DeadKernelError as error:
            raise KernelDied(client.kernel_status) from error
        client.lines.feed("\n")


papermill_engines.register("papertrail", Engine)
logging.getLogger("papermill").setLevel(logging.ERROR)


def execute(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, object],
    *,
    server: ForkServer,
    sockets: Path,
    env: Mapping[str, str],
    cwd: Path,
    say: Callable[[str], None],
) -> None:
    """Execute a notebook into `output`, which also holds the error where a cell raises one. May run in any thread.

    server: starts the kernel, with this environment in this folder. sockets: private folder for its sockets.
    say: called with each line the notebook prints. Raises KernelDied, PapermillExecutionError for a cell's error.
    """
    execute_notebook(  # without its own `cwd`, which changes that of the whole process
        notebook,
        output,
        parameters=dict(parameters),
        engine_name="papertrail",
        progress_bar=False,
        server=server,
        sockets=sockets,
        kernel_options={"env": dict(env), "cwd": str(cwd)},
        say=say,
    )
