"""Sentences drawn from records: each is a function's output, carries its evidence, and claims no more than it holds.

A difference is stated only where `Difference.detected` says so; equivalence only where the whole interval lies within
the measure's margin; everything else is "no detectable difference". Confounds are attached by the same functions, so
that a sentence cannot appear without them. The words are templates (words.toml).
"""

from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from papertrail.records import escape
from study.comparison import claims, confounds, models, seeds, training
from study.comparison.differences import ALPHA, BETTER, SINCE, STAGES, UNRESOLVED, VERDICTS, WORSE, Difference, compared
from study.comparison.load import Comparison
from study.comparison.results import NBSP, WORDS, Result, fill, listed, number_of, percent, say, value_text
from study.preset import LINEAGE
from threefold.evaluation.statistics import standard_error

ONCE = say("once")


@dataclass(frozen=True)
class Insight:
    """One sentence (Markdown), the names of the records it rests on, and what was computed from them."""

    key: str
    sentence: str
    evidence: tuple[str, ...]
    differs: bool = False  # whether it claims that two things differ
    values: tuple[dict[str, Any], ...] = ()  # of each difference: change, interval, p, n, margin
    confounds: tuple[str, ...] = ()  # keys of the caveats that the sentence carries


def names(comparison: Comparison, chosen: list[str] | tuple[str, ...]) -> str:
    """The models' names for a sentence: "GPT-2 (hub) and Threefold SFT"."""
    return listed([escape(comparison.name(model)) for model in chosen])


# Differences in words ------------------------------------------------------------------------------------------------


def _noted(one: Difference) -> str:
    """The change with its interval, and what a reader needs to take it rightly: both at zero, or the adjusted p."""
    if one.measure.unit == "share" and all(row is not None and row.value == 0 for row in one.rows):
        return f"both {percent(0)}, {one.text}"
    if one.identical:
        return f"{one.text}, the same result on all {one.n:,}"
    if one.leaves_out_zero and one.verdict == UNRESOLVED:
        return f"{one.text}, yet p{NBSP}={NBSP}{one.p_text} adjusted for {one.family} comparisons"
    return one.text


def in_detail(one: Difference) -> str:
    """A difference on one measure: both values, its interval, p and n where it was detected, else what was possible."""
    theirs, ours = (value_text(row, with_interval=False) for row in one.rows)
    margin = f"±{one.measure.size_text(one.measure.margin)}"
    fields = {
        "title": one.measure.title.lower(),
        "ours": ours,
        "theirs": theirs,
        "change": one.text,
        "p": f"p{NBSP}{one.p_text if one.p_text.startswith('<') else f'={NBSP}{one.p_text}'}",
        "n": number_of(one.n),
        "small": f", all of it within the margin of {margin}" if one.within_margin else "",
        "noted": _noted(one),
        "margin": margin,
        "able": f"; minimum detectable effect {one.detectable_text}" if one.detectable_text else "",
    }
    return fill(WORDS["differences"]["detail"][one.verdict], fields)


def _by_verdict(found: list[Difference]) -> dict[str, list[Difference]]:
    """The verdicts that occur, in their order, with their differences."""
    parts = {verdict: [one for one in found if one.verdict == verdict] for verdict in VERDICTS}
    return {verdict: part for verdict, part in parts.items() if part}


def _described(comparison: Comparison, key: str, words: str, found: list[Difference]) -> list[Insight]:
    """One insight a verdict that occurs, in the words of one table of words.toml."""
    insights = []
    for verdict, part in _by_verdict(found).items():
        a, b = map(escape, part[0].names)
        fields = {"a": a, "b": b, "what": listed([in_detail(one) for one in part])}
        sentence = fill(WORDS["differences"][words][verdict], fields)
        insights.append(_insight(comparison, f"{key}-{verdict.replace(' ', '-')}", sentence, part, part))
    return insights


def _insight(
    comparison: Comparison, key: str, sentence: str, found: list[Difference], about: list[Difference]
) -> Insight:
    """A sentence on differences with its evidence, and the confounds of those that it is `about`."""
    evidence = tuple(dict.fromkeys(row.record for one in found for row in one.rows if row is not None))
    keys, clause = confounds.clause(comparison, about)
    differs = any(one.verdict in (BETTER, WORSE) for one in found)
    return Insight(key, f"{sentence}{clause}", evidence, differs, tuple(one.values() for one in found), keys)


def _against(comparison: Comparison, baseline: str) -> list[Difference]:
    """Our last evaluated stage against a baseline."""
    last = next((model for model in reversed(LINEAGE) if model in comparison.models), "")
    return [one for one in compared(comparison, baseline) if one.b == last]


def standing(comparison: Comparison, baseline: str = "gpt2") -> list[Insight]:
    """Where our last stage exceeds, lags and matches a baseline, and where no difference was detected."""
    return _described(comparison, baseline, "standing", _against(comparison, baseline))


