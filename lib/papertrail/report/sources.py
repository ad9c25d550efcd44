"""The report's sources as data: embeds, variables, cross-references, citations and sections of `index.qmd`.

Only what the report uses of Quarto's Markdown is read here: `{{< embed notebook#label >}}` alone on its line,
`{{< var name >}}`, `@tbl-x`, `@fig-x`, `@sec-x`, `[@citation]` and `## Heading {#sec-x}`. The checker refuses other
shortcodes, so that Quarto and Pandoc render the same document.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from basics.errors import ReportError

EMBED = re.compile(r"^\s*\{\{<\s*embed\s+([^\s#>]+)#([^\s>]+)\s*>\}\}\s*$")
VARIABLE = re.compile(r"\{\{<\s*var\s+([\w.-]+)\s*>\}\}")
SHORTCODE = re.compile(r"\{\{<.*?>\}\}")
CROSSREF = re.compile(r"(?<![\w@\\/.])@((?:tbl|fig|sec)-\w(?:[\w-]*\w)?)")
CITATION = re.compile(r"(?<![\w@\\/.])-?@(?!(?:tbl|fig|sec)-)([A-Za-z]\w*(?:[-:.]\w+)*)")
HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*(?:\{([^}]*)\})?\s*$")
BIB_KEY = re.compile(r"^\s*@\w+\s*\{\s*([^,\s]+)\s*,", re.MULTILINE)


@dataclass(frozen=True)
class Embed:
    notebook: str  # relative to the report folder, as written
    label: str
    line: int

    @property
    def kind(self) -> str:
        """`tbl`, `fig` or `txt`: what stands before the label's first hyphen."""
        return self.label.partition("-")[0]


@dataclass(frozen=True)
class Section:
    level: int
    title: str
    identifier: str  # "" when the heading carries none
    number: str  # "2.1"; "" for unnumbered headings
    line: int


@dataclass(frozen=True)
class Reference:
    key: str
    line: int


@dataclass(frozen=True)
class Source:
    """One parsed `index.qmd`."""

    text: str
    body_start: int  # index of the first line after the front matter
    embeds: tuple[Embed, ...]
    variables: tuple[Reference, ...]
    crossrefs: tuple[Reference, ...]
    citations: tuple[Reference, ...]
    sections: tuple[Section, ...]
    unknown: tuple[Reference, ...]  # shortcodes that are neither embed nor var, and embeds that share their line


def prose(lines: list[str]) -> list[str]:
    """The lines with code blocks, inline code and HTML comments blanked, so that nothing in them counts as a
    reference."""
    kept, fence, comment = [], "", False
    for line in lines:
        marker = re.match(r"^\s*(`{3,}|~{3,})", line)
        if fence:
            if marker and line.strip().startswith(fence) and line.strip().strip(fence[0]) == "":
                fence = ""
            kept.append("")
            continue
        if marker and not comment:
            fence = marker.group(1)
            kept.append("")
            continue
        shown = ""
        while line:
            if comment:
                _, found, line = line.partition("-->")
                comment = not found
            else:
                before, found, line = line.partition("<!--")
                shown += before
                comment = bool(found)
        kept.append(re.sub(r"`[^`]*`", "", shown))
    return kept


def parse(text: str) -> Source:
    """Parse the text of `index.qmd`."""
    lines = text.split("\n")
    body_start = 0
    if lines and lines[0].strip() == "---":
        closing = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
        if closing is None:
            raise ReportError("index.qmd: the front matter opened on line 1 is never closed with `---`")
        body_start = closing + 1
    embeds, variables, crossrefs, citations, sections, unknown = [], [], [], [], [], []
    counts: list[int] = []
    for number, line in enumerate(prose(lines), 1):
        variables += [Reference(name, number) for name in VARIABLE.findall(line)]
        rest = VARIABLE.sub("", line)
        if embed := EMBED.match(rest):
            embeds.append(Embed(embed.group(1), embed.group(2), number))
            continue
        unknown += [Reference(code, number) for code in SHORTCODE.findall(rest)]
        if number <= body_start:
            continue
        crossrefs += [Reference(key, number) for key in CROSSREF.findall(rest)]
        citations += [Reference(key, number) for key in CITATION.findall(rest)]
        if heading := HEADING.match(line):
            level, title, attributes = len(heading.group(1)), heading.group(2), heading.group(3) or ""
            identifier = next((word[1:] for word in attributes.split() if word.startswith("#")), "")
            label = ""
            if ".unnumbered" not in attributes.split():
                counts = (counts + [0] * level)[:level]
                counts[-1] += 1
                top = next(i for i, count in enumerate(counts) if count)
                label = ".".join(str(count) for count in counts[top:])
            sections.append(Section(level, title, identifier, label, number))
    groups = (embeds, variables, crossrefs, citations, sections, unknown)
    return Source(text, body_start, *(tuple(group) for group in groups))


def read(folder: Path) -> Source:
    """Parse `index.qmd` of a report folder."""
    path = folder / "index.qmd"
    if not path.is_file():
        raise ReportError(f"{path.name}: not found in the report folder")
    return parse(path.read_text(encoding="utf-8"))


def read_variables(folder: Path) -> dict[str, str]:
    """`_variables.yml` as a flat mapping from name to text; nested names are joined by dots as in `{{< var a.b >}}`."""
    path = folder / "_variables.yml"
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ReportError(f"_variables.yml: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ReportError("_variables.yml: must map names to values")
    flat: dict[str, str] = {}

    def descend(prefix: str, part: dict) -> None:
        for name, value in part.items():
            if isinstance(value, dict):
                descend(f"{prefix}{name}.", value)
            else:
                flat[f"{prefix}{name}"] = str(value)

    descend("", values)
    return flat


def read_bibliography(folder: Path) -> list[str]:
    """The keys of `references.bib`, in file order, doubles included."""
    path = folder / "references.bib"
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [key for key in BIB_KEY.findall(text) if key.lower() != "comment"]
