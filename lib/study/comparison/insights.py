"""Sentences drawn from records: each is a function's output, carries its evidence, and claims no more than it holds.

A difference is stated only where `Difference.detected` says so; equivalence only where the whole interval lies within
the measure's margin; everything else is "no detectable difference". Confounds are attached by the same functions, so
that a sentence cannot appear without them.
"""

from dataclasses import dataclass
from typing import Any

from scipy import stats

from papertrail.records import Markdown, escape, table
from study.comparison import attention, caveats, claims, length, models, seeds, tables, training
from study.comparison.differences import ALPHA, BETTER, EQUIVALENT, UNRESOLVED, WORSE, Difference
from study.comparison.load import Comparison
from study.comparison.measures import BITS_PER_BYTE, PERPLEXITY, PROBLEMS, SENTIMENT
from study.comparison.results import NBSP, Result, compact, duration, listed, percent, plain
from study.preset import LINEAGE, OWN_MODELS

ONCE = "Every stage was trained once: no interval here holds the spread between training seeds."


@dataclass(frozen=True)
class Insight:
    """One sentence (Markdown), the names of the records it rests on, and what was computed from them."""

    key: str
    sentence: str
    evidence: tuple[str, ...]
    differs: bool = False  # whether it claims that two things differ
    values: tuple[dict[str, Any], ...] = ()  # of each difference: change, interval, p, n, margin
    confounds: tuple[str, ...] = ()  # keys of the caveats that the sentence carries


def _evidence(comparison: Comparison, protocol: str | None, *names: str) -> tuple[str, ...]:
    return tuple(
        f"evaluation/{model}/{protocol}" for model in names if f"evaluation/{model}/{protocol}" in comparison.records
    )


# Differences in words ------------------------------------------------------------------------------------------------


def _values(comparison: Comparison, one: Difference) -> str:
    """A detected difference with both values, its interval, p and n."""
    ours, theirs = (
        one.measure.text(one.measure.value(comparison, model), with_interval=False) for model in (one.b, one.a)
    )
    p = one.p_text if one.p_text.startswith("<") else f"={NBSP}{one.p_text}"
    small = f", all of it within the margin of {_margin(one)}" if one.within_margin else ""
    return (
        f"{one.measure.title.lower()} ({ours} against {theirs}; {one.text}, p{NBSP}{p}, n{NBSP}={NBSP}{one.n:,}{small})"
    )


def _margin(one: Difference) -> str:
    return f"±{one.measure.size_text(one.measure.margin)}"


def _change(comparison: Comparison, one: Difference) -> str:
    """The change with its interval, and what a reader needs to take it rightly: both at zero, or the adjusted p."""
    values = [one.measure.value(comparison, model) for model in (one.b, one.a)]
    if one.measure.kind == "share" and all(value is not None and value.value == 0 for value in values):
        return f"both {percent(0)}, {one.text}"
    if one.identical:
        return f"{one.text}, the same result on all {one.n:,}"
    outside = one.low is not None and one.high is not None and (one.low > 0 or one.high < 0)
    if outside and one.verdict == UNRESOLVED:
        return f"{one.text}, yet p{NBSP}={NBSP}{one.p_text} adjusted for {one.family} comparisons"
    return one.text


def _equivalent(comparison: Comparison, one: Difference) -> str:
    return f"{one.measure.title.lower()} ({_change(comparison, one)}, margin {_margin(one)})"


def _unresolved(comparison: Comparison, one: Difference) -> str:
    least = tables.detectable_text(one)
    able = f"; minimum detectable effect {least}" if least else ""
    return f"{one.measure.title.lower()} ({_change(comparison, one)}{able})"


_WORDS = {BETTER: _values, WORSE: _values, EQUIVALENT: _equivalent, UNRESOLVED: _unresolved}


