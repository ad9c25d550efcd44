"""What a notebook cell shows: one record with its Markdown or figure."""

from dataclasses import dataclass
from typing import Any

from papertrail import records


@dataclass(frozen=True)
class Result:
    """One publishable result. `publish()` is the last line of its notebook cell."""

    name: str  # of the record
    values: dict[str, Any]
    markdown: str | None = None
    figure: Any = None
    text: str | None = None  # alternative text of a figure

    def publish(self) -> None:
        """Display it with its values attached (`records.publish`)."""
        records.publish(self.name, self.values, markdown=self.markdown, figure=self.figure, text=self.text)


NBSP = "\u00a0"  # no-break space

# Numbers for prose and cells -----------------------------------------------------------------------------------------


def percent(value: float, decimals: int = 1) -> str:
    """0.875 -> "87.5%"; zero is "0.0%"."""
    return f"{_zero(100 * value, decimals):.{decimals}f}%"


def signed(value: float, decimals: int = 2, unit: str = "") -> str:
    """With its sign, a true minus; zero has none."""
    value = _zero(value, decimals)
    sign = "+" if value > 0 else "−" if value < 0 else ""
    return f"{sign}{abs(value):,.{decimals}f}{unit}"


def plain(value: float, decimals: int = 2) -> str:
    """Thousands separated, a true minus."""
    value = _zero(value, decimals)
    return f"{'−' if value < 0 else ''}{abs(value):,.{decimals}f}"


def interval(value: str, low: str | None, high: str | None) -> str:
    """`value [low, high]`; the value alone when there is no interval. A line may break before the bracket only."""
    return value if low is None or high is None else f"{value} [{low},{NBSP}{high}]"


def probability(p: float) -> str:
    """A p-value for a reader: "< 0.001" or three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


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
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def listed(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def _zero(value: float, decimals: int) -> float:
    """A value that rounds to nothing is nothing, not minus nothing."""
    return 0.0 if round(value, decimals) == 0 else value
