"""The report of a run that measured only a part: the text leaves out what has no result.

Variables that were not measured (null in their record) and labels of results without content (`empty` in theirs) are
missing. Their embeds are left out, and so are sections whose embeds are all missing and sentences that quote or refer
to any of these; of a sentence with semicolons only that part. `measured="NAME"` among the attributes of a heading or a
`:::` block makes that section or block depend on a variable or label. Each paragraph of `index.qmd` is one line.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from papertrail.notebook_files import labelled_cells, read_notebook
from papertrail.records import MIME, read
from papertrail.report import sources
from papertrail.report.check import VARIABLES
from papertrail.report.sources import CROSSREF, VARIABLE

CONDITION = re.compile(r'measured="([\w.-]+)"')
IDENTIFIER = re.compile(r"\{[^}]*#(sec-[\w-]+)")
SENTENCE_END = re.compile(r"(?:(?<=[.?!])|(?<=[.?!][)”*]))\s+(?=[A-Z“@*\[({`$])")
CLAUSE_END = re.compile(r";\s+(?![^\[(]*[\])])")  # a semicolon, but not one in brackets


def missing(folder: Path) -> set[str]:
    """The variables and labels in a report folder's executed notebooks that have no value or content."""
    found: set[str] = set()
    for path in (folder / "executed").glob("*.ipynb"):
        for cell in labelled_cells(read_notebook(path), path.name):
            if any(output.get("data", {}).get(MIME, {}).get("empty") for output in cell.outputs):
                found.add(cell.label)
        if record := read(path).get(VARIABLES):
            found.update(name for name, value in record.values.items() if value is None)
    return found


def leave_out(text: str, names: set[str]) -> str:
    """The text of `index.qmd` without what depends on these variables and labels."""
    if not names:
        return text
    lines, plain, names = text.split("\n"), sources.prose(text), set(names)
    start = sources.parse(text).body_start
    embeds = {number: match[2] for number, line in enumerate(plain) if (match := sources.EMBED.match(line))}
    out: set[int] = set()
    for part in _parts(plain, start):
        inside = {embeds[number] for number in part if number in embeds}
        condition = CONDITION.search(plain[part.start])
        if (condition and condition[1] in names) or (inside and inside <= names):
            out.update(part)
            names |= inside | set(IDENTIFIER.findall("\n".join(plain[part.start : part.stop])))
    out.update(number for number, label in embeds.items() if label in names)
    kept = lines[:start]
    for number in range(start, len(lines)):
        if number in out:
            before = max((place for place, line in enumerate(kept) if line), default=0)
            if number in embeds and re.search(r"[^:]:$", kept[before]):
                kept[before] = ""  # what introduced it
        elif plain[number] and number not in embeds and not plain[number].startswith(("#", ":::")):
            kept.append(_without(lines[number], names))
        else:
            kept.append(lines[number])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept))


def _parts(lines: Sequence[str], start: int) -> Iterator[range]:
    """The lines of every `:::` block, then of every section, from the innermost to the outermost."""
    opened: list[int] = []
    for number in range(start, len(lines)):
        if re.match(r":::+\s*\S", lines[number]):
            opened.append(number)
        elif lines[number].startswith(":::") and opened:
            yield range(opened.pop(), number + 1)
    headings = {n: len(match[1]) for n in range(start, len(lines)) if (match := sources.HEADING.match(lines[n]))}
    for number in sorted(headings, key=headings.get, reverse=True):
        following = (n for n, level in headings.items() if n > number and level <= headings[number])
        yield range(number, next(following, len(lines)))


def _without(paragraph: str, names: set[str]) -> str:
    """A paragraph without the sentences, or parts of them between semicolons, that refer to one of the names."""
    sentences = []
    for sentence in SENTENCE_END.split(paragraph):
        parts = CLAUSE_END.split(sentence)
        kept = [part for part in parts if names.isdisjoint(VARIABLE.findall(part) + CROSSREF.findall(part))]
        if kept:
            end = "" if kept[-1] == parts[-1] else sentence[-1]
            first = kept[0] if kept[0] == parts[0] else kept[0][0].upper() + kept[0][1:]
            sentences.append("; ".join([first, *kept[1:]]) + end)
    return " ".join(sentences)
