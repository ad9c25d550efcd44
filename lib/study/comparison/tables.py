"""The report's tables of what was compared and measured, one function a table. Each returns a `Result` to publish; none
computes what a record does not hold."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from papertrail import preregistration
from study.comparison import ablations, attribution, claims, confounds, models, recipes, seeds, training
from study.comparison.differences import SINCE, STAGES, compared, difference, stage_changes
from study.comparison.load import Comparison
from study.comparison.measures import HEADLINE, MEASURES, STAGED
from study.comparison.models import PLAN, SHOWN
from study.comparison.results import WORDS, Result, percent, plain, table, value_text
from study.comparison.variance import fuller
from study.preset import LINEAGE
from study.run import project

Columns = Mapping[str, tuple[str | None, str]]  # title -> (protocol, metric)
PHASES = {"prefill": "prompt", "decode": "decoding"}

# What was compared ---------------------------------------------------------------------------------------------------


def model_configurations(comparison: Comparison) -> Result:
    """Size, architecture and origin of every model."""

    def fields(model: str) -> dict[str, Any]:
        config, facts = comparison.model(model).get("config") or {}, comparison.facts(model)
        published = f"published, revision {facts['revision'][:8]}" if facts.get("revision") else "published"
        origin = "trained here" if comparison.trained_here(model) else published
        return {
            "name": comparison.name(model),
            "total": training.total_parameters(comparison, model) or None,
            "recipe": recipes.recipe(comparison, model),
            "context": config.get("context") or facts.get("context"),
            "vocabulary": config.get("vocab_size") or facts.get("vocabulary"),
            "origin": "random initialisation" if model == "random" else origin,
        }

    return table("models", map(fields, comparison.models))


def training_recipes(comparison: Comparison) -> Result:
    """How every model was trained, the stages that it continues included."""
    found = {comparison.name(one): recipes.recipe(comparison, one) for one in comparison.models if one != "random"}
    return table("recipes", ({"name": name, "recipe": recipe} for name, recipe in found.items()))


def parameters(comparison: Comparison) -> Result:
    """Parameters by component of the models trained here."""
    every = {comparison.name(model): comparison.values(f"model/{model}") for model in comparison.trained}
    counted = {name: values["parameters"] for name, values in every.items() if values}
    parts = dict.fromkeys(part for counts in counted.values() for part in counts if part != "total")
    rows = [
        {"Component": part.replace("_", " ")} | {name: counts.get(part, 0) for name, counts in counted.items()}
        for part in (*parts, "total")
        if any(counts.get(part) for counts in counted.values())  # no model has a head of its own, say
    ]
    return table("parameters", rows)


def architecture(comparison: Comparison) -> Result:
    """GPT-2's choices beside this model's, the benefit that is claimed beside the one that was measured."""
    config, variants = comparison.model("pretrain").get("config") or {}, comparison.by_variant("ablation")

    def fields(component: dict[str, Any]) -> dict[str, Any]:
        key, theirs = component["key"], component["gpt2"]
        ours, variant = config[key], component.get("variant", "")
        if same := ours == theirs:  # what the other choice would bring, where a variant has it
            variant = next((name for name in variants if name.startswith(f"{key}=")), "")
        effects = [ablations.effect(variants, variant, quantity) for quantity in ablations.QUANTITIES]
        effects = [one.turned if same else one for one in effects if one is not None]
        measured = "; ".join(f"{ablations.QUANTITIES[one.quantity]} {one.text} ({one.basis})" for one in effects)
        if same:
            measured = f"same as GPT-2; with {variant}: {measured}" if measured else "same as GPT-2"
        theirs, ours = (models.choice(component, value) for value in (theirs, ours))
        claimed = "–" if same else component.get("claimed", "–")
        found = {"theirs": theirs, "ours": ours, "claimed": claimed, "measured": measured or "not measured here"}
        return component | found

    present = [component for component in SHOWN["component"] if component["key"] in config]
    return replace(table("architecture", map(fields, present)), empty=not variants)


# A row a model -------------------------------------------------------------------------------------------------------


def _by_model(comparison: Comparison, columns: Columns, **options: bool) -> list[dict[str, Any]]:
    """One row a model, one column a metric of a protocol; columns that no model has are left out."""
    metrics = {title: {m: comparison.metric(m, *where) for m in comparison.models} for title, where in columns.items()}
    measured = {title: rows for title, rows in metrics.items() if any(row is not None for row in rows.values())}
    return [
        {"Model": comparison.name(model)}
        | {title: value_text(rows[model], **options) for title, rows in measured.items()}
        for model in comparison.models
        if measured
    ]


def headline(comparison: Comparison) -> Result:
    """Every model by every headline measure, with 95% intervals.

    Perplexity per token is given only for models that share the tokenizer of the pretrained model, bits per byte for
    all.
    """
    reference = "pretrain" if "pretrain" in comparison.models else (comparison.models or [""])[0]
    protocols = {key: comparison.protocol(key) for key in HEADLINE if comparison.protocol(key)}
    rows, values = [], {}
    for model in comparison.models if protocols else ():
        comparable = comparison.share_tokenizer(model, reference)
        found = {key: comparison.value(key, model) if comparable or key != "perplexity" else None for key in protocols}
        texts = {MEASURES[key].heading: value_text(row) for key, row in found.items()}
        rows.append({"Model": comparison.name(model)} | texts)
        measured = {key: row._asdict() for key, row in found.items() if row is not None}
        values[model] = {key: {one: row[one] for one in ("value", "low", "high", "n")} for key, row in measured.items()}
    return table("headline", rows, models=values, protocols=protocols, majority=comparison.majority)


def sentiment(comparison: Comparison) -> Result:
    """Sentiment under every setting: shots, calibration, the spread over prompts, and the precedent's one prompt."""
    accuracies = comparison.table.query("metric == 'accuracy'").sort_values("size", kind="stable")
    single, precedent = (
        {name.rpartition("/")[2]: (name, "accuracy") for name in accuracies.query("form == @form")["protocol"]}
        for form in ("#-shot", "precedent-#-shot")
    )
    main = comparison.protocol("sentiment")
    spread = fuller(comparison, main)
    asked = max((comparison.settings(model, spread).get("items", 0) for model in comparison.models), default=0)
    prompts = "all templates" if spread == main else f"all prompts, first {asked:,} items"
    columns = single | {
        f"{(main or '').rpartition('/')[2]}, calibrated": (main, "accuracy_calibrated"),
        prompts: (spread, "accuracy_mean"),
        "worst template": (spread, "template_lowest"),
        "best template": (spread, "template_highest"),
        "sd over templates": (spread, "template_spread"),
        "sd over draws": (spread, "draw_spread"),
        "answers “positive”": (main, "positive_rate"),
    }
    rows = _by_model(comparison, columns | precedent)
    return table("sentiment", rows, protocol=main, majority=comparison.majority)


