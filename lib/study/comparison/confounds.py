"""What else could explain a difference between two models: found in the records, stated once and referred to by number.

`of` finds the confounds of one difference, `numbered` those of the whole report with the sentence of each
(words.toml), and `marks` refers to them from a sentence or a row.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from papertrail.records import escape
from study.comparison import models, seeds
from study.comparison.differences import Difference, compared
from study.comparison.load import Comparison
from study.comparison.recipes import ancestry, apart, recipe, sources
from study.comparison.results import WORDS, Result, count, listed

FEW = 30  # units below which an interval rests on its t distribution more than on its units
ANCHOR = "#sec-confounds"
Numbers = dict[str, tuple[int, list[str]]]  # key of a confound -> its number, and its details


class Caveat(NamedTuple):
    """One confound of one comparison: its key, what it concerns, and whose value that is, if anyone's."""

    key: str
    detail: str
    model: str = ""


def family(source: str) -> str:
    """ "wikitext-2" and "wikitext-103" are one family, a source otherwise its own."""
    return source.split("-")[0] if source.startswith("wikitext") else source


def seen(comparison: Comparison, model: str, source: str) -> list[str]:
    """Sources of the family of `source` that a model was trained on, as far as is known."""
    trained = sources(comparison, *ancestry(comparison, model))
    return sorted(one for one in trained if family(one) == family(source))


def of(comparison: Comparison, one: Difference) -> list[Caveat]:
    """The confounds of one difference, in the order of words.toml."""
    pair = one.a, one.b
    name = {model: escape(models.short(comparison.name(model))) for model in pair}
    if comparison.same_weights(*pair):
        return [Caveat("same_weights", listed([*name.values()]))]
    found = []
    facets = apart(comparison, *pair)
    for key in facets:
        found += [Caveat(key, escape(recipe(comparison, model)[key]), name[model]) for model in pair]
    sinks = {model: (comparison.model(model).get("config") or {}).get("sinks", 0) for model in pair}
    if "architecture" in facets and len(set(sinks.values())) > 1:
        found += [Caveat("order", count(number, "sink"), name[model]) for model, number in sinks.items()]
    for model in pair:
        trained_here = comparison.trained_here(model)
        if trained_here and model in comparison.baselines:
            found.append(Caveat("baseline", name[model]))
        elif not trained_here and model != "random":
            found.append(Caveat("elsewhere", name[model]))
    if not comparison.share_tokenizer(*pair):
        found.append(Caveat("tokenizer", listed([*name.values()])))
    data = comparison.settings(one.b, comparison.protocol(one.measure.key)).get("data") or {}
    source = data.get("source") or ""
    for model in pair if source else ():
        if trained := seen(comparison, model, source):
            key = "train_split" if one.measure.unit == "share" else "in_domain"
            found.append(Caveat(key, ", ".join(map(escape, trained)), name[model]))
    if data.get("subsampled"):
        found.append(Caveat("subsampled", f"{escape(source)} ({count(one.n, 'item')})"))
    if one.method != seeds.METHOD and not set(pair) <= {"random"}:
        found.append(Caveat("seeds", seeds.basis(comparison)))
    if one.n < FEW:
        units = one.method.rpartition(" ")[2] if " over " in one.method else "items"
        found.append(Caveat("units", f"{one.measure.title.lower()} ({count(one.n, units.removesuffix('s'))})"))
    return sorted(found, key=lambda caveat: list(WORDS["confounds"]).index(caveat.key))


def numbered(comparison: Comparison) -> Numbers:
    """Key -> (number, details) of every confound of the report's comparisons, in the order of words.toml. A detail that
    is the value of models names them: "Muon: Threefold pretrain, Threefold SFT"."""
    found: dict[str, dict[str, dict[str, None]]] = {key: {} for key in WORDS["confounds"]}
    for one in compared(comparison):
        for caveat in of(comparison, one):
            found[caveat.key].setdefault(caveat.detail, {})[caveat.model] = None
    present = {
        key: [f"{detail}: {', '.join(whose)}" if any(whose) else detail for detail, whose in details.items()]
        for key, details in found.items()
        if details
    }
    return {key: (number, details) for number, (key, details) in enumerate(present.items(), 1)}


def marks(comparison: Comparison, found: Iterable[Difference], numbers: Numbers) -> str:
    """The numbers (of `numbered`) of the confounds of several differences, "C1–C3, C5"; "" where there is none."""
    touched = sorted(
        {numbers[caveat.key][0] for one in found for caveat in of(comparison, one) if caveat.key in numbers}
    )
    runs = groupby(touched, lambda number: number - touched.index(number))  # consecutive numbers: the same difference
    spans = [[f"C{number}" for number in run] for _, run in runs]
    return ", ".join(f"{span[0]}–{span[-1]}" if len(span) > 2 else ", ".join(span) for span in spans)


def listing(comparison: Comparison) -> Result:
    """The numbered list that the whole page refers to."""
    found, lines = numbered(comparison), []
    for key, (number, details) in found.items():
        title, text = WORDS["confounds"][key]
        lines.append(f"- **C{number} {title}.** {text.format(details='; '.join(details))}")
    values = {key: {"number": number, "details": details} for key, (number, details) in found.items()}
    text = "\n".join(lines) or "None was found."
    return Result("comparison/confounds", {"confounds": values}, markdown=text, empty=not found)
