"""Labelled cells of executed notebooks, as the report embeds them."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

from basics.errors import ReportError

_NOT_SHAPED = (TypeError, LookupError, AttributeError, AssertionError)  # what nbformat raises for JSON of other shapes
PREFIXES = ("tbl", "fig", "txt")


@dataclass(frozen=True)
class Cell:
    """A code cell with a `#| label:` line."""

    notebook: str
    index: int
    label: str
    options: dict
    outputs: tuple

    @property
    def caption(self) -> str:
        """The `tbl-cap`/`fig-cap` that goes with the label's prefix."""
        return str(self.options.get(f"{self.label.partition('-')[0]}-cap", "") or "").strip()

    @property
    def displays(self) -> list:
        return [output for output in self.outputs if output.output_type in ("display_data", "execute_result")]

    @property
    def markdown(self) -> str:
        """The text of the one display, "" if it has none."""
        return str(self.displays[0].data.get("text/markdown", "")) if self.displays else ""

    @property
    def image(self) -> str:
        """The one display's PNG in base64, "" if it has none. Raises ReportError for what is no base64."""
        text = str(self.displays[0].data.get("image/png", "")).replace("\n", "") if self.displays else ""
        try:
            base64.b64decode(text, validate=True)
        except ValueError as error:
            raise ReportError(f"{self.notebook} cell {self.index} ({self.label}): its PNG is not base64") from error
        return text

    @property
    def alt(self) -> str:
        """What a reader who cannot see the figure is told."""
        if not self.displays:
            return self.caption
        metadata = self.displays[0].get("metadata", {})
        said = metadata.get("image/png", {}).get("alt") or self.options.get("fig-alt")
        plain = str(self.displays[0].data.get("text/plain", ""))
        return str(said or ("" if plain.startswith("<") else plain) or self.caption)


def load(path: Path) -> nbformat.NotebookNode:
    """An executed notebook. Raises ReportError for what is none."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("nbformat") != 4:
            raise ReportError(f"{path.name}: no notebook of format 4")
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)  # `reads` only warns
        return notebook
    except (OSError, ValueError, RecursionError, nbformat.ValidationError, *_NOT_SHAPED) as error:
        raise ReportError(f"{path.name}: not a notebook: {' '.join(str(error).split())[:200]}") from error


def options(source: str, where: str) -> dict:
    """The `#| key: value` lines at the head of a cell, read as YAML like Quarto does."""
    lines = []
    for line in source.split("\n"):
        if not line.startswith("#|"):
            break
        lines.append(line[2:].removeprefix(" "))
    try:
        values = yaml.safe_load("\n".join(lines)) or {}
    except yaml.YAMLError as error:
        raise ReportError(f"{where}: the cell's `#|` lines are not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ReportError(f"{where}: the cell's `#|` lines are not `key: value` pairs")
    return values


def labelled(notebook: nbformat.NotebookNode, name: str) -> list[Cell]:
    """All labelled code cells in order; a label that stands twice stands twice here (the checker says so)."""
    cells = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        settings = options(cell.source, f"{name}, cell {index + 1}")
        if "label" in settings:
            cells.append(Cell(name, index + 1, str(settings["label"]), settings, tuple(cell.outputs)))
    return cells


def errors(notebook: nbformat.NotebookNode) -> list[tuple[int, str]]:
    """(cell number, what was raised) of every error output."""
    found = []
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                found.append((index + 1, f"{output.ename}: {' '.join(str(output.evalue).split())[:160]}"))
    return found
