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
from dataclasses import dataclass

import numpy as np
from scipy import stats

from study.comparison import ablations, length, models, seeds, training, variance
from study.comparison.differences import difference
from study.comparison.load import Comparison
from study.comparison.measures import PERPLEXITY, PROBLEMS, SENTIMENT, Measure, fuller
from study.comparison.results import NBSP, Result, compact, duration, interval, plain, signed
from study.comparison.tables import markdown_table, measured_by_turns

SUPPORTED, CONTRADICTED = "supported", "contradicted"
NOT_RESOLVED, NOT_MEASURED = "not resolved", "not measured here"
INFINITY = math.inf
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


def _ablation(variant: str, quantity: str) -> Callable[[Comparison], Finding | None]:
    def test(comparison: Comparison) -> Finding | None:
        one = ablations.effect(comparison, variant, quantity)
        if one is None:
            return None
        bounds = [None if x is None else 100 * x for x in (one.low, one.high)]
        text = interval(signed(100 * one.change, 1, "%"), *(None if x is None else signed(x, 1) for x in bounds))
        return Finding(f"{text}, {one.basis}", *bounds)

    return test


def _length(effect: Callable[[length.Curves], length.Effect | None]) -> Callable[[Comparison], Finding | None]:
    """An effect past the training length, in nats per token."""

    def test(comparison: Comparison) -> Finding | None:
        one = effect(length.found(comparison))
        return one and Finding(one.text, one.interval.low, one.interval.high)

    return test


def _stage(measure: Measure, a: str, b: str, source: str) -> Callable[[Comparison], Finding | None]:
    """Change of a measure from one model to another, in percent or points; it counts on the claim's data set only."""

    def test(comparison: Comparison) -> Finding | None:
        one = difference(comparison, measure, a, b)
        if one is None:
            measured = all(measure.value(comparison, model) for model in (a, b))
            if measured and not measure.comparable(comparison, a, b):
                return Finding("no common unit", instead="perplexities of different tokenizers")
            return None
        instead = _other_set(measure.protocol(comparison), source)
        if not instead and a == "gpt2" and comparison.is_trained_here("gpt2"):
            instead = "against a GPT-2 trained here on this run's text, not the published one"
        bounds = [None if x is None else 100 * x for x in (one.low, one.high)]
        trained = f", {seeds.basis(comparison)}" if {a, b} <= {*models.LINEAGE} else ""
        return Finding(f"{one.text}, n{NBSP}={NBSP}{one.n:,}{trained}", *bounds, instead=instead)

    return test


def _other_set(protocol: str | None, source: str) -> str:
    here = (protocol or "").partition("/")[0]
    return "" if here.startswith(source) else f"on {here}, not {source}"


def _problems(comparison: Comparison) -> Finding | None:
    model = next((name for name in ("dpo", "sft", "pretrain") if PROBLEMS.value(comparison, name)), None)
    if model is None:
        return None
    value = PROBLEMS.value(comparison, model)
    size = training.total_parameters(comparison, model)
    scale = f", {compact(size)} parameters" if size else ""
    text = f"{PROBLEMS.text(value)} ({comparison.name(model)}{scale}, n{NBSP}={NBSP}{value.n:,})"
    bounds = [None if x is None else 100 * x for x in (value.low, value.high)]
    return Finding(text, *bounds, instead=_other_set(value.protocol, "gsm8k"))


def _speed(a: str, b: str) -> Callable[[Comparison], Finding | None]:
    """Decoding speed of b over a at batch 1, Student's interval of the log-ratio over the repeats."""

    def test(comparison: Comparison) -> Finding | None:
        series = []
        for model in (a, b):
            value = comparison.metric(model, "speed", "decode_b1")
            if value is None:
                return None
            items = comparison.items(model, "speed")
            if items is not None:
                rows = items[(items["phase"] == "decode") & (items["batch"] == 1)].sort_values("repeat")
                series.append(np.log(rows["tokens_per_second"].to_numpy(float)))
            else:
                series.append(np.log([value.value]))
        n = min(len(one) for one in series)
        logs = series[1][:n] - series[0][:n]
        ratio = math.exp(float(logs.mean()))
        instead = "GPT-2's architecture at this run's size" if comparison.is_trained_here("gpt2") else ""
        if not measured_by_turns(comparison):
            return Finding(f"{ratio:.2f}×", unresolved="timed in separate processes")
        if n < 3:
            return Finding(f"{ratio:.2f}×", unresolved=f"{n} repeats")
        half = float(stats.t.ppf(0.975, n - 1) * logs.std(ddof=1) / math.sqrt(n))
        low, high = ratio * math.exp(-half), ratio * math.exp(half)
        text = interval(f"{ratio:.2f}×", f"{low:.2f}", f"{high:.2f}")
        return Finding(f"{text}, {n} repeats", low, high, instead=instead)

    return test


