"""Results that live in notebooks: shown to a person and carried as data in the same output.

`publish` displays one output with Markdown, a figure or text for the reader and the same values as
`application/vnd.threefold+json`. `read` takes records back out of an executed notebook, never from side files.
"""

import base64
import math
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from basics.errors import RecordError
from papertrail.notebook_files import errors, outputs, read_notebook

MIME = "application/vnd.threefold+json"
VERSION = 1
DPI = 160
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class Record:
    """One published result: its values, what the reader sees, and where it is."""

    name: str
    values: dict[str, Any]
    markdown: str | None
    notebook: str  # file name
    cell: int  # index in the notebook, from 0
    plan: str | None = None  # hash of the study's plan when it was published


class Markdown(str):
    """Markdown that the author wrote: `table` leaves it as it is. Never for text from data or models."""


# Publishing ---------------------------------------------------------------------------------------------------------

_plan: str | None = None


def carry_plan(sha256: str | None) -> None:
    """Put the hash of the study's plan into every record that this process publishes from now on."""
    global _plan
    _plan = sha256


def publish(name: str, values: Mapping[str, Any], **shown: Any) -> None:
    """Display one result, for a person and as data, in exactly one output; outside IPython print its plain text.

    The arguments are those of `bundle`. Raises RecordError for values that are not finite JSON or an impossible name.
    """
    data, metadata = bundle(name, values, **shown)
    if _plan:
        data[MIME]["plan"] = _plan
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import display

    if InteractiveShell.initialized():
        display(data, metadata=metadata, raw=True)
    else:
        print(data["text/plain"])


