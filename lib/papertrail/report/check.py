"""The checker, which runs before either renderer: can this report folder be rendered? Each problem is one line."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from basics.errors import RecordError, ReportError
from papertrail import scrub
from papertrail.notebook_files import Cell, errors, labelled_cells, read_notebook
from papertrail.records import Record
from papertrail.records import read as read_records
from papertrail.report import sources

VARIABLES = "variables"  # the record whose values the prose quotes
LABEL = re.compile(r"^(?:tbl|fig|txt)-[a-z0-9]+(?:-[a-z0-9]+)*$")


def check(folder: Path) -> list[str]:
    """Everything wrong with a report folder, one line each; empty when it can be rendered.

    Checked: embed targets exist, lie in the report folder and have exactly one output of the right kind with a
    caption; labels are well formed and unique over the embedded notebooks; no embedded notebook holds an error output
    or a path of the machine; cross-references, citation keys and variables resolve; weight hashes agree between
    records.
    """
    source = sources.read(folder)
    problems = [
        f"index.qmd line {item.line}: {item.key} is not an embed alone on its line or a var" for item in source.unknown
    ]
    cells: dict[str, list[Cell]] = {}
    first_lines = {embed.notebook: embed.line for embed in reversed(source.embeds)}
    for name, line in sorted(first_lines.items(), key=lambda item: item[1]):
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            problems.append(f"index.qmd line {line}: {name} lies outside the report folder")
        elif not path.is_file():
            problems.append(f"index.qmd line {line}: {name} does not exist; `threefold run` makes it")
        else:
            try:
                notebook = read_notebook(path, schema=True)
                for error in errors(notebook):
                    message = " ".join(error["evalue"].split())[:160]
                    problems.append(f"{name} cell {error['cell'] + 1}: holds the error {error['ename']}: {message}")
                problems += [f"{name} {leak}" for leak in scrub.leaks(notebook)]
                cells[name] = labelled_cells(notebook, name)
            except (RecordError, ReportError) as error:
                problems.append(str(error))
    published: dict[str, dict[str, Record]] = {}
    for path in sorted((folder / "executed").glob("*.ipynb")):
        try:
            published[path.name] = read_records(path)
        except RecordError as error:
            problems.append(str(error))
    return [
        *dict.fromkeys(problems),
        *_check_labels(cells),
        *_check_embeds(source, cells),
        *_check_references(folder, source),
        *_check_variables(folder, source, published),
        *_check_weights(published),
    ]


def require(folder: Path) -> None:
    """Raise ReportError with all problems that `check` finds."""
    if problems := check(folder):
        raise ReportError("the report does not hold together:\n" + "\n".join(f"- {problem}" for problem in problems))


def variable_text(value: object) -> str:
    """What `_variables.yml` says for a value of the record."""
    return "not measured" if value is None else str(value)


def _repeated(values: Iterable[str], message: str) -> Iterator[str]:
    """The message, with value and count, of each value that occurs more than once."""
    return (message.format(value, count) for value, count in Counter(values).items() if count > 1)


def _unresolved(references: list[sources.Reference], known: Iterable[str], message: str) -> Iterator[str]:
    """The message, with its key, of each reference to what is not known."""
    unknown = (reference for reference in references if reference.key not in known)
    return (f"index.qmd line {reference.line}: {message.format(reference.key)}" for reference in unknown)


def _check_labels(cells: dict[str, list[Cell]]) -> Iterator[str]:
    places: dict[str, list[str]] = {}
    for cell in itertools.chain(*cells.values()):
        place = f"{cell.notebook} cell {cell.index}"
        places.setdefault(cell.label, []).append(place)
        if not LABEL.match(cell.label):
            yield f"{place}: label {cell.label!r} must be tbl-, fig- or txt- and lower-case words"
    for label, found in places.items():
        if len(found) > 1:
            yield f"label {label!r} appears more than once: {', '.join(found)}"


def _check_embeds(source: sources.Source, cells: dict[str, list[Cell]]) -> Iterator[str]:
    yield from _repeated((embed.label for embed in source.embeds), "index.qmd: {} is embedded {} times")
    for embed in source.embeds:
        if embed.notebook not in cells:
            continue
        cell = next((cell for cell in cells[embed.notebook] if cell.label == embed.label), None)
        if cell is None:
            labels = ", ".join(sorted(cell.label for cell in cells[embed.notebook])) or "none"
            yield (
                f"index.qmd line {embed.line}: {embed.notebook} has no cell labelled {embed.label!r} "
                f"(labels there: {labels})"
            )
            continue
        place = f"{embed.notebook} cell {cell.index} ({cell.label})"
        if len(cell.outputs) != 1 or len(cell.displays) != 1:
            kinds = ", ".join(output["output_type"] for output in cell.outputs) or "no output"
            yield f"{place}: an embedded cell has exactly one displayed output, this one has {kinds}"
        elif embed.kind == "fig" and not cell.image:
            yield f"{place}: a fig- cell displays an image/png, this one has none"
        elif embed.kind in ("tbl", "txt") and not cell.markdown.strip():
            yield f"{place}: a {embed.kind}- cell displays text/markdown, this one has none"
        if embed.kind in ("fig", "tbl") and not cell.caption:
            yield f"{place}: has no `#| {embed.kind}-cap:`"


def _check_references(folder: Path, source: sources.Source) -> Iterator[str]:
    identifiers = [section.identifier for section in source.sections if section.identifier]
    targets = {*identifiers, *(embed.label for embed in source.embeds)}
    keys = sources.read_bibliography(folder)
    yield from _repeated(identifiers, "index.qmd: section #{} appears {} times")
    yield from _unresolved(source.crossrefs, targets, "@{} refers to nothing in this document")
    yield from _repeated(keys, "references.bib: {} appears {} times")
    yield from _unresolved(source.citations, keys, "citation @{} is not in references.bib")


def _check_variables(folder: Path, source: sources.Source, published: dict[str, dict[str, Record]]) -> Iterator[str]:
    """Every quoted variable exists, and `_variables.yml` holds exactly what the record says."""
    try:
        variables = sources.read_variables(folder)
    except ReportError as error:
        yield str(error)
        return
    yield from _unresolved(source.variables, variables, "variable {} is not in _variables.yml")
    for notebook, records in published.items():
        if VARIABLES not in records:
            continue
        recorded = {name: variable_text(value) for name, value in records[VARIABLES].values.items()}
        for name in {**recorded, **variables}:
            if variables.get(name) != recorded.get(name):
                yield (
                    f"_variables.yml: {name} is {variables.get(name)!r}, but the record in executed/{notebook} says "
                    f"{recorded.get(name)!r}"
                )


def _check_weights(published: dict[str, dict[str, Record]]) -> Iterator[str]:
    """All evaluations of a model ran the same weights: those of the stage of that name, where there is one."""
    trained: dict[str, tuple[str, str]] = {}
    evaluated: dict[str, tuple[str, str]] = {}
    for notebook, records in published.items():
        for name, record in records.items():
            kind, _, rest = name.partition("/")
            weights = record.values.get("weights_sha256")
            if weights and kind == "stage":
                trained[rest] = (weights, notebook)
            elif weights and kind == "evaluation":
                model = rest.partition("/")[0]
                first, where = evaluated.setdefault(model, (weights, notebook))
                if first != weights:
                    evaluated_here = f"{notebook} {name}: evaluated weights {weights[:12]}"
                    yield f"{evaluated_here}, but {where} evaluated {model} with {first[:12]}"
    for model, (weights, where) in evaluated.items():
        made, made_in = trained.get(model, (weights, ""))
        if made != weights:
            yield f"{where}: evaluated {model} with weights {weights[:12]}, but {made_in} made weights {made[:12]}"
