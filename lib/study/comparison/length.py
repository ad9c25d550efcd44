"""Loss past the training length: what each way of reading costs there, and how much attention the sinks get.

Curves are the values of the records `length/<variant>` (`evaluation.length.by_position`), by variant: mean nats per
token of each stream in buckets of position, for each mode and seed. Seeds and streams are both samples; intervals are
`statistics.crossed_mean`'s. Shares of attention are the variants of the record `attention/sinks`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from study.comparison.ablations import BASE
from study.comparison.load import Comparison
from study.comparison.models import SHOWN
from study.comparison.results import count, estimate
from threefold.evaluation.results import RECOMPUTED
from threefold.evaluation.statistics import Interval, crossed_mean

Curves = Mapping[str, Mapping[str, Any]]  # variant -> values of its record

MODES = {key: mode["name"] for key, mode in SHOWN["mode"].items()}
POSITIONS = {"rope": "RoPE", "learned": "learned positions", "none": "no positions"}
LEARNED = "position=learned"


def found(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """The curves that a run's records hold, the base's first."""
    curves = {name: values for name, values in comparison.by_variant("length").items() if "nats" in values}
    return {name: curves[name] for name in sorted(curves, key=lambda name: name != BASE)}


def title(values: Mapping[str, Any]) -> str:
    """ "RoPE, 1 sink": what a variant is among these curves."""
    return f"{POSITIONS[values['position']]}, {count(values['sinks'], 'sink') if values['sinks'] else 'no sinks'}"


def present(values: Mapping[str, Any]) -> list[str]:
    """The modes of a variant in their fixed order."""
    return [mode for mode in MODES if mode in values["nats"]]


def mean_nats(
    values: Mapping[str, Any], mode: str, low: float, high: float, seeds: list[str] | None = None
) -> np.ndarray | None:
    """Mean nats per token in positions from `low` to `high` contexts, [seeds, streams]; None where the mode has none
    there. `low` and `high`: edges of buckets. seeds: those to take, all by default."""
    marks, by_seed = np.asarray(values["edges"]), values["nats"].get(mode, {})
    nats_SNB = np.asarray([by_seed[seed] for seed in sorted(by_seed, key=int) if seeds is None or seed in seeds])
    first, last = (round(edge * values["context"]) for edge in (low, high))
    if nats_SNB.size == 0 or marks[nats_SNB.shape[2]] < last:
        return None
    chosen = np.flatnonzero((marks[:-1] >= first) & (marks[1:] <= last))
    return np.average(nats_SNB[:, :, chosen], axis=2, weights=np.diff(marks)[chosen])


def rise(values: Mapping[str, Any], mode: str, seeds: list[str] | None = None) -> np.ndarray | None:
    """Nats per token past the training length less those within it, [seeds, streams].

    Within: the second half of the context, where a token has as much before it as in the scored half of a window.
    """
    past, within = mean_nats(values, mode, 1, values["factor"], seeds), mean_nats(values, mode, 0.5, 1, seeds)
    return None if past is None or within is None else past - within


def in_nats(change_SN: np.ndarray) -> str:
    """The mean of a change over seeds and streams with its interval, "+0.120 nats [+0.080, +0.160]"."""
    return estimate(*crossed_mean(change_SN)[:3], decimals=3, unit=" nats", sign=True)


# The claims ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """A difference in nats per token, from seeds x streams."""

    values_SN: np.ndarray
    what: str

    @property
    def interval(self) -> Interval:
        return crossed_mean(self.values_SN)

    @property
    def basis(self) -> str:
        """ "3 seeds × 8 streams"."""
        seeds, streams = self.values_SN.shape
        return f"{count(seeds, 'seed')} × {count(streams, 'stream')}"

    @property
    def text(self) -> str:
        """ "+0.120 nats [+0.080, +0.160], what"."""
        return f"{in_nats(self.values_SN)}, {self.what}"


def rope(curves: Curves) -> Effect | None:
    """What positions past the training length cost RoPE, less what they cost learned positions: base against variant.

    Past its table a learned model predicts nothing; it can only read windows, each with positions from 0. The
    effect is the rise of RoPE's loss past the training length under full attention, less the rise of the learned
    model's in recomputed windows: same seeds, same streams. Differences of two rises leave out how good the two models
    are within their training length. None without both curves.
    """
    base, learned = curves.get(BASE), curves.get(LEARNED)
    if base is None or learned is None or base["position"] != "rope":
        return None
    both = sorted(set(base["nats"]["full"]) & set(learned["nats"].get(RECOMPUTED, ())), key=int)
    if not both:
        return None
    return Effect(
        rise(base, "full", both) - rise(learned, RECOMPUTED, both),
        "rise of the loss past the training length: RoPE under full attention less learned positions in recomputed "
        "windows (past their table they predict nothing)",
    )


def sinks(curves: Curves) -> Effect | None:
    """Loss of the base past the training length with sinks + window less that with the window alone, on the same
    seeds and streams. None without the base's curve in both modes."""
    base = curves.get(BASE, {"nats": {}})
    if not {"sinks", "window"} <= set(base["nats"]):
        return None
    with_sinks, without = (mean_nats(base, mode, 1, base["factor"]) for mode in ("sinks", "window"))
    return Effect(with_sinks - without, "loss past the training length: sinks + window less the window alone")


# For the report ------------------------------------------------------------------------------------------------------


def octaves(factor: int) -> list[tuple[float, float]]:
    """(1, 2), (2, 4), ... in contexts, the last one up to `factor`."""
    starts = [2**power for power in range((factor - 1).bit_length())]
    return [(start, min(2 * start, factor)) for start in starts]


def attention(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """The sinks' shares of attention by layer and head that a run's records hold, by variant."""
    return comparison.values("attention/sinks").get("variants", {})


def variables(comparison: Comparison) -> dict[str, str | None]:
    """What the report's sentences on length quote; None for what was not measured."""
    base, effect = found(comparison).get(BASE, {"nats": {}}), sinks(found(comparison))
    values = {f"length_{key}": str(base.get(key, "")) or None for key in ("factor", "context")}
    measured = {f"rise_{mode}": rise(base, mode) if mode in base["nats"] else None for mode in ("full", "window")}
    for key, nats_SN in (measured | {"sinks": effect and effect.values_SN}).items():
        values[f"length_{key}"] = None if nats_SN is None else in_nats(nats_SN)
    return values
