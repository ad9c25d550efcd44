"""What an executed notebook may hold: no errors, no path, user or host of this machine, no progress-bar litter.

Works on a notebook's plain JSON (nbformat 4), so that neither the pipeline nor the checks pay for importing nbformat.
"""

import json
import re
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from basics import paths
from basics.errors import RecordError
from basics.files import atomic_write

# Lines kept of one stream output: what a long loop printed first says what it is, what it printed last how it ended.
STREAM_HEAD = 10
STREAM_TAIL = 30

ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
PROGRESS = re.compile(r"\d+%\|.*\|\s*[\d.]+\w*/|\d+\w*\s*\[\d+:\d+.*it/s\]|\d+(?:it|ex\w*) \[\d+:\d+")  # tqdm's forms
CELL_FILE = re.compile(re.escape(tempfile.gettempdir()) + r"/ipykernel_\d+/\d+\.py")
ABSOLUTE = re.compile(r"(?<![\w/.:<$~\\-])/(?:[\w.@+-]+/)+([\w.@+-]*)")
WIDGET = "application/vnd.jupyter.widget-view+json"
INJECTED = "injected-parameters"  # papermill's tag


def read_notebook(path: Path) -> dict:
    """A notebook's JSON. Raises RecordError when the file is no notebook of format 4."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path}: no such notebook") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordError(f"{path}: not a readable notebook ({error})") from error
    if (
        not isinstance(notebook, dict)
        or notebook.get("nbformat") != 4
        or not isinstance(notebook.get("cells"), list)
        or not all(isinstance(cell, dict) for cell in notebook["cells"])
    ):
        raise RecordError(f"{path}: not a notebook of format 4")
    return notebook


def write_notebook(path: Path, notebook: Mapping) -> None:
    """Writes a notebook as nbformat does (sorted keys, indent 1, final newline), atomically."""
    atomic_write(path, json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n")


def joined(text: str | list[str]) -> str:
    """nbformat's multi-line strings are lists of lines on disk."""
    return text if isinstance(text, str) else "".join(text)


def errors(notebook: Mapping) -> list[dict]:
    """Error outputs: {"cell" (index), "ename", "evalue", "traceback" (text without colour codes)}."""
    found = []
    for index, cell in enumerate(notebook["cells"]):
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                traceback = ANSI.sub("", "\n".join(output.get("traceback", [])))
                found.append(
                    {
                        "cell": index,
                        "ename": output.get("ename", ""),
                        "evalue": output.get("evalue", ""),
                        "traceback": traceback,
                    }
                )
    return found


def clean(
    notebook: dict, *, input_path: str = "", output_path: str = "", private: Mapping[str, str] | None = None
) -> dict:
    """Makes an executed notebook fit to be published, in place; returns it.

    `private` maps further texts of this machine to what stands for them (the data folder: `$THREEFOLD_DATA`).
    """
    replacements = _replacements(private or {})
    host = _host_pattern(notebook)
    metadata = notebook.setdefault("metadata", {})
    metadata.pop("widgets", None)
    if "papermill" in metadata:
        metadata["papermill"]["input_path"] = input_path or Path(metadata["papermill"].get("input_path") or "").name
        metadata["papermill"]["output_path"] = output_path or Path(metadata["papermill"].get("output_path") or "").name
        metadata["papermill"].pop("environment_variables", None)
    for cell in notebook["cells"]:
        tags = cell.get("metadata", {}).get("tags", [])
        if INJECTED in tags and not any(other.get("id") == INJECTED for other in notebook["cells"]):
            cell["id"] = INJECTED  # papermill draws a random one
        times = cell.get("metadata", {}).pop("papermill", None)
        if times and times.get("duration") is not None:
            cell["metadata"]["papermill"] = {"duration": times["duration"], "status": times.get("status")}
        cell.get("metadata", {}).pop("execution", None)
        if "outputs" in cell:
            cell["outputs"] = [
                output for output in _merge_streams(cell["outputs"]) if WIDGET not in output.get("data", {})
            ]
            cell["outputs"] = [output for output in map(_tidy_stream, cell["outputs"]) if output is not None]

    def scrub(text: str, *, loose: bool) -> str:
        text = CELL_FILE.sub("<cell>", text)
        for old, new in replacements:
            text = text.replace(old, new)
        if host is not None:
            text = host.sub("<host>", text)
        return ABSOLUTE.sub(lambda match: match.group(1) or "<path>", text) if loose else text

    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            # Streams and tracebacks may name any file of the machine; in a result a slash may mean something.
            loose = output.get("output_type") in ("stream", "error")
            for key, value in output.items():
                output[key] = _map_text(value, lambda text, loose=loose: scrub(text, loose=loose))
        if INJECTED in cell.get("metadata", {}).get("tags", []):
            cell["source"] = _map_text(cell["source"], lambda text: scrub(text, loose=False))
    notebook["metadata"] = _map_text(metadata, lambda text: scrub(text, loose=False))
    return notebook


