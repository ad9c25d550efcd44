"""What a published notebook must not hold: paths of the machine that ran it, its host and user name, progress-bar
litter."""

import copy
import re
import socket
from collections.abc import Callable
from pathlib import Path

import nbformat

# An absolute path of at least two parts; what follows `:` or `/` is a URL's, what follows a word character is a
# fraction or unit.
POSIX_PATH = re.compile(r"(?<![\w.:/<~…])/(?:[\w.@+%-]+/)+[\w.@+%-]*")
HOME_FOLDER = re.compile(r"(?<![\w.:/<~…])/(?:home|Users)/[^/\s\"'<>|:]+")
HOME_PATH = re.compile(r"(?<![\w.:/<])~/(?:[\w.@+%-]+/)*[\w.@+%-]*")
WINDOWS_PATH = re.compile(r"\b[A-Za-z]:\\(?:[^\\\s\"'<>|]+\\)+[^\\\s\"'<>|]*")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PROGRESS = re.compile(r"^.*?\d+%\|.*\|.*$|^.*\b\d+(?:\.\d+)?\s?(?:it|s)/(?:s|it)\b.*\]$")
WIDGET = "application/vnd.jupyter.widget-view+json"


def names_of_this_machine() -> tuple[str, ...]:
    """Host names that may not be published. One that could be an ordinary word ("sample") is left alone, or records
    would be damaged; user names stand in paths, which are cut anyway."""
    host = socket.gethostname()
    return tuple(name for name in {host, host.partition(".")[0]} if len(name) >= 6 and re.search(r"[\d.-]", name))


def cleaner(roots: dict[str, str], names: tuple[str, ...]) -> Callable[[str], str]:
    """A function from text to text: `roots` (absolute folder -> what to print for it) first, then any other absolute
    path is cut to its last part, then names are replaced."""
    ordered = sorted(roots.items(), key=lambda item: len(item[0]), reverse=True)
    patterns = [(re.compile(rf"(?<![\w/]){re.escape(root.rstrip('/'))}(?=/|\b|$)"), shown) for root, shown in ordered]
    word = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names)) if names else None

    def last_part(match: re.Match) -> str:
        parts = [part for part in re.split(r"[/\\]", match.group()) if part and part != "~"]
        return f"…/{parts[-1]}" if parts else "…"

    def clean(text: str) -> str:
        for pattern, shown in patterns:
            text = pattern.sub(lambda _, shown=shown: shown, text)
        text = HOME_FOLDER.sub("~", text)
        text = POSIX_PATH.sub(last_part, text)
        text = HOME_PATH.sub(last_part, text)
        text = WINDOWS_PATH.sub(last_part, text)
        return word.sub("…", text) if word else text

    return clean


def without_progress(text: str) -> str:
    """Stream text as a terminal would leave it: carriage returns applied, colours off, progress bars gone."""
    lines = []
    for line in ANSI.sub("", text).split("\n"):
        line = line.rstrip("\r").rpartition("\r")[2]
        if not PROGRESS.match(line):
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _walk(value, clean: Callable[[str], str], key: str = ""):
    if isinstance(value, str):
        return value if key.startswith("image/") else clean(value)
    if isinstance(value, list):
        return [_walk(part, clean, key) for part in value]
    if isinstance(value, dict):
        return nbformat.NotebookNode({clean(name): _walk(part, clean, name) for name, part in value.items()})
    return value


def scrub(notebook: nbformat.NotebookNode, roots: dict[str, str], names: tuple[str, ...] | None = None):
    """A publishable copy of an executed notebook.

    Args:
        notebook: as papermill left it.
        roots: absolute folders and what to print in their place, e.g. the project's root as ".".
        names: host and user names to replace; None: those of this machine.
    """
    clean = cleaner(roots, names_of_this_machine() if names is None else names)
    result = copy.deepcopy(notebook)
    result.metadata.pop("widgets", None)
    run = result.metadata.get("papermill")
    if run is not None:
        keep = ("parameters", "duration", "version")
        result.metadata["papermill"] = nbformat.NotebookNode({name: run[name] for name in keep if name in run})
    result.metadata = _walk(result.metadata, clean)
    for cell in result.cells:
        cell.source = clean(cell.source)
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.NotebookNode({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        outputs = []
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = clean(without_progress(output.text))
                if not output.text.strip():
                    continue
            elif output.output_type in ("display_data", "execute_result"):
                if WIDGET in output.data:
                    continue
                if "text/markdown" in output.data:
                    output.data.pop("text/html", None)
                output.data = _walk(output.data, clean)
                output.metadata = _walk(output.get("metadata", nbformat.NotebookNode()), clean)
            elif output.output_type == "error":
                output.evalue = clean(output.evalue)
                output.traceback = [clean(ANSI.sub("", line)) for line in output.traceback]
            outputs.append(output)
        cell.outputs = outputs
    return result


def leaks(notebook: nbformat.NotebookNode, names: tuple[str, ...] | None = None) -> list[str]:
    """What `scrub` would still change: one line a finding, with the cell it stands in."""
    names = names_of_this_machine() if names is None else names
    clean = cleaner({}, names)
    found: list[str] = []

    def look(where: str, value, key: str = "") -> None:
        if isinstance(value, str):
            if not key.startswith("image/") and clean(value) != value:
                changed = next(line for line in value.split("\n") if clean(line) != line)
                found.append(f"{where}: a path or name of the machine that ran it: {changed.strip()[:100]!r}")
        elif isinstance(value, list):
            for part in value:
                look(where, part, key)
        elif isinstance(value, dict):
            for name, part in value.items():
                look(where, name)
                look(where, part, name)

    look("metadata", dict(notebook.metadata))
    for index, cell in enumerate(notebook.cells):
        look(f"cell {index + 1}", cell.source)
        for output in cell.get("outputs", ()):
            look(f"cell {index + 1}", dict(output))
    return found


def project_roots(project: Path, run: Path | None = None) -> dict[str, str]:
    """The usual `roots`: the project's folder as `.`, the run's as `runs/<name>` wherever it lies."""
    roots = {str(project): "."}
    if run is not None:
        roots[str(run)] = f"runs/{run.name}"
        roots[str(run.resolve())] = f"runs/{run.name}"
    return roots
