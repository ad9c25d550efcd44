"""What a notebook cell shows: one record with its Markdown or figure; and how numbers and tables are printed."""

import math
import re
import string
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papertrail import records
from study.comparison.models import SHOWN

NBSP = "\u00a0"  # no-break space
UNITS = SHOWN["unit"]
WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Result:
    """One publishable result. `publish()` is the last line of its notebook cell."""

    name: str  # of the record
    values: dict[str, Any]
    markdown: str | None = None
    figure: Any = None
    text: str | None = None  # alternative text of a figure
    empty: bool = False  # nothing was measured, so that a report leaves it out

    def publish(self) -> None:
        """Display it with its values attached (`records.publish`)."""
        shown = {"markdown": self.markdown, "figure": self.figure, "text": self.text}
        records.publish(self.name, self.values, **shown, empty=self.empty)


# Templates -----------------------------------------------------------------------------------------------------------


class _Template(string.Formatter):
    """Format strings whose fields are looked up in mappings, sequences and attributes alike, None in whatever is None,
    and are formatted by FORMATS, a number of decimals, or as Python does."""

    def get_field(self, field_name: str, args: Sequence, kwargs: Any) -> tuple[Any, str]:
        first, *path = re.split(r"[.\[]", field_name.replace("]", ""))
        value = kwargs[first] if isinstance(kwargs, Mapping) else getattr(kwargs, first)
        for part in path:
            if isinstance(value, Mapping):
                value = value.get(part)
            elif value is not None:
                value = value[int(part)] if part.isdigit() else getattr(value, part)
        return value, first

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec in FORMATS:
            return FORMATS[format_spec](value)
        return plain(value, int(format_spec)) if format_spec.isdigit() else format(value, format_spec)


def fill(template: str, fields: Any) -> str:
    """A template of words.toml as text. fields: a mapping, or an object with attributes."""
    return _Template().vformat(template, (), fields)


def say(key: str, **fields: Any) -> str:
    """A sentence of words.toml, one of the findings or another."""
    return fill((WORDS["findings"] | WORDS["sentences"])[key], fields)


def _cell(template: str, fields: Any) -> Any:
    parts = [(name, spec) for _, name, spec, _ in string.Formatter().parse(template) if name is not None]
    values = [_Template().get_field(name, (), fields)[0] for name, _ in parts]
    if any(value is None for value in values):
        return None
    return values[0] if template == f"{{{parts[0][0]}}}" else fill(template, fields)


# Tables --------------------------------------------------------------------------------------------------------------


NOTHING = "*Not measured in this run.*"


def table(name: str, found: Iterable[Mapping[str, Any]], *, none: str = NOTHING, **values: Any) -> Result:
    """The record `comparison/<name>`: rows of cells, repeated entries of the first column shown once.

    found: cells by title, or fields where words.toml has columns for the table. none: what is shown where there are no
    rows. values: what the record holds beside the rows.
    """
    rows, columns = list(found), WORDS["tables"].get(name)
    if columns:
        rows = [{fill(title, row): _cell(text, row) for title, text in columns.items()} for row in rows]
    shown = [dict(row) for row in rows]
    for row, above in zip(shown[1:], rows, strict=False):
        first = next(iter(row))
        row[first] = "" if row[first] == above[first] else row[first]
    markdown = records.table(shown, formats=dict.fromkeys(shown[0], _unbroken)) if rows else none
    return Result(f"comparison/{name}", {"rows": rows, **values}, markdown, empty=not rows)


def _unbroken(cell: Any) -> Any:
    """A cell that keeps its no-break spaces, so that no interval is broken over two lines."""
    return records.Markdown(NBSP.join(map(records.escape, cell.split(NBSP)))) if isinstance(cell, str) else cell


# Numbers for prose and cells -----------------------------------------------------------------------------------------


def estimate(
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    scale: float = 1,
    decimals: int | None = None,
    unit: str = "",
    sign: bool = False,
    short: bool = False,
) -> str:
    """A value with its interval, "+3.1 pp [+0.4, +5.8]"; the value alone where there is none. All numbers are printed
    alike, the unit once, and a line breaks before the bracket only.

    decimals: None for two below 1,000 and none from there on. sign: also of what is positive. short: see `compact`.
    """

    def shown(x: float) -> str:
        x, places = scale * x, (2 if abs(scale * x) < 1000 else 0) if decimals is None else decimals
        return compact(x) if short else signed(x, places) if sign else plain(x, places)

    if low is None or high is None:
        return f"{shown(value)}{unit}"
    return f"{shown(value)}{unit} [{shown(low)},{NBSP}{shown(high)}]"


def bounds(change: Callable[[float], float], *values: float | None) -> list[float | None]:
    """The values changed, absent ones left absent."""
    return [None if value is None else change(value) for value in values]


def percent(value: float, decimals: int = 1) -> str:
    """0.875 -> "87.5%"; zero is "0.0%"."""
    return f"{plain(100 * value, decimals)}%"


def signed(value: float, decimals: int = 2, unit: str = "") -> str:
    """With its sign, a true minus; zero has none."""
    return f"{'+' if round(value, decimals) > 0 else ''}{plain(value, decimals)}{unit}"


def plain(value: float, decimals: int = 2) -> str:
    """Thousands separated, a true minus; what rounds to nothing has no sign."""
    return f"{'−' if round(value, decimals) < 0 else ''}{abs(value):,.{decimals}f}"


def probability(p: float) -> str:
    """A p-value for a reader: "< 0.001" or three decimals."""
    return f"<{NBSP}0.001" if p < 0.001 else f"{p:.3f}"


def compact(value: float) -> str:
    """A count in short: 253M, 1.32M, 4,096."""
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads well."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def number_of(n: int | None) -> str:
    """ "n = 1,319"."""
    return "n not recorded" if n is None else f"n{NBSP}={NBSP}{n:,}"


def count(n: int, what: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def listed(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def value_text(row: Any, *, with_interval: bool = True) -> str | None:
    """A row of the long table (`Comparison.table`) for a cell; None, an en dash, for what was not measured."""
    if row is None:
        return None
    return estimate(row.value, *((row.low, row.high) if with_interval else ()), **UNITS[row.unit]["value"])


def ratio(logarithm: Mapping[str, Any]) -> str:
    """A ratio that is kept as a logarithm with its interval: "1.04× [1.02, 1.05]"."""
    found = (logarithm[key] for key in ("difference", "low", "high"))
    return estimate(*bounds(math.exp, *found), decimals=3, unit="×")


FORMATS: dict[str, Callable[[Any], str]] = {
    "compact": compact,
    "difference": lambda found: estimate(found["difference"], found["low"], found["high"], decimals=4, sign=True),
    "duration": duration,
    "hash": lambda text: text[:12],
    "measured": value_text,
    "p": probability,
    "percent": percent,
    "ratio": ratio,
}
