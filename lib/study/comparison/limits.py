"""What stands between a run's numbers and a general statement, and the numbers that the report's prose quotes."""

from papertrail.records import Markdown, escape, table
from study.comparison import claims, confounds, length, models, training
from study.comparison.differences import compared
from study.comparison.insights import ONCE, Insight, names
from study.comparison.load import Comparison
from study.comparison.measures import HEADLINE, STAGED
from study.comparison.results import Result, compact, count, duration, listed, percent, say, value_text
from study.preset import LINEAGE, OWN_MODELS


def limitations(comparison: Comparison) -> list[Insight]:
    """The confounds of the whole run; each line follows from a record."""
    found: list[Insight] = []

    def add(key: str, sentence: str, *evidence: str) -> None:
        found.append(Insight(key, sentence, evidence))

    if comparison.absent:
        add("part", say("part", stages=listed([*comparison.absent])))
    here = [name for name in models.BASELINES if name in comparison.models and comparison.stage(name) is not None]
    stages = [f"stage/{stage}" for stage in LINEAGE if comparison.stage(stage)]
    if here:
        carry = "carry" if len(here) > 1 else "carries"
        sentence = say("baseline", names=names(comparison, here), carry=carry)
        add("baseline", sentence, *(f"stage/{name}" for name in here))
    if tested := _trained_on(comparison):
        strangers = [model for model in comparison.models if model != "random" and comparison.stage(model) is None]
        others = say("in-domain-others", names=names(comparison, strangers)) if strangers else ""
        add("in-domain", say("in-domain", sources=listed([*map(escape, tested)]), others=others), *stages)
    others = [model for model in comparison.models if not comparison.share_tokenizer(model, "pretrain")]
    if others and "pretrain" in comparison.models:
        protocol = comparison.protocol("perplexity")
        records = [comparison.record(model, protocol) for model in others]
        add("tokenizer", say("tokenizer", names=names(comparison, others)), *records)
    model = next((m for m in ("dpo", "pretrain", *comparison.models) if m in comparison.models), "")
    subsampled = _subsampled(comparison, model)
    if subsampled:
        sets = listed([f"{escape(protocol)} (n = {n:,})" for protocol, n in subsampled.items()])
        add("subsampled", say("subsampled", sets=sets), *(comparison.record(model, name) for name in subsampled))
    value = comparison.value("perplexity", model)
    if value is not None and value.n is not None and value.n < 100:
        add("documents", say("documents", n=count(value.n, "document")), value.record)
    if comparison.replicates:
        add("seeds", say("seeds", count=len(comparison.trainings)), *stages)
    else:
        add("seeds", ONCE)
    if not comparison.timed_together and "speed" in comparison.protocols:
        add("speed", say("speed"))
    return found


def _trained_on(comparison: Comparison) -> list[str]:
    """The sources of evaluations of whose family our stages trained on other parts."""
    families = {confounds.family(source) for source in confounds.sources(comparison, *LINEAGE)}
    every = [values for model in comparison.models for values in comparison.evaluations(model).values()]
    tested = {(values.get("settings", {}).get("data") or {}).get("source", "") for values in every}
    return sorted(source for source in tested if source and confounds.family(source) in families)


def _subsampled(comparison: Comparison, model: str) -> dict[str, int]:
    """Protocol -> number of items, of the sets that a model was asked in part only."""
    found = {}
    for protocol in comparison.evaluations(model):
        settings = comparison.settings(model, protocol)
        if (settings.get("data") or {}).get("subsampled"):
            found[protocol] = settings.get("items") or settings.get("documents") or settings["data"].get("examples")
    return found


def variables(comparison: Comparison, run: str = "", preset: str = "") -> dict[str, str | None]:
    """Everything `index.qmd` quotes, as Markdown; None for what was not measured. What it quotes as code (run, preset,
    protocols) has names for values, which `check_name` and `records` restrict to characters that mean nothing there."""
    stages = {one.stage: one for one in training.trainings(comparison, *LINEAGE)}
    verdicts = claims.counts(claims.judge(comparison).values())
    sizes = [training.total_parameters(comparison, model) for model in ("pretrain", "gpt2")]
    values = {
        "run": run,
        "preset": preset,
        "n_models": str(len(comparison.models) or ""),
        "models": names(comparison, comparison.models),
        "n_protocols": str(len(comparison.protocols) or ""),
        "n_evaluations": str(sum(len(comparison.evaluations(model)) for model in comparison.models) or ""),
        "parameters": compact(sizes[0]) if sizes[0] else "",
        "parameters_gpt2": compact(sizes[1]) if sizes[1] else "",
        **{name: names(comparison, [name] if name in comparison.models else []) for name in models.BASELINES},
        "tokens_pretrain": compact(stages["pretrain"].tokens) if "pretrain" in stages else "",
        "tokens_total": compact(sum(one.tokens for one in stages.values())) if stages else "",
        "training_time": duration(sum(one.seconds for one in stages.values())) if stages else "",
        "device": listed([escape(device) for device in sorted({one.device for one in stages.values()})]),
    }
    for stage in LINEAGE:
        values[f"sources_{stage}"] = listed([*map(escape, sorted(confounds.sources(comparison, stage)))])
    judged = sum(verdicts.values()) > verdicts[claims.NOT_MEASURED]
    values["n_claims"] = str(sum(verdicts.values())) if judged else ""
    for verdict, number in verdicts.items():
        values[f"n_{verdict.removesuffix(' here').replace(' ', '_')}"] = str(number) if judged else ""
    values |= {
        "n_compared": str(len(compared(comparison)) or ""),
        "trained": f"{len(comparison.trainings)} times" if comparison.replicates else "once",
        "resamples": f"{comparison.resamples:,}",
        "majority": "" if comparison.majority is None else percent(comparison.majority),
    }
    for key in ("perplexity", "bits_per_byte", "sentiment", "problems"):
        values[f"protocol_{key}"] = comparison.protocol(key) or ""
    values: dict[str, str | None] = {name: value or None for name, value in values.items()}
    for key in dict.fromkeys([*HEADLINE, *STAGED]):
        values |= {f"{key}_{model}": value_text(comparison.value(key, model)) for model in OWN_MODELS}
    return values | {"perplexity_gap": _gap(comparison)} | length.variables(comparison)


def _gap(comparison: Comparison) -> str | None:
    """Bits per byte of our pretrained model against GPT-2, as the comparison allows to say it."""
    for one in compared(comparison, "gpt2"):
        if (one.b, one.measure.key) == ("pretrain", "bits_per_byte"):
            caveats = "".join(f"; {caveat.text}" for caveat in confounds.of(comparison, one))
            return f"{one.verdict} ({one.text} bits per byte{caveats})"
    return None


def publishable_variables(comparison: Comparison, run: str = "", preset: str = "") -> Result:
    """The record "variables", shown as a table of names and values."""
    values = variables(comparison, run, preset)
    rows = [{"Variable": name, "Value": value and Markdown(value)} for name, value in values.items()]
    return Result("variables", values, markdown=table(rows))
