"""The plan of the comparison (plan.toml), and its models' order, names and colours, the same in every table and figure
(display.toml)."""

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from basics import paths

PLAN, SHOWN, _CHANGED = (
    tomllib.loads(paths.PLAN.with_name(f"{name}.toml").read_text(encoding="utf-8"))
    for name in ("plan", "display", "exploratory")
)
EXPLORATORY = _CHANGED.get("exploratory", [])  # what was changed after results were seen
MODELS = SHOWN["model"]
_EXTERNAL_COLOURS = ("#CC79A7", "#000000", "#B8A700")


def ordered(models: Iterable[str]) -> list[str]:
    """The models of display.toml in its order, then others as they come."""
    present = dict.fromkeys(models)
    return [name for name in MODELS if name in present] + [name for name in present if name not in MODELS]


def is_baseline(model: str, *, trained_here: bool) -> bool:
    """Whether our stages are compared with a model: a baseline of display.toml, or any other that was trained here."""
    known = MODELS.get(model)
    return trained_here if known is None else known.get("baseline", False)


def choice(component: Mapping[str, Any], value: Any) -> str:
    """What a reader calls a configuration's value for a component of display.toml: "RMSNorm" for "rms"."""
    text = str(value).lower()
    return component.get("names", {}).get(text, text)


def name(model: str, *, trained_here: bool = False) -> str:
    """What a reader is shown. A baseline says where its weights come from."""
    shown = MODELS.get(model, {}).get("name", model)
    baseline = is_baseline(model, trained_here=trained_here)
    return f"{shown} ({'trained here' if trained_here else 'hub'})" if baseline else shown


def short(name: str) -> str:
    """A reader's name for a figure or a list: without "Threefold", and without where a baseline was trained."""
    return name.removesuffix(" (trained here)").removeprefix("Threefold ")


def marker(model: str) -> str:
    """The model's marker in figures; externals share one."""
    return MODELS.get(model, {}).get("marker", "P")


def colour(model: str, models: Iterable[str] = ()) -> str:
    """The model's colour; externals take theirs in their order among `models`."""
    if model in MODELS:
        return MODELS[model]["colour"]
    externals = [name for name in ordered(models) if name not in MODELS]
    return _EXTERNAL_COLOURS[(externals.index(model) if model in externals else 0) % len(_EXTERNAL_COLOURS)]
