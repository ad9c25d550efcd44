"""Where the difference from GPT-2 comes from: a chain of trainings, from GPT-2's recipe to this model, each of which
differs from the one before in one part.

All were trained from the same seeds, on the same text in the same order, for the same steps (notebook 05). A link's
effect is the held-out loss after it less that before it, seed by seed, in nats per token; it depends on the order of
the chain, because parts act on each other. The mean over seeds carries Student's interval; p-values are adjusted over
the links and, apart from them, over the three groups (Holm). A share is the mean over seeds of the link's part of the
whole difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np

from study.comparison.ablations import Variants, adjust, half_width
from study.comparison.differences import ALPHA
from study.comparison.load import Comparison
from study.comparison.models import SHOWN
from study.comparison.results import Result, count, estimate, listed, say, table
from threefold.config import TrainConfig
from threefold.evaluation.statistics import paired_student

GROUPS = {"pipeline": "training pipeline", "architecture": "architecture", "scale": "scale"}
TOTAL = "total"
_PIPELINE = {entry.name for entry in fields(TrainConfig)}
_NAMES = {one["key"]: one["name"] for one in SHOWN["component"]} | GROUPS

Link = dict[str, Any]


def links(variants: Variants, chain: Mapping[str, str]) -> list[Link]:
    """The links of a chain in their order, then the groups of links, then all of them as `TOTAL`.

    variants: {variant: {"heldout_loss": one a seed, "seeds", "parameters", "tokens"}}. chain: as of
    `study.preset.attribution_chain`.

    Each link: {"kind" ("link", "group" or "total"), "link" (its name), "group", "order", "before" and "after"
    (variants), "parameters" (after it), "loss_before" and "loss_after" (one a seed), "seeds", "tokens", "difference",
    "low", "high", "p", "n", "p_adjusted", "share", "share_low", "share_high"}. Shares are None where the whole
    difference cannot be distinguished from zero; low and high with one seed; before, after and parameters for groups.
    """
    if not chain:
        return []
    names = list(chain)
    loss = {link: np.asarray(variants[chain[link]]["heldout_loss"], float) for link in names}
    whole = loss[names[-1]] - loss[names[0]]
    found = []
    for before, link in pairwise(names):
        group = link if link == "scale" else "pipeline" if link in _PIPELINE else "architecture"
        ends = {"before": chain[before], "after": chain[link], "parameters": variants[chain[link]]["parameters"]}
        found.append({"kind": "link", "link": link, "group": group} | ends | _effect(loss[before], loss[link], whole))
    groups = []
    for group in GROUPS:
        changes = [np.subtract(one["loss_after"], one["loss_before"]) for one in found if one["group"] == group]
        if changes:  # all of them as one link, from zero
            ends = dict.fromkeys(("before", "after", "parameters"))
            effect = _effect(np.zeros_like(whole), np.sum(changes, axis=0), whole)
            groups.append({"kind": "group", "link": group, "group": group} | ends | effect)
    for family in (found, groups):
        adjust(family)
    total = {**found[-1], "kind": TOTAL, "link": TOTAL, "group": TOTAL, "before": chain[names[0]]}
    total |= _effect(loss[names[0]], loss[names[-1]], whole)
    total["p_adjusted"] = total["p"]
    shared = {key: variants[chain[names[0]]][key] for key in ("seeds", "tokens")}
    return [one | shared | {"order": order} for order, one in enumerate([*found, *groups, total])]


def _effect(before: np.ndarray, after: np.ndarray, whole: np.ndarray) -> Link:
    test, share = paired_student(before, after), dict.fromkeys(("share", "share_low", "share_high"))
    over_all = paired_student(np.zeros_like(whole), whole)
    if over_all.low is not None and (over_all.low > 0 or over_all.high < 0) and np.all(whole != 0):
        share = dict(zip(share, paired_student(np.zeros_like(whole), (after - before) / whole), strict=False))
    losses = {"loss_before": before.tolist(), "loss_after": after.tolist()}
    return {**losses, **test._asdict(), **share}


def record_name(one: Link) -> str:
    """ "attribution/norm", "attribution/group-architecture", "attribution/total"."""
    return f"attribution/{'group-' if one['kind'] == 'group' else ''}{one['link']}"


def found(comparison: Comparison) -> list[Link]:
    """The links in a run's records, in their order."""
    return sorted(comparison.under("attribution/").values(), key=lambda one: one["order"])


def single(every: Sequence[Link]) -> list[Link]:
    """The links alone, without groups and total."""
    return [one for one in every if one["kind"] == "link"]


def of(every: Sequence[Link], name: str) -> Link | None:
    """A group or the total."""
    return next((one for one in every if one["link"] == name and one["kind"] != "link"), None)


def title(link: str) -> str:
    """A link's name for a reader: what was replaced."""
    name = _NAMES.get(link, link.replace("_", " "))
    return name[:1].upper() + name[1:]


def share_text(one: Link) -> str | None:
    """ "62% [55, 69]"."""
    if one["share"] is None:
        return None
    return estimate(one["share"], one["share_low"], one["share_high"], scale=100, decimals=0, unit="%")


# What is shown -------------------------------------------------------------------------------------------------------


def effects(every: Sequence[Link]) -> Result:
    """The chain as a table: its links, its groups, all of it."""
    rows = [one | {"name": title(one["link"]), "shares": share_text(one), "effect": one} for one in every]
    return table("attribution", rows, links=list(every))


def summary(every: Sequence[Link]) -> Result:
    """Where the difference comes from, in words."""
    total = of(every, TOTAL)
    if total is None:
        return Result("comparison/attribution-summary", {}, "No attribution was made in this run.", empty=True)
    half = half_width(single(every))
    shares = [f"{title(key).lower()} {share_text(one)}" for key in GROUPS if (one := of(every, key)) and one["share"]]
    detected = [title(one["link"]).lower() for one in single(every) if one["p_adjusted"] < ALPHA]
    text = say(
        "attribution",
        total=total,
        seeds=count(total["n"], "seed"),
        shares=f" Of it: {listed(shares)}." if shares else " Zero is not excluded, so no shares are given.",
        detected=f" After Holm’s adjustment, these links change the loss: {listed(detected)}." if detected else "",
        reach="" if half is None else say("attribution-reach", half=half),
    )
    values = {"half_width": half, "detected": detected, "seeds": total["n"]}
    return Result("comparison/attribution-summary", values, markdown=text)
