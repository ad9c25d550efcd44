"""From a run's executed notebooks to a report folder: scrubbed copies and the variables that the prose quotes.

`run` is the run's folder and `report` the folder of the report's sources, which lies in the project's folder.
"""

import shutil
from pathlib import Path

import yaml

from basics.errors import MissingInput
from basics.files import atomic_write, damaged, read_note, replace_folder
from papertrail.notebook_files import executed_notebooks, notebook_text, read_notebook
from papertrail.records import read as read_records
from papertrail.report import partial
from papertrail.report.check import VARIABLES, require, variable_text
from papertrail.scrub import scrub

RENDERED = "rendered.json"  # hashes of the page and of what it was made from, beside it
GENERATED = ("executed", "_variables.yml", "index.html", "index.pdf", "index.typ", "index_files", "_site")
GENERATED += (".quarto", ".gitignore", RENDERED)


def executed_files(run: Path, report: Path) -> dict[str, str]:
    """{path in the report folder: content} of what a run's executed notebooks give: their scrubbed copies, and
    `_variables.yml`. Raises MissingInput where no notebook holds the record with the variables."""
    roots = {str(report.resolve().parent): "."} | {str(path): f"runs/{run.name}" for path in (run, run.resolve())}
    variables, found = None, {}
    for path in executed_notebooks(run / "notebooks"):
        variables = read_records(path).get(VARIABLES, variables)
        clean = scrub(read_notebook(path, schema=True), roots, publish=True)
        found[f"executed/{path.name}"] = notebook_text(clean)
    if variables is None:
        raise MissingInput(
            f"run {run.name!r} has no executed notebook with the record {VARIABLES!r}, which is the comparison's: "
            f"`threefold run --run {run.name}` makes it"
        )
    text = {name: variable_text(value) for name, value in variables.values.items()}
    head = f"# Generated from the record '{VARIABLES}' of executed/{variables.notebook}; not edited by hand.\n"
    found["_variables.yml"] = head + yaml.safe_dump(text, allow_unicode=True, default_style='"', width=1000)
    return found


def assemble(run: Path, report: Path, folder: Path) -> None:
    """Make a complete report folder for a run: `executed/`, `_variables.yml`, and the sources, without the parts of the
    text that are about what the run did not measure. Raises MissingInput."""
    if not (report / "index.qmd").is_file():
        raise MissingInput(f"the report's sources are not at {report.name}/: a clone of the project has them")
    shutil.copytree(report, folder, ignore=shutil.ignore_patterns(*GENERATED), dirs_exist_ok=True)
    for path, content in executed_files(run, report).items():
        atomic_write(folder / path, content)
    text = (folder / "index.qmd").read_text(encoding="utf-8")
    atomic_write(folder / "index.qmd", partial.leave_out(text, partial.missing(folder)))


def rendered(run: Path, report: Path) -> list[str]:
    """Files of a run's rendered report that differ from its notebooks or from what was rendered, one line each."""
    folder = run / "report"
    if not folder.exists():
        return []
    problems = dict.fromkeys(damaged(folder / RENDERED), "not as it was rendered")
    note = read_note(folder / RENDERED)
    for file in folder.rglob("*") if note else ():
        is_file = file.is_symlink() or not file.is_dir()
        if is_file and file.relative_to(folder).as_posix() not in (*note["files"], RENDERED):
            problems[file] = "not written by `threefold report`"
    for path, content in executed_files(run, report).items():
        if not (folder / path).is_file() or (folder / path).read_bytes() != content.encode():
            problems[folder / path] = "not what the run's notebooks say"
    return [
        f"report/{file.relative_to(folder).as_posix()}: {what}; `threefold report` renders it again"
        for file, what in problems.items()
    ]


def publish(run: Path, report: Path) -> list[Path]:
    """Make a run the published one: replace `executed/` and `_variables.yml` of the report, and return its notebooks.

    Raises ReportError where the report would not hold together; nothing is changed then.
    """
    work = report.with_name(f".{report.name}.partial")  # beside it, so that moving it into place is one rename
    shutil.rmtree(work, ignore_errors=True)
    try:
        assemble(run, report, work)
        require(work)
        replace_folder(work / "executed", report / "executed")
        atomic_write(report / "_variables.yml", (work / "_variables.yml").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return sorted((report / "executed").glob("*.ipynb"))
