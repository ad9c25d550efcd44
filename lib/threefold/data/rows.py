"""Files read into rows: JSONL, JSON, CSV, TSV and Parquet, gzip or not, and plain text.

Anything wrong in a file raises a DataError that names the file and the line.
"""

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basics.errors import DataError
from basics.files import refuse_pointer

EXPANDED = (100, 64 << 20)  # a .gz file holds at most so many times its size, or so many bytes: text packs to a tenth
PLAIN = (".txt", ".raw", ".tokens", ".text", ".md")


@dataclass(frozen=True)
class Row:
    """The columns of one row, and its place, for messages."""

    columns: Mapping[str, Any]
    place: str


def read_text(path: Path) -> str:
    """A UTF-8 file, gzip or not. Raises DataError naming the line of the first byte that is not UTF-8."""
    data = _bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}): convert the file to UTF-8"
        ) from error


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL, JSON (an array of objects, or JSONL), CSV or TSV (with a heading) or Parquet file; all but
    Parquet may be .gz.

    Empty lines are skipped. TSV is GLUE's: no quoting, so a quote is a character. Raises DataError.
    """
    if suffix(path) not in TABULAR:
        named = path.suffix or "a file without suffix"
        raise DataError(f"{path}: no rows can be read from {named}: {', '.join(TABULAR)}")
    return TABULAR[suffix(path)](path)


def suffix(path: Path) -> str:
    """The suffix that tells how to read a file, without .gz."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _bytes(path: Path) -> bytes:
    try:
        refuse_pointer(path)
        if path.suffix == ".gz":
            most = max(EXPANDED[0] * path.stat().st_size, EXPANDED[1])
            with gzip.open(path, "rb") as file:
                data = file.read(most + 1)
            if len(data) > most:
                raise DataError(f"{path}: expands to more than {most:,} bytes: unpack it yourself if that is right")
            return data
        return path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) without line ends. Only "\\n" and "\\r\\n" end a line: real data contain U+2028 and the like."""
    return ((number, line.rstrip("\r\n")) for number, line in enumerate(io.StringIO(text, newline="\n"), start=1))


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(read_text(path)):
        if line.strip():
            yield Row(_object(_parsed(line, path, number), f"{path}:{number}"), f"{path}:{number}")


def _json(path: Path) -> Iterator[Row]:
    text = read_text(path)
    first, _, rest = text.lstrip().partition("\n")
    if first.startswith("{") and first.rstrip().endswith("}") and rest.strip():  # JSONL under another name
        yield from _jsonl(path)
        return
    rows = _parsed(text, path, 1)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON array of objects, got {kind_of(rows)}")
    for number, row in enumerate(rows, start=1):
        yield Row(_object(row, f"{path}: item {number}"), f"{path}: item {number}")


def _parsed(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line}: not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise DataError(f"{path}:{first_line}: not JSON that can be read: {error}") from error


def _object(value: Any, place: str) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object, got {kind_of(value)}")
    return value


def _tsv(path: Path) -> Iterator[Row]:
    return _with_heading(path, ((number, line.split("\t")) for number, line in _lines(read_text(path)) if line))


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # as large as any platform takes; the default is 128 KiB
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        try:
            yield from ((reader.line_num, cells) for cells in reader if cells)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error

    return _with_heading(path, records())


def _with_heading(path: Path, records: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    """Rows from (line, cells), the first of which are the names of the columns."""
    number, heading = next(records, (1, []))
    if twice := [name for name in heading if heading.count(name) > 1]:
        raise DataError(f"{path}:{number}: column {twice[0]!r} appears more than once in the heading")
    for number, cells in records:
        if len(cells) != len(heading):
            raise DataError(
                f"{path}:{number}: {len(cells)} columns, the heading has {len(heading)} ({', '.join(heading)})"
            )
        yield Row(dict(zip(heading, cells, strict=True)), f"{path}:{number}")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        refuse_pointer(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            number, names = 0, file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{path}: column {twice[0]!r} appears more than once")
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(row, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # text not UTF-8, a time too far
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


TABULAR: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


def kind_of(value: Any) -> str:
    """What a value is, for messages: "a number", "NaN", ..."""
    if is_null(value):
        return "null" if value is None else "NaN"
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    numbers = {int: "a number", float: "a number"}
    return (names | numbers).get(type(value), f"a {type(value).__name__}")


def is_null(value: Any) -> bool:
    """Whether a value is missing: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))