def metrics(comparison: Comparison, name: str, *measures: str) -> Result:
    """The metrics of a table of words.toml: "tasks", what is generated, with what went unanswered; "preferences", which
    of two answers is preferred, and how far the policy has moved from its reference."""
    protocol = comparison.protocol
    columns = {title: (protocol(measure), metric) for title, (measure, metric) in WORDS["metrics"][name].items()}
    return table(name, _by_model(comparison, columns), protocols={measure: protocol(measure) for measure in measures})


def protocols(comparison: Comparison) -> Result:
    """The same models under every definition of perplexity that was run."""
    columns: dict[str, tuple[str, str]] = {}
    for protocol, rows in comparison.table.query("replicate == 1").groupby("protocol", sort=False):
        metrics, short = set(rows["metric"]), protocol.rpartition("/")[2]
        if "word_perplexity" in metrics:
            columns[f"{short} (per word)"] = (protocol, "word_perplexity")
            if "bits_per_byte" in metrics:
                columns[f"{short} (bits/byte)"] = (protocol, "bits_per_byte")
        elif "perplexity" in metrics:
            columns[f"{short} (per token)"] = (protocol, "perplexity")
    rows = _by_model(comparison, columns, with_interval=False)
    for row, model in zip(rows, comparison.models, strict=False):
        found = [comparison.metric(model, *where) for where in columns.values() if where[1] != "bits_per_byte"]
        shown = [one.value for one in found if one is not None]
        row["largest / smallest"] = f"{max(shown) / min(shown):.2f}" if len(shown) > 1 else None
    return table("protocols", rows)


