"""The claims ledger: what comparisons of this kind assert, and what this run's records say of it.

A claim has a reading, fixed before any result: a band that the measured effect must fall into. The verdict is
- supported: the whole interval lies inside the band;
- contradicted: the whole interval lies outside it;
- not resolved: the interval crosses the band's edge, or there is none (one seed, timings that do not compare);
- not measured here: this run holds no record of it, or only of another data set, baseline or device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from threefold.comparison import ablations, models, seeds, training
from threefold.comparison.differences import difference
from threefold.comparison.load import Comparison
from threefold.comparison.measures import PERPLEXITY, PROBLEMS, SENTIMENT, Measure
from threefold.comparison.results import Result, compact, duration, interval, plain, signed
from threefold.comparison.tables import markdown_table, measured_by_turns
from threefold.evaluation import statistics

SUPPORTED, CONTRADICTED = "supported", "contradicted"
NOT_RESOLVED, NOT_MEASURED = "not resolved", "not measured here"
INFINITY = math.inf


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
    """One assertion and how it is tested."""

    key: str
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
        if least <= finding.low and finding.high <= most:
            return Verdict(self, SUPPORTED, finding.text, finding)
        if finding.high < least or finding.low > most:
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
        few = "" if one.seeds > 1 else "no interval"
        return Finding(f"{text}, {one.basis}", *bounds, unresolved=few)

    return test


def _record(name: str) -> Callable[[Comparison], Finding | None]:
    """An effect that a notebook published with its interval: {"change", "low", "high", "text"}."""

    def test(comparison: Comparison) -> Finding | None:
        values = comparison.values(name)
        return values and Finding(str(values["text"]), values.get("low"), values.get("high"))

    return test


def _stage(measure: Measure, a: str, b: str, source: str) -> Callable[[Comparison], Finding | None]:
    """Change of a measure from one model to another, in percent or points; it counts on the claim's data set only."""

    def test(comparison: Comparison) -> Finding | None:
        one = difference(comparison, measure, a, b)
        if one is None:
            return None
        instead = _other_set(measure.protocol(comparison), source)
        if not instead and a == "gpt2" and comparison.is_trained_here("gpt2"):
            instead = "against a GPT-2 trained here on this run's text, not the published one"
        bounds = [None if x is None else 100 * x for x in (one.low, one.high)]
        trained = f", {seeds.basis(comparison)}" if {a, b} <= {*models.LINEAGE} else ""
        return Finding(f"{one.text}{trained}", *bounds, instead=instead)

    return test


def _other_set(protocol: str | None, source: str) -> str:
    here = (protocol or "").partition("/")[0]
    return "" if here.startswith(source) else f"on {here}, not {source}"


def _problems(comparison: Comparison) -> Finding | None:
    model = next((name for name in ("dpo", "sft", "pretrain") if PROBLEMS.value(comparison, name)), None)
    if model is None:
        return None
    value = PROBLEMS.value(comparison, model)
    text = f"{PROBLEMS.text(value)} ({comparison.name(model)}, n = {value.n})"
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
        note = f", {instead}" if instead else ""
        return Finding(f"{ratio:.2f}× [{low:.2f}, {high:.2f}], {n} repeats{note}", low, high)

    return test


def _rate(comparison: Comparison) -> Finding | None:
    stage = next((one for one in training.trainings(comparison) if one.stage == "pretrain"), None)
    if stage is None:
        return None
    rate = stage.tokens_per_hour / 1e6
    text = f"{compact(stage.tokens_per_hour)} tokens/hour on {stage.device}"
    return Finding(text, rate, rate, instead="" if "H100" in stage.device else "not an H100")


def _hours(comparison: Comparison) -> Finding | None:
    stages = [one for one in training.trainings(comparison) if one.stage in ("pretrain", "sft", "dpo")]
    if len(stages) < 3:
        return None
    seconds = sum(one.seconds for one in stages)
    devices = sorted({one.device for one in stages})
    text = f"{duration(seconds)} on {', '.join(devices)}"
    return Finding(text, seconds / 3600, seconds / 3600, instead="" if "H100" in devices[0] else "not an H100")


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
    protocol = SENTIMENT.protocol(comparison)
    trained = [model for model in comparison.models if model != "random"]
    frames = {model: comparison.items(model, protocol) for model in trained} if protocol else {}
    frames = {model: frame for model, frame in frames.items() if frame is not None and frame["template"].nunique() > 1}
    if len(frames) < 2:
        return None
    tables = [
        frame.pivot_table(index="item", columns="template", values="correct", aggfunc="mean")
        for frame in frames.values()
    ]
    shared = tables[0].index
    for table in tables[1:]:
        shared = shared.intersection(table.index)
    columns_IC = np.column_stack([table.loc[shared].to_numpy(float) for table in tables])
    templates, models_ = tables[0].shape[1], len(tables)

    def spread(sums_BC: np.ndarray) -> np.ndarray:
        means_BMT = 100 * sums_BC.reshape(len(sums_BC), models_, templates) / len(shared)
        return means_BMT.var(axis=2, ddof=1).mean(axis=1), means_BMT.mean(axis=2).var(axis=1, ddof=1)

    method, model = (float(part[0]) for part in spread(columns_IC.sum(axis=0, keepdims=True)))
    drawn = spread(statistics.resampled_sums(columns_IC, comparison.resamples, 0))
    low, high = (float(x) for x in np.quantile(drawn[0] - drawn[1], [0.025, 0.975]))
    text = (
        f"sentiment: sd {math.sqrt(method):.1f} pp over templates, {math.sqrt(model):.1f} pp over models "
        f"(difference of variances {signed(method - model, 1)} [{signed(low, 1)}, {signed(high, 1)}])"
    )
    return Finding(text, low, high)