def _described(comparison: Comparison, key: str, found: list[Difference], sentences: dict[str, str]) -> list[Insight]:
    """One insight a verdict that occurs; `sentences` hold {b}, {a} and {what}."""
    insights = []
    for verdict, sentence in sentences.items():
        part = [one for one in found if one.verdict == verdict]
        if not part:
            continue
        ours, theirs = (escape(comparison.name(model)) for model in (part[0].b, part[0].a))
        what = listed([_WORDS[verdict](comparison, one) for one in part])
        text = sentence.format(b=ours, a=theirs, what=what)
        insights.append(
            _insight(comparison, f"{key}-{verdict.replace(' ', '-')}", text, part, verdict in (BETTER, WORSE))
        )
    return insights


def _insight(
    comparison: Comparison,
    key: str,
    sentence: str,
    found: list[Difference],
    differs: bool,
    about: list[Difference] | None = None,
) -> Insight:
    """A sentence with its evidence, and the confounds of the differences it is `about` (all that were found)."""
    evidence = [name for one in found for name in _evidence(comparison, one.measure.protocol(comparison), one.a, one.b)]
    keys, clause = caveats.clause(comparison, found if about is None else about)
    values = tuple(one.values() for one in found)
    return Insight(key, f"{sentence}{clause}", tuple(dict.fromkeys(evidence)), differs, values, keys)


def _against(comparison: Comparison, baseline: str) -> list[Difference]:
    """Our last evaluated stage against a baseline, adjusted as in the table of all stages."""
    model = next((m for m in reversed(LINEAGE) if m in comparison.models), "")
    return [one for one in tables.against(comparison, baseline) if one.b == model]


def standing(comparison: Comparison, baseline: str = "gpt2") -> list[Insight]:
    """Where our last stage exceeds, lags and matches a baseline, and where that cannot be told."""
    sentences = {
        BETTER: "**{b} exceeds {a}** in {what}.",
        WORSE: "**{b} lags {a}** in {what}.",
        EQUIVALENT: "**{b} matches {a}** in {what}.",
        UNRESOLVED: "Between {b} and {a} there is **no detectable difference** in {what}.",
    }
    return _described(comparison, f"{baseline}", _against(comparison, baseline), sentences)


def stage_changes(comparison: Comparison) -> list[Insight]:
    """What SFT and DPO each changed, and what they left undetectably the same."""
    every = tables.stage_changes(comparison)
    sentences = {
        BETTER: "**{b} improves on {a}** in {what}.",
        WORSE: "**{b} loses against {a}** in {what}.",
        EQUIVALENT: "{b} is equivalent to {a} in {what}.",
        UNRESOLVED: "From {a} to {b} there is **no detectable difference** in {what}.",
    }
    return [
        insight
        for stage in LINEAGE[1:]
        for insight in _described(comparison, stage, [one for one in every if one.b == stage], sentences)
    ]


def since_pretraining(comparison: Comparison) -> list[Insight]:
    """What all stages after pretraining changed together."""
    sentences = {
        BETTER: "**Since pretraining, {b} has improved** in {what}.",
        WORSE: "**Since pretraining, {b} has lost** in {what}.",
        EQUIVALENT: "Since pretraining, {b} is equivalent in {what}.",
        UNRESOLVED: "Between {a} and {b} there is **no detectable difference** in {what}.",
    }
    return _described(comparison, "since-pretraining", tables.since_pretraining(comparison), sentences)


def stage_evolution(comparison: Comparison) -> list[Insight]:
    """Each stage against the one before, then the last against the first."""
    return [*stage_changes(comparison), *since_pretraining(comparison)]


