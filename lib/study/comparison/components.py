"""Tables of notebook 05's records: components replaced one by one, kernels alone, loss past the training length."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from study.comparison import ablations, length
from study.comparison.ablations import Variants
from study.comparison.differences import ALPHA
from study.comparison.results import NBSP, Result, plain, ratio, say, signed, table
from threefold.evaluation.statistics import paired_median

SIZES = {"preset": "preset’s size", "ablation": "ablations’ size"}


def ablation_effects(variants: Variants) -> Result:
    """Every variant against the base: parameters, held-out loss, tokens to equal loss, step time."""
    found = {one["variant"]: one for one in ablations.contrasts(variants)}

    def fields(name: str) -> dict[str, Any]:
        values, one = variants[name], found.get(name)
        share, losses = values["parameters"] / variants[ablations.BASE]["parameters"] - 1, values["heldout_loss"]
        spread = f"{NBSP}±{NBSP}{plain(statistics.stdev(losses), 4)}" if len(losses) > 1 else ""
        return {
            "title": ablations.title(name),
            "one": one,
            "size": f"{values['parameters']:,}" + (f" ({signed(100 * share, 2, '%')})" if one else ""),
            "loss": f"{plain(statistics.fmean(losses), 4)}{spread}",
            "tokens": one and (ratio(one["log_tokens"]) if one["log_tokens"] else "before the first point"),
        }

    return table("ablations", map(fields, variants), contrasts=list(found.values()))


def ablation_resolution(variants: Variants) -> Result:
    """Which effects the ablations resolve, in words."""
    found = ablations.contrasts(variants)
    if not found:
        return Result("comparison/ablation-resolution", {}, markdown="No ablation was trained in this run.", empty=True)
    seeds, rounds = found[0]["loss"]["n"], len(next(iter(variants[ablations.BASE]["step_seconds"].values())))
    half = ablations.half_width([one["loss"] for one in found])
    detected = [one["variant"] for one in found if ablations.detected(one)]
    timed = [one["log_step_seconds"]["preset"] for one in found if "preset" in one["log_step_seconds"]]
    reach = "One seed gives no interval: no difference in loss is resolved."
    text = say(
        "ablations",
        reach=reach if half is None else say("ablations-reach", seeds=seeds, half=half),
        every=len(found),
        detected=len(detected),
        named=f" ({'; '.join(map(ablations.title, detected))})" if detected else "",
        slower=sum(test["p_adjusted"] < ALPHA for test in timed),
        rounds=rounds,
    )
    values = {"seeds": seeds, "rounds": rounds, "half_width": half, "detected": detected}
    return Result("comparison/ablation-resolution", values, markdown=text)


def kernels(timings: Sequence[Mapping[str, Any]]) -> Result:
    """Components alone, forward and backward, each pair interleaved (`training.KernelTiming` as dictionaries)."""
    found = []
    for timing in timings:
        first, *_ = timing["seconds"].values()
        for kernel, taken in timing["seconds"].items():
            found.append(
                {
                    "part": {"norm": "normalisation", "ffn": "feed-forward"}[timing["part"]],
                    "kernel": kernel,
                    "parameters": timing["parameters"][kernel],
                    "positions": timing["positions"],
                    "milliseconds": 1000 * statistics.median(taken),
                    "against": None if taken is first else paired_median(*np.log([first, taken]))._asdict(),
                    "rounds": len(taken),
                }
            )
    return table("kernels", found, timings=[dict(timing) for timing in timings])


def length_losses(curves: length.Curves) -> Result:
    """Mean loss by octave of position, a row a variant and mode, and the rise past the training length."""
    rows = []
    for values in curves.values():
        for mode in length.present(values):
            row = {"Model": length.title(values), "Reading": length.MODES[mode]}
            for low, high in [(0.5, 1.0), *length.octaves(values["factor"])]:
                nats = length.mean_nats(values, mode, low, high)
                span = f"{'½' if low == 0.5 else f'{low:g}'}–{high:g}×"
                row[span] = None if nats is None else plain(float(nats.mean()), 3)
            change = length.rise(values, mode)
            past = "no prediction" if change is None else length.in_nats(change)
            rows.append(row | {"Past minus within": past, "Seeds": len(values["nats"][mode])})
    return table("length-losses", rows)