def speed(comparison: Comparison) -> Result:
    """Generation speed of every model, from the speed protocol: "decode_b8" is decoding at batch 8."""
    columns = {}
    for metric in comparison.table.query("protocol == 'speed'")["metric"].unique():
        phase, _, batch = metric.partition("_b")
        columns[f"{PHASES[phase]}, batch {batch}"] = ("speed", metric)
    rows = [row for row in _by_model(comparison, columns) if any(row[title] for title in columns)]
    return table("speed", rows, by_turns=comparison.timed_together)


# Differences ---------------------------------------------------------------------------------------------------------


def stage_evolution(comparison: Comparison) -> Result:
    """Each stage's value, its change from the stage before and since pretraining, always on the same items."""
    every = stage_changes(comparison)
    found, numbers = [], confounds.numbered(comparison)
    for key in STAGED:
        for stage in comparison.lineage:
            if (value := comparison.value(key, stage)) is not None:
                both = {"change": every.get((STAGES, key, stage)), "total": every.get((SINCE, key, stage))}
                marks = confounds.marks(comparison, filter(None, both.values()), numbers) or None
                row = {"measure": MEASURES[key], "model": models.short(comparison.name(stage)), "value": value}
                found.append(row | both | {"confounds": marks})
    differences = [one.values() for row in found for one in (row["change"], row["total"]) if one is not None]
    return table("stages", found, differences=differences)


def standing(comparison: Comparison) -> Result:
    """Every model against each baseline, on every measure that any two models share."""
    found, numbers = compared(comparison, *comparison.baselines), confounds.numbered(comparison)
    rows = [
        {
            "one": one,
            "pair": one.pair,
            "values": " − ".join(value_text(row, with_interval=False) or "–" for row in reversed(one.rows)),
            "confounds": confounds.marks(comparison, [one], numbers) or None,
        }
        for one in found
    ]
    return table("standing", rows, differences=[one.values() for one in found])


def families(comparison: Comparison) -> Result:
    """Which statements of the report belong to which family of tests, and how each family is adjusted."""
    every, over_seeds = compared(comparison), seeds.changes(comparison)
    contrasts = ablations.contrasts(comparison.by_variant("ablation"))
    counted = {
        "models": len(every),
        "equivalences": len(every),
        "seeds": len(over_seeds) + len(seeds.spreads(comparison)),
        "majority": sum(comparison.value("sentiment", stage) is not None for stage in comparison.lineage),
        "control": int(comparison.value("sentiment", "random") is not None),
        "ablations": sum(1 + len(one["log_step_seconds"]) for one in contrasts),
        "attribution": sum(one["kind"] != attribution.TOTAL for one in attribution.found(comparison)),
        "claims": len(claims.CLAIMS),
    }
    rows = [row | {"tests": counted[row["key"]]} for row in PLAN["family"]]
    return table("families", rows)


def continuations(comparison: Comparison) -> Result:
    """How every stage continues the same prompts."""
    found = {comparison.name(stage): comparison.values(f"continuations/{stage}") for stage in comparison.lineage}
    found = {model: values for model, values in found.items() if values}
    prompts = next(iter(found.values()))["prompts"] if found else ()
    rows = [
        {"Prompt": prompt, "Model": model, "Continuation": " ".join(values["texts"][place].split()) or None}
        for place, prompt in enumerate(prompts)
        for model, values in found.items()
    ]
    return table("continuations", rows)


ONE_SEED = "*Training was run once (seeds = 1): how far a figure moves with the seed of training was not measured.*"


def seed_spread(comparison: Comparison) -> Result:
    """Every headline measure of every model over the training seeds, beside its sampling error over items."""

    def fields(one: seeds.Spread) -> dict[str, Any]:
        mean, *each = (value_text(one.first._replace(value=x), with_interval=False) for x in (one.mean, *one.values))
        return {
            "one": one,
            "model": comparison.name(one.stage),
            "each": ", ".join(each),
            "mean": mean,
            "deviation": one.measure.spread_text(*one.deviation[:3]),
            "error": None if one.error_over_items is None else one.measure.spread_text(one.error_over_items),
        }

    found = seeds.spreads(comparison)
    return _seeded("seeds", comparison, map(fields, found), spreads=[one.as_record() for one in found])


