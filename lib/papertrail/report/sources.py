"""The report's sources as data: embeds, variables, cross-references, citations and sections of `index.qmd`.

Only what the report uses of Quarto's Markdown is read here: `{{< embed notebook#label >}}` alone on its line,
`{{< var name >}}`, `@tbl-x`, `@fig-x`, `@sec-x`, `[@citation]` and `## Heading {#sec-x}`. The checker refuses other
shortcodes, so that Quarto and Pandoc render the same document.
"""

import re
from dataclasses import dataclass, field
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
# Code blocks, comments and inline code, in which nothing counts as a reference; open ones reach to the end.
HIDDEN = re.compile(r"^[ \t]*(`{3,}|~{3,}).*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)|<!--.*?(?:-->|\Z)|`[^`\n]*`", re.M | re.S)


@dataclass(frozen=True)
class Embed:
    notebook: str  # relative to the report folder, as written
    label: str
    line: int

    @property
    def kind(self) -> str:
        """`tbl`, `fig` or `txt`: the part of the label before its first hyphen."""
        return self.label.partition("-")[0]


@dataclass(frozen=True)
class Section:
    title: str
    identifier: str  # "" for a heading without one
    number: str  # "2.1"; "" for unnumbered headings


@dataclass(frozen=True)
class Reference:
    key: str
    line: int


@dataclass
class Source:
    """A parsed `index.qmd`."""

    text: str
    body_start: int = 0  # index of the first line after the front matter
    embeds: list[Embed] = field(default_factory=list)
    variables: list[Reference] = field(default_factory=list)
    crossrefs: list[Reference] = field(default_factory=list)
    citations: list[Reference] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    unknown: list[Reference] = field(default_factory=list)  # other shortcodes, and embeds that share their line


def prose(text: str) -> list[str]:
    """The lines of the text with code blocks, inline code and HTML comments blanked."""
    return HIDDEN.sub(lambda match: "\n" * match.group().count("\n"), text).split("\n")


def parse(text: str) -> Source:
    """Parse the text of `index.qmd`. Raises ReportError for front matter that is never closed."""
    lines, body_start = text.split("\n"), 0
    if lines[0].strip() == "---":
        closing = [index for index, line in enumerate(lines) if line.strip() == "---"]
        if len(closing) < 2:
            raise ReportError("index.qmd: the front matter opened on line 1 is never closed with `---`")
        body_start = closing[1] + 1
    source = Source(text, body_start)
    counts: list[int] = []
    for number, line in enumerate(prose(text), 1):
        source.variables += [Reference(name, number) for name in VARIABLE.findall(line)]
        rest = VARIABLE.sub("", line)
        if embed := EMBED.match(rest):
            source.embeds.append(Embed(embed.group(1), embed.group(2), number))
            continue
        source.unknown += [Reference(code, number) for code in SHORTCODE.findall(rest)]
        if number <= body_start:
            continue
        source.crossrefs += [Reference(key, number) for key in CROSSREF.findall(rest)]
        source.citations += [Reference(key, number) for key in CITATION.findall(rest)]
        if heading := HEADING.match(line):
            level, title, attributes = len(heading.group(1)), heading.group(2), (heading.group(3) or "").split()
            section_number = ""
            if ".unnumbered" not in attributes:
                counts = (counts + [0] * level)[:level]
                counts[-1] += 1
                top = next(index for index, count in enumerate(counts) if count)
                section_number = ".".join(map(str, counts[top:]))
            identifier = next((word[1:] for word in attributes if word.startswith("#")), "")
            source.sections.append(Section(title, identifier, section_number))
    return source


def read(folder: Path) -> Source:
    """Parse `index.qmd` of a report folder. Raises ReportError where there is none."""
    path = folder / "index.qmd"
    if not path.is_file():
        raise ReportError(f"{path.name}: not found in the report folder")
    return parse(path.read_text(encoding="utf-8"))


def read_variables(folder: Path) -> dict[str, str]:
    """`_variables.yml` as a mapping from name to text, {} where there is none. Raises ReportError."""
    path = folder / "_variables.yml"
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ReportError(f"_variables.yml: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ReportError("_variables.yml: must map names to values")
    return {str(name): str(value) for name, value in values.items()}


def read_bibliography(folder: Path) -> list[str]:
    """The keys of `references.bib` in file order, duplicates included; [] where there is none."""
    path = folder / "references.bib"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [key for key in BIB_KEY.findall(text) if key.lower() != "comment"]