def stability(comparison: Comparison) -> list[Insight]:
    """Whether every stage trained steadily, and the largest setback of any. One curve a stage: no interval."""
    found = training.curves(comparison)
    if not found:
        return []
    worst = max(found, key=lambda one: one.setback / one.start)
    largest = (
        f"the largest setback of a running loss is {plain(worst.setback, 3)} of {plain(worst.start, 3)} nats "
        f"({escape(comparison.name(worst.stage))})"
    )
    unsteady = listed([escape(comparison.name(one.stage)) for one in found if not one.stable])
    count = len(found)
    head = f"Not steady: {unsteady}, of {count} stages" if unsteady else f"All {count} stages trained steadily"
    evidence = tuple(f"curve/{one.stage}" for one in found)
    values = tuple(
        {"stage": one.stage, "start": one.start, "end": one.end, "setback": one.setback, "steady": one.stable}
        for one in found
    )
    return [Insight("stability", f"{head}; {largest}.", evidence, values=values)]


def in_short(comparison: Comparison, key: str, found: list[Difference], basis: str = "") -> list[Insight]:
    """One sentence for a whole comparison: what is better, worse, equivalent and not resolved, and on what basis.

    Its confounds are those of what was resolved; where nothing was, all of them.
    """
    if not found:
        return []
    parts = []
    for verdict in (BETTER, WORSE, EQUIVALENT, UNRESOLVED):
        part = [one for one in found if one.verdict == verdict]
        if part:
            shown = [f"{one.measure.title.lower()} ({_change(comparison, one)})" for one in part]
            parts.append(f"{verdict} in {listed(shown)}")
    ours, theirs = (escape(comparison.name(model)) for model in (found[0].b, found[0].a))
    sentence = f"**{ours} against {theirs}**{f' ({basis})' if basis else ''}: {'; '.join(parts)}."
    resolved = [one for one in found if one.verdict != UNRESOLVED]
    differs = any(one.verdict in (BETTER, WORSE) for one in resolved)
    return [_insight(comparison, key, sentence, found, differs, about=resolved or found)]


# Single findings -----------------------------------------------------------------------------------------------------


def control(comparison: Comparison) -> list[Insight]:
    """Whether untrained weights are at chance, which tells that the protocols leak nothing."""
    value = SENTIMENT.value(comparison, "random") if "random" in comparison.models else None
    if value is None or value.low is None:
        return []
    majority = tables.majority_class(comparison)
    shown = SENTIMENT.text(value)
    chance = f"chance 50%{f', majority class {percent(majority)}' if majority is not None else ''}"
    low, high = min(0.5, 1 - (majority or 0.5)), max(0.5, majority or 0.5)
    off = max(low - value.value, value.value - high, 0.0)
    error = (value.high - value.low) / (2 * float(stats.norm.ppf(0.975)))
    p = float(2 * stats.norm.sf(off / error)) if error else float(off == 0)
    # One more test beside those of `tables.compared`, at its share of their 5%.
    if p >= ALPHA / (1 + len(tables.compared(comparison))):
        sentence = (
            f"The random control answers sentiment at chance as far as {value.n:,} items tell ({shown}; {chance})."
        )
        return [Insight("control", sentence, _evidence(comparison, value.protocol, "random"))]
    sentence = f"The random control is **not** at chance in sentiment ({shown}; {chance}): a bias to explain."
    return [Insight("control", sentence, _evidence(comparison, value.protocol, "random"), differs=True)]


def definitions(comparison: Comparison) -> list[Insight]:
    """How far one model's perplexity moves with the definition of perplexity."""
    model = next((m for m in ("pretrain", *comparison.models) if m in comparison.models), None)
    if model is None:
        return []
    shown = {}
    for protocol in comparison.protocols:
        for metric in ("word_perplexity", "perplexity"):
            value = comparison.metric(model, protocol, metric)
            if value is not None:
                shown[f"{protocol}, per {'word' if metric == 'word_perplexity' else 'token'}"] = value.value
                break
    if len(shown) < 2:
        return []
    least, most = min(shown, key=shown.get), max(shown, key=shown.get)
    sentence = (
        f"The same weights ({escape(comparison.name(model))}) have a perplexity of {plain(shown[least])} "
        f"({escape(least)}) or "
        f"{plain(shown[most])} ({escape(most)}): a factor of {shown[most] / shown[least]:.2f} by definition alone."
    )
    names = dict.fromkeys(title.partition(",")[0] for title in (least, most))
    return [Insight("definitions", sentence, tuple(f"evaluation/{model}/{name}" for name in names))]


