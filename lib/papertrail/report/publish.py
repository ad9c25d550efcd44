"""From a run's executed notebooks to a report folder: scrubbed copies and the variables that the prose quotes."""

import shutil
import tempfile
from pathlib import Path

import yaml

from basics import paths
from basics.errors import MissingInput, ReportError
from basics.files import atomic_write, damaged, replace_folder
from papertrail.notebook_files import read_notebook, write_notebook
from papertrail.records import read as read_records
from papertrail.report.check import COMPARE, require
from papertrail.scrub import scrub

RENDERED = "rendered.json"  # hashes of the page and of what it was made from, beside it
MADE = ("executed", "_variables.yml", "index.html", "index_files", "_site", ".quarto", RENDERED)


def run_path(run) -> Path:
    """The folder of a `papertrail.run.Run`, or the folder itself."""
    return Path(getattr(run, "path", run))


def executed(run) -> list[Path]:
    """A run's executed notebooks in order; failed ones are not among them."""
    folder = run_path(run) / "notebooks"
    found = [path for path in sorted(folder.glob("*.ipynb")) if not path.name.endswith(".failed.ipynb")]
    if not any(path.name == COMPARE for path in found):
        name = run_path(run).name
        raise MissingInput(
            f"run {name!r} has no executed {COMPARE}, which holds the comparison: `threefold run --run {name}` makes it"
        )
    return found


def variables(notebook: Path) -> dict[str, str]:
    """The record "variables" of an executed comparison, every value as text."""
    found = read_records(notebook).get("variables")
    if found is None:
        raise ReportError(f"{notebook.name} publishes no record named 'variables'")
    return {name: str(value) for name, value in found.values.items()}


def variables_text(values: dict[str, str]) -> str:
    head = "# Generated from the record 'variables' of executed/06_compare.ipynb; not edited by hand.\n"
    return head + yaml.safe_dump(values, allow_unicode=True, sort_keys=True, default_style='"', width=1000)


def write_executed(run, folder: Path, *, project: Path = paths.PROJECT) -> dict[str, str]:
    """Write scrubbed copies of a run's executed notebooks to `folder` and return the variables."""
    path = run_path(run)
    found = executed(path)
    folder.mkdir(parents=True, exist_ok=True)
    roots = {str(project): "."} | {str(place): f"runs/{path.name}" for place in (path, path.resolve())}
    for notebook in found:
        write_notebook(folder / notebook.name, scrub(read_notebook(notebook, schema=True), roots, publish=True))
    return variables(path / "notebooks" / COMPARE)


def assemble(run, folder: Path, *, report: Path | None = None) -> None:
    """Make a complete report folder for a run: the sources, `executed/` and `_variables.yml`."""
    source = report or paths.REPORT
    if not (source / "index.qmd").is_file():
        raise MissingInput(f"the report's sources are not at {source.name}/: a clone of the project has them")
    shutil.copytree(
        source, folder, ignore=lambda where, names: [n for n in names if Path(where) == source and n in MADE]
    )
    values = write_executed(run, folder / "executed")
    atomic_write(folder / "_variables.yml", variables_text(values))


def rendered(run) -> list[str]:
    """What a run's rendered report holds that its notebooks do not say or its renderer did not write, one line a
    file."""
    folder = run_path(run) / "report"
    if not (folder / "index.html").is_file():
        return []
    changed = damaged(folder / RENDERED)
    with tempfile.TemporaryDirectory(prefix="threefold-") as home:
        fresh = Path(home)
        values = write_executed(run, fresh / "executed")
        (fresh / "_variables.yml").write_text(variables_text(values), encoding="utf-8")
        made = [path.relative_to(fresh) for path in sorted(fresh.rglob("*")) if path.is_file()]
        kept = {path: folder / path for path in made}
        found = {file: "as it was rendered" for file in changed}
        found |= {
            file: "what the run's notebooks say"
            for path, file in kept.items()
            if not file.is_file() or file.read_bytes() != (fresh / path).read_bytes()
        }
        return [
            f"report/{file.relative_to(folder).as_posix()}: not {what}; `threefold report` renders it anew"
            for file, what in found.items()
        ]


def publish(run, *, report: Path | None = None) -> list[Path]:
    """Make a run the published one: `report/executed/` and `report/_variables.yml`, checked before anything is
    replaced.

    Returns:
        The notebooks now published.

    Raises:
        ReportError: what does not hold together, one line a failure; nothing was changed.
    """
    target = report or paths.REPORT
    work = target.with_name(f".{target.name}.partial")  # beside it, so that moving it into place is one rename
    shutil.rmtree(work, ignore_errors=True)
    try:
        assemble(run, work, report=target)
        require(work)
        replace_folder(work / "executed", target / "executed")
        atomic_write(target / "_variables.yml", (work / "_variables.yml").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return sorted((target / "executed").glob("*.ipynb"))
