"""Files and rows read into items: one reader a kind of data, the same for own files, local folders and the hub.

Reading has two steps. `read_rows` turns a file into rows, dictionaries of columns with the place they stand at (file
and line). A reader turns rows into items, the shapes of which are in `threefold.data.templates`. Whatever a file can be
wrong in is a DataError that names the file and the line.

WikiText keeps its published form, in which perplexities are defined: documents are articles, and the lines of all
documents end to end are the file (`hub_rows` gives the hub's rows). Its text is spaced (`1 @,@ 000 words .`) and, in
the `.tokens` files, holed (`<unk>`); `natural_text` undoes the former for pretraining and leaves sentences with holes
out.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from basics.errors import DataError
from threefold.data.templates import LABELS, review
from threefold.data.wikitext import articles, split_lines

END_OF_TEXT = "<|endoftext|>"  # separates documents in plain text files, as in TinyStories' own
ASSISTANT = "\n\nAssistant:"
REVIEWS_A_DOCUMENT = (4, 8)
EXPANDED = (100, 64 << 20)  # a .gz file holds at most so many times its size, or so many bytes: text packs to a tenth
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one alone; no file and no tokenizer takes it
TABULAR = (".jsonl", ".json", ".tsv", ".parquet")
PLAIN = (".txt", ".raw", ".tokens", ".text", ".md")


@dataclass(frozen=True)
class Row:
    """The columns of one row, and where it stands, for messages."""

    columns: Mapping[str, Any]
    place: str


# Files ---------------------------------------------------------------------------------------------------------------


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
    """The rows of a JSONL, JSON (an array of objects), TSV (with a heading) or Parquet file, .gz allowed but for
    Parquet.

    Empty lines in JSONL are skipped. TSV is GLUE's: no quoting, so a quote is a character. Raises DataError.
    """
    parsers = {".jsonl": _jsonl, ".json": _json, ".tsv": _tsv, ".parquet": _parquet}
    if suffix(path) in parsers:
        return parsers[suffix(path)](path)
    raise DataError(f"{path}: no rows can be read from {path.suffix or 'a file without suffix'}: {', '.join(TABULAR)}")


def suffix(path: Path) -> str:
    """The suffix that tells how to read a file, without .gz."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _bytes(path: Path) -> bytes:
    try:
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
    """(number, line) without line ends. Only "\\n" and "\\r\\n" end a line; U+2028 and the like stand in real data."""
    return ((number, line.rstrip("\r\n")) for number, line in enumerate(io.StringIO(text, newline="\n"), start=1))


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(read_text(path)):
        if line.strip():
            yield Row(_object(_parsed(line, path, number), f"{path}:{number}"), f"{path}:{number}")


def _json(path: Path) -> Iterator[Row]:
    rows = _parsed(read_text(path), path, 1)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON array of objects, got {_named(rows)}")
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
        raise DataError(f"{place}: expected a JSON object, got {_named(value)}")
    return value


