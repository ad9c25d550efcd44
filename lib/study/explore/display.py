"""What a view shows, as HTML and as plain text. Text of any origin is escaped here and nowhere else.

Styles are set on the elements, because JupyterLab removes style sheets from a notebook that it does not trust.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

INK, RULE, QUIET = "#1B1F24", "#D5DAE0", "#57606A"
LIKELIHOOD = LinearSegmentedColormap.from_list("likelihood", ["#F4A582", "#F7F7F7", "#92C5DE"])  # ColorBrewer's RdBu


class Html(str):
    """HTML that this package made: `table` leaves it as it is. Never for text from data or models."""


@dataclass(frozen=True)
class Shown:
    """What a view shows: its HTML in a notebook, its text elsewhere."""

    html: str = ""
    text: str = ""

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        # white in a dark JupyterLab too, since the colours of tokens have a meaning
        paper = f"color:{INK};background:#FFFFFF;padding:6px"
        return {"text/html": f'<div style="{paper}">{self.html}</div>', "text/plain": self.text}

    def __repr__(self) -> str:
        return self.text

    def __add__(self, other: "Shown") -> "Shown":
        return Shown(self.html + other.html, "\n".join(filter(None, (self.text, other.text))))


def escape(text: str) -> Html:
    """Text of any origin as literal HTML. Unprintable characters become U+FFFD; `$` and `\\` cannot start a formula."""
    printable = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
    return Html(re.sub(r"[$\\]", lambda match: f"<span>{match.group()}</span>", html.escape(printable)))


def attribute(text: str) -> str:
    """Text of any origin inside a quoted attribute, on one line."""
    return html.escape("".join(char if char.isprintable() else " " for char in text))


def block(text: str, style: str = f"color:{QUIET};margin:2px 0 6px 0;white-space:pre-line") -> Shown:
    """A paragraph."""
    return Shown(f'<div style="{style}">{escape(text)}</div>', text)


def heading(text: str) -> Shown:
    return block(text, "font-weight:600;margin:8px 0 2px 0")


def note(message: str) -> Shown:
    """A message in the place of something that is missing."""
    return block(message, f"border-left:4px solid #D55E00;padding:4px 10px;margin:4px 0;color:{INK}")


def table(rows: Sequence[Mapping[str, Any]]) -> Shown:
    """Rows under the first row's keys; a line break stays one in HTML and becomes ⏎ in the plain text."""
    if not rows:
        return Shown()
    style = "text-align:left;vertical-align:top;white-space:pre-wrap"
    cells = pd.DataFrame([{key: _cell(value) for key, value in row.items()} for row in rows])
    head = "".join(f'<th style="{style}">{escape(key)}</th>' for key in cells)
    body = "".join(
        "<tr>" + "".join(f'<td style="{style}">{text}</td>' for text in row) + "</tr>"
        for row in cells.itertuples(index=False)
    )
    plain = cells.map(lambda text: html.unescape(re.sub(r"<[^>]*>", "", text)).replace("\n", " ⏎ "))
    return Shown(
        f"<table><tr>{head}</tr>{body}</table>", plain.to_string(index=False, justify="left", max_colwidth=None)
    )


def _cell(value: Any) -> Html:
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("–")
    return escape(value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}")


def image(figure: Figure, description: str) -> Shown:
    """A figure with its description, which is also its alternative text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    picture = f'<img src="data:image/png;base64,{data}" alt="{attribute(description)}" style="max-width:100%">'
    return Shown(picture) + block(description)


def token(text: str, probability: float | None, tip: str, *, prompt: bool = False, marked: bool = False) -> Html:
    """A token on the colour of its probability; `prompt` tokens are in italics, a `marked` one has an outline."""
    style = "white-space:pre-wrap;padding:1px 0;border-radius:2px"
    style += ";font-style:italic;opacity:0.75" if prompt else ""
    style += f";background:{to_hex(LIKELIHOOD(probability))}" if probability is not None else ""
    style += f";outline:2px solid {INK}" if marked else ""
    shown = escape(text).replace("\n", "↵<br>") or "∅"
    return Html(f'<span style="{style}" title="{attribute(tip)}">{shown}</span>')


def legend() -> Shown:
    """What the colours of tokens mean."""
    steps = "".join(
        f'<span style="background:{to_hex(LIKELIHOOD(p))};padding:1px 6px">{p:.0%}</span>'
        for p in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    return Shown(
        f'<div style="color:{QUIET};font-size:12px;margin:4px 0">probability of a token given the text before it: '
        f"{steps} · the prompt in italics · hover over a token for its likely alternatives</div>"
    )