def stage_changes(comparison: Comparison) -> list[Insight]:
    """What SFT and DPO each changed, and what they left undetectably the same."""
    every = compared(comparison, STAGES)
    parts = {stage: [one for one in every if one.b == stage] for stage in LINEAGE[1:]}
    return [one for stage, part in parts.items() for one in _described(comparison, stage, STAGES, part)]


def since_pretraining(comparison: Comparison) -> list[Insight]:
    """What all stages after pretraining changed together."""
    return _described(comparison, SINCE, SINCE, compared(comparison, SINCE))


def stage_evolution(comparison: Comparison) -> list[Insight]:
    """Each stage against the one before, then the last against the first."""
    return [*stage_changes(comparison), *since_pretraining(comparison)]


def in_short(comparison: Comparison, key: str, found: list[Difference], basis: str = "") -> list[Insight]:
    """One sentence for a whole comparison: what is better, worse, equivalent and not resolved, and on what basis.

    Its confounds are those of what was resolved; where nothing was, all of them.
    """
    if not found:
        return []
    shown = []
    for verdict, part in _by_verdict(found).items():
        measured = listed([f"{one.measure.title.lower()} ({_noted(one)})" for one in part])
        shown.append(f"{verdict} in {measured}")
    a, b = map(escape, found[0].names)
    sentence = say("in-short", a=a, b=b, basis=f" ({basis})" if basis else "", parts="; ".join(shown))
    resolved = [one for one in found if one.verdict != UNRESOLVED]
    return [_insight(comparison, key, sentence, found, resolved or found)]


# Single findings -----------------------------------------------------------------------------------------------------


def stability(comparison: Comparison) -> list[Insight]:
    """Whether every stage trained steadily, and the largest setback of any. One curve a stage: no interval."""
    curves = training.curves(comparison)
    if not curves:
        return []
    worst, unsteady = training.worst(curves), [escape(curve.name) for curve in curves if not curve.stable]
    head = f"Not steady: {listed(unsteady)}, of {len(curves)} stages"
    all_of = f"All {len(curves)} stages" if len(curves) > 1 else escape(worst.name)
    sentence = say(
        "stability",
        head=head if unsteady else f"{all_of} trained steadily",
        setback=worst.setback,
        start=worst.start,
        stage=escape(worst.name),
    )
    values = tuple(
        {"stage": one.stage, "start": one.start, "end": one.end, "setback": one.setback, "steady": one.stable}
        for one in curves
    )
    return [Insight("stability", sentence, tuple(f"curve/{curve.stage}" for curve in curves), values=values)]


def control(comparison: Comparison) -> list[Insight]:
    """Whether untrained weights are at chance, as they must be where the protocols leak nothing."""
    value, majority = comparison.value("sentiment", "random"), comparison.majority
    if value is None or value.low is None:
        return []
    chance = f"chance 50%{f', majority class {percent(majority)}' if majority is not None else ''}"
    most, error = max(0.5, majority or 0.5), standard_error(value.low, value.high)
    off = max(min(0.5, 1 - (majority or 0.5)) - value.value, value.value - most, 0.0)
    p = float(2 * stats.norm.sf(off / error)) if error else float(off == 0)
    differs = p < ALPHA / (1 + len(compared(comparison)))  # one test more, at its share of their 5%
    words = "control-biased" if differs else "control"
    return [Insight("control", say(words, n=value.n, shown=value_text(value), chance=chance), (value.record,), differs)]


def definitions(comparison: Comparison) -> list[Insight]:
    """How far one model's perplexity moves with the definition of perplexity."""
    model = "pretrain" if "pretrain" in comparison.models else next(iter(comparison.models), "")
    units = {"word_perplexity": "per word", "perplexity": "per token"}
    found = {
        protocol: next((row for metric in units if (row := comparison.metric(model, protocol, metric))), None)
        for protocol in comparison.protocols
    }
    rows = sorted((row for row in found.values() if row is not None), key=lambda row: row.value)
    if len(rows) < 2:
        return []
    least, most = rows[0], max(rows, key=lambda row: row.value)
    under = [escape(f"{row.protocol}, {units[row.metric]}") for row in (least, most)]
    sentence = say(
        "definitions",
        model=names(comparison, [model]),
        least=least.value,
        least_under=under[0],
        most=most.value,
        most_under=under[1],
        factor=most.value / least.value,
    )
    return [Insight("definitions", sentence, tuple(dict.fromkeys(row.record for row in (least, most))))]


def prompts(comparison: Comparison) -> list[Insight]:
    """Spread over wordings beside the sampling error of the items."""
    protocol = comparison.protocol("sentiment")
    ends = {
        m: [comparison.metric(m, protocol, f"template_{end}") for end in ("lowest", "highest")]
        for m in comparison.models
    }
    spans = {model: high.value - low.value for model, (low, high) in ends.items() if low and high}
    if not spans:
        return []
    model = max(spans, key=spans.get)
    low, high = ends[model]
    value = comparison.value("sentiment", model)
    half = 100 * (value.high - value.low) / 2 if value and value.low is not None else None
    beside = "" if half is None else f", beside a sampling error of ±{half:.1f} pp"
    sentence = say("prompts", model=names(comparison, [model]), low=low.value, high=high.value, beside=beside)
    return [Insight("prompts", sentence, (low.record,))]


