"""The findings that open the report, and the numbers that its prose quotes.

Each finding is a function of records: a sentence of at most `LONGEST` words (words.toml) with its number, its interval,
a link to the table or figure that holds the rest, and the numbers of its confounds. A difference is stated only where
`Difference.detected` says so; equivalence only where the whole interval lies within the measure's margin; everything
else is "no detectable difference".
"""

from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from papertrail.records import Markdown, escape, table
from study.comparison import attribution, claims, confounds, figures, length, seeds, training
from study.comparison.differences import ALPHA, BETTER, STAGES, UNRESOLVED, WORSE, Difference, compared
from study.comparison.load import Comparison
from study.comparison.measures import HEADLINE, MEASURES, PRIMARY, STAGED
from study.comparison.original import ORIGINAL
from study.comparison.recipes import FACETS, apart, sources
from study.comparison.results import WORDS, Result, compact, listed, percent, say, value_text
from study.preset import LINEAGE
from threefold.evaluation.statistics import holm, standard_error

MOST, LONGEST = 8, 30  # findings of the page, words of each (an interval counts as two)
QUOTED = ("perplexity", "minimal_pairs", "sentiment", "problems")  # measures whose protocol the prose names


@dataclass(frozen=True)
class Statement:
    """One sentence (Markdown), where the page holds the rest, and the records that it rests on."""

    key: str
    sentence: str
    link: str  # label of a table, figure or section of the page
    evidence: tuple[str, ...]
    differs: bool = False  # whether it claims that two things differ
    values: tuple[dict[str, Any], ...] = ()  # of each difference: change, interval, p, n, margin
    difference: Difference | None = None  # that the opening figure shows


def _of_difference(comparison: Comparison, key: str, one: Difference, link: str, *extra: str) -> Statement:
    """A finding on two models. extra: clauses that are added as long as the sentence stays short enough."""
    a, b = map(escape, one.names)
    margin = f"±{one.measure.size_text(one.measure.margin)}"
    sentence = say(one.verdict, a=a, b=b, measure=one.measure.title.lower(), change=one.text, margin=margin)
    facets = [FACETS[key] for key in apart(comparison, one.a, one.b)]
    able = one.detectable_text if one.verdict == UNRESOLVED else None
    numbers = confounds.marks(comparison, [one], confounds.numbered(comparison))
    marks = say("marks", marks=f"[{numbers}]({confounds.ANCHOR})") if numbers else ""
    clauses = [marks, *extra]
    clauses += [say("apart", apart=listed(facets))] if facets else []
    clauses += [say("able", able=able)] if able else []
    kept: list[str] = []
    for clause in clauses:
        if len(f"{sentence}{''.join(kept)}{clause}".split()) <= LONGEST:
            kept.append(clause)
    order = sorted(kept, key=lambda clause: clause == marks)  # the first to be kept, and the last to be read
    evidence = tuple(dict.fromkeys(row.record for row in one.rows if row is not None))
    differs = one.verdict in (BETTER, WORSE)
    return Statement(key, f"{sentence}{''.join(order)}.", link, evidence, differs, (one.values(),), one)


def against_baselines(comparison: Comparison) -> list[Statement]:
    """Our pretrained model against the first baseline by the primary measure; and the second, where no attribution says
    what a difference is due to."""
    most = 1 if reasons(comparison) else 2
    every, wanted = compared(comparison, *comparison.baselines), ("pretrain", PRIMARY["baseline"][0])
    found = [one for one in every if (one.b, one.measure.key) == wanted]
    return [_of_difference(comparison, f"against-{one.a}", one, "fig-baselines") for one in found[:most]]


def reasons(comparison: Comparison) -> list[Statement]:
    """How much of the difference from GPT-2's recipe each group of its parts accounts for."""
    links = attribution.found(comparison)
    total = attribution.of(links, attribution.TOTAL)
    groups = [one for one in links if one["kind"] == "group" and one["share"] is not None]
    if not groups:
        return []
    parts = listed([f"{attribution.GROUPS[one['group']]} {attribution.share_text(one)}" for one in groups])
    evidence = tuple(map(attribution.record_name, (total, *groups)))
    return [Statement("reasons", say("reasons", parts=parts, total=total), "fig-attribution", evidence, True)]


