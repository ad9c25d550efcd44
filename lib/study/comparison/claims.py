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
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from study.comparison import ablations, length, seeds, training, variance
from study.comparison.differences import difference
from study.comparison.load import Comparison
from study.comparison.measures import PERPLEXITY, PROBLEMS, SENTIMENT, fuller
from study.comparison.results import NBSP, Result, compact, duration, interval, plain, signed
from study.comparison.tables import markdown_table, measured_by_turns
from study.preset import LINEAGE

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
            return Verdict(self, NOT_MEASURED, "–")
        if finding.instead:
            return Verdict(self, NOT_MEASURED, f"{finding.text} ({finding.instead})", finding)
        if finding.unresolved or finding.low is None or finding.high is None:
            return Verdict(self, NOT_RESOLVED, f"{finding.text} ({finding.unresolved or 'no interval'})", finding)
        least, most = self.band
        if least < finding.low and finding.high < most:
            return Verdict(self, SUPPORTED, finding.text, finding)
        if finding.high <= least or finding.low >= most:
            return Verdict(self, CONTRADICTED, finding.text, finding)
        return Verdict(self, NOT_RESOLVED, finding.text, finding)


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    verdict: str
    measured: str
    finding: Finding | None = None


# Tests ---------------------------------------------------------------------------------------------------------------


def _ablation(comparison: Comparison, variant: str, quantity: str) -> Finding | None:
    """What a component brings against the variant without it, in percent."""
    effect = ablations.effect(comparison, variant, quantity)
    if effect is None:
        return None
    bounds = _times_100(effect.low, effect.high)
    text = interval(signed(100 * effect.change, 1, "%"), *(None if x is None else signed(x, 1) for x in bounds))
    return Finding(f"{text}, {effect.basis}", *bounds)


def _length(comparison: Comparison, effect: str) -> Finding | None:
    """An effect past the training length, in nats per token."""
    measured = {"rope": length.rope, "sinks": length.sinks}[effect](length.found(comparison))
    return measured and Finding(measured.text, measured.interval.low, measured.interval.high)


def _change(comparison: Comparison, measure: str, a: str, b: str, data: str) -> Finding | None:
    """Change of a measure from one model to another, in percent or points; it counts on the claim's data set only."""
    by = {"perplexity": PERPLEXITY, "sentiment": SENTIMENT}[measure]
    change = difference(comparison, by, a, b)
    if change is None:
        measured = all(by.value(comparison, model) for model in (a, b))
        if measured and not by.comparable(comparison, a, b):
            return Finding("no common unit", instead="perplexities of different tokenizers")
        return None
    instead = _other_set(by.protocol(comparison), data)
    if not instead and a == "gpt2" and comparison.is_trained_here("gpt2"):
        instead = "against a GPT-2 trained here on this run's text, not the published one"
    trained = f", {seeds.basis(comparison)}" if {a, b} <= {*LINEAGE} else ""
    text = f"{change.text}, n{NBSP}={NBSP}{change.n:,}{trained}"
    return Finding(text, *_times_100(change.low, change.high), instead=instead)


def _times_100(*bounds: float | None) -> list[float | None]:
    return [None if x is None else 100 * x for x in bounds]


def _other_set(protocol: str | None, source: str) -> str:
    here = (protocol or "").partition("/")[0]
    return "" if here.startswith(source) else f"on {here}, not {source}"


def _problems(comparison: Comparison, data: str) -> Finding | None:
    """Word problems solved by the last stage evaluated on them, in percent."""
    model = next((name for name in reversed(LINEAGE) if PROBLEMS.value(comparison, name)), None)
    if model is None:
        return None
    value = PROBLEMS.value(comparison, model)
    size = training.total_parameters(comparison, model)
    scale = f", {compact(size)} parameters" if size else ""
    text = f"{PROBLEMS.text(value)} ({comparison.name(model)}{scale}, n{NBSP}={NBSP}{value.n:,})"
    return Finding(text, *_times_100(value.low, value.high), instead=_other_set(value.protocol, data))


def _speed(comparison: Comparison, a: str, b: str) -> Finding | None:
    """Decoding speed of b over a at batch 1, Student's interval of the log-ratio over the repeats."""
    series = []
    for model in (a, b):
        value = comparison.metric(model, "speed", "decode_b1")
        if value is None:
            return None
        items = comparison.items(model, "speed")
        if items is None:
            series.append(np.log([value.value]))
        else:
            rows = items[(items["phase"] == "decode") & (items["batch"] == 1)].sort_values("repeat")
            series.append(np.log(rows["tokens_per_second"].to_numpy(float)))
    n = min(len(logs) for logs in series)
    logs = series[1][:n] - series[0][:n]
    ratio = math.exp(float(logs.mean()))
    if not measured_by_turns(comparison):
        return Finding(f"{ratio:.2f}×", unresolved="timed in separate processes")
    if n < 3:
        return Finding(f"{ratio:.2f}×", unresolved=f"{n} repeats")
    half = float(stats.t.ppf(0.975, n - 1) * logs.std(ddof=1) / math.sqrt(n))
    low, high = ratio * math.exp(-half), ratio * math.exp(half)
    text = interval(f"{ratio:.2f}×", f"{low:.2f}", f"{high:.2f}")
    instead = "GPT-2's architecture at this run's size" if comparison.is_trained_here("gpt2") else ""
    return Finding(f"{text}, {n} repeats", low, high, instead=instead)


def _tokens_per_hour(comparison: Comparison) -> Finding | None:
    """Millions of tokens an hour of pretraining."""
    stage = next((one for one in training.trainings(comparison) if one.stage == "pretrain"), None)
    if stage is None:
        return None
    rate = stage.tokens_per_hour / 1e6
    text = f"{compact(stage.tokens_per_hour)} tokens/hour on {stage.device}"
    return Finding(text, rate, rate, instead=_elsewhere([stage.device], stage.parameters))