def seed_spread(comparison: Comparison) -> list[Insight]:
    """Which measures move more with the training seed than with the items, and which stage's change holds over seeds;
    after one training, that neither was measured."""
    if not comparison.replicates:
        return [Insight("seeds", ONCE, ())]
    stages, count = [stage for stage in LINEAGE if comparison.stage(stage)], len(comparison.trainings)
    began = listed([str(seed) for seed in seeds.seeds(comparison)])
    once = [name for name in models.BASELINES if comparison.stage(name) is not None]
    sentence = say(
        "trained",
        names=names(comparison, stages),
        count=count,
        began=f" (seeds {began})" if began else "",
        others=say("trained-others", names=names(comparison, once)) if once else "",
    )
    found = [Insight("seeds", sentence, tuple(f"stage/{stage}" for stage in stages))]
    spreads = seeds.spreads(comparison)
    for larger, words in ((seeds.OVER_SEEDS, "More"), (seeds.OVER_ITEMS, "Less"), (seeds.UNRESOLVED, "")):
        part = [one for one in spreads if one.larger == larger]
        if not part:
            continue
        sentence = say("spread-open", part=len(part), every=len(spreads), count=count)
        if words:
            sentence = say("spread", words=words, what=listed([_spread(comparison, one) for one in part]))
        evidence = tuple(dict.fromkeys(one.first.record for one in part))
        found.append(Insight(f"seeds-{larger.replace(' ', '-')}", sentence, evidence, differs=bool(words)))
    changes, basis = seeds.changes(comparison), f"mean of {count} seeds, Student's interval"
    for stage in LINEAGE[1:]:
        found += in_short(comparison, f"seeds-{stage}", [one for one, _ in changes if one.b == stage], basis)
    return found


def _spread(comparison: Comparison, one: seeds.Spread) -> str:
    sd, stage = one.measure.spread_text(*one.deviation[:3]), names(comparison, [one.stage])
    error = one.measure.spread_text(one.error_over_items)
    return say("spread-of", measure=one.measure.title.lower(), stage=stage, sd=sd, error=error)


def cost(comparison: Comparison) -> list[Insight]:
    """What the three stages took."""
    found = training.trainings(comparison, *LINEAGE)
    if not found:
        return []
    sentence = say(
        "cost",
        names=names(comparison, [one.stage for one in found]),
        tokens=sum(one.tokens for one in found),
        seconds=sum(one.seconds for one in found),
        devices=listed(sorted({one.device for one in found})),
    )
    return [Insight("cost", sentence, tuple(f"stage/{one.stage}" for one in found))]


def ledger(comparison: Comparison) -> list[Insight]:
    """How the claims came out."""
    number = claims.counts(claims.judge(comparison).values())
    counted = dict(zip(("supported", "contradicted", "open", "missing"), number.values(), strict=True))
    total = sum(number.values())
    return [Insight("ledger", say("ledger", total=total, **counted), ())] if counted["missing"] < total else []


def key_insights(comparison: Comparison) -> list[Insight]:
    """The report's list, in its order."""
    changes = compared(comparison, STAGES)
    short = {stage: [one for one in changes if one.b == stage] for stage in LINEAGE[1:]}
    short |= {baseline: _against(comparison, baseline) for baseline in models.BASELINES}
    return [
        *control(comparison),
        *(one for key, part in short.items() for one in in_short(comparison, key, part)),
        *definitions(comparison),
        *prompts(comparison),
        *(one for one in seed_spread(comparison) if one.differs),
        *cost(comparison),
        *ledger(comparison),
    ]


# Publishing ----------------------------------------------------------------------------------------------------------


def bullets(name: str, insights: list[Insight], otherwise: str, comparison: Comparison | None = None) -> Result:
    """A list of sentences as a record; `otherwise` stands where there is none.

    comparison: where the records are; each sentence then ends with links to the notebooks that made them, as they lie
    beside the rendered report.
    """
    known, values, lines = comparison.records if comparison else {}, [], []
    for one in insights:
        notebooks = list(dict.fromkeys(known[name].notebook for name in one.evidence if name in known))
        links = [f"[{escape(file.removesuffix('.ipynb'))}](executed/{file})" for file in notebooks]
        lines.append(f"- {one.sentence}{f' (From {listed(links)}.)' if links else ''}")
        values.append(asdict(one) | {"notebooks": notebooks})
    return Result(f"comparison/{name}", {"insights": values}, markdown="\n".join(lines) or otherwise, empty=not lines)
