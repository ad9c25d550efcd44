"""Rendering with Pandoc alone: the Markdown is expanded as Quarto would expand it before Pandoc reads it.

Embeds become tables, figures and text, numbered in order with captions; variables are filled in; cross-references
become numbered links; citeproc makes the citations. The result is one HTML file that holds its images and styles.
"""

from pathlib import Path

import pypandoc
import yaml

from basics.errors import ReportError
from papertrail.notebook_files import Cell, labelled_cells, read_notebook
from papertrail.processes import run_supervised
from papertrail.report import sources

STYLES = ("report.css", "pandoc.css")
# What the Quarto project sets or Quarto says by itself. `document-css` is off because the styles are ours.
METADATA = {"link-citations": True, "document-css": False, "toc-title": "Contents", "reference-section-title": ""}


def numbers(source: sources.Source) -> dict[str, str]:
    """What a cross-reference to each label prints: "Table 3", "Figure 1", "Section 2.1"."""
    names: dict[str, str] = {}
    for kind, name in (("tbl", "Table"), ("fig", "Figure")):
        labels = [embed.label for embed in source.embeds if embed.kind == kind]
        names |= {label: f"{name} {count}" for count, label in enumerate(labels, 1)}
    for section in source.sections:
        if section.identifier.startswith("sec-"):
            names[section.identifier] = f"Section {section.number}" if section.number else f"“{section.title}”"
    return names


def _block(cell: Cell, name: str) -> str:
    kind, caption = cell.label.partition("-")[0], f"{name}: {' '.join(cell.caption.split())}"
    if kind == "fig":
        alt = " ".join(cell.alternative_text.split()).replace("\\", "").replace('"', "'")
        return f'![{caption}](data:image/png;base64,{cell.image}){{#{cell.label} alt="{alt}"}}'
    style, end = ("float-table", f"\n\n: {caption}") if kind == "tbl" else ("generated", "")
    return f"::: {{#{cell.label} .{style}}}\n\n{cell.markdown.strip()}{end}\n\n:::"


def expand(folder: Path) -> str:
    """`index.qmd` as plain Pandoc Markdown, figures inside. The folder must have passed the checker."""
    source = sources.read(folder)
    variables = sources.read_variables(folder)
    names = numbers(source)
    notebooks = {embed.notebook for embed in source.embeds}
    cells = {
        (name, cell.label): cell for name in notebooks for cell in labelled_cells(read_notebook(folder / name), name)
    }

    def fill(value):
        if isinstance(value, str):
            return sources.VARIABLE.sub(lambda match: variables[match[1]], value)
        if isinstance(value, list):
            return [fill(part) for part in value]
        return {key: fill(part) for key, part in value.items()} if isinstance(value, dict) else value

    lines, start = source.text.split("\n"), source.body_start
    front = yaml.safe_load("\n".join(lines[1 : start - 1])) or {} if start else {}
    front = {key: fill(value) for key, value in front.items() if key not in ("format", "bibliography", "execute")}
    body = []
    for line, plain in zip(lines[start:], sources.prose(source.text)[start:], strict=True):
        if embed := sources.EMBED.match(plain):
            cell = cells[embed[1], embed[2]]
            line = _block(cell, names.get(cell.label, ""))
        elif plain:
            line = fill(sources.CROSSREF.sub(lambda match: f"[{names[match[1]]}](#{match[1]})", line))
        body.append(line)
    metadata = yaml.safe_dump({"lang": "en", **front, **METADATA}, allow_unicode=True, sort_keys=False)
    return f"---\n{metadata}---\n\n" + "\n".join(body) + "\n"


def render(folder: Path) -> str:
    """The report folder as one self-contained HTML text."""
    command = [
        pypandoc.get_pandoc_path(),
        "--from=markdown",
        "--to=html5",
        "--standalone",
        "--sandbox",  # it reads the files named here, and neither other files nor the network
        "--embed-resources",
        "--mathml",
        "--citeproc",
        "--toc",
        "--toc-depth=1",
        "--number-sections",
        "--columns=10000",  # no column widths guessed from the length of a table's source lines
        "--fail-if-warnings",
    ]
    styles = [(folder / name).read_text(encoding="utf-8") for name in STYLES if (folder / name).is_file()]
    # a variable of the template is taken as it is, metadata would be read as Markdown
    command += [f"--variable=header-includes=<style>\n{style}</style>" for style in styles]
    if (folder / "references.bib").is_file():
        command.append("--bibliography=references.bib")
    status, page, complaint = run_supervised(command, expand(folder), cwd=folder)
    if status:
        raise ReportError(f"Pandoc could not render the report: {' '.join(complaint.split())[-800:]}")
    return page
