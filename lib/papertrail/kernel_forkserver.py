"""A process that starts the kernels of a run and kills everything they started when the run ends, however it ends.

Importing torch and transformers takes 6 s of a core. Fifteen notebooks would spend half of a smoke run on it, so on
Linux without a GPU (a CUDA context does not survive a fork) the server imports such packages once and forks kernels.
It imports only: no tensor is made and no thread started before a fork, as in torch's own DataLoader workers. It never
imports the project's own packages: a kernel must run the code that its stage's fingerprint was computed from.

    python -m papertrail.kernel_forkserver FD SOCKETS [SOURCE...]

FD: a Unix socket on which each byte comes with another socket, one per kernel, from which the server reads
{"command", "env", "cwd"} and to which it writes the kernel's process id and later its exit status (as in subprocess),
a line each. When FD is closed the server ends.
SOCKETS: the folder of the kernels' own sockets, which the server, too, removes at its end.
SOURCE: files whose imports are made before kernels are forked; without any, a kernel is started as its own program.
"""

import ast
import contextlib
import gc
import json
import os
import pkgutil
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NoReturn

from basics.processes import end_with_parent
from basics.source_code import ROOT, imports
from papertrail.processes import supervise

# What no source names: the kernel itself, and what torch imports at an optimizer's first step.
ALSO = ("ipykernel.kernelapp", "matplotlib_inline.backend_inline", "matplotlib.pyplot", "torch._dynamo")
POLL_SECONDS = 0.05
STOP_SECONDS = 10.0


# Server -------------------------------------------------------------------------------------------------------------


def preload(sources: Iterable[str]) -> Iterator[None]:
    """Import what the sources import from other packages, one name a step."""
    trees = [ast.parse(Path(source).read_text(encoding="utf-8")) for source in sources]
    for name in dict.fromkeys([*ALSO, *chain.from_iterable(map(imports, trees))]):
        if not _is_own(name):
            with contextlib.suppress(Exception):  # the notebook that needs an optional or wrong import will report it
                pkgutil.resolve_name(name)  # a class, too: transformers loads its classes when they are asked for
        yield
    gc.collect()
    gc.freeze()  # the collector must not touch, and so copy, the memory that all kernels share


def _is_own(name: str) -> bool:
    """Whether a module is one of the project's packages or in one."""
    return (ROOT / name.partition(".")[0]).is_dir()


def serve(requests: socket.socket, sockets: str, sources: list[str]) -> NoReturn:
    """Start kernels until the other end of the socket is closed."""
    leave = supervise(lambda: shutil.rmtree(sockets, ignore_errors=True))
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # ipykernel, too, ends with its parent
    preloading = preload(sources) if sources else None
    kernels: dict[int, socket.socket] = {}
    started = False  # the first kernel does not wait for the imports
    while True:
        listening = [] if preloading and started else [requests]
        if select.select(listening, [], [], 0 if preloading else POLL_SECONDS)[0]:
            byte, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
            if not byte:
                leave()
            client = socket.socket(fileno=descriptors[0])
            if request := client.makefile("r", encoding="utf-8").readline():
                in_process = bool(sources) and preloading is None
                pid = fork_kernel(json.loads(request), in_process, [requests, client, *kernels.values()])
                kernels[pid], started = client, True
                _tell(client, pid)
        for pid, client in list(kernels.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _tell(kernels.pop(pid), os.waitstatus_to_exitcode(status))
                client.close()
        if preloading and next(preloading, "done"):
            preloading = None


def _tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the client has closed its end
        client.sendall(f"{number}\n".encode())


def fork_kernel(request: Mapping, in_process: bool, sockets: list[socket.socket]) -> int:
    """Fork a kernel, which closes these sockets; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        end_with_parent()
        for inherited in sockets:
            inherited.close()
        os.chdir(request["cwd"])
        command, env = request["command"], {**request["env"], "JPY_PARENT_PID": str(os.getppid())}
        if not in_process or command[1:3] != ["-m", "ipykernel_launcher"]:
            os.execvpe(command[0], command, env)
        os.environ.clear()
        os.environ.update(env)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))  # OpenMP read the server's variable
        for name in filter(_is_own, list(sys.modules)):
            del sys.modules[name]  # a kernel imports the project's code as it is on the disk now
        from ipykernel.kernelapp import launch_new_instance

        sys.argv = ["ipykernel_launcher", *command[3:]]
        launch_new_instance(argv=command[3:])
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # never back into the server's loop


# Client -------------------------------------------------------------------------------------------------------------


class KernelDied(Exception):
    """The kernel ended before the notebook did."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status  # as in subprocess (-9: killed)


class KernelProcess:
    """A kernel of the server, with as much of subprocess.Popen as jupyter_client's LocalProvisioner uses."""

    stdin = stdout = stderr = returncode = None

    def __init__(self, replies: socket.socket):
        """Waits until the kernel is started. Raises ConnectionError if the server ends before."""
        self._replies = replies
        self._lines = replies.makefile("r", encoding="utf-8")
        pid = self._lines.readline()
        if not pid:
            raise ConnectionResetError("the process that starts kernels is gone")
        self.pid = int(pid)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._replies], [], [], 0)[0]:
            status = self._lines.readline()
            self.returncode = int(status) if status else -signal.SIGKILL  # the server's end is its kernels' end
            self._replies.close()
        return self.returncode

    def wait(self) -> int | None:
        """The exit status; LocalProvisioner polls until there is one."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class ForkServer:
    """The server process, for the one that starts it. `sockets` is a private folder for the kernels' sockets."""

    def __init__(self, env: Mapping[str, str], sources: Iterable[str] = ()):
        self.sockets = Path(tempfile.mkdtemp(prefix="threefold-"))
        self._kernels: list[KernelProcess] = []
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(self.sockets), *sources],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a kernel writes to its file descriptors does not belong between the run's lines
                pass_fds=[theirs.fileno()],
                env=env,
                start_new_session=True,  # Ctrl-C in a terminal is for the scheduler
            )

    def start(self, command: list[str], env: Mapping[str, str], cwd: str) -> KernelProcess:
        """Start a kernel. Raises OSError if the server is gone."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._requests, [b"k"], [theirs.fileno()])
        ours.sendall(json.dumps({"command": command, "env": dict(env), "cwd": cwd}).encode() + b"\n")
        self._kernels.append(KernelProcess(ours))
        return self._kernels[-1]

    def terminate_kernels(self) -> None:
        """Send SIGTERM to every kernel, which ends it unless its notebook has something to save first."""
        for kernel in self._kernels:
            kernel.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """End the server, all kernels, and every process that they started."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._requests.close()
        shutil.rmtree(self.sockets, ignore_errors=True)


if __name__ == "__main__":
    del sys.path[0]  # nothing is imported from the folder it was started in
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3:])
