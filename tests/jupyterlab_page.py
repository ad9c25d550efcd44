"""A real JupyterLab in a headless Chromium, driven over the DevTools protocol.

    python tests/jupyterlab_page.py RUN OUT.png   open notebooks/explore.ipynb on a run, use it, keep a picture

Chromium is any of `chromium`, `chromium-browser`, `google-chrome` on the PATH.
"""

import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 1240, 3600  # pixels: high enough that every cell is on the page
SIDE = 36  # of these, JupyterLab's bars on either side
SETTINGS = {
    # all cells are in the page, also those out of sight; no questions about kernels or news
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {
        "windowingMode": "none",
        "autoStartDefaultKernel": True,
    },
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}


def browser() -> str | None:
    """The path of a Chromium, None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for found in map(shutil.which, names) if found), None)


def until(what: str, found: Any, seconds: float) -> Any:
    """The first true value of `found()`. Raises TimeoutError, naming what was waited for."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)
    return value


class Page:
    """One page of a browser, over the DevTools protocol."""

    def __init__(self, address: str):
        import websocket

        self._socket = websocket.create_connection(address, suppress_origin=True, timeout=60)
        self._count = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "JavaScript failed"))
        return answer["result"].get("value")

    def picture(self, path: Path, begin: int = 0, end: int = HEIGHT) -> None:
        """Keeps what stands between two heights of the page as a PNG of at most 128 colours."""
        from PIL import Image

        side = SIDE if begin else 0
        part = {"x": side, "y": begin, "width": WIDTH - 2 * side, "height": end - begin, "scale": 1}
        answer = self.call("Page.captureScreenshot", clip=part)
        with Image.open(io.BytesIO(base64.b64decode(answer["data"]))) as image:
            image.convert("RGB").quantize(128).save(path, optimize=True)

    # The notebook ---------------------------------------------------------------------------------------------------

    def open(self, address: str) -> None:
        self.call("Page.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.call("Page.navigate", url=address)
        self._settle()

    def _settle(self) -> None:
        """Waits until the notebook is there and its session has a kernel."""
        panel = "[...(window.jupyterapp?.shell?.widgets('main') ?? [])].find(one => one.sessionContext)"
        ready = f"(one => !!one?.context?.isReady && !!one.sessionContext.isReady)({panel})"
        until("JupyterLab with the notebook", lambda: self.run(ready), 90)
        status = "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status"
        until("a kernel", lambda: self.run(status) == "idle", 60)
        time.sleep(1)

    def run_all(self) -> None:
        """Runs all cells, and again in the page loaded anew where JupyterLab was still making itself ready: cells are
        then left out, or their controls never come. Raises TimeoutError."""
        last = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].pop()?.textContent ?? ''"
        loading = "(document.querySelector('.jp-Notebook')?.innerText ?? 'Loading widget').includes('Loading widget')"
        for attempt in range(3):
            if attempt:
                self.run("jupyterapp.commands.execute('docmanager:save')")
                self.call("Page.reload")
                time.sleep(1)
                self._settle()
            self.run("void jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ended = true })")
            until("all cells", lambda: self.run("window.ended === true"), 120)
            if self.errors():
                return
            if any(char.isdigit() for char in self.run(last)):
                with contextlib.suppress(TimeoutError):
                    until("the controls", lambda: not self.run(loading), 8)
                    return
            print(f"attempt {attempt + 1}: cells or controls did not come")
        raise TimeoutError("JupyterLab did not run the cells with their controls")

    def cell(self, source: str) -> str:
        """JavaScript for the code cell that contains this text."""
        return (
            "[...document.querySelectorAll('.jp-CodeCell')]"
            f".find(cell => cell.querySelector('.cm-content').textContent.includes({json.dumps(source)}))"
        )

    def shown(self, source: str) -> str:
        """The text of the outputs of the cell that contains this text."""
        return self.run(f"{self.cell(source)}.querySelector('.jp-Cell-outputArea').innerText")

    def wait_for(self, source: str, text: str) -> None:
        """Waits until the view of a cell, below its controls, shows this text."""
        view = f"[...{self.cell(source)}.querySelectorAll('.jp-RenderedHTML')].map(one => one.innerText).join()"
        until(f"{text!r} under {source}", lambda: text in self.run(view), 30)

    def top_of(self, title: str) -> int:
        """Where a heading begins, in pixels from the top of the page."""
        heading = f"[...document.querySelectorAll('h2')].find(one => one.textContent.startsWith({json.dumps(title)}))"
        return int(self.run(f"{heading}.getBoundingClientRect().top"))

    def errors(self) -> list[str]:
        """What cells printed as errors."""
        area = """.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]"""
        return self.run(f"[...document.querySelectorAll('{area}')].map(one => one.innerText)")

    def type_into(self, source: str, text: str) -> None:
        """Types into a cell's text area as a person does, and leaves it."""
        self.run(f"{self.cell(source)}.querySelector('textarea').select()")
        self.call("Input.insertText", text=text)
        self.run("document.activeElement.blur()")

    def widget(self, source: str, label: str) -> str:
        """JavaScript for the control of that label in a cell."""
        return (
            f"[...{self.cell(source)}.querySelectorAll('.jupyter-widgets.widget-inline-hbox')]"
            f".find(one => one.querySelector('label')?.textContent === {json.dumps(label)})"
        )

    def choose(self, source: str, label: str, option: str) -> None:
        """Chooses in a cell's drop-down list of that label."""
        self.run(
            f"(select => {{ select.value = [...select.options].find(o => o.textContent === {json.dumps(option)}).value;"
            " select.dispatchEvent(new Event('change', {bubbles: true})) })"
            f"({self.widget(source, label)}.querySelector('select'))"
        )

    def press(self, source: str, label: str, keys: int) -> None:
        """Moves the first handle of a cell's slider of that label by so many presses of an arrow key."""
        self.run(f"{self.widget(source, label)}.querySelector('.noUi-handle').focus()")
        name, code = ("ArrowRight", 39) if keys > 0 else ("ArrowLeft", 37)
        for _ in range(abs(keys)):
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)