def _replacements(private: Mapping[str, str]) -> list[tuple[str, str]]:
    """(text of this machine, what stands for it), longest first so that a folder wins over its parent."""
    known = {f"{old.rstrip('/')}": new for old, new in private.items() if len(old) > 1}
    known[str(paths.RUNS)] = "runs"
    known[sys.prefix] = "<python>"
    known[str(Path.home())] = "~"
    known[str(paths.PROJECT) + "/"] = ""
    known[str(paths.PROJECT)] = "."
    return sorted(((old, new) for old, new in known.items() if len(old) > 1), key=lambda pair: -len(pair[0]))


def _host_pattern(notebook: Mapping) -> re.Pattern | None:
    """The host's name as a whole word; none where it is a word the notebook's own source uses ("laptop")."""
    name = socket.gethostname()
    if len(name) < 5:
        return None
    pattern = re.compile(r"(?<![\w-])" + re.escape(name) + r"(?![\w-])")
    return None if any(pattern.search(joined(cell.get("source", ""))) for cell in notebook["cells"]) else pattern


def _map_text(value, function):
    """`value` with `function` applied to every string in it, keys too (a source's path is one)."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_map_text(item, function) for item in value]
    if isinstance(value, dict):
        # Pictures are base64: long, and a slash in them is no path.
        return {
            function(key): item if key.startswith("image/") and key != "image/svg+xml" else _map_text(item, function)
            for key, item in value.items()
        }
    return value


def _merge_streams(outputs: list[dict]) -> list[dict]:
    """One stream output a run of the same stream's messages, as a person saw it."""
    merged: list[dict] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.get("output_type") == "stream" == last.get("output_type") and output.get("name") == last.get("name"):
            last["text"] = joined(last["text"]) + joined(output["text"])
        else:
            merged.append(dict(output))
    return merged


def _tidy_stream(output: dict) -> dict | None:
    """A stream's final state: carriage returns played, bars and a flood's middle gone. None when nothing is left."""
    if output.get("output_type") != "stream":
        return output
    lines = []
    for line in ANSI.sub("", joined(output["text"])).replace("\r\n", "\n").split("\n"):
        shown = [part for part in line.split("\r") if part.strip()]
        lines.append(shown[-1].rstrip() if shown else "")
    lines = [line for line in lines if not PROGRESS.search(line)]
    while lines and not lines[-1]:
        lines.pop()
    if not any(lines):
        return None
    if len(lines) > STREAM_HEAD + STREAM_TAIL + 1:
        left_out = len(lines) - STREAM_HEAD - STREAM_TAIL
        lines = [*lines[:STREAM_HEAD], f"... {left_out} lines left out ...", *lines[-STREAM_TAIL:]]
    return {**output, "text": [line + "\n" for line in lines]}
