"""The claims ledger: what the precedent's comparison page asserts, and what this run's records say of it.

A claim has a reading, fixed before any result: a band that the measured effect must fall into, its edges left out, so
that no effect at all is no lower loss. The verdict is
- supported: the whole interval lies inside the band;
- contradicted: the whole interval lies outside it;
- not resolved: the interval crosses the band's edge, or there is none (one seed, timings that do not compare);
- not measured here: this run holds no record of it, or only of another data set, baseline, scale or device.

Tokens an hour, hours and steady curves are counts of what one run did: they have no sampling error, and come out
supported, contradicted or not measured, never unresolved.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from study.comparison import ablations, length, seeds, training, variance
from study.comparison.differences import comparable, difference
from study.comparison.load import Comparison
from study.comparison.models import PLAN
from study.comparison.results import Result, bounds, compact, duration, estimate, number_of, plain, table, value_text
from study.preset import LINEAGE
from threefold.evaluation.statistics import student_half_width

SUPPORTED, CONTRADICTED = "supported", "contradicted"
NOT_RESOLVED, NOT_MEASURED = "not resolved", "not measured here"
PARAMETERS, TOKENS = 253e6, 600e6  # of the model that the precedent's page is about, as it gives them


@dataclass(frozen=True)
class Finding:
    """What a claim's test found: an effect with its interval, the words for it, and why it may not count."""

    text: str
    low: float | None = None
    high: float | None = None
    instead: str = ""  # not the claim's own data, baseline or device: what it is instead
    unresolved: str = ""  # why no verdict can be drawn although there is an effect


@dataclass(frozen=True)
class Claim:
    """One assertion and how it is tested: the page's own figure, what it asserts, and the band fixed for it."""

    key: str
    source: str
    claimed: str
    reading: str
    band: tuple[float, float]
    test: Callable[[Comparison], Finding | None]

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
            inside = self.band[0] < low and high < self.band[1]
            outside, why = high <= self.band[0] or low >= self.band[1], ""
            verdict = SUPPORTED if inside else CONTRADICTED if outside else NOT_RESOLVED
        return Verdict(self, verdict, replace(finding, text=f"{finding.text} ({why})") if why else finding)


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    verdict: str
    finding: Finding

    @property
    def measured(self) -> str:
        """What was measured, and why it does not count where it does not."""
        return self.finding.text


# Tests ---------------------------------------------------------------------------------------------------------------


def _ablation(comparison: Comparison, variant: str, quantity: str) -> Finding | None:
    """What a component brings against the variant without it, in percent."""
    effect = ablations.effect(comparison.by_variant("ablation"), variant, quantity)
    return effect and Finding(f"{effect.text}, {effect.basis}", *_times_100(effect.low, effect.high))


def _length(comparison: Comparison, effect: str) -> Finding | None:
    """An effect past the training length, in nats per token."""
    measured = {"rope": length.rope, "sinks": length.sinks}[effect](length.found(comparison))
    return measured and Finding(measured.text, measured.interval.low, measured.interval.high)


def _change(comparison: Comparison, measure: str, a: str, b: str, data: str) -> Finding | None:
    """Change of a measure from one model to another, in percent or points; it counts on the claim's data set only."""
    change = difference(comparison, measure, a, b)
    if change is None:
        measured = all(comparison.value(measure, model) for model in (a, b))
        apart = measured and not comparable(comparison, measure, a, b)
        return Finding("no common unit", instead="perplexities of different tokenizers") if apart else None
    instead = _other_set(comparison.protocol(measure), data)
    if not instead and a == "gpt2" and comparison.stage("gpt2") is not None:
        instead = "against a GPT-2 trained here on this run's text, not the published one"
    trained = f", {seeds.basis(comparison)}" if {a, b} <= {*LINEAGE} else ""
    text = f"{change.text}, {number_of(change.n)}{trained}"
    return Finding(text, *_times_100(change.low, change.high), instead=instead)


_times_100 = partial(bounds, lambda x: 100 * x)


def _other_set(protocol: str | None, source: str) -> str:
    here = (protocol or "").partition("/")[0]
    return "" if here.startswith(source) else f"on {here}, not {source}"


def _problems(comparison: Comparison, data: str) -> Finding | None:
    """Word problems solved by the last stage evaluated on them, in percent."""
    model = next((name for name in reversed(LINEAGE) if comparison.value("problems", name)), None)
    if model is None:
        return None
    value, size = comparison.value("problems", model), training.total_parameters(comparison, model)
    scale = f", {compact(size)} parameters" if size else ""
    text = f"{value_text(value)} ({comparison.name(model)}{scale}, {number_of(value.n)})"
    return Finding(text, *_times_100(value.low, value.high), instead=_other_set(value.protocol, data))


def _speed(comparison: Comparison, a: str, b: str) -> Finding | None:
    """Decoding speed of b over a at batch 1, Student's interval of the log-ratio over the repeats."""
    series = []
    for model in (a, b):
        value, items = comparison.metric(model, "speed", "decode_b1"), comparison.items(model, "speed")
        if value is None:
            return None
        rates = np.array([value.value])
        if items is not None:
            single = items[(items["phase"] == "decode") & (items["batch"] == 1)]
            rates = single.sort_values("repeat")["tokens_per_second"].to_numpy(float)
        series.append(np.log(rates))
    n = min(map(len, series))
    logs = series[1][:n] - series[0][:n]
    ratio = math.exp(float(logs.mean()))
    if not comparison.timed_together:
        return Finding(f"{ratio:.2f}×", unresolved="timed in separate processes")
    if n < 3:
        return Finding(f"{ratio:.2f}×", unresolved=f"{n} repeats")
    half = student_half_width(float(logs.std(ddof=1) / math.sqrt(n)), n - 1)
    low, high = ratio * math.exp(-half), ratio * math.exp(half)
    instead = "GPT-2's architecture at this run's size" if comparison.stage("gpt2") is not None else ""
    return Finding(f"{estimate(ratio, low, high, decimals=2, unit='×')}, {n} repeats", low, high, instead=instead)