def prompts(comparison: Comparison) -> list[Insight]:
    """Spread over wordings beside the sampling error of the items."""
    protocol = SENTIMENT.protocol(comparison)
    widest = None
    for model in comparison.models:
        low = comparison.metric(model, protocol, "template_lowest") if protocol else None
        high = comparison.metric(model, protocol, "template_highest") if protocol else None
        if low and high and (widest is None or high.value - low.value > widest[2].value - widest[1].value):
            widest = (model, low, high)
    if widest is None:
        return []
    model, low, high = widest
    value = SENTIMENT.value(comparison, model)
    half = (value.high - value.low) / 2 if value and value.low is not None else None
    beside = f", beside a sampling error of ±{100 * half:.1f} pp" if half is not None else ""
    sentence = (
        f"Over the wordings of the prompt, the sentiment accuracy of {escape(comparison.name(model))} spans "
        f"{percent(low.value)} "
        f"to {percent(high.value)}{beside}: the widest span of any model here."
    )
    return [Insight("prompts", sentence, _evidence(comparison, protocol, model))]


def seed_spread(comparison: Comparison) -> list[Insight]:
    """Which measures move more with the training seed than with the items, and which stage's change holds over seeds;
    after one training, that neither was measured."""
    if not comparison.replicates:
        return [Insight("seeds", ONCE, ())]
    count = len(seeds.trainings(comparison))
    names = listed([escape(comparison.name(stage)) for stage in LINEAGE if comparison.stage(stage)])
    began = seeds.seeds(comparison)
    sentence = (
        f"{names} were trained {count} times{f' (seeds {listed([str(seed) for seed in began])})' if began else ''}, on "
        "the same text and measured on the same items."
    )
    others = [name for name in models.BASELINES if comparison.is_trained_here(name)]
    if others:
        sentence += f" {listed([escape(comparison.name(name)) for name in others])}: once, seed spread not measured."
    found = [Insight("seeds", sentence, _stages(comparison))]
    spreads = seeds.spreads(comparison)
    for larger, words in ((seeds.OVER_SEEDS, "More"), (seeds.OVER_ITEMS, "Less")):
        part = [one for one in spreads if one.larger == larger]
        if part:
            sentence = f"**{words} over training seeds than over items** varies "
            sentence += f"{listed([_spread(comparison, one) for one in part])}."
            found.append(Insight(f"seeds-{larger.replace(' ', '-')}", sentence, _spread_evidence(part), differs=True))
    part = [one for one in spreads if one.larger == seeds.UNRESOLVED]
    if part:
        sentence = (
            f"For {len(part)} of {len(spreads)} figures {count} seeds do not tell which spread is the larger one."
        )
        found.append(Insight("seeds-not-resolved", sentence, _spread_evidence(part)))
    for stage in LINEAGE[1:]:
        part = [one for one, _ in seeds.changes(comparison) if one.b == stage]
        found += in_short(comparison, f"seeds-{stage}", part, f"mean of {count} seeds, Student's interval")
    return found


def _stages(comparison: Comparison) -> tuple[str, ...]:
    """Records of the lineage's first training; those of the replicates stand in the table of provenance."""
    return tuple(f"stage/{stage}" for stage in LINEAGE if comparison.stage(stage))


def _spread(comparison: Comparison, one: seeds.Spread) -> str:
    s, error = one.measure.spread_text(*one.deviation[:3]), one.measure.spread_text(one.error)
    what = f"{one.measure.title.lower()} of {escape(comparison.name(one.stage))}"
    return f"{what} (sd {s}, standard error over items {error})"


