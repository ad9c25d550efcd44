"""The claims ledger: what the original comparison asserts, and what this run's records say of it.

A claim has a reading: a band that the measured effect must fall into, its edges left out, so that no effect at all is
no lower loss. The verdict is
- supported, contradicted: the whole interval lies inside the band, or outside it, under the claim's own conditions;
- supported at this scale, not at this scale: the same, of a smaller model, budget or other device than the claim's;
- not resolved: the interval crosses the band's edge, or there is none (one seed, timings that do not compare);
- not measured here: this run holds no record of it, or only of another data set, baseline or training.

Every verdict names its scope: parameters, tokens, device, data and what was repeated. Tokens an hour, hours and steady
curves are counts of what one run did: they have no sampling error and are never unresolved.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from study.comparison import ablations, attribution, length, recipes, seeds, training, variance
from study.comparison.differences import comparable, difference
from study.comparison.load import Comparison
from study.comparison.models import PLAN
from study.comparison.original import ORIGINAL
from study.comparison.results import Result, bounds, compact, count, duration, estimate, number_of, table, value_text
from study.preset import LINEAGE
from threefold.evaluation.statistics import student_half_width

VERDICTS = SUPPORTED, CONTRADICTED, SUPPORTED_HERE, NOT_HERE, NOT_RESOLVED, NOT_MEASURED = (
    "supported", "contradicted", "supported at this scale", "not at this scale", "not resolved", "not measured here"
)  # fmt: skip
CLAIMED = ORIGINAL["conditions"]  # parameters, tokens and device of the training that the claims are about


class Scope(NamedTuple):
    """What a verdict is about. data: what it was measured on; basis: what was repeated, "3 seeds"."""

    parameters: int | None = None
    tokens: float | None = None
    device: str = ""
    data: str = ""
    basis: str = ""

    @property
    def sizes(self) -> dict[str, float | None]:
        return {"parameters": self.parameters, "tokens": self.tokens}

    @property
    def text(self) -> str:
        sizes = [f"{compact(size)} {unit}" for unit, size in self.sizes.items() if size]
        return ", ".join([*sizes, *filter(None, self[2:])])

    def unmet(self, timed: bool) -> str:
        """Which condition of a claim is not met: a size or budget within a factor of two, and for times the device."""
        for unit, size in self.sizes.items():
            if size is not None and not 0.5 <= size / CLAIMED[unit] <= 2:
                return f"{compact(size)} {unit}, not {compact(CLAIMED[unit])}"
        if self.parameters is None:
            return "a model whose size is not recorded"
        return f"not an {CLAIMED['device']}" if timed and CLAIMED["device"] not in self.device else ""


NOWHERE = Scope()


@dataclass(frozen=True)
class Finding:
    """What a claim's test found: an effect with its interval, the words for it, its scope, and why it may not count."""

    text: str
    low: float | None = None
    high: float | None = None
    instead: str = ""  # another question than the claim's: its data, baseline or training; what it is instead
    unresolved: str = ""  # why no verdict can be drawn although there is an effect
    scope: Scope = NOWHERE
    timed: bool = False  # whether the claim is about a time, and so about a device
    met: bool = False  # whether the claim's conditions are met whatever the scope


@dataclass(frozen=True)
class Claim:
    """One assertion and how it is tested: the original's own words, where they stand, what they assert, and the band
    that counts as true."""

    key: str
    source: str
    claimed: str
    reading: str
    band: tuple[float, float]
    test: Callable[[Comparison], Finding | None]
    where: str = ""

    def judge(self, comparison: Comparison) -> "Verdict":
        """The claim's verdict from a run's records."""
        finding = self.test(comparison)
        if finding is None:
            return Verdict(self, NOT_MEASURED, Finding("–"))
        low, high = finding.low, finding.high
        if finding.instead:
            verdict, why = NOT_MEASURED, finding.instead
        elif finding.unresolved or low is None or high is None:
            verdict, why = NOT_RESOLVED, finding.unresolved or "no interval"
        else:
            why = "" if finding.met else finding.scope.unmet(finding.timed)
            if self.band[0] < low and high < self.band[1]:
                verdict = SUPPORTED_HERE if why else SUPPORTED
            elif high <= self.band[0] or low >= self.band[1]:
                verdict = NOT_HERE if why else CONTRADICTED
            else:
                verdict, why = NOT_RESOLVED, ""
        return Verdict(self, verdict, replace(finding, text=f"{finding.text} ({why})") if why else finding)


class Verdict(NamedTuple):
    claim: Claim
    verdict: str
    finding: Finding

    @property
    def scope(self) -> str | None:
        """What the verdict is about, where there is one."""
        return self.finding.scope.text if self.verdict != NOT_MEASURED else None

    @property
    def measured(self) -> str:
        """What was measured, and why it does not count where it does not."""
        return self.finding.text


# Tests ---------------------------------------------------------------------------------------------------------------


