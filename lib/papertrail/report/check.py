"""The checker: does a report folder hold together? It runs before either renderer, and each failure is one clear
line."""

import re
from collections import Counter
from pathlib import Path

from basics.errors import RecordError, ReportError
from papertrail import scrub
from papertrail.notebook_files import Cell, errors, labelled_cells, read_notebook
from papertrail.records import read as read_records
from papertrail.report import sources

COMPARE = "06_compare.ipynb"  # whose record the variables are
LABEL = re.compile(r"^(?:tbl|fig|txt)-[a-z0-9]+(?:-[a-z0-9]+)*$")


def check(folder: Path) -> list[str]:
    """Everything wrong with a report folder, one line each; empty when it can be rendered.

    Checked: embed targets exist, sit in the report folder and have exactly one output of the right kind with a
    caption; labels are well formed and unique over the embedded notebooks; no error output and no machine path in any
    embedded notebook; cross-references, citation keys and variables resolve; weights hashes agree between the records.
    """
    source = sources.read(folder)
    problems: list[str] = []
    problems += [
        f"index.qmd line {item.line}: {item.key} is not an embed alone on its line or a var" for item in source.unknown
    ]
    loaded: dict[str, dict] = {}
    for embed in source.embeds:
        if embed.notebook in loaded or any(embed.notebook in problem for problem in problems):
            continue
        path = (folder / embed.notebook).resolve()
        if not path.is_relative_to(folder.resolve()):
            problems.append(f"index.qmd line {embed.line}: {embed.notebook} lies outside the report folder")
        elif not path.is_file():
            problems.append(f"index.qmd line {embed.line}: {embed.notebook} does not exist; `threefold run` makes it")
        else:
            try:
                loaded[embed.notebook] = read_notebook(path, schema=True)
            except RecordError as error:
                problems.append(str(error))
    cells: dict[str, list[Cell]] = {}
    for name, notebook in loaded.items():
        for error in errors(notebook):
            said = " ".join(error["evalue"].split())[:160]
            problems.append(f"{name} cell {error['cell'] + 1}: holds the error {error['ename']}: {said}")
        problems += [f"{name} {leak}" for leak in scrub.leaks(notebook)]
        try:
            cells[name] = labelled_cells(notebook, name)
        except ReportError as error:
            problems.append(str(error))
            cells[name] = []
    problems += _labels(cells)
    problems += _targets(source, cells)
    problems += _references(folder, source)
    problems += _weights(folder)
    return problems


def require(folder: Path) -> None:
    """`check`, as an error."""
    if problems := check(folder):
        raise ReportError("the report does not hold together:\n" + "\n".join(f"- {problem}" for problem in problems))


def _labels(cells: dict[str, list[Cell]]) -> list[str]:
    problems = []
    places: dict[str, list[str]] = {}
    for name, labelled in cells.items():
        for cell in labelled:
            places.setdefault(cell.label, []).append(f"{name} cell {cell.index}")
            if not LABEL.match(cell.label):
                problems.append(
                    f"{name} cell {cell.index}: label {cell.label!r} must be tbl-, fig- or txt- and lower-case words"
                )
    for label, where in places.items():
        if len(where) > 1:
            problems.append(f"label {label!r} stands more than once: {', '.join(where)}")
    return problems


