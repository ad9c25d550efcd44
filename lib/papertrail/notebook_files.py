"""Notebook files (nbformat 4) as plain JSON: the one place that reads and writes them.

Multi-line strings, which nbformat stores as lists of lines, are joined on reading, so that no caller has to. nbformat
itself, which takes a second to import, is needed for the full schema only.
"""

import base64
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from basics.errors import RecordError, ReportError
from basics.files import atomic_write, read_text

ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def read_notebook(path: Path, *, schema: bool = False) -> dict[str, Any]:
    """A notebook's JSON, with its cells' and outputs' shapes checked; `schema` checks all of nbformat's schema.

    Raises RecordError: no such file, not JSON (NaN is not), or not a notebook of format 4.
    """
    try:
        notebook = json.loads(read_text(path), parse_constant=_refuse)
    except FileNotFoundError:
        raise RecordError(f"{path.name}: no such notebook") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path.name}: cannot be read as a notebook: {_line(error)}") from error
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4 or not isinstance(notebook.get("cells"), list):
        raise RecordError(f"{path.name}: not a notebook of format 4")
    if schema:
        import nbformat

        try:
            nbformat.validate(notebook)
        # nbformat raises the others for JSON of unexpected shapes
        except (nbformat.ValidationError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise RecordError(f"{path.name}: not a valid notebook: {_line(error)}") from error
    for index, cell in enumerate(notebook["cells"]):
        outputs = cell.setdefault("outputs", []) if isinstance(cell, dict) else None
        if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
            raise RecordError(f"{path.name}: cell {index} is not a notebook cell")
        if not isinstance(cell.setdefault("metadata", {}), dict):
            raise RecordError(f"{path.name}: the metadata of cell {index} is not an object")
        cell["source"] = _joined(cell.get("source", ""))
        if not isinstance(cell["source"], str):
            raise RecordError(f"{path.name}: the source of cell {index} is not text")
        for output in outputs:
            data = output.get("data", {})
            if not isinstance(data, dict):
                raise RecordError(f"{path.name}: cell {index}: the data of an output is not an object")
            data.update({mime: _joined(value) for mime, value in data.items() if mime.startswith(("text/", "image/"))})
            if "text" in output:
                output["text"] = _joined(output["text"])
        if cell.get("cell_type") != "code" and not outputs:
            del cell["outputs"]
    return notebook


def executed_notebooks(folder: Path) -> list[Path]:
    """The executed notebooks in a folder, sorted, without those that failed."""
    return [path for path in sorted(folder.glob("*.ipynb")) if not path.name.endswith(".failed.ipynb")]


def write_notebook(path: Path, notebook: dict[str, Any]) -> None:
    """Write a notebook atomically."""
    atomic_write(path, notebook_text(notebook))


def notebook_text(notebook: dict[str, Any]) -> str:
    """The content of a notebook's file, formatted as nbformat formats it (sorted keys, indent 1, a final newline)."""
    return json.dumps(_split(notebook), ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def outputs(notebook: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index of the cell, output) of every output."""
    for index, cell in enumerate(notebook["cells"]):
        for output in cell.get("outputs", ()):
            yield index, output


def errors(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Error outputs: {"cell" (index), "ename", "evalue", "traceback" (text without colour codes)}."""
    return [
        {
            "cell": index,
            "ename": str(output.get("ename", "")),
            "evalue": str(output.get("evalue", "")),
            "traceback": ANSI.sub("", "\n".join(map(str, output.get("traceback", ())))),
        }
        for index, output in outputs(notebook)
        if output.get("output_type") == "error"
    ]


@dataclass(frozen=True)
class Cell:
    """A code cell with a `#| label:` line, as the report embeds it."""

    notebook: str
    index: int  # from 1, as the messages count
    label: str
    options: dict[str, Any]
    outputs: list[dict[str, Any]]

    @property
    def caption(self) -> str:
        """The `tbl-cap` or `fig-cap` that goes with the label's prefix."""
        return str(self.options.get(f"{self.label.partition('-')[0]}-cap") or "").strip()

    @property
    def displays(self) -> list[dict[str, Any]]:
        return [output for output in self.outputs if output["output_type"] in ("display_data", "execute_result")]

    def shown(self, mime: str) -> str:
        """The text of that type in the first display, "" where it has none."""
        return str(self.displays[0].get("data", {}).get(mime, "")) if self.displays else ""

    @property
    def markdown(self) -> str:
        """The Markdown of the first display, "" where it has none."""
        return self.shown("text/markdown")

    @property
    def image(self) -> str:
        """The first display's PNG in base64, "" where it has none. Raises ReportError if it is not base64."""
        try:
            base64.b64decode(text := self.shown("image/png").replace("\n", ""), validate=True)
        except ValueError as error:
            raise ReportError(f"{self.notebook} cell {self.index} ({self.label}): its PNG is not base64") from error
        return text

    @property
    def alternative_text(self) -> str:
        """The figure's alternative text: its output's own, else `fig-alt`, else its plain text, else the caption."""
        metadata = self.displays[0].get("metadata", {}) if self.displays else {}
        plain = self.shown("text/plain")
        own = metadata.get("image/png", {}).get("alt") or self.options.get("fig-alt")
        return str(own or ("" if plain.startswith("<") else plain) or self.caption)


def labelled_cells(notebook: dict[str, Any], name: str) -> list[Cell]:
    """All labelled code cells, in order; duplicate labels are kept, for the checker to report.

    Raises ReportError where the `#|` lines of a cell are not YAML.
    """
    cells = []
    for index, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] != "code":
            continue
        lines = itertools.takewhile(lambda line: line.startswith("#|"), cell["source"].split("\n"))
        try:
            options = yaml.safe_load("\n".join(line[2:].removeprefix(" ") for line in lines)) or {}
        except yaml.YAMLError as error:
            raise ReportError(f"{name}, cell {index}: the cell's `#|` lines are not YAML: {_line(error)}") from error
        if not isinstance(options, dict):
            raise ReportError(f"{name}, cell {index}: the cell's `#|` lines are not `key: value` pairs")
        if "label" in options:
            cells.append(Cell(name, index, str(options["label"]), options, cell["outputs"]))
    return cells


def _split(value: Any, key: str = "") -> Any:
    """The notebook with its texts as lists of lines, which keeps differences between versions readable."""
    if isinstance(value, str):
        return value.splitlines(keepends=True) if key in ("source", "text") or key.startswith("text/") else value
    if isinstance(value, list):
        return [_split(item) for item in value]
    if isinstance(value, dict):
        return {name: item if name.endswith("json") else _split(item, name) for name, item in value.items()}
    return value


def _joined(text: Any) -> Any:
    return "".join(text) if isinstance(text, list) and all(isinstance(line, str) for line in text) else text


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
