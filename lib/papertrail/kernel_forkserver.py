"""Kernels in a fraction of a second: a process that has imported the heavy packages once and forks a kernel on demand.

Importing torch and transformers takes 5 to 15 s of a core; a dozen notebooks would pay for it a dozen times, which is
much of a smoke run. The nursery only imports: no tensor is made and no thread pool started before the fork, as in
torch's own DataLoader workers. It imports other people's packages, never threefold itself: a kernel must run the code
that its fingerprint was taken of. Used on Linux without a GPU (a CUDA context does not survive a fork); elsewhere, and
where the nursery is gone, kernels start the usual way.

    python -m papertrail.kernel_forkserver FD        FD: of a listening Unix socket

Protocol, one connection a kernel: the client sends {"argv", "env", "cwd"} and gets {"pid"}, later {"status"} as of
subprocess. A client that hangs up has its kernel killed; when stdin ends, all are killed and the nursery leaves.
"""

import ast
import asyncio
import contextlib
import gc
import importlib
import json
import os
import random
import select
import selectors
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from basics import paths
from basics.processes import end_with_parent

CALLED = ("threefold/*/*.py", "study/comparison/*.py", "papertrail/records.py")  # what notebooks call
# What no file names: the kernel itself, and what torch loads at an optimizer's first step.
OWN = ("basics", "papertrail", "study", "threefold")  # packages that a notebook imports itself
ALSO = ("ipykernel.kernelapp", "matplotlib_inline.backend_inline", "matplotlib.pyplot", "torch._dynamo")


# The nursery --------------------------------------------------------------------------------------------------------


def imports() -> list[tuple[str, tuple[str, ...]]]:
    """(module, names taken from it) of every import of another package in threefold's floors."""
    found: dict[str, set[str]] = {}
    for file in [path for pattern in CALLED for path in paths.PACKAGES.glob(pattern)]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found.setdefault(alias.name, set())
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return [(name, tuple(sorted(names))) for name, names in sorted(found.items()) if name.split(".")[0] not in OWN]


def serve(listener: socket.socket) -> None:
    """Imports, then forks kernels until stdin ends."""
    for module, names in [*((module, ()) for module in ALSO), *imports()]:
        # What is optional, or wrong, is for the notebook that needs it to report.
        with contextlib.suppress(Exception):
            taken = importlib.import_module(module)
            for name in names:
                getattr(taken, name)  # transformers loads its classes when they are asked for
    gc.collect()
    gc.freeze()  # the collector must not touch, and so copy, what all kernels share
    wake, on_signal = socket.socketpair()
    on_signal.setblocking(False)
    signal.set_wakeup_fd(on_signal.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    for source in (listener, wake, sys.stdin):
        selector.register(source, selectors.EVENT_READ)
    kernels: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                for pid in kernels:
                    _kill(pid)
                return
            if key.fileobj is listener:
                client, _ = listener.accept()
                pid = _spawn(client, [listener, wake, on_signal, *kernels.values()])
                if pid is not None:
                    kernels[pid] = client
                    selector.register(client, selectors.EVENT_READ)
            elif key.fileobj is wake:
                wake.recv(4096)
            else:  # a client never speaks twice: it has hung up
                selector.unregister(key.fileobj)
                for pid in [pid for pid, client in kernels.items() if client is key.fileobj]:
                    _kill(pid)
        for pid in list(kernels):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                client = kernels.pop(pid)
                with contextlib.suppress(OSError):
                    client.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
                with contextlib.suppress(KeyError):
                    selector.unregister(client)
                client.close()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # in the moment before it leads a group of its own


def _spawn(client: socket.socket, others: list[socket.socket]) -> int | None:
    """Forks a kernel for this client; None when the client has left."""
    request = client.makefile("r", encoding="utf-8").readline()
    if not request:
        client.close()
        return None
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            client.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        return pid
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for entry in (client, *others):
            entry.close()
        _become_kernel(**json.loads(request))
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # never back into the nursery's loop


def _become_kernel(argv: list[str], env: dict[str, str], cwd: str) -> None:
    os.setsid()
    end_with_parent()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    random.seed()  # or all kernels would draw the same
    torch = sys.modules.get("torch")
    if torch is not None and env.get("OMP_NUM_THREADS", "").isdecimal():
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # the OpenMP runtime read the nursery's variable
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]  # a kernel reads threefold as it is on the disk now
    from ipykernel.kernelapp import launch_new_instance

    sys.argv = ["ipykernel_launcher", *argv]
    launch_new_instance(argv=[*argv, f"--IPKernelApp.parent_handle={os.getppid()}"])  # it ends when the nursery does


# The client's side ---------------------------------------------------------------------------------------------------


class Forked:
    """A forked kernel, with as much of subprocess.Popen as jupyter_client asks for."""

    stdin = stdout = stderr = None

    def __init__(self, address: str, argv: list[str], env: dict[str, str], cwd: str):
        """Waits until the nursery has imported. Raises OSError when it is gone."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._socket.sendall(json.dumps({"argv": argv, "env": env, "cwd": cwd}).encode() + b"\n")
        self._lines = self._socket.makefile("r", encoding="utf-8")
        said = self._lines.readline()
        if not said:
            raise ConnectionResetError("the nursery left")
        self.pid: int = json.loads(said)["pid"]
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            ready, _, _ = _select([self._socket])
            if ready:
                said = self._lines.readline()
                self.returncode = json.loads(said)["status"] if said else -signal.SIGKILL
                self._socket.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        while self.poll() is None:
            ready, _, _ = _select([self._socket], timeout)
            if not ready:
                raise subprocess.TimeoutExpired("kernel", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _select(sockets: list[socket.socket], timeout: float | None = 0):
    return select.select(sockets, [], [], timeout)


class Provisioner(LocalProvisioner):
    """jupyter_client's local provisioner; asks a nursery for the kernel and starts it the usual way without one."""

    nursery = ""  # address

    async def launch_kernel(self, cmd: list[str], **keywords: Any):
        env = dict(keywords.get("env") or os.environ)
        cwd = str(keywords.get("cwd") or Path.cwd())
        if self.nursery and cmd[1:3] == ["-m", "ipykernel_launcher"]:
            try:
                self.process = await asyncio.to_thread(Forked, self.nursery, cmd[3:], env, cwd)
            except OSError:
                return await self._usual(cmd, **keywords)
            self.pid = self.pgid = self.process.pid
            self.cwd = cwd
            return self.connection_info
        return await self._usual(cmd, **keywords)

    async def _usual(self, cmd: list[str], **keywords: Any):
        tied = {"preexec_fn": end_with_parent} if sys.platform == "linux" else {}
        return await super().launch_kernel(cmd, **keywords, **tied)


if __name__ == "__main__":
    end_with_parent()
    del sys.path[0]  # the folder it was started in is no place to import from
    serve(socket.socket(fileno=int(sys.argv[1])))
