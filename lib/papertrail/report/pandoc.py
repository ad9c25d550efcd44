"""Rendering with Pandoc alone: the Markdown is expanded as Quarto would expand it before Pandoc reads it.

Embeds become tables, figures and text, numbered in order with captions; variables are filled in; cross-references
become numbered links; citeproc makes the citations. The result is one HTML file that holds its images and styles.
"""

import subprocess
import tempfile
from pathlib import Path

import pypandoc
import yaml

from basics.errors import ReportError
from papertrail.notebook_files import Cell, labelled_cells, read_notebook
from papertrail.report import sources

NAMES = {"tbl": "Table", "fig": "Figure", "sec": "Section"}
STYLES = ("report.css", "pandoc.css")


def numbers(source: sources.Source) -> dict[str, str]:
    """What a cross-reference to each label prints: "Table 3", "Figure 1", "Section 2.1"."""
    names: dict[str, str] = {}
    counts = {"tbl": 0, "fig": 0}
    for embed in source.embeds:
        if embed.kind in counts:
            counts[embed.kind] += 1
            names[embed.label] = f"{NAMES[embed.kind]} {counts[embed.kind]}"
    for section in source.sections:
        if section.identifier.startswith("sec-"):
            names[section.identifier] = f"Section {section.number}" if section.number else f"“{section.title}”"
    return names


def _caption(text: str) -> str:
    return " ".join(text.split())


def _block(cell: Cell, named: str) -> str:
    kind = cell.label.partition("-")[0]
    if kind == "tbl":
        caption = f": {named}: {_caption(cell.caption)}"
        return f"::: {{#{cell.label} .float-table}}\n\n{cell.markdown.strip()}\n\n{caption}\n\n:::"
    if kind == "fig":
        alt = _caption(cell.alternative_text).replace("\\", "").replace('"', "'")
        return f'![{named}: {_caption(cell.caption)}](data:image/png;base64,{cell.image}){{#{cell.label} alt="{alt}"}}'
    return f"::: {{#{cell.label} .generated}}\n\n{cell.markdown.strip()}\n\n:::"


def expand(folder: Path) -> str:
    """`index.qmd` as plain Pandoc Markdown, figures inside. The folder must have passed the checker."""
    source = sources.read(folder)
    variables = sources.read_variables(folder)
    names = numbers(source)
    cells: dict[tuple[str, str], Cell] = {}
    for name in {embed.notebook for embed in source.embeds}:
        for cell in labelled_cells(read_notebook(folder / name), name):
            cells[name, cell.label] = cell

    def fill(text: str) -> str:
        return sources.VARIABLE.sub(lambda match: variables[match.group(1)], text)

    def deep(value):
        if isinstance(value, str):
            return fill(value)
        if isinstance(value, list):
            return [deep(part) for part in value]
        return {key: deep(part) for key, part in value.items()} if isinstance(value, dict) else value

    lines = source.text.split("\n")
    front = yaml.safe_load("\n".join(lines[1 : source.body_start - 1])) or {} if source.body_start else {}
    metadata = {key: deep(value) for key, value in front.items() if key not in ("format", "bibliography", "execute")}
    body = []
    shown = sources.prose(lines)
    for line, plain in list(zip(lines, shown, strict=True))[source.body_start :]:
        if embed := sources.EMBED.match(plain):
            cell = cells[embed.group(1), embed.group(2)]
            body.append(_block(cell, names.get(cell.label, "")))
        elif plain:
            linked = sources.CROSSREF.sub(lambda match: f"[{names[match.group(1)]}](#{match.group(1)})", line)
            body.append(fill(linked))
        else:
            body.append(line)
    return "---\n" + yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False) + "---\n\n" + "\n".join(body) + "\n"


def render(folder: Path) -> str:
    """The report folder as one self-contained HTML text."""
    markdown = expand(folder)
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
        "--toc-depth=2",
        "--number-sections",
        "--columns=10000",  # no column widths guessed from the length of a table's source lines
        "--fail-if-warnings",
        "--metadata=link-citations:true",
        "--metadata=document-css:false",  # the styles are ours
        "--metadata=lang:en",
        "--metadata=toc-title:Contents",
        "--metadata=reference-section-title:",
    ]
    if (folder / "references.bib").is_file():
        command.append("--bibliography=references.bib")
    with tempfile.TemporaryDirectory() as scratch:
        header = Path(scratch) / "header.html"
        styles = [(folder / name).read_text(encoding="utf-8") for name in STYLES if (folder / name).is_file()]
        header.write_text("".join(f"<style>\n{style}</style>\n" for style in styles), encoding="utf-8")
        command.append(f"--include-in-header={header}")
        result = subprocess.run(command, input=markdown, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise ReportError(f"Pandoc could not render the report: {' '.join(result.stderr.split())[-800:]}")
    return result.stdout