def bundle(
    name: str,
    values: Mapping[str, Any],
    *,
    markdown: str | None = None,
    figure: Any = None,
    text: str | None = None,
    empty: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(data, metadata) of the output that `publish` displays.

    values: finite JSON under string keys (NumPy and torch scalars and arrays become numbers and lists).
    markdown: the table or sentence to show; or figure: a Matplotlib figure, shown as PNG at 160 dpi and closed.
    text: the plain-text form; with a figure its alternative text, which is then needed.
    empty: the output has no content, as nothing was measured; a report leaves it out (papertrail.report.partial).
    """
    if not _NAME.fullmatch(name):
        raise RecordError(f"record name {name!r}: expected words of A-Z a-z 0-9 . _ - joined by /")
    if markdown is not None and figure is not None:
        raise RecordError(f"record {name}: markdown and a figure are two outputs; publish two records")
    if figure is not None and not text:
        raise RecordError(f"record {name}: a figure needs text=, its alternative text")
    if not isinstance(values, Mapping):
        raise RecordError(f"record {name}: values must be a mapping, not {type(values).__name__}")
    data: dict[str, Any] = {"text/plain": text or markdown or f"record {name}"}
    metadata: dict[str, Any] = {}
    if markdown is not None:
        data["text/markdown"] = str(markdown)
    if figure is not None:
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close(figure)  # or the inline backend shows it a second time at the end of the cell
        png = buffer.getvalue()
        width, height = struct.unpack(">II", png[16:24])  # the PNG header's pixel size; shown at 96 pixels an inch
        data["image/png"] = base64.b64encode(png).decode()
        metadata["image/png"] = {"alt": text, "width": round(width * 96 / DPI), "height": round(height * 96 / DPI)}
    data[MIME] = {"name": name, "version": VERSION, "values": finite(values, name)}
    if empty:
        data[MIME]["empty"] = True
    return data, metadata


def finite(value: Any, where: str) -> Any:
    """The value as finite JSON. RecordError names the place of a NaN, an infinity or anything that JSON cannot hold."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise RecordError(f"record {where}: half of a surrogate pair, which no file can hold")
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"record {where} is {value}: a record holds finite numbers only")
        return float(value)
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise RecordError(f"record {where}: key {wrong[0]!r} is not a string")
        return {str(key): finite(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # NumPy, torch and pandas scalars, arrays and series
        return finite(value.tolist(), where)
    raise RecordError(f"record {where}: {type(value).__name__} is not JSON")


# Tables -------------------------------------------------------------------------------------------------------------


def table(
    rows: Any,
    columns: Sequence[str] | Mapping[str, str] | None = None,
    *,
    formats: Mapping[str, str | Callable[[Any], Any]] | None = None,
) -> str:
    """Rows as a Markdown pipe table whose source is aligned; columns of numbers are right-aligned.

    rows: a DataFrame, or an iterable of mappings. columns: which, in which order; a mapping also gives their headings.
    Default: the first row's. formats: column -> a format specification of numbers (".2f"), or a function to a value.
    None prints as an en dash; NaN is an error, an absent value is None. Text is escaped (see `escape`).
    Raises RecordError.
    """
    rows = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
    columns = columns or (list(rows[0]) if rows else [])
    headings = dict(columns) if isinstance(columns, Mapping) else {name: str(name) for name in columns}
    if not headings:
        raise RecordError("table without columns")
    lines = [[escape(heading) for heading in headings.values()]]
    for index, row in enumerate(rows):
        if missing := [name for name in headings if name not in row]:
            raise RecordError(f"table row {index} has no column {missing[0]!r}; it has {', '.join(map(str, row))}")
        lines.append([_cell(row[name], (formats or {}).get(name, ""), f"{name}[{index}]") for name in headings])
    cells = [[row[name] for row in rows if row[name] is not None] for name in headings]
    right = [bool(column) and all(map(_is_number, column)) for column in cells]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, [f"{'-' * (width - 1)}{':' if last else '-'}" for width, last in zip(widths, right, strict=True)])
    padded = [
        [
            text.rjust(width) if last else text.ljust(width)
            for text, width, last in zip(line, widths, right, strict=True)
        ]
        for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def number(value: float) -> str:
    """A number for a reader: whole numbers with thousands separators, others with about three significant digits. Zero
    is zero."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(size)))}f}"


# What text can be taken for, and how it is written instead. A backslash before it is enough for Pandoc; JupyterLab
# typesets mathematics in the finished page, where escapes are gone: there no `$` and no backslash may stand beside
# other text.
_LITERAL = {
    **{char: f"\\{char}" for char in "`*_[]{}#~^|'\""},
    **{char: f"<span>\\{char}</span>" for char in "$\\"},
    **{"&": "&amp;", "<": "&lt;", ">": "&gt;"},
    "@": "&#64;",  # a citation, an address, JupyterLab's own mark @@0@@ for mathematics
    "?@": "?<span>&#64;</span>",  # what Quarto prints for a reference to nothing
    "{{": "\\{<span>\\{</span>",  # Quarto's shortcodes, which its older versions look for in what Pandoc has read
    "//": "&#47;&#47;",  # of a bare address, which JupyterLab makes a link
    ".": "&#46;",  # of www., and of dots that Pandoc draws together
    "-": "\\-",  # of dashes that Pandoc draws together
}
_SPECIAL = re.compile(r"\{\{|\?@|[`*_\[\]{}#~^|'\"$\\&<>@]|(?<=:)//|(?<=www)\.|\.(?=\.\.)|-(?=-)", re.IGNORECASE)


def escape(text: str) -> str:
    """Text of any origin as literal Markdown, for a table cell or inside a line: no HTML, link, code, mathematics,
    citation, further cell or Quarto shortcode can come of it, in JupyterLab, Pandoc or Quarto."""
    text = "".join(char if char.isprintable() else " " for char in text)
    return _SPECIAL.sub(lambda match: _LITERAL[match.group()], text)


def _cell(value: Any, form: str | Callable[[Any], Any], where: str) -> str:
    if hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    if value is None:
        return "–"
    if callable(form):
        value, form = form(value), ""
    if isinstance(value, Markdown):
        return str(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise RecordError(f"{value} in a table at {where}: a result is finite or absent")
        return format(value, form) if form else number(value)
    return escape(str(value))


# "0.91", "-3", "1,319", "12%", "253M", "0.91 [0.88, 0.94]", "0.91 (n 872)", "0.91 ± 0.02", "12/20"
_NUMERIC = re.compile(r"[-+−±<>≈]?\s*\d[\d.,]*(e[-+]?\d+)?\s*[%×kMGTB]?(\s*(\[.*\]|\(.*\)|±.*|[/–]\s*\d.*))?")


def _is_number(value: Any) -> bool:
    """Whether a cell reads as a number: a number, or a text that begins with one."""
    if isinstance(value, str):
        return value == "–" or _NUMERIC.fullmatch(value) is not None
    return not isinstance(value, bool) and hasattr(value, "__float__")


# Reading ------------------------------------------------------------------------------------------------------------


def read(notebook_path: str | Path) -> dict[str, Record]:
    """The records of an executed notebook, by name, in its order.

    Raises RecordError: no such file, no notebook, a cell whose output is an error, a record of another version, with
    values that are not finite, or under a name that is there already.
    """
    path = Path(notebook_path)
    notebook = read_notebook(path)
    for error in errors(notebook):
        raise RecordError(f"{path.name}: cell {error['cell']} ended in {error['ename']}: {error['evalue']}")
    records: dict[str, Record] = {}
    for index, output in outputs(notebook):
        data = output.get("data", {})
        if MIME not in data:
            continue
        where, content, markdown = f"{path.name}: cell {index}", data[MIME], data.get("text/markdown")
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise RecordError(f"{where}: a record of another version; run the notebook again")
        name, values = content.get("name"), content.get("values")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(values, dict):
            raise RecordError(f"{where}: a record without a name or values")
        if not isinstance(markdown, str | None):
            raise RecordError(f"{where}: record {name} has Markdown that is not text")
        if name in records:
            raise RecordError(f"{path.name}: record {name} is in cell {records[name].cell} and in cell {index}")
        plan = content.get("plan")
        plan = plan if isinstance(plan, str) else None
        records[name] = Record(name, finite(values, name), markdown, path.name, index, plan)
    return records
