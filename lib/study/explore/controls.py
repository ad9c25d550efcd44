"""Controls above a view: one for each of its parameters, where ipywidgets is installed. They only call the view again.

What the view shows is an ordinary output of its cell that is replaced in place, not one inside a widget: it stays in
the notebook when that is closed, under papermill and without widgets.
"""

import inspect
from collections.abc import Callable
from typing import Any

from basics.errors import ThreefoldError
from papertrail.run import Run
from study.explore import page, reading, view
from study.explore.page import Shown

MISSING = "ipywidgets is not installed (`pip install ipywidgets`): change the values in a cell and run it again"


class Show:
    """Shows views of one run under controls.

    controls: False for plain outputs only, as for a notebook that nobody sits at.
    """

    def __init__(self, run: Run, controls: bool = True):
        self.run = run
        self.widgets: dict[str, Any] = {}  # the controls of the view shown last, by parameter
        self._ipywidgets = _ipywidgets() if controls else None
        if controls and self._ipywidgets is None:
            print(MISSING)

    def __call__(self, of: Callable[..., Shown], **settings: Any) -> None:
        """Show a view with these settings, and controls to change them. Raises ConfigError as the view itself."""
        from IPython.display import display

        shown = of(self.run, **settings)  # before the controls: a wrong name stops here
        if self._ipywidgets is None:
            display(shown)
            return
        defaults = {name: one.default for name, one in list(inspect.signature(of).parameters.items())[1:]}
        values = defaults | settings
        self.widgets = widgets = _controls(self._ipywidgets, self.run, values)
        display(self._ipywidgets.VBox(_rows(self._ipywidgets, widgets)))
        handle = display(shown, display_id=True)

        def again(_change: Any) -> None:
            try:
                found = of(self.run, **(values | {name: widget.value for name, widget in widgets.items()}))
            except ThreefoldError as error:
                found = page.note(str(error))
            handle.update(found)

        for widget in widgets.values():
            widget.observe(again, names="value")


def _ipywidgets() -> Any:
    try:
        import ipywidgets
    except ImportError:
        return None
    return ipywidgets


def _rows(w: Any, widgets: dict[str, Any]) -> list[Any]:
    """What is typed has a row of its own; the rest flows."""
    wide = [widget for widget in widgets.values() if isinstance(widget, w.Textarea)]
    rest = [widget for widget in widgets.values() if widget not in wide]
    return [*wide, w.HBox(rest, layout=w.Layout(flex_flow="row wrap"))]


def _controls(w: Any, run: Run, values: dict[str, Any]) -> dict[str, Any]:
    """A widget for each parameter that has a kind of control, set to its value."""
    trained, evaluated = reading.trainings(run), reading.evaluated(run)
    late = {"continuous_update": False}  # when let go, not while dragging or typing
    style = {"description_width": "initial"}

    def several(options: list[str], value: Any) -> Any:
        named = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
        picked = [name for name in named if name in options]
        return w.SelectMultiple(options=options, value=picked, rows=min(6, len(options) or 1))

    def one_of(options: list[str], value: str) -> Any:
        return w.Dropdown(options=options, value=value if value in options else next(iter(options), None))

    def whole(low: int, high: int, value: int) -> Any:
        return w.IntSlider(min=low, max=max(high, value), value=value, **late)

    kinds: dict[str, Callable[[Any], Any]] = {
        "stages": lambda v: several(trained, v or reading.LINEAGE),
        "models": lambda v: several(evaluated, v),
        "stage": lambda v: one_of(trained, v),
        "first": lambda v: one_of(evaluated, v),
        "second": lambda v: one_of(evaluated, v),
        "protocol": lambda v: one_of(reading.scored(run), v or view.default_protocol(run)),
        "which": lambda v: one_of([view.WINS, view.LOSSES], v),
        "order": lambda v: one_of(["lowest", "highest"], v),
        "margin": lambda v: one_of(list(view.MARGINS), v),
        "form": lambda v: one_of(list(view.FORMS), v),
        "against": lambda v: one_of(["tokens", "step"], v),
        "prompt": lambda v: w.Textarea(value=v, rows=2, layout=w.Layout(width="95%"), **late),
        "new_tokens": lambda v: whole(1, 128, v),
        "at": lambda v: whole(1, 64, v),
        "count": lambda v: whole(1, 20, v),
        "seed": lambda v: whole(0, 20, v),
        "layer": lambda v: whole(0, run.preset.model.n_layer, v),
        "head": lambda v: whole(0, run.preset.model.n_head, v),
        "temperature": lambda v: w.FloatSlider(min=0.0, max=2.0, step=0.1, value=v, **late),
        "smoothing": lambda v: w.FloatSlider(min=0.0, max=0.3, step=0.01, value=v, **late),
        "span": lambda v: w.FloatRangeSlider(min=0.0, max=1.0, step=0.01, value=v, readout_format=".0%", **late),
    }
    made = {name: kinds[name](value) for name, value in values.items() if name in kinds}
    for name, widget in made.items():
        widget.description = name.replace("_", " ")
        widget.style = style
    return made