def _tokens_per_hour(comparison: Comparison) -> Finding | None:
    """Millions of tokens an hour of pretraining."""
    for stage in training.trainings(comparison, "pretrain"):
        rate = stage.tokens_per_hour / 1e6
        text = f"{compact(stage.tokens_per_hour)} tokens/hour on {stage.device}"
        return Finding(text, rate, rate, instead=_elsewhere([stage.device], stage.parameters))
    return None


def _hours(comparison: Comparison) -> Finding | None:
    """Hours of all three stages together."""
    stages = training.trainings(comparison, *LINEAGE)
    if len(stages) < 3:
        return None
    seconds, devices = sum(one.seconds for one in stages), sorted({one.device for one in stages})
    text = f"{duration(seconds)} on {', '.join(devices)}"
    instead = _elsewhere(devices, stages[0].parameters, stages[0].tokens)
    return Finding(text, seconds / 3600, seconds / 3600, instead=instead)


def _elsewhere(devices: list[str], parameters: int | None, tokens: float = TOKENS) -> str:
    """Why a time is not that of the page's model: another device, or a size or budget not within a factor of two."""
    if not all("H100" in device for device in devices):
        return "not an H100"
    if parameters is None:
        return "of a model whose size is not recorded"
    for have, claimed, unit in ((parameters, PARAMETERS, "parameters"), (tokens, TOKENS, "tokens")):
        if not 0.5 <= have / claimed <= 2:
            return f"{compact(have)} {unit}, not {compact(claimed)}"
    return ""


def _unsteady_curves(comparison: Comparison) -> Finding | None:
    """How many of the two pretraining curves are unsteady."""
    curves = [one for one in training.curves(comparison) if one.stage in ("gpt2", "pretrain")]
    if len(curves) < 2:
        return None
    worst, unsteady = training.worst(curves), [one.name for one in curves if not one.stable]
    text = f"largest setback {plain(worst.setback, 3)} nats ({worst.name})"
    text += f"; unsteady: {', '.join(unsteady)}" if unsteady else ""
    return Finding(text, float(len(unsteady)), float(len(unsteady)))


def _variances(comparison: Comparison) -> Finding | None:
    """Variance of sentiment accuracy over templates, less its variance over trained models, in squared points."""
    protocol = variance.fuller(comparison, comparison.protocol("sentiment"))
    found = variance.scores(comparison, protocol) if protocol else None
    if found is None or found[0].shape[1] < 2 or found[0].shape[3] < 3:
        return None
    method, model, low, high = variance.method_against_model(100 * found[0].mean(axis=2).transpose(2, 0, 1))
    over = [math.sqrt(max(part, 0)) for part in (method, model)]
    text = (
        f"sentiment: sd {over[0]:.1f} pp over templates, {over[1]:.1f} pp over models; difference of variances "
        f"{estimate(method - model, low, high, decimals=1, sign=True)}"
    )
    return Finding(text, low, high)


_FUNCTIONS = (_ablation, _change, _hours, _length, _problems, _speed, _tokens_per_hour, _unsteady_curves, _variances)
TESTS: dict[str, Callable[..., Finding | None]] = {test.__name__.removeprefix("_"): test for test in _FUNCTIONS}


def _claim(key: str, source: str, claimed: str, reading: str, band: list[float], test: str, **arguments: str) -> Claim:
    """A claim of plan.toml: `arguments` are the test's own."""
    return Claim(key, source, claimed, reading, tuple(band), partial(TESTS[test], **arguments))


CLAIMS = [_claim(**row) for row in PLAN["claim"]]
BY_KEY = {claim.key: claim for claim in CLAIMS}


def judge(comparison: Comparison, *keys: str) -> dict[str, Verdict]:
    """Verdicts by the claims' keys, of all claims in the ledger's order or of those named.

    Raises KeyError for a key that the ledger has not.
    """
    return {key: BY_KEY[key].judge(comparison) for key in keys or BY_KEY}


def ledger(comparison: Comparison) -> Result:
    """The claims ledger as a table."""
    verdicts = judge(comparison)
    values = {
        key: {name: getattr(one.claim, name) for name in ("source", "claimed", "reading")}
        | {"verdict": one.verdict, "measured": one.measured, "low": one.finding.low, "high": one.finding.high}
        for key, one in verdicts.items()
    }
    rows = ({"claim": one.claim, "measured": one.measured, "verdict": one.verdict} for one in verdicts.values())
    empty = all(one.verdict == NOT_MEASURED for one in verdicts.values())
    return replace(table("claims", rows), values={"claims": values}, empty=empty)


def counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many claims came out how."""
    every = [one.verdict for one in verdicts]
    return {name: every.count(name) for name in (SUPPORTED, CONTRADICTED, NOT_RESOLVED, NOT_MEASURED)}