CLAIMS = (
    Claim(
        "rmsnorm-speed",
        "RMSNorm trains 10–15% faster than LayerNorm",
        "at least +10% tokens/s",
        (10, INFINITY),
        _ablation("norm=layer", "tokens_per_second"),
    ),
    Claim(
        "swiglu-perplexity",
        "SwiGLU lowers perplexity by 2–4%",
        "at least −2%",
        (-INFINITY, -2),
        _ablation("ffn=gelu", "heldout_loss"),
    ),
    Claim(
        "rope-length",
        "RoPE extrapolates better than learned positions",
        "lower loss past the training length",
        (-INFINITY, 0),
        _record("length/rope"),
    ),
    Claim(
        "sinks-length",
        "Attention sinks keep the model stable beyond its training length",
        "lower loss with sinks than with the window alone",
        (-INFINITY, 0),
        _record("length/sinks"),
    ),
    Claim(
        "gpt2-perplexity",
        "33% lower WikiText-2 perplexity than GPT-2 with 13 times fewer tokens",
        "at least −33%",
        (-INFINITY, -33),
        _stage(PERPLEXITY, "gpt2", "pretrain", "wikitext2"),
    ),
    Claim(
        "sft-perplexity",
        "SFT raises perplexity by 26%",
        "+13% to +39%",
        (13, 39),
        _stage(PERPLEXITY, "pretrain", "sft", "wikitext2"),
    ),
    Claim(
        "dpo-perplexity",
        "DPO raises perplexity by 0.5%",
        "+0.25% to +0.75%",
        (0.25, 0.75),
        _stage(PERPLEXITY, "sft", "dpo", "wikitext2"),
    ),
    Claim(
        "sft-sentiment",
        "SFT gains 4 points on SST-2",
        "+2 to +6 pp",
        (2, 6),
        _stage(SENTIMENT, "pretrain", "sft", "sst2"),
    ),
    Claim(
        "dpo-sentiment",
        "DPO loses 4 points on SST-2",
        "−6 to −2 pp",
        (-6, -2),
        _stage(SENTIMENT, "sft", "dpo", "sst2"),
    ),
    Claim("gsm8k-zero", "GSM8K is at 0% at this scale", "below 1%", (0, 1), _problems),
    Claim(
        "speed-gpt2",
        "Generation is as fast as GPT-2's",
        "within 10%",
        (0.9, 1.1),
        _speed("gpt2", "pretrain"),
    ),
    Claim(
        "speed-distilgpt2",
        "DistilGPT-2 generates twice as fast as GPT-2",
        "1.5 to 2.5 times",
        (1.5, 2.5),
        _speed("gpt2", "distilgpt2"),
    ),
    Claim("tokens-per-hour", "Training runs at 30M tokens/hour on an H100", "15M to 45M", (15, 45), _rate),
    Claim("hours", "All three stages take 27 hours on an H100", "13.5 to 40.5 h", (13.5, 40.5), _hours),
    Claim(
        "stability",
        "Both architectures train stably",
        "no curve with a setback of a tenth of its start",
        (0, 0),
        _stable,
    ),
    Claim(
        "method-outweighs-model",
        "Evaluation method outweighs model quality",
        "more variance over templates than over models",
        (0, INFINITY),
        method_against_model,
    ),
)


def judge(comparison: Comparison, claims: tuple[Claim, ...] = CLAIMS) -> list[Verdict]:
    """Every claim's verdict, in the ledger's order."""
    return [claim.judge(comparison) for claim in claims]


def ledger(comparison: Comparison) -> Result:
    """The claims ledger as a table."""
    verdicts = judge(comparison)
    rows = [
        {
            "Claim": one.claim.claimed,
            "Read as": one.claim.reading,
            "Measured here": one.measured,
            "Verdict": one.verdict,
        }
        for one in verdicts
    ]
    values = {
        one.claim.key: {
            "verdict": one.verdict,
            "measured": one.measured,
            "low": one.finding.low if one.finding else None,
            "high": one.finding.high if one.finding else None,
        }
        for one in verdicts
    }
    return Result("comparison/claims", {"claims": values}, markdown=markdown_table(rows))


def counts(verdicts: list[Verdict]) -> dict[str, int]:
    """How many claims came out how."""
    return {
        name: sum(one.verdict == name for one in verdicts)
        for name in (SUPPORTED, CONTRADICTED, NOT_RESOLVED, NOT_MEASURED)
    }