def seed_changes(comparison: Comparison) -> Result:
    """Each stage's change from the stage before, and ours from GPT-2's rows, seed by seed, beside the change of the
    first training over items."""
    found = seeds.changes(comparison)
    shown = [
        {
            "one": one,
            "each": ", ".join(map(one.measure.change_text, each)),
            "items": difference(comparison, one.measure.key, one.a, one.b),
        }
        for one, each in found
    ]
    differences = [one.values() | {"changes": list(each)} for one, each in found]
    return _seeded("seed-changes", comparison, shown, differences=differences)


def _seeded(name: str, comparison: Comparison, found: Iterable[dict[str, Any]], **values: Any) -> Result:
    counted = {"seeds": seeds.seeds(comparison), "trainings": len(comparison.trainings)}
    made = table(name, found, **counted, **values)
    return made if comparison.replicates else replace(made, markdown=ONE_SEED, empty=True)


# Training and provenance ---------------------------------------------------------------------------------------------


def stability(comparison: Comparison) -> Result:
    """How each stage's loss went."""
    return table("stability", training.curves(comparison))


def efficiency(comparison: Comparison, price_per_hour: float = -1) -> Result:
    """Tokens, time, share of the device's limit and cost of each stage. Without a price (-1) no cost is stated."""

    def fields(one: training.Training) -> dict[str, Any]:
        cost, share = "no price stated", "limit not known"
        if price_per_hour >= 0:
            cost = f"{plain(one.seconds / 3600 * price_per_hour, 4)} USD at {plain(price_per_hour)} an hour"
        if one.share_of_limit is not None:
            share = f"{percent(one.share_of_limit)} of {one.limit[0] / 1e9:,.0f} GFLOP/s ({one.limit[1]})"
        flops = one.flops_per_second
        name = "Threefold, all stages" if one.stage == "total" else comparison.name(one.stage)
        return {"one": one, "name": name, "gigaflops": flops and flops / 1e9, "share": share, "cost": cost}

    found = training.trainings(comparison)
    seconds = sum((one.seconds for one in found), 0.0)
    ours = [one for one in found if one.stage in LINEAGE]
    found += [training.total(ours)] if len(ours) > 1 else []
    return table("efficiency", map(fields, found), seconds=seconds, price_per_hour=price_per_hour)


def plan(comparison: Comparison) -> Result:
    """The plan of the comparison beside the run, which of them came first, and what was changed after results were
    seen."""
    published = [record for one in comparison.trainings.values() for record in one.records.values()]
    found = preregistration.finding(project(), published)
    order = f"not checked: {found.unchecked}" if found.unchecked else "run" if found.problems else "plan"
    rows = [("plan", found.plan_commit or None, found.plan_date, order)]
    rows += [("run", commit, found.run_started, None) for commit in found.run_commits or (None,)]
    for one in models.EXPLORATORY:
        rows.append((f"changed after results: {one['what']} ({one['why']})", None, one["day"], None))
    named = (dict(zip(("what", "commit", "date", "order"), row, strict=True)) for row in rows)
    return table("plan", named, finding=asdict(found), exploratory=models.EXPLORATORY)


def provenance(comparison: Comparison) -> Result:
    """Where every result comes from, replicates included: fingerprint, weights, commit, machine, and how far doing it
    again on that machine gives the same."""
    found = []
    for record in [record for one in comparison.trainings.values() for record in one.records.values()]:
        if not record.name.startswith("stage/"):
            continue
        git, hardware, determinism = (record.values.get(key) or {} for key in ("git", "hardware", "determinism"))
        machine = ", ".join(part for part in (*(hardware.get("gpu") or []), hardware.get("cpu")) if part)
        cores = f" ({hardware['cores']} cores)" if machine and hardware.get("cores") else ""
        commit = git.get("commit")
        found.append(
            {
                "stage": record.name.partition("/")[2],
                "record": record,
                "commit": f"{commit[:10]}{' + changes' if git.get('dirty') else ''}" if commit else None,
                "machine": f"{machine}{cores}" or None,
                "repeatable": _repeatable(determinism) if determinism else None,
            }
        )
    return table("provenance", found)


def _repeatable(determinism: dict[str, Any]) -> str:
    """ "bit-identical (CPU, 1 thread)"."""
    threads, workers = ("/".join(map(str, determinism.get(key, []))) for key in ("threads", "workers"))
    where = f"{determinism['device'].upper()}, {threads} thread{'' if threads == '1' else 's'}"
    where += f", {workers} workers" if workers else ""
    return f"{determinism['level'].partition(':')[0]} ({where})"