def _ablation(comparison: Comparison, variant: str, quantity: str) -> Finding | None:
    """What a component brings against the variant without it, in percent."""
    effect = ablations.effect(comparison.by_variant("ablation"), variant, quantity)
    if effect is None:
        return None
    scope, timed = _of_ablations(comparison, effect.basis), quantity == "tokens_per_second"
    if timed:  # steps of the preset's model
        size = training.total_parameters(comparison, "pretrain")
        scope = scope._replace(parameters=size, tokens=None, data="single training steps")
    return Finding(effect.text, *_times_100(effect.low, effect.high), scope=scope, timed=timed)


def _of_ablations(comparison: Comparison, basis: str) -> Scope:
    base = comparison.by_variant("ablation").get(ablations.BASE, {})
    tokens = max((curve["tokens"][-1] for curve in base.get("curves", ())), default=None)
    device = training.device(comparison.stage("ablations"))
    return Scope(base.get("parameters"), tokens, device, "held-out text", basis)


def _of_lineage(comparison: Comparison, model: str, data: str | None, n: int | None = None) -> Scope:
    """The scope of a figure of one of our stages."""
    budget = sum(recipes.tokens(comparison, model)) or None
    device = next((one.device for one in training.trainings(comparison, model)), "")
    basis = f"{number_of(n)}, {seeds.basis(comparison)}" if n else seeds.basis(comparison)
    return Scope(training.total_parameters(comparison, model), budget, device, data or "", basis)


def _length(comparison: Comparison, effect: str) -> Finding | None:
    """An effect past the training length, in nats per token."""
    measured = {"rope": length.rope, "sinks": length.sinks}[effect](length.found(comparison))
    if measured is None:
        return None
    scope = _of_ablations(comparison, measured.basis)._replace(data="streams of the test text")
    return Finding(measured.text, measured.interval.low, measured.interval.high, scope=scope)


def _change(comparison: Comparison, measure: str, a: str, b: str, data: str) -> Finding | None:
    """Change of a measure from one model to another, in percent or points; it counts on the claim's data set only."""
    change = difference(comparison, measure, a, b)
    if change is None:
        measured = all(comparison.value(measure, model) for model in (a, b))
        apart = measured and not comparable(comparison, measure, a, b)
        return Finding("no common unit", instead="perplexities of different tokenizers") if apart else None
    instead = _other_set(comparison.protocol(measure), data)
    if not instead and a == "gpt2" and comparison.trained_here("gpt2"):
        instead = "against a GPT-2 trained here on this run's text, not the published one"
    scope = _of_lineage(comparison, b, comparison.protocol(measure), change.n)
    return Finding(change.text, *_times_100(change.low, change.high), instead=instead, scope=scope)


_times_100 = partial(bounds, lambda x: 100 * x)


def _other_set(protocol: str | None, source: str) -> str:
    here = (protocol or "").partition("/")[0]
    return "" if here.startswith(source) else f"on {here}, not {source}"


def _problems(comparison: Comparison, data: str) -> Finding | None:
    """Word problems solved by the last stage evaluated on them, in percent."""
    value = comparison.last("problems")
    if value is None:
        return None
    text, instead = f"{value_text(value)} ({comparison.name(value.model)})", _other_set(value.protocol, data)
    scope = _of_lineage(comparison, value.model, value.protocol, value.n)
    return Finding(text, *_times_100(value.low, value.high), instead=instead, scope=scope)


def _speed(comparison: Comparison, a: str, b: str) -> Finding | None:
    """Decoding speed of b over a at batch 1, Student's interval of the log-ratio over the repeats."""
    series = []
    for model in (a, b):
        value, items = comparison.metric(model, "speed", "decode_b1"), comparison.items(model, "speed")
        if value is None:
            return None
        rates = [value.value]
        if items is not None:
            rates = items.query("phase == 'decode' and batch == 1").sort_values("repeat")["tokens_per_second"]
        series.append(np.log(np.asarray(rates, float)))
    n = min(map(len, series))
    logs = series[1][:n] - series[0][:n]
    ratio = math.exp(float(logs.mean()))
    if n < 3 or not comparison.timed_together:
        why = f"{n} repeats" if comparison.timed_together else "timed in separate processes"
        return Finding(f"{ratio:.2f}×", unresolved=why)
    half = student_half_width(float(logs.std(ddof=1) / math.sqrt(n)), n - 1)
    low, high = ratio * math.exp(-half), ratio * math.exp(half)
    size, device = training.total_parameters(comparison, b), training.device(comparison.stage("speed"))
    scope = Scope(size, None, device, "decoding at batch 1", f"{n} repeats")
    text, published = estimate(ratio, low, high, decimals=2, unit="×"), not any(map(comparison.trained_here, (a, b)))
    return Finding(text, low, high, scope=scope, timed=True, met=published)


def _tokens_per_hour(comparison: Comparison) -> Finding | None:
    """Millions of tokens an hour of pretraining."""
    found = training.trainings(comparison, "pretrain")
    if not found:
        return None
    rate, scope = found[0].tokens_per_hour, Scope(found[0].parameters, None, found[0].device, basis="one training")
    text, millions = f"{compact(rate)} tokens/hour", rate / 1e6
    return Finding(text, millions, millions, instead=scope.unmet(True), scope=scope)


