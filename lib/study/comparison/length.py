"""Loss past the training length: what each way of reading on costs, and the two claims about it.

Curves are the values of the records `length/<variant>` (`evaluation.length.by_position`), by variant: mean nats per
token of each stream in buckets of position, for each mode and seed. Seeds and streams are both samples; intervals are
`statistics.crossed_mean`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from study.comparison.ablations import BASE
from study.comparison.load import Comparison
from study.comparison.results import interval, signed
from threefold.evaluation.statistics import Interval, crossed_mean

Curves = Mapping[str, Mapping[str, Any]]  # variant -> values of its record

MODES = {
    "full": "full attention",
    "window": "window alone",
    "sinks": "sinks + window",
    "anew": "recomputed windows",
}
POSITIONS = {"rope": "RoPE", "learned": "learned positions", "none": "no positions"}
LEARNED = "position=learned"


def found(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """The curves that a run's records hold, the base's first."""
    curves = {
        str(record.values["variant"]): record.values
        for name, record in comparison.records.items()
        if name.startswith("length/") and "nats" in record.values
    }
    return {name: curves[name] for name in sorted(curves, key=lambda one: one != BASE)}


def title(values: Mapping[str, Any]) -> str:
    """ "RoPE, 1 sink": what a variant is among these curves."""
    sinks = values["sinks"]
    return f"{POSITIONS[values['position']]}, {sinks or 'no'} sink{'' if sinks == 1 else 's'}"


def present(values: Mapping[str, Any]) -> list[str]:
    """The modes of a variant in their fixed order."""
    return [mode for mode in MODES if mode in values["nats"]]


def mean_nats(values: Mapping[str, Any], mode: str, low: float, high: float) -> np.ndarray | None:
    """Mean nats per token in positions from `low` to `high` contexts, [seeds, streams]; None where the mode has none
    there. `low` and `high`: edges of buckets."""
    marks = np.asarray(values["edges"])
    nats_SNB = np.asarray([values["nats"][mode][seed] for seed in sorted(values["nats"].get(mode, {}), key=int)])
    first, last = (round(edge * values["context"]) for edge in (low, high))
    if nats_SNB.size == 0 or marks[nats_SNB.shape[2]] < last:
        return None
    chosen = np.flatnonzero((marks[:-1] >= first) & (marks[1:] <= last))
    return np.average(nats_SNB[:, :, chosen], axis=2, weights=np.diff(marks)[chosen])


def rise(values: Mapping[str, Any], mode: str) -> np.ndarray | None:
    """Nats per token past the training length less those within it, [seeds, streams].

    Within: the second half of the context, where a token has as much before it as in the scored half of a window.
    """
    past, within = mean_nats(values, mode, 1, values["factor"]), mean_nats(values, mode, 0.5, 1)
    return None if past is None or within is None else past - within


# The claims ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """A difference in nats per token, from seeds x streams."""

    interval: Interval
    seeds: int
    streams: int
    what: str

    @classmethod
    def of(cls, values_SN: np.ndarray, what: str) -> "Effect":
        return cls(crossed_mean(values_SN), *values_SN.shape, what)

    @property
    def text(self) -> str:
        """ "+0.120 nats [+0.080, +0.160], what; 3 seeds × 8 streams"."""
        seeds, streams = (
            f"{n} {one}{'' if n == 1 else 's'}" for n, one in ((self.seeds, "seed"), (self.streams, "stream"))
        )
        return f"{self.short}, {self.what}; {seeds} × {streams}"

    @property
    def short(self) -> str:
        return in_nats(self.interval)


def rope(curves: Curves) -> Effect | None:
    """What extrapolating costs RoPE against what going on costs learned positions, the base against its variant.

    Past its table a learned model predicts nothing: it can only read on in windows, with positions from 0 again. The
    effect is the rise of RoPE's loss past the training length under full attention, less the rise of the learned
    model's in recomputed windows: same seeds, same streams. Differences of two rises leave out how good the two models
    are within their training length. None without both curves.
    """
    one, other = curves.get(BASE), curves.get(LEARNED)
    if one is None or other is None or one["position"] != "rope":
        return None
    both = sorted(set(one["nats"]["full"]) & set(other["nats"]["anew"]), key=int)
    if not both:
        return None
    rises = [rise(_of_seeds(values, both), mode) for values, mode in ((one, "full"), (other, "anew"))]
    return Effect.of(
        rises[0] - rises[1],
        "rise of the loss past the training length: RoPE under full attention less learned positions in windows read "
        "anew (past their table they predict nothing)",
    )


def sinks(curves: Curves) -> Effect | None:
    """Loss of the base past the training length with sinks + window less that with the window alone, on the same
    seeds and streams. None without the base's curve in both modes."""
    values = curves.get(BASE, {"nats": {}})
    if not {"sinks", "window"} <= set(values["nats"]):
        return None
    with_sinks, without = (mean_nats(values, mode, 1, values["factor"]) for mode in ("sinks", "window"))
    return Effect.of(with_sinks - without, "loss past the training length: sinks + window less the window alone")


def _of_seeds(values: Mapping[str, Any], seeds: list[str]) -> dict[str, Any]:
    nats = {mode: {seed: by_seed[seed] for seed in seeds} for mode, by_seed in values["nats"].items()}
    return {**values, "nats": nats}


def in_nats(effect: Interval) -> str:
    bounds = [None if bound is None else signed(bound, 3) for bound in (effect.low, effect.high)]
    return f"{interval(signed(effect.value, 3, ' nats'), *bounds)}"


# For the report ------------------------------------------------------------------------------------------------------


def octaves(factor: int) -> list[tuple[float, float]]:
    """(1, 2), (2, 4), ... in contexts, the last one up to `factor`."""
    starts = [2**power for power in range((factor - 1).bit_length())]
    return [(start, min(2 * start, factor)) for start in starts]


def variables(comparison: Comparison) -> dict[str, str]:
    """What the report's sentences on length quote."""
    curves = found(comparison)
    base = curves.get(BASE, {"nats": {}})
    values = {
        "length_factor": str(base.get("factor", "–")),
        "length_context": str(base.get("context", "–")),
        "length_streams": str(base.get("streams", "–")),
    }
    for mode in MODES:
        effect = rise(base, mode) if mode in base["nats"] else None
        values[f"length_rise_{mode}"] = "not measured" if effect is None else in_nats(crossed_mean(effect))
    for claim, effect in (("rope", rope(curves)), ("sinks", sinks(curves))):
        values[f"length_{claim}"] = effect.short if effect else "not measured"
    return values
