"""How much attention rests on the sinks, by layer and head: the record `attention/sinks` in words."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from study.comparison.ablations import BASE
from study.comparison.load import Comparison
from study.comparison.results import percent

RECORD = "attention/sinks"


def title(values: Mapping[str, Any]) -> str:
    """ "4 sinks", "1 sink", "no sink: first token"."""
    count = values["sinks"]
    return f"{count} sink{'' if count == 1 else 's'}" if count else "no sink: first token"


def found(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """The shares that a run's records hold, by variant."""
    return (comparison.values(RECORD) or {}).get("variants", {})


def variables(comparison: Comparison) -> dict[str, str]:
    """What the report's sentence quotes: mean, largest and uniform share of the base, and the others' means."""
    variants = found(comparison)
    said = dict.fromkeys(
        (f"sink_share_{name}" for name in ("base", "least", "most", "uniform", "four", "none")), "not measured"
    )
    for key, name in (("base", BASE), ("four", "sinks=4"), ("none", "sinks=0")):
        if name in variants:
            said[f"sink_share_{key}"] = percent(float(np.mean(variants[name]["share"])), 0)
    if BASE in variants:
        share_LH = np.asarray(variants[BASE]["share"])
        said["sink_share_least"], said["sink_share_most"] = (
            percent(float(x), 0) for x in (share_LH.min(), share_LH.max())
        )
        said["sink_share_uniform"] = percent(variants[BASE]["uniform"], 1)
    return said