def _spread_evidence(found: list[seeds.Spread]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"evaluation/{one.stage}/{one.first.protocol}" for one in found))


def cost(comparison: Comparison) -> list[Insight]:
    """What the three stages took."""
    found = [one for one in training.trainings(comparison) if one.stage in LINEAGE]
    if not found:
        return []
    tokens, seconds = sum(one.tokens for one in found), sum(one.seconds for one in found)
    devices = listed(sorted({one.device for one in found}))
    names = listed([escape(comparison.name(one.stage)) for one in found])
    sentence = f"{names} took {compact(tokens)} tokens and {duration(seconds)} in all ({devices})."
    return [Insight("cost", sentence, tuple(f"stage/{one.stage}" for one in found))]


def ledger(comparison: Comparison) -> list[Insight]:
    """How the claims came out."""
    number = claims.counts(claims.judge(comparison).values())
    verbs = {
        claims.SUPPORTED: "supports {}",
        claims.CONTRADICTED: "contradicts {}",
        claims.NOT_RESOLVED: "leaves {} unresolved",
        claims.NOT_MEASURED: "does not measure {}",
    }
    shown = listed([verbs[verdict].format(count) for verdict, count in number.items()])
    total = sum(number.values())
    return [Insight("ledger", f"Of {total} claims that comparisons of this kind make, this run {shown}.", ())]


def key_insights(comparison: Comparison) -> list[Insight]:
    """The report's list, in its order."""
    changes = tables.stage_changes(comparison)
    return [
        *control(comparison),
        *(one for stage in LINEAGE[1:] for one in in_short(comparison, stage, [d for d in changes if d.b == stage])),
        *in_short(comparison, "gpt2", _against(comparison, "gpt2")),
        *in_short(comparison, "distilgpt2", _against(comparison, "distilgpt2")),
        *definitions(comparison),
        *prompts(comparison),
        *(one for one in seed_spread(comparison) if one.differs),
        *cost(comparison),
        *ledger(comparison),
    ]


# Confounds and limits ------------------------------------------------------------------------------------------------


def confounds(comparison: Comparison) -> list[Insight]:
    """What stands between these numbers and a general statement; each line follows from a record."""
    found: list[Insight] = []

    def add(key: str, sentence: str, *evidence: str) -> None:
        found.append(Insight(key, sentence, evidence))

    here = [name for name in models.BASELINES if name in comparison.models and comparison.is_trained_here(name)]
    if here:
        shown = listed([escape(comparison.name(name)) for name in here])
        are = "carry" if len(here) > 1 else "carries"
        add(
            "baseline",
            f"{shown} {are} the architecture's name, not the published weights: trained here, on this run's text and "
            f"budget. "
            "Nothing here says how the published models would fare.",
            *(f"stage/{name}" for name in here),
        )
    found += _in_domain(comparison)
    strangers = [
        m
        for m in comparison.models
        if "pretrain" in comparison.models and not comparison.share_tokenizer(m, "pretrain")
    ]
    if strangers:
        add(
            "tokenizer",
            f"{listed([escape(comparison.name(m)) for m in strangers])} cut text into other tokens than Threefold: "
            f"only bits per "
            "byte compare.",
            *(f"evaluation/{m}/{PERPLEXITY.protocol(comparison)}" for m in strangers),
        )
    found += _sizes(comparison)
    if not comparison.replicates:
        add("seeds", ONCE)
    else:
        add(
            "seeds",
            f"Outside the section on seeds, every interval holds the sampling of items for the first of "
            f"{len(seeds.trainings(comparison))} trainings, not the spread between training seeds; baselines and "
            "the random control have one seed each.",
            *_stages(comparison),
        )
    if not tables.measured_by_turns(comparison) and any(
        "speed" in comparison.evaluations(m) for m in comparison.models
    ):
        add(
            "speed",
            "Models were timed in separate processes, one after another or side by side: the speed table describes, "
            "and a ratio "
            "of two of its rows is not a result.",
        )
    return found