@contextlib.contextmanager
def lab(notebook: Path, runs: Path) -> Iterator[Page]:
    """The page of a JupyterLab that has a copy of this notebook open. Everything it starts ends with the block."""
    chromium = browser()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as started:
        home = Path(temporary)
        (home / "work").mkdir()
        shutil.copy(notebook, home / "work" / notebook.name)
        for name, values in SETTINGS.items():
            file = home / "settings" / name
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(values))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "THREEFOLD_RUNS": str(runs),
            "PYTHONPATH": os.pathsep.join([str(PROJECT / "lib"), os.environ.get("PYTHONPATH", "")]),
            "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        }
        options = [
            "--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.root_dir={home / 'work'}", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True",
            "--LabApp.extension_manager=readonly",
        ]  # fmt: skip
        log = started.enter_context(open(home / "log", "wb"))
        quiet = {"stdout": log, "stderr": log, "start_new_session": True}
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, **quiet)
        started.callback(_stop, server)
        profile = home / "profile"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        window = subprocess.Popen(
            [chromium, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"], **quiet
        )
        started.callback(_stop, window)
        known = profile / "DevToolsActivePort"
        until("Chromium", lambda: known.is_file() and known.read_text().count("\n"), 30)
        debugging = known.read_text().split()[0]
        address = f"http://127.0.0.1:{port}/lab"
        until("JupyterLab's server", lambda: _answers(f"{address}/api/settings"), 60)
        listed = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{debugging}/json/list").read())
        page = Page(next(one["webSocketDebuggerUrl"] for one in listed if one["type"] == "page"))
        page.open(f"http://127.0.0.1:{port}/doc/tree/{notebook.name}")  # the notebook alone, without side bars
        yield page


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(address, timeout=5).status == 200
    return False


def _stop(process: subprocess.Popen) -> None:
    """Ends a process that was started here; a server first ends its kernels."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def on_run(notebook: Path, run: str, folder: Path) -> Path:
    """A copy of the notebook in the folder whose parameter `run` is this one."""
    text = notebook.read_text(encoding="utf-8")
    default = 'run = \\"smoke\\"'
    assert text.count(default) == 1, "the notebook's default run"
    copy = folder / notebook.name
    copy.write_text(text.replace(default, f'run = \\"{run}\\"'), encoding="utf-8")
    return copy


def main(run: str, out: str) -> None:
    from basics import paths

    with tempfile.TemporaryDirectory() as folder:
        notebook = on_run(PROJECT / "notebooks" / "explore.ipynb", run, Path(folder))
        with lab(notebook, paths.RUNS) as page:
            page.run_all()
            page.picture(Path(out), page.top_of("One prompt") - 8, page.top_of("Items: wins") - 8)


if __name__ == "__main__":
    main(*sys.argv[1:])
