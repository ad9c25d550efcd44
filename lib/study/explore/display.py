"""What a view shows, as HTML and as plain text. Text of any origin is escaped here and nowhere else.

Styles are set on the elements, because JupyterLab removes style sheets from a notebook that it does not trust.
"""

import functools
import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import pandas as pd
from IPython.core.pylabtools import print_figure
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from basics.errors import ConfigError, ThreefoldError

INK, RULE, QUIET = "#1B1F24", "#D5DAE0", "#57606A"


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


def panel(**controls: list | tuple) -> Callable[[Callable[..., Shown]], Callable[..., Shown]]:
    """Decorator of a view. What is missing or unreadable becomes a note in its place; a ConfigError stays an error.

    controls: for keyword parameters of the view, as ipywidgets abbreviates controls: a list of the allowed values
    (others raise ConfigError), or a tuple with the ends of a slider, and its step.
    """

    def decorate(function: Callable[..., Shown]) -> Callable[..., Shown]:
        @functools.wraps(function)
        def view(*arguments: Any, **settings: Any) -> Shown:
            for name, value in settings.items():
                allowed = controls.get(name)
                if isinstance(allowed, list) and value not in allowed:
                    raise ConfigError(f"{name} = {value!r}: allowed are {', '.join(allowed)}")
            try:
                return function(*arguments, **settings)
            except ConfigError:
                raise
            except ThreefoldError as error:
                return note(str(error))

        view.controls = controls
        return view

    return decorate


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


def notes(messages: Iterable[str]) -> Shown:
    return sum(map(note, messages), Shown())


def table(rows: Sequence[Mapping[str, Any]]) -> Shown:
    """Rows under their keys; a line break stays one in HTML and becomes ⏎ in the plain text."""
    if not rows:
        return Shown()
    style = ' style="text-align:left;vertical-align:top;white-space:pre-wrap"'
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    lines = [[f"<th{style}>{escape(key)}</th>" for key in keys]]
    lines += [[f"<td{style}>{cell}</td>" for cell in row] for row in cells]
    page = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    plain = pd.DataFrame(cells, columns=keys)
    plain = plain.map(lambda cell: html.unescape(re.sub(r"<[^>]*>", "", cell)).replace("\n", " ⏎ "))
    return Shown(f"<table>{page}</table>", plain.to_string(index=False, justify="left", max_colwidth=None))


def _cell(value: Any) -> Html:
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("–")
    return escape(value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}")


def finish(axes: Axes) -> None:
    """The look of a diagram: a legend, quiet labels, horizontal lines behind the data."""
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=QUIET, labelsize=8)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def image(figure: Figure, description: str) -> Shown:
    """A figure with its description, which is also its alternative text."""
    data = print_figure(figure, base64=True, dpi=110, metadata={"Software": None})
    picture = f'<img src="data:image/png;base64,{data}" alt="{attribute(description)}" style="max-width:100%">'
    return Shown(picture) + block(description)


def token(text: str, probability: float | None, tip: str, *, prompt: bool = False, marked: bool = False) -> Html:
    """A token on the colour of its probability; `prompt` tokens are in italics, a `marked` one has an outline."""
    style = "white-space:pre-wrap;padding:1px 0;border-radius:2px"
    style += ";font-style:italic;opacity:0.75" if prompt else ""
    if probability is not None:  # red: improbable; blue: probable
        style += f";background:{to_hex(matplotlib.colormaps['RdBu'](0.25 + 0.5 * probability))}"
    style += f";outline:2px solid {INK}" if marked else ""
    shown = escape(text).replace("\n", "↵<br>") or "∅"
    return Html(f'<span style="{style}" title="{attribute(tip)}">{shown}</span>')