def _in_domain(comparison: Comparison) -> list[Insight]:
    trained = caveats.sources(comparison, *LINEAGE)
    zero_shot = [m for m in comparison.models if m != "random" and not comparison.is_trained_here(m)]
    hits: dict[str, str] = {}
    for model in comparison.models:
        for record in comparison.evaluations(model).values():
            note = record.get("settings", {}).get("data") or {}
            family = caveats.family(note.get("source", ""))
            for source in trained:
                if family and caveats.family(source) == family:
                    hits[note["source"]] = source
    if not hits:
        return []
    shown = listed([escape(name) for name in sorted(hits)])
    sentence = f"Threefold trained on other parts of what it is tested on ({shown})"
    if zero_shot:
        others = listed([escape(comparison.name(m)) for m in zero_shot])
        sentence += f"; {others} did not, as far as is known: in-domain training meets zero-shot use there"
    return [Insight("in-domain", f"{sentence}.", tuple(f"stage/{s}" for s in LINEAGE if comparison.stage(s)))]


def _sizes(comparison: Comparison) -> list[Insight]:
    """Sub-sampled sets and few units, with their n."""
    model = next((m for m in ("dpo", "pretrain", *comparison.models) if m in comparison.models), None)
    if model is None:
        return []
    parts, evidence = [], []
    for protocol, record in comparison.evaluations(model).items():
        settings = record.get("settings", {})
        if (settings.get("data") or {}).get("subsampled"):
            n = settings.get("items") or settings.get("documents") or settings["data"].get("examples")
            parts.append(f"{escape(protocol)} (n = {n:,})")
            evidence.append(f"evaluation/{model}/{protocol}")
    insights = []
    if parts:
        insights.append(Insight("subsampled", f"Sets used in part only: {listed(parts)}.", tuple(evidence)))
    value = PERPLEXITY.value(comparison, model)
    if value is not None and value.n is not None and value.n < 100:
        sentence = (
            f"Perplexity intervals resample {value.n} document{'s' if value.n != 1 else ''}, too few for a percentile "
            f"interval to be "
            "exact; paired differences over the same documents are steadier than the intervals of the values."
        )
        insights.append(Insight("documents", sentence, _evidence(comparison, value.protocol, model)))
    return insights


# Publishing ----------------------------------------------------------------------------------------------------------


def bullets(name: str, insights: list[Insight], otherwise: str, comparison: Comparison | None = None) -> Result:
    """A list of sentences as a record; `otherwise` stands where there is none.

    comparison: where the records are; each sentence then ends with links to the notebooks that made them, as they lie
    beside the rendered report.
    """

    def shown(one: Insight) -> dict[str, Any]:
        return {
            "key": one.key,
            "sentence": one.sentence,
            "evidence": list(one.evidence),
            "notebooks": _notebooks(comparison, one),
            "values": list(one.values),
            "confounds": list(one.confounds),
            "differs": one.differs,
        }

    values = [shown(one) for one in insights]
    lines = [f"- {one['sentence']}{_links(one['notebooks'])}" for one in values]
    return Result(f"comparison/{name}", {"insights": values}, markdown="\n".join(lines) or otherwise)


def _notebooks(comparison: Comparison | None, one: Insight) -> list[str]:
    """Files of the notebooks that made the evidence, each once."""
    known = comparison.records if comparison else {}
    return list(dict.fromkeys(known[name].notebook for name in one.evidence if name in known))


def _links(notebooks: list[str]) -> str:
    """ " (from [04_evaluate-sft](executed/04_evaluate-sft.ipynb))": where the report keeps its notebooks."""
    if not notebooks:
        return ""
    links = [f"[{escape(name.removesuffix('.ipynb'))}](executed/{name})" for name in notebooks]
    return f" (From {listed(links)}.)"


# Numbers for prose ---------------------------------------------------------------------------------------------------