def stages(comparison: Comparison) -> list[Statement]:
    """What SFT and DPO each changed in what they are for; and what a DPO that changed nothing had to learn from."""
    found = []
    repeated = {(one.a, one.b, one.measure.key): one for one, _ in seeds.changes(comparison)}
    for one in compared(comparison, STAGES):
        if one.measure.key != PRIMARY[one.b][0]:
            continue
        again = repeated.get((one.a, one.b, one.measure.key))
        extra = [say("over-seeds", n=again.n, change=again.text)] if again else []
        extra += [_learned(comparison, one.b)] if one.verdict not in (BETTER, WORSE) else []
        found.append(_of_difference(comparison, one.b, one, "fig-stages", *extra))
    return found


def _learned(comparison: Comparison, stage: str) -> str:
    """Steps, examples and divergence from the reference of a stage."""
    known = comparison.values("data/sources").get("sources", ())
    examples = sum(one.get("documents", 0) for one in known if one.get("use") == stage)
    kl = comparison.metric(stage, comparison.protocol("preferences"), "kl")
    steps = (comparison.stage(stage).get("training") or {}).get("steps")
    parts = [f"{steps:,} steps"] if steps else []
    parts += [f"{examples:,} {'pairs' if stage == 'dpo' else 'examples'}"] if examples else []
    parts += [f"KL {value_text(kl, with_interval=False)}"] if kl and stage == "dpo" else []
    return f"; {', '.join(parts)}" if parts else ""


def sentiment(comparison: Comparison) -> list[Statement]:
    """The best of our stages that is above always giving the more frequent label, or the last stage where none is."""
    majority = comparison.majority
    rows = [comparison.value("sentiment", stage) for stage in comparison.lineage]
    rows = [row for row in rows if row is not None and row.low is not None]
    if not rows or majority is None:
        return []
    adjusted = holm([_p_against(row, majority) for row in rows])
    above = [row for row, p in zip(rows, adjusted, strict=True) if p < ALPHA and row.low > majority]
    row = max(above, key=lambda row: row.value, default=rows[-1])
    side = "above" if above else "below" if adjusted[-1] < ALPHA and row.high < majority else "level"
    fields = {"value": value_text(row), "majority": percent(majority), "side": WORDS["findings"]["sides"][side]}
    sentence = say("sentiment", b=comparison.name(row.model), **fields)
    return [Statement("sentiment", sentence, "tbl-sentiment", (row.record,), values=({"side": side},))]


def _p_against(row: Any, value: float) -> float:
    """Two-sided p-value that a figure is really this value, by the standard error of its interval."""
    off, error = abs(row.value - value), standard_error(row.low, row.high)
    return float(2 * stats.norm.sf(off / error)) if error else float(off == 0)


def problems(comparison: Comparison) -> list[Statement]:
    """How many word problems the last stage solves."""
    row = comparison.last("problems")
    if row is None:
        return []
    sentence = say("problems", b=comparison.name(row.model), value=value_text(row), n=row.n)
    return [Statement("problems", sentence, "tbl-tasks", (row.record,))]


def control(comparison: Comparison) -> list[Statement]:
    """Untrained weights that are not at chance, as they must be where the protocols leak nothing."""
    value, majority = comparison.value("sentiment", "random"), comparison.majority
    if value is None or value.low is None:
        return []
    least, most = sorted((0.5, majority or 0.5, 1 - (majority or 0.5)))[::2]
    p = _p_against(value, min(max(value.value, least), most))
    if p >= ALPHA / (1 + len(compared(comparison))):  # one test more, at its share of their 5%
        return []
    return [Statement("control", say("control", value=value_text(value)), "tbl-sentiment", (value.record,), True)]


def trust(comparison: Comparison) -> list[Statement]:
    """How far the figures move with the seed of training, as far as that was measured."""
    spreads = {(one.stage, one.measure.key): one for one in seeds.spreads(comparison)}
    spread = spreads.get(("pretrain", PRIMARY["baseline"][0]))
    if spread is None:
        return [] if comparison.replicates else [Statement("seeds", say("once"), "sec-limitations", ())]
    size, error = spread.measure.spread_text, spread.error_over_items
    sentence = say(
        "seeds",
        count=len(comparison.trainings),
        measure=spread.measure.title.lower(),
        sd=size(*spread.deviation[:3]),
        error=size(error) if error else "not known",
    )
    return [Statement("seeds", sentence, "tbl-seeds", (spread.first.record,), values=(spread.as_record(),))]