def _targets(source: sources.Source, cells: dict[str, list[Cell]]) -> list[str]:
    problems = []
    for key, count in Counter(embed.label for embed in source.embeds).items():
        if count > 1:
            problems.append(f"index.qmd: {key} is embedded {count} times")
    for embed in source.embeds:
        if embed.notebook not in cells:
            continue
        where = f"index.qmd line {embed.line}"
        matching = [cell for cell in cells[embed.notebook] if cell.label == embed.label]
        if not matching:
            near = ", ".join(sorted(cell.label for cell in cells[embed.notebook])) or "none"
            problems.append(f"{where}: {embed.notebook} has no cell labelled {embed.label!r} (labels there: {near})")
            continue
        cell = matching[0]
        place = f"{embed.notebook} cell {cell.index} ({cell.label})"
        if len(cell.outputs) != 1 or len(cell.displays) != 1:
            kinds = ", ".join(output["output_type"] for output in cell.outputs) or "no output"
            problems.append(f"{place}: an embedded cell has exactly one displayed output, this one has {kinds}")
        elif embed.kind == "fig" and not cell.image:
            problems.append(f"{place}: a fig- cell displays an image/png, this one has none")
        elif embed.kind in ("tbl", "txt") and not cell.markdown.strip():
            problems.append(f"{place}: a {embed.kind}- cell displays text/markdown, this one has none")
        if embed.kind in ("fig", "tbl") and not cell.caption:
            problems.append(f"{place}: has no `#| {embed.kind}-cap:`")
    return problems


def _references(folder: Path, source: sources.Source) -> list[str]:
    problems = []
    targets = [embed.label for embed in source.embeds] + [
        part.identifier for part in source.sections if part.identifier
    ]
    for part, count in Counter(part.identifier for part in source.sections if part.identifier).items():
        if count > 1:
            problems.append(f"index.qmd: section #{part} stands {count} times")
    for reference in source.crossrefs:
        if reference.key not in targets:
            problems.append(f"index.qmd line {reference.line}: @{reference.key} refers to nothing in this document")
    keys = sources.read_bibliography(folder)
    for key, count in Counter(keys).items():
        if count > 1:
            problems.append(f"references.bib: {key} stands {count} times")
    for reference in source.citations:
        if reference.key not in keys:
            problems.append(f"index.qmd line {reference.line}: citation @{reference.key} is not in references.bib")
    try:
        variables = sources.read_variables(folder)
    except ReportError as error:
        return [*problems, str(error)]
    for reference in source.variables:
        if reference.key not in variables:
            problems.append(f"index.qmd line {reference.line}: variable {reference.key} is not in _variables.yml")
    return problems + _recorded_variables(folder, variables)


def _recorded_variables(folder: Path, variables: dict[str, str]) -> list[str]:
    """Every variable is what the comparison's record says."""
    notebook = folder / "executed" / COMPARE
    try:
        record = read_records(notebook).get("variables") if notebook.is_file() else None
    except RecordError:
        return []  # which is said of the notebook itself
    if record is None:
        return []
    told = {name: str(value) for name, value in record.values.items()}
    return [
        f"_variables.yml: {name} is {variables.get(name)!r}, but the record in executed/{COMPARE} says "
        f"{told.get(name)!r}"
        for name in {**told, **variables}
        if variables.get(name) != told.get(name)
    ]


def _weights(folder: Path) -> list[str]:
    """Every evaluation of one model ran on one set of weights, those of the stage of that name where there is one."""
    problems: list[str] = []
    stages: dict[str, tuple[str, str]] = {}
    evaluated: dict[str, tuple[str, str]] = {}
    for path in sorted((folder / "executed").glob("*.ipynb")):
        try:
            found = read_records(path)
        except RecordError as error:
            problems.append(str(error))
            continue
        for name, record in found.items():
            kind, _, rest = name.partition("/")
            weights = record.values.get("weights_sha256") if isinstance(record.values, dict) else None
            if not weights:
                continue
            if kind == "stage":
                stages[rest] = (weights, path.name)
            elif kind == "evaluation":
                model = rest.partition("/")[0]
                first, where = evaluated.setdefault(model, (weights, path.name))
                if first != weights:
                    problems.append(
                        f"{path.name} {name}: evaluated weights {weights}, but {where} evaluated {model} with weights "
                        f"{first}"
                    )
    for model, (weights, where) in evaluated.items():
        if model in stages and stages[model][0] != weights:
            made, made_in = stages[model]
            problems.append(f"{where}: evaluated {model} with weights {weights}, but {made_in} made weights {made}")
    return problems