def variables(comparison: Comparison, run: str = "", preset: str = "") -> dict[str, str]:
    """Everything `index.qmd` quotes, as Markdown. What it quotes as code (run, preset, protocols) has names for values,
    which `check_name` and `records` restrict to characters that mean nothing there."""
    found = training.trainings(comparison)
    lineage = [one for one in found if one.stage in LINEAGE]
    verdicts = claims.counts(claims.judge(comparison).values())
    values = {
        "run": run or "–",
        "preset": preset or "–",
        "n_models": str(len(comparison.models)),
        "models": listed([escape(comparison.name(m)) for m in comparison.models]),
        "n_protocols": str(len(comparison.protocols)),
        "n_evaluations": str(sum(len(comparison.evaluations(m)) for m in comparison.models)),
        "parameters": _parameters(comparison, "pretrain"),
        "parameters_gpt2": _parameters(comparison, "gpt2"),
        "gpt2": escape(comparison.name("gpt2")),
        "distilgpt2": escape(comparison.name("distilgpt2")),
        "tokens_pretrain": compact(sum(one.tokens for one in lineage if one.stage == "pretrain")),
        "tokens_total": compact(sum(one.tokens for one in lineage)),
        "training_time": duration(sum(one.seconds for one in lineage)),
        "device": listed([escape(device) for device in sorted({one.device for one in lineage})]) or "–",
        "sources_pretrain": _sources(comparison, "pretrain") or "–",
        "sources_sft": _sources(comparison, "sft") or "–",
        "sources_dpo": _sources(comparison, "dpo") or "–",
        "n_claims": str(sum(verdicts.values())),
        "n_supported": str(verdicts[claims.SUPPORTED]),
        "n_contradicted": str(verdicts[claims.CONTRADICTED]),
        "n_not_resolved": str(verdicts[claims.NOT_RESOLVED]),
        "n_not_measured": str(verdicts[claims.NOT_MEASURED]),
        "n_compared": str(len(tables.compared(comparison))),
        "trained": f"{len(seeds.trainings(comparison))} times" if comparison.replicates else "once",
        "resamples": f"{comparison.resamples:,}",
        "majority": percent(tables.majority_class(comparison))
        if tables.majority_class(comparison) is not None
        else "–",
    }
    for measure in (PERPLEXITY, BITS_PER_BYTE, SENTIMENT, PROBLEMS):
        values[f"protocol_{measure.key}"] = measure.protocol(comparison) or "–"
    for measure in (*tables.HEADLINE, *tables.STAGED):
        for model in OWN_MODELS:
            values[f"{measure.key}_{model}"] = measure.text(measure.value(comparison, model)) or "not measured"
    values["perplexity_gap"] = _gap(comparison)
    return values | length.variables(comparison) | attention.variables(comparison)


def _sources(comparison: Comparison, stage: str) -> str:
    return listed([escape(name) for name in sorted(caveats.sources(comparison, stage))])


def _parameters(comparison: Comparison, model: str) -> str:
    total = training.total_parameters(comparison, model)
    return compact(total) if total else "–"


def _gap(comparison: Comparison) -> str:
    """Bits per byte of our pretrained model against GPT-2, as the comparison allows to say it."""
    one = next(
        (d for d in tables.against(comparison, "gpt2") if d.b == "pretrain" and d.measure is BITS_PER_BYTE), None
    )
    if one is None:
        return "not measured"
    confounds = "".join(f"; {caveat.text}" for caveat in caveats.of(comparison, one))
    return f"{one.verdict} ({one.text} bits per byte{confounds})"


def publishable_variables(comparison: Comparison, run: str = "", preset: str = "") -> Result:
    """The record "variables", shown as a table of names and values."""
    values = variables(comparison, run, preset)
    rows = [{"Variable": name, "Value": Markdown(value)} for name, value in values.items()]
    return Result("variables", values, markdown=table(rows))
