"""The report's tables, one function a table. Each returns a `Result` to publish; none computes what a record does not
hold."""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from papertrail import records
from study.comparison import ablations, length, models, seeds, training
from study.comparison.differences import ALPHA, Difference, adjust, difference, minimum_detectable_effect
from study.comparison.load import Comparison
from study.comparison.measures import (
    BITS_PER_BYTE,
    COMPARED,
    HEADLINE,
    PERPLEXITY,
    PREFERENCES,
    PROBLEMS,
    RESPONSE_LOSS,
    SENTIMENT,
    STAGED,
    Measure,
    fuller,
)
from study.comparison.results import NBSP, Result, compact, duration, interval, percent, plain, probability, signed
from study.preset import LINEAGE
from threefold.evaluation.statistics import PairedDifference, crossed_mean, paired_median


def _grouped(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """The rows with repeated entries of the leading column left blank, as they are shown."""
    return [
        row | {column: "" if place and rows[place - 1][column] == row[column] else row[column]}
        for place, row in enumerate(rows)
    ]


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """`records.table` that keeps no-break spaces, so that an interval stands on one line."""
    return records.table(rows, formats=dict.fromkeys(rows[0], _kept))


def _kept(value: Any) -> Any:
    """A text escaped between its no-break spaces; anything else as it is."""
    if not isinstance(value, str):
        return value
    return records.Markdown(NBSP.join(records.escape(part) for part in value.split(NBSP)))


def _result(name: str, rows: list[dict[str, Any]], **values: Any) -> Result:
    leading = next(iter(rows[0])) if rows else ""
    shown = markdown_table(_grouped(rows, leading)) if rows else "*Not measured in this run.*"
    return Result(f"comparison/{name}", {"rows": rows, **values}, markdown=shown)


# What was compared ---------------------------------------------------------------------------------------------------


def model_configurations(comparison: Comparison) -> Result:
    """Size, shape and origin of every model."""
    rows = []
    for model in comparison.models:
        record, facts = comparison.model(model) or {}, comparison.facts(model)
        config = record.get("config") or {}
        total = training.total_parameters(comparison, model)
        heads = config.get("n_head")
        kv = config.get("n_kv_head")
        rows.append(
            {
                "Model": comparison.name(model),
                "Parameters": compact(total) if total else None,
                "Layers": config.get("n_layer"),
                "Width": config.get("d_model"),
                "Heads": f"{heads} ({kv} KV)" if heads and kv and kv not in (-1, heads) else heads,
                "Feed-forward": config.get("d_ff"),
                "Context": config.get("context") or facts.get("context"),
                "Vocabulary": config.get("vocab_size") or facts.get("vocabulary"),
                "Weights": _origin(comparison, model),
            }
        )
    return _result("models", rows)


def _origin(comparison: Comparison, model: str) -> str:
    if model == "random":
        return "random initialisation"
    stage = comparison.stage(model)
    if stage is None:
        revision = comparison.facts(model).get("revision")
        return f"published, revision {revision[:8]}" if revision else "published"
    tokens = stage.get("tokens")
    return f"trained here on {compact(tokens)} tokens" if tokens else "trained here"


def parameters(comparison: Comparison) -> Result:
    """Parameters by component of the models trained here."""
    rows, named = [], {}
    for model in ("gpt2", "distilgpt2", "pretrain"):
        counts = (comparison.values(f"model/{model}") or {}).get("parameters")
        if isinstance(counts, dict):
            named[model] = counts
    components = list(dict.fromkeys(part for counts in named.values() for part in counts if part != "total"))
    for part in [*components, "total"]:
        if not any(counts.get(part) for counts in named.values()):
            continue  # no model has a head of its own, say
        rows.append(
            {"Component": part.replace("_", " ")}
            | {comparison.name(model): counts.get(part, 0) for model, counts in named.items()}
        )
    return _result("parameters", rows if named else [])


# component -> (field of the configuration, GPT-2's choice, names of the choices, claimed benefit, ablated variant)
_COMPONENTS = (
    (
        "Normalisation",
        "norm",
        "layer",
        {"rms": "RMSNorm", "layer": "LayerNorm"},
        "10–15% faster training",
        "norm=layer",
    ),
    ("Feed-forward", "ffn", "gelu", {"swiglu": "SwiGLU", "gelu": "GELU MLP"}, "2–4% lower perplexity", "ffn=gelu"),
    (
        "Positions",
        "position",
        "learned",
        {"rope": "rotary (RoPE)", "learned": "learned, absolute", "none": "none"},
        "extrapolates better",
        "position=learned",
    ),
    ("Attention sinks", "sinks", 0, {}, "stable beyond the training length", "sinks=0"),
    ("QK normalisation", "qk_norm", False, {True: "yes", False: "no"}, "–", "qk_norm=false"),
    ("Biases", "bias", True, {True: "yes", False: "no"}, "–", ""),
    ("Tied embeddings", "tie_embeddings", True, {True: "yes", False: "no"}, "–", ""),
)


def architecture(comparison: Comparison) -> Result:
    """GPT-2's choices beside this model's, the benefit that is claimed beside the one that was measured."""
    config = (comparison.model("pretrain") or {}).get("config") or {}
    rows = []
    for component, key, theirs, names, claimed, variant in _COMPONENTS:
        if key not in config:
            continue
        ours = config[key]
        same = ours == theirs
        rows.append(
            {
                "Component": component,
                "GPT-2": str(names.get(theirs, theirs)),
                "Threefold": str(names.get(ours, ours)),
                "Claimed": "–" if same else claimed,
                "Measured here": _unused(comparison, key) if same else _ablated(comparison, variant),
            }
        )
    return _result("architecture", rows)


def _ablated(comparison: Comparison, variant: str) -> str:
    """What the component brings against the variant without it."""
    found = [ablations.effect(comparison, variant, quantity) for quantity in ablations.QUANTITIES]
    return "; ".join(_effect_text(one) for one in found if one is not None) or "not measured here"


def _unused(comparison: Comparison, key: str) -> str:
    """What a component would bring that the model is without, where a variant has it."""
    variant = next((name for name in ablations.found(comparison) if name.startswith(f"{key}=")), "")
    found = [ablations.effect(comparison, variant, quantity) for quantity in ablations.QUANTITIES]
    parts = "; ".join(_effect_text(one.turned) for one in found if one is not None)
    return f"same as GPT-2; with {variant}: {parts}" if parts else "same as GPT-2"


def _effect_text(one: ablations.Effect) -> str:
    bounds = [None if x is None else signed(100 * x, 1) for x in (one.low, one.high)]
    return f"{ablations.QUANTITIES[one.quantity]} {interval(signed(100 * one.change, 1, '%'), *bounds)} ({one.basis})"


SIZES = {"preset": "preset’s size", "ablation": "ablations’ size"}


def ablation_effects(variants: Mapping[str, Mapping[str, Any]]) -> Result:
    """Every variant against the base: parameters, held-out loss, tokens to equal loss, step time. `ablations.found`."""
    base, rows = variants.get(ablations.BASE), []
    found = {one.variant: one for one in ablations.contrasts(variants)}
    for name, values in variants.items():
        one = found.get(name)
        share = values["parameters"] / base["parameters"] - 1
        losses = values["heldout_loss"]
        row = {
            "Variant": name,
            "Parameters": f"{values['parameters']:,}" + ("" if one is None else f" ({signed(100 * share, 2, '%')})"),
            "Feed-forward": values["d_ff"],
            "Held-out loss": f"{plain(statistics.fmean(losses), 4)}"
            + (f" ± {plain(statistics.stdev(losses), 4)}" if len(losses) > 1 else ""),
            "Difference": one and _bounded(one.loss, lambda x: signed(x, 4)),
            "p (Holm), loss": one and probability(one.loss_p),
            "Tokens to equal loss": one and (_ratio(one.tokens) if one.tokens else "before the first point"),
        }
        for size, title in SIZES.items():
            if size in base["step_seconds"]:
                row[f"Step time, {title}"] = one and _ratio(one.steps[size])
        row["p (Holm), time"] = one and probability(one.step_p["preset"])
        rows.append(row)
    return _result("ablations", rows, contrasts=[one.as_record() for one in found.values()])


def _bounded(one: PairedDifference, form: Callable[[float], str]) -> str:
    return interval(form(one.difference), *(None if x is None else form(x) for x in (one.low, one.high)))


def _ratio(log_ratio: PairedDifference) -> str:
    """A ratio that is kept as a logarithm: "1.04× [1.02, 1.05]"."""
    value, low, high = (None if x is None else plain(math.exp(x), 3) for x in log_ratio[:3])
    return interval(f"{value}×", low, high)


def ablation_resolution(variants: Mapping[str, Mapping[str, Any]]) -> Result:
    """What the ablations could tell, in words."""
    found = ablations.contrasts(variants)
    if not found:
        return Result("comparison/ablation-resolution", {}, markdown="No ablation was trained in this run.")
    seeds_, rounds = found[0].loss.n, len(next(iter(variants[ablations.BASE]["step_seconds"].values())))
    halves = [(one.loss.high - one.loss.low) / 2 for one in found if one.loss.low is not None]
    detected = [one.variant for one in found if one.detected]
    slower = [one for one in found for p in [one.step_p.get("preset")] if p is not None and p < ALPHA]
    half = statistics.median(halves) if halves else None
    reach = (
        "One seed gives no interval: no difference in loss is resolved."
        if half is None
        else f"With {seeds_} seeds the 95% interval of a difference in held-out loss reaches ± {plain(half, 4)} nats a "
        f"token in the median; a smaller effect is not resolved by this run."
    )
    named = f" ({', '.join(detected)})" if detected else ""
    text = (
        f"{reach} Of {len(found)} variants {len(detected)} differ detectably from the base in held-out loss"
        f"{named} and {len(slower)} in step time at the preset’s size, over "
        f"{rounds} rounds, each after Holm’s adjustment over the variants."
    )
    values = {"seeds": seeds_, "rounds": rounds, "half_width": half, "detected": detected}
    return Result("comparison/ablation-resolution", values, markdown=text)


def kernels(timings: Sequence[Mapping[str, Any]]) -> Result:
    """Components alone, forward and backward, each pair interleaved (`training.KernelTiming` as dictionaries)."""
    rows = []
    for timing in timings:
        names = list(timing["seconds"])
        for name in names:
            taken = timing["seconds"][name]
            against = paired_median(*np.log([timing["seconds"][names[0]], taken])) if name != names[0] else None
            rows.append(
                {
                    "Part": {"norm": "normalisation", "ffn": "feed-forward"}[timing["part"]],
                    "Kernel": name,
                    "Parameters": timing["parameters"][name],
                    "Positions": timing["positions"],
                    "Median": f"{plain(1000 * statistics.median(taken), 3)}{NBSP}ms",
                    "Time against the first": against and _ratio(against),
                    "Rounds": len(taken),
                }
            )
    return _result("kernels", rows, timings=[dict(timing) for timing in timings])


# Results -------------------------------------------------------------------------------------------------------------


def headline(comparison: Comparison) -> Result:
    """Every model by every headline measure, with 95% intervals.

    Perplexity per token stands only beside models that share the tokenizer of the pretrained model; bits per byte
    stands beside all.
    """
    rows, values = [], {}
    reference = "pretrain" if "pretrain" in comparison.models else (comparison.models or [""])[0]
    present = [measure for measure in HEADLINE if measure.protocol(comparison)]
    for model in comparison.models:
        row: dict[str, Any] = {"Model": comparison.name(model)}
        values[model] = {}
        for measure in present:
            value = measure.value(comparison, model)
            if value is not None and measure is PERPLEXITY and not comparison.share_tokenizer(model, reference):
                value = None
            row[_heading(measure)] = measure.text(value)
            if value is not None:
                values[model][measure.key] = {"value": value.value, "low": value.low, "high": value.high, "n": value.n}
        rows.append(row)
    majority = majority_class(comparison)
    protocols = {measure.key: measure.protocol(comparison) for measure in present}
    return _result("headline", rows, models=values, protocols=protocols, majority=majority)


def _heading(measure: Measure) -> str:
    return f"{measure.title}{NBSP}{'↓' if measure.better == 'lower' else '↑'}".replace(" ", NBSP)


def majority_class(comparison: Comparison) -> float | None:
    """Accuracy of always answering the more frequent label of the sentiment set."""
    protocol = SENTIMENT.protocol(comparison)
    for model in comparison.models:
        settings = comparison.evaluations(model).get(protocol or "", {}).get("settings", {})
        if "majority_accuracy" in settings:
            return float(settings["majority_accuracy"])
    return None


_SHARES = ("accuracy", "exact match", "share of items", "share of pairs", "sd of accuracy")


def metric_text(entry: dict[str, Any] | None, *, with_interval: bool = True) -> str | None:
    """A metric of a record in its own unit; None when it was not measured."""
    if entry is None or entry.get("value") is None:
        return None
    share = str(entry.get("unit") or "").startswith(_SHARES)
    form = percent if share else lambda x: plain(x, 3)
    text = form(entry["value"])
    if not with_interval or entry.get("low") is None or entry.get("high") is None:
        return text
    short = (lambda x: f"{100 * x:.1f}") if share else form
    return interval(text, short(entry["low"]), short(entry["high"]))


def _columns(comparison: Comparison, columns: dict[str, tuple[str | None, str]]) -> list[dict[str, Any]]:
    """One row a model, one column a (protocol, metric); columns that no model has are left out."""
    rows = []
    for model in comparison.models:
        evaluations = comparison.evaluations(model)
        row: dict[str, Any] = {"Model": comparison.name(model)}
        for title, (protocol, metric) in columns.items():
            row[title] = metric_text(evaluations.get(protocol or "", {}).get("metrics", {}).get(metric))
        rows.append(row)
    empty = [title for title in columns if all(row[title] is None for row in rows)]
    return [
        {title: cell for title, cell in row.items() if title not in empty} for row in rows if len(empty) < len(columns)
    ]


def sentiment(comparison: Comparison) -> Result:
    """Sentiment under every setting: shots, the spread over templates and draws, and the precedent's one prompt."""
    settings = [
        p for p in comparison.protocols if re.fullmatch(r"[^/]+/\d+-shot", p) and _has(comparison, p, "accuracy")
    ]
    columns: dict[str, tuple[str | None, str]] = {}
    for protocol in sorted(settings, key=lambda p: int(re.search(r"(\d+)-shot", p).group(1))):
        columns[protocol.rpartition("/")[2]] = (protocol, "accuracy")
    main = SENTIMENT.protocol(comparison)
    spread = fuller(comparison, main)
    prompts = "all templates" if spread == main else f"all prompts, first {_items(comparison, spread):,} items"
    columns |= {
        prompts: (spread, "accuracy_mean"),
        "worst template": (spread, "template_lowest"),
        "best template": (spread, "template_highest"),
        "sd over templates": (spread, "template_spread"),
        "sd over draws": (spread, "draw_spread"),
        "answers “positive”": (main, "positive_rate"),
    }
    precedent = [p for p in comparison.protocols if "/precedent" in p and _has(comparison, p, "accuracy")]
    columns |= {p.rpartition("/")[2]: (p, "accuracy") for p in precedent}
    return _result("sentiment", _columns(comparison, columns), protocol=main, majority=majority_class(comparison))


def _items(comparison: Comparison, protocol: str) -> int:
    """How many items a protocol asked."""
    asked = [comparison.evaluations(model).get(protocol, {}).get("settings", {}) for model in comparison.models]
    return max(settings.get("items", 0) for settings in asked)


def _has(comparison: Comparison, protocol: str, metric: str) -> bool:
    return any(comparison.metric(model, protocol, metric) for model in comparison.models)


def tasks(comparison: Comparison) -> Result:
    """What is generated: word problems and instructions, with what went unanswered."""
    problems, answers = PROBLEMS.protocol(comparison), RESPONSE_LOSS.protocol(comparison)
    columns: dict[str, tuple[str | None, str]] = {
        "Problems, strict": (problems, "exact_match"),
        "Problems, last number": (problems, "flexible_match"),
        "no strict answer": (problems, "invalid"),
        "Instructions, exact": (answers, "exact_match"),
        "Response loss (nats/token)": (answers, "response_loss"),
    }
    protocols_ = {"problems": problems, "instructions": answers}
    return _result("tasks", _columns(comparison, columns), protocols=protocols_)


def preferences(comparison: Comparison) -> Result:
    """Which of two answers is preferred, and how far the policy has moved from its reference."""
    pairs = PREFERENCES.protocol(comparison)
    columns: dict[str, tuple[str | None, str]] = {
        "Preferences": (pairs, "accuracy"),
        "Preferences, per token": (pairs, "accuracy_per_token"),
        "Reward margin": (pairs, "reward_margin"),
        "KL to SFT (nats/token)": (pairs, "kl"),
    }
    return _result("preferences", _columns(comparison, columns), protocols={"preferences": pairs})


def protocols(comparison: Comparison) -> Result:
    """The same models under every definition of perplexity that was run."""
    columns: dict[str, tuple[str, str]] = {}
    for protocol in comparison.protocols:
        names = dict.fromkeys(
            name
            for model in comparison.models
            for name in comparison.evaluations(model).get(protocol, {}).get("metrics", {})
        )
        for metric in names:
            short = protocol.rpartition("/")[2]
            if metric == "word_perplexity" or (metric == "perplexity" and "word_perplexity" not in names):
                title = "per word" if metric == "word_perplexity" else "per token"
                columns[f"{short} ({title})"] = (protocol, metric)
        if "bits_per_byte" in names and "word_perplexity" in names:
            columns[f"{protocol.rpartition('/')[2]} (bits/byte)"] = (protocol, "bits_per_byte")
    rows = []
    for model in comparison.models:
        row: dict[str, Any] = {"Model": comparison.name(model)}
        shown = []
        for title, (protocol, metric) in columns.items():
            value = comparison.metric(model, protocol, metric)
            measure = BITS_PER_BYTE if metric == "bits_per_byte" else PERPLEXITY
            row[title] = measure.text(value, with_interval=False)
            if value is not None and metric != "bits_per_byte":
                shown.append(value.value)
        row["largest / smallest"] = f"{max(shown) / min(shown):.2f}" if len(shown) > 1 else None
        rows.append(row)
    return _result("protocols", rows if columns else [])


def stage_evolution(comparison: Comparison) -> Result:
    """Each stage's value, its change from the stage before and since pretraining, always on the same items."""
    present = models.lineage(comparison.models)
    every = {(one.measure, one.a, one.b): one for one in compared(comparison)}
    rows, found = [], []
    for measure in STAGED:
        for place, stage in enumerate(present):
            value = measure.value(comparison, stage)
            if value is None:
                continue
            change = every.get((measure, present[place - 1], stage)) if place else None
            total = every.get((measure, present[0], stage)) if place > 1 else None
            rows.append(
                {
                    "Measure": _heading(measure),
                    "Stage": comparison.name(stage),
                    "Value": measure.text(value),
                    "Change from the stage before": change.text if change else None,
                    "p (Holm)": change.p_text if change else None,
                    "Verdict": change.verdict if change else None,
                    "Minimum detectable effect": detectable_text(change) if change else None,
                    "Change since pretraining": total.text if total else None,
                }
            )
            found += [one.values() for one in (change, total) if one is not None]
    return _result("stages", rows, differences=found)


def compared(comparison: Comparison) -> list[Difference]:
    """Every difference between models that the report puts into words, adjusted together (Holm).

    The family is the whole report, not a table: stage from stage, stages since pretraining, and the stages against
    either baseline. In a run whose differences are all noise the chance of any false claim is thus at most 5%.
    """
    present = models.lineage(comparison.models)
    steps = [(measure, a, b) for measure in STAGED for a, b in pairwise(present)]
    steps += [(measure, present[0], stage) for measure in STAGED for stage in present[2:]]
    for baseline in models.BASELINES:
        subjects = (*(("gpt2",) if baseline == "distilgpt2" else ()), *LINEAGE)
        if baseline in comparison.models:
            steps += [(m, baseline, model) for m in COMPARED for model in subjects if model in comparison.models]
    return [one for one in adjust(difference(comparison, *step) for step in steps) if one is not None]


def detectable_text(one: Difference) -> str | None:
    """The minimum detectable effect of a single test at 5% with 80% power, and the number of units."""
    least = minimum_detectable_effect(one)
    return f"{one.measure.size_text(least)} (n = {one.n:,})".replace(" ", NBSP) if least is not None else None


def stage_changes(comparison: Comparison) -> list[Difference]:
    """Each stage against the one before, adjusted over the report."""
    present = models.lineage(comparison.models)
    return [one for one in compared(comparison) if (one.a, one.b) in list(pairwise(present))]


def since_pretraining(comparison: Comparison) -> list[Difference]:
    """The last stage against the first where others lie between, adjusted over the report."""
    present = models.lineage(comparison.models)
    ends = (present[0], present[-1]) if len(present) > 2 else ()
    return [one for one in compared(comparison) if (one.a, one.b) == ends]


ONE_SEED = "*Training was run once (seeds = 1): how far a figure moves with the seed of training was not measured.*"


def seed_spread(comparison: Comparison) -> Result:
    """Every headline measure of every stage over the training seeds, beside its sampling error over items."""
    found = seeds.spreads(comparison)
    rows = [
        {
            "Measure": one.measure.title,
            "Stage": comparison.name(one.stage),
            "Value by seed": ", ".join(_short(one, value) for value in one.values),
            "Mean": _short(one, one.mean),
            "SD over seeds": one.measure.spread_text(*one.deviation[:3]),
            "SE over items": None if one.error is None else one.measure.spread_text(one.error),
            "Larger": one.larger,
        }
        for one in found
    ]
    return _seeded("seeds", comparison, rows, spreads=[one.as_record() for one in found])


def _short(one: seeds.Spread, value: float) -> str | None:
    return one.measure.text(replace(one.first, value=value), with_interval=False)


def seed_changes(comparison: Comparison) -> Result:
    """Each stage's change from the stage before, seed by seed, beside the change of the first training over items."""
    found = seeds.changes(comparison)
    rows = []
    for over_seeds, each in found:
        over_items = difference(comparison, over_seeds.measure, over_seeds.a, over_seeds.b)
        rows.append(
            {
                "Measure": over_seeds.measure.title,
                "Step": f"{comparison.name(over_seeds.a)} → {comparison.name(over_seeds.b)}",
                "Change by seed": ", ".join(over_seeds.measure.change_text(change) for change in each),
                "Mean over seeds": over_seeds.text,
                "p (Holm)": over_seeds.p_text,
                "Over seeds": over_seeds.verdict,
                "First seed, over items": over_items.text if over_items else None,
            }
        )
    return _seeded(
        "seed-changes", comparison, rows, differences=[one.values() | {"changes": list(each)} for one, each in found]
    )


def _seeded(name: str, comparison: Comparison, rows: list[dict[str, Any]], **values: Any) -> Result:
    made = _result(name, rows, seeds=seeds.seeds(comparison), trainings=len(seeds.trainings(comparison)), **values)
    return made if comparison.replicates else replace(made, markdown=ONE_SEED)


def against(comparison: Comparison, baseline: str) -> list[Difference]:
    """Our stages (and DistilGPT-2's teacher) against a baseline on every measure any two models share.

    Adjusted over the report.
    """
    return [one for one in compared(comparison) if one.a == baseline]


def standing(comparison: Comparison, baseline: str = "gpt2") -> Result:
    """Where our stages, and DistilGPT-2's teacher, match, exceed or lag a baseline."""
    differences = against(comparison, baseline)
    rows = [
        {
            "Measure": _heading(one.measure),
            "Model": comparison.name(one.b),
            "Value": one.measure.text(one.measure.value(comparison, one.b)),
            comparison.name(one.a): one.measure.text(one.measure.value(comparison, one.a)),
            "Difference": one.text,
            "p (Holm)": one.p_text,
            "Verdict": one.verdict,
            "Minimum detectable effect": detectable_text(one),
        }
        for one in differences
    ]
    name = "distilgpt2" if baseline == "distilgpt2" else f"against-{baseline}"
    return _result(name, rows, differences=[one.values() for one in differences])


# Training and speed --------------------------------------------------------------------------------------------------


def stability(comparison: Comparison) -> Result:
    """How each stage's loss went."""
    rows = []
    for curve in training.curves(comparison):
        heldout = None
        if curve.heldout_start is not None and curve.heldout_end is not None:
            heldout = f"{plain(curve.heldout_start, 3)} → {plain(curve.heldout_end, 3)}"
        rows.append(
            {
                "Stage": comparison.name(curve.stage),
                "Steps": curve.steps,
                "Training loss": f"{plain(curve.start, 3)} → {plain(curve.end, 3)}",
                "Held-out loss": heldout,
                "Largest setback (nats)": plain(curve.setback, 3),
                "Steady": "yes" if curve.stable else "no",
            }
        )
    return _result("stability", rows)


def efficiency(comparison: Comparison, price_per_hour: float = -1) -> Result:
    """Tokens, time, share of the device's limit and cost of each stage. Without a price (-1) no cost is stated."""
    rows = []
    total_seconds = 0.0
    for one in training.trainings(comparison):
        total_seconds += one.seconds
        cost = "no price stated"
        if price_per_hour >= 0:
            cost = f"{plain(one.seconds / 3600 * price_per_hour, 4)} USD at {plain(price_per_hour)} an hour"
        rows.append(
            {
                "Stage": comparison.name(one.stage),
                "Tokens": one.tokens,
                "Time": f"{duration(one.seconds)} ({one.timed})",
                "Tokens per hour": compact(one.tokens_per_hour),
                "GFLOP/s (6N)": plain(one.flops_per_second / 1e9, 1) if one.flops_per_second else None,
                "Share of limit": _share_of_limit(one),
                "Device": one.device,
                "Cost": cost,
            }
        )
    return _result("efficiency", rows, seconds=total_seconds, price_per_hour=price_per_hour)


def _share_of_limit(training: training.Training) -> str:
    if training.share_of_limit is None:
        return "limit not known"
    limit, source = training.limit
    return f"{percent(training.share_of_limit)} of {limit / 1e9:,.0f} GFLOP/s ({source})"


def speed(comparison: Comparison) -> Result:
    """Generation speed of every model, from the speed protocol."""
    rows = []
    for protocol in comparison.protocols:
        if not protocol.startswith("speed"):
            continue
        for model in comparison.models:
            metrics = comparison.evaluations(model).get(protocol, {}).get("metrics", {})
            if metrics:
                rows.append(
                    {"Model": comparison.name(model)}
                    | {_speed_title(name): _rate(entry) for name, entry in metrics.items()}
                )
    return _result("speed", rows, by_turns=measured_by_turns(comparison))


def measured_by_turns(comparison: Comparison) -> bool:
    """Whether the models' timings alternated in one process; only then do their speeds compare."""
    timed = [comparison.evaluations(model).get("speed") for model in comparison.models]
    others = [record["settings"].get("measured_by_turns_with") for record in timed if record]
    return bool(others) and all(others)


def _speed_title(name: str) -> str:
    """ "decode_b8" -> "decoding, batch 8"."""
    phase, _, batch = name.partition("_b")
    return f"{ {'prefill': 'prompt', 'decode': 'decoding'}.get(phase, phase) }, batch {batch}" if batch else name


def _rate(entry: dict[str, Any]) -> str:
    bounds = [None if entry.get(key) is None else compact(entry[key]) for key in ("low", "high")]
    return interval(compact(entry["value"]), *bounds)


# Provenance ----------------------------------------------------------------------------------------------------------


def length_losses(curves: length.Curves) -> Result:
    """Mean loss by octave of position, a row a variant and mode, and the rise past the training length."""
    rows = []
    for values in curves.values():
        ranges = [(0.5, 1.0), *length.octaves(values["factor"])]
        for mode in length.present(values):
            means = {_span(*one): length.mean_nats(values, mode, *one) for one in ranges}
            change = length.rise(values, mode)
            cells = {name: None if nats is None else plain(float(nats.mean()), 3) for name, nats in means.items()}
            past = "no prediction" if change is None else length.in_nats(crossed_mean(change))
            rows.append(
                {
                    "Model": length.title(values),
                    "Reading": length.MODES[mode],
                    **cells,
                    "Past less within": past,
                    "Seeds": len(values["nats"][mode]),
                }
            )
    return _result("length-losses", rows)


def _span(low: float, high: float) -> str:
    return f"{'½' if low == 0.5 else f'{low:g}'}–{high:g}×"


def provenance(comparison: Comparison) -> Result:
    """Where every result comes from, replicates included: fingerprint, weights, commit, machine, and how far doing it
    again on that machine gives the same."""
    rows = []
    for record in [record for one in seeds.trainings(comparison) for record in one.records.values()]:
        if not record.name.startswith("stage/"):
            continue
        facts = record.values
        git = facts.get("git") or {}
        commit = f"{git['commit'][:10]}{' + changes' if git.get('dirty') else ''}" if git.get("commit") else None
        hardware = facts.get("hardware") or {}
        weights = facts.get("weights_sha256")
        rows.append(
            {
                "Stage": record.name.partition("/")[2],
                "Notebook": record.notebook,
                "Fingerprint": (facts.get("fingerprint") or {}).get("digest", "")[:12] or None,
                "Weights (SHA-256)": weights[:12] if weights else None,
                "Commit": commit,
                "Machine": _machine(hardware),
                "Repeatable": _repeatable(facts.get("determinism") or {}),
                "Wall time": duration(facts["wall_seconds"]) if facts.get("wall_seconds") is not None else None,
            }
        )
    return _result("provenance", rows)


def _repeatable(determinism: dict[str, Any]) -> str | None:
    """ "bit-identical (CPU, 1 thread)"; None for a record from before it was told."""
    if not determinism:
        return None
    threads = "/".join(map(str, determinism["threads"]))
    plural = "" if threads == "1" else "s"
    workers = "/".join(map(str, determinism.get("workers", [])))
    together = f", {workers} workers" if workers else ""
    where = f"{determinism['device'].upper()}, {threads} thread{plural}{together}"
    return f"{determinism['level'].partition(':')[0]} ({where})"


def _machine(hardware: dict[str, Any]) -> str | None:
    parts = [*(hardware.get("gpu") or []), hardware.get("cpu")]
    shown = ", ".join(part for part in parts if part)
    return f"{shown} ({hardware['cores']} cores)" if shown and hardware.get("cores") else shown or None