def ledger(comparison: Comparison) -> list[Statement]:
    """How the claims came out."""
    counted = claims.counts(claims.judge(comparison).values())
    if counted[claims.NOT_MEASURED] == sum(counted.values()):
        return []
    fields = {verdict.split(" here")[0].replace(" ", "_"): number for verdict, number in counted.items()}
    return [Statement("ledger", say("ledger", total=sum(counted.values()), **fields), "tbl-claims", ())]


def findings(comparison: Comparison) -> list[Statement]:
    """The page's findings in their order, at most `MOST`."""
    every = [control, against_baselines, reasons, stages, sentiment, problems, trust, ledger]
    return [one for made in every for one in made(comparison)][:MOST]


def notice(comparison: Comparison, preset: Any) -> Result:
    """What the run is, in the preset's words, and whether it is whole: the line that opens the page."""
    lines = [f"**{escape(preset.notice)}**" if preset.notice else escape(preset.description)]
    lines += [say("part", stages=listed([*comparison.absent]))] if comparison.absent else []
    timed = (comparison.settings(model, "speed") for model in comparison.models)
    used = next((one["other_processes_cores"] for one in timed if one.get("machine_busy")), None)
    lines += [] if used is None else [say("busy", used=used)]
    text = "\n\n".join(filter(None, lines))
    return Result("comparison/notice", {"text": text}, markdown=text or "No description.", empty=not text)


def opening(comparison: Comparison) -> Result:
    """The findings as a list."""
    found = findings(comparison)
    lines = [f"{number}. {one.sentence} [Evidence](#{one.link})" for number, one in enumerate(found, 1)]
    values = [asdict(one) | {"difference": None} for one in found]
    return Result("comparison/findings", {"findings": values}, markdown="\n".join(lines))


def figure(comparison: Comparison) -> Result:
    """The differences that the findings state."""
    found = [one.difference for one in findings(comparison) if one.difference is not None]
    return figures.forest("findings", comparison, found, columns=1)


# Numbers that the prose quotes ---------------------------------------------------------------------------------------


def variables(comparison: Comparison, run: str = "", preset: str = "") -> dict[str, str | None]:
    """Everything `index.qmd` quotes, as Markdown; None for what was not measured. What it quotes as code (run, preset,
    protocols) has names for values, which `check_name` and `records` restrict to characters that mean nothing there."""
    found = {one.stage: one for one in training.trainings(comparison, *LINEAGE)}
    size, several = training.total_parameters(comparison, "pretrain"), len(comparison.trainings)
    values = {
        "run": run,
        "preset": preset,
        "n_models": str(len(comparison.models) or ""),
        "models": listed([escape(comparison.name(model)) for model in comparison.models]),
        "parameters": compact(size) if size else "",
        "tokens_pretrain": compact(found["pretrain"].tokens) if "pretrain" in found else "",
        "device": listed([escape(device) for device in sorted({one.device for one in found.values()})]),
        "n_compared": str(len(compared(comparison)) or ""),
        "trained": f"{several} times" if several > 1 else "once",
        "resamples": f"{comparison.resamples:,}",
        "margins": listed([f"{margin} ({listed(titles)})" for margin, titles in _margins(comparison).items()]),
        "majority": "" if comparison.majority is None else percent(comparison.majority),
        "original_parameters": ORIGINAL["model"]["pretrain"]["parameters"],
        "original_commit": ORIGINAL["commit"],
        **{f"sources_{one}": listed([*map(escape, sorted(sources(comparison, one)))]) for one in LINEAGE},
        **{f"protocol_{key}": comparison.protocol(key) or "" for key in QUOTED},
    }
    return {name: value or None for name, value in values.items()} | length.variables(comparison)


def _margins(comparison: Comparison) -> dict[str, list[str]]:
    """Margin of equivalence -> the measures that have it, of those that were measured."""
    found: dict[str, list[str]] = {}
    for one in (MEASURES[key] for key in dict.fromkeys([*HEADLINE, *STAGED]) if comparison.protocol(key)):
        found.setdefault(one.size_text(one.margin), []).append(one.title.lower())
    return found


def publishable_variables(comparison: Comparison, run: str = "", preset: str = "") -> Result:
    """The record "variables", shown as a table of names and values."""
    values = variables(comparison, run, preset)
    rows = [{"Variable": name, "Value": value and Markdown(value)} for name, value in values.items()]
    return Result("variables", values, markdown=table(rows))