def _hours(comparison: Comparison) -> Finding | None:
    """Hours of all three stages together."""
    stages = [one for one in training.trainings(comparison) if one.stage in LINEAGE]
    if len(stages) < 3:
        return None
    seconds = sum(one.seconds for one in stages)
    devices = sorted({one.device for one in stages})
    tokens = next(one.tokens for one in stages if one.stage == "pretrain")
    text = f"{duration(seconds)} on {', '.join(devices)}"
    instead = _elsewhere(devices, stages[0].parameters, tokens)
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
    worst = max(curves, key=lambda one: one.setback / one.start)
    unsteady = [comparison.name(one.stage) for one in curves if not one.stable]
    text = f"largest setback {plain(worst.setback, 3)} nats ({comparison.name(worst.stage)})"
    share = float(len(unsteady))
    return Finding(text if not unsteady else f"{text}; unsteady: {', '.join(unsteady)}", share, share)


def method_against_model(comparison: Comparison) -> Finding | None:
    """Variance of sentiment accuracy over templates, less its variance over trained models, in squared points."""
    protocol = fuller(comparison, SENTIMENT.protocol(comparison))
    found = variance.scores(comparison, protocol) if protocol else None
    if found is None:
        return None
    correct_MTDI, levels = found
    if len(levels["template"]) < 2 or len(levels["item"]) < 3:
        return None
    points_NMT = 100 * correct_MTDI.mean(axis=2).transpose(2, 0, 1)
    method, model, low, high = variances(points_NMT)
    text = (
        f"sentiment: sd {math.sqrt(max(method, 0)):.1f} pp over templates, {math.sqrt(max(model, 0)):.1f} pp over "
        f"models; difference of variances {interval(signed(method - model, 1), signed(low, 1), signed(high, 1))}"
    )
    return Finding(text, low, high)


def variances(scores_NMT: np.ndarray) -> tuple[float, float, float, float]:
    """Variance over templates (within models, averaged), over models (of their means), and the 95% interval of the
    first less the second. scores_NMT: items x models x templates.

    Means over few items differ by chance alone, which variances of observed means would count as spread, more of it
    over templates than over models. Both are therefore averaged over pairs of *distinct* items, which is unbiased
    (Hoeffding 1948: a U-statistic of degree two), and may come out below zero. Interval: jackknife over items with
    Student's t; models and templates are taken as they are.
    """
    n, models_, templates = scores_NMT.shape
    within_NMT = scores_NMT - scores_NMT.mean(axis=2, keepdims=True)
    means_NM = scores_NMT.mean(axis=2)
    between_NM = means_NM - means_NM.mean(axis=1, keepdims=True)
    parts = []  # either variance is a sum of squares of linear scores of the items
    for scores_NC, freedom in ((within_NMT.reshape(n, -1), models_ * (templates - 1)), (between_NM, models_ - 1)):
        scaled_NC = scores_NC / math.sqrt(freedom)
        total_C, own_N = scaled_NC.sum(axis=0), (scaled_NC**2).sum(axis=1)
        whole = float((total_C**2).sum() - own_N.sum()) / (n * (n - 1))
        rest_N = ((total_C - scaled_NC) ** 2).sum(axis=1) - (own_N.sum() - own_N)
        parts.append((whole, rest_N / ((n - 1) * (n - 2))))
    (method, method_N), (model, model_N) = parts
    left_out_N = method_N - model_N
    error = math.sqrt((n - 1) / n * float(((left_out_N - left_out_N.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return method, model, method - model - half, method - model + half


TESTS: dict[str, Callable[..., Finding | None]] = {
    "ablation": _ablation,
    "change": _change,
    "hours": _hours,
    "length": _length,
    "problems": _problems,
    "speed": _speed,
    "tokens_per_hour": _tokens_per_hour,
    "unsteady_curves": _unsteady_curves,
    "variances": method_against_model,
}


def _claim(key: str, source: str, claimed: str, reading: str, band: list[float], test: str, **arguments: str) -> Claim:
    """A row of claims.toml: `arguments` are the test's own."""
    return Claim(key, source, claimed, reading, tuple(band), partial(TESTS[test], **arguments))


CLAIMS = [
    _claim(**row) for row in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["claim"]
]
BY_KEY = {claim.key: claim for claim in CLAIMS}


def judge(comparison: Comparison, *keys: str) -> dict[str, Verdict]:
    """Verdicts by the claims' keys, of all claims in the ledger's order or of those named.

    Raises KeyError for a key that the ledger has not.
    """
    return {key: BY_KEY[key].judge(comparison) for key in keys or BY_KEY}


def ledger(comparison: Comparison) -> Result:
    """The claims ledger as a table."""
    verdicts = judge(comparison).values()
    rows = [
        {
            "As asserted": f"“{one.claim.source}”",
            "Claim": one.claim.claimed,
            "Read as": one.claim.reading,
            "Measured here": one.measured,
            "Verdict": one.verdict,
        }
        for one in verdicts
    ]
    values = {
        one.claim.key: {
            "source": one.claim.source,
            "claimed": one.claim.claimed,
            "reading": one.claim.reading,
            "verdict": one.verdict,
            "measured": one.measured,
            "low": one.finding.low if one.finding else None,
            "high": one.finding.high if one.finding else None,
        }
        for one in verdicts
    }
    return Result("comparison/claims", {"claims": values}, markdown=markdown_table(rows))


def counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many claims came out how."""
    every = [one.verdict for one in verdicts]
    return {name: every.count(name) for name in (SUPPORTED, CONTRADICTED, NOT_RESOLVED, NOT_MEASURED)}
