"""What an executed notebook may hold: no path, user or host name of the machine that ran it, no progress bars.

One function serves both occasions. After an execution, unknown paths are cut in what was printed only, since a slash
in a result may mean something else; for publishing, they are cut everywhere.
"""

import copy
import itertools
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from papertrail.notebook_files import ANSI

# Lines kept of a long stream: its head says what was begun, its tail how it ended.
STREAM_HEAD, STREAM_TAIL = 10, 30

# An absolute path of at least two parts. After `:` or `/` it would belong to a URL, after a word to a fraction or unit.
POSIX_PATH = re.compile(r"(?<![\w.:/<~…$\\-])/(?:[\w.@+%-]+/)+[\w.@+%-]*")
HOME_FOLDER = re.compile(r"(?<![\w.:/<~…])/(?:home|Users)/[^/\s\"'<>|:]+")
HOME_PATH = re.compile(r"(?<![\w.:/<])~/(?:[\w.@+%-]+/)*[\w.@+%-]*")
WINDOWS_PATH = re.compile(r"\b[A-Za-z]:\\(?:[^\\\s\"'<>|]+\\)+[^\\\s\"'<>|]*")
CELL_FILE = re.compile(r"/[^\s:\"']*/ipykernel_\d+/\d+\.py")
# tqdm's forms
PROGRESS = re.compile(
    r"\d+%\|.*\||\d+\w*\s*\[\d+:\d+.*it/s\]|\d+(?:it|ex\w*) \[\d+:\d+|\b\d+(?:\.\d+)?\s?(?:it|s)/(?:s|it)\b.*\]$"
)
WIDGET = "application/vnd.jupyter.widget-view+json"
INJECTED = "injected-parameters"  # papermill's tag
PUBLISHED_METADATA = ("parameters", "duration", "version")  # of papermill's


def host_names() -> tuple[str, ...]:
    """This machine's host names, except one that could be an ordinary word ("laptop"), which records may hold."""
    host = socket.gethostname()
    return tuple(name for name in {host, host.partition(".")[0]} if len(name) >= 6 and re.search(r"[\d.-]", name))


def cleaner(roots: Mapping[str, str], names: tuple[str, ...], *, cut: bool) -> Callable[[str], str]:
    """A function from text to text: `roots` (absolute folder -> its replacement; one with a final / is replaced with
    it) first, longest first; then, with `cut`, any other absolute path is cut to its last part; then the names."""
    replaced = [
        (re.compile(rf"(?<![\w/]){re.escape(root)}" + ("" if root.endswith("/") else r"(?=/|\b|$)")), shown)
        for root, shown in sorted(roots.items(), key=lambda item: -len(item[0]))
        if len(root) > 1
    ]
    hosts = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)") for name in sorted(names, key=len, reverse=True)]

    def last_part(match: re.Match) -> str:
        parts = [part for part in re.split(r"[/\\]", match.group()) if part and part != "~"]
        return f"…/{parts[-1]}" if parts else "…"

    def clean(text: str) -> str:
        for pattern, shown in replaced:
            text = pattern.sub(lambda _, shown=shown: shown, text)
        if cut:
            text = HOME_FOLDER.sub("~", CELL_FILE.sub("…/cell.py", text))
            for path in (POSIX_PATH, HOME_PATH, WINDOWS_PATH):
                text = path.sub(last_part, text)
        for host in hosts:
            text = host.sub("…", text)
        return text

    return clean


