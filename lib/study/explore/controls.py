"""Controls above a view: one for each of its parameters.

The view is an ordinary output of its cell that is replaced in place, not an output inside a widget: it stays in the
notebook when the notebook is closed, under papermill and without widgets.
"""

import inspect
from collections.abc import Callable
from typing import Any

import ipywidgets
from IPython.display import display

from basics.errors import ThreefoldError
from papertrail.stage import at_work
from study.explore import read, results, view
from study.explore.display import Shown, note
from study.preset import LINEAGE
from study.run import Run, run_names

REFRESH = 5_000  # milliseconds between two looks at a stage in training


class Show:
    """Show views of one run under controls.

    Args:
        run: from `open_run`.
        controls: False for plain outputs only, e.g. under papermill.
    """

    def __init__(self, run: Run, controls: bool = True):
        self.run = run
        self.widgets: dict[str, Any] = {}  # the controls of the view shown last, by parameter
        self._controls = controls

    def __call__(self, of: Callable[..., Shown], **settings: Any) -> None:
        """Show a view with these settings, and controls to change them. Raises ConfigError as the view itself."""
        shown = of(self.run, **settings)  # before the controls: a wrong name stops here
        if not self._controls:
            display(shown)
            return
        widgets = controls(self.run, of, **settings)
        self.widgets = dict(widgets)
        if of is view.losses:  # read again every few seconds while this plays, as it does by itself during a training
            playing = bool(at_work(self.run.path))
            self.widgets["refresh"] = ipywidgets.Play(max=1, repeat=True, interval=REFRESH, playing=playing)
        prompt = [widgets["prompt"]] if "prompt" in widgets else []
        row = [widget for name, widget in self.widgets.items() if name != "prompt"]
        display(ipywidgets.VBox([*prompt, ipywidgets.HBox(row, layout=ipywidgets.Layout(flex_flow="row wrap"))]))
        handle = display(shown, display_id=True)

        def update(_change: Any) -> None:
            try:
                handle.update(of(self.run, **settings | {name: widget.value for name, widget in widgets.items()}))
            except ThreefoldError as error:
                handle.update(note(str(error)))

        for widget in self.widgets.values():
            widget.observe(update, names="value")


def controls(run: Run, of: Callable[..., Shown], **settings: Any) -> dict[str, Any]:
    """A widget for each parameter of a view, at its value; a list means a choice, a tuple the ends of a slider."""
    evaluated, _ = read.evaluated(run)
    choices = of.controls | {
        **dict.fromkeys(("stage", "stages"), read.trainings(run)),
        **dict.fromkeys(("first", "second", "models"), evaluated),
        "overlay": [name for name in run_names() if name != run.name],
        "protocol": read.protocols(run),
        "layer": (0, run.preset.model.n_layer),
        "head": (0, run.preset.model.n_head),
    }
    parameters = list(inspect.signature(of).parameters.values())[1:]  # after the run
    values = {parameter.name: parameter.default for parameter in parameters} | settings
    if of is view.items and len(evaluated) > 1:
        names = ("first", "second", "protocol")
        values |= zip(names, results.opening(run, *(values[name] for name in names)), strict=True)
    widgets = {}
    for name, value in values.items():
        if name in ("stages", "models", "overlay"):
            options, named = choices[name], read.split(value) or (LINEAGE if name == "stages" else ())
            picked = [option for option in named if option in options]
            widget = ipywidgets.SelectMultiple(options=options, value=picked, rows=min(6, len(options) or 1))
        elif name == "prompt":
            widget = ipywidgets.Textarea(value=value, rows=2, layout=ipywidgets.Layout(width="95%"))
        elif name == "span":
            widget = ipywidgets.FloatRangeSlider(min=0.0, max=1.0, step=0.01, value=value, readout_format=".0%")
        else:
            widget = ipywidgets.interactive.widget_from_abbrev(choices[name], value)
            if isinstance(choices[name], tuple):
                widget.max, widget.value = max(widget.max, value), value
        if hasattr(widget, "continuous_update"):
            widget.continuous_update = False  # update when released, not while dragging or typing
        widget.description, widget.style = name.replace("_", " "), {"description_width": "initial"}
        widgets[name] = widget
    return widgets
