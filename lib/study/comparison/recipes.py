"""How each model was made, from the records of its stages: what a difference between two models may be due to.

A facet is one line of a model's recipe as a reader sees it (plan.toml names them). It covers the stages that the model
continues or copies, so that tokens are counted where they were inherited. None: not on record, as of a model that was
trained elsewhere.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from basics import names
from study.comparison.load import Comparison
from study.comparison.models import SHOWN, choice
from study.comparison.results import compact, count

FACETS: dict[str, str] = SHOWN["facet"]  # key -> what a reader calls it
SAME_TOKENS = 0.03  # budgets that differ by less are one: documents are packed whole, so that few are exactly equal


def ancestry(comparison: Comparison, model: str) -> list[str]:
    """The trained stages that are in a model's weights, first to last, its own included; none of what was trained
    elsewhere."""
    facts = comparison.stage(model)
    if not facts.get("tokens"):
        return []
    parents = (facts.get("fingerprint") or {}).get("parents") or ()
    found = [stage for name in parents for stage in ancestry(comparison, names.replicate_of(name)[0])]
    return [*found, model]


def config(comparison: Comparison, stage: str) -> Mapping[str, Any]:
    """The configuration in a stage's fingerprint."""
    return (comparison.stage(stage).get("fingerprint") or {}).get("config") or {}


def sources(comparison: Comparison, *stages: str) -> set[str]:
    """Names of the sources that stages trained on; of own data that of the file or folder."""
    parts = [item for stage in stages for item in (config(comparison, stage).get("data") or {}).items()]
    entries = [entry for part, found in parts if not part.endswith("heldout") for entry in found]
    return {entry.get("source") or PurePath(entry["path"]).name for entry in entries}


def tokens(comparison: Comparison, model: str) -> list[int]:
    """Tokens trained on, a number a stage in the model's weights."""
    return [int(comparison.stage(stage)["tokens"]) for stage in ancestry(comparison, model)]


def recipe(comparison: Comparison, model: str) -> dict[str, str | None]:
    """A model's facets."""
    stages = ancestry(comparison, model)
    facts = [comparison.stage(stage) for stage in stages]
    sections = [config(comparison, stage).get(stage.replace("-", "_")) for stage in stages]  # as the preset has them
    settings = [one.get("recipe") or section or {} for one, section in zip(facts, sections, strict=True)]
    budget = tokens(comparison, model)
    inherited = f" ({compact(sum(budget[:-1]))} inherited)" if budget[1:] else ""
    found = {
        "architecture": design(comparison.model(model).get("config") or {}),
        "optimizer": _chain(SHOWN["optimizer"].get(one.get("optimizer"), one.get("optimizer")) for one in settings),
        "learning_rate": _chain(map(_rate, settings)),
        "chosen": _chain(map(_chosen, settings)),
        "tokens": f"{compact(sum(budget))}{inherited}" if budget else None,
        "data": ", ".join(sorted(sources(comparison, *stages))) or None,
        "precision": _chain(map(_precision, facts)),
        "hardware": _chain(map(_hardware, facts)),
    }
    return found if model != "random" else found | dict.fromkeys(set(FACETS) - {"architecture"}, "untrained")


def apart(comparison: Comparison, a: str, b: str) -> list[str]:
    """Keys of the facets in which two models differ as far as is known. None for a stage and one that continues it:
    what differs there is the stage."""
    lines = ancestry(comparison, a), ancestry(comparison, b)
    if a in lines[1] or b in lines[0] or "random" in (a, b):
        return []
    one, other = recipe(comparison, a), recipe(comparison, b)
    budgets = sum(tokens(comparison, a)), sum(tokens(comparison, b))
    if min(budgets) > (1 - SAME_TOKENS) * max(budgets):
        one["tokens"] = other["tokens"]
    return [key for key in FACETS if None not in (one[key], other[key]) and one[key] != other[key]]


def design(config: Mapping[str, Any]) -> str | None:
    """ "4 layers × 128, feed-forward 344; RMSNorm, SwiGLU, rotary (RoPE), 1 sink": shape and components."""
    if not config:
        return None
    shown = [one for one in SHOWN["component"] if one["key"] in ("norm", "ffn", "position") and one["key"] in config]
    named = [choice(one, config[one["key"]]) for one in shown]
    extras = [count(config["sinks"], "sink")] if config.get("sinks") else []
    extras += [word for key, word in SHOWN["extra"].items() if config.get(key)]
    layers, width, inner = (config.get(key, 0) for key in ("n_layer", "d_model", "d_ff"))
    return f"{count(layers, 'layer')} × {width}, feed-forward {inner}; {', '.join(named + extras)}"


def _chain(texts: Iterable[str | None]) -> str | None:
    """The texts of the stages in their order, each once; None where one is not on record."""
    found = list(dict.fromkeys(texts))
    return None if None in found or not found else " → ".join(found)


def _rate(settings: Mapping[str, Any]) -> str | None:
    if "learning_rate" not in settings:
        return None
    hidden = f" (hidden matrices {settings['muon_learning_rate']:g})" if settings.get("optimizer") == "muon" else ""
    return f"{settings['learning_rate']:g}{hidden}"


def _chosen(settings: Mapping[str, Any]) -> str | None:
    """How the learning rate came about."""
    if tuning := settings.get("tuning"):
        edge = ", at the edge of the grid" if tuning["edge"] else ""
        return f"best of {count(tuning['trials'], 'trial')}, held-out loss{edge}"
    return "set in the preset" if settings else None


def _precision(facts: Mapping[str, Any]) -> str | None:
    """The number format that the training's note names: device; precision; compiler."""
    parts = re.split("[;,(] ?", str((facts.get("training") or {}).get("note") or ""))
    return next((part.strip() for part in parts if part.startswith(("bf16", "fp32"))), None)


def _hardware(facts: Mapping[str, Any]) -> str | None:
    hardware = facts.get("hardware") or {}
    return ", ".join(hardware.get("gpu") or []) or hardware.get("cpu")