def scrub(
    notebook: dict[str, Any], roots: Mapping[str, str], *, names: tuple[str, ...] | None = None, publish: bool = False
) -> dict[str, Any]:
    """A copy of an executed notebook without traces of this machine. Scrubbing twice changes nothing.

    Args:
        notebook: as `notebook_files.read_notebook` returns it.
        roots: absolute folders and what to print in their place, e.g. the project's root as ".".
        names: host names to replace; None: those of this machine.
        publish: cut unknown absolute paths in sources and results too, and keep only the metadata that a reader needs.
    """
    names = host_names() if names is None else names
    known = {sys.prefix: "<python>", str(Path.home()): "~", **roots}
    printed = cleaner(known, names, cut=True)
    result = printed if publish else cleaner(known, names, cut=False)
    notebook = copy.deepcopy(notebook)
    metadata = notebook.setdefault("metadata", {})
    metadata.pop("widgets", None)
    if "papermill" in metadata:
        kept = metadata["papermill"]
        metadata["papermill"] = {key: kept[key] for key in PUBLISHED_METADATA if key in kept}
    notebook["metadata"] = _mapped(metadata, result)
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if publish or INJECTED in tags:
            cell["source"] = result(cell["source"])
        if INJECTED in tags and not any(other.get("id") == INJECTED for other in notebook["cells"]):
            cell["id"] = INJECTED  # papermill draws a random one
        dropped = ("papermill", "execution")  # times
        kept = {"tags": tags} if publish and tags else {} if publish else cell["metadata"]
        cell["metadata"] = {key: value for key, value in kept.items() if key not in dropped}
        if "outputs" in cell:
            cell["outputs"] = [
                _mapped(output, printed if output["output_type"] in ("stream", "error") else result)
                for output in _tidied(cell["outputs"], publish)
            ]
    return notebook


def leaks(notebook: dict[str, Any], names: tuple[str, ...] | None = None) -> list[str]:
    """What publishing would still cut: one line a finding, with the cell it is in."""
    clean = cleaner({}, host_names() if names is None else names, cut=True)
    findings = []

    def look(text: str) -> str:
        if clean(text) != text:
            line = next(line for line in text.split("\n") if clean(line) != line)
            findings.append(f"{where}: a path or name of the machine that ran it: {line.strip()[:100]!r}")
        return text

    where = "metadata"
    _mapped(notebook.get("metadata", {}), look)
    for index, cell in enumerate(notebook["cells"], 1):
        where = f"cell {index}"
        _mapped([cell["source"], *cell.get("outputs", ())], look)
    return findings


def _mapped(value: Any, clean: Callable[[str], str]) -> Any:
    """`value` with `clean` applied to every string in it, keys too (a source's path is one), except pictures: in base64
    a slash is not a path."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_mapped(item, clean) for item in value]
    if isinstance(value, dict):
        return {
            clean(key): item if key.startswith("image/") and key != "image/svg+xml" else _mapped(item, clean)
            for key, item in value.items()
        }
    return value


def _tidied(outputs: list[dict[str, Any]], publish: bool) -> Iterator[dict[str, Any]]:
    """The outputs with one stream output for each run of messages of one stream; widgets and empty streams left out."""
    for kind, group in itertools.groupby(outputs, lambda output: output["output_type"] == "stream" and output["name"]):
        if kind:  # the name of a stream
            first, *others = group
            first["text"] = tidy_stream("".join(output["text"] for output in (first, *others)))
            yield from [first] if first["text"] else []
            continue
        for output in group:
            if output["output_type"] == "error":
                output["traceback"] = [ANSI.sub("", line) for line in output.get("traceback", ())]
            elif publish and "text/markdown" in output.get("data", {}):
                output["data"].pop("text/html", None)
            if WIDGET not in output.get("data", {}):
                yield output


def tidy_stream(text: str) -> str:
    """A stream as a terminal leaves it: carriage returns applied, no colours, no progress bars, a long middle cut."""
    lines = []
    for line in ANSI.sub("", text).replace("\r\n", "\n").split("\n"):
        states = [state.rstrip() for state in line.split("\r") if state.strip()]
        if not states or not PROGRESS.search(states[-1]):
            lines.append(states[-1] if states else "")
    if not any(lines):
        return ""
    while not lines[-1]:
        lines.pop()
    left_out = len(lines) - STREAM_HEAD - STREAM_TAIL
    if left_out > 1:
        lines[STREAM_HEAD:-STREAM_TAIL] = [f"... {left_out} lines left out ..."]
    return "\n".join(lines) + "\n"