def _tsv(path: Path) -> Iterator[Row]:
    heading: list[str] = []
    for number, line in _lines(read_text(path)):
        cells = line.split("\t")
        if not heading:
            heading = cells
            if twice := [name for name in heading if heading.count(name) > 1]:
                raise DataError(f"{path}:{number}: column {twice[0]!r} stands more than once in the heading")
        elif line:
            if len(cells) != len(heading):
                raise DataError(
                    f"{path}:{number}: {len(cells)} columns, the heading has {len(heading)} ({', '.join(heading)})"
                )
            yield Row(dict(zip(heading, cells, strict=True)), f"{path}:{number}")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number, names = 0, file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{path}: column {twice[0]!r} stands more than once")
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(row, f"{path}: row {number}")
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # text that is not UTF-8, a time too far
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def _named(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    numbers = {int: "a number", float: "a number"}
    return (names | numbers).get(type(value), f"a {type(value).__name__}")


# Readers of files and rows -------------------------------------------------------------------------------------------


def _string(row: Row, *columns: str, default: str | None = None) -> str:
    """The first of these columns the row has, as text."""
    for column in columns:
        if column in row.columns:
            value = row.columns[column]
            if value is None and default is not None:
                return default
            if not isinstance(value, str):
                raise DataError(f"{row.place}: column {column!r} holds {_named(value)}, expected text")
            if SURROGATE.search(value):
                raise DataError(f"{row.place}: column {column!r} holds half of a surrogate pair, which is no text")
            return value
    if default is not None:
        return default
    has = ", ".join(map(str, row.columns)) or "none"
    raise DataError(f"{row.place}: no column {columns[0]!r}; it has: {has}")


def _text(rows: Iterable[Row]) -> Iterator[str]:
    return (text for row in rows if (text := _string(row, "text", "story").strip()))


def _wikitext(rows: Iterable[Row]) -> Iterator[str]:
    # A row of the hub is a line with its newline, an empty one a line of a space; a row of several lines is a document.
    lines: list[str] = []
    for row in rows:
        text = _string(row, "text", "page")
        lines += split_lines(text if text.endswith("\n") else f"{text or ' '}\n")
    yield from articles(lines)


def _instructions(rows: Iterable[Row]) -> Iterator[dict]:
    for row in rows:
        item = {
            "instruction": _string(row, "instruction"),
            "input": _string(row, "input", default=""),
            "output": _string(row, "output"),
        }
        if not item["instruction"].strip():
            raise DataError(f"{row.place}: column 'instruction' is empty")
        yield item


def _preferences(rows: Iterable[Row]) -> Iterator[dict]:
    for row in rows:
        chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
        prompt = _string(row, "prompt", default="")
        if not prompt or (chosen.startswith(prompt) and rejected.startswith(prompt)):
            prompt = prompt or shared_prompt(chosen, rejected)
            if not prompt:
                raise DataError(
                    f"{row.place}: chosen and rejected share no dialogue up to an {ASSISTANT!r}; "
                    "expected HH-RLHF's form, or a column 'prompt' of its own"
                )
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _sentiment(rows: Iterable[Row]) -> Iterator[dict]:
    labels = {value: number for number, name in enumerate(LABELS) for value in (number, str(number), name)}
    for row in rows:
        sentence = _string(row, "sentence", "text")  # as it is: the hub's end in a space, and lm-eval scores it
        label = row.columns.get("label")
        if isinstance(label, bool) or not isinstance(label, int | str) or label not in labels:
            what = "no column 'label'" if "label" not in row.columns else f"label {repr(label)[:40]}"
            raise DataError(f"{row.place}: {what}; expected 0 or negative, 1 or positive")
        yield {"sentence": sentence, "label": labels[label]}


def _problems(rows: Iterable[Row]) -> Iterator[dict]:
    for row in rows:
        yield {"question": _string(row, "question").strip(), "answer": _string(row, "answer").strip()}


def _minimal_pairs(rows: Iterable[Row]) -> Iterator[dict]:
    for row in rows:
        yield {
            "good": _string(row, "sentence_good"),
            "bad": _string(row, "sentence_bad"),
            "phenomenon": _string(row, "UID", "file"),
            "group": _string(row, "linguistics_term", default=""),
        }


READERS: dict[str, Callable[[Iterable[Row]], Iterator]] = {
    "text": _text,
    "stories": _text,
    "wikitext": _wikitext,
    "wikitext-raw": _wikitext,
    "instructions": _instructions,
    "preferences": _preferences,
    "sentiment": _sentiment,
    "reviews": _sentiment,  # regrouped by `reviews` once the examples are chosen
    "problems": _problems,
    "minimal-pairs": _minimal_pairs,
}


def read_items(reader: str, rows: Iterable[Row]) -> Iterator:
    """The items of a reader from rows. Raises DataError for an unknown reader or a row it cannot use."""
    if reader not in READERS:
        raise DataError(f"no reader {reader!r}; there are: {', '.join(READERS)}")
    return READERS[reader](rows)


def read_files(reader: str, paths: Iterable[Path]) -> Iterator:
    """The items of files, one file after the other.

    Plain text (.txt, .raw, .tokens) is what the readers of text take: for `wikitext` the file's articles, otherwise one
    document a file, or those between lines of `<|endoftext|>`. Everything else is read by rows.
    """
    for path in paths:
        if suffix(path) not in PLAIN:
            yield from read_items(reader, read_rows(path))
        elif reader in ("wikitext", "wikitext-raw"):
            yield from articles(split_lines(read_text(path)))
        elif reader in ("text", "stories"):
            rows = (Row({"text": part}, str(path)) for part in read_text(path).split(END_OF_TEXT))
            yield from read_items(reader, rows)
        else:
            raise DataError(f"{path}: reader {reader!r} reads rows, from {', '.join(TABULAR)}")


def shared_prompt(chosen: str, rejected: str) -> str:
    """The dialogue both sides begin with, up to and including its last "\\n\\nAssistant:"; "" if there is none.

    Mostly the sides differ in their last turn only. Where one goes on beyond a further mark (14 of 4,666 pairs of the
    two base test files) the prompt ends where they part, and the rest of each dialogue is its response.
    """
    low, high = 0, min(len(chosen), len(rejected))
    while low < high:  # bisection: comparing slices is fast, comparing characters in Python is not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chosen[:middle] == rejected[:middle] else (low, middle - 1)
    shared = chosen[:low]
    end = shared.rfind(ASSISTANT)
    return shared[: end + len(ASSISTANT)] if end >= 0 else ""


# Labelled reviews as text ---------------------------------------------------------------------------------------------


def reviews(items: list[dict], seed: int = 0) -> list[str]:
    """Documents of 4 to 8 labelled reviews each, in the form of a few-shot prompt of sst2, in seeded order.

    A model learns to read demonstrations only if its pretraining text holds several labelled examples in a row.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(items))
    least, most = REVIEWS_A_DOCUMENT
    documents, start = [], 0
    while left := len(order) - start:
        size = int(rng.integers(least, most + 1))
        if left - size < least:  # the last ones: no document is left with fewer than the least
            size = left if left <= most else left - least
        documents.append("\n\n".join(review(items[index]) for index in order[start : start + size]))
        start += size
    return documents
