"""What else could explain a difference between two models: found in the records, and attached to the sentence.

Each caveat names its cause only; `clause` says which measures of a sentence it touches.
"""

from typing import NamedTuple

from papertrail.records import escape
from study.comparison import models, seeds
from study.comparison.differences import Difference
from study.comparison.load import Comparison
from study.comparison.results import count
from study.preset import LINEAGE

FEW = 30  # units below which an interval rests on its t distribution more than on its units


class Caveat(NamedTuple):
    """One confound of one comparison. Plain Markdown."""

    key: str
    text: str


def sources(comparison: Comparison, *stages: str) -> set[str]:
    """Names of the sources that stages trained on, from the configuration in their fingerprints."""
    configs = [((comparison.stage(stage) or {}).get("fingerprint") or {}).get("config", {}) for stage in stages]
    parts = [item for config in configs if isinstance(data := config.get("data"), dict) for item in data.items()]
    entries = [entry for part, found in parts if not part.endswith("heldout") for entry in found]
    return {entry["source"] for entry in entries if entry.get("source")}


def family(source: str) -> str:
    """ "wikitext-2" and "wikitext-103" are one family, a source otherwise its own."""
    return source.split("-")[0] if source.startswith("wikitext") else source


def seen(comparison: Comparison, model: str, source: str) -> list[str] | None:
    """Sources of the family of `source` in a model's weights: none in the random control's, None where it was trained
    elsewhere."""
    if model == "random":
        return []
    if comparison.stage(model) is None:
        return None
    stages = LINEAGE[: LINEAGE.index(model) + 1] if model in LINEAGE else (model,)
    return sorted(one for one in sources(comparison, *stages) if family(one) == family(source))


def of(comparison: Comparison, one: Difference) -> list[Caveat]:
    """The confounds of one difference."""
    if comparison.same_weights(one.a, one.b):
        return [Caveat("same-weights", "the two are the same weights")]
    found = []
    if one.a in models.BASELINES and comparison.stage(one.a) is not None:
        name = escape(comparison.name(one.a))
        found.append(Caveat("baseline", f"{name} is the architecture at this run's budget, not the published model"))
    if not comparison.share_tokenizer(one.a, one.b):
        found.append(Caveat("tokenizer", "different tokenizers"))
    data = comparison.settings(one.b, comparison.protocol(one.measure.key)).get("data") or {}
    source = data.get("source") or ""
    if source:
        found += _trained_on(comparison, one, source)
    if data.get("subsampled"):
        found.append(Caveat("subsampled", f"a sub-sample of {escape(source)}"))
    if {one.a, one.b} <= {*LINEAGE} and one.method != seeds.METHOD:
        found.append(Caveat("seeds", seeds.basis(comparison)))
    if one.n < FEW:
        units = one.method.rpartition(" ")[2] if " over " in one.method else "items"
        found.append(Caveat("units", f"{count(one.n, units.removesuffix('s'))} only"))
    return found


def _trained_on(comparison: Comparison, one: Difference, source: str) -> list[Caveat]:
    """In-domain text against zero-shot use, or training on the task's own training split."""
    a, b = (seen(comparison, model, source) for model in (one.a, one.b))
    if not a and not b:
        return []
    task = one.measure.unit == "share"
    key, what = ("train-split", "other items") if task else ("in-domain", "other text")
    trained = f"trained on {what} of {', '.join(map(escape, sorted({*(a or ()), *(b or ())})))}"
    if a and b:
        return [Caveat(key, f"both {trained}")]
    subject, other, known = (one.b, one.a, a is not None) if b else (one.a, one.b, b is not None)
    subject, other = (escape(comparison.name(model)) for model in (subject, other))
    return [Caveat(key, f"{subject} {trained}, {other} did not{'' if known else ' as far as is known'}")]


def clause(comparison: Comparison, found: list[Difference]) -> tuple[tuple[str, ...], str]:
    """(keys, sentence) of the confounds of several differences; a caveat that touches some names their measures."""
    touched: dict[Caveat, list[str]] = {}
    for one in found:
        for caveat in of(comparison, one):
            touched.setdefault(caveat, []).append(one.measure.title.lower())
    parts = [
        caveat.text if len(titles) == len(found) else f"{caveat.text} ({', '.join(titles)})"
        for caveat, titles in touched.items()
    ]
    keys = tuple(dict.fromkeys(caveat.key for caveat in touched))
    return keys, f" *Confounds:* {'; '.join(parts)}." if parts else ""