def _hours(comparison: Comparison) -> Finding | None:
    """Hours of all three stages together."""
    stages = training.trainings(comparison, *LINEAGE)
    if len(stages) < 3:
        return None
    whole, devices = training.total(stages), sorted({one.device for one in stages})
    scope = Scope(stages[0].parameters, stages[0].tokens, ", ".join(devices), basis="one training")
    instead = next(filter(None, (scope._replace(device=device).unmet(True) for device in devices)), "")
    hours = whole.seconds / 3600
    return Finding(duration(whole.seconds), hours, hours, instead=instead, scope=scope)


def _unsteady_curves(comparison: Comparison) -> Finding | None:
    """How many of the two pretraining curves are unsteady."""
    curves = [one for one in training.curves(comparison) if one.stage in ("gpt2", "pretrain")]
    if len(curves) < 2:
        return None
    unsteady = float(sum(not one.stable for one in curves))
    text = "; ".join(
        f"{one.name}: {'steady' if one.stable else 'unsteady'}, largest setback {one.setback_text}" for one in curves
    )
    return Finding(text, unsteady, unsteady, scope=_of_lineage(comparison, "pretrain", "training loss"))


def _variances(comparison: Comparison) -> Finding | None:
    """Variance of sentiment accuracy over templates, less its variance over trained models, in squared points."""
    protocol = variance.fuller(comparison, comparison.protocol("sentiment"))
    found = variance.scores(comparison, protocol) if protocol else None
    if found is None or found[0].shape[1] < 2 or found[0].shape[3] < 3:
        return None
    method, model, low, high = variance.method_against_model(100 * found[0].mean(axis=2).transpose(2, 0, 1))
    over = [math.sqrt(max(part, 0)) for part in (method, model)]
    text = (
        f"sd {over[0]:.1f} pp over templates, {over[1]:.1f} pp over models; difference of variances "
        f"{estimate(method - model, low, high, decimals=1, sign=True)}"
    )
    basis = f"{len(found[1]['model'])} models × {len(found[1]['template'])} templates"
    if low == high:
        return Finding(text, unresolved="every model gives the same answers under every template")
    return Finding(text, low, high, scope=_of_lineage(comparison, "pretrain", protocol)._replace(basis=basis))


def _attribution(comparison: Comparison, group: str) -> Finding | None:
    """What a group of links of the attribution chain does to the held-out loss, in nats per token."""
    links = attribution.found(comparison)
    if (effect := attribution.of(links, group)) is None:
        return None
    share = attribution.share_text(effect)
    text = estimate(effect["difference"], effect["low"], effect["high"], decimals=3, unit=" nats", sign=True)
    text += f", {share} of the whole difference" if share else ""
    size = max(one["parameters"] for one in attribution.single(links) if one["group"] == group)
    scope = _of_ablations(comparison, count(effect["n"], "seed"))._replace(parameters=size, tokens=effect["tokens"])
    return Finding(text, effect["low"], effect["high"], scope=scope)


_FUNCTIONS = (
    _ablation, _attribution, _change, _hours, _length, _problems, _speed, _tokens_per_hour, _unsteady_curves, _variances
)  # fmt: skip
TESTS: dict[str, Callable[..., Finding | None]] = {test.__name__.removeprefix("_"): test for test in _FUNCTIONS}


def _claim(*, key: str, source: str, claimed: str, reading: str, band: list[float], test: str, **given: str) -> Claim:
    """A claim of plan.toml. given: the arguments of its test."""
    where = ORIGINAL["where"].get(key, "")
    return Claim(key, source, claimed, reading, tuple(band), partial(TESTS[test], **given), where)


CLAIMS = [_claim(**row) for row in PLAN["claim"]]


def judge(comparison: Comparison, *keys: str) -> dict[str, Verdict]:
    """Verdicts by the claims' keys, of all claims in the ledger's order or of those named.

    Raises KeyError for a key that the ledger has not.
    """
    every = {claim.key: claim for claim in CLAIMS}
    return {key: every[key].judge(comparison) for key in keys or every}


def ledger(comparison: Comparison) -> Result:
    """The claims ledger as a table."""
    verdicts = judge(comparison)
    values = {
        key: {name: getattr(one.claim, name) for name in ("source", "where", "claimed", "reading")}
        | {"verdict": one.verdict, "measured": one.measured, "low": one.finding.low, "high": one.finding.high}
        | {"scope": one.finding.scope._asdict()}
        for key, one in verdicts.items()
    }
    empty = all(one.verdict == NOT_MEASURED for one in verdicts.values())
    return replace(table("claims", verdicts.values()), values={"claims": values}, empty=empty)


def counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many claims came out how."""
    every = [one.verdict for one in verdicts]
    return {name: every.count(name) for name in VERDICTS}