def _rate(comparison: Comparison) -> Finding | None:
    stage = next((one for one in training.trainings(comparison) if one.stage == "pretrain"), None)
    if stage is None:
        return None
    rate = stage.tokens_per_hour / 1e6
    text = f"{compact(stage.tokens_per_hour)} tokens/hour on {stage.device}"
    return Finding(text, rate, rate, instead=_elsewhere([stage.device], stage.parameters))


def _hours(comparison: Comparison) -> Finding | None:
    stages = [one for one in training.trainings(comparison) if one.stage in ("pretrain", "sft", "dpo")]
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


def _stable(comparison: Comparison) -> Finding | None:
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


CLAIMS = (
    Claim(
        "rmsnorm-speed",
        "RMSNorm 10-15% faster training",
        "RMSNorm trains 10–15% faster than LayerNorm",
        "at least +10% tokens/s",
        (10, INFINITY),
        _ablation("norm=layer", "tokens_per_second"),
    ),
    Claim(
        "swiglu-perplexity",
        "SwiGLU 2-4% better perplexity",
        "SwiGLU lowers perplexity by 2–4%",
        "at least −2%",
        (-INFINITY, -2),
        _ablation("ffn=gelu", "heldout_loss"),
    ),
    Claim(
        "rope-length",
        "RoPE extrapolates better",
        "RoPE extrapolates better than learned positions",
        "past the training length its loss rises less than theirs in windows read anew",
        (-INFINITY, 0),
        _length(length.rope),
    ),
    Claim(
        "sinks-length",
        "sinks stable beyond training length",
        "Attention sinks keep the model stable beyond its training length",
        "past it, lower loss with sinks + window than with the window alone",
        (-INFINITY, 0),
        _length(length.sinks),
    ),
    Claim(
        "gpt2-perplexity",
        "-33% perplexity against GPT-2 with 13x fewer tokens",
        "33% lower WikiText-2 perplexity than GPT-2 with 13 times fewer tokens",
        "at least −33%",
        (-INFINITY, -33),
        _stage(PERPLEXITY, "gpt2", "pretrain", "wikitext2"),
    ),
    Claim(
        "sft-perplexity",
        "SFT +26% perplexity",
        "SFT raises perplexity by 26%",
        "+13% to +39%",
        (13, 39),
        _stage(PERPLEXITY, "pretrain", "sft", "wikitext2"),
    ),
    Claim(
        "dpo-perplexity",
        "DPO +0.5% perplexity",
        "DPO raises perplexity by 0.5%",
        "+0.25% to +0.75%",
        (0.25, 0.75),
        _stage(PERPLEXITY, "sft", "dpo", "wikitext2"),
    ),
    Claim(
        "sft-sentiment",
        "SFT +4pp SST-2",
        "SFT gains 4 points on SST-2",
        "+2 to +6 pp",
        (2, 6),
        _stage(SENTIMENT, "pretrain", "sft", "sst2"),
    ),
    Claim(
        "dpo-sentiment",
        "DPO -4pp SST-2",
        "DPO loses 4 points on SST-2",
        "−6 to −2 pp",
        (-6, -2),
        _stage(SENTIMENT, "sft", "dpo", "sst2"),
    ),
    Claim(
        "gsm8k-zero", "0% GSM8K at this scale", "GSM8K is at 0% at this scale", "below 1%", (-INFINITY, 1), _problems
    ),
    Claim(
        "speed-gpt2",
        "generation speed like GPT-2's",
        "Generation is as fast as GPT-2's",
        "within 10%",
        (0.9, 1.1),
        _speed("gpt2", "pretrain"),
    ),
    Claim(
        "speed-distilgpt2",
        "DistilGPT-2 twice as fast",
        "DistilGPT-2 generates twice as fast as GPT-2",
        "1.5 to 2.5 times",
        (1.5, 2.5),
        _speed("gpt2", "distilgpt2"),
    ),
    Claim(
        "tokens-per-hour",
        "30M tokens/hour on an H100",
        "Training runs at 30M tokens/hour on an H100",
        "15M to 45M",
        (15, 45),
        _rate,
    ),
    Claim(
        "hours", "27 hours in all", "All three stages take 27 hours on an H100", "13.5 to 40.5 h", (13.5, 40.5), _hours
    ),
    Claim(
        "stability",
        "both train stably",
        "Both architectures train stably",
        "no curve with a setback of a tenth of its start",
        (-INFINITY, 1),  # unsteady curves
        _stable,
    ),
    Claim(
        "method-outweighs-model",
        "evaluation method outweighs model quality (variance of prompts against variance of models)",
        "Evaluation method outweighs model quality",
        "more variance over templates than over models",
        (0, INFINITY),
        method_against_model,
    ),
)


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
