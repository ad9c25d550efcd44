"""What else could explain a difference between two models: found in the records, and attached to the sentence.

Each caveat names its cause only; `clause` says which measures of a sentence it touches.
"""

from dataclasses import dataclass

from papertrail.records import escape
from study.comparison import models, seeds
from study.comparison.differences import Difference
from study.comparison.load import Comparison
from study.preset import LINEAGE

FEW = 30  # units below which an interval rests on its t distribution more than on its units


@dataclass(frozen=True)
class Caveat:
    """One confound of one comparison. Plain Markdown."""

    key: str
    text: str


def sources(comparison: Comparison, *stages: str) -> set[str]:
    """Names of the sources that stages trained on, from the configuration in their fingerprints."""
    names: set[str] = set()
    for stage in stages:
        data = ((comparison.stage(stage) or {}).get("fingerprint") or {}).get("config", {}).get("data", {})
        for part, entries in data.items() if isinstance(data, dict) else ():
            if not part.endswith("heldout"):
                names |= {entry.get("source") or "" for entry in entries}
    return names - {""}


def history(comparison: Comparison, model: str) -> set[str] | None:
    """Sources in a model's weights: none of the random control's, None where it was trained elsewhere."""
    if model == "random":
        return set()
    if not comparison.is_trained_here(model):
        return None
    earlier = LINEAGE[: LINEAGE.index(model)] if model in LINEAGE else ()
    return sources(comparison, *earlier, model)


def family(source: str) -> str:
    """ "wikitext-2" and "wikitext-103" are one family, a source otherwise its own."""
    return source.split("-")[0] if source.startswith("wikitext") else source


def seen(comparison: Comparison, model: str, source: str) -> list[str] | None:
    """Sources of the family of `source` that the model trained on; None where that is not known."""
    trained = history(comparison, model)
    return None if trained is None else sorted(one for one in trained if family(one) == family(source))


def of(comparison: Comparison, one: Difference) -> list[Caveat]:
    """The confounds of one difference."""
    if comparison.same_weights(one.a, one.b):
        return [Caveat("same-weights", "the two are the same weights")]
    found = []
    if one.a in models.BASELINES and comparison.is_trained_here(one.a):
        name = escape(comparison.name(one.a))
        found.append(Caveat("baseline", f"{name} is the architecture at this run's budget, not the published model"))
    if not comparison.share_tokenizer(one.a, one.b):
        found.append(Caveat("tokenizer", "different tokenizers"))
    protocol = one.measure.protocol(comparison) or ""
    data = comparison.evaluations(one.b).get(protocol, {}).get("settings", {}).get("data") or {}
    source = data.get("source") or ""
    if source:
        found += _trained_on(comparison, one, source, task=one.measure.kind == "share")
    if data.get("subsampled"):
        found.append(Caveat("subsampled", f"a sub-sample of {escape(source)}"))
    over_seeds = one.method == seeds.METHOD
    if {one.a, one.b} <= {*LINEAGE} and not over_seeds:
        found.append(Caveat("seeds", seeds.basis(comparison)))
    if one.n < FEW:
        units = one.method.rpartition(" ")[2] if " over " in one.method else "items"
        found.append(Caveat("units", f"{one.n} {units.removesuffix('s') if one.n == 1 else units} only"))
    return found


def _trained_on(comparison: Comparison, one: Difference, source: str, *, task: bool) -> list[Caveat]:
    """In-domain text against zero-shot use, or training on the task's own training split."""
    a, b = (seen(comparison, model, source) for model in (one.a, one.b))
    key = "train-split" if task else "in-domain"
    what = listed_sources(a, b)
    if not what:
        return []
    trained = f"trained on {'other items' if task else 'other text'} of {what}"
    if a and b:
        return [Caveat(key, f"both {trained}")]
    subject, other, known = (one.b, one.a, a is not None) if b else (one.a, one.b, b is not None)
    names = [escape(comparison.name(model)) for model in (subject, other)]
    return [Caveat(key, f"{names[0]} {trained}, {names[1]} did not{'' if known else ' as far as is known'}")]


def listed_sources(*lists: list[str] | None) -> str:
    """Names of sources for a sentence, each once."""
    return ", ".join(escape(name) for name in sorted({name for one in lists for name in one or ()}))


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
