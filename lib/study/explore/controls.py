"""Controls above a view: one for each of its parameters, where ipywidgets is installed.

The view is an ordinary output of its cell that is replaced in place, not an output inside a widget: it stays in the
notebook when the notebook is closed, under papermill and without widgets.
"""

import inspect
from collections.abc import Callable
from typing import Any

from basics.errors import ThreefoldError
from study.explore import read, view
from study.explore.display import Shown, note
from study.run import Run

try:
    import ipywidgets
except ImportError:
    ipywidgets = None


class Show:
    """Show views of one run under controls.

    Args:
        run: from `open_run`.
        controls: False for plain outputs only, e.g. under papermill.
    """

    def __init__(self, run: Run, controls: bool = True):
        self.run = run
        self.widgets: dict[str, Any] = {}  # the controls of the view shown last, by parameter
        self._controls = controls and ipywidgets is not None
        if controls and ipywidgets is None:
            print(
                "ipywidgets is not installed (`pip install ipywidgets`): change the values in a cell and run it again"
            )

    def __call__(self, of: Callable[..., Shown], **settings: Any) -> None:
        """Show a view with these settings, and controls to change them. Raises ConfigError as the view itself."""
        from IPython.display import display

        shown = of(self.run, **settings)  # before the controls: a wrong name stops here
        if not self._controls:
            display(shown)
            return
        self.widgets = widgets = controls(self.run, of, **settings)
        typed = [widget for widget in widgets.values() if isinstance(widget, ipywidgets.Textarea)]
        others = [widget for widget in widgets.values() if widget not in typed]
        row = ipywidgets.HBox(others, layout=ipywidgets.Layout(flex_flow="row wrap"))
        display(ipywidgets.VBox([*typed, row]))
        handle = display(shown, display_id=True)

        def update(_change: Any) -> None:
            try:
                handle.update(of(self.run, **settings | {name: widget.value for name, widget in widgets.items()}))
            except ThreefoldError as error:
                handle.update(note(str(error)))

        for widget in widgets.values():
            widget.observe(update, names="value")


def controls(run: Run, of: Callable[..., Shown], **settings: Any) -> dict[str, Any]:
    """A widget for each parameter of a view, at its value; a list means a choice, a tuple the ends of a slider."""
    trained, evaluated = read.trainings(run), read.evaluated(run)
    choices: dict[str, Any] = {
        "stage": trained,
        "first": evaluated,
        "second": evaluated,
        "protocol": read.protocols(run),
        "which": [view.WINS, view.LOSSES],
        "order": ["lowest", "highest"],
        "margin": list(view.MARGINS),
        "form": list(view.FORMS),
        "against": ["tokens", "step"],
        "new_tokens": (1, 128),
        "at": (1, 64),
        "count": (1, 20),
        "seed": (0, 20),
        "layer": (0, run.preset.model.n_layer),
        "head": (0, run.preset.model.n_head),
        "temperature": (0.0, 2.0, 0.1),
        "smoothing": (0.0, 0.3, 0.01),
    }
    widgets = {}
    for name, parameter in list(inspect.signature(of).parameters.items())[1:]:
        value = settings.get(name, parameter.default)
        if name in ("stages", "models"):
            options = trained if name == "stages" else evaluated
            names = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
            picked = [option for option in names or read.LINEAGE if option in options]
            widget = ipywidgets.SelectMultiple(options=options, value=picked, rows=min(6, len(options) or 1))
        elif name == "prompt":
            widget = ipywidgets.Textarea(value=value, rows=2, layout=ipywidgets.Layout(width="95%"))
        elif name == "span":
            widget = ipywidgets.FloatRangeSlider(min=0.0, max=1.0, step=0.01, value=value, readout_format=".0%")
        else:
            if name == "protocol":
                value = value or view.default_protocol(run)
            widget = ipywidgets.interactive.widget_from_abbrev(choices[name], value)
            if isinstance(choices[name], tuple):
                widget.max, widget.value = max(widget.max, value), value
        if hasattr(widget, "continuous_update"):
            widget.continuous_update = False  # update when released, not while dragging or typing
        widget.description, widget.style = name.replace("_", " "), {"description_width": "initial"}
        widgets[name] = widget
    return widgets
