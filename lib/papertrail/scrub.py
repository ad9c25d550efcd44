"""What an executed notebook may hold: no path, user or host name of the machine that ran it, no progress bars.

One function serves both occasions. After an execution, unknown paths are cut in what was printed only, since a slash
in a result may mean something else; for publishing, they are cut everywhere.
"""

import copy
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
    ordered = sorted(roots.items(), key=lambda item: len(item[0]), reverse=True)
    patterns = [
        (re.compile(rf"(?<![\w/]){re.escape(root)}" + ("" if root.endswith("/") else r"(?=/|\b|$)")), shown)
        for root, shown in ordered
        if len(root) > 1
    ]
    host = (
        re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in sorted(names, key=len, reverse=True)))
        if names
        else None
    )

    def last_part(match: re.Match) -> str:
        parts = [part for part in re.split(r"[/\\]", match.group()) if part and part != "~"]
        return f"…/{parts[-1]}" if parts else "…"

    def clean(text: str) -> str:
        for pattern, shown in patterns:
            text = pattern.sub(lambda _, shown=shown: shown, text)
        if cut:
            text = HOME_FOLDER.sub("~", CELL_FILE.sub("…/cell.py", text))
            for path in (POSIX_PATH, HOME_PATH, WINDOWS_PATH):
                text = path.sub(last_part, text)
        return host.sub("…", text) if host else text

    return clean


def scrub(
    notebook: dict[str, Any],
    roots: Mapping[str, str],
    *,
    names: tuple[str, ...] | None = None,
    publish: bool = False,
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
        metadata["papermill"] = {
            key: metadata["papermill"][key] for key in PUBLISHED_METADATA if key in metadata["papermill"]
        }
    notebook["metadata"] = _mapped(metadata, result)
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if publish or INJECTED in tags:
            cell["source"] = result(cell["source"])
        if INJECTED in tags and not any(other.get("id") == INJECTED for other in notebook["cells"]):
            cell["id"] = INJECTED  # papermill draws a random one
        if publish:
            cell["metadata"] = {"tags": tags} if tags else {}
        for timing in ("papermill", "execution"):
            cell["metadata"].pop(timing, None)
        if "outputs" in cell:
            cell["outputs"] = [
                _mapped(output, printed if output["output_type"] in ("stream", "error") else result)
                for output in _tidied(cell["outputs"], publish)
            ]
    return notebook


def leaks(notebook: dict[str, Any], names: tuple[str, ...] | None = None) -> list[str]:
    """What publishing would still cut: one line a finding, with the cell it stands in."""
    clean = cleaner({}, host_names() if names is None else names, cut=True)
    places = [("metadata", notebook.get("metadata", {}))]
    for index, cell in enumerate(notebook["cells"], 1):
        places += [(f"cell {index}", part) for part in (cell["source"], *cell.get("outputs", ()))]
    findings = []
    for where, value in places:
        for text in _texts(value):
            if clean(text) != text:
                line = next(line for line in text.split("\n") if clean(line) != line)
                findings.append(f"{where}: a path or name of the machine that ran it: {line.strip()[:100]!r}")
    return findings


def _is_picture(key: str) -> bool:
    return key.startswith("image/") and key != "image/svg+xml"  # base64, in which a slash is not a path


def _mapped(value: Any, clean: Callable[[str], str]) -> Any:
    """`value` with `clean` applied to every string in it, keys too (a source's path is one)."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_mapped(item, clean) for item in value]
    if isinstance(value, dict):
        return {clean(key): item if _is_picture(key) else _mapped(item, clean) for key, item in value.items()}
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from () if _is_picture(key) and isinstance(item, str) else _texts(item)


def _tidied(outputs: list[dict[str, Any]], publish: bool) -> Iterator[dict[str, Any]]:
    """The outputs with one stream output for each run of messages of one stream; widgets and empty streams left out."""
    merged: list[dict[str, Any]] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output["output_type"] == "stream" == last.get("output_type") and output["name"] == last["name"]:
            last["text"] += output["text"]
        else:
            merged.append(output)
    for output in merged:
        if output["output_type"] == "stream":
            output["text"] = tidy_stream(output["text"])
            if not output["text"]:
                continue
        elif output["output_type"] == "error":
            output["traceback"] = [ANSI.sub("", line) for line in output.get("traceback", ())]
        elif WIDGET in output.get("data", {}):
            continue
        elif publish and "text/markdown" in output.get("data", {}):
            output["data"].pop("text/html", None)
        yield output


def tidy_stream(text: str) -> str:
    """A stream as a terminal leaves it: carriage returns applied, no colours, no progress bars, a long middle cut."""
    lines = []
    for line in ANSI.sub("", text).replace("\r\n", "\n").split("\n"):
        states = [state for state in line.split("\r") if state.strip()]
        line = states[-1].rstrip() if states else ""
        if not PROGRESS.search(line):
            lines.append(line)
    while lines and not lines[-1]:
        lines.pop()
    if not any(lines):
        return ""
    if len(lines) > STREAM_HEAD + STREAM_TAIL + 1:
        left_out = len(lines) - STREAM_HEAD - STREAM_TAIL
        lines = [*lines[:STREAM_HEAD], f"... {left_out} lines left out ...", *lines[-STREAM_TAIL:]]
    return "\n".join(lines) + "\n"
