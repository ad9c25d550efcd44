"""What a view shows, as HTML and as plain text. Text of any origin is escaped here and nowhere else.

Styles stand in the elements, because JupyterLab takes style sheets out of a notebook that it does not trust.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

INK, RULE, QUIET = "#1B1F24", "#D5DAE0", "#57606A"
UNLIKELY, EVEN, LIKELY = (244, 165, 130), (247, 247, 247), (146, 197, 222)  # of ColorBrewer's RdBu: safe for all eyes
DPI = 110
_MATHS = re.compile(r"[$\\]")  # where MathJax would begin to typeset


class Html(str):
    """HTML that this package made: `cell` leaves it as it is. Never for text from data or models."""


@dataclass(frozen=True)
class Shown:
    """What a view shows: in a notebook its HTML, elsewhere its text."""

    html: str
    text: str

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        paper = f"color:{INK};background:#FFFFFF;padding:6px"  # in a dark JupyterLab too: the colours mean something
        return {"text/html": f'<div style="{paper}">{self.html}</div>', "text/plain": self.text}

    def __repr__(self) -> str:
        return self.text

    def __add__(self, other: "Shown") -> "Shown":
        return Shown(self.html + other.html, f"{self.text}\n{other.text}")


def escape(text: str) -> Html:
    """Text of any origin as literal HTML. What cannot be seen is shown as U+FFFD; no maths begins at $ or \\."""
    seen = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
    return Html(_MATHS.sub(lambda found: f"<span>{found.group()}</span>", html.escape(seen)))


def attribute(text: str) -> str:
    """Text of any origin inside a quoted attribute, on one line."""
    return html.escape("".join(char if char.isprintable() else " " for char in text))


def cell(value: Any) -> Html:
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("–")
    return escape(value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}")


def note(message: str) -> Shown:
    """A message where something is missing."""
    style = f"border-left:4px solid #D55E00;padding:4px 10px;margin:4px 0;color:{INK}"
    return Shown(f'<div style="{style}">{escape(message)}</div>', message)


def heading(text: str) -> Html:
    return Html(f'<div style="font-weight:600;margin:8px 0 2px 0">{escape(text)}</div>')


def prose(text: str) -> Html:
    return Html(f'<div style="color:{QUIET};margin:2px 0 6px 0;white-space:pre-line">{escape(text)}</div>')


def table(rows: Iterable[Mapping[str, Any]], *, widths: Sequence[str] = ()) -> Html:
    """Rows under the first row's keys; line breaks in a text are kept."""
    rows = list(rows)
    if not rows:
        return Html("")
    style = f"text-align:left;vertical-align:top;padding:3px 10px 3px 0;border-bottom:1px solid {RULE};color:{INK}"
    sizes = [f";width:{width}" for width in widths] or [""] * len(rows[0])
    head = "".join(f'<th style="{style}{size}">{escape(key)}</th>' for key, size in zip(rows[0], sizes, strict=True))
    body = "".join(
        '<tr style="background:#FFFFFF">'
        + "".join(f'<td style="{style};white-space:pre-wrap">{cell(value)}</td>' for value in row.values())
        + "</tr>"
        for row in rows
    )
    return Html(
        f'<table style="border-collapse:collapse;font-size:13px;margin:0"><thead><tr style="background:#FFFFFF">{head}'
        f"</tr></thead><tbody>{body}</tbody></table>"
    )


def plain_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The same rows for a terminal, one line each; a line break is shown as ⏎."""
    rows = [{key: _one_line(value) for key, value in row.items()} for row in rows]
    if not rows:
        return ""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = [{key: key for key in rows[0]}, *rows]
    return "\n".join("  ".join(line[key].ljust(widths[key]) for key in widths).rstrip() for line in lines)


def _one_line(value: Any) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", cell(value))).replace("\n", " ⏎ ")


def image(figure: Figure, alternative: str) -> Html:
    """A figure as a picture inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return Html(f'<img src="data:image/png;base64,{data}" alt="{attribute(alternative)}" style="max-width:100%">')


# Tokens -------------------------------------------------------------------------------------------------------------


def colour(probability: float) -> str:
    """A background from orange (0) over white (1/2) to blue (1)."""
    ends = (UNLIKELY, EVEN) if probability < 0.5 else (EVEN, LIKELY)
    share = 2 * probability if probability < 0.5 else 2 * probability - 1
    mixed = (round(low + (high - low) * share) for low, high in zip(*ends, strict=True))
    return "#" + "".join(f"{part:02X}" for part in mixed)


def token(text: str, probability: float | None, tip: str, *, given: bool = False, marked: bool = False) -> Html:
    """A token on its probability's colour; given: of the prompt; marked: the one whose alternatives are listed."""
    style = "white-space:pre-wrap;padding:1px 0;border-radius:2px" + (
        ";font-style:italic;opacity:0.75" if given else ""
    )
    style += f";background:{colour(probability)}" if probability is not None else ""
    style += f";outline:2px solid {INK}" if marked else ""
    shown = escape(text).replace("\n", "↵<br>") or "∅"
    return Html(f'<span style="{style}" title="{attribute(tip)}">{shown}</span>')


def legend() -> Html:
    """What the colours mean."""
    steps = "".join(
        f'<span style="background:{colour(p)};padding:1px 6px">{p:.0%}</span>' for p in (0, 0.25, 0.5, 0.75, 1)
    )
    return Html(
        f'<div style="color:{QUIET};font-size:12px;margin:4px 0">probability of a token given what stands before it: '
        f"{steps} · the prompt in italics · hover over a token for what else was likely</div>"
    )
